//! Bounded lists of the nearest rows: filled from approximate products, settled by exact distances.
//!
//! A matrix product gives the closeness of two rows only up to rounding, and that rounding changes with the shape of
//! the blocks. So a `Shortlist` never ranks by it. It keeps every row that *may* belong to the `k` nearest, given an
//! interval that holds the true value, and asks for the exact distance only when it runs full and at the end. What
//! comes out is ordered by (distance, row) and does not depend on the order in which candidates arrived.
//!
//! This file knows nothing of vectors or products; [`exact`](super::exact) and [`cells`](super::cells) feed it, and
//! `exact` derives the intervals.

use std::cmp::Ordering;

use super::exact::Metric;

/// A row of the corpus and how far it is from the query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neighbor {
    /// Index of the row in the corpus.
    pub row: u32,
    /// Distance in the convention of [`Metric`]; smaller is nearer.
    pub distance: f32,
}

impl Neighbor {
    /// Nearest first; equal distances by the smaller row.
    fn order(self, other: Self) -> Ordering {
        self.distance.total_cmp(&other.distance).then(self.row.cmp(&other.row))
    }
}

/// For every query the rows nearest to it, ascending by (distance, row).
///
/// A list is shorter than `k` when the corpus has fewer usable rows, and empty when the query itself is unusable.
#[derive(Debug, Clone, PartialEq)]
pub struct NeighborLists {
    k: usize,
    /// List `i` is `neighbors[ends[i - 1]..ends[i]]`, the first one starting at zero.
    ends: Vec<usize>,
    neighbors: Vec<Neighbor>,
}

impl NeighborLists {
    /// Puts lists together, one for each query, each ascending by (distance, row) and of at most `k` neighbors.
    pub fn new(k: usize, lists: impl IntoIterator<Item = Vec<Neighbor>>) -> Self {
        let mut ends = Vec::new();
        let mut neighbors = Vec::new();
        for list in lists {
            neighbors.extend(list);
            ends.push(neighbors.len());
        }
        Self { k, ends, neighbors }
    }

    /// How many neighbors were asked for per query.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number of queries, those without a neighbor included.
    pub fn num_queries(&self) -> usize {
        self.ends.len()
    }

    /// The neighbors of one query, nearest first; `None` past the last query.
    pub fn get(&self, query: usize) -> Option<&[Neighbor]> {
        let end = *self.ends.get(query)?;
        let start = query.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.neighbors.get(start..end)
    }

    /// The lists of all queries, in the order of the queries.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[Neighbor]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let list = &self.neighbors[start..end];
            start = end;
            list
        })
    }
}

/// What a matrix product says about a pair of rows, seen from the row that keeps the list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// The other row.
    pub(super) row: u32,
    /// Where it lies in what is being scanned.
    pub(super) position: u32,
    /// The product of the two prepared rows.
    pub(super) dot: f32,
    /// The other row's [`Bounds`].
    pub(super) bounds: Bounds,
}

/// A row's share in the interval around the key of a pair.
///
/// For rows `x` and `y` the key lies in `[lower, lower + x.slack + y.slack]`, where
/// `lower = x.offset + y.offset - dot(x, y)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) offset: f32,
    pub(super) slack: f32,
}

/// A row that may be among the `k` nearest; its key lies in `[lower, upper]`.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// [`Pair::position`]; the row's number follows from it.
    position: u32,
    lower: f32,
    upper: f32,
}

/// The settings shared by all lists of a join.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    k: usize,
    /// Candidates a list holds before it must shrink.
    pub(super) capacity: usize,
    metric: Metric,
}

impl Limits {
    /// Room for as many candidates again as the list keeps, and at least this many, so that the cost of a shrink is
    /// spread over many insertions.
    const MIN_SPARE: usize = 32;

    pub(super) fn new(k: usize, metric: Metric) -> Self {
        Self {
            k,
            // A power of two, because the vector of candidates grows by doubling anyway.
            capacity: k
                .saturating_mul(2)
                .saturating_add(Self::MIN_SPARE)
                .checked_next_power_of_two()
                .unwrap_or(usize::MAX),
            metric,
        }
    }
}

