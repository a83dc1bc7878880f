//! Measures of how good scores and embeddings are, where the truth is known.
//!
//! Pure functions of numbers in memory. What `evaluate` prints is computed here, and compared with scikit-learn in the tests.

use ndarray::ArrayView2;
use polars::prelude::{NamedFrom as _, PlSmallStr, RankMethod, RankOptions, Series, SeriesRank as _};

use crate::neighbors::exact::{JoinError, Metric, self_join};

/// Neighbors that vote on the label of a row.
pub const VOTERS: usize = 5;

/// Variance of its mean over the rows from which on a latent unit is active (Y. Burda, R. Grosse and R. Salakhutdinov, "Importance
/// Weighted Autoencoders", 2016).
pub const ACTIVE_VARIANCE: f64 = 0.01;

/// Area under the ROC curve from ranks: `(R - n₊(n₊+1)/2) / (n₊ n₋)` with R the sum of the positives' average ranks (Mann & Whitney
/// 1947; Hanley and `McNeil` 1982). The chance that a positive row scores above a negative one, ties counting half; `None` where a
/// class is empty.
pub fn auroc(positive: &[f64], negative: &[f64]) -> Option<f64> {
    if positive.is_empty() || negative.is_empty() {
        return None;
    }
    let scores: Vec<f64> = positive.iter().chain(negative).copied().collect();
    let scores = Series::new(PlSmallStr::EMPTY, scores);
    let ranks = scores.rank(RankOptions { method: RankMethod::Average, descending: false }, None);
    let rank_sum: f64 = ranks.f64().ok()?.iter().take(positive.len()).flatten().sum();
    let (num_positive, num_negative) = (positive.len() as f64, negative.len() as f64);
    Some((rank_sum - num_positive * (num_positive + 1.0) / 2.0) / (num_positive * num_negative))
}

/// Average precision: the precision at each threshold, weighted by the recall that it adds, where each different score is a threshold
/// (no interpolation; scikit-learn's `average_precision_score`). `None` where a class is empty: all would be 1, or nothing.
pub fn average_precision(positive: &[f64], negative: &[f64]) -> Option<f64> {
    if positive.is_empty() || negative.is_empty() {
        return None;
    }
    let mut scores: Vec<(f64, bool)> = positive.iter().map(|score| (*score, true)).collect();
    scores.extend(negative.iter().map(|score| (*score, false)));
    scores.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    let (mut num_above, mut positive_above, mut precisions) = (0, 0, 0.0);
    // In descending order, what is not larger is equal.
    for equal in scores.chunk_by(|a, b| a.0 <= b.0) {
        let found = equal.iter().filter(|(_, is_positive)| *is_positive).count();
        num_above += equal.len();
        positive_above += found;
        precisions += found as f64 * positive_above as f64 / num_above as f64;
    }
    Some(precisions / positive.len() as f64)
}

/// How flags meet the truth, over the rows that are known to be positive or negative.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Confusion {
    /// Positive rows that are flagged.
    pub true_positive: usize,
    /// Negative rows that are flagged.
    pub false_positive: usize,
    /// Positive rows that are not.
    pub false_negative: usize,
}

impl Confusion {
    /// Counts a row that is known to be positive or negative.
    pub fn push(&mut self, is_positive: bool, is_flagged: bool) {
        match (is_positive, is_flagged) {
            (true, true) => self.true_positive += 1,
            (false, true) => self.false_positive += 1,
            (true, false) => self.false_negative += 1,
            (false, false) => {}
        }
    }

    /// Share of the flagged rows that are positive; `None` where none is flagged.
    pub fn precision(self) -> Option<f64> {
        share(self.true_positive, self.true_positive + self.false_positive)
    }

    /// Share of the positive rows that are flagged; `None` where there are none.
    pub fn recall(self) -> Option<f64> {
        share(self.true_positive, self.true_positive + self.false_negative)
    }

    /// Harmonic mean of precision and recall; `None` where no row is flagged or positive.
    pub fn f1(self) -> Option<f64> {
        share(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)
    }
}

fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// How well the neighbors of a row know its label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NeighborAccuracy {
    /// Share of the rows whose label is that of most of their neighbors.
    pub accuracy: f64,
    /// Share of the rows that have the most frequent label: what guessing gives.
    pub majority_share: f64,
    /// Rows.
    pub num_rows: usize,
    /// Different labels.
    pub num_labels: usize,
}

