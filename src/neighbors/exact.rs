//! Exact k nearest neighbors: blocked matrix products fused with bounded lists.
//!
//! [`self_join`] finds the neighbors of every row of one matrix among its other rows; [`QueryJoin`] finds those of a
//! few held queries in a corpus that streams by. Neither stores more than one block of products per thread. Both run
//! on the current rayon pool; the result is the same for every pool, block size and split of the corpus. This file
//! does not search approximately and does not know identifiers: a caller that sorts its rows by id gets ties by id.
//!
//! # Which rows take part
//!
//! A row is *unusable* if it holds a NaN or an infinity, if it is zero and the metric is cosine (it has no direction),
//! or if its norm is above 2⁵⁹ and the metric is not cosine (products would leave the range of `f32`). An unusable row
//! has no neighbors and is nobody's neighbor.
//!
//! # Why the result is exact
//!
//! The published distance of a pair is computed in `f64` in one fixed order, so it depends on the two rows alone and is
//! zero for equal rows. Matrix products in `f32` only decide which pairs are worth it. With rows *prepared* as
//! `x = fl32(s·a − m)`, where `s` is the reciprocal norm under cosine and otherwise one, and `m` is the mean of those
//! rows (zero for the inner product), every metric ranks by one *key*:
//!
//! | metric | distance | key |
//! |---|---|---|
//! | cosine | `1 − cos = ½·‖sa·a − sb·b‖²` | `½‖x‖² + ½‖y‖² − x·y` |
//! | l2 | `‖a − b‖` | `½‖x‖² + ½‖y‖² − x·y` |
//! | inner product | `−a·b` | `−x·y` |
//!
//! Subtracting the mean changes no difference of rows, and keeps the rounding small where all rows lie close together
//! far from the origin. Let `u = 2⁻²⁴` and `S = ‖x‖² + ‖y‖²`. A sum of `d` products taken in any order, fused or not,
//! is off by at most `γ·‖x‖‖y‖ ≤ γ·S/2`, where `γ = d·u / (1 − d·u)` (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, 2nd ed., section 3.1). Rounding the prepared rows costs `2uS`; the rounded norms, the sums and
//! comparisons of the scan, and the rounding of the published distance to `f32` cost less than `16uS` together. So the
//! computed key is within `e(x) + e(y)` of the key of the published distance, where
//! `e(x) = (γ/2 + 32u)·‖x‖² + (d + 32)·2⁻¹²⁶`; the last term is for products that underflow.
//! A pair is passed over only if its computed key less that bound is above a proven upper bound of the `k`-th key: the
//! `k`-th smallest of the computed keys of any pairs, each with its bound added.
//!
//! # Memory
//!
//! Beside the input: one prepared `f32` copy of it, for each query at most `k` neighbors and `2k + 32` candidates
//! rounded up to a power of two (12 bytes each), and for each thread one block of products (900 KiB). A
//! [`QueryJoin`] prepares its queries as a whole, and 8,192 rows of the corpus at a time.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::ArrayView2;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::topk::{Bounds, Limits, Neighbor, NeighborLists, Pair, Shortlist, ShortlistBlock};

/// Rows in a block of products: so many squared `f32` just fit a core's second-level cache, products of that shape ran at
/// full speed for 128 and 512 dimensions, and they are a multiple of the 96 that the kernel for AVX-512 takes at a time.
pub(super) const BLOCK_ROWS: usize = 480;

/// Fewest queries in a block when there are too few to give every thread a block of [`BLOCK_ROWS`].
const MIN_BLOCK_ROWS: usize = 64;

/// Rows of a corpus that are prepared at a time: enough to keep all threads busy between two waits for each other.
const PART_ROWS: usize = 8192;

/// Largest squared norm of a row under the metrics that do not normalize. Centered, it at most quadruples, which
/// leaves sums and differences of a few keys far from the largest `f32`.
const MAX_SQUARED_NORM: f64 = (1_u128 << 118) as f64;

/// How far apart two rows are. Smaller is nearer for every metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Metric {
    /// One minus the cosine of the angle, in `[0, 2]`.
    Cosine,
    /// Euclidean distance (not squared).
    L2,
    /// The negated inner product.
    InnerProduct,
}

impl Metric {
    /// The word for it in settings and footers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::L2 => "l2",
            Self::InnerProduct => "inner_product",
        }
    }

    /// The distance of two rows, each times its scale, in a fixed order of operations.
    fn distance(self, a: &[f32], a_scale: f64, b: &[f32], b_scale: f64) -> f32 {
        let distance = match self {
            Self::Cosine => (0.5 * squared_difference(a, a_scale, b, b_scale)).min(2.0),
            Self::L2 => squared_difference(a, a_scale, b, b_scale).sqrt(),
            // Not the negation, which would publish -0.
            Self::InnerProduct => 0.0 - dot(a, b),
        };
        round_to_f32(distance)
    }

    /// The quantity the products approximate, of a published distance.
    pub(super) fn key(self, distance: f32) -> f32 {
        match self {
            Self::L2 => 0.5 * distance * distance,
            Self::Cosine | Self::InnerProduct => distance,
        }
    }

    /// No pair is nearer than this.
    pub(super) fn least_distance(self) -> f32 {
        match self {
            Self::Cosine | Self::L2 => 0.0,
            Self::InnerProduct => f32::NEG_INFINITY,
        }
    }
}

/// Why a join could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Neighbors name rows by 32-bit numbers.
    #[error("cannot number {num_rows} rows: a neighbor's row has 32 bits; split the corpus by partition")]
    TooManyRows {
        /// Rows of the corpus so far, with those just given.
        num_rows: usize,
    },
    /// Queries and corpus come from different latent spaces.
    #[error(
        "cannot compare queries of {queries} dimensions with corpus rows of {corpus}; embed both with the same model"
    )]
    DimensionMismatch {
        /// Dimensions of the queries.
        queries: usize,
        /// Dimensions of the block of the corpus.
        corpus: usize,
    },
    /// Not one number for each row of the corpus.
    #[error("cannot name the rows found: {numbers} row numbers for {rows} rows; give one for each row")]
    RowNumbersMismatch {
        /// Numbers given.
        numbers: usize,
        /// Rows of the block of the corpus.
        rows: usize,
    },
    /// Not one own row for each query.
    #[error(
        "cannot exclude the queries themselves: {own_rows} own rows for {queries} queries; give one for each query"
    )]
    OwnRowsMismatch {
        /// Own rows given.
        own_rows: usize,
        /// Queries of the join.
        queries: usize,
    },
    /// Not one list found before for each query.
    #[error("cannot continue {found} lists for {queries} queries; give one for each query")]
    FoundMismatch {
        /// Lists given.
        found: usize,
        /// Queries of the join.
        queries: usize,
    },
    /// The lists found before were cut too short.
    #[error("cannot continue lists of {found} neighbors to {k}; search the whole corpus anew")]
    FoundTooFew {
        /// Neighbors a list was cut to.
        found: usize,
        /// Neighbors asked for.
        k: usize,
    },
    /// Not one list of cells for each query.
    #[error("cannot search the cells: {probes} lists of cells for {queries} queries; give one for each query")]
    ProbesMismatch {
        /// Lists given.
        probes: usize,
        /// Queries of the join.
        queries: usize,
    },
}

