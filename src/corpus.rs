//! The vectors of a published `latents` table as a corpus to search.
//!
//! Ids are held in memory, vectors stream from the data files: however many there are, a search holds as many of them as it chooses.
//! Every row has a **position**, its place in the files one after the other, and every row with a vector has a **number**, its place
//! in the order of the ids (and partitions), so that ties between neighbors go by id whatever file a row lies in.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::{Float32Type, Int32Type};
use futures::channel::mpsc;
use futures::stream::BoxStream;
use futures::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use ndarray::{ArrayView2, ShapeError};
use rayon::slice::ParallelSliceMut as _;

use crate::context::Context;
use crate::error::Error;
use crate::neighbors::buckets::Bucket;
use crate::schema::{STATUS_OK, TableName, column};
use crate::source::PartitionValues;
use crate::table::{LiveFile, Table, TableError};

/// Bytes of vectors in one block of a stream, where memory allows: products of blocks of this size keep all cores busy.
const BLOCK_BYTES: usize = 8 << 20;

/// A block takes at most this part of the memory that may be held.
const BLOCK_SHARE: usize = 64;

/// Blocks that exist at a time while a stream is read: one in the reader, one in the channel, one at the search, and one again as Arrow
/// arrays.
const BLOCKS_IN_FLIGHT: usize = 4;

/// Files opened at a time, so that a table of many small ones is not read at one request a round trip.
const FILES_IN_FLIGHT: usize = 4;

/// Rows whose ids are read at a time, where not all of a file are.
const ID_ROWS: usize = 65_536;

/// In `Corpus::numbers`: the row has no vector.
const UNNUMBERED: u32 = u32::MAX;

/// All rows of some data files: what they are called, and where their vectors are.
#[derive(Debug)]
pub struct Corpus {
    table: Table,
    files: Vec<CorpusFile>,
    partitions: Vec<PartitionValues>,
    /// Ids of all rows by position, one after the other, and where each ends.
    ids: String,
    id_ends: Vec<usize>,
    /// By position.
    numbers: Vec<u32>,
    /// By number.
    positions: Vec<u32>,
    dim: usize,
    block_bytes: usize,
}

#[derive(Debug)]
struct CorpusFile {
    live: LiveFile,
    partition: usize,
    /// Rows of the partition in the files before.
    rows_before: u64,
    positions: Range<usize>,
    /// The row of the file at the first position.
    first_row: usize,
    /// Rows of one cell after the other, where the file is sorted by cells: the cell and the position after its last row.
    cells: Vec<(Option<u32>, usize)>,
}

/// Consecutive vectors of a stream, ascending by position; rows without a vector are left out.
#[derive(Debug)]
pub struct Block {
    /// Position of each vector.
    pub positions: Vec<u32>,
    /// The vectors, row-major.
    values: Vec<f32>,
    dim: usize,
}

impl Block {
    /// The vectors, one a row.
    pub fn vectors(&self) -> Result<ArrayView2<'_, f32>, Error> {
        self.rows(0..self.positions.len())
    }

    /// Some of the vectors, by their place in the block.
    pub fn rows(&self, rows: Range<usize>) -> Result<ArrayView2<'_, f32>, Error> {
        let values = &self.values[rows.start * self.dim..rows.end * self.dim];
        ArrayView2::from_shape((rows.len(), self.dim), values).map_err(shape_error)
    }
}

/// A stream of blocks, read ahead by the threads for input and output.
pub struct Blocks<'a> {
    context: &'a Context,
    receiver: mpsc::Receiver<Result<Block, TableError>>,
}

impl Iterator for Blocks<'_> {
    type Item = Result<Block, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Err(stopped) = self.context.stop.check() {
            return Some(Err(stopped));
        }
        Some(self.context.block_on(self.receiver.next())?.map_err(Error::from))
    }
}

