//! Statistics of the pixels that a model is shown: what a broken lamp, a dirty lens or a camera out of focus changes first.
//!
//! Pure functions of one image, taken where it is decoded and brought to the size of the network's input, before it is normalized:
//! the tensor is `(pixel * scale - mean) / std`, so statistics of either are the other's, and pixels are whole numbers. Sums are
//! exact, hence the same whatever the batch, the number of workers or the layout of the tensor.
#![expect(
    clippy::inline_always,
    reason = "what is inlined into a dispatch is compiled for the processor that was found"
)]

use pulp::{Simd, WithSimd};

/// A statistic of an image's pixels. Each is a column of `latents`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PixelStat {
    /// [`PixelStats::brightness`].
    Brightness,
    /// [`PixelStats::contrast`].
    Contrast,
    /// [`PixelStats::sharpness`].
    Sharpness,
    /// [`PixelStats::complexity`].
    Complexity,
}

impl PixelStat {
    /// All statistics, in the order of their columns.
    pub const ALL: [Self; 4] = [Self::Brightness, Self::Contrast, Self::Sharpness, Self::Complexity];

    /// The statistic's name, which is also its column in `latents`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Brightness => "brightness",
            Self::Contrast => "contrast",
            Self::Sharpness => "sharpness",
            Self::Complexity => "complexity",
        }
    }
}

/// The statistics of one image.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PixelStats {
    /// Mean of the samples of all channels, where black is 0 and white is 1.
    pub brightness: f64,
    /// Standard deviation of the same samples, in the same unit (the sum is divided by their number).
    pub contrast: f64,
    /// Mean of the squared Laplacian `4 c - left - right - above - below`, in squared units of brightness, over the samples that have
    /// all four neighbors; 0 where none has. Blur takes it away first: it weighs a wave by the fourth power of its frequency.
    pub sharpness: f64,
    /// Mean of the squared difference of two values of the input tensor that are neighbors in a row or a column of one channel, in
    /// squared units of the tensor; 0 where there are no neighbors. It is the Dirichlet energy of the image over the number of
    /// pairs: 0 for a flat image, and the larger the more there is to reconstruct.
    pub complexity: f64,
}

impl PixelStats {
    /// The statistics of an image whose samples lie in height, width, channel order. `units_per_level` is, for each channel, by how
    /// much a value of the tensor differs for one level of 255: `scale / std`.
    pub fn of(samples: &[u8], width: usize, units_per_level: &[f64]) -> Self {
        const WHITE: f64 = 255.0;
        let channels = units_per_level.len();
        let row = width * channels;
        if samples.is_empty() || row == 0 {
            return Self::default();
        }
        let sums = pulp::Arch::new().dispatch(Lines { samples, row, channels });
        // n Σx² - (Σx)² is n² times the variance; in whole numbers, a flat image has none at all.
        let num_samples = samples.len() as u128;
        let scatter = num_samples * u128::from(sums.squared) - u128::from(sums.plain) * u128::from(sums.plain);
        let num_rows = samples.len() / row;
        let num_pairs = channels * (num_rows * (width - 1) + (num_rows - 1) * width);
        let num_laplacians = num_rows.saturating_sub(2) * row.saturating_sub(2 * channels);
        let energy: f64 =
            sums.differences.iter().zip(units_per_level).map(|(sum, units)| *sum as f64 * units * units).sum();
        let count = samples.len() as f64;
        Self {
            brightness: sums.plain as f64 / count / WHITE,
            contrast: (scatter as f64).sqrt() / count / WHITE,
            sharpness: mean(sums.laplacians as f64, num_laplacians) / (WHITE * WHITE),
            complexity: mean(energy, num_pairs),
        }
    }

    /// The value of a statistic.
    pub fn get(&self, stat: PixelStat) -> f64 {
        match stat {
            PixelStat::Brightness => self.brightness,
            PixelStat::Contrast => self.contrast,
            PixelStat::Sharpness => self.sharpness,
            PixelStat::Complexity => self.complexity,
        }
    }
}

