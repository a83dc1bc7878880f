//! Searches that hold as much of the corpus as `execution.memory_limit` allows, and stream the rest.
//!
//! The vectors whose neighbors are sought are the ones held; those that are searched stream past them, once for each chunk of the
//! former. Where everything fits, the exact search is one self-join, which multiplies every pair of blocks once.

use std::num::NonZeroU64;
use std::ops::Range;

use ndarray::{ArrayView2, Axis};
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};

use super::cells::Codebook;
use super::{Found, Quality};
use crate::config::Neighbors;
use crate::context::Context;
use crate::corpus::{Block, Corpus};
use crate::error::Error;
use crate::neighbors::cells::{CellJoin, Probes, RecallByProbes, recall_by_probes};
use crate::neighbors::exact::{Metric, QueryJoin, bytes_per_query, self_join_telling};
use crate::neighbors::topk::{Neighbor, NeighborLists};

/// Fewest rows of a chunk. With fewer, reading the corpus would take longer than comparing with it.
const MIN_CHUNK_ROWS: usize = 1024;

/// Rows by which the recall of a search by cells is measured, and as many others by which the number of cells is chosen. The standard
/// error of a recall of 0.99 over ten neighbors of each is then about a thousandth.
pub(super) const SAMPLE_ROWS: usize = 1000;

/// Name under which a search shows how far it has come.
pub(super) const STAGE: &str = "neighbors";

/// What a search needs to know.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    /// The process.
    pub context: &'a Context,
    /// `execution.memory_limit`.
    pub memory_limit: NonZeroU64,
    /// Distance between embeddings.
    pub metric: Metric,
    /// Neighbors of each row.
    pub k: usize,
}

/// The rows of a table that a search asks for, and the rows that it searches.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    /// The rows asked for.
    pub queries: &'a Corpus,
    /// The rows searched.
    pub corpus: &'a Corpus,
}

/// Where lists go.
pub trait Sink {
    /// The positions of the rows whose lists are asked for.
    fn due(&self, queries: &Corpus) -> Vec<Range<usize>>;

    /// Takes the lists of the rows at some positions, which come in ascending order from call to call.
    fn take<'l>(
        &mut self,
        sides: Sides<'_>,
        positions: &[Range<usize>],
        list: impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<(), Error>;
}

/// Finds the neighbors of the rows that are due among all rows of the corpus.
pub(super) fn exact(search: Search<'_>, corpus: &Corpus, output: &mut impl Sink) -> Result<Found, Error> {
    let due = output.due(corpus);
    let num_due: usize = due.iter().map(ExactSizeIterator::len).sum();
    let per_row = bytes_per_query(corpus.dim(), search.k);
    let fits = budget(search, &[corpus]).is_some_and(|budget| corpus.len().saturating_mul(per_row) <= budget);
    // The self-join does half of the products, and for all rows.
    if fits && num_due.saturating_mul(2) > corpus.len() {
        let lists = join_all(search, corpus)?;
        let sides = Sides { queries: corpus, corpus };
        output.take(sides, &due, |position| {
            corpus.number_at(position).and_then(|number| lists.get(number as usize)).unwrap_or_default()
        })?;
        return Ok(Found::exact(corpus.len()));
    }
    between_chunks(search, Sides { queries: corpus, corpus }, true, &due, output)
}

fn join_all(search: Search<'_>, corpus: &Corpus) -> Result<NeighborLists, Error> {
    let dim = corpus.dim();
    // In the order of the numbers, so that ties go by id.
    let mut vectors = vec![0.0_f32; corpus.len() * dim];
    for block in corpus.stream(search.context, &[corpus.all()]) {
        let block = block?;
        for (row, vector) in block.vectors()?.rows().into_iter().enumerate() {
            let Some(number) = corpus.number_at(block.positions[row] as usize) else { continue };
            let start = number as usize * dim;
            vectors[start..start + dim].iter_mut().zip(vector).for_each(|(to, from)| *to = *from);
        }
    }
    let view = ArrayView2::from_shape((corpus.len(), dim), &vectors).map_err(crate::corpus::shape_error)?;
    let progress = search.context.progress(STAGE, Some(corpus.len() as u64));
    let lists = self_join_telling(&view, search.metric, search.k, &|done, of| progress.reach(done, of))?;
    progress.finish();
    Ok(lists)
}

/// Finds the neighbors of the rows of one table among those of another.
pub fn between(search: Search<'_>, sides: Sides<'_>, output: &mut impl Sink) -> Result<Found, Error> {
    let due = output.due(sides.queries);
    between_chunks(search, sides, false, &due, output)
}