impl Corpus {
    /// Reads the ids of all rows of `files`, and their cells if asked to. Partitions stand together in `files`. What a stream holds is
    /// chosen by `memory_limit`.
    pub fn read(
        context: &Context,
        table: &Table,
        files: Vec<LiveFile>,
        with_cells: bool,
        memory_limit: NonZeroU64,
    ) -> Result<Self, Error> {
        let mut corpus = Self::empty(table, memory_limit);
        let mut columns = vec![column::IMAGE_ID, column::STATUS];
        columns.extend(with_cells.then_some(column::CELL));
        context.block_on(async {
            let mut read = futures::stream::iter(files)
                .map(async |file| Ok::<_, TableError>((table.read(vec![file.clone()], &columns).await?, file)))
                .buffered(FILES_IN_FLIGHT);
            while let Some((batches, file)) = read.try_next().await? {
                corpus.take(&file, &batches)?;
            }
            Ok::<_, Error>(())
        })?;
        corpus.number();
        corpus.dim = corpus.find_dim(context)?;
        Ok(corpus)
    }

    /// Reads the ids of the rows of a bucket, of files that are sorted by cells. Partitions are those of all files.
    pub fn read_bucket(
        context: &Context,
        table: &Table,
        files: &[LiveFile],
        bucket: &Bucket,
        memory_limit: NonZeroU64,
    ) -> Result<Self, Error> {
        let mut corpus = Self::empty(table, memory_limit);
        // The rows of each cell in the files before: parts of a split cell are told by their places in all of it.
        let mut before: HashMap<u32, u64> = HashMap::new();
        context.block_on(async {
            let mut read = futures::stream::iter(files)
                .map(async |file| Ok::<_, TableError>((file, table.rows_of_cells(file, &bucket.cells).await?)))
                .buffered(FILES_IN_FLIGHT);
            while let Some((file, cells)) = read.try_next().await? {
                let mut rows = 0..0;
                let mut parts: Vec<(u32, usize)> = Vec::new();
                for (cell, of_cell) in cells {
                    let first = before.entry(cell).or_default();
                    let part = bucket.part_of(*first, of_cell.len() as u64);
                    *first += of_cell.len() as u64;
                    let [start, end] = [part.start, part.end].map(|row| usize::try_from(row).unwrap_or(usize::MAX));
                    if start < end {
                        // One after the other, as the file is sorted.
                        rows = if rows.is_empty() {
                            of_cell.start + start..of_cell.start + end
                        } else {
                            rows.start..of_cell.start + end
                        };
                        parts.push((cell, end - start));
                    }
                }
                corpus.take_part(file, rows, &parts).await?;
            }
            Ok::<_, Error>(())
        })?;
        corpus.number();
        corpus.dim = corpus.find_dim(context)?;
        Ok(corpus)
    }

    fn empty(table: &Table, memory_limit: NonZeroU64) -> Self {
        Self {
            table: table.clone(),
            files: Vec::new(),
            partitions: Vec::new(),
            ids: String::new(),
            id_ends: Vec::new(),
            numbers: Vec::new(),
            positions: Vec::new(),
            dim: 0,
            block_bytes: usize::try_from(memory_limit.get())
                .map_or(BLOCK_BYTES, |limit| (limit / BLOCK_SHARE).min(BLOCK_BYTES)),
        }
    }

    /// Takes some consecutive rows of a file, which all have a vector, with the number of rows of each cell.
    async fn take_part(&mut self, live: &LiveFile, rows: Range<usize>, cells: &[(u32, usize)]) -> Result<(), Error> {
        let first = self.id_ends.len();
        if !rows.is_empty() {
            let mut ids =
                self.table.scan(live, &[column::IMAGE_ID], Some(std::slice::from_ref(&rows)), ID_ROWS).await?;
            while let Some(batch) = ids.try_next().await? {
                for id in batch.column(0).as_string::<i32>().iter().flatten() {
                    self.ids.push_str(id);
                    self.id_ends.push(self.ids.len());
                    self.numbers.push(0);
                }
            }
        }
        let mut end = first;
        let cells = cells.iter().map(|(cell, num_rows)| {
            end += num_rows;
            (Some(*cell), end)
        });
        let cells = cells.collect();
        self.close_file(live, first, rows.start, cells)
    }

    /// Puts the rows that were taken since position `first` under their file.
    fn close_file(
        &mut self,
        live: &LiveFile,
        first: usize,
        first_row: usize,
        cells: Vec<(Option<u32>, usize)>,
    ) -> Result<(), Error> {
        if u32::try_from(self.id_ends.len()).is_err() {
            return Err(crate::neighbors::exact::JoinError::TooManyRows { num_rows: self.id_ends.len() }.into());
        }
        if self.partitions.last() != Some(&live.partition) {
            self.partitions.push(live.partition.clone());
        }
        let partition = self.partitions.len() - 1;
        let rows_before = self.files.last().filter(|file| file.partition == partition);
        let rows_before = rows_before.map_or(0, |file| file.rows_before + file.live.num_rows);
        let positions = first..self.id_ends.len();
        self.files.push(CorpusFile { live: live.clone(), partition, rows_before, positions, first_row, cells });
        Ok(())
    }

