//! Pictures that the program makes: pixels to PNG, several on one sheet, and error maps in color.

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder as _, ImageError};

use crate::decode::{Color, PixelSpec};

/// Pixels between the pictures of a sheet, and around them.
const SHEET_GAP: u32 = 4;

/// What lies between the pictures of a sheet: a gray that neither dark nor bright pictures melt into.
const SHEET_GRAY: u8 = 0x80;

/// A side that small pictures are enlarged to on a sheet, by whole factors, in pixels.
const SHEET_MIN_SIDE: u32 = 64;

/// Colors of an error map from no error to the largest: ten places of the map `inferno` of Matplotlib, between which sRGB values
/// are interpolated. It grows evenly in lightness, so it can be read in gray too.
const HEAT: [[u8; 3]; 10] = [
    [0x00, 0x00, 0x04],
    [0x1b, 0x0c, 0x41],
    [0x4a, 0x0c, 0x6b],
    [0x78, 0x1c, 0x6d],
    [0xa5, 0x2c, 0x60],
    [0xcf, 0x44, 0x46],
    [0xed, 0x69, 0x25],
    [0xfb, 0x9b, 0x06],
    [0xf7, 0xd1, 0x3d],
    [0xfc, 0xff, 0xa4],
];

/// Pixels with their size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels of a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Gray or RGB.
    pub color: Color,
    /// Samples in height, width, channel order.
    pub samples: Vec<u8>,
}

impl Picture {
    /// Samples as a model sees them, [`PixelSpec::num_samples`] of them.
    pub fn of(spec: &PixelSpec, samples: Vec<u8>) -> Self {
        Self { width: spec.width, height: spec.height, color: spec.color, samples }
    }

    /// The picture as a PNG file.
    ///
    /// # Panics
    /// There are not as many samples as the size says.
    pub fn png(&self) -> Result<Vec<u8>, ImageError> {
        let color = match self.color {
            Color::Gray => ExtendedColorType::L8,
            Color::Rgb => ExtendedColorType::Rgb8,
        };
        let mut file = Vec::new();
        PngEncoder::new(&mut file).write_image(&self.samples, self.width, self.height, color)?;
        Ok(file)
    }

    /// Errors of each pixel in color: black is none, and bright yellow is `largest` and more.
    pub fn heat(width: u32, height: u32, errors: &[f64], largest: f64) -> Self {
        let samples = errors.iter().flat_map(|error| heat_color(error / largest)).collect();
        Self { width, height, color: Color::Rgb, samples }
    }

    /// A strip of all colors of [`Picture::heat`], from none on the left to the largest on the right.
    pub fn heat_scale(width: u32, height: u32) -> Self {
        let row = (0..width).flat_map(|x| heat_color(f64::from(x) / f64::from((width - 1).max(1))));
        let row: Vec<u8> = row.collect();
        Self { width, height, color: Color::Rgb, samples: row.repeat(height as usize) }
    }

    /// The color of a pixel.
    pub(crate) fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        let place = y as usize * self.width as usize + x as usize;
        match self.color {
            Color::Gray => [self.samples.get(place).copied().unwrap_or_default(); 3],
            Color::Rgb => self.samples.as_chunks::<3>().0.get(place).copied().unwrap_or_default(),
        }
    }
}

/// The color of a share of the largest error.
fn heat_color(share: f64) -> [u8; 3] {
    // Zero out of zero is no error.
    let place = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) } * (HEAT.len() - 1) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in the list of colors")]
    let below = (place as usize).min(HEAT.len() - 2);
    let part = place - below as f64;
    std::array::from_fn(|channel| {
        let (from, to) = (f64::from(HEAT[below][channel]), f64::from(HEAT[below + 1][channel]));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
        let value = (from + (to - from) * part).round() as u8;
        value
    })
}

