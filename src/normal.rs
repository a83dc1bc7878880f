//! What is normal: the scores that take a reference, learned from its rows.
//!
//! Scores of [`crate::score`] look at one image and its reconstruction. Those here ask how the image lies among others that are
//! known to be normal:
//!
//! | rule | score of an image |
//! |---|---|
//! | `complexity_adjusted_error` | its `top_1pct_squared_error`, divided by what images of its complexity have: `exp(a + b ln c)`, where a and b are the least-squares line through the logarithms of error and complexity c in the reference. 1 is as usual. A flat, dark or blank image has little to reconstruct; compared with all, its error looks normal for nothing (compare J. Serrà et al., "Input complexity and out-of-distribution detection", 2020). Where c lies outside of the complexities of the reference, by a factor f, the line is not continued, and the score is f times that at its end: nothing normal is so flat, or so noisy |
//! | `mahalanobis_distance` | `sqrt((x - m)ᵀ Σ⁻¹ (x - m))` of the embedding x from the mean m, with the covariance Σ shrunk toward a multiple of the identity by the amount that O. Ledoit and M. Wolf give ("A well-conditioned estimator for large-dimensional covariance matrices", 2004), so that it can be inverted also where there are fewer images than dimensions. Where an embedding has regions, the largest of the distances of its regions, each with a mean and a covariance of its own (T. Defard et al., "`PaDiM`", 2021) |
//! | `knn_distance` | the distance to the k-th nearest embedding of the reference, by default the nearest (S. Ramaswamy, R. Rastogi and K. Shim, "Efficient algorithms for mining outliers from large data sets", 2000) |
//! | `fused` | the mean of the three, as far as there are such scores, each as `max(-3, (ln s - mean) / deviation)` with mean and standard deviation of ln s in the reference: how many deviations the image lies above the usual, on average over independent views |
//!
//! # Rows of the reference themselves
//! The mean, the covariance and the nearest neighbors of a row must not know the row, or it looks more normal than a new one.
//! So rows of the reference are scored as if they were not in it:
//!
//! - Leaving row i out of n takes `S₋ᵢ = n/(n-1) S - n/(n-1)² d dᵀ` for the covariance and `n/(n-1) d` for `x - m`, where d is its
//!   distance from the mean of all. With `A = (1-ρ) n/(n-1) S + ρ t I`, `q = dᵀ A⁻¹ d` and `c = (1-ρ) n/(n-1)²`, the formula of J.
//!   Sherman and W. J. Morrison (1950) gives the squared distance `(n/(n-1))² q / (1 - c q)`. The amount of shrinkage ρ and the scale t stay
//!   those of all rows.
//! - A neighbor is another row. Distances so found are at least those that the row would have among the others and a new image, so
//!   p-values made of them are on the safe side.
//! - The least and the most complex row have the next one as the end of the line.
//!
//! The line of the complexities has two parameters and the scales of the fusion two a view; what a row adds to these is left in.
//!
//! # Exact to the last bit
//! A row's scores depend on the row and the reference alone. Sums run in one order in `f64`, whatever rows come with it and however many
//! threads there are; neighbors come from [`crate::neighbors::exact`].

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use ndarray::ArrayView2;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::neighbors::exact::{JoinError, Metric, QueryJoin};
use crate::score::Rule;

/// A view counts for the fusion at least this much, in deviations: that an image lies right beside one of the reference makes it
/// normal in that view, and says nothing of the others.
const LEAST_DEVIATIONS: f64 = -3.0;

/// Scores below this have no logarithm of use: it is far below the rounding of `f32`.
const LEAST_SCORE: f64 = 1e-12;

/// Deviations of the logarithm below this are rounding.
const LEAST_DEVIATION: f64 = 1e-9;

/// The distance to a neighbor under [`Metric::Cosine`] for an image whose embedding has no direction: as far as there is.
const COSINE_MAX: f64 = 2.0;

/// Rows whose neighbors are searched at a time.
const QUERY_ROWS: usize = 4096;

/// Accumulators of a sum of products: independent, so that they are computed side by side.
const LANES: usize = 8;

/// Rows that go through a matrix together: it is read from memory once for all of them, where they lie in a cache.
const ROWS_TOGETHER: usize = 16;