/// Bytes that a join holds for one query of `dim` values: the vector, the prepared copy of it, and a list at its longest.
pub fn bytes_per_query(dim: usize, k: usize) -> usize {
    2 * dim * size_of::<f32>() + Shortlist::max_bytes(k) + size_of::<f32>() + size_of::<f64>()
}

/// Finds the `k` nearest other rows of every row of `vectors` (`num_rows` x `dim`).
///
/// Every pair of blocks is multiplied once and serves the rows of both, so this takes half the products of a
/// [`QueryJoin`] of the matrix with itself, and gives the same lists.
///
/// # Errors
///
/// [`JoinError::TooManyRows`] for 2³² rows and more.
pub fn self_join(vectors: &ArrayView2<'_, f32>, metric: Metric, k: usize) -> Result<NeighborLists, JoinError> {
    self_join_in_blocks(vectors, metric, k, BLOCK_ROWS, &|_, _| {})
}

/// [`self_join`], which tells how many of all pairs of blocks are done each time that one is.
///
/// # Errors
///
/// Those of [`self_join`].
pub fn self_join_telling(
    vectors: &ArrayView2<'_, f32>,
    metric: Metric,
    k: usize,
    tell: &(impl Fn(usize, usize) + Sync),
) -> Result<NeighborLists, JoinError> {
    self_join_in_blocks(vectors, metric, k, BLOCK_ROWS, tell)
}

fn self_join_in_blocks(
    vectors: &ArrayView2<'_, f32>,
    metric: Metric,
    k: usize,
    block_rows: usize,
    tell: &(impl Fn(usize, usize) + Sync),
) -> Result<NeighborLists, JoinError> {
    let num_rows = vectors.nrows();
    let numbers: Vec<u32> = (0..check_num_rows(num_rows)?).collect();
    let vectors = Scaled::new(vectors, metric);
    let rows = Prepared::new(&vectors, 0..num_rows, &vectors.center());
    let corpus = Corpus { vectors: &vectors, numbers: &numbers };
    let neighbor = |query: usize, position: u32| corpus.neighbor(&vectors, query, position);

    let limits = Limits::new(k, metric);
    let blocks = blocks_of(0..num_rows, block_rows);
    let lists: Vec<_> = blocks
        .iter()
        .map(|block| {
            let queries = block.clone().map(|row| (rows.bounds[row], Some(numbers[row])));
            Mutex::new(ShortlistBlock::new(limits, block.start, queries))
        })
        .collect();
    let num_partners = blocks.len() / 2;
    let num_done = AtomicUsize::new(0);
    let end_pair = || tell(num_done.fetch_add(1, Ordering::Relaxed) + 1, blocks.len() * (1 + num_partners));
    if k > 0 {
        // The blocks with themselves first: they fill the lists, so that later blocks meet thresholds already low.
        lists.par_iter().zip(&blocks).for_each_init(Vec::new, |products, (lists, block)| {
            rows.multiply(block, &rows, block, products);
            offer_columns(products, &mut lock(lists), &rows, block, &numbers, neighbor);
            end_pair();
        });
        // Each block with the next half of the blocks, around the circle: every pair once, and the same work for every
        // block. Threads far apart on the circle rarely want the same lists, and hold them only while they scan.
        (0..blocks.len() * num_partners).into_par_iter().for_each_init(Vec::new, |products, pair| {
            let first = pair / num_partners;
            let step = pair % num_partners + 1;
            let second = (first + step) % blocks.len();
            // Opposite blocks of an even circle meet from both sides.
            if 2 * step == blocks.len() && second < first {
                return end_pair();
            }
            let (upper, lower) = (first.min(second), first.max(second));
            rows.multiply(&blocks[upper], &rows, &blocks[lower], products);
            // Always the smaller block first, so that no two threads wait for each other.
            let mut upper_lists = lock(&lists[upper]);
            let mut lower_lists = lock(&lists[lower]);
            offer_columns(products, &mut upper_lists, &rows, &blocks[lower], &numbers, neighbor);
            offer_rows(products, &rows, &blocks[upper], &mut lower_lists, &numbers, neighbor);
            end_pair();
        });
        lists.par_iter().for_each(|lists| lock(lists).settle(neighbor));
    }
    Ok(NeighborLists::new(
        k,
        lists.into_iter().flat_map(|lists| lists.into_inner().unwrap_or_else(PoisonError::into_inner).into_lists()),
    ))
}

/// Finds the `k` nearest rows of a corpus for each of a set of queries, the corpus given part by part.
///
/// Holds the queries, their lists and, beside the part that is being compared, 8,192 prepared rows of it.
#[derive(Debug)]
pub struct QueryJoin<'q> {
    queries: Scaled<'q>,
    prepared: Prepared,
    center: Vec<f64>,
    k: usize,
    block_rows: usize,
    blocks: Vec<ShortlistBlock>,
}

impl<'q> QueryJoin<'q> {
    /// Starts a join of `queries` (`num_queries` x `dim`) with a corpus still to come.
    pub fn new(queries: &ArrayView2<'q, f32>, metric: Metric, k: usize) -> Self {
        let own_rows = vec![None; queries.nrows()];
        Self::start(queries, metric, k, &own_rows, BLOCK_ROWS)
    }

    /// Starts a join of queries that are themselves rows of the corpus: query `i` never finds row `own_rows[i]`.
    ///
    /// # Errors
    ///
    /// [`JoinError::OwnRowsMismatch`] unless there is one entry for each query.
    pub fn excluding(
        queries: &ArrayView2<'q, f32>,
        metric: Metric,
        k: usize,
        own_rows: &[Option<u32>],
    ) -> Result<Self, JoinError> {
        check_own_rows(own_rows, queries.nrows())?;
        Ok(Self::start(queries, metric, k, own_rows, BLOCK_ROWS))
    }

