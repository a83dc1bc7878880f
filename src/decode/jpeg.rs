//! JPEG, decoded as libjpeg-turbo decodes it, which is the decoder in Pillow.
//!
//! The decoder is given the whole file and cannot be told to stop, so what it will take is estimated first, from the number of passes over
//! the frame: a progressive file may have thousands of them in a few kilobytes.

use image::ColorType;
use image::metadata::Orientation;
use libjpeg_turbo_rs::{DecodeLimits as FrameLimits, Decoder, JpegError, PixelFormat, ScalingFactor};

use super::deadline::Deadline;
use super::{Color, DecodeLimits, DecodeMode, PixelSpec, Raw, Reject, Size, bounded_reason};

/// Media type.
const FORMAT: &str = "image/jpeg";

/// Bits a sample.
const PRECISION: u8 = 8;

/// Pixels in a row or a column of a block.
const BLOCK_SIDE: u32 = 8;

/// The longest that a pass takes for one of its blocks, in nanoseconds: each of 63 coefficients has a code of its own. Measured.
const PASS_NANOS: u64 = 250;

/// Sizes at which the decoder has fast paths, as shares of an eighth: whole, half, quarter, eighth.
const SCALES: [u32; 4] = [8, 4, 2, 1];

/// Decodes a JPEG to `samples`, and reads how it is to be turned.
pub(super) fn decode(
    bytes: &[u8],
    (specs, mode): (&[PixelSpec], DecodeMode),
    limits: &DecodeLimits,
    deadline: &Deadline,
    samples: &mut Vec<u8>,
) -> Result<Raw, Reject> {
    let failed = |error: JpegError| reject(&error, limits);
    let Passes { has_end, components } = Passes::of(bytes);
    if !has_end {
        return Err(Reject::Truncated { format: FORMAT });
    }
    // Sizes are checked below, in our own words.
    let any =
        FrameLimits { max_width: usize::MAX, max_height: usize::MAX, max_pixels: u64::MAX, ..FrameLimits::default() };
    let mut decoder = Decoder::new_with_limits(bytes, any).map_err(failed)?;
    let header = decoder.header();
    let (Ok(width), Ok(height)) = (u32::try_from(header.width()), u32::try_from(header.height())) else {
        return Err(Reject::Corrupt { format: FORMAT, reason: "the image has no frame".to_owned() });
    };
    let whole = Size { width, height };
    if width == 0 || height == 0 {
        return Err(Reject::Corrupt { format: FORMAT, reason: "the image has no pixels".to_owned() });
    }
    limits.check_size(width, height)?;
    let blocks = u64::from(width.div_ceil(BLOCK_SIDE)) * u64::from(height.div_ceil(BLOCK_SIDE));
    let nanos = blocks.saturating_mul(components).saturating_mul(PASS_NANOS);
    if u128::from(nanos) > limits.max_decode.as_nanos() {
        return Err(Reject::TimedOut { limit: limits.max_decode });
    }
    if header.precision != PRECISION || header.is_lossless {
        let process =
            if header.is_lossless { "lossless".to_owned() } else { format!("{} bits a sample", header.precision) };
        return Err(Reject::Unsupported { format: FORMAT, reason: process });
    }
    let is_gray_enough = mode == DecodeMode::Fast && specs.iter().all(|spec| spec.color == Color::Gray);
    let (format, color) = match header.components.len() {
        1 => (PixelFormat::Grayscale, ColorType::L8),
        3 if is_gray_enough => (PixelFormat::Grayscale, ColorType::L8),
        3 => (PixelFormat::Rgb, ColorType::Rgb8),
        4 => (PixelFormat::Cmyk, ColorType::Rgb8),
        count => {
            return Err(Reject::Unsupported { format: FORMAT, reason: format!("{count} components") });
        }
    };
    let orientation = decoder.exif_orientation().and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms);
    decoder.set_output_format(format);
    // As in Pillow, what is damaged within the coded data decodes to whatever it decodes to, as far as it decodes at all.
    decoder.set_lenient(true);
    if mode == DecodeMode::Fast {
        decoder.set_scale(scale(whole, orientation, specs));
    }
    let num_bytes = decoder.output_buffer_size().map_err(failed)?;
    samples.resize(num_bytes, 0);
    let info = decoder.decode_image_into(samples).map_err(failed)?;
    deadline.look();
    samples.truncate(info.bytes_written);
    if format == PixelFormat::Cmyk {
        inverted_cmyk_to_rgb(samples);
    }
    let (Ok(width), Ok(height)) = (u32::try_from(info.width), u32::try_from(info.height)) else {
        return Err(Reject::Corrupt { format: FORMAT, reason: "the image has no pixels".to_owned() });
    };
    Ok(Raw { size: Size { width, height }, color, orientation, whole })
}

/// The smallest size to decode at that is no smaller than any of the specs asks for.
fn scale(whole: Size, orientation: Orientation, specs: &[PixelSpec]) -> ScalingFactor {
    let is_enough = |eighths: u32| {
        let side = |side: u32| (side as usize * eighths as usize).div_ceil(8);
        specs.iter().all(|spec| {
            let seen = if spec.exif_rotation { whole.turned(orientation) } else { whole };
            let (width, height) = spec.fit.axes((seen.width, seen.height), (spec.width, spec.height), spec.resize);
            side(seen.width) >= width.resized && side(seen.height) >= height.resized
        })
    };
    let eighths = SCALES.into_iter().rev().find(|eighths| is_enough(*eighths)).unwrap_or(8);
    ScalingFactor::new(eighths, 8)
}