/// Classifies each row by its [`VOTERS`] nearest other rows and compares that with its label. Of labels with as many votes each, the
/// one whose first vote is the nearest wins. A row without neighbors is classified wrongly. `None` where there are fewer than two
/// rows, or one label alone.
///
/// # Errors
/// As [`self_join`].
pub fn neighbor_accuracy(
    vectors: &ArrayView2<'_, f32>,
    labels: &[String],
    metric: Metric,
) -> Result<Option<NeighborAccuracy>, JoinError> {
    let mut sorted: Vec<&String> = labels.iter().collect();
    sorted.sort_unstable();
    let counts: Vec<usize> = sorted.chunk_by(|a, b| a == b).map(<[_]>::len).collect();
    let num_rows = labels.len();
    if counts.len() < 2 {
        return Ok(None);
    }
    let lists = self_join(vectors, metric, VOTERS)?;
    let num_right = lists
        .iter()
        .zip(labels)
        .filter(|(neighbors, label)| {
            let votes: Vec<&String> =
                neighbors.iter().filter_map(|neighbor| labels.get(neighbor.row as usize)).collect();
            let count = |label: &String| votes.iter().filter(|vote| **vote == label).count();
            // Of equal elements, `max_by_key` gives the last one; the nearest vote is the first.
            votes.iter().rev().max_by_key(|vote| count(vote)) == Some(label)
        })
        .count();
    Ok(Some(NeighborAccuracy {
        accuracy: num_right as f64 / num_rows as f64,
        majority_share: counts.iter().copied().max().unwrap_or_default() as f64 / num_rows as f64,
        num_rows,
        num_labels: counts.len(),
    }))
}

/// How much images differ from their mean image: what a reconstruction that knows nothing else leaves unexplained.
#[derive(Debug, Clone, Default)]
pub struct TotalVariance {
    num_images: usize,
    sums: Vec<f64>,
    sum_squared: f64,
}

impl TotalVariance {
    /// Takes in an image's tensor; all have the same length.
    pub fn push(&mut self, tensor: &[f32]) {
        self.sums.resize(tensor.len(), 0.0);
        for (sum, value) in self.sums.iter_mut().zip(tensor) {
            *sum += f64::from(*value);
        }
        self.sum_squared += tensor.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        self.num_images += 1;
    }

    /// `1 - Σ‖x - r‖² / Σ‖x - mean‖²`, given the mean over the images of the mean squared error of a value. 1 for perfect reconstructions,
    /// 0 for the mean image, below 0 for worse ones. `None` where all images are equal, or there are none.
    pub fn explained(&self, mean_squared_error: f64) -> Option<f64> {
        let count = self.num_images as f64;
        let total = self.sum_squared - self.sums.iter().map(|sum| sum * sum / count).sum::<f64>();
        // What is left of sums of squares of which all is taken away.
        let is_some = total > self.sum_squared * f64::EPSILON * count;
        is_some.then(|| 1.0 - mean_squared_error * count * self.sums.len() as f64 / total)
    }
}

/// What the units (dimensions) of a latent space are used for.
#[derive(Debug, Clone, Default)]
pub struct LatentUnits {
    num_rows: usize,
    sums: Vec<f64>,
    sums_squared: Vec<f64>,
    divergences: Vec<f64>,
}

impl LatentUnits {
    /// Takes in the posterior of a row; all have the same lengths.
    pub fn push(&mut self, mu: &[f32], logvar: &[f32]) {
        for sums in [&mut self.sums, &mut self.sums_squared, &mut self.divergences] {
            sums.resize(mu.len(), 0.0);
        }
        for (unit, (mu, logvar)) in mu.iter().zip(logvar).enumerate() {
            let (mu, logvar) = (f64::from(*mu), f64::from(*logvar));
            self.sums[unit] += mu;
            self.sums_squared[unit] += mu * mu;
            self.divergences[unit] += -0.5 * (1.0 + logvar - mu * mu - logvar.exp());
        }
        self.num_rows += 1;
    }

    /// Number of units; 0 before the first row.
    pub fn num_units(&self) -> usize {
        self.sums.len()
    }

    /// Units whose mean varies over the rows by more than [`ACTIVE_VARIANCE`]. The others give the decoder what it knows already.
    pub fn num_active(&self) -> usize {
        let count = self.num_rows as f64;
        let variances =
            self.sums.iter().zip(&self.sums_squared).map(|(sum, squared)| squared / count - (sum / count).powi(2));
        variances.filter(|variance| *variance > ACTIVE_VARIANCE).count()
    }