    /// Starts a join of queries of which the neighbors in one part of the corpus are known: `found` holds their lists,
    /// as a join with that part gave them. Only the other part is to be pushed; the result is that of the whole.
    ///
    /// # Errors
    ///
    /// [`JoinError::OwnRowsMismatch`] and [`JoinError::FoundMismatch`] unless there is one entry for each query,
    /// [`JoinError::FoundTooFew`] if fewer neighbors than `k` were asked for when the lists were made.
    pub fn continuing(
        queries: &ArrayView2<'q, f32>,
        metric: Metric,
        k: usize,
        own_rows: &[Option<u32>],
        found: &NeighborLists,
    ) -> Result<Self, JoinError> {
        if found.num_queries() != queries.nrows() {
            return Err(JoinError::FoundMismatch { found: found.num_queries(), queries: queries.nrows() });
        }
        if found.k() < k {
            return Err(JoinError::FoundTooFew { found: found.k(), k });
        }
        let join = Self::excluding(queries, metric, k, own_rows)?;
        let mut found = found.iter();
        let blocks = join.blocks.into_iter().map(|block| block.continuing(found.by_ref())).collect();
        Ok(Self { blocks, ..join })
    }

    fn start(
        queries: &ArrayView2<'q, f32>,
        metric: Metric,
        k: usize,
        own_rows: &[Option<u32>],
        block_rows: usize,
    ) -> Self {
        let queries = Scaled::new(queries, metric);
        let center = queries.center();
        let prepared = Prepared::new(&queries, 0..own_rows.len(), &center);
        let limits = Limits::new(k, metric);
        let per_thread = own_rows.len().div_ceil(rayon::current_num_threads());
        let query_rows = per_thread.max(MIN_BLOCK_ROWS).min(block_rows);
        let blocks = blocks_of(0..own_rows.len(), query_rows)
            .into_iter()
            .map(|block| {
                let queries = block.clone().map(|row| (prepared.bounds[row], own_rows[row]));
                ShortlistBlock::new(limits, block.start, queries)
            })
            .collect();
        Self { queries, prepared, center, k, block_rows, blocks }
    }

    /// Compares all queries with a part of the corpus (`num_rows` x `dim`), of which row `i` has the number `rows[i]`.
    /// Parts may be of any size and in any order, the numbers too; each number comes once in all.
    ///
    /// # Errors
    ///
    /// [`JoinError::DimensionMismatch`] if the part has not the dimensions of the queries,
    /// [`JoinError::RowNumbersMismatch`] unless there is one number for each row. The join is unchanged then.
    pub fn push(&mut self, corpus: &ArrayView2<'_, f32>, rows: &[u32]) -> Result<(), JoinError> {
        check_part(self.queries.dim, corpus, rows)?;
        if self.k == 0 || rows.is_empty() {
            return Ok(());
        }
        let vectors = Scaled::new(corpus, self.queries.metric);
        let corpus = Corpus { vectors: &vectors, numbers: rows };
        let (queries, prepared) = (&self.queries, &self.prepared);
        let neighbor = |query: usize, position: u32| corpus.neighbor(queries, query, position);
        for part in blocks_of(0..rows.len(), PART_ROWS) {
            let columns = Prepared::new(&vectors, part, &self.center);
            let column_blocks = blocks_of(0..columns.bounds.len(), self.block_rows);
            self.blocks.par_iter_mut().for_each_init(Vec::new, |products, lists| {
                let query_block = lists.first_query()..lists.first_query() + lists.len();
                for column_block in &column_blocks {
                    prepared.multiply(&query_block, &columns, column_block, products);
                    offer_columns(products, lists, &columns, column_block, rows, neighbor);
                }
            });
        }
        // The vectors of this part are gone when the next one comes.
        self.blocks.par_iter_mut().for_each(|lists| lists.settle(neighbor));
        Ok(())
    }

    /// The neighbors found in all parts together.
    pub fn finish(self) -> NeighborLists {
        NeighborLists::new(self.k, self.blocks.into_iter().flat_map(ShortlistBlock::into_lists))
    }
}

/// Rows to be found, and the numbers by which the lists name them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Corpus<'a> {
    pub(super) vectors: &'a Scaled<'a>,
    pub(super) numbers: &'a [u32],
}

impl Corpus<'_> {
    /// The row at `position` as a neighbor of one of `queries`, at its published distance.
    pub(super) fn neighbor(&self, queries: &Scaled<'_>, query: usize, position: u32) -> Neighbor {
        let position = position as usize;
        Neighbor { row: self.numbers[position], distance: queries.distance(query, self.vectors, position) }
    }
}

/// Rows as they came, and the factor that brings each to the length its metric compares.
#[derive(Debug)]
pub(super) struct Scaled<'a> {
    pub(super) metric: Metric,
    pub(super) dim: usize,
    /// Row-major.
    pub(super) values: Cow<'a, [f32]>,
    /// The reciprocal norm under cosine, otherwise one; zero marks an unusable row.
    pub(super) scales: Vec<f64>,
}

impl<'a> Scaled<'a> {
    pub(super) fn new(vectors: &ArrayView2<'a, f32>, metric: Metric) -> Self {
        let (num_rows, dim) = vectors.dim();
        let values = vectors.to_slice().map_or_else(|| Cow::Owned(vectors.iter().copied().collect()), Cow::Borrowed);
        Self::from_values(values, num_rows, dim, metric)
    }

    pub(super) fn from_values(values: Cow<'a, [f32]>, num_rows: usize, dim: usize, metric: Metric) -> Self {
        let scales = (0..num_rows)
            .into_par_iter()
            .map(|row| {
                let row = row_of(&values, dim, row);
                let squared_norm = dot(row, row);
                match metric {
                    Metric::Cosine if squared_norm.is_finite() && squared_norm > 0.0 => squared_norm.sqrt().recip(),
                    Metric::L2 | Metric::InnerProduct if squared_norm <= MAX_SQUARED_NORM => 1.0,
                    Metric::Cosine | Metric::L2 | Metric::InnerProduct => 0.0,
                }
            })
            .collect();
        Self { metric, dim, values, scales }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        row_of(&self.values, self.dim, row)
    }

