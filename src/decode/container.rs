//! Formats that hold other coded images: their parts must keep to the size in the file's own header.
//!
//! The decoders check the header of the file, and then trust that of a part: a TIFF of one pixel may hold a JPEG of 268 million, and a
//! WebP a frame larger than its canvas. So the parts are looked at before anything is decoded.

use std::ops::Range;

use tiff::decoder::{ChunkType, Decoder};
use tiff::tags::{CompressionMethod, Tag};

use super::deadline::{Deadline, TimedReader};
use super::{DecodeLimits, Reject, jpeg};

/// Checks that the JPEGs within a TIFF are no larger than the strips or tiles that they are. Of a file that is no TIFF,
/// nothing is said; the decoder will.
pub(super) fn check_tiff(bytes: &[u8], limits: &DecodeLimits, deadline: &Deadline) -> Result<(), Reject> {
    const FORMAT: &str = "image/tiff";
    let Some(chunks) = jpeg_chunks(bytes, deadline) else { return Ok(()) };
    let (width, height) = chunks.size;
    limits.check_size(width, height)?;
    for place in chunks.places {
        if deadline.look() {
            return Err(Reject::TimedOut { limit: limits.max_decode });
        }
        let Some(chunk) = place.and_then(|place| bytes.get(place)) else {
            return Err(Reject::Truncated { format: FORMAT });
        };
        // As the decoder puts them together: the tables without their end marker, the strip without its start marker.
        let size = match (chunks.tables.as_deref(), chunk.get(2..)) {
            (None, _) => jpeg::size_of_nested(chunk),
            (Some([tables @ .., _, _]), Some(chunk)) => jpeg::size_of_nested(&[tables, chunk].concat()),
            _ => None,
        };
        if size.is_none_or(|size| size.0 > width || size.1 > height) {
            let reason = "a strip or tile is no baseline JPEG of its size".to_owned();
            return Err(Reject::Corrupt { format: FORMAT, reason });
        }
    }
    Ok(())
}

/// The strips or tiles of a TIFF that are JPEGs.
struct JpegChunks {
    /// Width and height of a chunk.
    size: (u32, u32),
    /// Places in the file; `None` for one that no file has.
    places: Vec<Option<Range<usize>>>,
    tables: Option<Vec<u8>>,
}

fn jpeg_chunks(bytes: &[u8], deadline: &Deadline) -> Option<JpegChunks> {
    let mut decoder = Decoder::new(TimedReader::new(bytes, deadline)).ok()?;
    let compression: u16 = decoder.find_tag_unsigned(Tag::Compression).ok()??;
    if compression != CompressionMethod::ModernJPEG.to_u16() {
        return None;
    }
    let (offsets, lengths) = match decoder.get_chunk_type() {
        ChunkType::Strip => (Tag::StripOffsets, Tag::StripByteCounts),
        ChunkType::Tile => (Tag::TileOffsets, Tag::TileByteCounts),
    };
    let offsets = decoder.get_tag_u64_vec(offsets).ok()?;
    let lengths = decoder.get_tag_u64_vec(lengths).ok()?;
    let tables =
        decoder.find_tag(Tag::JPEGTables).ok()?.map(tiff::decoder::ifd::Value::into_u8_vec).transpose().ok()?;
    let place = |(offset, length): (&u64, &u64)| {
        let start = usize::try_from(*offset).ok()?;
        Some(start..start.checked_add(usize::try_from(*length).ok()?)?)
    };
    let places = offsets.iter().zip(&lengths).map(place).collect();
    Some(JpegChunks { size: decoder.chunk_dimensions(), places, tables })
}

/// Media type of WebP.
const WEBP: &str = "image/webp";

/// Bytes of a lossless WebP frame at most, for each of its pixels: four samples, and some for what tells them apart.
const MAX_LOSSLESS_BYTES_PER_PIXEL: u64 = 5;