/// 0 where there is nothing to average.
fn mean(sum: f64, count: usize) -> f64 {
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Samples that are added up side by side: a multiple of one and of three channels, and of the width of registers.
const LANES: usize = 48;

/// Terms that are added up in 32 bits: squared Laplacians are up to 1020², four thousand of which fit.
const TERMS: usize = 4096;

/// What all statistics are made of. The sums are of whole numbers, and exact.
struct Sums {
    plain: u64,
    squared: u64,
    /// Squared differences of neighbors, by channel.
    differences: [u64; 3],
    laplacians: u64,
}

/// The lines of an image, which are added up by code for the processor that is found.
struct Lines<'a> {
    samples: &'a [u8],
    /// Samples of a line.
    row: usize,
    channels: usize,
}

impl WithSimd for Lines<'_> {
    type Output = Sums;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Sums {
        match self.channels {
            1 => Sums::of::<1>(self.samples, self.row),
            _ => Sums::of::<3>(self.samples, self.row),
        }
    }
}

impl Sums {
    /// Of lines of `row` samples. All lines are gone through as one, and what that takes for neighbors across the end of a line is taken
    /// away again.
    #[inline(always)]
    fn of<const CHANNELS: usize>(samples: &[u8], row: usize) -> Self {
        let squares = |[a, b]: [u8; 2]| {
            let difference = u16::from(a.abs_diff(b));
            u32::from(difference * difference)
        };
        let mut differences = [0; 3];
        let mut add = |lanes: [u64; LANES]| {
            for (lane, sum) in lanes.into_iter().enumerate() {
                differences[lane % CHANNELS] += sum;
            }
        };
        // The last line has no line below it.
        let last = samples.len() - row;
        let both = |[a, right, below]: [u8; 3]| squares([a, right]) + squares([a, below]);
        add(by_lane([samples, &samples[CHANNELS..], &samples[row..]], both));
        add(by_lane([&samples[last..], &samples[last + CHANNELS..]], squares));
        let ends = || (row..samples.len()).step_by(row);
        for end in ends() {
            for (channel, sum) in differences[..CHANNELS].iter_mut().enumerate() {
                *sum -= u64::from(squares([samples[end - CHANNELS + channel], samples[end + channel]]));
            }
        }
        let mut laplacians = 0;
        if samples.len() / row > 2 && row > 2 * CHANNELS {
            // The first center and its neighbors: left, right, above and below.
            let center = row + CHANNELS;
            let starts = [center, center - CHANNELS, center + CHANNELS, center - row, center + row];
            let laplacian = |[center, left, right, above, below]: [u8; 5]| {
                let [center, left, right, above, below] = [center, left, right, above, below].map(i16::from);
                let laplacian = 4 * center - (left + right + above + below);
                (i32::from(laplacian) * i32::from(laplacian)).unsigned_abs()
            };
            let length = samples.len() - 2 * row - 2 * CHANNELS;
            laplacians = total(starts.map(|start| &samples[start..start + length]), laplacian);
            // The first and the last pixel of a line are no centers.
            for end in ends().filter(|end| *end >= 2 * row && *end <= samples.len() - 2 * row) {
                for place in end - CHANNELS..end + CHANNELS {
                    laplacians -= u64::from(laplacian(starts.map(|start| samples[start + place - center])));
                }
            }
        }
        Self {
            plain: total([samples], |[sample]| u32::from(sample)),
            squared: total([samples], |[sample]| u32::from(sample) * u32::from(sample)),
            differences,
            laplacians,
        }
    }
}

/// Adds up `term` over runs of samples that begin together and as far as all go. The loops are written out: what closures of the standard
/// library's iterators do is not always inlined, and then not compiled for the processor that was found.
#[inline(always)]
fn total<const N: usize>(runs: [&[u8]; N], term: impl Fn([u8; N]) -> u32) -> u64 {
    let length = shortest(runs);
    let mut whole = 0;
    let mut done = 0;
    while done < length {
        let end = length.min(done + TERMS);
        let runs = cut(runs, done, end);
        let mut sum = 0;
        for place in 0..end - done {
            sum += term(at(runs, place));
        }
        whole += u64::from(sum);
        done = end;
    }
    whole
}

