//! JPEG: the decoder of the `image` crate, given bytes that end at the deadline.
//!
//! The `image` crate reads a JPEG to its end before it decodes the first of its scans, and a progressive one may have a hundred over
//! the whole frame. So its decoder, `zune-jpeg`, is called here as the `image` crate calls it, but with a reader of our own.

use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer};
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::deadline::{Deadline, TimedBytes};
use super::{DecodeLimits, Reject, bounded_reason};

/// Media type.
const FORMAT: &str = "image/jpeg";

/// Decodes a JPEG, and reads how it is to be turned.
pub(super) fn decode(
    bytes: &[u8],
    limits: &DecodeLimits,
    deadline: &Deadline,
) -> Result<(DynamicImage, Orientation), Reject> {
    if !has_end(bytes) {
        return Err(Reject::Truncated { format: FORMAT });
    }
    // What is damaged within the coded data decodes to whatever it decodes to, and sides are checked below.
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut header = JpegDecoder::new_with_options(TimedBytes::new(bytes, deadline), options);
    header.decode_headers().map_err(|error| reject(&error, limits))?;
    let size =
        header.dimensions().and_then(|(width, height)| Some((u32::try_from(width).ok()?, u32::try_from(height).ok()?)));
    let (Some((width, height)), Some(coded)) = (size, header.input_colorspace()) else {
        return Err(Reject::Corrupt { format: FORMAT, reason: "the image has no frame".to_owned() });
    };
    limits.check_size(width, height)?;
    let orientation =
        header.exif().and_then(|exif| Orientation::from_exif_chunk(exif)).unwrap_or(Orientation::NoTransforms);
    drop(header);

    let (color, channels) = match coded {
        ColorSpace::Luma => (ColorSpace::Luma, 1),
        ColorSpace::LumaA => (ColorSpace::LumaA, 2),
        ColorSpace::RGBA => (ColorSpace::RGBA, 4),
        _ => (ColorSpace::RGB, 3),
    };
    let mut samples = vec![0; width as usize * height as usize * channels];
    let options = options.jpeg_set_out_colorspace(color);
    JpegDecoder::new_with_options(TimedBytes::new(bytes, deadline), options)
        .decode_into(&mut samples)
        .map_err(|error| reject(&error, limits))?;
    let image = match channels {
        1 => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageLuma8),
        2 => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageLumaA8),
        4 => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgba8),
        _ => ImageBuffer::from_raw(width, height, samples).map(DynamicImage::ImageRgb8),
    };
    let image = image.ok_or(Reject::Corrupt { format: FORMAT, reason: "the image has no pixels".to_owned() })?;
    Ok((image, orientation))
}

fn reject(error: &DecodeErrors, limits: &DecodeLimits) -> Reject {
    match error {
        DecodeErrors::Unsupported(kind) => {
            Reject::Unsupported { format: FORMAT, reason: bounded_reason(&format!("{kind:?}")) }
        }
        DecodeErrors::LargeDimensions(_) => Reject::TooMuchMemory { format: FORMAT, limit: limits.max_decoder_bytes() },
        error => Reject::Corrupt { format: FORMAT, reason: bounded_reason(&format!("{error:?}")) },
    }
}

/// Width and height of a JPEG that is part of another file. `None` where it has no header that can be read, or is progressive:
/// nobody nests those, and decoding one takes many passes.
pub(super) fn size_of_nested(bytes: &[u8]) -> Option<(u32, u32)> {
    if is_progressive(bytes) {
        return None;
    }
    let mut decoder = JpegDecoder::new(ZCursor::new(bytes));
    decoder.decode_headers().ok()?;
    let (width, height) = decoder.dimensions()?;
    Some((u32::try_from(width).ok()?, u32::try_from(height).ok()?))
}

const START_OF_PROGRESSIVE_FRAME: u8 = 0xC2;
const END_OF_IMAGE: u8 = 0xD9;

/// Whether a JPEG goes on until its end marker. The decoder fills what is missing with gray, so this is checked before.
fn has_end(bytes: &[u8]) -> bool {
    markers(bytes).any(|marker| marker == END_OF_IMAGE)
}

fn is_progressive(bytes: &[u8]) -> bool {
    markers(bytes).any(|marker| marker == START_OF_PROGRESSIVE_FRAME)
}

/// The markers of a JPEG, as far as they can be read.
///
/// Segments are skipped by their length, so that the end of an embedded thumbnail does not count, and bytes after the end do no harm
/// (ITU-T T.81, annex B.1.1).
fn markers(bytes: &[u8]) -> impl Iterator<Item = u8> {
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
                    return Some(*marker);
                }
                // A fill byte before the marker's code.
                [MARKER, ..] => {}
                [marker, high, low, ..] => {
                    rest = rest.get(1 + usize::from(u16::from_be_bytes([*high, *low]))..)?;
                    return Some(*marker);
                }
                [_] | [_, _] | [] => return None,
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
        assert!(has_end(&bytes));
        assert!(!has_end(&bytes[..bytes.len() - 2]));
        assert_eq!(size_of_nested(&bytes), Some((8, 8)));
    }
}
