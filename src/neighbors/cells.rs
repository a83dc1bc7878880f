//! Search by cells (an inverted file, IVF): rows are kept by the centroid they are nearest to, and a query looks only
//! into the cells whose centroids are nearest to it.
//!
//! [`Cells::train`] finds the centroids by k-means, [`Cells::assign`] tells each row its cell, [`Cells::nearest`] which
//! cells a query should look into, and [`CellJoin`] looks. Within the cells it looks into, the search is that of
//! [`exact`](super::exact): the same bounds, the same distances, ties by row. What a query misses lies in other cells,
//! and [`RecallByProbes`] tells from a sample how much that is.
//!
//! # Which cell is nearest
//!
//! Under L2 the one whose centroid is. Under cosine and under the inner product, the one whose centroid has the nearest
//! direction: by inner products themselves, all rows would go to the longest centroids. A row of zeros, which the inner
//! product compares and which has no direction, is as far from all centroids.
//!
//! Equally near cells go by number. Nearness is settled by exact distance as that of neighbors is, so cells depend on
//! the row and the centroids alone, not on the rows beside it, the number of threads or the processor.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::exact::{
    BLOCK_ROWS, Corpus, JoinError, Metric, Prepared, Scaled, blocks_of, check_num_rows, check_own_rows, check_part,
    offer_columns, round_to_f32, row_number,
};
use super::topk::{Limits, NeighborLists, Shortlist, ShortlistBlock};
use crate::random::SplitMix64;

/// Rows of a sample to train on, for each cell asked for. More make the centroids little better.
pub const SAMPLE_ROWS_A_CELL: usize = 64;

/// Rounds of k-means, each assigning rows and then moving every centroid to the mean of its rows. In the first ones the
/// centroids move far, and a few rows a cell show them where to; the last ones take all rows.
const FIRST_ROUNDS: usize = 7;
const LAST_ROUNDS: usize = 3;

/// The first rounds take one row of so many.
const FIRST_SHARE: usize = 4;

/// A cell is hot, and split, if it has more rows than this many times the mean.
const HOT: usize = 4;

/// How often hot cells are looked for. Those left then hold rows too much alike for centroids to part.
const SPLITS: usize = 3;

/// Rows of a cell that are compared at a time, with so many queries: a block of products of a megabyte, as wide as most
/// cells, because a list is settled once for each block.
const CELL_BLOCK_ROWS: usize = 2048;
const CELL_BLOCK_QUERIES: usize = 128;

/// Steps of the power iteration for the axis along which cells are put in order; it need not be exact.
const AXIS_STEPS: usize = 12;

/// A number of cells that makes a search of `num_rows` rows with each other fast.
///
/// With `c` cells a row is multiplied with `2c` centroids, to be assigned and to be searched for, and with `nprobe` times
/// `num_rows / c` rows, which cost about as much again to tell from each other. The sum is least where `c` is the square
/// root of `nprobe * num_rows`; this is for an `nprobe` of 4, and the least is flat.
pub fn suggested_cells(num_rows: usize) -> usize {
    2 * num_rows.isqrt()
}

/// Centroids, and the metric by which rows belong to them. Cells are numbered from zero.
#[derive(Debug)]
pub struct Cells {
    metric: Metric,
    centroids: Scaled<'static>,
    center: Vec<f64>,
    prepared: Prepared,
    /// 0, 1, 2, …
    numbers: Vec<u32>,
}

impl Cells {
    /// Takes centroids (`num_cells` x `dim`) as trained before. One that is unusable (see [`exact`](super::exact)) keeps
    /// its number and gets no rows.
    pub fn new(centroids: Array2<f32>, metric: Metric) -> Self {
        let (num_cells, dim) = centroids.dim();
        Self::from_values(centroids.into_iter().collect(), num_cells, dim, metric)
    }

    /// The same from row-major values.
    fn from_values(values: Vec<f32>, num_cells: usize, dim: usize, metric: Metric) -> Self {
        let centroids = Scaled::from_values(values.into(), num_cells, dim, geometry(metric));
        let center = centroids.center();
        let prepared = Prepared::new(&centroids, 0..num_cells, &center);
        Self { metric, centroids, center, prepared, numbers: (0..num_cells).map(row_number).collect() }
    }

