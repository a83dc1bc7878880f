//! The pictures of a report: images of the source, small, and what the model sees in some of them.
//!
//! Images are read again from the source, unit by unit, only those that are shown, and are made small as they come. Reading ends at a
//! deadline, so that a report over a large table on a slow store takes its time and no more.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;

use super::data::{Encoded, Panels};
use crate::decode::{Color, Pixels};
use crate::error::Error;
use crate::explanation::{Look, view};
use crate::picture::Picture;
use crate::stages::Job;

/// The longest side of a strange image, in pixels.
const IMAGE_SIDE: u32 = 256;

/// The longest side of an image of a group.
const GROUP_SIDE: u32 = 112;

/// Side of the square of an image on the map.
pub(super) const TILE_SIDE: u32 = 48;

/// Pictures in a row of the map's sheet.
pub(super) const SHEET_COLUMNS: u32 = 20;

/// Of JPEG: what `libjpeg` calls good, at which a small picture takes two to five kilobytes.
const JPEG_QUALITY: u8 = 80;

/// Pictures of up to so many samples are written without loss: they are small, and shown enlarged.
const LOSSLESS_SAMPLES: usize = 64 * 64;

/// An image by its partition and id.
pub(super) type Key = (String, String);

/// What an image is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// It is shown large, with what the model sees in it.
    Strange,
    /// It is shown in a group.
    Group,
    /// It is a point of the map.
    Point,
}

/// The images that were read.
#[derive(Debug, Default)]
pub(super) struct Pictures {
    /// The images of high score, and their pixels as the model sees them.
    pub(super) strange: BTreeMap<Key, (Picture, Pixels)>,
    /// Those of groups.
    pub(super) of_groups: BTreeMap<Key, Picture>,
    /// Squares for the map.
    pub(super) tiles: BTreeMap<Key, Picture>,
    /// What was not read any more when time was up.
    pub(super) left_out: HashSet<&'static str>,
}

impl Pictures {
    /// Reads the images that `wanted` names for one use or more. Uses come one after the other where a table is large, so that what
    /// matters most is there when time is up.
    pub(super) fn read(
        job: &Job<'_>,
        wanted: &BTreeMap<Use, HashSet<Key>>,
        deadline: Option<Instant>,
    ) -> Result<Self, Error> {
        /// Bytes of a source that is read once for all uses.
        const SMALL_SOURCE: u64 = 256 << 20;
        let mut pictures = Self::default();
        let is_wanted = |partition: &str| wanted.values().flatten().any(|(of, _)| of == partition);
        let partitions = job.source.partitions.iter().filter(|partition| is_wanted(&partition.values.to_string()));
        let uses: Vec<Use> = wanted.keys().copied().collect();
        if partitions.map(|partition| partition.num_bytes).sum::<u64>() <= SMALL_SOURCE {
            pictures.read_uses(job, wanted, &uses, deadline)?;
        } else {
            for of in uses {
                pictures.read_uses(job, wanted, &[of], deadline)?;
            }
        }
        Ok(pictures)
    }

