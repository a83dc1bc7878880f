//! Antialiased resampling of 8-bit pixels, sample for sample what Pillow's `Image.resize` gives.
//!
//! A model sees the resized pixels, so a resize that is only close to the one of its training moves every latent
//! vector. This file therefore follows the definition of Pillow 13 (`src/libImaging/Resample.c`, and
//! `ImagingScaleAffine` in `Geometry.c` for nearest): the filter is stretched by the downscale factor, its weights are
//! computed in `f64`, normalized and rounded to 22-bit fixed point, the two passes are rounded to 8 bits each, and
//! their order is Pillow's. Pillow 12 and before always ran the horizontal pass first, so images that shrink much more
//! in height than in width can differ from it by rounding.
//!
//! It is not a general image library: pixels are gray or RGB, 8 bits, row by row without padding, and nothing here
//! knows of files, aspect ratios or alpha.
#![expect(
    clippy::inline_always,
    reason = "what is inlined into a dispatch is compiled for the processor that was found"
)]

use std::f64::consts::PI;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use serde::{Deserialize, Serialize};

use super::Color;

/// Fraction bits of a weight: of 32 bits, 8 hold the sample and 2 are left for filters with negative lobes, whose sums
/// leave 0..=255 (`PRECISION_BITS` of Pillow).
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// One half in fixed point: what a sum starts from, so that dropping the fraction rounds to nearest.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Bits of a weight kept in its low part, see [`Weight`].
const LOW_BITS: u32 = 12;

/// Samples resampled together. Two sums of this many 32-bit numbers are half of the registers of any x86-64 CPU.
const LANES: usize = 16;

/// Bytes of weights and buffers that a [`Resizer`] keeps between images. Enough for the photos of most tables, and
/// little enough that one extreme image does not hold memory in every thread for the rest of the run.
pub(super) const MAX_KEPT_BYTES: usize = 16 << 20;

/// How new pixels are weighted from old ones. The names and definitions are Pillow's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// The source pixel under the center of the new pixel; no antialiasing.
    Nearest,
    /// Triangle, support 1.
    Bilinear,
    /// Cubic convolution with a = -0.5, support 2.
    Bicubic,
    /// Sinc windowed by a wider sinc, support 3.
    Lanczos,
    /// The mean of the covered area (Pillow's `BOX`), support 0.5.
    Area,
}

/// One image axis of a resize: `source` samples are resampled to `resized` samples, of which only `kept` are computed.
///
/// `source` and `resized` are at least 1 and `kept` lies in `0..resized`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    pub(super) source: usize,
    pub(super) resized: usize,
    pub(super) kept: Range<usize>,
}

impl Axis {
    /// An axis of which all resized samples are kept.
    pub(super) fn whole(source: usize, resized: usize) -> Self {
        Self { source, resized, kept: 0..resized }
    }

    /// Whether resampling would give back the source.
    fn is_copy(&self) -> bool {
        self.source == self.resized && self.kept == (0..self.source)
    }

    /// Source samples per resized sample.
    fn scale(&self) -> f64 {
        self.source as f64 / self.resized as f64
    }
}

/// Resizes images, and keeps the weights of the last size and the working memory for the next image.
///
/// Between images it holds at most [`MAX_KEPT_BYTES`]; during one, also the image between the two passes, which is at
/// most the source height by the target width, or the source width by the target height.
#[derive(Debug, Default)]
pub(super) struct Resizer {
    horizontal: Option<Weights>,
    vertical: Option<Weights>,
    between: Vec<u8>,
    columns: Vec<[u8; LANES]>,
}

impl Resizer {
    /// Resamples `pixels` (`height.source` rows of `width.source` pixels) to `height.kept.len()` rows of `width.kept.len()` pixels, in the
    /// same color, which are all that is in `resized` then.
    pub(super) fn resize(
        &mut self,
        pixels: &[u8],
        color: Color,
        filter: Filter,
        width: &Axis,
        height: &Axis,
        resized: &mut Vec<u8>,
    ) {
        pulp::Arch::new().dispatch(Resample { resizer: self, pixels, color, filter, width, height, resized });
        if self.kept_bytes() > MAX_KEPT_BYTES {
            *self = Self::default();
        }
    }