/// Turns samples of C, M, Y and K to R, G and B in their place, as Pillow does. They are stored as Adobe does, inverted: 255 is no ink.
fn inverted_cmyk_to_rgb(samples: &mut Vec<u8>) {
    // `MULDIV255` and `cmyk2rgb` of Pillow's `Convert.c`.
    let product = |a: u8, b: u8| {
        let product = u32::from(a) * u32::from(b) + 128;
        (((product >> 8) + product) >> 8).to_le_bytes()[0]
    };
    for pixel in 0..samples.len() / 4 {
        let [cyan, magenta, yellow, black] = [0, 1, 2, 3].map(|ink| samples[pixel * 4 + ink]);
        let rgb = [cyan, magenta, yellow].map(|ink| black.saturating_sub(product(255 - ink, black)));
        samples[pixel * 3..pixel * 3 + 3].copy_from_slice(&rgb);
    }
    samples.truncate(samples.len() / 4 * 3);
}

fn reject(error: &JpegError, limits: &DecodeLimits) -> Reject {
    match error {
        JpegError::Unsupported(reason) => Reject::Unsupported { format: FORMAT, reason: bounded_reason(reason) },
        JpegError::LimitExceeded { .. } => Reject::TooMuchMemory { format: FORMAT, limit: limits.max_decoder_bytes() },
        error => Reject::Corrupt { format: FORMAT, reason: bounded_reason(&error.to_string()) },
    }
}

/// Width and height of a JPEG that is part of another file. `None` where it has no header that can be read, or is progressive:
/// nobody nests those, and decoding one takes many passes.
pub(super) fn size_of_nested(bytes: &[u8]) -> Option<(u32, u32)> {
    if markers(bytes).any(|(marker, _)| marker == START_OF_PROGRESSIVE_FRAME) {
        return None;
    }
    let (_, frame) = markers(bytes).find(|(marker, _)| FRAMES.contains(marker))?;
    let side = |place: usize| Some(u32::from(u16::from_be_bytes(*frame.get(place..)?.first_chunk()?)));
    // One byte of precision, then height and width (ITU-T T.81, B.2.2).
    Some((side(3)?, side(1)?))
}

/// Frames of one pass or of several, coded by Huffman: baseline, extended, progressive.
const FRAMES: [u8; 3] = [0xC0, 0xC1, START_OF_PROGRESSIVE_FRAME];
const START_OF_PROGRESSIVE_FRAME: u8 = 0xC2;
const START_OF_SCAN: u8 = 0xDA;
const END_OF_IMAGE: u8 = 0xD9;

/// The passes of a JPEG over its frame.
struct Passes {
    /// Whether the file goes on until its end marker.
    has_end: bool,
    /// Components of all passes, added up.
    components: u64,
}

impl Passes {
    fn of(bytes: &[u8]) -> Self {
        let mut passes = Self { has_end: false, components: 0 };
        for (marker, content) in markers(bytes) {
            match (marker, content) {
                (START_OF_SCAN, [components, ..]) => passes.components += u64::from(*components),
                (END_OF_IMAGE, _) => passes.has_end = true,
                _ => {}
            }
        }
        passes
    }
}

/// The markers of a JPEG with the content of their segments, as far as they can be read.
///
/// Segments are skipped by their length, so that the end of an embedded thumbnail does not count, and bytes after the end do no harm
/// (ITU-T T.81, annex B.1.1).
fn markers(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    const MARKER: u8 = 0xFF;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        loop {
            let place = rest.iter().position(|&byte| byte == MARKER)?;
            rest = &rest[place + 1..];
            match rest {
                // A stuffed byte of the coded data.
                [0x00, after @ ..] => rest = after,
                // Markers that stand alone: TEM, restarts, start and end of the image.
                [marker @ (0x01 | 0xD0..=0xD9), after @ ..] => {
                    rest = after;
                    return Some((*marker, &[][..]));
                }
                // A fill byte before the marker's code.
                [MARKER, ..] => {}
                [marker, segment @ ..] => {
                    let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
                    rest = segment.get(length..)?;
                    return Some((*marker, segment.get(2..length).unwrap_or_default()));
                }
                [] => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;
    use image::{ExtendedColorType, ImageEncoder as _};

    use super::*;

    #[test]
    fn the_end_of_an_embedded_thumbnail_is_not_the_end_of_the_jpeg() {
        let mut bytes = Vec::new();
        JpegEncoder::new(&mut bytes).write_image(&[7; 64], 8, 8, ExtendedColorType::L8).unwrap();
        // An application segment that holds an end marker.
        bytes.splice(2..2, [0xFF, 0xE1, 0x00, 0x04, 0xFF, 0xD9]);
        assert!(Passes::of(&bytes).has_end);
        assert!(!Passes::of(&bytes[..bytes.len() - 2]).has_end);
        assert_eq!(size_of_nested(&bytes), Some((8, 8)));
    }
}
