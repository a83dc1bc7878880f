//! Scores: how far a model's reconstruction of an image is from the image, and how far its latents are from the prior.
//!
//! Pure functions of one image's tensors. Everything is computed from `mu`, or from samples that belong to the image ([`elbo`]), so an
//! image has one score and not another one each time. Sums run in a fixed order in `f64`, so neither the batch that an image comes in nor the
//! processor matters.

pub mod elbo;

use pulp::{Simd, WithSimd};
use serde::{Deserialize, Serialize};

use crate::model::Likelihood;
#[cfg(doc)]
use crate::normal::Compared;

/// Share of the values that [`Scores::top_1pct_squared_error`] averages: small defects drown in the mean over all.
const TOP_SHARE: f64 = 0.01;

/// Values whose errors are added up side by side, whatever the width of the processor's registers.
const LANES: usize = 16;

/// Probabilities of a Bernoulli likelihood are kept this far from 0 and 1, where the logarithm ends.
const PROBABILITY_MARGIN: f64 = 1e-7;

/// A score that rows can be ranked by; higher = stranger. Each is a column of `latents` or of `anomalies`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// [`Scores::mean_squared_error`].
    MeanSquaredError,
    /// [`Scores::mean_absolute_error`].
    MeanAbsoluteError,
    /// [`Scores::top_1pct_squared_error`].
    #[serde(rename = "top_1pct_squared_error")]
    Top1PctSquaredError,
    /// [`Scores::kl_divergence`].
    KlDivergence,
    /// [`Scores::negative_elbo`].
    NegativeElbo,
    /// [`Scores::pred_score`].
    PredScore,
    /// [`Compared::complexity_adjusted_error`].
    ComplexityAdjustedError,
    /// [`Compared::mahalanobis_distance`].
    MahalanobisDistance,
    /// [`Compared::knn_distance`].
    KnnDistance,
    /// [`Compared::fused`].
    Fused,
}

impl Rule {
    /// The rules that look at one image, in the order of their columns in `latents`.
    pub const OF_IMAGE: [Self; 6] = [
        Self::MeanSquaredError,
        Self::MeanAbsoluteError,
        Self::Top1PctSquaredError,
        Self::KlDivergence,
        Self::NegativeElbo,
        Self::PredScore,
    ];

    /// The rules that compare an image with a reference, in the order of their columns in `anomalies`.
    pub const OF_REFERENCE: [Self; 4] =
        [Self::ComplexityAdjustedError, Self::MahalanobisDistance, Self::KnnDistance, Self::Fused];

    /// All rules.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::OF_IMAGE.into_iter().chain(Self::OF_REFERENCE)
    }

    /// The rule's name, which is also its column in `latents` or `anomalies`.
    pub fn name(self) -> &'static str {
        match self {
            Self::MeanSquaredError => "mean_squared_error",
            Self::MeanAbsoluteError => "mean_absolute_error",
            Self::Top1PctSquaredError => "top_1pct_squared_error",
            Self::KlDivergence => "kl_divergence",
            Self::NegativeElbo => "negative_elbo",
            Self::PredScore => "pred_score",
            Self::ComplexityAdjustedError => "complexity_adjusted_error",
            Self::MahalanobisDistance => "mahalanobis_distance",
            Self::KnnDistance => "knn_distance",
            Self::Fused => "fused",
        }
    }
}

/// The scores of one image; `None` where the model has no output that the score needs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scores {
    /// Mean of (x - reconstruction)² over the values of the input tensor, in squared units of the tensor.
    pub mean_squared_error: Option<f64>,
    /// Mean of |x - reconstruction|, in units of the tensor.
    pub mean_absolute_error: Option<f64>,
    /// Mean of the largest 1 % of the squared errors (at least one value), as alibi-detect's `outlier_perc` does it.
    pub top_1pct_squared_error: Option<f64>,
    /// KL(q(z|x) ‖ N(0, I)) = -½ Σ (1 + logvar - mu² - e^logvar), in nats (Kingma & Welling 2014, appendix B).
    pub kl_divergence: Option<f64>,
    /// -log p(x|z = mu) + KL, in nats: the negative evidence lower bound with the expectation over q taken at its mean, or where samples
    /// are asked for, over these ([`elbo::Sampler`]).
    pub negative_elbo: Option<f64>,
    /// What the model itself says, as exports of anomaly detectors do; of a map without a score, the maximum. In the model's units.
    pub pred_score: Option<f64>,
}

impl Scores {
    /// The score of a rule, if it is one that looks at one image.
    pub fn get(&self, rule: Rule) -> Option<f64> {
        match rule {
            Rule::MeanSquaredError => self.mean_squared_error,
            Rule::MeanAbsoluteError => self.mean_absolute_error,
            Rule::Top1PctSquaredError => self.top_1pct_squared_error,
            Rule::KlDivergence => self.kl_divergence,
            Rule::NegativeElbo => self.negative_elbo,
            Rule::PredScore => self.pred_score,
            Rule::ComplexityAdjustedError | Rule::MahalanobisDistance | Rule::KnnDistance | Rule::Fused => None,
        }
    }
}

