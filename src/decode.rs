//! Image bytes to pixels: what a model is given for an image of the table.
//!
//! [`decode`] recognizes the format by its content, checks the size in the header before any pixel is allocated,
//! decodes, turns the image upright, converts its color, and resizes it to a [`PixelSpec`]. The pixels equal those of
//! `ImageOps.exif_transpose(Image.open(f)).convert(color).resize(size, filter)` in Pillow 13, the library most models
//! are trained with: to the bit for JPEG and for lossless formats with 8 bits a sample, and as close as two WebP decoders
//! agree. ([`DecodeMode::Fast`] gives some of that up.) [`Normalizer`] then makes the numbers of the model's input tensor.
//!
//! An image that cannot be decoded is not an error of the run but a [`Reject`]: a status and a reason for its row.
//!
//! # What hostile images can cost
//!
//! [`DecodeLimits`] says how many bytes, pixels and seconds. Sizes are taken from headers before there is room for pixels, also
//! from the headers of images within the image; files that say more about their size than there are bytes end early.
//! A decoder gets its bytes from a reader that stops at the deadline, which ends its work; a panic ends it too. That of JPEG takes no
//! reader, so files of more passes over their frame than could be made in the time are refused beforehand. Should a decoder not end
//! all the same, then its thread is left behind ([`crate::pass`]).
//!
//! One limit is above what [`DecodeLimits`] say: a lossless WebP of a million pixels and more can define 65536 sets of codes, for which
//! its decoder takes up to 7 GiB.
//!
//! # Rules where formats leave a choice
//!
//! - Alpha is dropped, not blended with a background. Palettes are looked up. 1, 2 and 4-bit gray is stretched to 8.
//! - 16-bit samples keep their high byte. Pillow does so for color; its 16-bit gray images clip at 255 when converted
//!   to 8 bits, which leaves nothing of most of them, and is not followed.
//! - Floating-point samples are clamped to 0..=1 and stretched to 0..=255, halves rounded up.
//! - CMYK JPEGs are read as Adobe writes them (inverted), with or without an Adobe marker, as Pillow does.
//! - Of an animation, the first frame.
//! - Color profiles are ignored.
//!
//! # Not here
//!
//! Nothing is read from or written to storage, and nothing is run in parallel: a caller decodes many images by calling
//! many [`Decoder`]s (or [`BatchDecoder`]s) in threads of its own, each of which keeps some working memory. TIFFs that the
//! `image` crate does not read (palette, `YCbCr`, one-channel floating point) are rejected as unsupported.

mod batch;
mod container;
mod deadline;
mod jpeg;
mod resize;

use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::time::Duration;

use image::error::ImageError;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageFormat, ImageReader, Limits};
use serde::{Deserialize, Serialize};

pub use self::batch::{BatchDecoder, DecodedBatch, DecodedImage};
use self::deadline::{Deadline, TimedReader};
pub use self::resize::Filter;
use self::resize::{Axis, MAX_KEPT_BYTES, Resizer};
use crate::caught::caught;

/// Default of [`DecodeLimits::max_image_bytes`]: 64 MiB. Compressed photos of today's largest sensors stay below it.
pub const DEFAULT_MAX_IMAGE_BYTES: NonZeroU64 = NonZeroU64::new(64 << 20).unwrap();

/// Default of [`DecodeLimits::max_pixels`]: 2^26 (67 million, 8192 x 8192). As RGB this is 192 MiB in one thread.
pub const DEFAULT_MAX_PIXELS: NonZeroU64 = NonZeroU64::new(1 << 26).unwrap();

/// Default of [`DecodeLimits::max_decode`], in seconds. The largest image that the other limits allow takes one to three seconds on
/// one core; what takes ten times that is made to take it.
pub const DEFAULT_MAX_DECODE_SECS: NonZeroU64 = NonZeroU64::new(30).unwrap();

/// The longest side an image may have, in pixels: 2^20. Formats with 32-bit sizes can state a line of billions of
/// pixels, and the weights of a resize grow with the side; JPEG, WebP and GIF end at 65535 or before.
pub const MAX_SIDE: u32 = 1 << 20;

/// Bytes a decoder may allocate per pixel allowed: four 16-bit samples, once decoded and once on the way there.
const MAX_DECODER_BYTES_PER_PIXEL: u64 = 16;

/// Bytes that texts and color profiles may take, unpacked, although no use is made of them: what the `png` crate allows by itself.
const MAX_METADATA_BYTES: u64 = 64 << 20;

/// Characters of a decoder's message that a [`Reject`] keeps.
const MAX_REASON_CHARS: usize = 200;

/// The channels of the pixels a model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    /// One channel. From color: L = (19595 R + 38470 G + 7471 B + 32768) / 65536, ITU-R 601-2 luma as Pillow rounds it.
    Gray,
    /// Three channels. From gray: three times the same.
    Rgb,
}

impl Color {
    /// Samples a pixel.
    pub const fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::Rgb => 3,
        }
    }
}

/// How an image of another aspect ratio comes to the size a model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// Both sides are resized on their own; the aspect ratio changes.
    Stretch,
    /// The smallest size that covers the target, cut to its center. The side that decides takes the target's length,
    /// the other is rounded down; of an odd margin, the half that makes the offset even is cut first (for a square
    /// target: torchvision's `Resize(n)` and `CenterCrop(n)`; with [`PixelSpec::resize`], its `Resize(m)` and `CenterCrop(n)`).
    Crop,
    /// The largest size that fits into the target, centered on black. Sizes and offsets are rounded half to even
    /// (Pillow's `ImageOps.pad`), but a side keeps at least one pixel, where Pillow's can round to nothing.
    Pad,
}

/// The pixels a model takes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PixelSpec {
    /// Rows. An image of no rows or columns has no samples.
    pub height: u32,
    /// Pixels a row.
    pub width: u32,
    /// Channels a pixel.
    pub color: Color,
    /// How pixels are resampled.
    pub filter: Filter,
    /// What happens to the aspect ratio.
    pub fit: Fit,
    /// With [`Fit::Crop`], the length of the shorter side before the cut, at least that of the target's longer one; `None`: the smallest
    /// size that covers the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<u32>,
    /// Whether the orientation in the image's metadata is applied first. (Pillow always applies that of a TIFF.)
    pub exif_rotation: bool,
}

impl PixelSpec {
    /// Samples of one image: height x width x channels.
    pub const fn num_samples(&self) -> usize {
        self.height as usize * self.width as usize * self.color.channels()
    }
}

/// How closely pixels follow those that a model was trained with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DecodeMode {
    /// As Pillow decodes and resizes, sample for sample.
    #[default]
    Exact,
    /// JPEGs that are at least twice as large as the pixels asked for are decoded at a half, a quarter or an eighth of their size, as
    /// Pillow's `Image.draft` does, and only their luma where gray is asked for. Other formats are decoded as in [`DecodeMode::Exact`].
    Fast,
}

impl DecodeMode {
    /// The name in the pipeline file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// What one image may cost. Larger ones are rejected by what their header says, before they are decoded.
///
/// One thread that decodes holds the decoded image, of up to `max_pixels` pixels, and at worst 16 bytes per allowed
/// pixel inside the decoder. No side may be longer than [`MAX_SIDE`].
///
/// The time is that of the clock on the wall: on a machine that stood still meanwhile, a good image may be rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Compressed bytes.
    pub max_image_bytes: u64,
    /// Width times height.
    pub max_pixels: u64,
    /// Time from the first byte to the last.
    pub max_decode: Duration,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            max_image_bytes: DEFAULT_MAX_IMAGE_BYTES.get(),
            max_pixels: DEFAULT_MAX_PIXELS.get(),
            max_decode: Duration::from_secs(DEFAULT_MAX_DECODE_SECS.get()),
        }
    }
}

