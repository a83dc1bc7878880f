//! Drift: whether the images of a partition still come from where the images of the reference came from.
//!
//! Two samples are compared check by check: each number of the rows (scores, pixel statistics) by where its values lie and by how
//! many lie beyond nearly all of the reference, and the vectors by their energy distance. A check gives an effect size, which does
//! not grow with the number of rows, and a p-value, which says whether so large an effect comes about by chance.
//!
//! # Effect sizes
//! - [`Metric::Location`]: Cliff's δ, `|2 AUC - 1|`: the chance that a row of the partition lies above one of the reference, less the
//!   chance that it lies below (N. Cliff, "Dominance statistics", 1993). It takes ties, outliers and any unit: scores have heavy tails,
//!   where a difference of means in standard deviations says little.
//! - [`Metric::UpperTail`], [`Metric::LowerTail`]: the share of the partition that lies beyond the reference's outermost [`TAIL_SHARE`], less
//!   that of the reference. A new kind of image in 5 % of the rows moves no location, but comes to lie here.
//! - [`Metric::Energy`]: the energy coefficient of inhomogeneity `(2 A - B - C) / 2 A`, where A, B and C are the mean distances between
//!   the samples, within the reference and within the partition, each over pairs of different rows (G. J. Székely and M. L. Rizzo,
//!   "Energy statistics: a class of statistics based on distances", 2013). 0 for equal distributions, 1 where each sample is one point.
//!
//! # p-values
//! If nothing has drifted, it is chance which rows are the partition's. So all effects are computed anew after drawing which rows are,
//! for all checks together, many times. Of each drawing the strangest effect counts, whichever check it is of, and a check's p-value
//! is the share of drawings that are stranger than it is (P. H. Westfall and S. S. Young, "Resampling-based multiple testing", 1993:
//! the single-step maximum). Hence the chance that *any* check of a partition has `p <= alpha` where nothing has drifted is at most alpha, and alpha
//! but for ties, however the checks depend on each other.
//!
//! To be comparable, effects are brought to one scale by mean, deviation and skewness of each check over further drawings, which count
//! for nothing else: the cube root of E. B. Wilson and M. M.
//! Hilferty, "The distribution of chi-square", 1931, turns a gamma variable into a normal one. Were that a bad fit, some checks
//! would find less than others; the chance of a false alarm stays what it is.
//!
//! # What bounds the cost
//! Of each side [`MAX_ROWS`] rows are looked at, and the vectors of [`MAX_VECTORS`] of them: those whose keys have the smallest hashes.
//! Rows with vectors are drawn among themselves, and the others too, so that each drawing has as many of both as there are. Keys
//! seed the drawings. So neither the order of rows nor the number of threads matters, to the last bit.

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use crate::random::SplitMix64;
use crate::sample::KeyedSample;

/// Rows of a side that are looked at, at most.
pub const MAX_ROWS: usize = 2_000;

/// Vectors of a side that are looked at, at most: their distances are all held.
pub const MAX_VECTORS: usize = 500;

/// Rows that a side must have for a verdict: with fewer, only effects that need no test would be found.
pub const MIN_ROWS: usize = 30;

/// The outermost share of the reference, at either end, that a tail is.
pub const TAIL_SHARE: f64 = 0.01;

/// Drawings that bring the checks to one scale.
const SCALING_DRAWS: usize = 499;

/// Effects that differ less than this do not differ: they are shares and lie between -1 and 1.
const NO_DEVIATION: f64 = 1e-12;

/// Skewness that an effect is taken to have at most: that of exponential numbers.
const MAX_SKEWNESS: f64 = 2.0;

/// How drift is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Significance {
    /// Chance that any check of a partition finds a drift where there is none.
    pub alpha: f64,
    /// Drawings that effects are compared with. With fewer than `1 / alpha - 1`, no effect is large enough, and there is no verdict.
    pub permutations: usize,
}

impl Default for Significance {
    fn default() -> Self {
        Self { alpha: 0.01, permutations: 999 }
    }
}