    /// Copies of the given rows.
    pub(super) fn gather(&self, rows: &[usize]) -> Scaled<'static> {
        let mut values = Vec::with_capacity(rows.len() * self.dim);
        for row in rows {
            values.extend_from_slice(self.row(*row));
        }
        Scaled {
            metric: self.metric,
            dim: self.dim,
            values: values.into(),
            scales: rows.iter().map(|row| self.scales[*row]).collect(),
        }
    }

    /// The published distance of one of these rows and one of others'.
    pub(super) fn distance(&self, row: usize, others: &Self, other: usize) -> f32 {
        self.metric.distance(self.row(row), self.scales[row], others.row(other), others.scales[other])
    }

    /// What to subtract from every row before the products: the mean of the usable scaled rows, or nothing where the
    /// metric is not one of differences. Any value gives the same neighbors; the mean gives the least rounding.
    pub(super) fn center(&self) -> Vec<f64> {
        let mut center = vec![0.0; self.dim];
        if self.metric == Metric::InnerProduct {
            return center;
        }
        let mut num_usable = 0_usize;
        for (row, &scale) in self.scales.iter().enumerate() {
            if scale > 0.0 {
                num_usable += 1;
                for (sum, &value) in center.iter_mut().zip(self.row(row)) {
                    *sum += f64::from(value) * scale;
                }
            }
        }
        if num_usable > 0 {
            for sum in &mut center {
                *sum /= num_usable as f64;
            }
        }
        center
    }
}

/// Consecutive rows as the products see them: scaled, centered, rounded to `f32`, with their bounds.
#[derive(Debug)]
pub(super) struct Prepared {
    dim: usize,
    /// Which of the rows given is the first one here.
    first_row: usize,
    /// Row-major; an unusable row is zero.
    values: Vec<f32>,
    /// Of each row; an unusable row has an infinite offset, which no threshold lets through.
    pub(super) bounds: Vec<Bounds>,
    /// The offsets of `bounds`, side by side so that a scan can compare many at once.
    offsets: Vec<f32>,
    /// The largest slack of `bounds`.
    max_slack: f32,
}

impl Prepared {
    /// Prepares the given rows of `vectors`.
    pub(super) fn new(vectors: &Scaled<'_>, rows: Range<usize>, center: &[f64]) -> Self {
        let dim = vectors.dim;
        let mut values = vec![0.0; rows.len() * dim];
        values.par_chunks_mut(dim.max(1)).zip(rows.clone()).filter(|(_, row)| vectors.scales[*row] > 0.0).for_each(
            |(prepared, row)| {
                let scale = vectors.scales[row];
                pulp::Arch::new().dispatch(Prepare { row: vectors.row(row), scale, center, prepared });
            },
        );
        let bounds: Vec<_> = rows
            .clone()
            .into_par_iter()
            .map(|row| {
                if vectors.scales[row] > 0.0 {
                    bounds_of(row_of(&values, dim, row - rows.start), vectors.metric)
                } else {
                    Bounds { offset: f32::INFINITY, slack: 0.0 }
                }
            })
            .collect();
        let offsets = bounds.iter().map(|bounds| bounds.offset).collect();
        let max_slack = bounds.iter().map(|bounds| bounds.slack).fold(0.0, f32::max);
        Self { dim, first_row: rows.start, values, bounds, offsets, max_slack }
    }

    /// Copies of the given rows, to be multiplied together.
    pub(super) fn gather(&self, rows: &[u32]) -> Self {
        let rows = || rows.iter().map(|row| *row as usize - self.first_row);
        let mut values = Vec::with_capacity(rows().len() * self.dim);
        for row in rows() {
            values.extend_from_slice(row_of(&self.values, self.dim, row));
        }
        Self {
            dim: self.dim,
            first_row: 0,
            values,
            bounds: rows().map(|row| self.bounds[row]).collect(),
            offsets: rows().map(|row| self.offsets[row]).collect(),
            max_slack: self.max_slack,
        }
    }

    /// Writes the products of all rows of `block` with all rows of `other_block` of `others` to `products`, row-major
    /// with one row for each row of `block`.
    pub(super) fn multiply(
        &self,
        block: &Range<usize>,
        others: &Self,
        other_block: &Range<usize>,
        products: &mut Vec<f32>,
    ) {
        products.resize(block.len() * other_block.len(), 0.0);
        let rows = &self.values[block.start * self.dim..block.end * self.dim];
        let other_rows = &others.values[other_block.start * self.dim..other_block.end * self.dim];
        matmul(
            MatMut::from_row_major_slice_mut(products, block.len(), other_block.len()),
            Accum::Replace,
            MatRef::from_row_major_slice(rows, block.len(), self.dim),
            MatRef::from_row_major_slice(other_rows, other_block.len(), self.dim).transpose(),
            1.0,
            Par::Seq,
        );
    }

    /// Offers the rows of `block` to the list of a query by their `products` with it; `numbers` are those of all that is
    /// being scanned, and `found` is room for as many indices as there are products.
    pub(super) fn offer(
        &self,
        block: &Range<usize>,
        products: &[f32],
        numbers: &[u32],
        (list, limits): (&mut Shortlist, Limits),
        found: &mut [usize],
        neighbor: impl Fn(u32) -> Neighbor,
    ) {
        let arch = pulp::Arch::new();
        let offsets = &self.offsets[block.clone()];
        let mut num_found = arch.dispatch(Reaching { products, offsets, threshold: list.threshold(), found });
        if num_found > limits.capacity {
            list.narrow(limits, self.max_slack, |needed| reached_by(products, offsets, needed));
            num_found = arch.dispatch(Reaching { products, offsets, threshold: list.threshold(), found });
        }
        for &lane in &found[..num_found] {
            let row = block.start + lane;
            let position = row_number(self.first_row + row);
            let pair =
                Pair { row: numbers[position as usize], position, dot: products[lane], bounds: self.bounds[row] };
            list.offer(limits, pair, &neighbor);
        }
    }
}

/// Scales, centers and rounds a row.
struct Prepare<'a> {
    row: &'a [f32],
    scale: f64,
    center: &'a [f64],
    prepared: &'a mut [f32],
}

impl WithSimd for Prepare<'_> {
    type Output = ();

    #[expect(
        clippy::inline_always,
        reason = "only a body inlined into the dispatch is compiled for its instruction set"
    )]
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for ((prepared, &value), &center) in self.prepared.iter_mut().zip(self.row).zip(self.center) {
            *prepared = round_to_f32(f64::from(value) * self.scale - center);
        }
    }
}