/// One decoded image, and the size it had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Samples in height, width, channel order, [`PixelSpec::num_samples`] of them.
    pub data: Vec<u8>,
    /// Width of the image as it is looked at: after the rotation, where one is applied.
    pub source_width: u32,
    /// Height of the image as it is looked at: after the rotation, where one is applied.
    pub source_height: u32,
}

/// Why a row has a status instead of pixels, or of numbers where it holds features.
///
/// This is data of a row: [`Reject::code`] and the display text become columns. It therefore holds the decoder's
/// message as bounded text rather than the decoder's error, and never the image's bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// The cell is null.
    #[error("the cell is null")]
    Missing,
    /// The image that the cell names does not exist.
    #[error("there is no image at {uri}")]
    NotFound {
        /// As the cell has it.
        uri: String,
    },
    /// The image is there, and this process may not read it.
    #[error("the image at {uri} cannot be read")]
    Unreadable {
        /// As the cell has it.
        uri: String,
    },
    /// The cell is no URI of a store that can be read.
    #[error("`{uri}` is not a readable image location")]
    InvalidUri {
        /// As the cell has it.
        uri: String,
    },
    /// The image decoded, and the model made infinities of it or values that are not numbers.
    #[error("the model gives no finite numbers for the image")]
    NonFiniteOutput,
    /// The cell is a vector or a tensor of another shape than the model takes.
    #[error("the row is of {found} values, and the model takes {expected}")]
    WrongShape {
        /// Lengths of the cell's lists.
        found: String,
        /// The shape that the model takes.
        expected: String,
    },
    /// The cell's lists are no tensor.
    #[error("the lists in the row are of unequal lengths, which make no tensor")]
    Ragged,
    /// A value of the cell is null, or a list in it.
    #[error("a value of the row is null")]
    NullValue,
    /// A value of the cell is not a number, or too large for one of the model's input.
    #[error("value {place} of the row, counted from 0, is {value}, which makes no finite number")]
    NonFiniteInput {
        /// Its place among the values of the row.
        place: usize,
        /// The value.
        value: String,
    },
    /// The cell or file has no bytes.
    #[error("the image has no bytes")]
    Empty,
    /// More compressed bytes than allowed.
    #[error("the image has {bytes} bytes and max_image_bytes is {limit}")]
    TooLarge {
        /// Compressed bytes.
        bytes: u64,
        /// [`DecodeLimits::max_image_bytes`].
        limit: u64,
    },
    /// More pixels than allowed.
    #[error("the image has {width} x {height} pixels and max_pixels is {limit}")]
    TooManyPixels {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
        /// [`DecodeLimits::max_pixels`].
        limit: u64,
    },
    /// A side longer than [`MAX_SIDE`].
    #[error("the image has {width} x {height} pixels and a side may have {MAX_SIDE}")]
    SideTooLong {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
    },
    /// The decoder would need more memory than [`DecodeLimits`] imply.
    #[error("decoding the {format} image takes more than the {limit} bytes that max_pixels allows")]
    TooMuchMemory {
        /// Media type.
        format: &'static str,
        /// Bytes the decoder may allocate.
        limit: u64,
    },
    /// Decoding took longer than allowed.
    #[error("decoding the image takes longer than the {} seconds of max_decode_secs", limit.as_secs_f64())]
    TimedOut {
        /// [`DecodeLimits::max_decode`].
        limit: Duration,
    },
    /// Not the beginning of any image format known.
    #[error("the bytes are not of a known image format")]
    UnknownFormat,
    /// A format, or a kind of it, that is not decoded.
    #[error("{format} images of this kind are not supported: {reason}")]
    Unsupported {
        /// Media type.
        format: &'static str,
        /// The decoder's message.
        reason: String,
    },
    /// The bytes end before the image does.
    #[error("the {format} image ends early")]
    Truncated {
        /// Media type.
        format: &'static str,
    },
    /// The bytes contradict their format.
    #[error("the {format} image is corrupt: {reason}")]
    Corrupt {
        /// Media type.
        format: &'static str,
        /// The decoder's message.
        reason: String,
    },
    /// A defect of the decoder that this image uncovered.
    #[error("the {format} decoder panicked on the image")]
    DecoderPanicked {
        /// Media type.
        format: &'static str,
    },
}

impl Reject {
    /// The status written to tables; these never change meaning.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::NotFound { .. } => "not_found",
            Self::Unreadable { .. } => "unreadable",
            Self::InvalidUri { .. } => "invalid_uri",
            Self::NonFiniteOutput => "non_finite_output",
            Self::WrongShape { .. } | Self::Ragged => "wrong_shape",
            Self::NullValue => "null_value",
            Self::NonFiniteInput { .. } => "non_finite_input",
            Self::Empty => "empty",
            Self::TooLarge { .. } => "image_too_large",
            Self::TooManyPixels { .. } => "too_many_pixels",
            Self::SideTooLong { .. } => "side_too_long",
            Self::TooMuchMemory { .. } => "too_much_memory",
            Self::TimedOut { .. } => "decode_timeout",
            Self::UnknownFormat => "unknown_format",
            Self::Unsupported { .. } => "unsupported_image",
            Self::Truncated { .. } => "truncated_image",
            Self::Corrupt { .. } => "corrupt_image",
            Self::DecoderPanicked { .. } => "decoder_panicked",
        }
    }

    fn from_decoder(error: &ImageError, format: ImageFormat, limits: &DecodeLimits) -> Self {
        let reason = |message: &dyn ToString| bounded_reason(&message.to_string());
        let limit = limits.max_decoder_bytes();
        let format = format.to_mime_type();
        match error {
            ImageError::IoError(error) if error.kind() == ErrorKind::UnexpectedEof => Self::Truncated { format },
            ImageError::Unsupported(error) => Self::Unsupported { format, reason: reason(error) },
            ImageError::Limits(_) => Self::TooMuchMemory { format, limit },
            ImageError::Decoding(_) | ImageError::IoError(_) | ImageError::Parameter(_) | ImageError::Encoding(_) => {
                Self::Corrupt { format, reason: reason(error) }
            }
        }
    }
}

/// A decoder's message as one line of bounded length.
fn bounded_reason(message: &str) -> String {
    let one_line = |sign: char| if sign.is_control() { ' ' } else { sign };
    message.chars().map(one_line).take(MAX_REASON_CHARS).collect()
}

impl DecodeLimits {
    const fn max_decoder_bytes(&self) -> u64 {
        self.max_pixels.saturating_mul(MAX_DECODER_BYTES_PER_PIXEL)
    }

    fn check_size(&self, width: u32, height: u32) -> Result<(), Reject> {
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(Reject::TooManyPixels { width, height, limit: self.max_pixels });
        }
        if width.max(height) > MAX_SIDE {
            return Err(Reject::SideTooLong { width, height });
        }
        Ok(())
    }
}

/// Decodes one compressed image to the pixels of `spec`.
///
/// A panic inside a decoder is caught and becomes a [`Reject`]; the panic hook still reports it.
///
/// # Errors
/// The image has a [`Reject`] instead of pixels. Truncated images are among them, unless all that is missing follows the
/// last pixel; of a JPEG, the end marker must be there. What is damaged within the coded data of a JPEG that goes on to
/// its end is mostly not detected: as in Pillow, the rest of such an image decodes to whatever it decodes to.
pub fn decode(bytes: &[u8], spec: &PixelSpec, limits: &DecodeLimits) -> Result<Pixels, Reject> {
    let mut samples = [Vec::new()];
    let size = Decoder::default().decode(bytes, std::slice::from_ref(spec), DecodeMode::Exact, limits, &mut samples)?;
    let [data] = samples;
    Ok(Pixels { data, source_width: size.width, source_height: size.height })
}