/// Puts pictures on one sheet in rows of `columns`, each in a cell of the size of the largest, small ones enlarged by a whole
/// factor.
pub fn sheet(pictures: &[Picture], columns: usize) -> Picture {
    let columns = columns.clamp(1, pictures.len().max(1));
    let rows = pictures.len().div_ceil(columns);
    let width = pictures.iter().map(|picture| picture.width).max().unwrap_or(1);
    let height = pictures.iter().map(|picture| picture.height).max().unwrap_or(1);
    let factor = (SHEET_MIN_SIDE / width.min(height).max(1)).max(1);
    let step = (width * factor + SHEET_GAP, height * factor + SHEET_GAP);
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let (sheet_width, sheet_height) = (count(columns) * step.0 + SHEET_GAP, count(rows) * step.1 + SHEET_GAP);
    let mut samples = vec![SHEET_GRAY; sheet_width as usize * sheet_height as usize * 3];
    for (number, picture) in pictures.iter().enumerate() {
        let left = SHEET_GAP + count(number % columns) * step.0;
        let top = SHEET_GAP + count(number / columns) * step.1;
        // As large as its cell allows, so that thumbnails of other sizes stand beside it.
        let factor = (width * factor / picture.width.max(1)).min(height * factor / picture.height.max(1)).max(1);
        for y in 0..picture.height * factor {
            let start = ((top + y) as usize * sheet_width as usize + left as usize) * 3;
            let pixels = (0..picture.width * factor).flat_map(|x| picture.pixel(x / factor, y / factor));
            for (sample, value) in samples[start..].iter_mut().zip(pixels) {
                *sample = value;
            }
        }
    }
    Picture { width: sheet_width, height: sheet_height, color: Color::Rgb, samples }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(width: u32, height: u32, samples: &[u8]) -> Picture {
        Picture { width, height, color: Color::Gray, samples: samples.to_vec() }
    }

    #[test]
    fn a_png_holds_the_samples() {
        let rgb = Picture { width: 2, height: 1, color: Color::Rgb, samples: vec![1, 2, 3, 4, 5, 6] };
        for picture in [gray(2, 3, &[0, 50, 100, 150, 200, 255]), rgb] {
            let read = image::load_from_memory(&picture.png().unwrap()).unwrap();
            assert_eq!((read.width(), read.height()), (picture.width, picture.height));
            assert_eq!(read.as_bytes(), picture.samples);
        }
    }

    #[test]
    fn a_sheet_has_each_picture_in_its_cell_enlarged() {
        let pictures = [gray(32, 32, &[10; 1024]), gray(32, 32, &[20; 1024]), gray(64, 16, &[30; 1024])];
        let sheet = sheet(&pictures, 2);
        // The cells are 64 x 32, twice as large, with gaps of 4.
        assert_eq!((sheet.width, sheet.height), (2 * 128 + 12, 2 * 64 + 12));
        assert_eq!(sheet.pixel(0, 0), [SHEET_GRAY; 3]);
        assert_eq!(sheet.pixel(4, 4), [10; 3]);
        assert_eq!(sheet.pixel(4 + 63, 4 + 63), [10; 3]);
        assert_eq!(sheet.pixel(4 + 64, 4), [SHEET_GRAY; 3]);
        assert_eq!(sheet.pixel(4 + 132, 4), [20; 3]);
        assert_eq!(sheet.pixel(4 + 127, 4 + 68), [30; 3]);
        assert_eq!(sheet.pixel(4 + 132, 4 + 68), [SHEET_GRAY; 3]);
    }

    #[test]
    fn heat_grows_from_black_to_bright_and_stays_there() {
        let map = Picture::heat(4, 1, &[0.0, 0.5, 1.0, 9.0], 1.0);
        assert_eq!(map.pixel(0, 0), HEAT[0]);
        assert_eq!(map.pixel(2, 0), HEAT[9]);
        assert_eq!(map.pixel(3, 0), HEAT[9]);
        let brightness = |x| map.pixel(x, 0).iter().map(|value| u32::from(*value)).sum::<u32>();
        assert!(brightness(0) < brightness(1) && brightness(1) < brightness(2));
        assert_eq!(Picture::heat(1, 1, &[0.0], 0.0).pixel(0, 0), HEAT[0]);
        let scale = Picture::heat_scale(10, 2);
        assert_eq!((scale.pixel(0, 1), scale.pixel(9, 0)), (HEAT[0], HEAT[9]));
    }
}