/// How two samples are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Where the values lie: Cliff's δ, without its sign.
    Location,
    /// Share of rows above the upper end of the reference, in excess of the reference's own.
    UpperTail,
    /// Share of rows below the lower end of the reference, in excess of the reference's own.
    LowerTail,
    /// Energy coefficient of inhomogeneity.
    Energy,
}

impl Metric {
    /// The word for it in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Location => "cliffs_delta",
            Self::UpperTail => "upper_tail_excess",
            Self::LowerTail => "lower_tail_excess",
            Self::Energy => "energy_coefficient",
        }
    }

    /// The largest effect that does not matter, however sure it is: with thousands of rows, every difference is significant.
    ///
    /// A δ of 0.1 is a shift by an eighth of a standard deviation of normal values; a tail in excess of 0.01 has twice the rows that it
    /// should have; an energy coefficient of 0.001 is a shift of all elements of normal vectors by a sixteenth of their deviation, or one row in
    /// twenty of another kind.
    pub fn threshold(self) -> f64 {
        match self {
            Self::Location => 0.1,
            Self::UpperTail | Self::LowerTail => 0.01,
            Self::Energy => 0.001,
        }
    }
}

/// A number that rows have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input<'a> {
    /// Its name, for the checks.
    pub name: &'a str,
    /// Whether its lower tail is looked at too. Of a score, small values are the most usual there are; a pixel statistic is strange
    /// at both ends.
    pub has_lower_tail: bool,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// What was compared: the name of a number, or [`EMBEDDING`].
    pub input: String,
    /// How.
    pub metric: Metric,
    /// [`Metric::threshold`].
    pub threshold: f64,
    /// The effect size. `None` where a side has no rows with the input.
    pub value: Option<f64>,
    /// Chance that any check of the partition comes out as strange as this one if nothing has drifted. `None` where there are too few
    /// rows ([`MIN_ROWS`]) or permutations ([`Significance::permutations`]) for a verdict.
    pub p_value: Option<f64>,
    /// Rows of the partition that were looked at.
    pub num_rows: usize,
    /// Whether it has drifted: `p_value <= alpha`, and the effect is above the threshold.
    pub is_anomaly: bool,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.input, self.metric.name())?;
        match self.value {
            Some(value) => write!(f, " {value:.3})"),
            None => f.write_str(")"),
        }
    }
}

/// Name of the input that is the vectors.
pub const EMBEDDING: &str = crate::schema::column::EMBEDDING;

/// One side of the comparison: some of the rows that were handed in, whatever their order.
#[derive(Debug)]
pub struct Side {
    numbers: KeyedSample<Vec<Option<f64>>>,
    vectors: KeyedSample<Vec<f32>>,
}

impl Default for Side {
    fn default() -> Self {
        Self { numbers: KeyedSample::new(MAX_ROWS), vectors: KeyedSample::new(MAX_VECTORS) }
    }
}

impl Side {
    /// Hands in a row: a key that no other row of this side has, its numbers in the order of the inputs, and its vector. A number that
    /// is not finite is taken as missing.
    pub fn push(&mut self, key: &str, numbers: &[Option<f64>], vector: &[f32]) {
        let finite = || numbers.iter().map(|number| number.filter(|number| number.is_finite())).collect();
        self.numbers.push(key, finite);
        self.vectors.push(key, || vector.to_vec());
    }

    /// Rows that are looked at.
    pub fn num_rows(&self) -> usize {
        self.numbers.len()
    }
}

