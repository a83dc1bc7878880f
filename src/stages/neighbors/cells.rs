//! The lake as the index: the cells of `latents`.
//!
//! Above a number of rows, neighbors are searched by cells (an inverted file). The centroids are trained on a sample of the table's own
//! vectors, and kept below the output prefix; every partition is then written once more with the rows in the order of their cells, the
//! number of the cell in a column, and whole cells in a row group, so that a search reads the cells that it compares, and nothing else.
//! Nothing is embedded again. Rows that a later run adds are given cells of the same centroids, until the table has outgrown them.
//!
//! Trained on vectors that are there, not on images chosen beforehand: every row of the table has the same chance to be in the sample, and
//! no image goes through the model twice.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array as _, ArrayRef, AsArray as _, Float32Array, Int32Array, ListArray, RecordBatch, StringArray, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{DataType, Field, Float32Type, Schema};
use bytes::Bytes;
use futures::TryStreamExt as _;
use ndarray::Array2;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use super::search::{budget, sample};
use super::search_of;
use crate::config::Neighbors;
use crate::corpus::Corpus;
use crate::error::Error;
use crate::hash::{Fingerprint, SHORT_DIGITS, sha256};
use crate::neighbors::cells::{Cells, SAMPLE_ROWS_A_CELL, suggested_cells};
use crate::schema::{TableName, column, data_schema};
use crate::source::PartitionValues;
use crate::stages::Job;
use crate::table::{DataFile, Live, LiveFile, Published, TableError, next_revision};

/// Folder of the centroids, below the output prefix.
const FOLDER: &str = "_lookalike/cells";

/// Footer value that names the centroids by which a data file is sorted.
const CELLS_FOOTER: &str = "cells";

/// Footer value of the file of centroids: rows of the table when they were trained.
const ROWS_FOOTER: &str = "lookalike.num_rows";

/// How much larger than the table that they were trained on a table may be. Cells of four times the rows are searched in four times the
/// time, as are twice as many cells of a table four times as large.
const OUTGROWN: u64 = 4;

/// Seed of the training. Any would do; the same one gives the same cells.
const SEED: u64 = 1;

/// Rows of a row group of a sorted file at least, if there are so many: smaller ones cost more to describe than to read.
const GROUP_MIN_ROWS: usize = 8192;

/// Rows read at a time.
const BATCH_ROWS: usize = 8192;

/// Centroids, as they were kept.
pub(super) struct Codebook {
    /// The centroids.
    pub(super) cells: Cells,
    /// Fingerprint of the file.
    pub(super) id: String,
    /// Rows of the table when they were trained.
    num_rows: u64,
}

/// The folder of the centroids for a model's embeddings.
fn folder(job: &Job<'_>, settings: &Neighbors) -> String {
    let cells = settings.cells.map(|cells| cells.to_string()).unwrap_or_default();
    let fingerprint = Fingerprint::new("cells")
        .with("model", &job.model_sha256)
        .with("metric", settings.metric.name())
        .with("cells", &cells)
        .short();
    format!("{FOLDER}/{fingerprint}")
}

fn num_rows(latents: &Live) -> u64 {
    latents.files.iter().map(|file| file.num_rows).sum()
}

/// The centroids that all of the latents are sorted by, if they are.
pub(super) fn current(job: &Job<'_>, settings: &Neighbors, latents: &Live) -> Result<Option<Codebook>, Error> {
    match newest(job, settings)? {
        Some((_, codebook)) if !codebook.is_outgrown(latents) && unsorted(job, latents, &codebook)?.is_empty() => {
            Ok(Some(codebook))
        }
        _ => Ok(None),
    }
}