    fn take(&mut self, live: &LiveFile, batches: &[(LiveFile, RecordBatch)]) -> Result<(), Error> {
        let first = self.id_ends.len();
        let mut cells: Vec<(Option<u32>, usize)> = Vec::new();
        for (_, batch) in batches {
            let ids = batch.column(0).as_string::<i32>();
            let statuses = batch.column(1).as_string::<i32>();
            for row in 0..batch.num_rows() {
                self.ids.push_str(ids.value(row));
                self.id_ends.push(self.ids.len());
                let is_ok = statuses.value(row) == STATUS_OK;
                self.numbers.push(if is_ok { 0 } else { UNNUMBERED });
            }
            if let Some(column) = batch.columns().get(2) {
                let column = column.as_primitive::<Int32Type>();
                for (row, cell) in column.iter().enumerate() {
                    let cell = cell.and_then(|cell| u32::try_from(cell).ok());
                    let end = self.id_ends.len() - batch.num_rows() + row + 1;
                    match cells.last_mut() {
                        Some(last) if last.0 == cell => last.1 = end,
                        _ => cells.push((cell, end)),
                    }
                }
            }
        }
        self.close_file(live, first, 0, cells)
    }

    /// Numbers the rows that have a vector by id, then by partition.
    fn number(&mut self) {
        self.ids.shrink_to_fit();
        self.id_ends.shrink_to_fit();
        let with_vector = |position: &usize| self.numbers[*position] != UNNUMBERED;
        let mut positions: Vec<u32> =
            (0..self.numbers.len()).filter(with_vector).filter_map(|position| u32::try_from(position).ok()).collect();
        positions.par_sort_unstable_by(|a, b| {
            let (a, b) = (*a as usize, *b as usize);
            self.id_at(a).cmp(self.id_at(b)).then_with(|| self.partition_at(a).cmp(&self.partition_at(b)))
        });
        for (number, position) in (0..).zip(&positions) {
            self.numbers[*position as usize] = number;
        }
        self.positions = positions;
    }

    fn find_dim(&self, context: &Context) -> Result<usize, Error> {
        let Some(position) = self.positions.iter().min() else { return Ok(0) };
        let file = self.file_of(*position as usize);
        let row = *position as usize - file.positions.start + file.first_row;
        let batches: Vec<RecordBatch> = context.block_on(async {
            let row = row..row + 1;
            let row = std::slice::from_ref(&row);
            self.table.scan(&file.live, &[column::EMBEDDING], Some(row), 1).await?.try_collect().await
        })?;
        let lists = batches.first().map(|batch| batch.column(0).as_list::<i32>());
        Ok(lists.filter(|lists| lists.len() == 1).map_or(0, |lists| lists.value(0).len()))
    }

    /// Rows with a vector.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is nothing to search.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Values of a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The partitions, in the order of the files.
    pub fn partitions(&self) -> &[PartitionValues] {
        &self.partitions
    }

    /// The positions of a partition's rows, by the partition's place in [`Corpus::partitions`].
    pub fn positions_of(&self, partition: usize) -> Range<usize> {
        let mut files = self.files.iter().filter(|file| file.partition == partition);
        let first = files.next().map_or(0..0, |file| file.positions.clone());
        first.start..files.next_back().map_or(first.end, |file| file.positions.end)
    }

    /// All positions.
    pub fn all(&self) -> Range<usize> {
        0..self.numbers.len()
    }

    /// The number of the row at a position; `None` where it has no vector.
    pub fn number_at(&self, position: usize) -> Option<u32> {
        self.numbers.get(position).copied().filter(|number| *number != UNNUMBERED)
    }

    /// The position of a numbered row.
    pub fn position(&self, number: u32) -> usize {
        self.positions[number as usize] as usize
    }

    /// The id of the row at a position.
    pub fn id_at(&self, position: usize) -> &str {
        let start = position.checked_sub(1).map_or(0, |before| self.id_ends[before]);
        &self.ids[start..self.id_ends[position]]
    }