/// The nearest rows of one query while the corpus is still being scanned.
///
/// Holds at most `k` neighbors and `capacity` candidates, whatever the corpus.
#[derive(Debug)]
pub(super) struct Shortlist {
    bounds: Bounds,
    /// The query's own row of the corpus, never its neighbor.
    excluded: Option<u32>,
    /// The `k`-th smallest key is not above this, so a pair whose lower bound is above it can be passed over.
    limit: f32,
    /// No row above this one can enter: the list is full of rows at the least possible distance, and ties go to the
    /// smaller row. Saves the exact distances among thousands of equal vectors.
    last_row: u32,
    candidates: Vec<Candidate>,
    /// Settled by exact distance, in order, at most `k`.
    neighbors: Vec<Neighbor>,
}

impl Shortlist {
    /// Room for more than this is taken when it is needed: there may be fewer rows than a caller asks for.
    const MOST_RESERVED: usize = 4096;

    /// Bytes of a list that is full.
    pub(super) fn max_bytes(k: usize) -> usize {
        let capacity = Limits::new(k, Metric::Cosine).capacity;
        // The neighbors are in the lists, and once more in the result that is made of them.
        size_of::<Self>()
            .saturating_add(capacity.saturating_mul(size_of::<Candidate>()))
            .saturating_add(k.saturating_mul(2 * size_of::<Neighbor>()))
    }

    /// An empty list with all the room that it may take. Lists are made by one thread and filled by others: allocators keep what a thread
    /// allocates for that thread, so lists that grew as they are filled would take their room once for each.
    pub(super) fn new(limits: Limits, bounds: Bounds, excluded: Option<u32>) -> Self {
        Self {
            bounds,
            excluded,
            // Finite, so that the infinite offset of an unusable row stays above it.
            limit: f32::MAX,
            last_row: u32::MAX,
            candidates: Vec::with_capacity(limits.capacity.min(Self::MOST_RESERVED)),
            neighbors: Vec::with_capacity(limits.k.min(Self::MOST_RESERVED)),
        }
    }

    /// Takes over what was found before, as if it had been settled here.
    fn continuing(mut self, limits: Limits, found: &[Neighbor]) -> Self {
        self.keep_nearest(limits, found.to_vec());
        self
    }

    /// A pair matters only if `dot - other.offset` reaches this.
    pub(super) fn threshold(&self) -> f32 {
        self.bounds.offset - self.limit
    }

    /// Lowers the limit before so many pairs are taken that most would be dropped again: `reached(n)` is a value of
    /// `dot - other.offset` that `n` of them reach, and `max_slack` no less than the slack of any.
    pub(super) fn narrow(&mut self, limits: Limits, max_slack: f32, reached: impl FnOnce(usize) -> Option<f32>) {
        // One of them may be the query itself.
        let needed = limits.k.saturating_add(usize::from(self.excluded.is_some()));
        if let Some(reached) = reached(needed) {
            self.limit = self.limit.min(self.bounds.offset - reached + (self.bounds.slack + max_slack));
        }
    }

    /// Takes a pair that reached the threshold, and returns whether the threshold may have risen. `neighbor(position)`
    /// is asked only when the list is full of candidates that the products alone cannot tell apart.
    pub(super) fn offer(&mut self, limits: Limits, pair: Pair, neighbor: impl Fn(u32) -> Neighbor) -> bool {
        if self.excluded == Some(pair.row) || pair.row > self.last_row {
            return false;
        }
        let lower = self.bounds.offset + pair.bounds.offset - pair.dot;
        // The limit may have come down since the threshold was read.
        if lower > self.limit {
            return false;
        }
        let upper = lower + (self.bounds.slack + pair.bounds.slack);
        self.candidates.push(Candidate { position: pair.position, lower, upper });
        if self.candidates.len() < limits.capacity {
            return false;
        }
        self.shrink(limits);
        // Close to full again: shrinking would come too often to be worth it.
        if self.candidates.len() > limits.capacity / 4 * 3 {
            self.settle(limits, neighbor);
        }
        true
    }