    #[inline(always)]
    fn resample<const CHANNELS: usize>(
        &mut self,
        pixels: &[u8],
        filter: Filter,
        width: &Axis,
        height: &Axis,
        resized: &mut Vec<u8>,
    ) {
        let Some(kernel) = Kernel::of(filter) else {
            return nearest::<CHANNELS>(pixels, width, height, resized);
        };
        if width.is_copy() && height.is_copy() {
            resized.clear();
            resized.extend_from_slice(pixels);
            return;
        }
        let horizontal = Weights::reuse(&mut self.horizontal, filter, &kernel, width);
        let vertical = Weights::reuse(&mut self.vertical, filter, &kernel, height);
        let (source_row, resized_row) = (width.source * CHANNELS, width.kept.len() * CHANNELS);
        resized.resize(height.kept.len() * resized_row, 0);

        if height.is_copy() {
            horizontal_pass::<CHANNELS>(pixels, horizontal, &mut self.columns, resized);
        } else if width.is_copy() {
            vertical_pass(pixels, source_row, vertical, 0, resized);
        } else if vertical_goes_first(width, height) {
            self.between.resize(height.kept.len() * source_row, 0);
            vertical_pass(pixels, source_row, vertical, 0, &mut self.between);
            horizontal_pass::<CHANNELS>(&self.between, horizontal, &mut self.columns, resized);
        } else {
            let rows = vertical.used_samples();
            self.between.resize(rows.len() * resized_row, 0);
            let used = &pixels[rows.start * source_row..rows.end * source_row];
            horizontal_pass::<CHANNELS>(used, horizontal, &mut self.columns, &mut self.between);
            vertical_pass(&self.between, resized_row, vertical, rows.start, resized);
        }
    }

    fn kept_bytes(&self) -> usize {
        let weights: usize = [&self.horizontal, &self.vertical].into_iter().flatten().map(Weights::bytes).sum();
        weights + self.between.capacity() + self.columns.capacity() * LANES
    }
}

/// A resize, which is compiled for each kind of processor; the one for the processor that is found runs.
struct Resample<'a> {
    resizer: &'a mut Resizer,
    pixels: &'a [u8],
    color: Color,
    filter: Filter,
    width: &'a Axis,
    height: &'a Axis,
    resized: &'a mut Vec<u8>,
}

impl WithSimd for Resample<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { resizer, pixels, color, filter, width, height, resized } = self;
        match color {
            Color::Gray => resizer.resample::<1>(pixels, filter, width, height, resized),
            Color::Rgb => resizer.resample::<3>(pixels, filter, width, height, resized),
        }
    }
}

/// Pillow 13 runs the vertical pass first where the height loses more than twice the pixels that the width loses. The
/// order decides which intermediate values are rounded, so it is part of the result.
fn vertical_goes_first(width: &Axis, height: &Axis) -> bool {
    let lost = |axis: &Axis| axis.source as i128 - axis.resized as i128;
    lost(height) > 0 && lost(height) > 2 * lost(width)
}

/// A resampling filter: its shape, and half its width in source samples before it is stretched.
struct Kernel {
    shape: fn(f64) -> f64,
    support: f64,
}

impl Kernel {
    /// The kernel of `filter`; none for nearest, which weights nothing.
    fn of(filter: Filter) -> Option<Self> {
        match filter {
            Filter::Nearest => None,
            Filter::Area => Some(Self { shape: area, support: 0.5 }),
            Filter::Bilinear => Some(Self { shape: triangle, support: 1.0 }),
            Filter::Bicubic => Some(Self { shape: cubic, support: 2.0 }),
            Filter::Lanczos => Some(Self { shape: lanczos, support: 3.0 }),
        }
    }
}

fn area(x: f64) -> f64 {
    if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// Keys' cubic convolution kernel with a = -0.5, in the order of operations of Pillow.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn lanczos(x: f64) -> f64 {
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * PI;
    x.sin() / x
}

/// A fixed-point weight `high * 2^LOW_BITS + low`, with `low` not negative.
///
/// Both parts fit in 16 bits, and the product of a sample and a 16-bit number is one instruction for four samples on
/// every x86-64 CPU, where a full 32-bit product needs SSE4.1. The parts are summed apart and joined once per sample;
/// sums wrap, and are right when joined because the joined sum fits in 32 bits.
#[derive(Clone, Copy, Debug)]
struct Weight {
    high: i16,
    low: i16,
}