/// The tensors of one image.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tensors<'a> {
    /// The network's input.
    pub input: &'a [f32],
    /// Its reconstruction, of the same length.
    pub reconstruction: Option<&'a [f32]>,
    /// Mean of the approximate posterior.
    pub mu: Option<&'a [f32]>,
    /// Log-variance of the approximate posterior, of the same length.
    pub logvar: Option<&'a [f32]>,
    /// The model's own score, one number.
    pub pred_score: Option<&'a [f32]>,
    /// Its score of each place.
    pub anomaly_map: Option<&'a [f32]>,
}

/// Scores one image. `squared` is scratch memory, so that no image allocates.
pub fn score(tensors: Tensors<'_>, likelihood: Option<Likelihood>, squared: &mut Vec<f32>) -> Scores {
    let mut scores = Scores::default();
    let kl = tensors.mu.zip(tensors.logvar).map(|(mu, logvar)| kl_divergence(mu, logvar));
    scores.kl_divergence = kl;
    scores.pred_score = pred_score(tensors.pred_score, tensors.anomaly_map);
    let Some(reconstruction) = tensors.reconstruction else { return scores };
    let num_values = tensors.input.len() as f64;
    squared.resize(tensors.input.len(), 0.0);
    let (sum_squared, sum_absolute) =
        pulp::Arch::new().dispatch(Errors { input: tensors.input, reconstruction, squared });
    scores.mean_squared_error = Some(sum_squared / num_values);
    scores.mean_absolute_error = Some(sum_absolute / num_values);
    scores.top_1pct_squared_error = Some(mean_of_largest(squared, TOP_SHARE));
    let negative_log_likelihood = likelihood.map(|likelihood| match likelihood {
        Likelihood::Gaussian { sigma } => gaussian_loss(sum_squared, tensors.input.len(), sigma),
        Likelihood::Bernoulli => negative_log_likelihood(tensors.input, reconstruction, likelihood),
    });
    scores.negative_elbo = negative_log_likelihood.zip(kl).map(|(likelihood, kl)| likelihood + kl);
    scores
}

/// The sums of the squared and of the absolute errors of a reconstruction, and each of the squared ones, by code for the processor that is
/// found.
struct Errors<'a> {
    input: &'a [f32],
    reconstruction: &'a [f32],
    /// As many as there are values.
    squared: &'a mut [f32],
}

impl WithSimd for Errors<'_> {
    type Output = (f64, f64);

    #[expect(clippy::inline_always, reason = "compiled for the processor that the dispatch finds")]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the largest errors are selected by value; float32 tells them apart"
    )]
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (f64, f64) {
        let (mut sums_squared, mut sums_absolute) = ([0.0; LANES], [0.0; LANES]);
        let mut add = |lane: usize, x: f32, r: f32, squared: &mut f32| {
            let error = f64::from(x) - f64::from(r);
            sums_squared[lane] += error * error;
            sums_absolute[lane] += error.abs();
            *squared = (error * error) as f32;
        };
        let (inputs, last_inputs) = self.input.as_chunks::<LANES>();
        let (reconstructions, last_reconstructions) = self.reconstruction.as_chunks::<LANES>();
        let (squares, last_squares) = self.squared.as_chunks_mut::<LANES>();
        for ((input, reconstruction), squared) in inputs.iter().zip(reconstructions).zip(squares) {
            for lane in 0..LANES {
                add(lane, input[lane], reconstruction[lane], &mut squared[lane]);
            }
        }
        let last = last_inputs.iter().zip(last_reconstructions).zip(last_squares).enumerate();
        last.for_each(|(lane, ((x, r), squared))| add(lane, *x, *r, squared));
        (sums_squared.iter().sum(), sums_absolute.iter().sum())
    }
}

/// The model's own score, or the maximum of its map, as PaDiM and PatchCore judge an image by; NaN where a place of the map is NaN.
fn pred_score(score: Option<&[f32]>, map: Option<&[f32]>) -> Option<f64> {
    let largest = |map: &[f32]| {
        let max = |largest: f32, value: &f32| {
            if largest.is_nan() || value.is_nan() { f32::NAN } else { largest.max(*value) }
        };
        map.iter().fold(f32::NEG_INFINITY, max)
    };
    let score = score.and_then(|score| score.first().copied());
    score.or_else(|| map.map(largest)).map(f64::from)
}