/// The share of a prepared row in the interval around a key; the module documentation derives it.
fn bounds_of(row: &[f32], metric: Metric) -> Bounds {
    /// Unit roundoff of `f32`.
    const UNIT: f64 = 1.0 / (1_u32 << 24) as f64;
    /// Roundings of a key beside those of the product, in units of `UNIT`: 18 add up, the rest is margin.
    const OTHER_ROUNDINGS: f64 = 32.0;
    let dim = row.len() as f64;
    let gamma = dim * UNIT / (1.0 - dim * UNIT);
    let squared_norm = dot(row, row);
    let error =
        (0.5 * gamma + OTHER_ROUNDINGS * UNIT) * squared_norm + (dim + OTHER_ROUNDINGS) * f64::from(f32::MIN_POSITIVE);
    let key_share = match metric {
        Metric::Cosine | Metric::L2 => 0.5 * squared_norm,
        Metric::InnerProduct => 0.0,
    };
    Bounds { offset: round_to_f32(key_share - error), slack: round_to_f32(2.0 * error) }
}

/// Offers the rows of `column_block` to the lists of the rows of `products`; `numbers` are those of all that is being
/// scanned.
pub(super) fn offer_columns(
    products: &[f32],
    lists: &mut ShortlistBlock,
    columns: &Prepared,
    column_block: &Range<usize>,
    numbers: &[u32],
    neighbor: impl Fn(usize, u32) -> Neighbor,
) {
    let mut found = vec![0; column_block.len()];
    for (index, products) in products.chunks_exact(column_block.len()).enumerate() {
        let query = lists.first_query() + index;
        lists.change(index, |list, limits| {
            let neighbor = |position| neighbor(query, position);
            columns.offer(column_block, products, numbers, (list, limits), &mut found, neighbor);
        });
    }
}

/// Offers the rows of `row_block` to the lists of the columns of `products`.
fn offer_rows(
    products: &[f32],
    rows: &Prepared,
    row_block: &Range<usize>,
    lists: &mut ShortlistBlock,
    numbers: &[u32],
    neighbor: impl Fn(usize, u32) -> Neighbor,
) {
    let arch = pulp::Arch::new();
    let mut found = vec![0; lists.len()];
    for (row, products) in row_block.clone().zip(products.chunks_exact(lists.len())) {
        let bounds = rows.bounds[row];
        let num_found = arch.dispatch(Reaching {
            products,
            offsets: lists.thresholds(),
            threshold: bounds.offset,
            found: &mut found,
        });
        let position = row_number(rows.first_row + row);
        for &lane in &found[..num_found] {
            let pair = Pair { row: numbers[position as usize], position, dot: products[lane], bounds };
            lists.offer(lane, pair, &neighbor);
        }
    }
}

/// Finds the products of a row that, each less its own offset, reach a threshold; few do. Returns how many.
///
/// An operation of its own because it is compiled for several instruction sets and the processor picks one.
struct Reaching<'a> {
    products: &'a [f32],
    offsets: &'a [f32],
    threshold: f32,
    /// Where the indices of those products go; as long as `products`.
    found: &'a mut [usize],
}

impl WithSimd for Reaching<'_> {
    type Output = usize;

    #[expect(
        clippy::inline_always,
        reason = "only a body inlined into the dispatch is compiled for its instruction set"
    )]
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        let Self { products, offsets, threshold, found } = self;
        let mut num_found = 0;
        // Without a branch on the outcome, which the processor could not predict.
        let mut test_each = |lanes: Range<usize>| {
            for ((lane, product), offset) in lanes.clone().zip(&products[lanes.clone()]).zip(&offsets[lanes]) {
                found[num_found] = lane;
                num_found += usize::from(product - offset >= threshold);
            }
        };
        let (wide_products, _) = S::as_simd_f32s(products);
        let (wide_offsets, _) = S::as_simd_f32s(offsets);
        let wide_threshold = simd.splat_f32s(threshold);
        for (chunk, (&product, &offset)) in wide_products.iter().zip(wide_offsets).enumerate() {
            let difference = simd.sub_f32s(product, offset);
            let reaching = simd.greater_than_or_equal_f32s(difference, wide_threshold);
            if simd.first_true_m32s(reaching) < S::F32_LANES {
                test_each(chunk * S::F32_LANES..(chunk + 1) * S::F32_LANES);
            }
        }
        test_each(wide_products.len() * S::F32_LANES..products.len());
        num_found
    }
}

/// A value that `needed` of the products reach, each less its own offset. Hardly more do, unless `needed` comes near
/// the number of groups by which this is found.
fn reached_by(products: &[f32], offsets: &[f32], needed: usize) -> Option<f32> {
    let mut maxima = [f32::NEG_INFINITY; MAX_GROUPS];
    let num_groups = pulp::Arch::new().dispatch(GroupMaxima { products, offsets, maxima: &mut maxima });
    let maxima = &mut maxima[..num_groups];
    match needed.checked_sub(1)? {
        0 => maxima.iter().copied().reduce(f32::max),
        kth if kth < num_groups => Some(*maxima.select_nth_unstable_by(kth, |a, b| b.total_cmp(a)).1),
        _ => None,
    }
}

/// Room for the largest number of groups of [`GroupMaxima`].
const MAX_GROUPS: usize = 64;

/// Deals the products of a row, each less its own offset, into groups and finds the largest of each. The `n`-th largest
/// of those is reached by `n` products at least. Returns the number of groups; a few products are in none.
struct GroupMaxima<'a> {
    products: &'a [f32],
    offsets: &'a [f32],
    maxima: &'a mut [f32; MAX_GROUPS],
}

impl WithSimd for GroupMaxima<'_> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        /// Each lane of so many registers is a group.
        const REGISTERS: usize = 4;
        let (products, _) = S::as_simd_f32s(self.products);
        let (offsets, _) = S::as_simd_f32s(self.offsets);
        let mut largest = [simd.splat_f32s(f32::NEG_INFINITY); REGISTERS];
        for (products, offsets) in products.as_chunks::<REGISTERS>().0.iter().zip(offsets.as_chunks::<REGISTERS>().0) {
            for (largest, (&product, &offset)) in largest.iter_mut().zip(products.iter().zip(offsets)) {
                *largest = simd.max_f32s(*largest, simd.sub_f32s(product, offset));
            }
        }
        let (maxima, _) = S::as_mut_simd_f32s(self.maxima.as_mut_slice());
        for (maxima, largest) in maxima.iter_mut().zip(largest) {
            *maxima = largest;
        }
        REGISTERS * S::F32_LANES
    }
}