/// Compares a partition with the reference: the checks of each input in turn, and that of the vectors.
pub fn compare(reference: &Side, partition: &Side, inputs: &[Input<'_>], significance: Significance) -> Vec<Check> {
    let pooled = Pooled::new(reference, partition, inputs.len());
    let observed = pooled.effects(&pooled.labels, inputs);
    let can_reject = (significance.permutations + 1) as f64 * significance.alpha >= 1.0;
    let is_tested: Vec<bool> = observed
        .iter()
        .map(|effect| can_reject && effect.num_reference >= MIN_ROWS && effect.num_partition >= MIN_ROWS)
        .collect();
    let p_values = if is_tested.contains(&true) {
        let drawn: Vec<Vec<f64>> = (0..SCALING_DRAWS + significance.permutations)
            .into_par_iter()
            .map(|number| pooled.effects(&pooled.draw(number), inputs).iter().map(|effect| effect.size).collect())
            .collect();
        let observed: Vec<f64> = observed.iter().map(|effect| effect.size).collect();
        p_values(&observed, &drawn, &is_tested)
    } else {
        vec![None; observed.len()]
    };
    observed
        .into_iter()
        .zip(p_values)
        .map(|(effect, p_value)| {
            let has_rows = effect.num_reference > 0 && effect.num_partition > 0;
            let threshold = effect.metric.threshold();
            // Estimates of an excess that is none come out on either side of zero.
            let value = has_rows.then_some(effect.size.max(0.0));
            let is_significant = p_value.is_some_and(|p_value| p_value <= significance.alpha);
            Check {
                input: effect.input.map_or(EMBEDDING, |input| inputs[input].name).to_owned(),
                metric: effect.metric,
                threshold,
                value,
                p_value,
                num_rows: effect.num_partition,
                is_anomaly: is_significant && value.is_some_and(|value| value > threshold),
            }
        })
        .collect()
}

/// The effect of one check, under some labels.
struct Effect {
    /// Number of the input; `None`: the vectors.
    input: Option<usize>,
    metric: Metric,
    size: f64,
    /// Rows that have the input.
    num_reference: usize,
    num_partition: usize,
}

/// The rows of both sides: those of the reference, and after them those of the partition.
struct Pooled {
    /// Whether each row is the partition's.
    labels: Vec<bool>,
    /// Rows that are drawn among themselves, and how many of them are the partition's: those with vectors, and the others.
    strata: [(Vec<usize>, usize); 2],
    numbers: Vec<Ranked>,
    distances: Distances,
    seed: u64,
}

impl Pooled {
    fn new(reference: &Side, partition: &Side, num_inputs: usize) -> Self {
        let sides = [reference, partition];
        let [(num_reference, reference_vectors), (num_partition, partition_vectors)] =
            sides.map(|side| (side.numbers.len(), side.vectors.len()));
        let labels: Vec<bool> = (0..num_reference + num_partition).map(|row| row >= num_reference).collect();
        // The rows with vectors come first on each side, for both are in the same order.
        let (with_vector, without) = (0..labels.len()).partition(|row| match row.checked_sub(num_reference) {
            None => *row < reference_vectors,
            Some(row) => row < partition_vectors,
        });
        let rows: Vec<&Vec<Option<f64>>> = sides.iter().flat_map(|side| side.numbers.rows()).collect();
        let column = |input: usize| rows.iter().map(|row| row.get(input).copied().flatten()).collect::<Vec<_>>();
        let vectors: Vec<&[f32]> = sides.iter().flat_map(|side| side.vectors.rows().map(Vec::as_slice)).collect();
        let hashes = sides.iter().flat_map(|side| side.numbers.hashes());
        Self {
            labels,
            distances: Distances::new(&vectors),
            strata: [(with_vector, partition_vectors), (without, num_partition - partition_vectors)],
            numbers: (0..num_inputs).map(|input| Ranked::new(&column(input))).collect(),
            seed: hashes.fold(0, |seed, hash| SplitMix64(seed ^ hash).next_u64()),
        }
    }

    /// Labels as they might have been. Any number may be drawn without the others.
    fn draw(&self, number: usize) -> Vec<bool> {
        let mut random = SplitMix64::stream(self.seed, number as u64);
        let mut labels = vec![false; self.labels.len()];
        for (rows, num_partition) in &self.strata {
            let mut rows = rows.clone();
            random.shuffle(&mut rows);
            rows.iter().take(*num_partition).for_each(|row| labels[*row] = true);
        }
        labels
    }

    /// The effects of all checks.
    fn effects(&self, labels: &[bool], inputs: &[Input<'_>]) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (number, (input, ranked)) in inputs.iter().zip(&self.numbers).enumerate() {
            let num_partition = ranked.rows.iter().filter(|row| labels[**row]).count();
            let num_reference = ranked.rows.len() - num_partition;
            let mut push =
                |metric, size| effects.push(Effect { input: Some(number), metric, size, num_reference, num_partition });
            push(Metric::Location, ranked.cliffs_delta(labels, num_reference, num_partition).abs());
            push(Metric::UpperTail, ranked.tail_excess(ranked.ties.iter().rev(), labels, num_reference, num_partition));
            if input.has_lower_tail {
                push(Metric::LowerTail, ranked.tail_excess(ranked.ties.iter(), labels, num_reference, num_partition));
            }
        }
        let (with_vector, num_partition) = &self.strata[0];
        let labels: Vec<bool> = with_vector.iter().map(|row| labels[*row]).collect();
        effects.push(Effect {
            input: None,
            metric: Metric::Energy,
            size: self.distances.energy_coefficient(&labels),
            num_reference: labels.len() - num_partition,
            num_partition: *num_partition,
        });
        effects
    }
}

/// The rows that have a number, in the order of it.
struct Ranked {
    rows: Vec<usize>,
    /// Runs of equal numbers, as places in `rows`.
    ties: Vec<Range<usize>>,
}

impl Ranked {
    fn new(numbers: &[Option<f64>]) -> Self {
        let mut sorted: Vec<(f64, usize)> =
            numbers.iter().enumerate().filter_map(|(row, number)| Some(((*number)?, row))).collect();
        sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut start = 0;
        let ties = sorted
            // In ascending order, what is not smaller is equal.
            .chunk_by(|(a, _), (b, _)| a >= b)
            .map(|equal| {
                start += equal.len();
                start - equal.len()..start
            })
            .collect();
        Self { rows: sorted.into_iter().map(|(_, row)| row).collect(), ties }
    }

    fn count_partition(&self, tie: &Range<usize>, labels: &[bool]) -> usize {
        self.rows[tie.clone()].iter().filter(|row| labels[**row]).count()
    }

    /// `2 AUC - 1`: positive where the partition's numbers are the larger ones; 0 where a side is empty.
    fn cliffs_delta(&self, labels: &[bool], num_reference: usize, num_partition: usize) -> f64 {
        // Twice the rows of the reference below each of the partition, ties counting half, summed in whole numbers.
        let (mut twice_above, mut reference_below) = (0, 0);
        for tie in &self.ties {
            let partition = self.count_partition(tie, labels);
            let reference = tie.len() - partition;
            twice_above += partition * (2 * reference_below + reference);
            reference_below += reference;
        }
        let pairs = num_reference * num_partition;
        if pairs == 0 { 0.0 } else { twice_above as f64 / pairs as f64 - 1.0 }
    }

    /// Share of the partition beyond the end of the reference that is the first of `ties`, less the reference's own share there; 0 where
    /// a side is empty.
    fn tail_excess<'a>(
        &self,
        ties: impl Iterator<Item = &'a Range<usize>>,
        labels: &[bool],
        num_reference: usize,
        num_partition: usize,
    ) -> f64 {
        if num_reference == 0 || num_partition == 0 {
            return 0.0;
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count is a count")]
        let most_beyond = (num_reference as f64 * TAIL_SHARE) as usize;
        let (mut reference_beyond, mut partition_beyond) = (0, 0);
        for tie in ties {
            let partition = self.count_partition(tie, labels);
            let reference = tie.len() - partition;
            if reference_beyond + reference > most_beyond {
                break;
            }
            reference_beyond += reference;
            partition_beyond += partition;
        }
        partition_beyond as f64 / num_partition as f64 - reference_beyond as f64 / num_reference as f64
    }
}

/// Euclidean distances of all pairs of vectors.
struct Distances {
    num_vectors: usize,
    /// Row by row, of the whole matrix.
    all: Vec<f64>,
    /// Sum of the distances to all others, for each vector.
    sums: Vec<f64>,
}

impl Distances {
    fn new(vectors: &[&[f32]]) -> Self {
        let all: Vec<f64> = vectors.par_iter().flat_map_iter(|a| vectors.iter().map(|b| euclidean(a, b))).collect();
        let sums = all.chunks(vectors.len().max(1)).map(|row| row.iter().sum()).collect();
        Self { num_vectors: vectors.len(), all, sums }
    }

    /// `(2 A - B - C) / 2 A`, or 0 where a side has fewer than two vectors or all vectors are equal. It may come out a little below zero:
    /// the means are over pairs of different rows, so that the coefficient does not depend on how many rows there are.
    fn energy_coefficient(&self, labels: &[bool]) -> f64 {
        let partition: Vec<usize> = (0..self.num_vectors).filter(|vector| labels[*vector]).collect();
        let (num_partition, num_reference) = (partition.len(), self.num_vectors - partition.len());
        if num_partition < 2 || num_reference < 2 {
            return 0.0;
        }
        // Each pair within the partition once; the other sums follow from those of whole rows.
        let mut within_partition = 0.0;
        for (place, vector) in partition.iter().enumerate() {
            let row = &self.all[vector * self.num_vectors..(vector + 1) * self.num_vectors];
            within_partition += partition[place + 1..].iter().map(|other| row[*other]).sum::<f64>();
        }
        let from_partition: f64 = partition.iter().map(|vector| self.sums[*vector]).sum();
        let between = from_partition - 2.0 * within_partition;
        let within_reference = self.sums.iter().sum::<f64>() / 2.0 - between - within_partition;
        let pairs = |count: usize| (count * (count - 1) / 2) as f64;
        let mean_between = between / (num_partition * num_reference) as f64;
        if mean_between <= 0.0 {
            return 0.0;
        }
        let mean_within = within_reference / pairs(num_reference) + within_partition / pairs(num_partition);
        1.0 - mean_within / (2.0 * mean_between)
    }
}

fn euclidean(a: &[f32], b: &[f32]) -> f64 {
    // As many sums as a processor adds up at once; their order is fixed, so the result is the same on all of them.
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            let difference = f64::from(*a) - f64::from(*b);
            *sum += difference * difference;
        }
    }
    sums.iter().sum::<f64>().sqrt()
}