/// The newest centroids with the number in their name.
fn newest(job: &Job<'_>, settings: &Neighbors) -> Result<Option<(u32, Codebook)>, Error> {
    let files = job.context.block_on(job.output.list(&folder(job, settings)))?;
    let Some(file) = files.last() else { return Ok(None) };
    let name = job.output.relative(&file.location);
    let number = file.location.filename().and_then(|name| name.split('.').next()?.parse().ok());
    Ok(Some((number.unwrap_or(0), read(job, settings, &name)?)))
}

/// The centroids in a file.
pub(super) fn read(job: &Job<'_>, settings: &Neighbors, name: &str) -> Result<Codebook, Error> {
    let bytes = job.context.block_on(job.output.get(name))?;
    let url = job.output.url_of(name);
    Ok(Codebook::from_parquet(bytes, settings).map_err(|source| TableError::Read { url, source })?)
}

/// What sorting the latents came to.
pub(super) enum Sorted {
    /// All of them are sorted by these centroids; without any where there is no vector.
    By(Option<Box<Codebook>>),
    /// Some were not, and have been replaced.
    Replaced,
}

/// Sorts by cells what is not: trains the centroids if there are none, or too small ones.
pub(super) fn sort(job: &Job<'_>, settings: &Neighbors, latents: &Live) -> Result<Sorted, Error> {
    let Some((_, codebook)) = codebook(job, settings, latents)? else { return Ok(Sorted::By(None)) };
    let unsorted = unsorted(job, latents, &codebook)?;
    for (partition, run_id) in &unsorted {
        job.context.stop.check()?;
        sort_partition(job, latents, partition, run_id, &codebook)?;
    }
    Ok(if unsorted.is_empty() { Sorted::By(Some(Box::new(codebook))) } else { Sorted::Replaced })
}

/// The centroids that the latents should be sorted by, with the name of their file: those there are, or, where they are outgrown, new
/// ones. None where there is no vector.
pub(super) fn codebook(
    job: &Job<'_>,
    settings: &Neighbors,
    latents: &Live,
) -> Result<Option<(String, Codebook)>, Error> {
    let name_of = |number: u32| format!("{}/{number:05}.parquet", folder(job, settings));
    match newest(job, settings)? {
        Some((number, codebook)) if !codebook.is_outgrown(latents) => Ok(Some((name_of(number), codebook))),
        newest => {
            let name = name_of(newest.map_or(0, |(number, _)| number + 1));
            let Some((cells, num_rows)) = train(job, settings, latents)? else { return Ok(None) };
            // If another run was faster, its centroids are the table's.
            job.context.block_on(job.output.put_if_absent(&name, to_parquet(&cells, num_rows)?))?;
            let codebook = read(job, settings, &name)?;
            Ok(Some((name, codebook)))
        }
    }
}

/// The partitions whose files are not sorted by these centroids, with their runs.
pub(super) fn unsorted(
    job: &Job<'_>,
    latents: &Live,
    codebook: &Codebook,
) -> Result<Vec<(PartitionValues, String)>, Error> {
    let mut unsorted = Vec::new();
    for partition in latents.partitions() {
        let (Some(file), Some(run_id)) = (latents.of(&partition).next(), latents.run_of(&partition)) else { continue };
        let cells = job.context.block_on(job.latents.footer_value(file, CELLS_FOOTER))?;
        if cells.as_deref() != Some(codebook.id.as_str()) {
            let run_id = run_id.to_owned();
            unsorted.push((partition, run_id));
        }
    }
    Ok(unsorted)
}