    /// Finds about `num_cells` centroids for rows like those of `sample` (`num_rows` x `dim`) by k-means, starting from
    /// rows drawn by `seed`.
    ///
    /// There are fewer cells where the sample has fewer distinct rows, and more where some would have several times the
    /// rows of others and are split. Cells near each other have numbers near each other. Unusable rows count for
    /// nothing. Sample, metric, number and seed determine the cells, whatever the number of threads.
    pub fn train(sample: &ArrayView2<'_, f32>, metric: Metric, num_cells: usize, seed: u64) -> Self {
        let sample = comparable(sample, metric);
        let dim = sample.dim;
        let has_place = |row: &usize| metric == Metric::L2 || sample.row(*row).iter().any(|value| *value != 0.0);
        let usable = (0..sample.scales.len()).filter(|row| sample.scales[*row] > 0.0);
        let points = sample.gather(&usable.filter(has_place).collect::<Vec<_>>());
        let mut random = SplitMix64(seed);
        let mut cells = cluster(&points, metric, num_cells, &mut random);
        for _ in 0..SPLITS {
            let members = cells.members(&points);
            let mean = points.scales.len().div_ceil(cells.len().max(1));
            if members.iter().all(|members| members.len() <= HOT * mean) {
                break;
            }
            let mut centroids = Vec::new();
            for (cell, members) in members.iter().enumerate() {
                if members.len() > HOT * mean {
                    let members = points.gather(members);
                    let parts = cluster(&members, metric, members.scales.len().div_ceil(mean), &mut random);
                    centroids.extend_from_slice(&parts.centroids.values);
                } else {
                    centroids.extend_from_slice(cells.centroids.row(cell));
                }
            }
            let num_cells = centroids.len() / dim.max(1);
            cells = Self::from_values(centroids, num_cells, dim, metric);
        }
        let members = cells.members(&points);
        let mut kept: Vec<usize> = (0..cells.len()).filter(|cell| !members[*cell].is_empty()).collect();
        put_in_order(&cells.centroids, &mut kept);
        if kept.is_empty() && num_cells > 0 && dim > 0 && sample.scales.iter().any(|scale| *scale > 0.0) {
            // Nothing but zeros under the inner product: any direction will do.
            let axis = (0..dim).map(|column| if column == 0 { 1.0 } else { 0.0 }).collect();
            return Self::from_values(axis, 1, dim, metric);
        }
        let centroids = kept.iter().flat_map(|cell| cells.centroids.row(*cell)).copied().collect();
        Self::from_values(centroids, kept.len(), dim, metric)
    }

    /// The centroids, `len()` x `dim()`; unit vectors after training under cosine and the inner product.
    pub fn centroids(&self) -> Array2<f32> {
        Array2::from_shape_fn((self.len(), self.dim()), |(cell, column)| self.centroids.row(cell)[column])
    }

    /// Number of cells.
    pub fn len(&self) -> usize {
        self.centroids.scales.len()
    }

    /// Whether there is no cell, as after training on no usable row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Dimensions of the centroids, and of all rows they can be compared with.
    pub fn dim(&self) -> usize {
        self.centroids.dim
    }

    /// The cell of each of `vectors` (`num_rows` x `dim`), `None` for a row that is unusable.
    ///
    /// # Errors
    ///
    /// [`JoinError::DimensionMismatch`] if the vectors have not the dimensions of the centroids.
    pub fn assign(&self, vectors: &ArrayView2<'_, f32>) -> Result<Vec<Option<u32>>, JoinError> {
        self.check_dim(vectors)?;
        Ok(self.assign_rows(&comparable(vectors, self.metric)))
    }

    /// The `nprobe` cells nearest to each of `vectors` (`num_rows` x `dim`), nearest first; none for a row that is
    /// unusable. The first one is that of [`Self::assign`].
    ///
    /// # Errors
    ///
    /// [`JoinError::DimensionMismatch`] if the vectors have not the dimensions of the centroids.
    pub fn nearest(&self, vectors: &ArrayView2<'_, f32>, nprobe: usize) -> Result<Probes, JoinError> {
        self.check_dim(vectors)?;
        Ok(Probes::new(self.search(&comparable(vectors, self.metric), nprobe)))
    }

    fn check_dim(&self, vectors: &ArrayView2<'_, f32>) -> Result<(), JoinError> {
        if vectors.ncols() == self.dim() {
            Ok(())
        } else {
            Err(JoinError::DimensionMismatch { queries: vectors.ncols(), corpus: self.dim() })
        }
    }

    fn assign_rows(&self, vectors: &Scaled<'_>) -> Vec<Option<u32>> {
        self.search(vectors, 1).into_iter().map(|cells| cells.first().copied()).collect()
    }

    /// For each cell its rows, ascending.
    fn members(&self, vectors: &Scaled<'_>) -> Vec<Vec<usize>> {
        let mut members = vec![Vec::new(); self.len()];
        for (row, cell) in self.assign_rows(vectors).into_iter().enumerate() {
            if let Some(cell) = cell {
                members[cell as usize].push(row);
            }
        }
        members
    }

    /// The `nprobe` nearest cells of each row.
    fn search(&self, vectors: &Scaled<'_>, nprobe: usize) -> Vec<Vec<u32>> {
        let limits = Limits::new(nprobe, self.centroids.metric);
        let corpus = Corpus { vectors: &self.centroids, numbers: &self.numbers };
        let neighbor = |query: usize, position: u32| corpus.neighbor(vectors, query, position);
        let cell_blocks = blocks_of(0..self.len(), BLOCK_ROWS);
        blocks_of(0..vectors.scales.len(), BLOCK_ROWS)
            .into_par_iter()
            .flat_map_iter(|block| {
                let rows = Prepared::new(vectors, block.clone(), &self.center);
                let queries = rows.bounds.iter().map(|bounds| (*bounds, None));
                let mut lists = ShortlistBlock::new(limits, block.start, queries);
                let mut products = Vec::new();
                for cell_block in &cell_blocks {
                    rows.multiply(&(0..block.len()), &self.prepared, cell_block, &mut products);
                    offer_columns(&products, &mut lists, &self.prepared, cell_block, &self.numbers, neighbor);
                }
                lists.settle(neighbor);
                lists.into_lists().map(|list| list.into_iter().map(|nearest| nearest.row).collect())
            })
            .collect()
    }
}