/// Width and height of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Size {
    fn turned(self, orientation: Orientation) -> Self {
        use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
        match orientation {
            Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => Self { width: self.height, height: self.width },
            Orientation::NoTransforms
            | Orientation::Rotate180
            | Orientation::FlipHorizontal
            | Orientation::FlipVertical => self,
        }
    }
}

/// Decodes images, one after the other, in memory that it keeps.
///
/// Between images it holds up to 16 MiB for each of its steps; during one, at most four times the decoded image, beside what the
/// decoder of the format takes.
#[derive(Debug, Default)]
pub struct Decoder {
    resizer: Resizer,
    /// Samples as the format's decoder gives them.
    decoded: Vec<u8>,
    /// The same in 8 bits, in the color that is asked for.
    converted: Vec<u8>,
    /// The same, right side up.
    turned: Vec<u8>,
    /// The same, in the size that is asked for.
    resized: Vec<u8>,
}

/// An image as a format's decoder gives it. Its samples are the decoder's.
#[derive(Debug, Clone, Copy)]
struct Raw {
    size: Size,
    color: ColorType,
    orientation: Orientation,
    /// The size that the image has by its header; larger than `size` where a decoder made a smaller picture of it at once.
    whole: Size,
}

/// An image of its own size in 8 bits.
#[derive(Debug, Clone, Copy)]
struct Seen<'a> {
    bytes: &'a [u8],
    /// Gray also where color is asked for and the image has none: channels that are equal are resized once.
    color: Color,
    size: Size,
}

impl Decoder {
    /// Decodes an image once and appends its pixels for each of the specs to that one's of `samples`; to none of them where it is
    /// rejected. Returns the size that it had: after the rotation, where the first spec asks for one.
    ///
    /// # Errors
    /// As [`decode`].
    pub fn decode(
        &mut self,
        bytes: &[u8],
        specs: &[PixelSpec],
        mode: DecodeMode,
        limits: &DecodeLimits,
        samples: &mut [Vec<u8>],
    ) -> Result<Size, Reject> {
        if bytes.is_empty() {
            return Err(Reject::Empty);
        }
        if bytes.len() as u64 > limits.max_image_bytes {
            return Err(Reject::TooLarge { bytes: bytes.len() as u64, limit: limits.max_image_bytes });
        }
        let format = image::guess_format(bytes).map_err(|_| Reject::UnknownFormat)?;
        let deadline = Deadline::after(limits.max_decode);
        let decoded = caught(|| match format {
            ImageFormat::Jpeg => jpeg::decode(bytes, (specs, mode), limits, &deadline, &mut self.decoded),
            _ => decode_streaming(bytes, format, limits, &deadline, &mut self.decoded),
        });
        if deadline.has_passed() {
            // Whatever the decoder made of bytes that ended.
            return Err(Reject::TimedOut { limit: limits.max_decode });
        }
        let raw = decoded.unwrap_or(Err(Reject::DecoderPanicked { format: format.to_mime_type() }))?;
        for (spec, samples) in specs.iter().zip(samples) {
            self.append(raw, spec, samples);
        }
        self.shrink();
        let is_turned = specs.first().is_some_and(|spec| spec.exif_rotation);
        Ok(if is_turned { raw.whole.turned(raw.orientation) } else { raw.whole })
    }

    /// Appends the pixels of one spec.
    fn append(&mut self, raw: Raw, spec: &PixelSpec, out: &mut Vec<u8>) {
        if spec.num_samples() == 0 {
            return;
        }
        let Self { resizer, decoded, converted, turned, resized } = self;
        let (color, bytes) = to_8_bits(decoded, raw.color, spec.color, converted);
        let mut image = Seen { bytes, color, size: raw.size };
        if spec.exif_rotation && raw.orientation != Orientation::NoTransforms {
            image = image.turned(raw.orientation, turned);
        }
        image.fit(spec, resizer, resized, out);
    }

    /// Gives back what an image beyond the usual has taken.
    fn shrink(&mut self) {
        for buffer in [&mut self.decoded, &mut self.converted, &mut self.turned, &mut self.resized] {
            if buffer.capacity() > MAX_KEPT_BYTES {
                *buffer = Vec::new();
            }
        }
    }
}

impl Seen<'_> {
    /// The image as it is looked at, from how it lies in the file, in `turned`.
    fn turned(self, orientation: Orientation, turned: &mut Vec<u8>) -> Seen<'_> {
        turned.resize(self.bytes.len(), 0);
        match self.color {
            Color::Gray => self.turn::<1>(orientation, turned),
            Color::Rgb => self.turn::<3>(orientation, turned),
        }
        Seen { bytes: turned, color: self.color, size: self.size.turned(orientation) }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "places lie within the image, whose samples are in memory"
    )]
    fn turn<const CHANNELS: usize>(self, orientation: Orientation, turned: &mut [u8]) {
        /// Rows written together: their pixels lie side by side in the source where rows become columns.
        const ROWS: usize = 32;

        let (width, height) = (i64::from(self.size.width), i64::from(self.size.height));
        let (right, down) = (width - 1, (height - 1) * width);
        // The place of the pixel that becomes the first, and the steps to the next in the row and in the column.
        let (first, in_row, in_column) = match orientation {
            Orientation::NoTransforms => (0, 1, width),
            Orientation::FlipHorizontal => (right, -1, width),
            Orientation::Rotate180 => (right + down, -1, -width),
            Orientation::FlipVertical => (down, 1, -width),
            Orientation::Rotate90FlipH => (0, width, 1),
            Orientation::Rotate90 => (down, -width, 1),
            Orientation::Rotate270FlipH => (right + down, -width, -1),
            Orientation::Rotate270 => (right, width, -1),
        };
        let new_width = self.size.turned(orientation).width;
        let source = self.bytes.as_chunks::<CHANNELS>().0;
        let (target, _) = turned.as_chunks_mut::<CHANNELS>();
        for (block, row) in target.chunks_mut(new_width as usize * ROWS).zip((0..).step_by(ROWS)) {
            for column in 0..new_width {
                let mut place = first + row * in_column + i64::from(column) * in_row;
                for pixel in block[column as usize..].iter_mut().step_by(new_width as usize) {
                    *pixel = source[place as usize];
                    place += in_column;
                }
            }
        }
    }

    /// Appends the image in the size and channels of `spec`.
    fn fit(self, spec: &PixelSpec, resizer: &mut Resizer, resized: &mut Vec<u8>, out: &mut Vec<u8>) {
        let source = (self.size.width, self.size.height);
        let (width, height) = spec.fit.axes(source, (spec.width, spec.height), spec.resize);
        resizer.resize(self.bytes, self.color, spec.filter, &width, &height, resized);
        let (kept_width, kept_height) = (width.kept.len(), height.kept.len());
        let start = out.len();
        // What is not written over is the black around it.
        out.resize(start + spec.num_samples(), 0);
        let row = spec.width as usize * spec.color.channels();
        let left = center_offset(spec.width as usize - kept_width) * spec.color.channels();
        let top = center_offset(spec.height as usize - kept_height);
        let rows = out[start..].chunks_exact_mut(row).skip(top);
        for (row, samples) in rows.zip(resized.chunks_exact(kept_width * self.color.channels())) {
            let row = &mut row[left..];
            match (self.color, spec.color) {
                (Color::Gray, Color::Rgb) => {
                    for (pixel, gray) in row.as_chunks_mut::<3>().0.iter_mut().zip(samples) {
                        *pixel = [*gray; 3];
                    }
                }
                (Color::Gray, Color::Gray) | (Color::Rgb, Color::Rgb | Color::Gray) => {
                    row[..samples.len()].copy_from_slice(samples);
                }
            }
        }
    }
}