/// How embeddings are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Space {
    /// Parts of an embedding, of equal length.
    pub regions: usize,
    /// Distance to neighbors.
    pub metric: Metric,
    /// Which neighbor's distance counts; 1 = the nearest.
    pub k: usize,
}

/// What is known of an image before it is compared with others.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// `top_1pct_squared_error`, where there is a reconstruction.
    pub error: Option<f64>,
    /// `complexity`.
    pub complexity: Option<f64>,
    /// The vector; `None` where the reference did not keep it.
    pub embedding: Option<&'a [f32]>,
}

/// The scores that take a reference.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Compared {
    /// Error over the error expected of its complexity.
    pub complexity_adjusted_error: Option<f64>,
    /// Distance from the mean, in standard deviations of the direction.
    pub mahalanobis_distance: Option<f64>,
    /// Distance to a neighbor, in units of the metric.
    pub knn_distance: Option<f64>,
    /// Mean of the standardized logarithms of the others.
    pub fused: Option<f64>,
}

impl Compared {
    /// The score of a rule.
    pub fn get(&self, rule: Rule) -> Option<f64> {
        match rule {
            Rule::ComplexityAdjustedError => self.complexity_adjusted_error,
            Rule::MahalanobisDistance => self.mahalanobis_distance,
            Rule::KnnDistance => self.knn_distance,
            Rule::Fused => self.fused,
            _ => None,
        }
    }

    fn views(&self) -> [Option<f64>; 3] {
        [self.complexity_adjusted_error, self.mahalanobis_distance, self.knn_distance]
    }
}

/// What was learned from the rows of a reference.
#[derive(Debug)]
pub struct Normal {
    space: Space,
    line: Option<Line>,
    gaussians: Vec<Gaussian>,
    /// The embeddings of the reference, one after the other.
    bank: Vec<f32>,
    dim: usize,
    scales: [Option<Scale>; 3],
}

impl Normal {
    /// Learns from all `rows` that have an embedding what embeddings are like; and from those of them that `is_counted` says what scores are
    /// like, for the model may have learned from the others. Returns the scores of all rows too, as if each were not among them.
    pub fn learn(
        rows: &[Known<'_>],
        is_counted: impl Fn(usize) -> bool,
        space: Space,
    ) -> Result<(Self, Vec<Compared>), JoinError> {
        let with_vector: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].embedding.is_some()).collect();
        let dim = rows.iter().find_map(|row| row.embedding).map_or(0, <[f32]>::len);
        let bank: Vec<f32> = rows.iter().filter_map(|row| row.embedding).flatten().copied().collect();
        let counted = (0..rows.len()).filter(|row| is_counted(*row)).map(|row| rows[row]);
        let line = Line::fit(counted.filter_map(|row| Some((row.complexity?, row.error?))));
        let width = dim.checked_div(space.regions).unwrap_or_default();
        let learned: Vec<(Gaussian, Vec<f64>)> = (0..space.regions)
            .into_par_iter()
            .filter_map(|region| Gaussian::learn(&bank, dim, region * width..(region + 1) * width))
            .collect();
        let (gaussians, left_out): (Vec<_>, Vec<_>) = learned.into_iter().unzip();
        let mut normal = Self { space, line, gaussians, bank, dim, scales: [None; 3] };