impl Weight {
    /// Rounds a normalized weight half away from zero, as Pillow does.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "normalized weights stay below 2 in size: 24 bits, split in two"
    )]
    fn new(weight: f64) -> Self {
        let fixed = weight * f64::from(1 << PRECISION_BITS);
        let fixed = if weight < 0.0 { fixed - 0.5 } else { fixed + 0.5 } as i32;
        Self { high: (fixed >> LOW_BITS) as i16, low: (fixed & ((1 << LOW_BITS) - 1)) as i16 }
    }
}

/// The source samples that one resized sample is made of, and where their weights begin.
#[derive(Debug)]
struct Span {
    first: usize,
    weights: Range<usize>,
}

/// The weights of every kept sample of an axis: a span each, and the weights of all spans one after the other.
#[derive(Debug)]
struct Weights {
    filter: Filter,
    axis: Axis,
    spans: Vec<Span>,
    of_spans: Vec<Weight>,
}

impl Weights {
    /// The weights in `slot` where they are those of `filter` and `axis`, new ones put there otherwise.
    fn reuse<'a>(slot: &'a mut Option<Self>, filter: Filter, kernel: &Kernel, axis: &Axis) -> &'a Self {
        let usable = slot.take().filter(|weights| weights.filter == filter && weights.axis == *axis);
        slot.insert(usable.unwrap_or_else(|| Self::new(filter, kernel, axis)))
    }

    /// `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow, for the kept samples only.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "places lie within the axis once clipped; a negative one becomes 0, which is its clip"
    )]
    fn new(filter: Filter, kernel: &Kernel, axis: &Axis) -> Self {
        let scale = axis.scale();
        let stretch = scale.max(1.0);
        let support = kernel.support * stretch;
        let per_stretch = 1.0 / stretch;
        let mut spans = Vec::with_capacity(axis.kept.len());
        let mut of_spans = Vec::new();
        let mut exact = Vec::new();
        for index in axis.kept.clone() {
            let center = (index as f64 + 0.5) * scale;
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(axis.source);
            exact.clear();
            exact.extend((first..end).map(|place| (kernel.shape)((place as f64 - center + 0.5) * per_stretch)));
            let sum: f64 = exact.iter().sum();
            let start = of_spans.len();
            of_spans.extend(exact.iter().map(|&weight| Weight::new(if sum == 0.0 { weight } else { weight / sum })));
            spans.push(Span { first, weights: start..of_spans.len() });
        }
        Self { filter, axis: axis.clone(), spans, of_spans }
    }

    /// Each kept sample's first source sample and the weights from there on.
    fn iter(&self) -> impl Iterator<Item = (usize, &[Weight])> {
        self.spans.iter().map(|span| (span.first, &self.of_spans[span.weights.clone()]))
    }

    /// The source samples that have a weight in any kept sample.
    fn used_samples(&self) -> Range<usize> {
        let first = self.spans.first().map_or(0, |span| span.first);
        let end = self.spans.last().map_or(0, |span| span.first + span.weights.len());
        first..end
    }

    fn bytes(&self) -> usize {
        self.spans.capacity() * size_of::<Span>() + self.of_spans.capacity() * size_of::<Weight>()
    }
}

/// Resamples every row of `source` into the row of `target` at the same height.
///
/// [`LANES`] rows at a time are turned into columns first: then the samples that share a weight lie side by side, and
/// the sums are those of the vertical pass. `columns` is working memory for them.
#[inline(always)]
fn horizontal_pass<const CHANNELS: usize>(
    source: &[u8],
    weights: &Weights,
    columns: &mut Vec<[u8; LANES]>,
    target: &mut [u8],
) {
    let used = weights.used_samples();
    let source_row = weights.axis.source * CHANNELS;
    let target_row = weights.spans.len() * CHANNELS;
    columns.resize(used.len() * CHANNELS, [0; LANES]);
    let blocks = source.chunks(source_row * LANES).zip(target.chunks_mut(target_row * LANES));
    for (source, target) in blocks {
        // The last block may have fewer rows; what is left of the block before is resampled again, and not written.
        for (lane, row) in source.chunks_exact(source_row).enumerate() {
            let row = &row[used.start * CHANNELS..used.end * CHANNELS];
            for (column, &sample) in columns.iter_mut().zip(row) {
                column[lane] = sample;
            }
        }
        for (index, (first, weights)) in weights.iter().enumerate() {
            for channel in 0..CHANNELS {
                let place = (first - used.start) * CHANNELS + channel;
                let samples = weighted_sums(columns[place..].as_flattened(), CHANNELS * LANES, weights);
                let row_starts = (0..target.len()).step_by(target_row);
                for (start, sample) in row_starts.zip::<[u8; LANES]>(samples) {
                    target[start + index * CHANNELS + channel] = sample;
                }
            }
        }
    }
}