fn between_chunks(
    search: Search<'_>,
    sides: Sides<'_>,
    is_self: bool,
    due: &[Range<usize>],
    output: &mut impl Sink,
) -> Result<Found, Error> {
    let both = [sides.queries, sides.corpus];
    let held = if is_self { &both[..1] } else { &both[..] };
    let per_row = bytes_per_query(sides.queries.dim(), search.k);
    let room = room(search, held, per_row)?;
    let num_due: usize = due.iter().map(ExactSizeIterator::len).sum();
    let progress = search.context.progress(STAGE, Some(num_due as u64));
    let chunks = chunks(due, room);
    for (number, chunk) in chunks.iter().enumerate() {
        let block = sides.queries.load(search.context, chunk)?;
        let own_rows = own_rows(sides.queries, &block, is_self);
        let mut join = QueryJoin::excluding(&block.vectors()?, search.metric, search.k, &own_rows)?;
        push_all(search, sides.corpus, &[sides.corpus.all()], &mut join, |done, of| {
            progress.reach(number * of + done, chunks.len() * of);
        })?;
        let lists = join.finish();
        output.take(sides, chunk, |position| list_at(&block, &lists, position))?;
    }
    progress.finish();
    Ok(Found::exact(num_due))
}

/// Compares the queries of a join with the rows at some positions, and tells how many of all rows of the corpus have been.
pub(super) fn push_all(
    search: Search<'_>,
    corpus: &Corpus,
    positions: &[Range<usize>],
    join: &mut QueryJoin<'_>,
    tell: impl Fn(usize, usize),
) -> Result<(), Error> {
    let mut num_done = 0;
    for block in corpus.stream(search.context, positions) {
        let block = block?;
        join.push(&block.vectors()?, &numbers(corpus, &block.positions))?;
        num_done += block.positions.len();
        tell(num_done, corpus.len());
    }
    Ok(())
}

/// The list of the row at a position, of those of a block.
pub(super) fn list_at<'l>(block: &Block, lists: &'l NeighborLists, position: usize) -> &'l [Neighbor] {
    let row = u32::try_from(position).ok().and_then(|position| block.positions.binary_search(&position).ok());
    row.and_then(|row| lists.get(row)).unwrap_or_default()
}

/// The numbers of rows with vectors.
pub(super) fn numbers(corpus: &Corpus, positions: &[u32]) -> Vec<u32> {
    positions.iter().filter_map(|position| corpus.number_at(*position as usize)).collect()
}

/// What each query of a block must not find: itself, where it is searched too.
pub(super) fn own_rows(queries: &Corpus, block: &Block, is_self: bool) -> Vec<Option<u32>> {
    let own = |position: &u32| queries.number_at(*position as usize).filter(|_| is_self);
    block.positions.iter().map(own).collect()
}

/// Bytes left for queries beside what the corpora hold and a stream takes; `None` where there are none.
pub(super) fn budget(search: Search<'_>, held: &[&Corpus]) -> Option<usize> {
    let limit = usize::try_from(search.memory_limit.get()).unwrap_or(usize::MAX);
    let ids: usize = held.iter().map(|corpus| corpus.bytes()).sum();
    let stream = held.iter().map(|corpus| corpus.stream_bytes()).max().unwrap_or(0);
    limit.checked_sub(ids)?.checked_sub(stream)
}

/// Queries that can be held at a time.
pub(super) fn room(search: Search<'_>, held: &[&Corpus], per_row: usize) -> Result<usize, Error> {
    let room = budget(search, held).unwrap_or(0) / per_row.max(1);
    let most: usize = held.first().map_or(0, |queries| queries.len());
    if room >= MIN_CHUNK_ROWS.min(most) {
        return Ok(room.max(1));
    }
    let limit = search.memory_limit.get();
    let others = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(budget(search, held).unwrap_or(0));
    let ids: usize = held.iter().map(|corpus| corpus.bytes() + corpus.stream_bytes()).sum();
    Err(Error::MemoryLimit { limit, needed: (others.min(ids) + MIN_CHUNK_ROWS * per_row) as u64 })
}

/// Cuts ranges into chunks of at most `room` positions.
pub(super) fn chunks(ranges: &[Range<usize>], room: usize) -> Vec<Vec<Range<usize>>> {
    let mut chunks: Vec<Vec<Range<usize>>> = Vec::new();
    let mut left = 0;
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            if left == 0 {
                chunks.push(Vec::new());
                left = room;
            }
            let end = range.end.min(start + left);
            left -= end - start;
            if let Some(chunk) = chunks.last_mut() {
                chunk.push(start..end);
            }
            start = end;
        }
    }
    chunks
}