/// The p-value of each check that is tested, from what was observed and what was drawn: the first drawings bring the checks to one
/// scale, and the others are what the observed effects are compared with.
fn p_values(observed: &[f64], drawn: &[Vec<f64>], is_tested: &[bool]) -> Vec<Option<f64>> {
    let (for_scale, drawn) = drawn.split_at(SCALING_DRAWS.min(drawn.len()));
    let scales: Vec<Option<Scale>> = is_tested
        .iter()
        .enumerate()
        .map(|(check, is_tested)| {
            is_tested.then(|| Scale::of(&for_scale.iter().map(|effects| effects[check]).collect::<Vec<_>>()))
        })
        .collect();
    let strangeness = |effects: &[f64]| -> Vec<Option<f64>> {
        scales.iter().zip(effects).map(|(scale, effect)| Some(scale.as_ref()?.place(*effect))).collect()
    };
    let strangest: Vec<f64> = drawn
        .iter()
        .map(|effects| strangeness(effects).into_iter().flatten().fold(f64::NEG_INFINITY, f64::max))
        .collect();
    strangeness(observed)
        .into_iter()
        .map(|own| {
            let own = own?;
            // What was observed is one of the drawings that there might have been (B. Phipson and G. K. Smyth, 2010).
            let as_strange = 1 + strangest.iter().filter(|other| **other >= own).count();
            Some(as_strange as f64 / (1 + strangest.len()) as f64)
        })
        .collect()
}

