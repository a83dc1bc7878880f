//! Lists on their way into the table: in the order of the rows of `latents`, a partition at a time.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray as _, Float32Array, Int32Array, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Int32Type, Schema};
use futures::TryStreamExt as _;

use super::search::{Sides, Sink};
use crate::corpus::Corpus;
use crate::error::Error;
use crate::neighbors::topk::Neighbor;
use crate::schema::{TableName, column, data_schema};
use crate::source::PartitionValues;
use crate::stages::{Job, StageReport};
use crate::table::{DataFileWriter, Live, Published};

/// Rows of `neighbors` put together at a time.
pub(super) const ROWS_A_BATCH: usize = 65_536;

/// Columns that tell whether lists have changed.
const COLUMNS: [&str; 5] =
    [column::IMAGE_ID, column::RANK, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];

/// A file of lists being written.
struct Open {
    partition: PartitionValues,
    file: DataFileWriter,
}

/// Takes lists and publishes them.
pub(super) struct Output<'a, 'j> {
    job: &'a Job<'j>,
    live: &'a Live,
    due: &'a [PartitionValues],
    report: &'a mut StageReport,
    open: Option<Open>,
}

impl<'a, 'j> Output<'a, 'j> {
    pub(super) fn new(
        job: &'a Job<'j>,
        live: &'a Live,
        due: &'a [PartitionValues],
        report: &'a mut StageReport,
    ) -> Self {
        Self { job, live, due, report, open: None }
    }

    /// Whether a partition's lists are asked for.
    pub(super) fn is_due(&self, partition: &PartitionValues) -> bool {
        self.due.contains(partition)
    }