        let vectors: Vec<&[f32]> = with_vector.iter().filter_map(|row| rows[*row].embedding).collect();
        let own: Vec<Option<u32>> = (0..).map(Some).take(vectors.len()).collect();
        let distances = normal.knn_distances(&vectors, &own)?;
        let mut compared: Vec<Compared> = rows
            .iter()
            .map(|row| Compared { complexity_adjusted_error: normal.adjust(row, true), ..Compared::default() })
            .collect();
        for (place, row) in with_vector.into_iter().enumerate() {
            let largest = left_out.iter().map(|distances| distances[place]).reduce(f64::max);
            compared[row].mahalanobis_distance = largest;
            compared[row].knn_distance = distances[place];
        }
        for (view, scale) in normal.scales.iter_mut().enumerate() {
            let counted = compared.iter().enumerate().filter(|(row, _)| is_counted(*row));
            *scale = Scale::of(counted.filter_map(|(_, compared)| compared.views()[view]));
        }
        for row in &mut compared {
            row.fused = normal.fuse(row);
        }
        Ok((normal, compared))
    }

    /// The scores of images. `own_rows` are the places in the bank of those that are rows of the reference, by the order of the rows
    /// with an embedding that were learned from.
    pub fn compare(&self, rows: &[Known<'_>], own_rows: &[Option<u32>]) -> Result<Vec<Compared>, JoinError> {
        let mut compared = Vec::with_capacity(rows.len());
        for (rows, own_rows) in rows.chunks(QUERY_ROWS).zip(own_rows.chunks(QUERY_ROWS)) {
            let vectors: Vec<&[f32]> = rows.iter().map(|row| row.embedding.unwrap_or_default()).collect();
            let distances = self.knn_distances(&vectors, own_rows)?;
            let has_vector = |row: &Known<'_>| row.embedding.is_some_and(|embedding| embedding.len() == self.dim);
            let comparable: Vec<&[f32]> =
                rows.iter().filter(|row| has_vector(row)).filter_map(|row| row.embedding).collect();
            let of_regions: Vec<Vec<f64>> =
                self.gaussians.iter().map(|gaussian| gaussian.distances(&comparable)).collect();
            let mut largest =
                (0..comparable.len()).map(|place| of_regions.iter().map(|distances| distances[place]).reduce(f64::max));
            compared.extend(rows.iter().zip(distances).map(|(row, knn_distance)| {
                let mut compared = Compared {
                    complexity_adjusted_error: self.adjust(row, false),
                    mahalanobis_distance: if has_vector(row) { largest.next().flatten() } else { None },
                    knn_distance,
                    fused: None,
                };
                compared.fused = self.fuse(&compared);
                compared
            }));
        }
        Ok(compared)
    }

    /// Length of the embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    fn adjust(&self, row: &Known<'_>, is_own: bool) -> Option<f64> {
        let complexity = logarithm(row.complexity?);
        let (on_line, outside) = self.line.as_ref()?.at(complexity, is_own);
        Some((logarithm(row.error?) - on_line + outside).exp())
    }

    /// The mean of the views, which every row of the reference must have: another number of views is another scale.
    fn fuse(&self, compared: &Compared) -> Option<f64> {
        let mut sum = 0.0;
        let mut count = 0;
        for (scale, score) in self.scales.iter().zip(compared.views()) {
            let Some(scale) = scale else { continue };
            sum += scale.deviations(score?).max(LEAST_DEVIATIONS);
            count += 1;
        }
        (count > 0).then(|| sum / f64::from(count))
    }

    fn knn_distances(&self, vectors: &[&[f32]], own_rows: &[Option<u32>]) -> Result<Vec<Option<f64>>, JoinError> {
        let num_rows = self.bank.len().checked_div(self.dim).unwrap_or_default();
        let flat: Vec<f32> = vectors.iter().copied().flatten().copied().collect();
        // Rows without an embedding of this length have no neighbors; they are not compared at all.
        let (Ok(queries), Ok(bank)) = (
            ArrayView2::from_shape((vectors.len(), self.dim), &flat),
            ArrayView2::from_shape((num_rows, self.dim), &self.bank),
        ) else {
            return Ok(vec![None; vectors.len()]);
        };
        let numbers: Vec<u32> = (0..).take(num_rows).collect();
        let mut join = QueryJoin::excluding(&queries, self.space.metric, self.space.k, own_rows)?;
        join.push(&bank, &numbers)?;
        let no_direction = (self.space.metric == Metric::Cosine && num_rows > 0).then_some(COSINE_MAX);
        let farthest =
            |list: &[crate::neighbors::topk::Neighbor]| list.last().map(|neighbor| f64::from(neighbor.distance));
        Ok(join.finish().iter().map(|list| farthest(list).or(no_direction)).collect())
    }
}

/// The line through the logarithms of complexity and error.
#[derive(Debug, Clone, Copy)]
struct Line {
    intercept: f64,
    slope: f64,
    /// Logarithms of the two smallest complexities, ascending, and of the two largest, descending.
    least: [f64; 2],
    most: [f64; 2],
}

