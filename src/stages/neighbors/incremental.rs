//! A few partitions have changed: their rows are compared with everything, and everything else with them alone.
//!
//! The lists that are live were right for the latents of a record ([`Searched`]). A list of a row that is still there is right again once
//!
//! - neighbors in partitions that were replaced or removed are taken out. If the list was full, a row farther than its last one may now
//!   belong to it, and only a comparison with everything tells which: the row is **sought anew**. A list that was not full held every row
//!   that there was, and is right without them;
//! - the rows of added and replaced partitions are **offered** to it.
//!
//! The result is that of searching everything anew, list for list.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::Float32Type;
use futures::TryStreamExt as _;

use super::output::Output;
use super::search::{STAGE, Sides, Sink as _, budget, list_at, numbers, own_rows, push_all};
use super::searched::Searched;
use super::{Found, Plan};
use crate::corpus::{Block, Corpus};
use crate::error::Error;
use crate::neighbors::exact::{QueryJoin, bytes_per_query};
use crate::neighbors::topk::{Neighbor, NeighborLists};
use crate::schema::column;
use crate::stages::Job;
use crate::table::Live;

/// Rows to be sought anew, as a part of all: with more, comparing everything with everything costs less, as it multiplies every pair once.
const LARGEST_SHARE: usize = 4;

/// Rows of `neighbors` read at a time.
const BATCH_ROWS: usize = 65_536;

/// Brings the lists that are live up to date, if it can: with no record to start from, or with too much changed, everything is to be
/// searched.
pub(super) fn patch(
    job: &Job<'_>,
    plan: &Plan<'_>,
    corpus: &Corpus,
    live: &Live,
    output: &mut Output<'_, '_>,
) -> Result<Option<Found>, Error> {
    let Some(base) = Searched::base(job, plan, live)? else { return Ok(None) };
    let search = plan.search(job);
    let patch = Patch::new(job, plan, corpus, live, &base, output);
    let Some(lost) = patch.lost_rows()? else { return Ok(None) };
    let anew = patch.positions_anew(&lost);
    let num_anew: usize = anew.iter().map(ExactSizeIterator::len).sum();
    let num_offered: usize = patch.offered.iter().map(ExactSizeIterator::len).sum();
    let vector_bytes = 2 * corpus.dim() * size_of::<f32>();
    let bytes = num_anew * bytes_per_query(corpus.dim(), plan.settings.k.get()) + num_offered * vector_bytes;
    // Half of what is allowed; the lists of one partition take the rest.
    let fits = budget(search, &[corpus]).is_some_and(|budget| bytes <= budget / 2);
    if !fits || num_anew.saturating_mul(LARGEST_SHARE) > corpus.len() {
        return Ok(None);
    }
    tracing::debug!(rows = num_anew, of = corpus.len(), "comparing what has changed with everything");
    let block = corpus.load(job.context, &anew)?;
    let mut join = QueryJoin::excluding(
        &block.vectors()?,
        plan.settings.metric,
        plan.settings.k.get(),
        &own_rows(corpus, &block, true),
    )?;
    let progress = job.context.progress(STAGE, Some(num_anew as u64));
    push_all(search, corpus, &[corpus.all()], &mut join, |done, of| progress.reach(done, of))?;
    progress.finish();
    let lists = join.finish();
    let offered = corpus.load(job.context, &patch.offered)?;
    for (number, partition) in corpus.partitions().iter().enumerate() {
        let positions = corpus.positions_of(number);
        let sides = Sides { queries: corpus, corpus };
        if patch.kept.contains(&number) {
            let patched = patch.patched(number, &offered, |position| {
                lost.contains(&position).then(|| list_at(&block, &lists, position).to_vec())
            })?;
            output.take(sides, std::slice::from_ref(&positions), |position| &patched[position - positions.start])?;
        } else if output.is_due(partition) {
            output.take(sides, std::slice::from_ref(&positions), |position| list_at(&block, &lists, position))?;
        }
    }
    Ok(Some(Found::exact(num_anew)))
}

/// What has changed since a record was made.
struct Patch<'a, 'j> {
    job: &'a Job<'j>,
    plan: &'a Plan<'a>,
    corpus: &'a Corpus,
    live: &'a Live,
    /// Partitions whose lists are patched, by their places in the corpus.
    kept: HashSet<usize>,
    /// Partitions whose rows are all sought anew.
    anew: Vec<usize>,
    /// Positions of the rows that the record's lists do not know.
    offered: Vec<Range<usize>>,
    /// Places of partitions by their names, as `neighbors` has them.
    places: HashMap<String, usize>,
    /// Places of those whose rows the record's lists know and that are still the same.
    same: HashSet<usize>,
}

impl<'a, 'j> Patch<'a, 'j> {
    fn new(
        job: &'a Job<'j>,
        plan: &'a Plan<'a>,
        corpus: &'a Corpus,
        live: &'a Live,
        base: &Searched,
        output: &Output<'_, '_>,
    ) -> Self {
        let (mut kept, mut anew, mut offered, mut same) = (HashSet::new(), Vec::new(), Vec::new(), HashSet::new());
        let mut places = HashMap::new();
        for (number, partition) in corpus.partitions().iter().enumerate() {
            places.insert(partition.to_string(), number);
            let is_same = base.latents_of(partition) == plan.latents.run_of(partition);
            if is_same {
                same.insert(number);
            } else {
                offered.push(corpus.positions_of(number));
            }
            if output.is_due(partition) {
                let is_listed = live.run_of(partition).is_some() && live.run_of(partition) == base.run_of(partition);
                if is_same && is_listed {
                    kept.insert(number);
                } else {
                    anew.push(number);
                }
            }
        }
        Self { job, plan, corpus, live, kept, anew, offered, places, same }
    }