/// The same by lane: sample `i` goes to lane `i % LANES`. For sums by channel; where all go into one, registers add neighbors up in one step.
#[inline(always)]
fn by_lane<const N: usize>(runs: [&[u8]; N], term: impl Fn([u8; N]) -> u32) -> [u64; LANES] {
    let length = shortest(runs);
    let mut lanes = [0_u64; LANES];
    let mut done = 0;
    while done < length {
        let end = length.min(done + TERMS * LANES);
        let mut sums = [0_u32; LANES];
        while done + LANES <= end {
            let runs = cut(runs, done, done + LANES);
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum += term(at(runs, lane));
            }
            done += LANES;
        }
        for (sum, place) in sums.iter_mut().zip(done..end) {
            *sum += term(at(runs, place));
        }
        done = end;
        for (lane, sum) in lanes.iter_mut().zip(sums) {
            *lane += u64::from(sum);
        }
    }
    lanes
}

/// As many samples as all runs have.
#[inline(always)]
fn shortest<const N: usize>(runs: [&[u8]; N]) -> usize {
    runs.iter().map(|run| run.len()).min().unwrap_or(0)
}

/// A part of each run.
#[inline(always)]
fn cut<const N: usize>(mut runs: [&[u8]; N], start: usize, end: usize) -> [&[u8]; N] {
    for run in &mut runs {
        *run = &run[start..end];
    }
    runs
}