/// Sum of products in `f64`, in an order that depends on the length alone.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    pulp::Arch::new().dispatch(Sum { a, b, term: |a, b| f64::from(a) * f64::from(b) })
}

/// Sum of squared differences of two scaled rows in `f64`, in an order that depends on the length alone.
fn squared_difference(a: &[f32], a_scale: f64, b: &[f32], b_scale: f64) -> f64 {
    let term = |a, b| {
        let difference = f64::from(a) * a_scale - f64::from(b) * b_scale;
        difference * difference
    };
    pulp::Arch::new().dispatch(Sum { a, b, term })
}

/// Sums a term over two rows of equal length in eight interleaved partial sums, which the compiler keeps in registers.
/// Wider registers take more of them at once and add nothing in another order, so every processor finds the same sum.
struct Sum<'a, T> {
    a: &'a [f32],
    b: &'a [f32],
    term: T,
}

impl<T: Fn(f32, f32) -> f64> WithSimd for Sum<'_, T> {
    type Output = f64;

    #[expect(
        clippy::inline_always,
        reason = "only a body inlined into the dispatch is compiled for its instruction set"
    )]
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let (a_chunks, a_rest) = self.a.as_chunks::<8>();
        let (b_chunks, b_rest) = self.b.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += (self.term)(a, b);
            }
        }
        for (sum, (&a, &b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
            *sum += (self.term)(a, b);
        }
        sums.iter().sum()
    }
}

pub(super) fn row_of(values: &[f32], dim: usize, row: usize) -> &[f32] {
    &values[row * dim..(row + 1) * dim]
}

/// Cuts a range into blocks of `block_rows`, the last one shorter.
pub(super) fn blocks_of(rows: Range<usize>, block_rows: usize) -> Vec<Range<usize>> {
    rows.clone().step_by(block_rows).map(|start| start..(start + block_rows).min(rows.end)).collect()
}

/// A panic of another thread is already on its way to the caller of the join; the lists themselves stay whole.
fn lock(lists: &Mutex<ShortlistBlock>) -> std::sync::MutexGuard<'_, ShortlistBlock> {
    lists.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn check_num_rows(num_rows: usize) -> Result<u32, JoinError> {
    u32::try_from(num_rows).map_err(|_| JoinError::TooManyRows { num_rows })
}

pub(super) fn check_own_rows(own_rows: &[Option<u32>], num_queries: usize) -> Result<(), JoinError> {
    if own_rows.len() == num_queries {
        Ok(())
    } else {
        Err(JoinError::OwnRowsMismatch { own_rows: own_rows.len(), queries: num_queries })
    }
}

/// Whether a part of a corpus can be compared with queries of `dim` dimensions.
pub(super) fn check_part(dim: usize, corpus: &ArrayView2<'_, f32>, rows: &[u32]) -> Result<(), JoinError> {
    if corpus.ncols() != dim {
        return Err(JoinError::DimensionMismatch { queries: dim, corpus: corpus.ncols() });
    }
    if rows.len() != corpus.nrows() {
        return Err(JoinError::RowNumbersMismatch { numbers: rows.len(), rows: corpus.nrows() });
    }
    check_num_rows(rows.len()).map(drop)
}