impl Line {
    fn fit(points: impl Iterator<Item = (f64, f64)>) -> Option<Self> {
        let points: Vec<(f64, f64)> = points.map(|(x, y)| (logarithm(x), logarithm(y))).collect();
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
        let (mut xx, mut xy) = (0.0, 0.0);
        for (x, y) in &points {
            xx += (x - x_mean) * (x - x_mean);
            xy += (x - x_mean) * (y - y_mean);
        }
        // Where all images are equally complex, there is nothing to adjust for.
        let slope = if xx > LEAST_DEVIATION { xy / xx } else { 0.0 };
        let mut ordered: Vec<f64> = points.iter().map(|point| point.0).collect();
        ordered.sort_unstable_by(f64::total_cmp);
        let (first, last) = (*ordered.first()?, *ordered.last()?);
        let second =
            |place: Option<usize>, end: f64| place.and_then(|place| ordered.get(place)).copied().unwrap_or(end);
        Some(Self {
            intercept: y_mean - slope * x_mean,
            slope,
            least: [first, second(Some(1), first)],
            most: [last, second(ordered.len().checked_sub(2), last)],
        })
    }

    /// The logarithm of the error expected at the logarithm of a complexity, and how far that is outside of the line. Of an end that is
    /// the row's own, nothing is known.
    fn at(&self, complexity: f64, is_own: bool) -> (f64, f64) {
        let end = |ends: [f64; 2]| if is_own && complexity.total_cmp(&ends[0]).is_eq() { ends[1] } else { ends[0] };
        let within = complexity.max(end(self.least)).min(end(self.most).max(end(self.least)));
        (self.intercept + self.slope * within, (complexity - within).abs())
    }
}

/// Mean and standard deviation of the logarithms of a score.
#[derive(Debug, Clone, Copy)]
struct Scale {
    mean: f64,
    deviation: f64,
}

impl Scale {
    fn of(scores: impl Iterator<Item = f64>) -> Option<Self> {
        let logarithms: Vec<f64> = scores.map(logarithm).collect();
        let count = logarithms.len() as f64;
        let mean = logarithms.iter().sum::<f64>() / count;
        let variance = logarithms.iter().map(|value| (value - mean) * (value - mean)).sum::<f64>() / count;
        (!logarithms.is_empty()).then(|| Self { mean, deviation: variance.sqrt().max(LEAST_DEVIATION) })
    }

    fn deviations(&self, score: f64) -> f64 {
        (logarithm(score) - self.mean) / self.deviation
    }
}

fn logarithm(score: f64) -> f64 {
    score.max(LEAST_SCORE).ln()
}

/// Mean and covariance of a part of the embeddings.
#[derive(Debug)]
struct Gaussian {
    columns: std::ops::Range<usize>,
    mean: Vec<f64>,
    whitening: Whitening,
}

impl Gaussian {
    /// Learns from the `columns` of a bank of rows of length `dim`. Returns the distances of the rows too, each as if it were not among
    /// them. `None` where all rows are equal, or there are fewer than three.
    fn learn(bank: &[f32], dim: usize, columns: std::ops::Range<usize>) -> Option<(Self, Vec<f64>)> {
        let width = columns.len();
        if width == 0 || bank.len() < 3 * dim {
            return None;
        }
        let count = bank.len() / dim;
        let part = |row: &'_ [f32]| row[columns.clone()].iter().copied().map(f64::from).collect::<Vec<f64>>();
        let mut mean = vec![0.0; width];
        for row in bank.chunks_exact(dim) {
            mean.iter_mut().zip(part(row)).for_each(|(mean, value)| *mean += value);
        }
        for mean in &mut mean {
            *mean /= count as f64;
        }
        let mut centered = Vec::with_capacity(count * width);
        for row in bank.chunks_exact(dim) {
            centered.extend(part(row).iter().zip(&mean).map(|(value, mean)| value - mean));
        }
        let covariance = Shrunk::estimate(&centered, width)?;
        let n = count as f64;
        let leaving_out = n / (n - 1.0);
        let whitening = Whitening::of(&covariance.mixed(1.0), width)?;
        let without = Whitening::of(&covariance.mixed(leaving_out), width)?;
        let c = (1.0 - covariance.shrinkage) * leaving_out / (n - 1.0);
        let left_out = without
            .squared_lengths(&centered)
            .into_iter()
            .map(|q| {
                // Of rows that no other explains, 1 - c q comes near zero, and rounding may pass it.
                leaving_out * (q / (1.0 - c * q).max(f64::EPSILON)).sqrt()
            })
            .collect();
        Some((Self { columns, mean, whitening }, left_out))
    }