/// The sample of each run at one place.
#[inline(always)]
fn at<const N: usize>(runs: [&[u8]; N], place: usize) -> [u8; N] {
    let mut samples = [0; N];
    for (sample, run) in samples.iter_mut().zip(runs) {
        *sample = run[place];
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding of float64 only.
    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{found} is not {expected}");
    }

    #[test]
    fn a_flat_image_has_brightness_and_nothing_else() {
        let flat = PixelStats::of(&[51; 5 * 4], 5, &[2.0]);
        assert_eq!(flat, PixelStats { brightness: 0.2, contrast: 0.0, sharpness: 0.0, complexity: 0.0 });
    }

    #[test]
    fn statistics_are_those_computed_by_hand() {
        // 0   0   0
        // 0 255   0
        // 0   0   0
        let mut samples = [0; 9];
        samples[4] = 255;
        let found = PixelStats::of(&samples, 3, &[1.0 / 255.0]);
        assert_near(found.brightness, 1.0 / 9.0);
        assert_near(found.contrast, (1.0 / 9.0 - 1.0 / 81.0_f64).sqrt());
        assert_near(found.sharpness, 16.0);
        // 4 of the 6 + 6 pairs of neighbors differ, by 1.
        assert_near(found.complexity, 4.0 / 12.0);
    }

    #[test]
    fn channels_are_apart_and_have_their_own_units() {
        // Two pixels beside each other; the channels differ from each other, and only the second has neighbors that differ.
        let samples = [10, 20, 30, 10, 26, 30];
        let found = PixelStats::of(&samples, 2, &[1.0, 0.5, 1.0]);
        assert_near(found.complexity, 9.0 / 3.0);
        assert_near(found.sharpness, 0.0);
        // The same below each other.
        assert_eq!(PixelStats::of(&samples, 1, &[1.0, 0.5, 1.0]), found);
    }

    #[test]
    fn the_laplacian_of_a_ramp_is_zero_in_every_channel() {
        let ramp: Vec<u8> = (0..6_u8).flat_map(|y| (0..7).flat_map(move |x| [3 * x + y, 2 * y, 100 - x])).collect();
        let found = PixelStats::of(&ramp, 7, &[1.0; 3]);
        assert_near(found.sharpness, 0.0);
        // Squared differences along rows: 9, 0 and 1; along columns: 1, 4 and 0.
        assert_near(found.complexity, (36.0 * 10.0 + 35.0 * 5.0) / (3.0 * (36.0 + 35.0)));
    }

    #[test]
    fn sums_over_all_lines_at_once_are_those_of_each_pixel_and_its_neighbors() {
        let mut random = crate::random::SplitMix64::stream(7, 0);
        for (width, height) in [(1, 1), (1, 5), (2, 5), (3, 3), (5, 2), (16, 16), (17, 40), (61, 33)] {
            for channels in [1, 3] {
                let mut noise = vec![0.0; width * height * channels];
                random.fill_normal(&mut noise);
                let samples: Vec<u8> = noise.iter().map(|value| value.to_bits().to_le_bytes()[0]).collect();
                let at = |x: usize, y: usize, channel: usize| f64::from(samples[(y * width + x) * channels + channel]);
                let units = [0.5, 2.0, 3.0];
                let (mut pairs, mut energy, mut centers, mut laplacians) = (0.0_f64, 0.0, 0.0_f64, 0.0);
                for (y, x, channel) in (0..height)
                    .flat_map(|y| (0..width).flat_map(move |x| (0..channels).map(move |channel| (y, x, channel))))
                {
                    let here = at(x, y, channel);
                    for (x, y) in [(x + 1, y), (x, y + 1)] {
                        if x < width && y < height {
                            pairs += 1.0;
                            energy += ((at(x, y, channel) - here) * units[channel]).powi(2);
                        }
                    }
                    if x > 0 && y > 0 && x + 1 < width && y + 1 < height {
                        let around = at(x - 1, y, channel)
                            + at(x + 1, y, channel)
                            + at(x, y - 1, channel)
                            + at(x, y + 1, channel);
                        centers += 1.0;
                        laplacians += (4.0 * here - around).powi(2) / (255.0 * 255.0);
                    }
                }
                let found = PixelStats::of(&samples, width, &units[..channels]);
                assert_near(found.complexity, energy / pairs.max(1.0));
                assert_near(found.sharpness, laplacians / centers.max(1.0));
                let mean = samples.iter().map(|sample| f64::from(*sample)).sum::<f64>() / samples.len() as f64;
                let scatter = samples.iter().map(|sample| (f64::from(*sample) - mean).powi(2)).sum::<f64>();
                assert_near(found.brightness, mean / 255.0);
                assert_near(found.contrast, (scatter / samples.len() as f64).sqrt() / 255.0);
            }
        }
    }

    #[test]
    fn blur_takes_away_sharpness_and_leaves_brightness() {
        let stripes: Vec<u8> = (0..16).flat_map(|_| (0..16).map(|x| if x % 4 < 2 { 60 } else { 180 })).collect();
        let blurred: Vec<u8> = stripes
            .chunks(16)
            .flat_map(|line| {
                let line = line.to_vec();
                (0..16).map(move |x| {
                    u8::try_from(
                        (u16::from(line[(x + 15) % 16]) + 2 * u16::from(line[x]) + u16::from(line[(x + 1) % 16])) / 4,
                    )
                    .unwrap()
                })
            })
            .collect();
        let (before, after) = (PixelStats::of(&stripes, 16, &[1.0]), PixelStats::of(&blurred, 16, &[1.0]));
        assert_near(after.brightness, before.brightness);
        assert!(after.sharpness < before.sharpness / 2.0, "{after:?} {before:?}");
        assert!(after.complexity < before.complexity, "{after:?} {before:?}");
    }

    #[test]
    fn images_without_neighbors_have_no_differences() {
        let one = PixelStats::of(&[255], 1, &[1.0]);
        assert_eq!(one, PixelStats { brightness: 1.0, contrast: 0.0, sharpness: 0.0, complexity: 0.0 });
        let two = PixelStats::of(&[0, 255], 2, &[1.0]);
        assert_eq!((two.contrast, two.sharpness, two.complexity), (0.5, 0.0, 255.0 * 255.0));
    }
}