/// Trains centroids on rows evenly spaced in the order of the ids, and counts the rows of the table; `None` where there is no vector.
fn train(job: &Job<'_>, settings: &Neighbors, latents: &Live) -> Result<Option<(Cells, u64)>, Error> {
    let corpus =
        Corpus::read(job.context, &job.latents, latents.files.clone(), false, job.pipeline.execution.memory_limit)?;
    if corpus.is_empty() {
        return Ok(None);
    }
    let num_cells = settings.cells.map_or_else(|| suggested_cells(corpus.len()), std::num::NonZeroUsize::get);
    // The sample, a prepared copy of it, and as much again to assign its rows.
    let row_bytes = 4 * corpus.dim().max(1) * size_of::<f32>();
    let most = budget(search_of(job, settings), &[&corpus]).unwrap_or(0) / row_bytes;
    let wanted = num_cells.saturating_mul(SAMPLE_ROWS_A_CELL);
    let block = corpus.load(job.context, &sample(&corpus, wanted.min(most.max(num_cells))))?;
    tracing::info!(cells = num_cells, sample = block.positions.len(), "training the cells of latents");
    let cells = Cells::train(&block.vectors()?, settings.metric, num_cells, SEED);
    Ok(Some((cells, num_rows(latents))))
}

/// Writes a partition's rows in the order of their cells, and makes them the partition's rows if nobody else has changed it.
pub(super) fn sort_partition(
    job: &Job<'_>,
    latents: &Live,
    partition: &PartitionValues,
    seen: &str,
    codebook: &Codebook,
) -> Result<(), Error> {
    let files: Vec<LiveFile> = latents.of(partition).cloned().collect();
    let run_id = next_revision(seen);
    let cells = assign(job, &files, codebook)?;
    // Rows without a vector come last.
    let last = i32::try_from(codebook.cells.len()).unwrap_or(i32::MAX);
    let mut rows_of = vec![0_usize; codebook.cells.len() + 1];
    for cell in cells.iter().flatten() {
        rows_of[cell.map_or(codebook.cells.len(), |cell| cell as usize)] += 1;
    }
    let num_rows: usize = rows_of.iter().sum();
    let bytes: u64 = files.iter().map(|file| file.size_bytes).sum();
    // Read, sorted, and being written: three times what a row takes in the files, which are hardly smaller than in memory.
    let row_bytes = usize::try_from(bytes).unwrap_or(usize::MAX) / num_rows.max(1) * 3 + 1;
    let limit = usize::try_from(job.pipeline.execution.memory_limit.get()).unwrap_or(usize::MAX);
    let most = (limit / 2 / row_bytes).max(GROUP_MIN_ROWS);
    let mut sorted: Vec<DataFile> = Vec::new();
    for (number, range) in ranges(&rows_of, most).into_iter().enumerate() {
        job.context.stop.check()?;
        let rows = rows_in(job, &files, &cells, &range, last, &run_id)?;
        let mut footer = job.footer(&run_id)?;
        footer.push((CELLS_FOOTER, codebook.id.clone()));
        let mut file =
            job.context.block_on(job.latents.create_file(partition, &run_id, number, rows.schema(), &footer))?;
        job.context.block_on(async {
            for group in groups(&rows_of[range.clone()], rows.num_rows()) {
                file.write(&rows.slice(group.start, group.len())).await?;
                file.end_row_group().await?;
            }
            sorted.push(file.close().await?);
            Ok::<_, TableError>(())
        })?;
    }
    let published = job.context.block_on(job.latents.rewrite_partition(partition, seen, &sorted))?;
    tracing::debug!(partition = partition.name(), ?published, "sorted by cells");
    if published == Published::Unchanged {
        tracing::info!(partition = partition.name(), "another run has replaced the partition while it was sorted");
    }
    Ok(())
}