#[expect(clippy::cast_possible_truncation, reason = "every join begins with check_num_rows")]
pub(super) fn row_number(row: usize) -> u32 {
    row as u32
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to the nearest f32 is meant")]
#[inline]
pub(super) fn round_to_f32(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Axis, Slice, concatenate};

    use super::*;
    use crate::neighbors::testing::{METRICS, random};
    use crate::random::SplitMix64;

    /// All distances of all pairs, sorted.
    fn brute_force(vectors: &Array2<f32>, metric: Metric, k: usize) -> Vec<Vec<Neighbor>> {
        let scaled = Scaled::new(&vectors.view(), metric);
        let usable = |row: &usize| scaled.scales[*row] > 0.0;
        (0..vectors.nrows())
            .map(|query| {
                let mut list: Vec<_> = (0..vectors.nrows())
                    .filter(|row| usable(&query) && usable(row) && *row != query)
                    .map(|row| Neighbor { row: row_number(row), distance: scaled.distance(query, &scaled, row) })
                    .collect();
                list.sort_by(|a, b| (a.distance.total_cmp(&b.distance)).then(a.row.cmp(&b.row)));
                list.truncate(k);
                list
            })
            .collect()
    }

    fn lists(found: &NeighborLists) -> Vec<Vec<Neighbor>> {
        found.iter().map(<[Neighbor]>::to_vec).collect()
    }

    fn rows(list: &[Neighbor]) -> Vec<u32> {
        list.iter().map(|neighbor| neighbor.row).collect()
    }

    /// The corpus is the queries, pushed in blocks of `split` rows, the last block first if `backwards`.
    fn query_join(
        vectors: &Array2<f32>,
        metric: Metric,
        k: usize,
        block_rows: usize,
        split: usize,
        backwards: bool,
    ) -> NeighborLists {
        let own_rows: Vec<_> = (0..vectors.nrows()).map(|row| Some(row_number(row))).collect();
        let mut join = QueryJoin::start(&vectors.view(), metric, k, &own_rows, block_rows);
        let mut blocks = blocks_of(0..vectors.nrows(), split);
        if backwards {
            blocks.reverse();
        }
        for block in blocks {
            let corpus = vectors.slice_axis(Axis(0), Slice::from(block.clone()));
            let rows: Vec<_> = block.map(row_number).collect();
            join.push(&corpus, &rows).unwrap();
        }
        join.finish()
    }

    /// Both joins, in every layout, find exactly what brute force finds.
    fn assert_exact(vectors: &Array2<f32>, metric: Metric, k: usize) {
        let expected = brute_force(vectors, metric, k);
        let what = format!("{metric:?} of {:?}, k {k}", vectors.dim());
        for num_threads in [1, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap();
            pool.install(|| {
                for block_rows in [1, 7, 64] {
                    let found = self_join_in_blocks(&vectors.view(), metric, k, block_rows, &|_, _| {}).unwrap();
                    assert_eq!(lists(&found), expected, "{what}, blocks of {block_rows}");
                }
                for (block_rows, split, backwards) in [(64, 1000, false), (7, 50, true), (1, 9, false)] {
                    let found = query_join(vectors, metric, k, block_rows, split, backwards);
                    assert_eq!(lists(&found), expected, "{what}, corpus in blocks of {split}");
                }
            });
        }
    }

    #[test]
    fn joins_of_random_rows_equal_brute_force() {
        for metric in METRICS {
            for num_rows in [0, 1, 2, 3, 64, 65, 300] {
                for (dim, k) in [(1, 1), (5, 3), (33, 10)] {
                    assert_exact(&random(num_rows, dim, 1), metric, k);
                }
            }
            assert_exact(&random(20, 4, 2), metric, 100);
            assert_exact(&random(150, 40, 3), metric, 90);
        }
    }

    #[test]
    fn near_duplicates_are_ranked_by_exact_distance() {
        // Steps of an ulp or so, far from the origin: f32 products of these rows differ by rounding alone.
        let noise = random(300, 24, 4) * 3e-7;
        for metric in METRICS {
            assert_exact(&(&noise + &random(1, 24, 5)), metric, 5);
            assert_exact(&(&noise + 1000.0), metric, 5);
        }
        // The same among others, which keep the mean away from the cluster.
        let mixed = concatenate![Axis(0), &noise + 1.0, random(50, 24, 6), &noise - 3.0];
        for metric in METRICS {
            assert_exact(&mixed, metric, 5);
        }
    }

    #[test]
    fn rows_that_come_nearer_and_nearer_displace_the_earlier_ones() {
        let line = Array2::from_shape_fn((500, 2), |(row, column)| match column {
            0 => 1.0,
            _ => 500.0 - row as f32,
        });
        for metric in METRICS {
            assert_exact(&line, metric, 4);
        }
    }

    #[test]
    fn equal_rows_are_at_distance_zero_and_ordered_by_row() {
        let three = random(3, 50, 7);
        let vectors = Array2::from_shape_fn((450, 50), |(row, column)| three[[row % 3, column]]);
        for metric in METRICS {
            assert_exact(&vectors, metric, 4);
        }
        for metric in [Metric::Cosine, Metric::L2] {
            let found = self_join(&vectors.view(), metric, 4).unwrap();
            assert_eq!(rows(found.get(400).unwrap()), [1, 4, 7, 10]);
            assert_eq!(rows(found.get(4).unwrap()), [1, 7, 10, 13]);
            for neighbor in found.iter().flatten() {
                assert_eq!(neighbor.distance.to_bits(), 0.0_f32.to_bits());
            }
        }
    }

    #[test]
    fn norms_of_very_different_size_do_not_hide_a_neighbor() {
        let mut vectors = random(200, 16, 8);
        for (row, mut values) in vectors.rows_mut().into_iter().enumerate() {
            values *= [1e-30, 1e-6, 1.0, 1e6, 1e12][row % 5];
        }
        for metric in METRICS {
            assert_exact(&vectors, metric, 5);
            assert_exact(&(&vectors * 1e-12), metric, 5);
        }
    }

    #[test]
    fn unusable_rows_have_no_neighbors_and_are_nobodys() {
        let mut vectors = random(100, 6, 9);
        vectors[[3, 5]] = f32::NAN;
        vectors[[40, 0]] = f32::INFINITY;
        vectors[[41, 2]] = f32::NEG_INFINITY;
        vectors.row_mut(70).fill(0.0);
        vectors.row_mut(99).fill(1e18);
        for metric in METRICS {
            assert_exact(&vectors, metric, 99);
            let mut unusable = vec![3, 40, 41];
            match metric {
                Metric::Cosine => unusable.push(70),
                Metric::L2 | Metric::InnerProduct => unusable.push(99),
            }
            let found = self_join(&vectors.view(), metric, 99).unwrap();
            for (row, list) in found.iter().enumerate() {
                let num_expected = if unusable.contains(&row_number(row)) { 0 } else { 95 };
                assert_eq!(list.len(), num_expected, "{metric:?}, row {row}");
                assert!(rows(list).iter().all(|row| !unusable.contains(row)));
            }
        }
    }

    #[test]
    fn distances_agree_with_their_formulas() {
        let vectors = random(40, 19, 10);
        let norm = |a: &[f64]| a.iter().map(|a| a * a).sum::<f64>().sqrt();
        let wide = |row: usize| -> Vec<f64> { vectors.row(row).iter().map(|&a| f64::from(a)).collect() };
        for metric in METRICS {
            let found = self_join(&vectors.view(), metric, 39).unwrap();
            for (query, list) in found.iter().enumerate() {
                let a = wide(query);
                for neighbor in list {
                    let b = wide(neighbor.row as usize);
                    let inner: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
                    let difference: Vec<_> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
                    let expected = match metric {
                        Metric::Cosine => 1.0 - inner / (norm(&a) * norm(&b)),
                        Metric::L2 => norm(&difference),
                        Metric::InnerProduct => -inner,
                    };
                    assert!((f64::from(neighbor.distance) - expected).abs() < 1e-6, "{metric:?}");
                }
            }
        }
    }

    #[test]
    fn cosine_compares_directions_only() {
        let vectors = ndarray::array![[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0]];
        let found = self_join(&vectors.view(), Metric::Cosine, 3).unwrap();
        let expected = [(1, 0.0), (3, 1.0), (2, 2.0)];
        assert_eq!(found.get(0).unwrap(), expected.map(|(row, distance)| Neighbor { row, distance }));
    }

    #[test]
    fn the_key_of_a_pair_lies_within_its_bounds() {
        let shifts = random(1, 130, 11) * 100.0;
        for vectors in [random(60, 130, 12), random(60, 130, 13) + &shifts, random(60, 130, 14) * 1e-4 + &shifts] {
            for metric in METRICS {
                let scaled = Scaled::new(&vectors.view(), metric);
                for center in [vec![0.0; 130], scaled.center()] {
                    let prepared = Prepared::new(&scaled, 0..60, &center);
                    let mut products = Vec::new();
                    prepared.multiply(&(0..60), &prepared, &(0..60), &mut products);
                    for (pair, &dot) in products.iter().enumerate() {
                        let (x, y) = (pair / 60, pair % 60);
                        let (x_bounds, y_bounds) = (prepared.bounds[x], prepared.bounds[y]);
                        let key = metric.key(scaled.distance(x, &scaled, y));
                        let lower = x_bounds.offset + y_bounds.offset - dot;
                        let upper = lower + (x_bounds.slack + y_bounds.slack);
                        assert!(lower <= key && key <= upper, "{metric:?}: {lower} {key} {upper}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_view_of_any_layout_gives_the_same_neighbors() {
        let vectors = random(90, 8, 15);
        let columns = vectors.t().as_standard_layout().into_owned();
        for metric in METRICS {
            assert_eq!(self_join(&columns.t(), metric, 5).unwrap(), self_join(&vectors.view(), metric, 5).unwrap());
        }
    }

    #[test]
    fn rows_without_dimensions_are_all_equal_or_have_no_direction() {
        let vectors = Array2::zeros((4, 0));
        let found = self_join(&vectors.view(), Metric::L2, 2).unwrap();
        assert_eq!(rows(found.get(2).unwrap()), [0, 1]);
        let found = self_join(&vectors.view(), Metric::Cosine, 2).unwrap();
        assert_eq!(found.get(2).unwrap(), []);
    }

    #[test]
    fn no_neighbors_asked_for_gives_one_empty_list_for_each_query() {
        let vectors = random(5, 3, 16);
        for found in
            [self_join(&vectors.view(), Metric::L2, 0).unwrap(), query_join(&vectors, Metric::L2, 0, 64, 2, false)]
        {
            assert_eq!(found.num_queries(), 5);
            assert!(found.iter().all(<[Neighbor]>::is_empty));
        }
    }

    #[test]
    fn queries_from_outside_the_corpus_may_find_every_row() {
        let corpus = random(50, 7, 17);
        let queries = corpus.slice_axis(Axis(0), Slice::from(10..13));
        let mut join = QueryJoin::new(&queries, Metric::L2, 1);
        join.push(&corpus.view(), &(1000..1050).collect::<Vec<_>>()).unwrap();
        let found = join.finish();
        let nearest: Vec<_> = found.iter().flat_map(rows).collect();
        assert_eq!(nearest, [1010, 1011, 1012]);
    }

    #[test]
    fn blocks_that_do_not_fit_are_refused() {
        let queries = random(3, 7, 18);
        let mut join = QueryJoin::new(&queries.view(), Metric::L2, 1);
        assert!(matches!(
            join.push(&random(2, 8, 19).view(), &[5, 6]),
            Err(JoinError::DimensionMismatch { queries: 7, corpus: 8 })
        ));
        assert!(matches!(
            join.push(&random(2, 7, 19).view(), &[5]),
            Err(JoinError::RowNumbersMismatch { numbers: 1, rows: 2 })
        ));
        assert!(join.finish().iter().all(<[Neighbor]>::is_empty));
        assert!(matches!(
            QueryJoin::excluding(&queries.view(), Metric::L2, 1, &[None]),
            Err(JoinError::OwnRowsMismatch { own_rows: 1, queries: 3 })
        ));
    }

    #[test]
    fn lists_continue_over_any_split_of_the_corpus() {
        // Few distinct rows, so that ties cross every split.
        let some = random(40, 6, 20);
        let mut draw = SplitMix64(21);
        for round in 0..60 {
            let metric = METRICS[round % 3];
            let k = [1, 4, 200][draw.below(3)];
            let num_rows = 2 + draw.below(90);
            let picked: Vec<_> = (0..num_rows).map(|_| draw.below(40)).collect();
            let mut vectors = some.select(Axis(0), &picked);
            if round % 4 == 0 {
                vectors[[draw.below(num_rows), 2]] = f32::NAN;
            }
            let expected = brute_force(&vectors, metric, k);
            let own_rows: Vec<_> = (0..num_rows).map(|row| Some(row_number(row))).collect();
            // Each row in one of three parts; the first is found, the others come later, backwards.
            let mut parts = [vec![], vec![], vec![]];
            for row in (0..num_rows).rev() {
                parts[draw.below(3)].push(row);
            }
            let push = |join: &mut QueryJoin<'_>, part: &[usize]| {
                let rows: Vec<_> = part.iter().map(|row| row_number(*row)).collect();
                join.push(&vectors.select(Axis(0), part).view(), &rows).unwrap();
            };
            // What is found may be longer than what is asked for now.
            let mut join = QueryJoin::excluding(&vectors.view(), metric, k + round % 2, &own_rows).unwrap();
            push(&mut join, &parts[0]);
            let found = join.finish();
            let mut join = QueryJoin::continuing(&vectors.view(), metric, k, &own_rows, &found).unwrap();
            push(&mut join, &parts[1]);
            push(&mut join, &parts[2]);
            assert_eq!(lists(&join.finish()), expected, "{metric:?}, round {round}");
        }
    }

    #[test]
    fn a_part_larger_than_what_is_prepared_at_a_time_is_searched_whole() {
        let corpus = random(PART_ROWS + 700, 3, 22);
        let queries = corpus.slice_axis(Axis(0), Slice::from(PART_ROWS - 2..PART_ROWS + 2));
        let rows: Vec<_> = (0..row_number(corpus.nrows())).rev().collect();
        let mut join = QueryJoin::new(&queries, Metric::L2, 1);
        join.push(&corpus.view(), &rows).unwrap();
        let nearest: Vec<_> = join.finish().iter().map(|list| (list[0].row, list[0].distance)).collect();
        assert_eq!(nearest, [(701, 0.0), (700, 0.0), (699, 0.0), (698, 0.0)]);
    }

    #[test]
    fn lists_that_cannot_be_continued_are_refused() {
        let queries = random(3, 7, 18);
        let own_rows = [None; 3];
        let found = |k, num_lists| NeighborLists::new(k, vec![vec![]; num_lists]);
        let start = |found| QueryJoin::continuing(&queries.view(), Metric::L2, 5, &own_rows, &found).map(drop);
        assert!(matches!(start(found(5, 2)), Err(JoinError::FoundMismatch { found: 2, queries: 3 })));
        assert!(matches!(start(found(4, 3)), Err(JoinError::FoundTooFew { found: 4, k: 5 })));
        start(found(5, 3)).unwrap();
    }

    #[test]
    fn metrics_are_written_in_snake_case() {
        let written = serde_json::to_string(&METRICS).unwrap();
        assert_eq!(written, r#"["cosine","l2","inner_product"]"#);
        assert_eq!(serde_json::from_str::<[Metric; 3]>(&written).unwrap(), METRICS);
    }
}