/// The metric by which cells are near under a metric of rows.
fn geometry(metric: Metric) -> Metric {
    match metric {
        Metric::L2 => Metric::L2,
        Metric::Cosine | Metric::InnerProduct => Metric::Cosine,
    }
}

/// Rows to be compared with centroids: usable as `metric` has it, scaled as [`geometry`] has it.
fn comparable<'a>(vectors: &ArrayView2<'a, f32>, metric: Metric) -> Scaled<'a> {
    let mut rows = Scaled::new(vectors, metric);
    if metric == Metric::InnerProduct {
        let directions = Scaled::new(vectors, Metric::Cosine);
        for (scale, direction) in rows.scales.iter_mut().zip(directions.scales) {
            // Zeros have no direction and keep their scale of one.
            if *scale > 0.0 && direction > 0.0 {
                *scale = direction;
            }
        }
        rows.metric = Metric::Cosine;
    }
    rows
}

/// Lloyd's k-means over usable rows, at most one cell for each distinct row.
fn cluster(points: &Scaled<'_>, metric: Metric, num_cells: usize, random: &mut SplitMix64) -> Cells {
    let num_rows = points.scales.len();
    let mut order: Vec<usize> = (0..num_rows).collect();
    random.shuffle(&mut order);
    let mut seen = HashSet::new();
    let mut centroids = Vec::new();
    for &row in &order {
        if seen.len() >= num_cells {
            break;
        }
        if seen.insert(points.row(row).iter().map(|value| value.to_bits()).collect::<Vec<_>>()) {
            centroids.extend(mean(points, &[row], metric).unwrap_or_default());
        }
    }
    let num_cells = centroids.len() / points.dim.max(1);
    let mut cells = Cells::from_values(centroids, num_cells, points.dim, metric);
    let first = points.gather(&order[..num_rows.div_ceil(FIRST_SHARE)]);
    for points in std::iter::repeat_n(&first, FIRST_ROUNDS).chain(std::iter::repeat_n(points, LAST_ROUNDS)) {
        cells = moved(&cells, points, random);
    }
    cells
}

/// Cells around the means of their rows.
fn moved(cells: &Cells, points: &Scaled<'_>, random: &mut SplitMix64) -> Cells {
    let members = cells.members(points);
    let means: Vec<_> = members.par_iter().map(|members| mean(points, members, cells.metric)).collect();
    let mut sizes: Vec<usize> = members.iter().map(Vec::len).collect();
    let mut centroids = Vec::with_capacity(cells.len() * cells.dim());
    for (cell, mean_of_members) in means.into_iter().enumerate() {
        let centroid = mean_of_members.or_else(|| {
            // A cell that lost its rows gets a part of those of the largest cell, or rather of what is left of it.
            let largest = (0..cells.len()).max_by_key(|cell| (sizes[*cell], Reverse(*cell)))?;
            sizes[largest] /= 2;
            let row = members[largest].get(random.below(members[largest].len()))?;
            mean(points, &[*row], cells.metric)
        });
        centroids.extend(centroid.unwrap_or_else(|| cells.centroids.row(cell).to_vec()));
    }
    Cells::from_values(centroids, cells.len(), cells.dim(), cells.metric)
}

/// The mean of the given rows, of length one where cells are directions; `None` for no rows and for rows that cancel.
fn mean(points: &Scaled<'_>, rows: &[usize], metric: Metric) -> Option<Vec<f32>> {
    let mut sums = vec![0.0; points.dim];
    for &row in rows {
        let scale = points.scales[row];
        for (sum, &value) in sums.iter_mut().zip(points.row(row)) {
            *sum += f64::from(value) * scale;
        }
    }
    let scale = match geometry(metric) {
        Metric::L2 | Metric::InnerProduct => (rows.len() as f64).recip(),
        Metric::Cosine => sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt().recip(),
    };
    scale.is_finite().then(|| sums.into_iter().map(|sum| round_to_f32(sum * scale)).collect())
}

/// Puts cells in an order in which those near each other come near each other: halves them along the axis of their
/// largest variance, and again each half.
fn put_in_order(centroids: &Scaled<'_>, cells: &mut [usize]) {
    if cells.len() < 2 {
        return;
    }
    let axis = main_axis(centroids, cells);
    let mut along: Vec<(f64, usize)> = cells
        .iter()
        .map(|&cell| {
            let place = centroids.row(cell).iter().zip(&axis).map(|(&value, axis)| f64::from(value) * axis).sum();
            (place, cell)
        })
        .collect();
    along.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    for (cell, (_, ordered)) in cells.iter_mut().zip(along) {
        *cell = ordered;
    }
    let (lower, upper) = cells.split_at_mut(cells.len() / 2);
    rayon::join(|| put_in_order(centroids, lower), || put_in_order(centroids, upper));
}

