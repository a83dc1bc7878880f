//! Flags: which scores are strange, measured against a reference.
//!
//! Against a [reference](crate::reference) every score has a percentile and a conformal p-value that mean the same tomorrow as today.
//! A threshold by share or quantile is a statement about the reference, so one odd batch does not move it. Where a pipeline names no
//! reference, the rows themselves stand in for one.
//!
//! # What can be promised
//! Were a new image drawn as those of the reference were, then with n counted rows and a cutoff that lies below `a` of them,
//!
//! - the chance that it is flagged is `(a + 1) / (n + 1)`, on average over references ([`Promise::average`]);
//! - with this one reference it may be larger, but with a confidence of 95 % it is at most the bound of C. J. Clopper and E. S. Pearson for
//!   `a` of n ([`Promise::at_most`]).
//!
//! A share below `1 / (n + 1)` cannot be promised by n rows, and is refused.

use crate::config::Threshold;

/// Shares times counts are rounded up from this far below an integer: 0.1 x 10 is 0.999…98 in floating point, and means 1.
const COUNT_ROUNDING: f64 = 1e-9;

/// Chance that the bound of a [`Promise`] is too low.
const PROMISE_RISK: f64 = 0.05;

/// Halvings of an interval until there is nothing left of it in `f64`.
const HALVINGS: usize = 60;

/// The score above which (strictly) a row is an anomaly. `reference` is ascending; without scores in it there is no cutoff, unless
/// it is given. For a false discovery rate there is none before all rows are known: see [`cutoff_of_p`].
///
/// With `contamination` c, at most the share c of the reference lies above it: of n scores, ⌊c n⌋.
pub fn cutoff(threshold: Threshold, reference: &[f64]) -> Option<f64> {
    let share = match threshold {
        Threshold::Contamination(share) => share,
        Threshold::Quantile(quantile) => 1.0 - quantile,
        Threshold::Value(value) => return Some(value),
        Threshold::Fdr(_) => return None,
    };
    let last = reference.len().checked_sub(1)?;
    reference.get(last - whole(share * reference.len() as f64).min(last)).copied()
}

/// The score above which (strictly) rows have a p-value of at most `p`; `None` where no score is strange enough.
pub fn cutoff_of_p(p: f64, reference: &[f64]) -> Option<f64> {
    // p = (1 + number at or above) / (n + 1).
    let at_or_above = whole(p * (reference.len() as f64 + 1.0)).checked_sub(1)?;
    match reference.len().checked_sub(1 + at_or_above) {
        Some(place) => Some(reference[place]),
        // Every score has such a p-value.
        None => Some(f64::MIN),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count is a count")]
fn whole(count: f64) -> usize {
    (count + COUNT_ROUNDING).floor().max(0.0) as usize
}

/// The largest p-value that is rejected at a false discovery rate, by the step-up procedure of Y. Benjamini and Y. Hochberg,
/// "Controlling the false discovery rate", 1995; `None` where none is. Sorts the p-values.
///
/// Conformal p-values of one reference depend on each other so that the procedure keeps its promise (S. Bates, E. Candès, L. Lei, Y. Romano
/// and M. Sesia, "Testing for outliers with conformal p-values", 2023).
pub fn benjamini_hochberg(p_values: &mut [f64], rate: f64) -> Option<f64> {
    p_values.sort_unstable_by(f64::total_cmp);
    let count = p_values.len() as f64;
    let is_rejected = |(place, p): (usize, &f64)| *p <= rate * (place + 1) as f64 / count + f64::EPSILON;
    let last = p_values.iter().enumerate().rev().find(|pair| is_rejected(*pair));
    last.map(|(_, p)| *p)
}

/// A score's place in the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judgment {
    /// Share of the reference at or below the score, in percent.
    pub severity_percentile: f64,
    /// (1 + number of reference scores at or above it) / (n + 1): under exchangeability, the chance that a normal row scores this
    /// high is at most this (Vovk, Gammerman & Shafer 2005).
    pub p_value: f64,
}

/// Judges one score. `reference` is ascending and not empty.
pub fn judge(score: f64, reference: &[f64]) -> Judgment {
    let count = reference.len() as f64;
    let at_or_below = reference.partition_point(|other| *other <= score) as f64;
    let at_or_above = count - reference.partition_point(|other| *other < score) as f64;
    Judgment { severity_percentile: 100.0 * at_or_below / count, p_value: (1.0 + at_or_above) / (count + 1.0) }
}

/// How often a new normal row is flagged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Promise {
    /// The chance, on average over references of this size.
    pub average: f64,
    /// The chance with this reference is not larger than this, with a confidence of 95 %.
    pub at_most: f64,
}