/// Decodes an image of a format whose decoder in the `image` crate reads while it works.
fn decode_streaming(
    bytes: &[u8],
    format: ImageFormat,
    limits: &DecodeLimits,
    deadline: &Deadline,
    samples: &mut Vec<u8>,
) -> Result<Raw, Reject> {
    let reject = |error| Reject::from_decoder(&error, format, limits);
    match format {
        // The decoder reads texts and color profiles first, and says the size after that.
        ImageFormat::Png => {
            if let Some((width, height)) = png_size(bytes) {
                limits.check_size(width, height)?;
            }
        }
        ImageFormat::Tiff => container::check_tiff(bytes, limits, deadline)?,
        ImageFormat::WebP => container::check_webp(bytes, limits)?,
        _ => {}
    }
    let mut reader = ImageReader::with_format(TimedReader::new(bytes, deadline), format);
    let mut header_limits = Limits::no_limits();
    header_limits.max_alloc = Some(limits.max_decoder_bytes().min(MAX_METADATA_BYTES));
    reader.limits(header_limits);
    let mut decoder = reader.into_decoder().map_err(reject)?;

    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        let reason = "the image has no pixels".to_owned();
        return Err(Reject::Corrupt { format: format.to_mime_type(), reason });
    }
    limits.check_size(width, height)?;
    let mut decoder_limits = Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_decoder_bytes());
    decoder_limits.max_image_width = Some(width);
    decoder_limits.max_image_height = Some(height);
    decoder.set_limits(decoder_limits).map_err(reject)?;

    let orientation = decoder.orientation().map_err(reject)?;
    let color = decoder.color_type();
    if !is_readable(color) {
        let reason = format!("samples of type {color:?}");
        return Err(Reject::Unsupported { format: format.to_mime_type(), reason });
    }
    let num_bytes = usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX);
    samples.resize(num_bytes, 0);
    decoder.read_image(samples).map_err(reject)?;
    let size = Size { width, height };
    Ok(Raw { size, color, orientation, whole: size })
}

/// The size in the header of a PNG, which is its first chunk.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let size = bytes.get(16..24)?;
    let (width, height) = (size.first_chunk()?, size.last_chunk()?);
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*height)))
}

/// Whether [`to_8_bits`] knows the type of samples.
fn is_readable(color: ColorType) -> bool {
    use ColorType::{L8, L16, La8, La16, Rgb8, Rgb16, Rgb32F, Rgba8, Rgba16, Rgba32F};
    matches!(color, L8 | L16 | La8 | La16 | Rgb8 | Rgb16 | Rgb32F | Rgba8 | Rgba16 | Rgba32F)
}

/// Brings any sample type and channel count to 8-bit gray or RGB; gray where `wanted` is or the image is gray. Samples that are so
/// already stay where they are.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the high byte; a value within 0..=255")]
fn to_8_bits<'a>(samples: &'a [u8], color: ColorType, wanted: Color, converted: &'a mut Vec<u8>) -> (Color, &'a [u8]) {
    let byte = |[sample]: [u8; 1]| sample;
    // Decoders give wider samples in the byte order of the machine.
    let high_byte = |sample: [u8; 2]| (u16::from_ne_bytes(sample) >> 8) as u8;
    let unit = |sample: [u8; 4]| (f32::from_ne_bytes(sample).clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
    converted.clear();
    let found = match color {
        ColorType::L8 => return (Color::Gray, samples),
        ColorType::Rgb8 if wanted == Color::Rgb => return (Color::Rgb, samples),
        ColorType::La8 => from_gray::<1, 2>(samples, byte, converted),
        ColorType::L16 => from_gray::<2, 1>(samples, high_byte, converted),
        ColorType::La16 => from_gray::<2, 2>(samples, high_byte, converted),
        ColorType::Rgb8 => from_color::<1, 3>(samples, wanted, byte, converted),
        ColorType::Rgba8 => from_color::<1, 4>(samples, wanted, byte, converted),
        ColorType::Rgb16 => from_color::<2, 3>(samples, wanted, high_byte, converted),
        ColorType::Rgba16 => from_color::<2, 4>(samples, wanted, high_byte, converted),
        ColorType::Rgb32F => from_color::<4, 3>(samples, wanted, unit, converted),
        ColorType::Rgba32F => from_color::<4, 4>(samples, wanted, unit, converted),
        // Refused by `is_readable` before.
        _ => Color::Gray,
    };
    (found, converted)
}

/// The first of `CHANNELS` channels of samples of `BYTES` each, in 8 bits.
fn from_gray<const BYTES: usize, const CHANNELS: usize>(
    samples: &[u8],
    to_byte: impl Fn([u8; BYTES]) -> u8,
    converted: &mut Vec<u8>,
) -> Color {
    let pixels = samples.as_chunks::<BYTES>().0.as_chunks::<CHANNELS>().0;
    converted.extend(pixels.iter().map(|pixel| to_byte(pixel[0])));
    Color::Gray
}

/// The first three of `CHANNELS` channels of samples of `BYTES` each, in 8 bits and in `wanted`.
fn from_color<const BYTES: usize, const CHANNELS: usize>(
    samples: &[u8],
    wanted: Color,
    to_byte: impl Fn([u8; BYTES]) -> u8,
    converted: &mut Vec<u8>,
) -> Color {
    let pixels = samples.as_chunks::<BYTES>().0.as_chunks::<CHANNELS>().0.iter();
    let rgb = pixels.map(|pixel| [to_byte(pixel[0]), to_byte(pixel[1]), to_byte(pixel[2])]);
    match wanted {
        Color::Gray => converted.extend(rgb.map(luma)),
        Color::Rgb => converted.extend(rgb.flatten()),
    }
    wanted
}

/// ITU-R 601-2 luma in 16-bit fixed point (`L24` in Pillow's `Convert.c`). The weights add up to one.
#[expect(clippy::cast_possible_truncation, reason = "a mean of bytes is a byte")]
fn luma([red, green, blue]: [u8; 3]) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + (1 << 15)) >> 16) as u8
}

impl Fit {
    /// The two axes of the resize, width first, that bring `source` to `target`, both in width, height order. `shorter` is the length of
    /// the shorter side before a cut, if it is not the smallest that covers the target.
    fn axes(self, source: (u32, u32), target: (u32, u32), shorter: Option<u32>) -> (Axis, Axis) {
        let (width, height) = (source.0 as usize, source.1 as usize);
        let (target_width, target_height) = (target.0 as usize, target.1 as usize);
        match self {
            Self::Stretch => (Axis::whole(width, target_width), Axis::whole(height, target_height)),
            Self::Crop => {
                let covered = shorter.map_or((target_width, target_height), |side| (side as usize, side as usize));
                // Which side decides is asked without division: covered.0 / width against covered.1 / height.
                let (resized_width, resized_height) = if covered.0 * height >= covered.1 * width {
                    (covered.0, covered.0 * height / width)
                } else {
                    (covered.1 * width / height, covered.1)
                };
                let center = |source, resized, target| {
                    let start = center_offset(resized - target);
                    Axis { source, resized, kept: start..start + target }
                };
                (center(width, resized_width, target_width), center(height, resized_height, target_height))
            }
            Self::Pad => {
                let (resized_width, resized_height) = contained(source, target);
                (Axis::whole(width, resized_width), Axis::whole(height, resized_height))
            }
        }
    }
}

/// The largest size with the aspect ratio of `source` within `target`, as `ImageOps.contain` rounds it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a target side, not negative")]
fn contained(source: (u32, u32), target: (u32, u32)) -> (usize, usize) {
    let (width, height) = (f64::from(source.0), f64::from(source.1));
    let (target_width, target_height) = (f64::from(target.0), f64::from(target.1));
    let side = |length: f64| (length.round_ties_even() as usize).max(1);
    if width / height > target_width / target_height {
        (target.0 as usize, side(height / width * target_width))
    } else {
        (side(width / height * target_height), target.1 as usize)
    }
}