/// The direction in which the given centroids vary most, by power iteration on their covariance.
fn main_axis(centroids: &Scaled<'_>, cells: &[usize]) -> Vec<f64> {
    let mut mean = vec![0.0; centroids.dim];
    for &cell in cells {
        for (mean, &value) in mean.iter_mut().zip(centroids.row(cell)) {
            *mean += f64::from(value) / cells.len() as f64;
        }
    }
    // Started from a difference of two of them, which is hardly at right angles to the axis.
    let mut axis: Vec<f64> = match *cells {
        [first, .., last] => (centroids.row(last).iter().zip(centroids.row(first)))
            .map(|(&last, &first)| f64::from(last) - f64::from(first))
            .collect(),
        _ => return mean,
    };
    for _ in 0..AXIS_STEPS {
        let mut next = vec![0.0; axis.len()];
        for &cell in cells {
            let centered = || centroids.row(cell).iter().zip(&mean).map(|(&value, mean)| f64::from(value) - mean);
            let place: f64 = centered().zip(&axis).map(|(value, axis)| value * axis).sum();
            for (next, value) in next.iter_mut().zip(centered()) {
                *next += place * value;
            }
        }
        let length = next.iter().map(|value| value * value).sum::<f64>().sqrt();
        if length == 0.0 {
            break;
        }
        axis = next.into_iter().map(|value| value / length).collect();
    }
    axis
}

/// For each of a set of rows the cells to look into, nearest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probes {
    /// List `i` is `cells[ends[i - 1]..ends[i]]`, the first one starting at zero.
    ends: Vec<usize>,
    cells: Vec<u32>,
}

impl Probes {
    /// Takes the cells of each row, nearest first.
    pub fn new(lists: Vec<Vec<u32>>) -> Self {
        let mut ends = Vec::with_capacity(lists.len());
        let mut cells = Vec::new();
        for list in lists {
            cells.extend(list);
            ends.push(cells.len());
        }
        Self { ends, cells }
    }

    /// For each row its own cell alone, as [`Cells::assign`] gave it: what [`Cells::nearest`] finds for `nprobe` = 1.
    pub fn own(assigned: &[Option<u32>]) -> Self {
        let mut num_probes = 0;
        let mut end_after = |cell: &Option<u32>| {
            num_probes += usize::from(cell.is_some());
            num_probes
        };
        Self {
            ends: assigned.iter().map(&mut end_after).collect(),
            cells: assigned.iter().copied().flatten().collect(),
        }
    }

    /// The same without the cells that are not in `cells`.
    #[must_use]
    pub fn within(&self, cells: &Range<u32>) -> Self {
        let within = |row: usize| self.get(row).iter().copied().filter(|cell| cells.contains(cell)).collect();
        Self::new((0..self.num_rows()).map(within).collect())
    }

    /// Number of rows, those without a cell included.
    pub fn num_rows(&self) -> usize {
        self.ends.len()
    }

    /// The cells of one row, nearest first; none past the last row.
    pub fn get(&self, row: usize) -> &[u32] {
        let end = self.ends.get(row).copied().unwrap_or_default();
        let start = row.checked_sub(1).map_or(0, |before| self.ends.get(before).copied().unwrap_or_default());
        self.cells.get(start..end).unwrap_or_default()
    }
}

/// Finds the `k` nearest rows for each of a set of queries among the rows of the cells it probes, the rows given cell
/// by cell.
///
/// Holds the queries, their lists and the cells they probe, and beside the rows that are being compared a prepared copy
/// of them. Cells may be pushed from several threads at once.
#[derive(Debug)]
pub struct CellJoin<'q> {
    queries: Scaled<'q>,
    prepared: Prepared,
    center: Vec<f64>,
    k: usize,
    limits: Limits,
    lists: Vec<Mutex<Shortlist>>,
    /// Cell and query for every probe, ascending.
    probes: Vec<(u32, u32)>,
}

impl<'q> CellJoin<'q> {
    /// Starts a join of `queries` (`num_queries` x `dim`), each with the rows of the cells in its list of `probes`. Query
    /// `i` never finds row `own_rows[i]`.
    ///
    /// # Errors
    ///
    /// [`JoinError::OwnRowsMismatch`] and [`JoinError::ProbesMismatch`] unless there is one entry for each query,
    /// [`JoinError::TooManyRows`] for 2³² queries and more.
    pub fn new(
        queries: &ArrayView2<'q, f32>,
        metric: Metric,
        k: usize,
        own_rows: &[Option<u32>],
        probes: &Probes,
    ) -> Result<Self, JoinError> {
        check_own_rows(own_rows, queries.nrows())?;
        if probes.num_rows() != queries.nrows() {
            return Err(JoinError::ProbesMismatch { probes: probes.num_rows(), queries: queries.nrows() });
        }
        let num_queries = check_num_rows(queries.nrows())?;
        let mut probes: Vec<_> = (0..num_queries)
            .flat_map(|query| probes.get(query as usize).iter().map(move |cell| (*cell, query)))
            .collect();
        probes.par_sort_unstable();
        let queries = Scaled::new(queries, metric);
        let center = queries.center();
        let prepared = Prepared::new(&queries, 0..own_rows.len(), &center);
        let limits = Limits::new(k, metric);
        let lists = prepared.bounds.iter().zip(own_rows);
        let lists = lists.map(|(bounds, own_row)| Mutex::new(Shortlist::new(limits, *bounds, *own_row))).collect();
        Ok(Self { queries, prepared, center, k, limits, lists, probes })
    }