/// The cell of every row, by file.
fn assign(job: &Job<'_>, files: &[LiveFile], codebook: &Codebook) -> Result<Vec<Vec<Option<u32>>>, Error> {
    let mut all = Vec::with_capacity(files.len());
    for file in files {
        let mut cells = Vec::new();
        let mut batches = job.context.block_on(job.latents.scan(file, &[column::EMBEDDING], None, BATCH_ROWS))?;
        while let Some(batch) = job.context.block_on(batches.try_next())? {
            let lists = batch.column(0).as_list::<i32>();
            let values = lists.values().as_primitive::<Float32Type>().values();
            let offsets = lists.value_offsets();
            // Null lists take no values, so those of the others are side by side.
            let (first, end) = (offsets[0].unsigned_abs() as usize, offsets[batch.num_rows()].unsigned_abs() as usize);
            let dim = codebook.cells.dim();
            let with_vector = batch.num_rows() - lists.null_count();
            let vectors = ndarray::ArrayView2::from_shape((with_vector, dim), &values[first..end])
                .map_err(crate::corpus::shape_error)?;
            let mut assigned = codebook.cells.assign(&vectors)?.into_iter();
            cells.extend((0..batch.num_rows()).map(
                |row| {
                    if lists.is_valid(row) { assigned.next().flatten() } else { None }
                },
            ));
        }
        all.push(cells);
    }
    Ok(all)
}

/// Cuts the cells into ranges of at most `most` rows; a cell is never cut.
fn ranges(rows_of: &[usize], most: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut rows = 0;
    for (cell, num_rows) in rows_of.iter().enumerate() {
        match ranges.last_mut() {
            Some(range) if rows + num_rows <= most || rows == 0 => range.end = cell + 1,
            _ => {
                ranges.push(cell..cell + 1);
                rows = 0;
            }
        }
        rows += num_rows;
    }
    ranges
}

/// Cuts the rows of a file, sorted by cells of so many rows, into row groups of whole cells.
fn groups(rows_of: &[usize], num_rows: usize) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut end) = (0, 0);
    for rows in rows_of {
        end += rows;
        if end - start >= GROUP_MIN_ROWS {
            groups.push(start..end);
            start = end;
        }
    }
    if start < num_rows {
        groups.push(start..num_rows);
    }
    groups
}

/// The rows of some cells, sorted by cell and then as they stood, with the cells and the run that writes them.
fn rows_in(
    job: &Job<'_>,
    files: &[LiveFile],
    cells: &[Vec<Option<u32>>],
    range: &Range<usize>,
    last: i32,
    run_id: &str,
) -> Result<RecordBatch, Error> {
    let rows_error = |source| Error::Rows { table: TableName::Latents.name(), source };
    let schema = data_schema(TableName::Latents, &job.source.kept_schema);
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let cell_number = |cell: &Option<u32>| cell.and_then(|cell| i32::try_from(cell).ok()).unwrap_or(last);
    let mut batches = Vec::new();
    let mut taken: Vec<i32> = Vec::new();
    for (file, cells) in files.iter().zip(cells) {
        let mut start = 0;
        let mut stream = job.context.block_on(job.latents.scan(file, &names, None, BATCH_ROWS))?;
        while let Some(batch) = job.context.block_on(stream.try_next())? {
            let here = &cells[start..start + batch.num_rows()];
            start += batch.num_rows();
            let is_wanted = |cell: i32| range.contains(&(cell.unsigned_abs() as usize));
            let wanted: Vec<u32> =
                (0_u32..).zip(here).filter(|(_, cell)| is_wanted(cell_number(cell))).map(|(row, _)| row).collect();
            taken.extend(wanted.iter().map(|row| cell_number(&here[*row as usize])));
            batches.push(take_record_batch(&batch, &UInt32Array::from(wanted)).map_err(rows_error)?);
        }
    }
    let rows = match batches.first() {
        Some(first) => concat_batches(&first.schema(), &batches).map_err(rows_error)?,
        None => RecordBatch::new_empty(Arc::clone(&schema)),
    };
    let mut order: Vec<u32> = (0..u32::try_from(taken.len()).unwrap_or(u32::MAX)).collect();
    order.sort_by_key(|row| taken[*row as usize]);
    let sorted_cells: Int32Array =
        order.iter().map(|row| Some(taken[*row as usize]).filter(|cell| *cell != last)).collect();
    let rows = take_record_batch(&rows, &UInt32Array::from(order)).map_err(rows_error)?;
    let columns: Vec<ArrayRef> = schema
        .fields()
        .iter()
        .map(|field| match field.name().as_str() {
            column::CELL => Some(Arc::new(sorted_cells.clone()) as ArrayRef),
            column::RUN_ID => Some(Arc::new(StringArray::from(vec![run_id; rows.num_rows()])) as ArrayRef),
            name => rows.column_by_name(name).cloned(),
        })
        .collect::<Option<_>>()
        .ok_or_else(|| {
            rows_error(arrow::error::ArrowError::SchemaError("a live file of latents lacks a column".to_owned()))
        })?;
    RecordBatch::try_new(schema, columns).map_err(rows_error)
}