    /// Drops the candidates that `k` others are certainly nearer than.
    fn shrink(&mut self, limits: Limits) {
        if let Some(kth) = limits.k.checked_sub(1)
            && kth < self.candidates.len()
        {
            let (_, kth, _) = self.candidates.select_nth_unstable_by(kth, |a, b| a.upper.total_cmp(&b.upper));
            self.limit = self.limit.min(kth.upper);
        }
        let limit = self.limit;
        self.candidates.retain(|candidate| candidate.lower <= limit);
    }

    /// Replaces the candidates by the neighbors among them.
    pub(super) fn settle(&mut self, limits: Limits, neighbor: impl Fn(u32) -> Neighbor) {
        self.shrink(limits);
        if !self.candidates.is_empty() {
            let mut found = self.neighbors.clone();
            found.extend(self.candidates.drain(..).map(|candidate| neighbor(candidate.position)));
            self.keep_nearest(limits, found);
        }
    }

    /// Keeps the nearest in order, and lets nothing in any more that they keep out.
    fn keep_nearest(&mut self, limits: Limits, mut found: Vec<Neighbor>) {
        found.sort_unstable_by(|a, b| a.order(*b));
        found.truncate(limits.k);
        self.neighbors.clear();
        self.neighbors.extend_from_slice(&found);
        if self.neighbors.len() == limits.k
            && let Some(farthest) = self.neighbors.last()
        {
            self.limit = self.limit.min(limits.metric.key(farthest.distance));
            if farthest.distance <= limits.metric.least_distance() {
                self.last_row = farthest.row;
            }
        }
    }

    /// The settled neighbors; candidates not yet settled are lost.
    pub(super) fn into_neighbors(self) -> Vec<Neighbor> {
        self.neighbors
    }
}

/// The lists of a block of consecutive queries.
#[derive(Debug)]
pub(super) struct ShortlistBlock {
    limits: Limits,
    first_query: usize,
    lists: Vec<Shortlist>,
    /// [`Shortlist::threshold`] of each list, side by side so that a scan can compare many at once.
    thresholds: Vec<f32>,
}

impl ShortlistBlock {
    /// One empty list for each query, with the query's bounds and the row it must not find.
    pub(super) fn new(
        limits: Limits,
        first_query: usize,
        queries: impl IntoIterator<Item = (Bounds, Option<u32>)>,
    ) -> Self {
        let lists: Vec<_> =
            queries.into_iter().map(|(bounds, excluded)| Shortlist::new(limits, bounds, excluded)).collect();
        let thresholds = lists.iter().map(Shortlist::threshold).collect();
        Self { limits, first_query, lists, thresholds }
    }