/// Resamples every column of `source`, whose rows are `row_len` samples long and begin at row `first_row` of the axis
/// of `weights`.
#[inline(always)]
fn vertical_pass(source: &[u8], row_len: usize, weights: &Weights, first_row: usize, target: &mut [u8]) {
    for ((first, weights), target) in weights.iter().zip(target.chunks_exact_mut(row_len)) {
        let source = &source[(first - first_row) * row_len..];
        let (blocks, rest) = target.as_chunks_mut::<LANES>();
        let rest_start = blocks.len() * LANES;
        for (index, block) in blocks.iter_mut().enumerate() {
            *block = weighted_sums(&source[index * LANES..], row_len, weights);
        }
        for (index, sample) in rest.iter_mut().enumerate() {
            [*sample] = weighted_sums(&source[rest_start + index..], row_len, weights);
        }
    }
}

/// Weights the `N` samples at each multiple of `stride` in `source`, adds them up, rounds, and clips to 8 bits.
#[inline(always)]
#[expect(clippy::cast_sign_loss, reason = "clamped to 8 bits")]
fn weighted_sums<const N: usize>(source: &[u8], stride: usize, weights: &[Weight]) -> [u8; N] {
    let mut high = [0_i32; N];
    let mut low = [0_i32; N];
    for (step, weight) in weights.iter().enumerate() {
        // The bounds check here ends the loop early, which keeps the compiler from vectorizing over the steps, where
        // samples lie apart, instead of over the samples.
        let samples = &source[step * stride..][..N];
        for (sum, &sample) in high.iter_mut().zip(samples) {
            *sum = sum.wrapping_add(i32::from(sample) * i32::from(weight.high));
        }
        for (sum, &sample) in low.iter_mut().zip(samples) {
            *sum = sum.wrapping_add(i32::from(sample) * i32::from(weight.low));
        }
    }
    std::array::from_fn(|i| {
        let sum = (high[i] << LOW_BITS).wrapping_add(low[i]).wrapping_add(HALF);
        (sum >> PRECISION_BITS).clamp(0, 255) as u8
    })
}

/// Takes for each kept pixel the source pixel under its center.
fn nearest<const CHANNELS: usize>(pixels: &[u8], width: &Axis, height: &Axis, resized: &mut Vec<u8>) {
    let columns: Vec<usize> = nearest_places(width).collect();
    let (rows, _) = pixels.as_chunks::<CHANNELS>();
    resized.clear();
    for row in nearest_places(height) {
        resized.extend(columns.iter().flat_map(|column| rows[row * width.source + column]));
    }
}