    /// Takes lists of rows of one partition.
    fn take_part<'l>(
        &mut self,
        sides: Sides<'_>,
        number: usize,
        part: Range<usize>,
        list: &impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<(), Error> {
        let job = self.job;
        job.context.stop.check()?;
        let partition = &sides.queries.partitions()[number];
        if self.open.as_ref().is_some_and(|open| open.partition != *partition) {
            self.close()?;
        }
        if self.open.is_none() {
            let is_whole = part == sides.queries.positions_of(number);
            if is_whole && self.is_live(sides, partition, part.clone(), list)? {
                tracing::debug!(partition = partition.name(), "neighbors have not changed");
                let run_id = self.live.run_of(partition).unwrap_or_default().to_owned();
                self.entry(partition, |entry| entry.run_id = run_id);
                return Ok(());
            }
            let run_id = self.report.partitions.get(partition).map(|entry| entry.run_id.clone()).unwrap_or_default();
            let schema = data_schema(TableName::Neighbors, &Schema::empty());
            let footer = job.footer(&run_id)?;
            let file = job.neighbors.create_file(partition, &run_id, 0, schema, &footer);
            self.open = Some(Open { partition: partition.clone(), file: job.context.block_on(file)? });
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        let run_id = self.report.partitions.get(partition).map(|entry| entry.run_id.as_str()).unwrap_or_default();
        write_lists(job, &mut open.file, run_id, sides, part, list)
    }

    fn entry(&mut self, partition: &PartitionValues, change: impl FnOnce(&mut crate::stages::PartitionReport)) {
        change(self.report.partitions.entry(partition.clone()).or_default());
    }

    /// Whether the lists of a partition are those that are live.
    fn is_live<'l>(
        &self,
        sides: Sides<'_>,
        partition: &PartitionValues,
        part: Range<usize>,
        list: &impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<bool, Error> {
        let job = self.job;
        if self.live.run_of(partition).is_none() {
            return Ok(false);
        }
        let files: Vec<_> = self.live.of(partition).cloned().collect();
        let num_found: usize = part.clone().map(|position| list(position).len()).sum();
        if files.iter().map(|file| file.num_rows).sum::<u64>() != num_found as u64 {
            return Ok(false);
        }
        let names = names(sides.corpus);
        let mut found = part
            .flat_map(|position| list(position).iter().zip(1_i32..).map(move |(near, rank)| (position, rank, near)));
        let mut same = |batch: &RecordBatch| {
            let (ids, near_ids) = (batch.column(0).as_string::<i32>(), batch.column(2).as_string::<i32>());
            let (ranks, distances) =
                (batch.column(1).as_primitive::<Int32Type>(), batch.column(3).as_primitive::<Float32Type>());
            let near_partitions = batch.column(4).as_string::<i32>();
            (0..batch.num_rows()).all(|row| {
                found.next().is_some_and(|(position, rank, near)| {
                    let near_position = sides.corpus.position(near.row);
                    let near_partition = near_partitions.is_valid(row).then(|| near_partitions.value(row));
                    ids.value(row) == sides.queries.id_at(position)
                        && ranks.value(row) == rank
                        && near_ids.value(row) == sides.corpus.id_at(near_position)
                        && distances.value(row).to_bits() == near.distance.to_bits()
                        && near_partition.unwrap_or_default() == names[sides.corpus.partition_at(near_position)]
                })
            })
        };
        job.context.block_on(async {
            for file in files {
                let mut batches = job.neighbors.scan(&file, &COLUMNS, None, ROWS_A_BATCH).await?;
                while let Some(batch) = batches.try_next().await? {
                    if !same(&batch) {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        })
    }

    /// Publishes the partition whose lists came last.
    fn close(&mut self) -> Result<(), Error> {
        let Some(Open { partition, file }) = self.open.take() else { return Ok(()) };
        let job = self.job;
        let file = job.context.block_on(file.close())?;
        let num_rows = file.num_rows;
        let run_id = self.report.partitions.get(&partition).map(|entry| entry.run_id.clone()).unwrap_or_default();
        tracing::debug!(partition = partition.name(), num_rows, "publishing neighbors");
        let published = job.context.block_on(job.neighbors.replace_partition(&partition, &run_id, &[file]))?;
        self.entry(&partition, |entry| {
            entry.written |= published != Published::Unchanged;
            entry.num_rows = num_rows;
        });
        Ok(())
    }

    /// Publishes the partition that is still open.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        self.close()
    }
}

impl Sink for Output<'_, '_> {
    fn due(&self, queries: &Corpus) -> Vec<Range<usize>> {
        let partitions = queries.partitions().iter().enumerate();
        partitions
            .filter(|(_, partition)| self.due.contains(partition))
            .map(|(number, _)| queries.positions_of(number))
            .collect()
    }

    fn take<'l>(
        &mut self,
        sides: Sides<'_>,
        positions: &[Range<usize>],
        list: impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<(), Error> {
        for range in positions {
            let mut start = range.start;
            while start < range.end {
                let number = sides.queries.partition_at(start);
                let whole = sides.queries.positions_of(number);
                let part = start..range.end.min(whole.end);
                start = part.end;
                self.take_part(sides, number, part, &list)?;
            }
        }
        Ok(())
    }
}

/// A row of a list: the position of the query, the rank, and the neighbor.
pub type FoundRow = (usize, usize, Neighbor);

/// A row of a list, by names.
#[derive(Debug, Clone, Copy)]
pub(super) struct ListRow<'a> {
    pub(super) image_id: &'a str,
    pub(super) rank: usize,
    pub(super) neighbor_id: &'a str,
    pub(super) distance: f32,
    /// Empty in a table without partitions.
    pub(super) neighbor_partition: &'a str,
}

/// Rows as columns of a table: id, rank, id of the neighbor, distance, partition of the neighbor.
pub(super) fn list_columns<'a>(rows: impl Iterator<Item = ListRow<'a>> + Clone) -> Vec<ArrayRef> {
    vec![
        Arc::new(StringArray::from_iter_values(rows.clone().map(|row| row.image_id))),
        Arc::new(Int32Array::from_iter_values(rows.clone().map(|row| i32::try_from(row.rank).unwrap_or(i32::MAX)))),
        Arc::new(StringArray::from_iter_values(rows.clone().map(|row| row.neighbor_id))),
        Arc::new(Float32Array::from_iter_values(rows.clone().map(|row| row.distance))),
        partition_names(rows.map(|row| row.neighbor_partition)),
    ]
}

/// Lists as the same columns.
pub fn columns(sides: Sides<'_>, found: &[FoundRow]) -> Vec<ArrayRef> {
    let names = names(sides.corpus);
    list_columns(found.iter().map(|(query, rank, neighbor)| {
        let near = sides.corpus.position(neighbor.row);
        ListRow {
            image_id: sides.queries.id_at(*query),
            rank: *rank,
            neighbor_id: sides.corpus.id_at(near),
            distance: neighbor.distance,
            neighbor_partition: &names[sides.corpus.partition_at(near)],
        }
    }))
}

/// The partitions of rows by their positions; null in a table without partitions.
pub fn partition_column(corpus: &Corpus, positions: impl Iterator<Item = usize>) -> ArrayRef {
    let names = names(corpus);
    partition_names(positions.map(|position| names[corpus.partition_at(position)].as_str()))
}

fn names(corpus: &Corpus) -> Vec<String> {
    corpus.partitions().iter().map(ToString::to_string).collect()
}

fn partition_names<'a>(names: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(names.map(|name| Some(name).filter(|name| !name.is_empty())).collect::<StringArray>())
}

/// Columns of lists as rows of `neighbors`.
pub(super) fn batch(mut columns: Vec<ArrayRef>, run_id: &str) -> Result<RecordBatch, Error> {
    let num_rows = columns.first().map_or(0, Array::len);
    columns.push(Arc::new(StringArray::from(vec![run_id; num_rows])));
    RecordBatch::try_new(data_schema(TableName::Neighbors, &Schema::empty()), columns)
        .map_err(|source| Error::Rows { table: TableName::Neighbors.name(), source })
}

/// Writes the lists of the rows at some positions.
pub(super) fn write_lists<'l>(
    job: &Job<'_>,
    file: &mut DataFileWriter,
    run_id: &str,
    sides: Sides<'_>,
    positions: impl IntoIterator<Item = usize>,
    list: impl Fn(usize) -> &'l [Neighbor],
) -> Result<(), Error> {
    let mut write = |found: &[FoundRow]| -> Result<(), Error> {
        Ok(job.context.block_on(file.write(&batch(columns(sides, found), run_id)?))?)
    };
    let mut found: Vec<FoundRow> = Vec::new();
    for position in positions {
        found.extend(list(position).iter().enumerate().map(|(place, near)| (position, place + 1, *near)));
        if found.len() >= ROWS_A_BATCH {
            write(&found)?;
            found.clear();
        }
    }
    if found.is_empty() { Ok(()) } else { write(&found) }
}