/// Brings the effects of one check to the scale of standard normal numbers, by their first three moments.
struct Scale {
    mean: f64,
    deviation: f64,
    skewness: f64,
}

impl Scale {
    fn of(effects: &[f64]) -> Self {
        let count = effects.len() as f64;
        let mean = effects.iter().sum::<f64>() / count;
        let moment = |power: i32| effects.iter().map(|effect| (effect - mean).powi(power)).sum::<f64>() / count;
        let deviation = moment(2).sqrt();
        let skewness = if deviation > NO_DEVIATION { moment(3) / deviation.powi(3) } else { 0.0 };
        // Effects have their long tail above. Counts that are hardly ever other than zero are no gamma variables, whatever their
        // moments: what is usual for them must not look strange.
        let skewness = skewness.clamp(0.0, MAX_SKEWNESS);
        Self { mean, deviation, skewness }
    }

    /// Rises with the effect. Where the drawings gave but one effect, larger ones are beyond any scale.
    fn place(&self, effect: f64) -> f64 {
        /// With less, the formula divides by next to nothing, and its result is its argument.
        const SYMMETRIC: f64 = 1e-3;
        if self.deviation <= NO_DEVIATION {
            return if effect > self.mean + NO_DEVIATION { f64::INFINITY } else { 0.0 };
        }
        let standardized = (effect - self.mean) / self.deviation;
        if self.skewness < SYMMETRIC {
            return standardized;
        }
        // A gamma variable of this skewness has an end below, where the cube is zero.
        let cube = (1.0 + self.skewness * standardized / 2.0).max(0.0);
        6.0 / self.skewness * (cube.cbrt() - 1.0) + self.skewness / 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INPUTS: [Input<'static>; 2] =
        [Input { name: "score", has_lower_tail: false }, Input { name: "brightness", has_lower_tail: true }];

    /// A row: its numbers and its vector.
    type Row = (Vec<Option<f64>>, Vec<f32>);

    /// Rows of a score with a long tail, a normal pixel statistic and a normal vector that hangs together with both.
    fn rows(count: usize, seed: u64) -> Vec<Row> {
        let mut random = SplitMix64(seed);
        let mut normal = [0.0; 5];
        (0..count)
            .map(|_| {
                random.fill_normal(&mut normal);
                let [a, b, ..] = normal.map(f64::from);
                (vec![Some(a.exp()), Some(0.5 + 0.1 * b)], normal.to_vec())
            })
            .collect()
    }

    fn sample(side: &str, rows: &[Row]) -> Side {
        let mut sample = Side::default();
        for (number, (numbers, vector)) in rows.iter().enumerate() {
            sample.push(&format!("{side} {number}"), numbers, vector);
        }
        sample
    }

    fn compared(reference: &[Row], partition: &[Row], significance: Significance) -> Vec<Check> {
        let checks = compare(&sample("reference", reference), &sample("partition", partition), &INPUTS, significance);
        for check in &checks {
            assert!(check.value.is_none_or(|value| (0.0..=1.0).contains(&value)), "{check:?}");
            assert!(check.p_value.is_none_or(|p_value| (0.0..=1.0).contains(&p_value)), "{check:?}");
        }
        checks
    }

    fn drifted(checks: &[Check]) -> Vec<(&str, Metric)> {
        checks.iter().filter(|check| check.is_anomaly).map(|check| (check.input.as_str(), check.metric)).collect()
    }

    #[test]
    fn partitions_of_the_same_distribution_fire_at_the_stated_rate() {
        const REPEATS: usize = 500;
        let significance = Significance { alpha: 0.05, permutations: 119 };
        let fired = |repeat: usize| {
            let seed = 2 * repeat as u64;
            let checks = compared(&rows(45, 1000 + seed), &rows(60, 1001 + seed), significance);
            checks.iter().any(|check| check.is_anomaly)
        };
        let num_fired = (0..REPEATS).filter(|repeat| fired(*repeat)).count();
        // Of 500 draws with chance 0.05, the central 99 % of the binomial distribution are 13 to 38.
        assert!((13..=38).contains(&num_fired), "{num_fired} of {REPEATS}");
    }

    #[test]
    fn values_with_many_ties_and_gaps_fire_no_more_often() {
        const REPEATS: usize = 200;
        let significance = Significance { alpha: 0.05, permutations: 119 };
        let rough = |count, seed| -> Vec<Row> {
            let mut rows = rows(count, seed);
            for (numbers, vector) in &mut rows {
                numbers[0] = numbers[0].map(f64::round).filter(|number| !(0.5..1.5).contains(number));
                numbers[1] = numbers[1].map(|number| (5.0 * number).round());
                for element in vector {
                    *element = element.round();
                }
            }
            rows
        };
        let fired = |repeat: usize| {
            let seed = 2 * repeat as u64;
            let checks = compared(&rough(90, 5000 + seed), &rough(60, 5001 + seed), significance);
            checks.iter().any(|check| check.is_anomaly)
        };
        let num_fired = (0..REPEATS).filter(|repeat| fired(*repeat)).count();
        // 99.5 % of the binomial distribution with chance 0.05 are at or below 19.
        assert!(num_fired <= 19, "{num_fired} of {REPEATS}");
    }

    #[test]
    fn a_shift_is_found_where_it_is() {
        let mut shifted = rows(300, 2);
        for (numbers, _) in &mut shifted {
            numbers[1] = numbers[1].map(|brightness| brightness * 1.08);
        }
        let found = compared(&rows(500, 1), &shifted, Significance::default());
        assert!(drifted(&found).contains(&("brightness", Metric::Location)), "{found:#?}");
        assert!(drifted(&found).iter().all(|(input, _)| *input == "brightness"), "{found:#?}");
    }

    #[test]
    fn a_new_class_in_one_row_of_twenty_is_found_in_the_tail_and_not_by_location() {
        let mut mixed = rows(400, 4);
        for (numbers, _) in mixed.iter_mut().step_by(20) {
            numbers[0] = numbers[0].map(|score| score + 12.0);
        }
        let found = compared(&rows(500, 3), &mixed, Significance::default());
        assert_eq!(drifted(&found), [("score", Metric::UpperTail)], "{found:#?}");
        let darker: Vec<Row> = rows(400, 4)
            .into_iter()
            .enumerate()
            .map(|(row, (numbers, vector))| (if row % 20 == 0 { vec![numbers[0], Some(0.0)] } else { numbers }, vector))
            .collect();
        let found = compared(&rows(500, 3), &darker, Significance::default());
        assert_eq!(drifted(&found), [("brightness", Metric::LowerTail)], "{found:#?}");
    }

    #[test]
    fn vectors_that_moved_or_spread_are_found_where_no_number_changes() {
        for change in [|element: f32| element + 0.4, |element: f32| element * 1.6] {
            let changed: Vec<Row> = rows(300, 6)
                .into_iter()
                .map(|(numbers, vector)| (numbers, vector.into_iter().map(change).collect()))
                .collect();
            let found = compared(&rows(400, 5), &changed, Significance::default());
            assert_eq!(drifted(&found), [(EMBEDDING, Metric::Energy)], "{found:#?}");
        }
    }

    #[test]
    fn the_order_of_rows_and_the_number_of_threads_change_no_bit() {
        let (reference, partition) = (rows(MAX_ROWS + 100, 7), rows(MAX_VECTORS + 100, 8));
        let backwards = |side: &str, rows: &[Row]| {
            let mut sample = Side::default();
            for (number, (numbers, vector)) in rows.iter().enumerate().rev() {
                sample.push(&format!("{side} {number}"), numbers, vector);
            }
            sample
        };
        let significance = Significance { alpha: 0.05, permutations: 19 };
        let forwards = compared(&reference, &partition, significance);
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (reference, partition) = (backwards("reference", &reference), backwards("partition", &partition));
        assert_eq!((reference.num_rows(), partition.num_rows()), (MAX_ROWS, MAX_VECTORS + 100));
        assert_eq!(one_thread.install(|| compare(&reference, &partition, &INPUTS, significance)), forwards);
    }

    #[test]
    fn constant_inputs_have_no_effect_and_no_drift() {
        let constant: Vec<Row> = vec![(vec![Some(1.0), Some(0.5)], vec![2.0; 5]); 100];
        let found = compared(&constant, &constant[..50], Significance::default());
        assert_eq!(found.len(), 6);
        for check in found {
            assert_eq!((check.value, check.p_value, check.is_anomaly), (Some(0.0), Some(1.0), false), "{check:?}");
        }
    }

    #[test]
    fn few_rows_few_permutations_and_missing_numbers_give_no_verdict() {
        let shifted = |count| -> Vec<Row> {
            let moved = |(_, vector): Row| (vec![Some(99.0), Some(9.0)], vector.iter().map(|x| x + 9.0).collect());
            rows(count, 10).into_iter().map(moved).collect()
        };
        let reference = rows(100, 9);
        let verdicts = |checks: &[Check]| checks.iter().filter(|check| check.p_value.is_some()).count();
        let significance = Significance::default();
        let few = compared(&reference, &shifted(MIN_ROWS - 1), significance);
        assert_eq!((verdicts(&few), few[0].value), (0, Some(1.0)));
        assert!(drifted(&few).is_empty());
        let enough = compared(&reference, &shifted(MIN_ROWS), significance);
        assert_eq!((verdicts(&enough), enough[0].p_value), (6, Some(0.001)));
        assert_eq!(drifted(&enough).len(), 5, "all but the lower tail of the brightness: {enough:#?}");
        let coarse = compared(&reference, &shifted(100), Significance { permutations: 98, ..significance });
        assert_eq!(verdicts(&coarse), 0);

        let mut gaps = shifted(100);
        gaps.iter_mut().skip(MIN_ROWS - 1).for_each(|(numbers, _)| numbers[0] = Some(f64::NAN));
        let gaps = compared(&reference, &gaps, significance);
        assert_eq!((gaps[0].num_rows, gaps[0].p_value), (MIN_ROWS - 1, None));
        assert_eq!(verdicts(&gaps), 4);
        let none = compared(&reference, &[], significance);
        assert!(none.iter().all(|check| (check.value, check.p_value, check.num_rows) == (None, None, 0)), "{none:#?}");
    }

    #[test]
    fn effects_are_those_computed_by_hand() {
        // Reference 1, 2, 3, 4; partition 2, 5, 5.
        let numbers = [1.0, 2.0, 3.0, 4.0, 2.0, 5.0, 5.0].map(Some);
        let labels = [false, false, false, false, true, true, true];
        let ranked = Ranked::new(&numbers);
        // Of 12 pairs, 9 have the partition above, 2 below, and 1 is a tie.
        assert!((ranked.cliffs_delta(&labels, 4, 3) - 7.0 / 12.0).abs() < 1e-15);
        // 1 % of four rows is none; two of three lie above all, and none below.
        assert!((ranked.tail_excess(ranked.ties.iter().rev(), &labels, 4, 3) - 2.0 / 3.0).abs() < 1e-15);
        assert!(ranked.tail_excess(ranked.ties.iter(), &labels, 4, 3).abs() < 1e-15);
        // Reference 0, 2; partition 5, 9: A = (5 + 9 + 3 + 7) / 4, B = 2, C = 4.
        let vectors: [&[f32]; 4] = [&[0.0], &[2.0], &[5.0], &[9.0]];
        let found = Distances::new(&vectors).energy_coefficient(&[false, false, true, true]);
        assert!((found - (12.0 - 2.0 - 4.0) / 12.0).abs() < 1e-15, "{found}");
        assert!((euclidean(&[1.0; 9], &[3.0; 9]) - 6.0).abs() < 1e-15);
    }
}