/// Bytes of any lossless WebP frame that are taken for codes and headers.
const MAX_LOSSLESS_HEADER_BYTES: u64 = 64 << 10;

/// Checks that the chunks of a WebP lie in the file, and that the frame to be decoded is no larger than the canvas may be: its decoder
/// makes room for as much as they say.
pub(super) fn check_webp(bytes: &[u8], limits: &DecodeLimits) -> Result<(), Reject> {
    const FILE_HEADER_BYTES: usize = 12;
    const FRAME_HEADER_BYTES: usize = 16;
    let mut first_frame = true;
    let mut canvas = (0, 0);
    for chunk in riff_chunks(bytes, FILE_HEADER_BYTES) {
        let (kind, content) = chunk.ok_or(Reject::Truncated { format: WEBP })?;
        match kind {
            b"VP8X" => canvas = size_of_24_bits(content, 4).unwrap_or(canvas),
            b"ANMF" if std::mem::take(&mut first_frame) => {
                let frame = size_of_24_bits(content, 6).unwrap_or(canvas);
                for (kind, content) in riff_chunks(content, FRAME_HEADER_BYTES).flatten() {
                    check_frame(*kind, content, frame, limits)?;
                }
            }
            _ => check_frame(*kind, content, canvas, limits)?,
        }
    }
    Ok(())
}

/// Checks a chunk of coded pixels; `size` is that of the frame that alpha is coded for.
fn check_frame(kind: [u8; 4], content: &[u8], size: (u32, u32), limits: &DecodeLimits) -> Result<(), Reject> {
    match (&kind, content) {
        // A key frame (RFC 6386, section 9.1); others are not decoded.
        (b"VP8 ", [_, _, _, 0x9D, 0x01, 0x2A, width_low, width_high, height_low, height_high, ..]) => {
            let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3FFF);
            limits.check_size(side(*width_low, *width_high), side(*height_low, *height_high))
        }
        (b"VP8L", [0x2F, a, b, c, d, ..]) => {
            let sides = u32::from_le_bytes([*a, *b, *c, *d]);
            check_lossless(content, ((sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1))
        }
        (b"ALPH", _) => check_lossless(content, size),
        _ => Ok(()),
    }
}

/// A lossless frame may define 65536 sets of codes, of which its decoder keeps some hundred bytes for each that it reads. Frames with
/// more bytes than their pixels have uncoded are made for nothing else.
fn check_lossless(content: &[u8], (width, height): (u32, u32)) -> Result<(), Reject> {
    let most = u64::from(width) * u64::from(height) * MAX_LOSSLESS_BYTES_PER_PIXEL + MAX_LOSSLESS_HEADER_BYTES;
    if content.len() as u64 > most {
        let reason = format!("{} bytes of a lossless frame for {width} x {height} pixels", content.len());
        return Err(Reject::Corrupt { format: WEBP, reason });
    }
    Ok(())
}

/// Width and height, less one each, as two numbers of 24 bits at a place.
fn size_of_24_bits(content: &[u8], place: usize) -> Option<(u32, u32)> {
    let sides: &[u8; 6] = content.get(place..)?.first_chunk()?;
    let side = |bytes: [u8; 3]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]) + 1;
    Some((side([sides[0], sides[1], sides[2]]), side([sides[3], sides[4], sides[5]])))
}

/// The chunks of a RIFF file or chunk from a place on: kind and content; `None` for one that does not end in `bytes`.
fn riff_chunks(bytes: &[u8], from: usize) -> impl Iterator<Item = Option<(&[u8; 4], &[u8])>> {
    let mut rest = bytes.get(from..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (kind, after) = rest.split_first_chunk::<4>()?;
        let (length, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let Some(content) = after.get(..length) else {
            rest = &[];
            return Some(None);
        };
        // Chunks of odd length are followed by a byte that is not theirs.
        rest = after.get(length + length % 2..).unwrap_or_default();
        Some(Some((kind, content)))
    })
}