    /// The place of a row's partition in [`Corpus::partitions`].
    pub fn partition_at(&self, position: usize) -> usize {
        self.file_of(position).partition
    }

    /// The place of a row among those of its partition, in the order of the files.
    pub fn row_in_partition(&self, position: usize) -> u64 {
        let file = self.file_of(position);
        file.rows_before + (file.first_row + position - file.positions.start) as u64
    }

    /// The number of the row with an id in a partition.
    pub fn find(&self, id: &str, partition: usize) -> Option<u32> {
        let found = self.positions.binary_search_by(|position| {
            let position = *position as usize;
            self.id_at(position).cmp(id).then_with(|| self.partition_at(position).cmp(&partition))
        });
        found.ok().and_then(|number| u32::try_from(number).ok())
    }

    /// The cell of the row at a position, in a corpus that was read with its cells.
    pub fn cell_at(&self, position: usize) -> Option<u32> {
        let cells = &self.file_of(position).cells;
        let run = cells.partition_point(|(_, end)| *end <= position);
        cells.get(run).and_then(|(cell, _)| *cell)
    }

    /// Cuts ascending positions where the cell changes: each cell, and the places of its rows among them.
    pub fn by_cell(&self, positions: &[u32]) -> Vec<(u32, Range<usize>)> {
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(first) = positions.get(start) {
            let first = *first as usize;
            let cells = &self.file_of(first).cells;
            let run = cells.get(cells.partition_point(|(_, end)| *end <= first));
            let end_of_run = run.map_or(first + 1, |(_, end)| *end);
            let end = start + positions[start..].partition_point(|position| (*position as usize) < end_of_run);
            parts.extend(run.and_then(|(cell, _)| *cell).map(|cell| (cell, start..end)));
            start = end;
        }
        parts
    }

    fn file_of(&self, position: usize) -> &CorpusFile {
        &self.files[self.files.partition_point(|file| file.positions.end <= position)]
    }

    /// The positions of the rows in some cells, which are given in ascending order: as few ranges as there are.
    pub fn positions_in(&self, cells: &[u32]) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for file in &self.files {
            let mut start = file.positions.start;
            for (cell, end) in &file.cells {
                if cell.is_some_and(|cell| cells.binary_search(&cell).is_ok()) {
                    match ranges.last_mut() {
                        Some(last) if last.end == start => last.end = *end,
                        _ => ranges.push(start..*end),
                    }
                }
                start = *end;
            }
        }
        ranges
    }

    /// Rows of each cell, of so many cells, in a corpus that was read with its cells.
    pub fn rows_of_cells(&self, num_cells: usize) -> Vec<u64> {
        let mut rows_of = vec![0; num_cells];
        for file in &self.files {
            let mut start = file.positions.start;
            for (cell, end) in &file.cells {
                if let Some(rows) = cell.and_then(|cell| rows_of.get_mut(cell as usize)) {
                    *rows += (end - start) as u64;
                }
                start = *end;
            }
        }
        rows_of
    }

    /// Bytes that the ids and numbers take.
    pub fn bytes(&self) -> usize {
        let cells: usize = self.files.iter().map(|file| file.cells.len()).sum();
        self.ids.len() + self.id_ends.len() * 8 + self.numbers.len() * 4 + self.positions.len() * 4 + cells * 16
    }

    /// Bytes that reading a stream takes: the blocks under way, and what Parquet holds of the files.
    pub fn stream_bytes(&self) -> usize {
        let largest = self.files.iter().map(|file| file.live.size_bytes).max().unwrap_or(0);
        let largest = usize::try_from(largest).unwrap_or(usize::MAX).min(crate::table::ROW_GROUP_MAX_BYTES);
        // Of files that are read at once, both what was fetched and what it says.
        largest.max(2 * self.block_bytes * FILES_IN_FLIGHT) + BLOCKS_IN_FLIGHT * self.block_bytes
    }

    /// Streams the vectors at some positions, which must be ascending and apart.
    pub fn stream<'a>(&self, context: &'a Context, positions: &[Range<usize>]) -> Blocks<'a> {
        let mut parts: Vec<(Start, LiveFile, Vec<Range<usize>>)> = Vec::new();
        let mut ranges = positions.iter().filter(|range| !range.is_empty()).cloned().peekable();
        for file in &self.files {
            let (start, first_row) = (file.positions.start, file.first_row);
            let mut rows = Vec::new();
            while let Some(range) = ranges.peek_mut().filter(|range| range.start < file.positions.end) {
                let end = range.end.min(file.positions.end);
                rows.push(range.start - start + first_row..end - start + first_row);
                if end < range.end {
                    range.start = end;
                    break;
                }
                ranges.next();
            }
            if !rows.is_empty() {
                parts.push((Start { position: start, row: first_row }, file.live.clone(), rows));
            }
        }
        let (mut sender, receiver) = mpsc::channel(0);
        let (table, dim, block_bytes) = (self.table.clone(), self.dim, self.block_bytes);
        context.handle().spawn(async move {
            let scans = futures::stream::iter(parts)
                .map(|(start, file, rows)| {
                    let table = table.clone();
                    async move { scan(&table, &file, start, rows, block_bytes, dim).await }
                })
                .buffered(FILES_IN_FLIGHT)
                .try_flatten();
            futures::pin_mut!(scans);
            while let Some(block) = scans.next().await {
                let is_last = block.is_err();
                // A search that has ended takes no more.
                if sender.send(block).await.is_err() || is_last {
                    break;
                }
            }
        });
        Blocks { context, receiver }
    }

    /// The vectors at some positions, one after the other.
    pub fn load(&self, context: &Context, positions: &[Range<usize>]) -> Result<Block, Error> {
        let num_rows: usize = positions.iter().map(ExactSizeIterator::len).sum();
        let mut all = Block {
            positions: Vec::with_capacity(num_rows),
            values: Vec::with_capacity(num_rows * self.dim),
            dim: self.dim,
        };
        for block in self.stream(context, positions) {
            let block = block?;
            all.positions.extend(block.positions);
            all.values.extend(block.values);
        }
        Ok(all)
    }
}