    /// KL divergence of each unit from the prior, in nats, as the mean over the rows; the sum of all is the mean of `kl_divergence`.
    pub fn divergences(&self) -> Vec<f64> {
        self.divergences.iter().map(|sum| sum / self.num_rows as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    /// Rounding of float64 only.
    fn assert_near(found: Option<f64>, expected: f64) {
        assert!(found.is_some_and(|found| (found - expected).abs() < 1e-12), "{found:?} is not {expected}");
    }

    #[test]
    fn the_area_counts_pairs_in_the_right_order_and_ties_half() {
        assert_near(auroc(&[3.0, 4.0], &[1.0, 2.0]), 1.0);
        assert_near(auroc(&[1.0, 2.0], &[3.0, 4.0]), 0.0);
        assert_near(auroc(&[1.0, 1.0], &[1.0, 1.0, 1.0]), 0.5);
        // Pairs: (2,1) above, (2,2) tie, (2,3) below; (4,·) above all three.
        assert_near(auroc(&[2.0, 4.0], &[1.0, 2.0, 3.0]), (1.0 + 0.5 + 0.0 + 3.0) / 6.0);
        assert_eq!((auroc(&[], &[1.0]), auroc(&[1.0], &[])), (None, None));
    }

    #[test]
    fn average_precision_is_that_computed_by_hand_and_ties_are_one_threshold() {
        assert_near(average_precision(&[3.0, 4.0], &[1.0, 2.0]), 1.0);
        // In order: + - +, so precision 1 at recall ½ and ⅔ at recall 1.
        assert_near(average_precision(&[3.0, 1.0], &[2.0]), 0.5 + 2.0 / 6.0);
        // All tied: one threshold, whose precision is the share of positives, whatever the order of the rows.
        assert_near(average_precision(&[1.0], &[1.0, 1.0, 1.0]), 0.25);
        assert_eq!((average_precision(&[], &[1.0]), average_precision(&[1.0], &[])), (None, None));
    }

    #[test]
    fn precision_recall_and_their_mean_are_those_computed_by_hand() {
        let mut found = Confusion::default();
        for (is_positive, is_flagged, count) in [(true, true, 2), (true, false, 2), (false, true, 1), (false, false, 1)]
        {
            (0..count).for_each(|_| found.push(is_positive, is_flagged));
        }
        assert_eq!(found, Confusion { true_positive: 2, false_positive: 1, false_negative: 2 });
        assert_near(found.precision(), 2.0 / 3.0);
        assert_near(found.recall(), 0.5);
        assert_near(found.f1(), 4.0 / 7.0);
        let none = Confusion::default();
        assert_eq!((none.precision(), none.recall(), none.f1()), (None, None, None));
    }

    #[test]
    fn neighbors_vote_and_the_nearest_breaks_ties() {
        let labels = |text: &str| -> Vec<String> { text.chars().map(String::from).collect() };
        // Two groups far apart, one row of `b` among those of `a`.
        let vectors =
            arr2(&[[0.0_f32], [1.0], [2.0], [3.0], [4.0], [5.0], [100.0], [101.0], [102.0], [103.0], [104.0], [105.0]]);
        let found = neighbor_accuracy(&vectors.view(), &labels("aabaaabbbbbb"), Metric::L2).unwrap().unwrap();
        assert_near(Some(found.accuracy), 11.0 / 12.0);
        assert_near(Some(found.majority_share), 7.0 / 12.0);
        assert_eq!((found.num_rows, found.num_labels), (12, 2));
        // Five rows: each has four voters. Of the first, the neighbors are a, b, a, b in this order.
        let vectors = arr2(&[[0.0_f32], [1.0], [2.1], [3.3], [4.6]]);
        let found = neighbor_accuracy(&vectors.view(), &labels("aabab"), Metric::L2).unwrap().unwrap();
        // Voters of the rows: abab -> a; abab -> a; aaab -> a, wrong; bbaa -> b, wrong; abaa -> a, wrong.
        assert_near(Some(found.accuracy), 2.0 / 5.0);
        assert_eq!(neighbor_accuracy(&vectors.view(), &labels("aaaaa"), Metric::L2).unwrap(), None);
    }

    #[test]
    fn the_mean_image_explains_nothing_and_a_perfect_one_all() {
        let mut variance = TotalVariance::default();
        assert_eq!(variance.explained(0.0), None);
        for tensor in [[1.0, 5.0], [3.0, 5.0]] {
            variance.push(&tensor);
        }
        assert_near(variance.explained(0.0), 1.0);
        // The mean image (2, 5) is off by 1 in one value of two.
        assert_near(variance.explained(0.5), 0.0);
        assert_near(variance.explained(0.125), 0.75);
        let mut flat = TotalVariance::default();
        (0..3).for_each(|_| flat.push(&[0.1, 0.7]));
        assert_eq!(flat.explained(0.0), None);
    }

    #[test]
    fn a_unit_that_says_the_same_of_every_row_is_not_active() {
        let mut units = LatentUnits::default();
        for sign in [-1.0, 1.0] {
            units.push(&[sign, 0.3, 0.05 * sign], &[0.0, 0.0, 0.0]);
        }
        assert_eq!((units.num_units(), units.num_active()), (3, 1));
        let divergences = units.divergences();
        assert_near(Some(divergences[0]), 0.5);
        assert!((divergences[1] - 0.045).abs() < 1e-7, "{divergences:?}");
    }
}