/// -log p(x|z) in nats, given what the decoder makes of z.
fn negative_log_likelihood(input: &[f32], reconstruction: &[f32], likelihood: Likelihood) -> f64 {
    let values = input.iter().zip(reconstruction).map(|(x, r)| (f64::from(*x), f64::from(*r)));
    match likelihood {
        Likelihood::Gaussian { sigma } => {
            gaussian_loss(values.map(|(x, r)| (x - r) * (x - r)).sum(), input.len(), sigma)
        }
        Likelihood::Bernoulli => values
            .map(|(x, p)| {
                let p = p.clamp(PROBABILITY_MARGIN, 1.0 - PROBABILITY_MARGIN);
                -(x * p.ln() + (1.0 - x) * (1.0 - p).ln())
            })
            .sum(),
    }
}

/// -log N(x; r, σ²) = ½ log 2πσ² + (x - r)² / 2σ², summed over the values, whose squared errors add up to `sum_squared`.
fn gaussian_loss(sum_squared: f64, num_values: usize, sigma: f64) -> f64 {
    0.5 * num_values as f64 * (std::f64::consts::TAU * sigma * sigma).ln() + sum_squared / (2.0 * sigma * sigma)
}

/// -½ Σ (1 + logvar - mu² - e^logvar).
fn kl_divergence(mu: &[f32], logvar: &[f32]) -> f64 {
    -0.5 * mu
        .iter()
        .zip(logvar)
        .map(|(mu, logvar)| {
            let (mu, logvar) = (f64::from(*mu), f64::from(*logvar));
            1.0 + logvar - mu * mu - logvar.exp()
        })
        .sum::<f64>()
}

/// Mean of the largest `share` of the values, at least one. None is negative.
fn mean_of_largest(values: &[f32], share: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length is a length")]
    let count = ((values.len() as f64 * share).ceil() as usize).max(1);
    if values.len() < count {
        return f64::NAN;
    }
    pulp::Arch::new().dispatch(Largest { values, count }) / count as f64
}

/// The sum of the largest values, by code for the processor that is found.
///
/// The least of them is found by halving the range of what it may be, since counting the values that reach a bound is a matter of registers
/// alone, and selecting them by exchange is one branch for each that nobody can foresee. The bits of floats that are not negative have
/// their order.
struct Largest<'a> {
    values: &'a [f32],
    /// How many are added up, of at least as many.
    count: usize,
}