    /// The same with what was found before: one list for each query of the block.
    pub(super) fn continuing<'f>(self, found: impl IntoIterator<Item = &'f [Neighbor]>) -> Self {
        let Self { limits, first_query, lists, .. } = self;
        let lists: Vec<_> = lists.into_iter().zip(found).map(|(list, found)| list.continuing(limits, found)).collect();
        let thresholds = lists.iter().map(Shortlist::threshold).collect();
        Self { limits, first_query, lists, thresholds }
    }

    /// Index of the first query of the block.
    pub(super) fn first_query(&self) -> usize {
        self.first_query
    }

    /// Number of queries in the block.
    pub(super) fn len(&self) -> usize {
        self.lists.len()
    }

    /// For each query `q` of the block the threshold of its list: a pair matters only if
    /// `dot - other.offset >= threshold[q]`, or equally `dot - threshold[q] >= other.offset`.
    pub(super) fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Changes one list; `index` counts within the block.
    pub(super) fn change(&mut self, index: usize, change: impl FnOnce(&mut Shortlist, Limits)) {
        change(&mut self.lists[index], self.limits);
        self.thresholds[index] = self.lists[index].threshold();
    }

    /// Takes a pair that reached the threshold. `index` counts within the block; for `neighbor(query, position)` see
    /// [`Shortlist::offer`].
    pub(super) fn offer(&mut self, index: usize, pair: Pair, neighbor: impl Fn(usize, u32) -> Neighbor) {
        let query = self.first_query + index;
        if self.lists[index].offer(self.limits, pair, |position| neighbor(query, position)) {
            self.thresholds[index] = self.lists[index].threshold();
        }
    }

    /// Settles all candidates of the block by their exact distance.
    pub(super) fn settle(&mut self, neighbor: impl Fn(usize, u32) -> Neighbor) {
        for (index, list) in self.lists.iter_mut().enumerate() {
            let query = self.first_query + index;
            list.settle(self.limits, |position| neighbor(query, position));
            self.thresholds[index] = list.threshold();
        }
    }

    /// The settled lists; candidates not yet settled are lost.
    pub(super) fn into_lists(self) -> impl Iterator<Item = Vec<Neighbor>> {
        self.lists.into_iter().map(Shortlist::into_neighbors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block of one query at zero bounds, offered rows whose products say the distance is `approximate(row)`.
    fn collect(
        k: usize,
        metric: Metric,
        rows: impl Iterator<Item = u32>,
        slack: f32,
        approximate: impl Fn(u32) -> f32,
        exact: impl Fn(u32) -> f32,
    ) -> Vec<u32> {
        let own = Bounds { offset: 0.0, slack: 0.0 };
        let limits = Limits::new(k, metric);
        let mut block = ShortlistBlock::new(limits, 0, [(own, Some(7))]);
        let neighbor = |_: usize, position: u32| Neighbor { row: position - 1, distance: exact(position - 1) };
        for row in rows {
            let bounds = Bounds { offset: 0.0, slack };
            let pair = Pair { row, position: row + 1, dot: -approximate(row), bounds };
            if pair.dot - bounds.offset >= block.thresholds()[0] {
                block.offer(0, pair, neighbor);
            }
            assert!(block.lists[0].candidates.len() < limits.capacity);
        }
        block.settle(neighbor);
        let lists: Vec<_> = block.into_lists().collect();
        lists[0].iter().map(|neighbor| neighbor.row).collect()
    }

    #[test]
    fn candidates_that_products_cannot_tell_apart_are_settled_by_exact_distance() {
        let exact = |row: u32| (row.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-9;
        let mut expected: Vec<u32> = (0..5000).filter(|&row| row != 7).collect();
        expected.sort_by(|&a, &b| exact(a).total_cmp(&exact(b)));
        expected.truncate(10);
        for metric in [Metric::Cosine, Metric::InnerProduct] {
            let forward = collect(10, metric, 0..5000, 1.0, |_| 0.0, exact);
            assert_eq!(forward, expected);
            let backward = collect(10, metric, (0..5000).rev(), 1.0, |_| 0.0, exact);
            assert_eq!(backward, expected);
        }
    }

    #[test]
    fn a_tie_goes_to_the_smaller_row_whatever_came_first() {
        for metric in [Metric::Cosine, Metric::InnerProduct] {
            for distance in [0.0, 0.5] {
                let exact = |_| distance;
                let forward = collect(3, metric, 5..900, 1e-6, exact, exact);
                assert_eq!(forward, [5, 6, 8]);
                let backward = collect(3, metric, (5..900).rev(), 1e-6, exact, exact);
                assert_eq!(backward, [5, 6, 8]);
            }
        }
    }

    #[test]
    fn candidates_certainly_farther_than_k_others_cost_no_exact_distance() {
        let num_asked = std::cell::Cell::new(0);
        let exact = |row: u32| {
            num_asked.set(num_asked.get() + 1);
            row as f32
        };
        let approximate = |row: u32| row as f32;
        let nearest = collect(2, Metric::InnerProduct, (0..1000).rev(), 0.5, approximate, exact);
        assert_eq!(nearest, [0, 1]);
        assert_eq!(num_asked.get(), 2);
    }

    #[test]
    fn lists_are_found_by_query() {
        let near = Neighbor { row: 4, distance: 0.25 };
        let far = Neighbor { row: 1, distance: 0.5 };
        let lists = NeighborLists::new(2, [vec![near, far], vec![], vec![far]]);
        assert_eq!(lists.k(), 2);
        assert_eq!(lists.num_queries(), 3);
        assert_eq!(lists.get(0), Some(&[near, far][..]));
        assert_eq!(lists.get(1), Some(&[][..]));
        assert_eq!(lists.get(2), Some(&[far][..]));
        assert_eq!(lists.get(3), None);
        let all: Vec<_> = lists.iter().collect();
        assert_eq!(all, [&[near, far][..], &[], &[far]]);
    }
}