/// Half of a margin, half to even.
const fn center_offset(margin: usize) -> usize {
    let half = margin / 2;
    half + (margin & half & 1)
}

/// The order of the samples in a model's input tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Channel, height, width: one plane after the other.
    Nchw,
    /// Height, width, channel: the order of [`Pixels::data`].
    Nhwc,
}

/// Why a normalization is not one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NormalizeError {
    /// Not one number a channel.
    #[error("{name} has {found} numbers and the pixels have {channels} channels; give one number for each channel")]
    Channels {
        /// `mean` or `std`.
        name: &'static str,
        /// Numbers given.
        found: usize,
        /// Channels of the pixels.
        channels: usize,
    },
    /// Neither one number nor one a value.
    #[error("{name} has {found} numbers and a row has {num_values}; give one number, or one for each value")]
    Values {
        /// `mean` or `std`.
        name: &'static str,
        /// Numbers given.
        found: usize,
        /// Values of a row.
        num_values: usize,
    },
    /// A factor, mean or deviation that makes numbers no model can take.
    #[error("{name} has the value {value}; scale and mean must be finite, and std finite and not zero")]
    Value {
        /// `scale`, `mean` or `std`.
        name: &'static str,
        /// The value.
        value: f32,
    },
}

impl NormalizeError {
    /// Fails where a number makes numbers that no model can take.
    pub(crate) fn check_values(scale: f32, mean: &[f32], std: &[f32]) -> Result<(), Self> {
        for (name, values) in [("scale", [scale].as_slice()), ("mean", mean), ("std", std)] {
            let unusable = |value: &&f32| !value.is_finite() || (name == "std" && **value == 0.0);
            if let Some(&value) = values.iter().find(unusable) {
                return Err(Self::Value { name, value });
            }
        }
        Ok(())
    }
}

/// Turns 8-bit samples to the numbers of an input tensor: `(sample * scale - mean) / std`.
///
/// Each step is rounded to `f32`, as `(x.astype(np.float32) * scale - mean) / std` is in numpy with `f32` operands.
/// There are 256 samples a channel, so the numbers are looked up in a table of 1 KiB a channel.
#[derive(Clone, Debug)]
pub struct Normalizer {
    tables: Vec<[f32; 256]>,
    scale: f32,
    /// Mean and deviation of each channel.
    moments: Vec<(f32, f32)>,
}

impl Normalizer {
    /// A normalizer of pixels of `color`; `mean` and `std` hold one number a channel, on the scale after `scale`.
    ///
    /// # Errors
    /// A list has not one number a channel, a number is not finite, or a deviation is zero.
    pub fn new(color: Color, scale: f32, mean: &[f32], std: &[f32]) -> Result<Self, NormalizeError> {
        let channels = color.channels();
        for (name, values) in [("mean", mean), ("std", std)] {
            if values.len() != channels {
                return Err(NormalizeError::Channels { name, found: values.len(), channels });
            }
        }
        NormalizeError::check_values(scale, mean, std)?;
        let moments: Vec<(f32, f32)> = mean.iter().copied().zip(std.iter().copied()).collect();
        let table = |(mean, std): &(f32, f32)| {
            std::array::from_fn(|sample| {
                #[expect(clippy::cast_precision_loss, reason = "samples are below 256")]
                let sample = sample as f32;
                (sample * scale - mean) / std
            })
        };
        Ok(Self { tables: moments.iter().map(table).collect(), scale, moments })
    }

    /// Appends the tensor of one image, whose samples lie in height, width, channel order, to `out` in `layout`.
    pub fn push_tensor(&self, samples: &[u8], layout: Layout, out: &mut Vec<f32>) {
        match (layout, self.tables.as_slice()) {
            (_, [table]) => out.extend(samples.iter().map(|sample| table[usize::from(*sample)])),
            (Layout::Nchw, tables) => {
                let (pixels, _) = samples.as_chunks::<{ Color::Rgb.channels() }>();
                for (channel, table) in tables.iter().enumerate() {
                    out.extend(pixels.iter().map(|pixel| table[usize::from(pixel[channel])]));
                }
            }
            (Layout::Nhwc, tables) => {
                for pixel in samples.chunks_exact(tables.len()) {
                    out.extend(tables.iter().zip(pixel).map(|(table, sample)| table[usize::from(*sample)]));
                }
            }
        }
    }

    /// Writes the samples of one image, in height, width, channel order, whose tensor lies in `layout`: the inverse of
    /// [`Normalizer::push_tensor`], `(element * std + mean) / scale`, rounded and clamped to 0..=255. What is not a number
    /// becomes 0.
    ///
    /// # Panics
    /// `out` has not as many samples as `tensor` has elements, or these are not whole pixels.
    pub fn write_samples(&self, tensor: &[f32], layout: Layout, out: &mut [u8]) {
        let channels = self.moments.len();
        assert_eq!(tensor.len(), out.len(), "an image has as many samples as its tensor has elements");
        assert!(out.len().is_multiple_of(channels), "samples are whole pixels");
        let num_pixels = out.len() / channels;
        for (channel, (mean, std)) in self.moments.iter().enumerate() {
            let (first, step) = match layout {
                Layout::Nchw => (channel * num_pixels, 1),
                Layout::Nhwc => (channel, channels),
            };
            let elements = tensor.iter().skip(first).step_by(step);
            for (sample, element) in out.iter_mut().skip(channel).step_by(channels).zip(elements) {
                let value = (element * std + mean) / self.scale;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a float that becomes an integer is clamped, and one that is not a number becomes 0"
                )]
                let rounded = value.round() as u8;
                *sample = rounded;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::codecs::jpeg::JpegEncoder;
    use image::codecs::png::PngEncoder;
    use image::{DynamicImage, ExtendedColorType, ImageBuffer, ImageEncoder, ImageFormat, Rgb};

    use super::*;

    fn spec(width: u32, height: u32, color: Color) -> PixelSpec {
        PixelSpec {
            height,
            width,
            color,
            filter: Filter::Bicubic,
            fit: Fit::Stretch,
            resize: None,
            exif_rotation: true,
        }
    }

    fn decode_with(bytes: &[u8], spec: &PixelSpec) -> Result<Vec<u8>, Reject> {
        decode(bytes, spec, &DecodeLimits::default()).map(|pixels| pixels.data)
    }

    /// `i * i * 31 + i * 57` modulo 256.
    fn pattern(len: u32) -> Vec<u8> {
        (0..len).map(|i| (i * i * 31 + i * 57).to_le_bytes()[0]).collect()
    }

    fn png(samples: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes).write_image(samples, width, height, color).unwrap();
        bytes
    }

    fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn jpeg() -> Vec<u8> {
        let mut bytes = Vec::new();
        JpegEncoder::new(&mut bytes).write_image(&pattern(64 * 48), 64, 48, ExtendedColorType::L8).unwrap();
        bytes
    }