    fn distances(&self, embeddings: &[&[f32]]) -> Vec<f64> {
        let mut centered = Vec::with_capacity(embeddings.len() * self.mean.len());
        for embedding in embeddings {
            let part = embedding[self.columns.clone()].iter().zip(&self.mean);
            centered.extend(part.map(|(value, mean)| f64::from(*value) - mean));
        }
        self.whitening.squared_lengths(&centered).into_iter().map(f64::sqrt).collect()
    }
}

/// A covariance with what it is shrunk by.
struct Shrunk {
    /// Divided by the number of rows; row-major.
    sample: Vec<f64>,
    width: usize,
    shrinkage: f64,
    /// The mean of the variances.
    scale: f64,
}

impl Shrunk {
    /// Ledoit and Wolf's estimate, in the form that scikit-learn has it.
    fn estimate(centered: &[f64], width: usize) -> Option<Self> {
        let count = centered.len() / width;
        let (n, p) = (count as f64, width as f64);
        let rows = MatRef::from_row_major_slice(centered, count, width);
        let mut product = Mat::<f64>::zeros(width, width);
        // One thread: the order of the sums must not depend on how many there are.
        matmul(product.as_mut(), Accum::Replace, rows.transpose(), rows, 1.0 / n, Par::Seq);
        let sample: Vec<f64> = (0..width * width).map(|place| product[(place / width, place % width)]).collect();
        let scale = (0..width).map(|place| sample[place * width + place]).sum::<f64>() / p;
        let fourth: f64 = centered
            .chunks_exact(width)
            .map(|row| row.iter().map(|value| value * value).sum::<f64>())
            .map(|length| length * length)
            .sum();
        let squares: f64 = sample.iter().map(|value| value * value).sum();
        let delta = (squares - p * scale * scale) / p;
        let beta = ((fourth / n - squares) / (n * p)).min(delta);
        let shrinkage = if beta > 0.0 && delta > 0.0 { beta / delta } else { 0.0 };
        (scale > 0.0).then_some(Self { sample, width, shrinkage, scale })
    }

    /// The shrunk covariance, where the sample covariance counts `factor` times.
    fn mixed(&self, factor: f64) -> Vec<f64> {
        let diagonal = self.shrinkage * self.scale;
        let value = |place: usize| {
            let on_diagonal = if place / self.width == place % self.width { diagonal } else { 0.0 };
            (1.0 - self.shrinkage) * factor * self.sample[place] + on_diagonal
        };
        (0..self.sample.len()).map(value).collect()
    }
}

/// The inverse of a Cholesky factor: it makes a covariance the identity.
#[derive(Debug)]
struct Whitening {
    /// Lower triangle, row-major.
    inverse: Vec<f64>,
    width: usize,
}

impl Whitening {
    /// `None` where the matrix is not positive definite.
    fn of(covariance: &[f64], width: usize) -> Option<Self> {
        let mut lower = vec![0.0; width * width];
        for first in (0..width).step_by(ROWS_TOGETHER) {
            let end = width.min(first + ROWS_TOGETHER);
            for column in 0..end {
                for row in first.max(column)..end {
                    let known =
                        dot(&lower[row * width..row * width + column], &lower[column * width..column * width + column]);
                    let rest = covariance[row * width + column] - known;
                    lower[row * width + column] = if row == column {
                        if rest.is_nan() || rest <= 0.0 {
                            return None;
                        }
                        rest.sqrt()
                    } else {
                        rest / lower[column * width + column]
                    };
                }
            }
        }
        // By rows of the transposed inverse, so that sums run along rows: column j of the inverse solves L x = e_j.
        let mut transposed = vec![0.0; width * width];
        transposed.par_chunks_mut(ROWS_TOGETHER * width).enumerate().for_each(|(block, solutions)| {
            let first = block * ROWS_TOGETHER;
            for row in first..width {
                for (column, solution) in (first..=row).zip(solutions.chunks_exact_mut(width)) {
                    let known = dot(&lower[row * width + column..row * width + row], &solution[column..row]);
                    let unit = if row == column { 1.0 } else { 0.0 };
                    solution[row] = (unit - known) / lower[row * width + row];
                }
            }
        });
        let inverse = (0..width * width).map(|place| transposed[(place % width) * width + place / width]).collect();
        Some(Self { inverse, width })
    }