impl WithSimd for Largest<'_> {
    type Output = f64;

    #[expect(clippy::inline_always, reason = "compiled for the processor that the dispatch finds")]
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let Self { values, count } = self;
        let reaching =
            |bound: u32| values.iter().map(|value| u32::from(value.to_bits() >= bound)).sum::<u32>() as usize;
        // At least `count` values reach the least, and fewer the bound beyond the most.
        let (mut least, mut most) = (0, values.iter().fold(0, |most, value| most.max(value.to_bits())));
        let mut num_reaching = values.len();
        while least < most && num_reaching != count {
            let middle = most - (most - least) / 2;
            let reached = reaching(middle);
            if reached >= count {
                (least, num_reaching) = (middle, reached);
            } else {
                most = middle - 1;
            }
        }
        // Of more that are equal to the least, the last ones do not count.
        let surplus = (num_reaching - count) as f64 * f64::from(f32::from_bits(least));
        let mut sums = [0.0; LANES];
        let (chunks, rest) = values.as_chunks::<LANES>();
        let mut add = |lane: usize, value: f32| {
            sums[lane] += if value.to_bits() >= least { f64::from(value) } else { 0.0 };
        };
        for values in chunks {
            values.iter().enumerate().for_each(|(lane, value)| add(lane, *value));
        }
        rest.iter().enumerate().for_each(|(lane, value)| add(lane, *value));
        sums.iter().sum::<f64>() - surplus
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{found} is not {expected}");
    }

    #[test]
    fn a_perfect_reconstruction_has_no_error() {
        let x = [0.1, 0.2, 0.9];
        let tensors = Tensors { input: &x, reconstruction: Some(&x), ..Tensors::default() };
        let scores = score(tensors, None, &mut Vec::new());
        assert_eq!(scores.mean_squared_error, Some(0.0));
        assert_eq!(scores.top_1pct_squared_error, Some(0.0));
        assert_eq!(scores.kl_divergence, None);
        assert_eq!(scores.negative_elbo, None);
    }

    #[test]
    fn every_value_counts_however_many_there_are() {
        for count in 1..=3 * LANES {
            // The squared errors are 1, 4, 9 and so on.
            let input: Vec<f32> = (1..=count).map(|value| value as f32).collect();
            let reconstruction = vec![0.0; count];
            let mut squared = vec![7.0; 20];
            let tensors = Tensors { input: &input, reconstruction: Some(&reconstruction), ..Tensors::default() };
            let scores = score(tensors, None, &mut squared);
            let n = count as f64;
            near(scores.mean_squared_error, (n + 1.0) * (2.0 * n + 1.0) / 6.0);
            near(scores.mean_absolute_error, f64::midpoint(n, 1.0));
            near(scores.top_1pct_squared_error, n * n);
            assert_eq!(squared.len(), count);
        }
    }

    #[test]
    fn errors_are_those_computed_by_hand() {
        let tensors = Tensors {
            input: &[1.0, 0.0, 0.5, 0.0],
            reconstruction: Some(&[0.0, 0.0, 0.0, 0.0]),
            mu: None,
            logvar: None,
            ..Tensors::default()
        };
        let scores = score(tensors, None, &mut Vec::new());
        near(scores.mean_squared_error, 1.25 / 4.0);
        near(scores.mean_absolute_error, 1.5 / 4.0);
        near(scores.top_1pct_squared_error, 1.0);
    }

    #[test]
    fn the_top_percent_of_200_values_is_two_of_them() {
        let input: Vec<f32> = (0..200_u8).map(|value| f32::from(value) / 10.0).collect();
        let zeros = vec![0.0; 200];
        let tensors = Tensors { input: &input, reconstruction: Some(&zeros), ..Tensors::default() };
        near(score(tensors, None, &mut Vec::new()).top_1pct_squared_error, f64::midpoint(19.9 * 19.9, 19.8 * 19.8));
    }

    #[test]
    fn the_largest_are_those_that_sorting_finds() {
        let drawn = |count: usize, kinds: u32| {
            let mut state = 7_u32;
            let draw = move || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) % kinds) as f32 / kinds as f32
            };
            std::iter::repeat_with(draw).take(count).collect::<Vec<f32>>()
        };
        for count in (1..=3 * LANES).chain([100, 101, 999, 4096]) {
            // All different, nearly; a few kinds; all equal; and none.
            for kinds in [1 << 20, 3, 1] {
                let values = drawn(count, kinds);
                let mut sorted = values.clone();
                sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                for percent in [1_u8, 25, 100] {
                    let kept = &sorted[..(count * usize::from(percent)).div_ceil(100)];
                    let mean = kept.iter().map(|value| f64::from(*value)).sum::<f64>() / kept.len() as f64;
                    near(Some(mean_of_largest(&values, f64::from(percent) / 100.0)), mean);
                }
            }
        }
        assert!(mean_of_largest(&[], 0.5).is_nan());
        for strange in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut values = drawn(200, 9);
            values[77] = strange;
            assert!(!mean_of_largest(&values, 0.01).is_finite());
        }
        let mut values = [1e-30_f32; 200];
        values[3] = f32::MAX;
        near(Some(mean_of_largest(&values, 0.01)), f64::from(f32::MAX) / 2.0);
    }

    #[test]
    fn the_divergence_of_the_prior_from_itself_is_zero_and_grows_with_mu() {
        let zero = kl_divergence(&[0.0, 0.0], &[0.0, 0.0]);
        assert!(zero.abs() < 1e-12, "{zero}");
        // KL(N(1, 1) ‖ N(0, 1)) = ½.
        assert!((kl_divergence(&[1.0], &[0.0]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_gaussian_elbo_has_the_units_of_nats() {
        let tensors = Tensors {
            input: &[0.0],
            reconstruction: Some(&[2.0]),
            mu: Some(&[0.0]),
            logvar: Some(&[0.0]),
            ..Tensors::default()
        };
        let scores = score(tensors, Some(Likelihood::Gaussian { sigma: 1.0 }), &mut Vec::new());
        near(scores.negative_elbo, 0.5 * std::f64::consts::TAU.ln() + 2.0);
    }

    #[test]
    fn a_bernoulli_elbo_survives_certain_probabilities() {
        let tensors = Tensors {
            input: &[1.0, 0.0],
            reconstruction: Some(&[1.0, 0.0]),
            mu: Some(&[0.0]),
            logvar: Some(&[0.0]),
            ..Tensors::default()
        };
        let scores = score(tensors, Some(Likelihood::Bernoulli), &mut Vec::new());
        assert!(scores.negative_elbo.unwrap().is_finite());
    }

    #[test]
    fn a_models_own_score_is_taken_as_it_is_or_else_the_maximum_of_its_map() {
        let of = |pred_score, anomaly_map| {
            score(Tensors { input: &[0.0], pred_score, anomaly_map, ..Tensors::default() }, None, &mut Vec::new())
                .pred_score
        };
        assert_eq!(of(Some(&[0.25]), Some(&[3.0, 5.0])), Some(0.25));
        assert_eq!(of(None, Some(&[-3.0, -1.0, -2.0])), Some(-1.0));
        assert!(of(None, Some(&[1.0, f32::NAN, 2.0])).is_some_and(f64::is_nan));
        assert_eq!(of(None, None), None);
    }
}
