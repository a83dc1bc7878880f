//! Statistics of the pixels that a model is shown: what a broken lamp, a dirty lens or a camera out of focus changes first.
//!
//! Pure functions of one image, taken where it is decoded and brought to the size of the network's input, before it is normalized:
//! the tensor is `(pixel * scale - mean) / std`, so statistics of either are the other's, and pixels are whole numbers. Sums are
//! exact, hence the same whatever the batch, the number of workers or the layout of the tensor.

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
        let num_samples = samples.len() as u128;
        let sum: u64 = samples.iter().map(|sample| u64::from(*sample)).sum();
        let sum_squared: u64 = samples.iter().map(|sample| u64::from(*sample) * u64::from(*sample)).sum();
        // n Σx² - (Σx)² is n² times the variance; in whole numbers, a flat image has none at all.
        let scatter = num_samples * u128::from(sum_squared) - u128::from(sum) * u128::from(sum);

        let (mut energy, mut num_pairs) = (0.0, 0);
        for (channel, units) in units_per_level.iter().enumerate() {
            let (mut squares, mut pairs) = (0, 0);
            for line in samples.chunks_exact(row) {
                squares += squared_differences(line, &line[channels..], channel, channels);
                pairs += width - 1;
            }
            if let Some(below) = samples.get(row..) {
                squares += squared_differences(samples, below, channel, channels);
                pairs += below.len() / channels;
            }
            energy += squares as f64 * units * units;
            num_pairs += pairs;
        }

        let (mut squared_laplacians, mut num_laplacians) = (0, 0);
        for lines in samples.chunks_exact(row).collect::<Vec<_>>().windows(3) {
            let [above, line, below] = lines else { continue };
            squared_laplacians += laplacians(above, line, below, channels);
            num_laplacians += row.saturating_sub(2 * channels);
        }

        let count = samples.len() as f64;
        Self {
            brightness: sum as f64 / count / WHITE,
            contrast: (scatter as f64).sqrt() / count / WHITE,
            sharpness: mean(squared_laplacians as f64, num_laplacians) / (WHITE * WHITE),
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

/// Sum of the squared differences of two runs of samples, of one channel, as far as both go.
fn squared_differences(samples: &[u8], others: &[u8], channel: usize, channels: usize) -> u64 {
    let squares = |(a, b): (&u8, &u8)| u64::from(a.abs_diff(*b)).pow(2);
    if channels == 1 {
        return samples.iter().zip(others).map(squares).sum();
    }
    samples.iter().zip(others).skip(channel).step_by(channels).map(squares).sum()
}

/// Sum of the squared Laplacians of a line, but for its first and last pixel.
fn laplacians(above: &[u8], line: &[u8], below: &[u8], channels: usize) -> u64 {
    let vertical = levels(above, channels).zip(levels(below, channels)).map(|(above, below)| above + below);
    // The right neighbors end first, one pixel before the line does.
    let horizontal = levels(line, 0).zip(levels(line, 2 * channels)).map(|(left, right)| left + right);
    levels(line, channels)
        .zip(vertical.zip(horizontal))
        .map(|(center, (vertical, horizontal))| u64::from((4 * center - vertical - horizontal).unsigned_abs()).pow(2))
        .sum()
}

/// The samples of a line from one on.
fn levels(line: &[u8], start: usize) -> impl Iterator<Item = i32> {
    line.iter().skip(start).map(|sample| i32::from(*sample))
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