    /// The squared lengths of centered rows, one after the other in `centered`, once they are whitened.
    fn squared_lengths(&self, centered: &[f64]) -> Vec<f64> {
        let mut squared = vec![0.0; centered.len() / self.width];
        let blocks = centered.par_chunks(ROWS_TOGETHER * self.width).zip(squared.par_chunks_mut(ROWS_TOGETHER));
        blocks.for_each(|(centered, squared)| {
            for (row, inverse) in self.inverse.chunks_exact(self.width).enumerate() {
                for (centered, squared) in centered.chunks_exact(self.width).zip(squared.iter_mut()) {
                    let value = dot(&inverse[..=row], &centered[..=row]);
                    *squared += value * value;
                }
            }
        });
        squared
    }
}

/// The sum of products, in one order whatever the processor.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    pulp::Arch::new().dispatch(Dot { a, b })
}

struct Dot<'a> {
    a: &'a [f64],
    b: &'a [f64],
}

impl WithSimd for Dot<'_> {
    type Output = f64;

    #[expect(clippy::inline_always, reason = "compiled for the processor that the dispatch finds")]
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let (a_blocks, a_rest) = self.a.as_chunks::<LANES>();
        let (b_blocks, b_rest) = self.b.as_chunks::<LANES>();
        let mut sums = [0.0; LANES];
        for (a, b) in a_blocks.iter().zip(b_blocks) {
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
        sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    const SPACE: Space = Space { regions: 1, metric: Metric::L2, k: 1 };

    /// Normal rows whose columns depend on each other.
    fn rows(seed: u64, count: usize, dim: usize) -> Vec<Vec<f32>> {
        let mut random = SplitMix64(seed);
        (0..count)
            .map(|_| {
                let mut row = vec![0.0; dim];
                random.fill_normal(&mut row);
                for column in 1..dim {
                    row[column] = 0.5 * row[column - 1] + row[column] * (1.0 + column as f32);
                }
                row
            })
            .collect()
    }

    fn known(rows: &[Vec<f32>]) -> Vec<Known<'_>> {
        rows.iter().map(|row| Known { error: None, complexity: None, embedding: Some(row) }).collect()
    }

    fn learn(rows: &[Vec<f32>], space: Space) -> (Normal, Vec<Compared>) {
        Normal::learn(&known(rows), |_| true, space).unwrap()
    }

    #[test]
    fn a_row_left_out_by_the_formula_is_a_row_left_out_by_hand() {
        let all = rows(1, 40, 6);
        let (_, left_out) = learn(&all, SPACE);
        let flat = |rows: &[Vec<f32>]| rows.iter().flatten().map(|value| f64::from(*value)).collect::<Vec<f64>>();
        let center = |rows: &[f64]| {
            let n = rows.len() as f64 / 6.0;
            let mean: Vec<f64> = (0..6).map(|column| rows.iter().skip(column).step_by(6).sum::<f64>() / n).collect();
            let centered = rows.iter().enumerate().map(|(place, value)| value - mean[place % 6]).collect::<Vec<f64>>();
            (mean, centered)
        };
        let whole = Shrunk::estimate(&center(&flat(&all)).1, 6).unwrap();
        for (row, left_out) in left_out.iter().enumerate() {
            let mut others = all.clone();
            let out = others.remove(row);
            let (mean, centered) = center(&flat(&others));
            let sample = Shrunk::estimate(&centered, 6).unwrap().sample;
            let covariance = Shrunk { sample, width: 6, ..whole };
            let whitening = Whitening::of(&covariance.mixed(1.0), 6).unwrap();
            let distance: Vec<f64> = out.iter().zip(&mean).map(|(value, mean)| f64::from(*value) - mean).collect();
            let expected = whitening.squared_lengths(&distance)[0].sqrt();
            let found = left_out.mahalanobis_distance.unwrap();
            assert!((found - expected).abs() < 1e-9 * expected, "{row}: {found} is not {expected}");
        }
    }

    #[test]
    fn a_neighbor_is_another_row_and_a_row_of_the_reference_scores_the_same_wherever_it_is_met() {
        let all = rows(2, 30, 4);
        let (normal, left_out) = learn(&all, SPACE);
        let own: Vec<Option<u32>> = (0..30).map(Some).collect();
        let met = normal.compare(&known(&all), &own).unwrap();
        for (met, left_out) in met.iter().zip(&left_out) {
            assert_eq!(met.knn_distance, left_out.knn_distance);
            assert!(met.knn_distance.unwrap() > 0.0);
        }
        let as_new = normal.compare(&known(&all), &[None; 30]).unwrap();
        assert!(as_new.iter().all(|row| row.knn_distance == Some(0.0)));
    }

    #[test]
    fn a_distance_of_regions_is_that_of_the_strangest_one() {
        let all = rows(3, 200, 4);
        let (whole, _) = learn(&all, Space { regions: 2, ..SPACE });
        let part = |columns: std::ops::Range<usize>| {
            let rows: Vec<Vec<f32>> = all.iter().map(|row| row[columns.clone()].to_vec()).collect();
            learn(&rows, SPACE).0
        };
        let (left, right) = (part(0..2), part(2..4));
        for row in rows(4, 50, 4) {
            let distance = |normal: &Normal, row: &[f32]| {
                let known = Known { error: None, complexity: None, embedding: Some(row) };
                normal.compare(&[known], &[None]).unwrap()[0].mahalanobis_distance.unwrap()
            };
            let expected = distance(&left, &row[..2]).max(distance(&right, &row[2..]));
            assert!((distance(&whole, &row) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn errors_are_compared_with_those_of_images_as_complex() {
        let points: Vec<(f64, f64)> = (1..=50_u8).map(f64::from).map(|c| (c, 3.0 * c * c)).collect();
        let rows: Vec<Known<'_>> = points
            .iter()
            .map(|(complexity, error)| Known { error: Some(*error), complexity: Some(*complexity), embedding: None })
            .collect();
        let (normal, compared) = Normal::learn(&rows, |_| true, SPACE).unwrap();
        let of_rows: Vec<f64> = compared.iter().map(|row| row.complexity_adjusted_error.unwrap()).collect();
        assert!(of_rows[1..49].iter().all(|found| (found - 1.0).abs() < 1e-9));
        // To the least complex one, the next is the end: a quarter of the error there, and half the complexity.
        assert!((of_rows[0] - 0.25 * 2.0).abs() < 1e-9, "{}", of_rows[0]);
        let adjusted = |error, complexity| {
            let row = Known { error: Some(error), complexity: Some(complexity), embedding: None };
            normal.compare(&[row], &[None]).unwrap()[0].complexity_adjusted_error.unwrap()
        };
        assert!((adjusted(600.0, 10.0) - 2.0).abs() < 1e-9);
        // What is flatter or noisier than all of the reference is strange by as much.
        assert!((adjusted(3.0, 0.5) - 2.0).abs() < 1e-9);
        assert!((adjusted(7_500.0, 100.0) - 2.0).abs() < 1e-9);
        assert!(adjusted(0.001, 0.0) > 1e6);
    }

    #[test]
    fn the_model_may_know_rows_that_teach_and_do_not_count() {
        let mut all = rows(5, 60, 3);
        for row in &mut all[40..] {
            row[0] += 100.0;
        }
        let (_, counted) = Normal::learn(&known(&all), |row| row < 40, SPACE).unwrap();
        let mean = counted[..40].iter().map(|row| row.fused.unwrap()).sum::<f64>() / 40.0;
        assert!(mean.abs() < 0.2, "{mean}");
    }

    #[test]
    fn what_cannot_be_told_is_not_told() {
        let alike = vec![vec![1.0, 2.0]; 10];
        let (normal, left_out) = learn(&alike, SPACE);
        assert_eq!((left_out[0].mahalanobis_distance, left_out[0].knn_distance), (None, Some(0.0)));
        let row = Known { error: Some(1.0), complexity: Some(1.0), embedding: Some(&[3.0, 4.0]) };
        let compared = normal.compare(&[row], &[None]).unwrap()[0];
        assert_eq!(compared.complexity_adjusted_error, None);
        assert!(compared.fused.unwrap() > 1.0, "{compared:?}");
        let (nothing, none) = learn(&[], SPACE);
        assert!(none.is_empty());
        assert_eq!(nothing.compare(&[row], &[None]).unwrap()[0], Compared::default());
        // A vector of zeros has no direction, so it is as far from all others as can be.
        let cosine = Space { metric: Metric::Cosine, ..SPACE };
        let (normal, _) = learn(&rows(6, 10, 2), cosine);
        let zero = Known { embedding: Some(&[0.0, 0.0]), ..row };
        assert_eq!(normal.compare(&[zero], &[None]).unwrap()[0].knn_distance, Some(2.0));
    }
}