/// The position of a row of a file.
#[derive(Debug, Clone, Copy)]
struct Start {
    position: usize,
    row: usize,
}

/// Opens a file, and reads it at once if it is small.
async fn scan(
    table: &Table,
    file: &LiveFile,
    start: Start,
    rows: Vec<Range<usize>>,
    block_bytes: usize,
    dim: usize,
) -> Result<BoxStream<'static, Result<Block, TableError>>, TableError> {
    let is_whole = file.num_rows > 0 && rows.len() == 1 && rows[0].len() as u64 == file.num_rows;
    let selected = (!is_whole).then_some(rows.as_slice());
    let batch_rows = (block_bytes / (dim.max(1) * size_of::<f32>())).max(1);
    let batches = table.scan(file, &[column::EMBEDDING], selected, batch_rows).await?;
    let batches = if file.size_bytes <= block_bytes as u64 {
        let batches: Vec<RecordBatch> = batches.try_collect().await?;
        futures::stream::iter(batches).map(Ok).boxed()
    } else {
        batches
    };
    let url: Arc<str> = file.url.as_str().into();
    let mut positions = rows.into_iter().flatten().map(move |row| start.position + row - start.row);
    let blocks = batches.map(move |batch| {
        let batch = batch?;
        let lists = batch.column(0).as_list::<i32>();
        let values = lists.values().as_primitive::<Float32Type>().values();
        let mut block = Block {
            positions: Vec::with_capacity(batch.num_rows()),
            values: Vec::with_capacity(batch.num_rows() * dim),
            dim,
        };
        for (row, position) in (0..batch.num_rows()).zip(&mut positions) {
            if lists.is_null(row) {
                continue;
            }
            let offsets = lists.value_offsets();
            let (from, to) = (offsets[row].unsigned_abs() as usize, offsets[row + 1].unsigned_abs() as usize);
            if to - from != dim {
                return Err(TableError::Vector { url: url.to_string(), found: to - from, expected: dim });
            }
            block.positions.push(u32::try_from(position).unwrap_or(UNNUMBERED));
            block.values.extend_from_slice(&values[from..to]);
        }
        Ok(block)
    });
    Ok(blocks.boxed())
}

/// Rows that do not make a matrix.
pub fn shape_error(source: ShapeError) -> Error {
    Error::Rows {
        table: TableName::Latents.name(),
        source: arrow::error::ArrowError::from_external_error(Box::new(source)),
    }
}