/// The file of centroids: one row a cell, with its number.
fn to_parquet(cells: &Cells, num_rows: u64) -> Result<Bytes, Error> {
    let write = || -> Result<Vec<u8>, ParquetError> {
        let centroids = cells.centroids();
        let element = Arc::new(Field::new("element", DataType::Float32, false));
        let schema = Arc::new(Schema::new(vec![
            Field::new(column::CELL, DataType::Int32, false),
            Field::new("centroid", DataType::List(Arc::clone(&element)), false),
        ]));
        let lists = ListArray::try_new(
            element,
            OffsetBuffer::from_lengths(vec![centroids.ncols(); centroids.nrows()]),
            Arc::new(Float32Array::from_iter_values(centroids.iter().copied())),
            None,
        )?;
        let num_cells = i32::try_from(centroids.nrows()).unwrap_or(i32::MAX);
        let numbers = Int32Array::from_iter_values(0..num_cells);
        let rows = RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(numbers), Arc::new(lists)])?;
        let footer = vec![KeyValue::new(ROWS_FOOTER.to_owned(), num_rows.to_string())];
        let properties = WriterProperties::builder().set_key_value_metadata(Some(footer)).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), schema, Some(properties))?;
        writer.write(&rows)?;
        writer.into_inner()
    };
    write().map(Bytes::from).map_err(|source| TableError::Write { url: FOLDER.to_owned(), source }.into())
}

impl Codebook {
    fn is_outgrown(&self, latents: &Live) -> bool {
        num_rows(latents) > OUTGROWN * self.num_rows
    }

    fn from_parquet(bytes: Bytes, settings: &Neighbors) -> Result<Self, ParquetError> {
        let mut id = sha256(&bytes);
        id.truncate(SHORT_DIGITS);
        let builder = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
        let footer = builder.metadata().file_metadata().key_value_metadata();
        let num_rows = footer.into_iter().flatten().find(|pair| pair.key == ROWS_FOOTER);
        let num_rows = num_rows.and_then(|pair| pair.value.as_deref()?.parse().ok()).unwrap_or(0);
        let (mut values, mut num_cells) = (Vec::new(), 0);
        for rows in builder.build()? {
            let rows = rows?;
            let lists = rows.column(1).as_list::<i32>();
            values.extend_from_slice(lists.values().as_primitive::<Float32Type>().values());
            num_cells += rows.num_rows();
        }
        let dim = values.len().checked_div(num_cells).unwrap_or(0);
        let centroids = Array2::from_shape_vec((num_cells, dim), values)
            .map_err(|source| ParquetError::External(Box::new(source)))?;
        Ok(Self { cells: Cells::new(centroids, settings.metric), id, num_rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_cut_into_files_and_row_groups_between_cells() {
        let rows_of = [3, 0, 9000, 1, 8191, 20_000, 5];
        assert_eq!(ranges(&rows_of, 9004), [0..4, 4..5, 5..6, 6..7]);
        assert_eq!(ranges(&rows_of, 100_000).len(), 1);
        assert_eq!(groups(&rows_of, rows_of.iter().sum()), [0..9003, 9003..17_195, 17_195..37_195, 37_195..37_200]);
        assert!(groups(&[0, 0], 0).is_empty());
    }
}