    /// The cells that a query probes, ascending: those to push, in any order.
    pub fn cells(&self) -> Vec<u32> {
        let mut cells: Vec<u32> = self.probes.iter().map(|(cell, _)| *cell).collect();
        cells.dedup();
        cells
    }

    /// Compares the queries that probe `cell` with rows of it (`num_rows` x `dim`), of which row `i` has the number
    /// `rows[i]`. A cell may come in several parts, each number once in all.
    ///
    /// # Errors
    ///
    /// [`JoinError::DimensionMismatch`] if the rows have not the dimensions of the queries,
    /// [`JoinError::RowNumbersMismatch`] unless there is one number for each row. The join is unchanged then.
    pub fn push(&self, cell: u32, corpus: &ArrayView2<'_, f32>, rows: &[u32]) -> Result<(), JoinError> {
        check_part(self.queries.dim, corpus, rows)?;
        let start = self.probes.partition_point(|(probed, _)| *probed < cell);
        let len = self.probes[start..].partition_point(|(probed, _)| *probed == cell);
        let queries: Vec<u32> = self.probes[start..start + len].iter().map(|(_, query)| *query).collect();
        if self.k == 0 || rows.is_empty() || queries.is_empty() {
            return Ok(());
        }
        let vectors = Scaled::new(corpus, self.queries.metric);
        let corpus = Corpus { vectors: &vectors, numbers: rows };
        for part in blocks_of(0..rows.len(), CELL_BLOCK_ROWS) {
            let columns = Prepared::new(&vectors, part.clone(), &self.center);
            let column_block = 0..part.len();
            queries.par_chunks(CELL_BLOCK_QUERIES).for_each_init(
                || (Vec::new(), vec![0; part.len()]),
                |(products, found), queries| {
                    let block = self.prepared.gather(queries);
                    block.multiply(&(0..queries.len()), &columns, &column_block, products);
                    for (&query, products) in queries.iter().zip(products.chunks_exact(part.len())) {
                        let query = query as usize;
                        let neighbor = |position: u32| corpus.neighbor(&self.queries, query, position);
                        let mut list = lock(&self.lists[query]);
                        columns.offer(&column_block, products, rows, (&mut *list, self.limits), found, neighbor);
                        // Before the lock goes: another thread's candidates are of other rows.
                        list.settle(self.limits, neighbor);
                    }
                },
            );
        }
        Ok(())
    }

    /// The neighbors found in all cells together.
    pub fn finish(self) -> NeighborLists {
        let lists = self.lists.into_iter().map(|list| list.into_inner().unwrap_or_else(PoisonError::into_inner));
        NeighborLists::new(self.k, lists.map(Shortlist::into_neighbors))
    }
}

/// A panic of another thread is already on its way to the caller of the join; the list itself stays whole.
fn lock(list: &Mutex<Shortlist>) -> std::sync::MutexGuard<'_, Shortlist> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much of the true neighbors a search finds that looks into so many cells, as far as a sample can tell.
#[derive(Debug, Clone, PartialEq)]
pub struct RecallByProbes {
    /// Recall and its standard error, of `nprobe` = index + 1.
    recalls: Vec<(f64, f64)>,
}

impl RecallByProbes {
    /// Recall@k of a search of `nprobe` cells: the share of true neighbors it finds.
    pub fn recall(&self, nprobe: usize) -> f64 {
        let last = nprobe.min(self.recalls.len()).checked_sub(1);
        last.map_or(0.0, |last| self.recalls[last].0)
    }

    /// The smallest `nprobe` of which the recall is `target` or more, and so much more that chance alone makes a sample
    /// look that good once in twenty times; all cells if there is none.
    pub fn fewest_probes(&self, target: f64) -> usize {
        /// Standard errors by which a normal variable is above its mean so often.
        const MARGIN: f64 = 1.645;
        let enough = self.recalls.iter().position(|(recall, error)| recall - MARGIN * error >= target);
        enough.map_or(self.recalls.len(), |before| before + 1)
    }
}

