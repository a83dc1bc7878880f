//! Random numbers that are the same in every run: drawn by a seed and a number, never by a clock.

use std::f64::consts::TAU;

/// What the state grows by: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Sebastiano Vigna's generator: small, and the same on every machine and in every version (G. L. Steele, D. Lea and C. H. Flood,
/// "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Holds its state, which is also its seed.
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// One of the streams of a seed. It starts at the number of that place in the seed's own sequence, so that it is the same
    /// whichever others are drawn.
    pub fn stream(seed: u64, number: u64) -> Self {
        Self(Self(seed.wrapping_add(number.wrapping_mul(STEP))).next_u64())
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`, or zero.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half of the product is below end")]
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next_u64()) * end as u128) >> 64) as usize
    }

    /// Puts values into a random order (Fisher and Yates).
    pub fn shuffle(&mut self, values: &mut [usize]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last + 1));
        }
    }

    /// Uniform in [0, 1): the upper 53 bits, which are such a number exactly.
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * 2.0_f64.powi(-53)
    }

    /// Fills `values` with draws from N(0, 1), by the method of G. E. P. Box and M. E. Muller, "A Note on the Generation of
    /// Random Normal Deviates", 1958. Another system's logarithm and cosine may round the last bit otherwise.
    pub fn fill_normal(&mut self, values: &mut [f32]) {
        for pair in values.chunks_mut(2) {
            // Of (0, 1], so that the logarithm is finite.
            let radius = (-2.0 * (1.0 - self.fraction()).ln()).sqrt();
            let (sine, cosine) = (TAU * self.fraction()).sin_cos();
            for (value, part) in pair.iter_mut().zip([cosine, sine]) {
                #[expect(clippy::cast_possible_truncation, reason = "rounded to the latents' own precision")]
                let normal = (radius * part) as f32;
                *value = normal;
            }
        }
    }

    /// Uniform in [-1, 1).
    #[cfg(test)]
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_published_generator() {
        // `next()` of splitmix64.c (S. Vigna, 2015) for the state 1234567.
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(random.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_stream_starts_where_the_seed_has_that_number() {
        let mut seed = SplitMix64(42);
        for number in 0..4 {
            let start = seed.next_u64();
            assert_eq!(SplitMix64::stream(42, number).0, start);
        }
    }

    #[test]
    fn normals_have_the_moments_and_the_tails_of_the_normal_distribution() {
        let mut values = vec![0.0; 100_001];
        SplitMix64(7).fill_normal(&mut values);
        let count = values.len() as f64;
        let moment = |power: i32| values.iter().map(|value| f64::from(*value).powi(power)).sum::<f64>() / count;
        // Four standard errors of each: var(z) = 1, var(z²) = 2, var(z³) = 15, var(z⁴) = 96.
        for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let found = moment(power);
            assert!((found - expected).abs() < 4.0 * (variance / count).sqrt(), "moment {power}: {found}");
        }
        let beyond = values.iter().filter(|value| value.abs() > 1.959_964).count() as f64 / count;
        assert!((beyond - 0.05).abs() < 4.0 * (0.05 * 0.95 / count).sqrt(), "{beyond}");
        // Neighbors in the sequence do not follow each other.
        let product = values.windows(2).map(|pair| f64::from(pair[0] * pair[1])).sum::<f64>() / count;
        assert!(product.abs() < 4.0 / count.sqrt(), "{product}");
    }

    #[test]
    fn the_first_normals_do_not_depend_on_how_many_are_drawn() {
        let (mut few, mut many) = ([0.0; 3], [0.0; 64]);
        SplitMix64(5).fill_normal(&mut few);
        SplitMix64(5).fill_normal(&mut many);
        assert_eq!(few.map(f32::to_bits), [many[0], many[1], many[2]].map(f32::to_bits));
    }
}