impl Promise {
    /// What a cutoff promises. `reference` is ascending.
    pub fn of(cutoff: f64, reference: &[f64]) -> Self {
        let above = reference.len() - reference.partition_point(|score| *score <= cutoff);
        let count = reference.len() as f64;
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(low, high);
            if binomial_at_most(above, reference.len(), middle) > PROMISE_RISK { low = middle } else { high = middle }
        }
        Self { average: (above as f64 + 1.0) / (count + 1.0), at_most: high }
    }
}

/// The chance of at most `successes` in `trials` of probability `p`, which lies between 0 and 1.
fn binomial_at_most(successes: usize, trials: usize, p: f64) -> f64 {
    if successes >= trials {
        return 1.0;
    }
    // Term by term by its logarithm, since the first ones may be smaller than any number.
    let mut logarithm = trials as f64 * (-p).ln_1p();
    let mut sum = logarithm.exp();
    for success in 0..successes {
        logarithm += ((trials - success) as f64 / (success + 1) as f64 * p / (1.0 - p)).ln();
        sum += logarithm.exp();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ten() -> Vec<f64> {
        (1..=10).map(f64::from).collect()
    }

    #[test]
    fn contamination_is_the_share_of_the_reference_above_the_cutoff() {
        for (share, above) in [(0.0, 0), (0.1, 1), (0.3, 3), (0.35, 3), (0.5, 5)] {
            let cutoff = cutoff(Threshold::Contamination(share), &ten()).unwrap();
            assert_eq!(ten().iter().filter(|score| **score > cutoff).count(), above, "{share}");
        }
    }

    #[test]
    fn a_quantile_is_the_contamination_that_it_leaves() {
        assert_eq!(cutoff(Threshold::Quantile(0.9), &ten()), Some(9.0));
        assert_eq!(cutoff(Threshold::Quantile(0.9), &[]), None);
    }

    #[test]
    fn ties_with_the_reference_count_for_the_percentile_and_for_the_p_value() {
        let judgment = judge(2.0, &[1.0, 2.0, 2.0, 3.0]);
        assert!((judgment.severity_percentile - 75.0).abs() < 1e-12);
        assert!((judgment.p_value - 4.0 / 5.0).abs() < 1e-12);
    }

    #[test]
    fn a_score_above_all_of_the_reference_has_the_smallest_p_value_that_its_size_allows() {
        let judgment = judge(99.0, &ten());
        assert!((judgment.p_value - 1.0 / 11.0).abs() < 1e-12);
        assert!((judgment.severity_percentile - 100.0).abs() < 1e-12);
    }

    #[test]
    fn a_score_is_above_the_cutoff_of_a_p_value_exactly_where_its_own_is_no_larger() {
        let reference = [1.0, 2.0, 2.0, 3.0, 5.0];
        for places in 0..=6_u8 {
            let p = f64::from(places) / 6.0;
            for score in [0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0] {
                let is_above = cutoff_of_p(p, &reference).is_some_and(|cutoff| score > cutoff);
                assert_eq!(is_above, judge(score, &reference).p_value <= p + 1e-12, "{p} {score}");
            }
        }
    }

    #[test]
    fn the_step_up_procedure_rejects_what_its_authors_reject() {
        // The p-values of section 3.2 of the paper, of which four are rejected at 0.05.
        let mut p_values = [
            0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
            0.7590, 1.0,
        ];
        assert_eq!(benjamini_hochberg(&mut p_values, 0.05), Some(0.0095));
        assert_eq!(benjamini_hochberg(&mut [0.5, 0.9], 0.05), None);
        assert_eq!(benjamini_hochberg(&mut [], 0.05), None);
        // A later one may carry earlier ones that fail by themselves.
        assert_eq!(benjamini_hochberg(&mut [0.04, 0.045], 0.05), Some(0.045));
    }

    #[test]
    fn promises_are_those_of_clopper_and_pearson() {
        // 1 - 0.05^(1/n) where none lies above; for one of ten, from tables.
        let promise = Promise::of(10.0, &ten());
        assert!((promise.average - 1.0 / 11.0).abs() < 1e-12);
        assert!((promise.at_most - (1.0 - 0.05_f64.powf(0.1))).abs() < 1e-9);
        assert!((Promise::of(9.0, &ten()).at_most - 0.394_163).abs() < 1e-5);
        assert!((Promise::of(0.0, &ten()).at_most - 1.0).abs() < 1e-9);
        let many: Vec<f64> = (0..1_000_000).map(f64::from).collect();
        let promise = Promise::of(949_999.0, &many);
        assert!((promise.at_most - 0.050_36).abs() < 1e-5, "{promise:?}");
    }
}