    /// An 8 x 8 CMYK JPEG of one color: Pillow 13, `Image.new("CMYK", (8, 8), (200, 30, 90, 40))`, `quality=75`,
    /// `optimize=True`.
    const CMYK_JPEG: &[u8] = &[
        0xFF, 0xD8, 0xFF, 0xEE, 0x00, 0x0E, 0x41, 0x64, 0x6F, 0x62, 0x65, 0x00, 0x64, 0x00, 0x00, 0x00, 0x00, 0x00,
        0xFF, 0xDB, 0x00, 0x43, 0x00, 0x08, 0x06, 0x06, 0x07, 0x06, 0x05, 0x08, 0x07, 0x07, 0x07, 0x09, 0x09, 0x08,
        0x0A, 0x0C, 0x14, 0x0D, 0x0C, 0x0B, 0x0B, 0x0C, 0x19, 0x12, 0x13, 0x0F, 0x14, 0x1D, 0x1A, 0x1F, 0x1E, 0x1D,
        0x1A, 0x1C, 0x1C, 0x20, 0x24, 0x2E, 0x27, 0x20, 0x22, 0x2C, 0x23, 0x1C, 0x1C, 0x28, 0x37, 0x29, 0x2C, 0x30,
        0x31, 0x34, 0x34, 0x34, 0x1F, 0x27, 0x39, 0x3D, 0x38, 0x32, 0x3C, 0x2E, 0x33, 0x34, 0x32, 0xFF, 0xC0, 0x00,
        0x14, 0x08, 0x00, 0x08, 0x00, 0x08, 0x04, 0x43, 0x11, 0x00, 0x4D, 0x11, 0x00, 0x59, 0x11, 0x00, 0x4B, 0x11,
        0x00, 0xFF, 0xC4, 0x00, 0x15, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x07, 0x06, 0xFF, 0xC4, 0x00, 0x14, 0x10, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xFF, 0xDA, 0x00, 0x0E, 0x04, 0x43, 0x00, 0x4D,
        0x00, 0x59, 0x00, 0x4B, 0x00, 0x00, 0x3F, 0x00, 0x36, 0x30, 0xA9, 0x4A, 0xEF, 0xFF, 0xD9,
    ];

    // What Pillow 13 gives for `Image.fromarray(pattern.reshape(height, width)).resize(size, BICUBIC)` fitted by
    // `ImageOps.pad`, and by a resize that covers and `crop`.
    #[test]
    fn fits_equal_pillow() {
        type Size = (u32, u32);
        let cases: [(Fit, Size, Size, &[u8]); 6] = [
            (Fit::Pad, (7, 5), (4, 4), &[81, 193, 116, 90, 154, 134, 96, 170, 63, 94, 55, 110, 0, 0, 0, 0]),
            (Fit::Pad, (7, 5), (6, 3), &[0, 81, 193, 116, 90, 0, 0, 154, 134, 96, 170, 0, 0, 63, 94, 55, 110, 0]),
            (Fit::Pad, (5, 7), (4, 4), &[58, 171, 194, 0, 94, 85, 172, 0, 140, 107, 72, 0, 120, 59, 80, 0]),
            (Fit::Crop, (7, 5), (4, 4), &[34, 180, 193, 103, 165, 171, 127, 64, 117, 106, 80, 131, 42, 122, 64, 49]),
            (
                Fit::Crop,
                (7, 5),
                (6, 3),
                &[24, 138, 215, 176, 60, 133, 172, 157, 176, 69, 88, 149, 109, 124, 84, 72, 174, 153],
            ),
            (Fit::Crop, (5, 7), (4, 4), &[25, 162, 196, 203, 71, 81, 87, 200, 146, 124, 101, 173, 142, 97, 71, 37]),
        ];
        for (fit, source, target, expected) in cases {
            let bytes = png(&pattern(35), source.0, source.1, ExtendedColorType::L8);
            let spec = PixelSpec { fit, ..spec(target.0, target.1, Color::Gray) };
            assert_eq!(decode_with(&bytes, &spec).unwrap(), expected, "{fit:?} {source:?} to {target:?}");
        }
    }

    // The same with the shorter side at another length first: torchvision's `Resize(6)` and `CenterCrop(4)`, and Resize(4) cut to 3 x 2.
    #[test]
    fn a_longer_shorter_side_before_the_cut_equals_pillow() {
        for (source, target, resize, expected) in [
            ((7, 5), (4, 4), 6, &[203, 159, 81, 46, 167, 178, 102, 62, 105, 121, 101, 109, 87, 36, 30, 83][..]),
            ((5, 7), (3, 2), 4, &[146, 124, 101, 142, 97, 71]),
        ] {
            let bytes = png(&pattern(35), source.0, source.1, ExtendedColorType::L8);
            let spec = PixelSpec { fit: Fit::Crop, resize: Some(resize), ..spec(target.0, target.1, Color::Gray) };
            assert_eq!(decode_with(&bytes, &spec).unwrap(), expected, "{source:?} by {resize} to {target:?}");
        }
    }

    #[test]
    fn a_gray_image_has_three_equal_channels_in_color() {
        let bytes = png(&pattern(35), 7, 5, ExtendedColorType::L8);
        let gray = decode_with(&bytes, &spec(3, 4, Color::Gray)).unwrap();
        let rgb = decode_with(&bytes, &spec(3, 4, Color::Rgb)).unwrap();
        assert_eq!(rgb, gray.iter().flat_map(|&gray| [gray; 3]).collect::<Vec<_>>());
    }

    // Pillow 13: `Image.fromarray(..., "RGB").convert("L")` of the five pixels.
    #[test]
    fn luma_is_rounded_as_in_pillow() {
        let rgb = [255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30, 200, 100, 50];
        let bytes = png(&rgb, 5, 1, ExtendedColorType::Rgb8);
        assert_eq!(decode_with(&bytes, &spec(5, 1, Color::Gray)).unwrap(), [76, 150, 29, 18, 124]);
    }

    #[test]
    fn alpha_is_dropped() {
        let bytes = png(&[1, 2, 3, 0, 4, 5, 6, 128], 2, 1, ExtendedColorType::Rgba8);
        assert_eq!(decode_with(&bytes, &spec(2, 1, Color::Rgb)).unwrap(), [1, 2, 3, 4, 5, 6]);
        let bytes = png(&[9, 0, 8, 255], 2, 1, ExtendedColorType::La8);
        assert_eq!(decode_with(&bytes, &spec(2, 1, Color::Gray)).unwrap(), [9, 8]);
    }

    #[test]
    fn of_16_bits_the_high_byte_is_kept() {
        let image = ImageBuffer::<image::Luma<u16>, _>::from_raw(3, 1, vec![0x00FF, 0x1280, 0xFFFF]).unwrap();
        for format in [ImageFormat::Png, ImageFormat::Tiff] {
            let bytes = encoded(image.clone(), format);
            assert_eq!(decode_with(&bytes, &spec(3, 1, Color::Gray)).unwrap(), [0x00, 0x12, 0xFF], "{format:?}");
        }
    }

    #[test]
    fn floating_point_samples_are_clamped_to_one() {
        let image = ImageBuffer::<Rgb<f32>, _>::from_raw(2, 1, vec![-1.0, 0.0, 0.5, 1.0, 7.0, f32::NAN]).unwrap();
        let bytes = encoded(image, ImageFormat::Tiff);
        assert_eq!(decode_with(&bytes, &spec(2, 1, Color::Rgb)).unwrap(), [0, 0, 128, 255, 255, 0]);
    }