/// Measures recall for every number of probes on a sample of queries: `truth` holds their exact lists, `orders` for each
/// all cells, nearest first ([`Cells::nearest`] with `nprobe` = `cells.len()`), and `cell_of` tells the cell of a row of
/// the corpus.
///
/// A true neighbor is found by as many probes as its cell comes down in the query's order. Without any true neighbor
/// nothing is missed, and every recall is one. The standard error is that of a ratio of sums over a simple random sample
/// of queries (Cochran, *Sampling Techniques*, 3rd ed., section 6.4), because the neighbors of one query are found or
/// missed together.
pub fn recall_by_probes(
    truth: &NeighborLists,
    orders: &Probes,
    num_cells: usize,
    cell_of: impl Fn(u32) -> Option<u32>,
) -> RecallByProbes {
    // For each query the number of true neighbors, and the ranks of their cells.
    let queries: Vec<(usize, Vec<usize>)> = truth
        .iter()
        .enumerate()
        .map(|(query, list)| {
            let order = orders.get(query);
            let rank = |row| cell_of(row).and_then(|cell| order.iter().position(|probed| *probed == cell));
            let mut ranks: Vec<usize> = list.iter().filter_map(|near| rank(near.row)).collect();
            ranks.sort_unstable();
            (list.len(), ranks)
        })
        .collect();
    let num_true: usize = queries.iter().map(|(num_true, _)| num_true).sum();
    let num_queries = queries.iter().filter(|(num_true, _)| *num_true > 0).count() as f64;
    let measure = |nprobe: usize| {
        if num_true == 0 {
            return (1.0, 0.0);
        }
        let found = |ranks: &[usize]| ranks.partition_point(|rank| *rank < nprobe) as f64;
        let recall = queries.iter().map(|(_, ranks)| found(ranks)).sum::<f64>() / num_true as f64;
        let squares: f64 =
            queries.iter().map(|(num_true, ranks)| (found(ranks) - recall * *num_true as f64).powi(2)).sum();
        let variance = squares * num_queries / (num_queries - 1.0).max(1.0);
        (recall, variance.sqrt() / num_true as f64)
    };
    RecallByProbes { recalls: (1..=num_cells).into_par_iter().map(measure).collect() }
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, concatenate};

    use super::*;
    use crate::neighbors::exact::QueryJoin;
    use crate::neighbors::testing::{METRICS, random};
    use crate::neighbors::topk::Neighbor;

    /// Rows around `num_clusters` points, in turn.
    fn clustered(num_rows: usize, dim: usize, num_clusters: usize, seed: u64) -> Array2<f32> {
        let centers = random(num_clusters, dim, seed);
        let noise = random(num_rows, dim, seed + 1) * 0.2;
        Array2::from_shape_fn((num_rows, dim), |(row, column)| {
            centers[[row % num_clusters, column]] + noise[[row, column]]
        })
    }

    /// Random rows with all that can be wrong with one.
    fn awkward(num_rows: usize, dim: usize, seed: u64) -> Array2<f32> {
        let mut vectors = clustered(num_rows, dim, 9, seed);
        vectors[[3, 1]] = f32::NAN;
        vectors[[10, 0]] = f32::INFINITY;
        vectors.row_mut(20).fill(0.0);
        vectors.row_mut(21).fill(0.0);
        vectors.row_mut(30).fill(1e18);
        for row in [41, 52, 63] {
            let equal = vectors.row(40).to_owned();
            vectors.row_mut(row).assign(&equal);
        }
        vectors
    }

    fn with_threads<T: Send>(num_threads: usize, work: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap().install(work)
    }

    fn lists(found: &NeighborLists) -> Vec<Vec<Neighbor>> {
        found.iter().map(<[Neighbor]>::to_vec).collect()
    }

    fn numbers(num_rows: usize) -> Vec<u32> {
        (0..num_rows).map(row_number).collect()
    }

    /// Everything with everything, by the exact join.
    fn exact(vectors: &Array2<f32>, metric: Metric, k: usize) -> NeighborLists {
        let own_rows: Vec<_> = numbers(vectors.nrows()).into_iter().map(Some).collect();
        let mut join = QueryJoin::excluding(&vectors.view(), metric, k, &own_rows).unwrap();
        join.push(&vectors.view(), &numbers(vectors.nrows())).unwrap();
        join.finish()
    }

    /// The rows of each cell pushed in parts of `part_rows`, last cell first.
    fn by_cells(vectors: &Array2<f32>, cells: &Cells, k: usize, nprobe: usize, part_rows: usize) -> NeighborLists {
        let own_rows: Vec<_> = numbers(vectors.nrows()).into_iter().map(Some).collect();
        let probes = cells.nearest(&vectors.view(), nprobe).unwrap();
        let assigned = cells.assign(&vectors.view()).unwrap();
        let join = CellJoin::new(&vectors.view(), cells.metric, k, &own_rows, &probes).unwrap();
        for cell in join.cells().into_iter().rev() {
            let rows: Vec<_> =
                numbers(vectors.nrows()).into_iter().filter(|row| assigned[*row as usize] == Some(cell)).collect();
            for rows in rows.chunks(part_rows) {
                let part: Vec<_> = rows.iter().map(|row| *row as usize).collect();
                join.push(cell, &vectors.select(Axis(0), &part).view(), rows).unwrap();
            }
        }
        join.finish()
    }

    #[test]
    fn probing_all_cells_equals_the_exact_join() {
        let vectors = awkward(400, 12, 1);
        for metric in METRICS {
            let cells = Cells::train(&vectors.view(), metric, 20, 7);
            for (k, part_rows) in [(1, 1000), (5, 7), (500, 100)] {
                let expected = exact(&vectors, metric, k);
                for num_threads in [1, 3] {
                    let found = with_threads(num_threads, || by_cells(&vectors, &cells, k, cells.len(), part_rows));
                    assert_eq!(found, expected, "{metric:?}, k {k}, parts of {part_rows}");
                }
            }
        }
    }

    #[test]
    fn probing_some_cells_finds_the_nearest_rows_of_those_cells() {
        let vectors = awkward(300, 8, 2);
        for metric in METRICS {
            let cells = Cells::train(&vectors.view(), metric, 12, 8);
            let probes = cells.nearest(&vectors.view(), 3).unwrap();
            let assigned = cells.assign(&vectors.view()).unwrap();
            let expected: Vec<Vec<_>> = lists(&exact(&vectors, metric, 300))
                .into_iter()
                .enumerate()
                .map(|(query, list)| {
                    let probed = |cell: Option<u32>| cell.is_some_and(|cell| probes.get(query).contains(&cell));
                    list.into_iter().filter(|near| probed(assigned[near.row as usize])).take(6).collect()
                })
                .collect();
            assert_eq!(lists(&by_cells(&vectors, &cells, 6, 3, 40)), expected, "{metric:?}");
        }
    }

    #[test]
    fn a_row_belongs_to_the_centroid_nearest_by_exact_distance() {
        let vectors = awkward(900, 5, 3);
        for metric in METRICS {
            // Some centroids an ulp or so apart, which products cannot tell from each other, and some equal.
            let near = random(1, 5, 4);
            let centroids = concatenate![Axis(0), random(30, 5, 5), &near + &(random(40, 5, 6) * 1e-7), near, near];
            let rows = comparable(&vectors.view(), metric);
            let cells = Cells::new(centroids, metric);
            let expected: Vec<Vec<u32>> = (0..900)
                .map(|row| {
                    let distance = |cell: &u32| rows.distance(row, &cells.centroids, *cell as usize);
                    let mut order = numbers(cells.len());
                    order.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.cmp(b)));
                    if rows.scales[row] > 0.0 { order } else { vec![] }
                })
                .collect();
            assert_eq!(cells.search(&rows, 72), expected);
            let firsts: Vec<_> = expected.iter().map(|order| order.first().copied()).collect();
            assert_eq!(cells.assign(&vectors.view()).unwrap(), firsts);
            for num_threads in [1, 3] {
                let alone = with_threads(num_threads, || {
                    let one = |row| cells.assign(&vectors.select(Axis(0), &[row]).view()).unwrap()[0];
                    (0..900).map(one).collect::<Vec<_>>()
                });
                assert_eq!(alone, firsts);
            }
        }
    }

    #[test]
    fn unusable_rows_have_no_cell_and_zeros_have_one_unless_they_lack_a_direction() {
        let vectors = awkward(100, 6, 7);
        for (metric, expected) in [
            (Metric::Cosine, vec![3, 10, 20, 21]),
            (Metric::L2, vec![3, 10, 30]),
            (Metric::InnerProduct, vec![3, 10, 30]),
        ] {
            let cells = Cells::train(&vectors.view(), metric, 10, 1);
            let assigned = cells.assign(&vectors.view()).unwrap();
            let probes = cells.nearest(&vectors.view(), 2).unwrap();
            let without: Vec<_> = (0..100).filter(|row| assigned[*row].is_none()).collect();
            assert_eq!(without, expected, "{metric:?}");
            for (row, cell) in assigned.iter().enumerate() {
                assert_eq!(probes.get(row).len(), if cell.is_some() { 2 } else { 0 });
                assert_eq!(probes.get(row).first(), cell.as_ref());
            }
            assert_eq!(Probes::own(&assigned), cells.nearest(&vectors.view(), 1).unwrap());
        }
        let zeros = Array2::zeros((4, 3));
        assert_eq!(
            Cells::train(&zeros.view(), Metric::InnerProduct, 2, 1).assign(&zeros.view()).unwrap(),
            [Some(0); 4]
        );
        assert!(Cells::train(&zeros.view(), Metric::Cosine, 2, 1).is_empty());
    }

    #[test]
    fn training_depends_on_sample_and_seed_alone() {
        let vectors = awkward(700, 9, 8);
        for metric in METRICS {
            let train = |num_threads, seed| {
                with_threads(num_threads, || Cells::train(&vectors.view(), metric, 25, seed).centroids())
            };
            assert_eq!(train(1, 5), train(4, 5));
            assert_ne!(train(1, 5), train(1, 6));
        }
    }

    #[test]
    fn as_many_cells_as_there_are_distinct_rows_at_most() {
        let few = random(7, 4, 9);
        let vectors = few.select(Axis(0), &(0..200).map(|row| row % 7).collect::<Vec<_>>());
        for metric in METRICS {
            let cells = Cells::train(&vectors.view(), metric, 30, 2);
            assert_eq!(cells.len(), 7, "{metric:?}");
            let assigned = cells.assign(&vectors.view()).unwrap();
            for (row, cell) in assigned.iter().enumerate() {
                assert_eq!(*cell, assigned[row % 7]);
            }
        }
    }

    #[test]
    fn training_on_nothing_gives_no_cells() {
        for vectors in [Array2::zeros((0, 4)), Array2::from_elem((5, 4), f32::NAN), Array2::zeros((5, 0))] {
            for metric in METRICS {
                let cells = Cells::train(&vectors.view(), metric, 10, 3);
                assert!(cells.is_empty());
                assert_eq!(cells.assign(&vectors.view()).unwrap(), vec![None; vectors.nrows()]);
            }
        }
        let vectors = random(5, 4, 10);
        assert!(Cells::train(&vectors.view(), Metric::L2, 0, 3).is_empty());
    }

    #[test]
    fn hot_cells_are_split() {
        // A tenth of the rows all over, the others in one place, which draws few of the first centroids.
        let crowd = random(1800, 3, 11) * 1e-3 + 5.0;
        let vectors = concatenate![Axis(0), random(200, 3, 12), crowd];
        let cells = Cells::train(&vectors.view(), Metric::L2, 20, 4);
        let members = cells.members(&comparable(&vectors.view(), Metric::L2));
        assert!(members.iter().all(|members| members.len() <= HOT * 2000 / 20), "{members:?}");
        // Equal rows cannot be parted.
        let equal = concatenate![Axis(0), random(100, 3, 13), Array2::from_elem((1900, 3), 4.0)];
        let cells = Cells::train(&equal.view(), Metric::L2, 20, 4);
        let members = cells.members(&comparable(&equal.view(), Metric::L2));
        assert!(members.iter().any(|members| members.len() >= 1900));
    }

    #[test]
    fn cells_near_each_other_have_numbers_near_each_other() {
        // Points along a line, met in random order.
        let along = random(500, 1, 14);
        let vectors = Array2::from_shape_fn((500, 3), |(row, column)| along[[row, 0]] * [1.0, -2.0, 0.5][column]);
        let centroids = Cells::train(&vectors.view(), Metric::L2, 40, 6).centroids();
        let places = centroids.column(0);
        let ascending = places.windows(2).into_iter().filter(|pair| pair[0] < pair[1]).count();
        assert!(ascending == 0 || ascending == centroids.nrows() - 1, "{places}");
    }

    #[test]
    fn recall_counts_the_true_neighbors_in_the_first_cells() {
        let near = |row| Neighbor { row, distance: 0.0 };
        let truth = NeighborLists::new(2, [vec![near(0), near(1)], vec![near(2), near(3)], vec![]]);
        let orders = Probes::new(vec![vec![2, 0, 1], vec![1, 2, 0], vec![]]);
        // Ranks 1 and 0 for the first query, 0 and 2 for the second.
        let cell_of = |row: u32| Some([0, 2, 1, 0][row as usize]);
        let recall = recall_by_probes(&truth, &orders, 3, cell_of);
        let recalls: Vec<_> = recall.recalls.iter().map(|(recall, _)| *recall).collect();
        assert_eq!(recalls, [0.5, 0.75, 1.0]);
        // One query has one and two of two, the other one and one: errors of 0, 1/4 and 0.
        assert_eq!([0.1, 0.5, 0.6, 0.75, 0.99].map(|target| recall.fewest_probes(target)), [1, 1, 3, 3, 3]);
        let without = recall_by_probes(&truth, &orders, 3, |_| None);
        assert_eq!((without.recalls.as_slice(), without.fewest_probes(0.5)), (&[(0.0, 0.0); 3][..], 3));
        let nothing = NeighborLists::new(2, vec![vec![]]);
        assert_eq!(recall_by_probes(&nothing, &orders, 3, cell_of).fewest_probes(1.0), 1);
    }

    #[test]
    fn measured_recall_is_that_of_the_search() {
        let vectors = clustered(600, 10, 30, 15);
        let cells = Cells::train(&vectors.view(), Metric::Cosine, 25, 9);
        let assigned = cells.assign(&vectors.view()).unwrap();
        let truth = exact(&vectors, Metric::Cosine, 10);
        let orders = cells.nearest(&vectors.view(), cells.len()).unwrap();
        let recall = recall_by_probes(&truth, &orders, cells.len(), |row| assigned[row as usize]);
        for nprobe in [1, 3, 9] {
            let found = by_cells(&vectors, &cells, 10, nprobe, 1000);
            let num_found: usize = truth
                .iter()
                .zip(found.iter())
                .map(|(truth, found)| truth.iter().filter(|near| found.contains(near)).count())
                .sum();
            assert!((num_found as f64 / 6000.0 - recall.recall(nprobe)).abs() < 1e-12);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let vectors = random(4, 3, 16);
        let cells = Cells::train(&vectors.view(), Metric::L2, 2, 1);
        let others = random(2, 5, 17);
        assert!(matches!(cells.assign(&others.view()), Err(JoinError::DimensionMismatch { queries: 5, corpus: 3 })));
        assert!(matches!(cells.nearest(&others.view(), 1), Err(JoinError::DimensionMismatch { .. })));
        let probes = cells.nearest(&vectors.view(), 1).unwrap();
        let start = |queries: &Array2<f32>, own_rows: &[Option<u32>]| {
            CellJoin::new(&queries.view(), Metric::L2, 1, own_rows, &probes).map(drop)
        };
        assert!(matches!(start(&vectors, &[None]), Err(JoinError::OwnRowsMismatch { own_rows: 1, queries: 4 })));
        assert!(matches!(start(&others, &[None; 2]), Err(JoinError::ProbesMismatch { probes: 4, queries: 2 })));
        let join = CellJoin::new(&vectors.view(), Metric::L2, 1, &[None; 4], &probes).unwrap();
        assert!(matches!(join.push(0, &others.view(), &[0, 1]), Err(JoinError::DimensionMismatch { .. })));
        assert!(matches!(
            join.push(0, &vectors.view(), &[0]),
            Err(JoinError::RowNumbersMismatch { numbers: 1, rows: 4 })
        ));
    }
}