/// The source place of each kept sample. Pillow adds the scale up instead of multiplying, so that errors build up and
/// decide which of two pixels is taken where a center falls between them; so does this, from sample 0 on.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place is not negative, and is clipped")]
fn nearest_places(axis: &Axis) -> impl Iterator<Item = usize> {
    let scale = axis.scale();
    let last = axis.source - 1;
    std::iter::successors(Some(0.5 * scale), move |place| Some(place + scale))
        .map(move |place| (place as usize).min(last))
        .take(axis.kept.end)
        .skip(axis.kept.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTERS: [Filter; 5] = [Filter::Nearest, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Area];

    /// `i * i * 31 + i * 57` modulo 256.
    fn pattern(len: u32) -> Vec<u8> {
        (0..len).map(|i| (i * i * 31 + i * 57).to_le_bytes()[0]).collect()
    }

    fn resize(pixels: &[u8], color: Color, filter: Filter, source: (usize, usize), target: (usize, usize)) -> Vec<u8> {
        let (width, height) = (Axis::whole(source.0, target.0), Axis::whole(source.1, target.1));
        let mut resized = Vec::new();
        Resizer::default().resize(pixels, color, filter, &width, &height, &mut resized);
        resized
    }

    // Pillow 13: `Image.fromarray(pattern.reshape(5, 7)).resize(size, filter)`; sizes are width, height.
    #[test]
    fn gray_images_equal_pillow_for_every_filter_up_and_down() {
        let cases: [(Filter, (usize, usize), &[u8]); 10] = [
            (Filter::Nearest, (3, 4), &[88, 194, 36, 136, 86, 28, 130, 24, 166, 76, 70, 56]),
            (Filter::Bilinear, (3, 4), &[104, 170, 106, 158, 123, 112, 115, 95, 147, 82, 76, 89]),
            (Filter::Bicubic, (3, 4), &[95, 184, 99, 170, 120, 109, 114, 89, 158, 77, 74, 82]),
            (Filter::Lanczos, (3, 4), &[91, 183, 87, 182, 119, 106, 113, 91, 166, 76, 71, 71]),
            (Filter::Area, (3, 4), &[44, 215, 107, 158, 121, 148, 75, 45, 120, 60, 91, 99]),
            (
                Filter::Nearest,
                (9, 6),
                &[
                    0, 88, 88, 238, 194, 212, 36, 36, 178, 126, 136, 136, 208, 86, 26, 28, 28, 92, 218, 150, 150, 144,
                    200, 62, 242, 242, 228, 218, 150, 150, 144, 200, 62, 242, 242, 228, 20, 130, 130, 46, 24, 64, 166,
                    166, 74, 44, 76, 76, 170, 70, 32, 56, 56, 142,
                ],
            ),
            (
                Filter::Bilinear,
                (9, 6),
                &[
                    0, 59, 155, 228, 194, 208, 114, 83, 178, 95, 115, 165, 193, 113, 81, 49, 58, 114, 180, 156, 156,
                    166, 152, 70, 106, 159, 171, 135, 140, 124, 108, 127, 77, 145, 194, 164, 26, 86, 99, 68, 36, 51,
                    102, 123, 91, 44, 65, 118, 148, 70, 40, 45, 85, 142,
                ],
            ),
            (
                Filter::Bicubic,
                (9, 6),
                &[
                    0, 46, 161, 242, 198, 227, 106, 70, 188, 92, 107, 173, 206, 102, 72, 28, 40, 106, 204, 164, 157,
                    177, 162, 51, 101, 177, 181, 145, 149, 122, 100, 136, 69, 162, 225, 170, 7, 87, 105, 55, 22, 45,
                    109, 124, 76, 43, 57, 125, 165, 72, 34, 35, 83, 149,
                ],
            ),
            (
                Filter::Lanczos,
                (9, 6),
                &[
                    0, 37, 172, 242, 201, 237, 102, 71, 198, 79, 93, 184, 207, 98, 77, 22, 34, 103, 227, 172, 152, 191,
                    165, 36, 84, 187, 184, 144, 156, 113, 93, 143, 73, 176, 243, 170, 0, 78, 117, 51, 15, 37, 107, 113,
                    68, 49, 51, 133, 171, 75, 33, 26, 89, 153,
                ],
            ),
            (
                Filter::Area,
                (9, 6),
                &[
                    0, 88, 88, 238, 194, 212, 36, 36, 178, 126, 136, 136, 208, 86, 26, 28, 28, 92, 218, 150, 150, 144,
                    200, 62, 242, 242, 228, 218, 150, 150, 144, 200, 62, 242, 242, 228, 20, 130, 130, 46, 24, 64, 166,
                    166, 74, 44, 76, 76, 170, 70, 32, 56, 56, 142,
                ],
            ),
        ];
        for (filter, target, expected) in cases {
            let resized = resize(&pattern(35), Color::Gray, filter, (7, 5), target);
            assert_eq!(resized, expected, "{filter:?} to {target:?}");
        }
    }

    // Pillow 13: `Image.fromarray(pattern.reshape(5, 7, 3)).resize((3, 2), filter)`.
    #[test]
    fn color_images_equal_pillow_for_every_filter() {
        let cases: [(Filter, (usize, usize), &[u8]); 5] = [
            (Filter::Nearest, (3, 2), &[24, 64, 166, 170, 70, 32, 244, 4, 82, 46, 130, 20, 200, 144, 150, 26, 86, 208]),
            (
                Filter::Bilinear,
                (3, 2),
                &[92, 117, 125, 125, 92, 104, 125, 113, 143, 140, 124, 86, 139, 137, 113, 117, 105, 162],
            ),
            (
                Filter::Bicubic,
                (3, 2),
                &[91, 118, 128, 125, 88, 103, 123, 115, 144, 144, 123, 84, 141, 143, 112, 115, 102, 165],
            ),
            (
                Filter::Lanczos,
                (3, 2),
                &[93, 120, 131, 125, 85, 105, 118, 114, 141, 146, 121, 86, 139, 142, 112, 113, 100, 162],
            ),
            (
                Filter::Area,
                (3, 2),
                &[91, 123, 132, 112, 97, 116, 131, 112, 155, 122, 124, 60, 164, 162, 94, 134, 106, 204],
            ),
        ];
        for (filter, target, expected) in cases {
            let resized = resize(&pattern(105), Color::Rgb, filter, (7, 5), target);
            assert_eq!(resized, expected, "{filter:?} to {target:?}");
        }
    }

    // Pillow 13: `Image.fromarray(pattern.reshape(30, 4)).resize((3, 5), BICUBIC)`. The horizontal pass first would
    // give 117 for the fifth sample.
    #[test]
    fn an_image_that_shrinks_most_in_height_runs_the_vertical_pass_first() {
        let expected = [107, 130, 130, 102, 116, 132, 89, 109, 138, 105, 139, 142, 144, 149, 109];
        assert_eq!(resize(&pattern(120), Color::Gray, Filter::Bicubic, (4, 30), (3, 5)), expected);
    }

    #[test]
    fn a_kept_range_is_cut_from_the_whole() {
        for filter in FILTERS {
            for target in [(40, 50), (9, 8)] {
                let whole = resize(&pattern(20 * 30 * 3), Color::Rgb, filter, (20, 30), target);
                let width = Axis { kept: 2..7, ..Axis::whole(20, target.0) };
                let height = Axis { kept: 3..6, ..Axis::whole(30, target.1) };
                let mut kept = Vec::new();
                Resizer::default().resize(&pattern(20 * 30 * 3), Color::Rgb, filter, &width, &height, &mut kept);
                let rows = whole.chunks_exact(target.0 * 3).skip(3).take(3);
                let expected: Vec<u8> = rows.flat_map(|row| &row[2 * 3..7 * 3]).copied().collect();
                assert_eq!(kept, expected, "{filter:?} to {target:?}");
            }
        }
    }

    #[test]
    fn a_resizer_remembers_nothing_that_changes_the_next_image() {
        let (mut reused, mut resized) = (Resizer::default(), Vec::new());
        let sizes =
            [((20, 30), (9, 8)), ((20, 30), (40, 50)), ((5, 5), (9, 8)), ((600, 1), (9, 8)), ((20, 30), (9, 8))];
        for filter in FILTERS {
            for (source, target) in sizes {
                let (width, height) = (Axis::whole(source.0, target.0), Axis::whole(source.1, target.1));
                let pixels = pattern(600);
                let pixels = &pixels[..source.0 * source.1];
                reused.resize(pixels, Color::Gray, filter, &width, &height, &mut resized);
                assert_eq!(resized, resize(pixels, Color::Gray, filter, source, target), "{filter:?} {source:?}");
            }
        }
    }

    #[test]
    fn an_extreme_image_is_not_held_in_memory() {
        let (mut resizer, mut resized) = (Resizer::default(), Vec::new());
        let side = 1 << 20;
        let width = Axis::whole(side, 8);
        let pixels = vec![200; side];
        resizer.resize(&pixels, Color::Gray, Filter::Lanczos, &width, &Axis::whole(1, 1), &mut resized);
        assert_eq!(resized, [200; 8]);
        assert!(resizer.kept_bytes() <= MAX_KEPT_BYTES);
    }
}