    fn positions_anew(&self, lost: &HashSet<usize>) -> Vec<Range<usize>> {
        let mut positions: Vec<Range<usize>> =
            self.anew.iter().map(|number| self.corpus.positions_of(*number)).collect();
        positions.extend(lost.iter().map(|position| *position..position + 1));
        positions.sort_unstable_by_key(|range| range.start);
        positions
    }

    /// The positions of rows with a full list that has lost a neighbor; `None` where the lists do not fit the latents.
    fn lost_rows(&self) -> Result<Option<HashSet<usize>>, Error> {
        let mut lost = HashSet::new();
        for number in &self.kept {
            let fits = self.each_list(*number, |position, list, num_stale| {
                if num_stale > 0 && list.len() + num_stale >= self.plan.settings.k.get() {
                    lost.insert(position);
                }
            })?;
            if !fits {
                return Ok(None);
            }
        }
        Ok(Some(lost))
    }

    /// Reads the live lists of a partition: the position of each row that has one, its neighbors that are still there, and how many are
    /// not. Returns whether all of these rows are in the corpus.
    fn each_list(&self, number: usize, mut take: impl FnMut(usize, Vec<Neighbor>, usize)) -> Result<bool, Error> {
        let columns = [column::IMAGE_ID, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];
        let partition = &self.corpus.partitions()[number];
        let mut current: Option<(String, Vec<Neighbor>, usize)> = None;
        let mut fits = true;
        let mut end = |(id, list, num_stale): (String, Vec<Neighbor>, usize)| {
            let row = self.corpus.find(&id, number);
            fits &= row.is_some();
            if let Some(row) = row {
                take(self.corpus.position(row), list, num_stale);
            }
        };
        let mut are_known = true;
        let mut take_batch = |batch: &RecordBatch| {
            let (ids, near_ids) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
            let distances = batch.column(2).as_primitive::<Float32Type>();
            let near_partitions = batch.column(3).as_string::<i32>();
            for row in 0..batch.num_rows() {
                if current.as_ref().is_none_or(|(id, ..)| id != ids.value(row)) {
                    let next = (ids.value(row).to_owned(), Vec::new(), 0);
                    if let Some(done) = current.replace(next) {
                        end(done);
                    }
                }
                let Some((_, list, num_stale)) = &mut current else { continue };
                let name = if near_partitions.is_valid(row) { near_partitions.value(row) } else { "" };
                match self.places.get(name).filter(|place| self.same.contains(place)) {
                    Some(place) => match self.corpus.find(near_ids.value(row), *place) {
                        Some(near) => list.push(Neighbor { row: near, distance: distances.value(row) }),
                        None => are_known = false,
                    },
                    None => *num_stale += 1,
                }
            }
        };
        let neighbors = &self.job.neighbors;
        for file in self.live.of(partition) {
            self.job.context.block_on(async {
                let mut batches = neighbors.scan(file, &columns, None, BATCH_ROWS).await?;
                while let Some(batch) = batches.try_next().await? {
                    take_batch(&batch);
                }
                Ok::<_, Error>(())
            })?;
        }
        if let Some(done) = current {
            end(done);
        }
        Ok(fits && are_known)
    }

    /// The lists of all rows of a partition: those that `lost` has, and the live ones with the offered rows in their places.
    fn patched(
        &self,
        number: usize,
        offered: &Block,
        lost: impl Fn(usize) -> Option<Vec<Neighbor>>,
    ) -> Result<Vec<Vec<Neighbor>>, Error> {
        let positions = self.corpus.positions_of(number);
        let mut lists: Vec<Vec<Neighbor>> = vec![Vec::new(); positions.len()];
        self.each_list(number, |position, list, _| {
            lists[position - positions.start] = list;
        })?;
        if !offered.positions.is_empty() {
            let offered_numbers = numbers(self.corpus, &offered.positions);
            let (metric, k) = (self.plan.settings.metric, self.plan.settings.k.get());
            for block in self.corpus.stream(self.job.context, std::slice::from_ref(&positions)) {
                let block = block?;
                let places = || block.positions.iter().map(|position| *position as usize - positions.start);
                let found = NeighborLists::new(k, places().map(|place| std::mem::take(&mut lists[place])));
                let own_rows = own_rows(self.corpus, &block, true);
                let mut join = QueryJoin::continuing(&block.vectors()?, metric, k, &own_rows, &found)?;
                join.push(&offered.vectors()?, &offered_numbers)?;
                for (place, list) in places().zip(join.finish().iter()) {
                    lists[place] = list.to_vec();
                }
            }
        }
        for (place, list) in lists.iter_mut().enumerate() {
            if let Some(anew) = lost(positions.start + place) {
                *list = anew;
            }
        }
        Ok(lists)
    }
}