    fn read_uses(
        &mut self,
        job: &Job<'_>,
        wanted: &BTreeMap<Use, HashSet<Key>>,
        uses: &[Use],
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        let Some(input) = job.contract.input.image() else { return Ok(()) };
        let has = |of: Use, key: &Key| uses.contains(&of) && wanted.get(&of).is_some_and(|keys| keys.contains(key));
        for partition in &job.source.partitions {
            let name = partition.values.to_string();
            let keys = uses.iter().filter_map(|of| wanted.get(of)).flatten();
            let ids: HashSet<String> = keys.filter(|(of, _)| *of == name).map(|(_, id)| id.clone()).collect();
            let mut missing = ids.len();
            let mut pass = job.pass();
            pass.only_ids = Some(Arc::new(ids));
            for unit in &partition.units {
                if missing == 0 {
                    break;
                }
                if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                    self.left_out.extend(uses.iter().map(|of| match of {
                        Use::Strange => "strange images",
                        Use::Group => "images of groups",
                        Use::Point => "images of the map",
                    }));
                    return Ok(());
                }
                pass.decode_unit(partition, unit, &input.pixels, |batch| {
                    missing = missing.saturating_sub(batch.pixels.len());
                    for (row, pixels) in batch.pixels.into_iter().enumerate() {
                        let (Ok(pixels), Some(bytes)) = (pixels, &batch.images[row]) else { continue };
                        let key = (name.clone(), batch.ids.value(row).to_owned());
                        let small = |side| view(job, bytes, &pixels, side, input.pixels.exif_rotation);
                        if has(Use::Group, &key)
                            && let Some(picture) = small(GROUP_SIDE)
                        {
                            self.of_groups.entry(key.clone()).or_insert(picture);
                        }
                        if has(Use::Point, &key)
                            && let Some(picture) = small(TILE_SIDE)
                        {
                            self.tiles.entry(key.clone()).or_insert(picture);
                        }
                        if has(Use::Strange, &key)
                            && let Some(picture) = small(IMAGE_SIDE)
                        {
                            self.strange.entry(key).or_insert((picture, pixels));
                        }
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

/// Writes pictures for the report, as long as there is room.
#[derive(Debug)]
pub(super) struct Room {
    bytes_left: usize,
    /// Pictures for which there was none.
    pub(super) num_left_out: usize,
}

impl Room {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { bytes_left: max_bytes, num_left_out: 0 }
    }

    /// The picture as a `data:` URL: PNG if it is so small that it is shown enlarged, else JPEG.
    pub(super) fn encode(&mut self, picture: &Picture) -> Result<Option<Encoded>, Error> {
        let Picture { width, height, color, samples } = picture;
        let (kind, file) = if samples.len() / color.channels() <= LOSSLESS_SAMPLES {
            ("png", picture.png()?)
        } else {
            let mut file = Vec::new();
            let layout = match color {
                Color::Gray => ExtendedColorType::L8,
                Color::Rgb => ExtendedColorType::Rgb8,
            };
            JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY).encode(samples, *width, *height, layout)?;
            ("jpeg", file)
        };
        let data = format!("data:image/{kind};base64,{}", STANDARD.encode(file));
        let Some(rest) = self.bytes_left.checked_sub(data.len()) else {
            self.num_left_out += 1;
            return Ok(None);
        };
        self.bytes_left = rest;
        Ok(Some(Encoded { width: *width, height: *height, data }))
    }

    /// The panels of a strange image, with the error at the end of the scale.
    pub(super) fn panels(&mut self, image: &Picture, look: Option<&Look>) -> Result<(Panels, Option<f64>), Error> {
        let mut panels = Panels { image: self.encode(image)?, ..Panels::default() };
        let Some(look) = look else { return Ok((panels, None)) };
        panels.input = self.encode(&look.input)?;
        panels.reconstruction = look.reconstruction.as_ref().map(|picture| self.encode(picture)).transpose()?.flatten();
        let Some(map) = &look.errors else { return Ok((panels, None)) };
        panels.error_map = self.encode(&map.picture)?;
        Ok((panels, Some(map.largest)))
    }
}

/// Squares side by side, each with its picture in the middle.
pub(super) fn sheet<'a>(tiles: impl ExactSizeIterator<Item = &'a Picture>) -> Option<Picture> {
    let count = u32::try_from(tiles.len()).ok().filter(|count| *count > 0)?;
    let (width, height) = (SHEET_COLUMNS * TILE_SIDE, count.div_ceil(SHEET_COLUMNS) * TILE_SIDE);
    let mut samples = vec![0; width as usize * height as usize * Color::Rgb.channels()];
    for (number, tile) in (0..).zip(tiles) {
        let left = number % SHEET_COLUMNS * TILE_SIDE + TILE_SIDE.saturating_sub(tile.width) / 2;
        let top = number / SHEET_COLUMNS * TILE_SIDE + TILE_SIDE.saturating_sub(tile.height) / 2;
        for y in 0..tile.height.min(TILE_SIDE) {
            for x in 0..tile.width.min(TILE_SIDE) {
                let place = ((top + y) as usize * width as usize + (left + x) as usize) * Color::Rgb.channels();
                samples[place..place + Color::Rgb.channels()].copy_from_slice(&tile.pixel(x, y));
            }
        }
    }
    Some(Picture { width, height, color: Color::Rgb, samples })
}