    #[test]
    fn every_lossless_format_gives_the_same_pixels() {
        let samples = pattern(7 * 5 * 3);
        let image = ImageBuffer::<Rgb<u8>, _>::from_raw(7, 5, samples.clone()).unwrap();
        for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP] {
            let bytes = encoded(image.clone(), format);
            assert_eq!(decode_with(&bytes, &spec(7, 5, Color::Rgb)).unwrap(), samples, "{format:?}");
        }
    }

    #[test]
    fn of_a_gif_the_colors_of_the_first_frame_are_given() {
        let image = ImageBuffer::from_pixel(4, 3, Rgb([250_u8, 20, 90]));
        let bytes = encoded(image, ImageFormat::Gif);
        assert_eq!(decode_with(&bytes, &spec(1, 1, Color::Rgb)).unwrap(), [250, 20, 90]);
    }

    // Pillow 13 reads it as (46, 190, 139) in RGB.
    #[test]
    fn a_cmyk_jpeg_has_the_colors_of_pillow() {
        let rgb = decode_with(CMYK_JPEG, &spec(1, 1, Color::Rgb)).unwrap();
        for (found, expected) in rgb.iter().zip([46_u8, 190, 139]) {
            assert!(found.abs_diff(expected) <= 2, "{rgb:?}");
        }
    }

    // What `ImageOps.exif_transpose` of Pillow 13 gives for `[[0, 1, 2], [3, 4, 5]]` and orientations 1 to 8.
    #[test]
    fn every_exif_orientation_is_applied_as_in_pillow() {
        let expected = [
            [0, 1, 2, 3, 4, 5],
            [2, 1, 0, 5, 4, 3],
            [5, 4, 3, 2, 1, 0],
            [3, 4, 5, 0, 1, 2],
            [0, 3, 1, 4, 2, 5],
            [3, 0, 4, 1, 5, 2],
            [5, 2, 4, 1, 3, 0],
            [2, 5, 1, 4, 0, 3],
        ];
        for (orientation, expected) in (1..).zip(expected) {
            // A big-endian TIFF header and one directory of one entry: tag 0x112, a 16-bit number.
            let exif =
                [b'M', b'M', 0, 42, 0, 0, 0, 8, 0, 1, 0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0];
            let mut bytes = Vec::new();
            let mut encoder = PngEncoder::new(&mut bytes);
            encoder.set_exif_metadata(exif.to_vec()).unwrap();
            encoder.write_image(&[0, 1, 2, 3, 4, 5], 3, 2, ExtendedColorType::L8).unwrap();

            let (width, height) = if orientation < 5 { (3, 2) } else { (2, 3) };
            let upright = decode(&bytes, &spec(width, height, Color::Gray), &DecodeLimits::default()).unwrap();
            assert_eq!(upright.data, expected, "orientation {orientation}");
            assert_eq!((upright.source_width, upright.source_height), (width, height));

            let as_stored = PixelSpec { exif_rotation: false, ..spec(3, 2, Color::Gray) };
            assert_eq!(decode_with(&bytes, &as_stored).unwrap(), [0, 1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn images_of_all_shapes_are_turned_as_the_image_crate_turns_them() {
        for (width, height) in [(1, 3), (3, 1), (70, 50), (50, 70)] {
            let samples = pattern(width * height * 3);
            for orientation in (1..=8).filter_map(Orientation::from_exif) {
                let buffer = ImageBuffer::<Rgb<u8>, _>::from_raw(width, height, samples.clone()).unwrap();
                let mut expected = DynamicImage::from(buffer);
                expected.apply_orientation(orientation);
                let lying = Seen { bytes: &samples, color: Color::Rgb, size: Size { width, height } };
                let mut place = Vec::new();
                let turned = lying.turned(orientation, &mut place);
                assert_eq!((turned.size.width, turned.size.height), (expected.width(), expected.height()));
                assert!(turned.bytes == expected.as_bytes(), "{width} x {height} {orientation:?}");
            }
        }
    }

    // A JPEG of four times the size is decoded at a quarter, one of less than twice the size as it is.
    #[test]
    fn fast_decoding_is_near_exact_decoding_and_tells_the_size_that_the_image_has() {
        let picture = |x: u32, y: u32| [x * 2, y * 2, 255 - x - y].map(|value| value.to_le_bytes()[0]);
        let samples: Vec<u8> = (0..96).flat_map(|y| (0..128).flat_map(move |x| picture(x, y))).collect();
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, 95).write_image(&samples, 128, 96, ExtendedColorType::Rgb8).unwrap();
        let decoded = |mode: DecodeMode, spec: &PixelSpec| {
            let mut samples = [Vec::new()];
            let specs = std::slice::from_ref(spec);
            let size = Decoder::default().decode(&bytes, specs, mode, &DecodeLimits::default(), &mut samples).unwrap();
            assert_eq!(size, Size { width: 128, height: 96 });
            samples[0].clone()
        };
        for (color, width, height, is_smaller) in
            [(Color::Rgb, 32, 24, true), (Color::Gray, 30, 20, true), (Color::Rgb, 100, 70, false)]
        {
            let spec = spec(width, height, color);
            let (exact, fast) = (decoded(DecodeMode::Exact, &spec), decoded(DecodeMode::Fast, &spec));
            assert_eq!(exact.len(), spec.num_samples());
            assert_eq!(exact != fast, is_smaller, "{color:?} {width} x {height}");
            let largest = exact.iter().zip(&fast).map(|(exact, fast)| exact.abs_diff(*fast)).max().unwrap();
            assert!(largest <= 12, "{color:?} {width} x {height}: {largest}");
        }
    }

    #[test]
    fn a_jpeg_without_its_end_is_truncated() {
        let bytes = jpeg();
        for len in [bytes.len() / 10, bytes.len() / 2, bytes.len() - 1] {
            let reject = decode_with(&bytes[..len], &spec(8, 8, Color::Gray)).unwrap_err();
            assert_eq!(reject.code(), "truncated_image", "{len} bytes");
        }
    }

    #[test]
    fn bytes_after_the_end_of_a_jpeg_do_no_harm() {
        let mut bytes = jpeg();
        let expected = decode_with(&bytes, &spec(8, 8, Color::Gray)).unwrap();
        bytes.extend([0xFF, 0x00, 0xFF, 0xE1, 0xFF]);
        assert_eq!(decode_with(&bytes, &spec(8, 8, Color::Gray)).unwrap(), expected);
    }

    #[test]
    fn a_truncated_png_is_rejected() {
        let bytes = png(&pattern(64 * 48), 64, 48, ExtendedColorType::L8);
        let reject = decode_with(&bytes[..bytes.len() / 2], &spec(8, 8, Color::Gray)).unwrap_err();
        assert_eq!(reject, Reject::Truncated { format: "image/png" });
    }

    #[test]
    fn a_changed_png_is_corrupt() {
        let mut bytes = png(&pattern(64 * 48), 64, 48, ExtendedColorType::L8);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xFF;
        assert_eq!(decode_with(&bytes, &spec(8, 8, Color::Gray)).unwrap_err().code(), "corrupt_image");
    }

    #[test]
    fn what_is_not_an_image_is_rejected_by_its_kind() {
        let spec = spec(8, 8, Color::Gray);
        assert_eq!(decode_with(b"", &spec), Err(Reject::Empty));
        assert_eq!(decode_with(b"id,label\n1,cat\n", &spec), Err(Reject::UnknownFormat));
        let avif = decode_with(b"\0\0\0\x1cftypavif\0\0\0\0", &spec).unwrap_err();
        assert_eq!(avif.code(), "unsupported_image");
    }

    #[test]
    fn limits_are_checked_before_pixels_are_read() {
        let mut bytes = png(&pattern(35), 7, 5, ExtendedColorType::L8);
        let limits = DecodeLimits { max_pixels: 34, ..DecodeLimits::default() };
        let spec = spec(3, 3, Color::Gray);
        assert_eq!(decode(&bytes, &spec, &limits), Err(Reject::TooManyPixels { width: 7, height: 5, limit: 34 }));

        // The header is enough: without the data, an image within the limits is truncated, and one beyond is too large.
        let header_len = 8 + 25;
        bytes.truncate(header_len + 8);
        assert_eq!(decode(&bytes, &spec, &limits).unwrap_err().code(), "too_many_pixels");
        assert_eq!(decode_with(&bytes, &spec).unwrap_err().code(), "truncated_image");

        let limits = DecodeLimits { max_image_bytes: 40, ..DecodeLimits::default() };
        assert_eq!(decode(&bytes, &spec, &limits), Err(Reject::TooLarge { bytes: 41, limit: 40 }));
    }

    #[test]
    fn images_of_extreme_sizes_are_decoded() {
        for (width, height) in [(20_000, 1), (1, 20_000), (1, 1)] {
            let bytes = png(&vec![77; (width * height) as usize], width, height, ExtendedColorType::L8);
            for fit in [Fit::Stretch, Fit::Crop] {
                for filter in [Filter::Nearest, Filter::Lanczos] {
                    let spec = PixelSpec { filter, fit, ..spec(8, 6, Color::Gray) };
                    assert_eq!(decode_with(&bytes, &spec).unwrap(), [77; 48], "{width} x {height} {fit:?} {filter:?}");
                }
            }
            let padded = decode_with(&bytes, &PixelSpec { fit: Fit::Pad, ..spec(8, 6, Color::Gray) }).unwrap();
            assert!(padded.contains(&77), "{width} x {height} leaves at least a line");
        }
    }

    #[test]
    fn every_format_ends_at_the_deadline() {
        let limits = DecodeLimits { max_decode: Duration::ZERO, ..DecodeLimits::default() };
        let image = ImageBuffer::<Rgb<u8>, _>::from_raw(7, 5, pattern(7 * 5 * 3)).unwrap();
        for format in [
            ImageFormat::Png,
            ImageFormat::Jpeg,
            ImageFormat::Gif,
            ImageFormat::Bmp,
            ImageFormat::Tiff,
            ImageFormat::WebP,
        ] {
            let bytes = encoded(image.clone(), format);
            let reject = decode(&bytes, &spec(3, 3, Color::Rgb), &limits).unwrap_err();
            assert_eq!(reject, Reject::TimedOut { limit: Duration::ZERO }, "{format:?}");
        }
    }

    #[test]
    fn an_image_within_an_image_keeps_to_the_size_of_the_outer_one() {
        // A TIFF of 8 x 8 gray pixels whose strip is a JPEG, of so many.
        let tiff = |side: u32| {
            let samples = vec![0; (side * side) as usize];
            let mut jpeg = Vec::new();
            JpegEncoder::new(&mut jpeg).write_image(&samples, side, side, ExtendedColorType::L8).unwrap();
            let len = u32::try_from(jpeg.len()).unwrap();
            let tags = [(256, 8), (257, 8), (258, 8), (259, 7), (262, 1), (273, 8), (277, 1), (278, 8), (279, len)];
            let mut bytes = [b"II*\0".as_slice(), &(8 + len).to_le_bytes(), &jpeg, &[9, 0]].concat();
            for (tag, value) in tags {
                bytes.extend([u16::to_le_bytes(tag), u16::to_le_bytes(4)].as_flattened());
                bytes.extend([1, value].map(u32::to_le_bytes).as_flattened());
            }
            bytes.extend([0; 4]);
            bytes
        };
        let spec = spec(4, 4, Color::Gray);
        assert_eq!(decode_with(&tiff(8), &spec).unwrap(), [0; 16]);
        assert_eq!(decode_with(&tiff(16), &spec).unwrap_err().code(), "corrupt_image");
    }

    #[test]
    fn a_side_beyond_the_limit_is_rejected() {
        let bytes = png(&vec![0; MAX_SIDE as usize + 1], MAX_SIDE + 1, 1, ExtendedColorType::L8);
        let reject = decode_with(&bytes, &spec(8, 8, Color::Gray)).unwrap_err();
        assert_eq!(reject, Reject::SideTooLong { width: MAX_SIDE + 1, height: 1 });
    }

    #[test]
    fn a_reason_is_one_line_of_bounded_length() {
        let unsupported = image::error::UnsupportedError::from_format_and_kind(
            image::error::ImageFormatHint::Unknown,
            image::error::UnsupportedErrorKind::GenericFeature("line\n".repeat(1000)),
        );
        let error = ImageError::Unsupported(unsupported);
        let text = Reject::from_decoder(&error, ImageFormat::Tiff, &DecodeLimits::default()).to_string();
        assert!(!text.contains('\n'));
        assert!(text.len() < MAX_REASON_CHARS + 100, "{}", text.len());
    }

    #[test]
    fn names_in_a_pixel_spec_are_lowercase_and_checked() {
        let text = r#"{"height":4,"width":3,"color":"rgb","filter":"area","fit":"pad","exif_rotation":false}"#;
        let spec: PixelSpec = serde_json::from_str(text).unwrap();
        assert_eq!((spec.color, spec.filter, spec.fit), (Color::Rgb, Filter::Area, Fit::Pad));
        assert_eq!(serde_json::to_string(&spec).unwrap(), text);
        assert!(serde_json::from_str::<PixelSpec>(&text.replace("exif_rotation", "exif")).is_err());
    }

    // numpy: `(x.astype(np.float32) * np.float32(1 / 255) - mean) / std` for x in 0, 7, 128, 255.
    #[test]
    fn normalized_numbers_equal_those_of_numpy() {
        let expected = [
            [0xC007_8BBD, 0xBFFF_BF78, 0x3D97_AF32, 0x400F_EE1D],
            [0xC002_4924, 0xBFF4_E299, 0x3E52_1B48, 0x401B_6DB7],
            [0xBFE6_F809, 0xBFD7_5A32, 0x3EDA_5D3C, 0x4028_F5C3],
        ];
        let normalizer =
            Normalizer::new(Color::Rgb, 1.0 / 255.0, &[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225]).unwrap();
        let samples = [0_u8, 7, 128, 255].map(|sample| [sample; 3]);
        let mut planes = Vec::new();
        normalizer.push_tensor(samples.as_flattened(), Layout::Nchw, &mut planes);
        assert_eq!(planes.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected.as_flattened());
        let mut pixels = Vec::new();
        normalizer.push_tensor(samples.as_flattened(), Layout::Nhwc, &mut pixels);
        for (pixel, values) in pixels.chunks_exact(3).enumerate() {
            assert_eq!(values, [planes[pixel], planes[4 + pixel], planes[8 + pixel]]);
        }
    }

    #[test]
    fn samples_come_back_from_their_tensor_in_either_layout() {
        let samples: Vec<u8> = (0..=255).flat_map(|sample: u8| [sample, 255 - sample, sample ^ 0x55]).collect();
        for (scale, mean, std) in [
            (1.0 / 255.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            (1.0, [127.0, 0.0, -3.5], [128.0, -1.0, 0.01]),
        ] {
            let normalizer = Normalizer::new(Color::Rgb, scale, &mean, &std).unwrap();
            for layout in [Layout::Nchw, Layout::Nhwc] {
                let mut tensor = Vec::new();
                normalizer.push_tensor(&samples, layout, &mut tensor);
                let mut back = vec![0; samples.len()];
                normalizer.write_samples(&tensor, layout, &mut back);
                assert_eq!(back, samples, "{layout:?}");
            }
        }
    }

    #[test]
    fn values_that_no_sample_has_are_rounded_and_clamped() {
        let normalizer = Normalizer::new(Color::Gray, 0.5, &[1.0], &[2.0]).unwrap();
        let tensor = [-0.5, -0.26, -0.24, 63.25, 63.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let mut samples = [9; 8];
        normalizer.write_samples(&tensor, Layout::Nchw, &mut samples);
        assert_eq!(samples, [0, 1, 1, 255, 255, 0, 255, 0]);
    }

    #[test]
    fn a_normalization_without_numbers_is_refused() {
        let one = [1.0];
        assert!(Normalizer::new(Color::Gray, 1.0, &one, &one).is_ok());
        assert!(Normalizer::new(Color::Rgb, 1.0, &one, &one).is_err());
        assert!(Normalizer::new(Color::Gray, 1.0, &one, &[0.0]).is_err());
        assert!(Normalizer::new(Color::Gray, f32::NAN, &one, &one).is_err());
        assert!(Normalizer::new(Color::Gray, 1.0, &[f32::INFINITY], &one).is_err());
    }
}