/// Finds the neighbors of the rows that are due among the rows of the cells nearest to each.
pub(super) fn by_cells(
    search: Search<'_>,
    settings: &Neighbors,
    corpus: &Corpus,
    codebook: &Codebook,
    output: &mut impl Sink,
) -> Result<Found, Error> {
    let cells = &codebook.cells;
    let (nprobe, recall) = measure(search, settings, corpus, codebook)?;
    let k = search.k;
    let centroids = cells.len() * cells.dim() * size_of::<f32>() * 2;
    let per_row = bytes_per_query(corpus.dim(), k) + nprobe * size_of::<u32>() * 2;
    let room = room(search, &[corpus], per_row)?.saturating_sub(centroids / per_row).max(1);
    let sides = Sides { queries: corpus, corpus };
    let due = output.due(corpus);
    let num_due: usize = due.iter().map(ExactSizeIterator::len).sum();
    let progress = search.context.progress(STAGE, Some(num_due as u64));
    let chunks = chunks(&due, room);
    for (number, chunk) in chunks.iter().enumerate() {
        let block = corpus.load(search.context, chunk)?;
        let vectors = block.vectors()?;
        let own_rows = own_rows(corpus, &block, true);
        let probes = cells.nearest(&vectors, nprobe)?;
        let lists = probe(search, corpus, &vectors, &own_rows, &probes, |done, of| {
            progress.reach(number * of + done, chunks.len() * of);
        })?;
        output.take(sides, chunk, |position| list_at(&block, &lists, position))?;
    }
    progress.finish();
    let quality = Quality { cells: Some((cells.len(), nprobe)), recall };
    Ok(Found { quality, rows_searched: num_due as u64 })
}

/// Compares queries with the rows of the cells that each of them probes, and tells how many of these rows have been.
pub(super) fn probe(
    search: Search<'_>,
    corpus: &Corpus,
    queries: &ArrayView2<'_, f32>,
    own_rows: &[Option<u32>],
    probes: &Probes,
    tell: impl Fn(usize, usize),
) -> Result<NeighborLists, Error> {
    let join = CellJoin::new(queries, search.metric, search.k, own_rows, probes)?;
    let positions = corpus.positions_in(&join.cells());
    let num_searched: usize = positions.iter().map(ExactSizeIterator::len).sum();
    let mut num_done = 0;
    for searched in corpus.stream(search.context, &positions) {
        let searched = searched?;
        corpus.by_cell(&searched.positions).into_par_iter().try_for_each(|(cell, rows)| -> Result<(), Error> {
            let numbers = numbers(corpus, &searched.positions[rows.clone()]);
            Ok(join.push(cell, &searched.rows(rows)?, &numbers)?)
        })?;
        num_done += searched.positions.len();
        tell(num_done, num_searched);
    }
    Ok(join.finish())
}

/// Chooses how many cells to search by the exact neighbors of some rows, and measures the recall on those of others.
pub(super) fn measure(
    search: Search<'_>,
    settings: &Neighbors,
    corpus: &Corpus,
    codebook: &Codebook,
) -> Result<(usize, f64), Error> {
    let sample = sample(corpus, 2 * SAMPLE_ROWS);
    let block = corpus.load(search.context, &sample)?;
    let vectors = block.vectors()?;
    let own_rows = own_rows(corpus, &block, true);
    let mut join = QueryJoin::excluding(&vectors, search.metric, search.k, &own_rows)?;
    push_all(search, corpus, &[corpus.all()], &mut join, |_, _| {})?;
    let lists = join.finish();
    let num_cells = codebook.cells.len();
    let recall = |parity: usize| -> Result<RecallByProbes, Error> {
        let rows: Vec<usize> = (0..block.positions.len()).filter(|row| row % 2 == parity).collect();
        let truth = rows.iter().map(|row| lists.get(*row).unwrap_or_default().to_vec());
        let truth = NeighborLists::new(search.k, truth);
        let orders = codebook.cells.nearest(&vectors.select(Axis(0), &rows).view(), num_cells)?;
        Ok(recall_by_probes(&truth, &orders, num_cells, |number| corpus.cell_at(corpus.position(number))))
    };
    let nprobe = match settings.nprobe {
        Some(nprobe) => nprobe.get(),
        None => recall(0)?.fewest_probes(settings.recall),
    };
    let nprobe = nprobe.min(num_cells);
    Ok((nprobe, recall(1)?.recall(nprobe)))
}

/// At most `most` rows with vectors, evenly spaced in the order of the ids, as ascending ranges of positions.
pub(super) fn sample(corpus: &Corpus, most: usize) -> Vec<Range<usize>> {
    let num_rows = corpus.len().min(most);
    let mut positions: Vec<usize> = (0..num_rows)
        .filter_map(|place| u32::try_from(place * corpus.len() / num_rows).ok())
        .map(|number| corpus.position(number))
        .collect();
    positions.sort_unstable();
    positions.into_iter().map(|position| position..position + 1).collect()
}
