//! Rows on their way from the tasks of one step to those of the next, through the store.
//!
//! Every task of the first step writes one file, in which the rows for one task of the next one are row groups of their own; that one
//! reads the footers of all files, and of each the row groups that are for it. So a step of `m` tasks makes `m` files, whatever the
//! number of tasks that read them. A file is complete when it is there, and the same whoever wrote it.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray as _, Int32Array, RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Int32Type, SchemaRef};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectMeta;
use parquet::file::statistics::Statistics;
use serde::Serialize;

use crate::context::Context;
use crate::error::Error;
use crate::parquet_file::ParquetFile;
use crate::store::Store;
use crate::table::{DataFileWriter, TableError};

/// The first column of every file: the number of the task that the row is for.
pub(super) const TO: &str = "to";

/// Files read at a time.
const FILES_IN_FLIGHT: usize = 16;

/// What a task moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Rows written.
    pub rows_written: u64,
    /// Bytes of the files written.
    pub bytes_written: u64,
    /// Rows read.
    pub rows_read: u64,
    /// Bytes of the footers and row groups read.
    pub bytes_read: u64,
    /// Requests that write an object or a part of one.
    pub puts: u64,
    /// Requests that read: a footer, or a row group.
    pub gets: u64,
}

impl Moved {
    /// Adds what another share moved.
    pub fn add(&mut self, other: Self) {
        self.rows_written += other.rows_written;
        self.bytes_written += other.bytes_written;
        self.rows_read += other.rows_read;
        self.bytes_read += other.bytes_read;
        self.puts += other.puts;
        self.gets += other.gets;
    }
}

/// Writes the file of one task.
pub(super) struct Scatter<'a> {
    context: &'a Context,
    schema: SchemaRef,
    file: DataFileWriter,
    waiting: Vec<RecordBatch>,
    waiting_bytes: usize,
    most_bytes: usize,
    num_rows: u64,
}

impl<'a> Scatter<'a> {
    /// Starts the file `name`; holds at most about `most_bytes` before it writes them.
    pub(super) fn create(
        context: &'a Context,
        store: &Store,
        name: &str,
        schema: SchemaRef,
        most_bytes: usize,
    ) -> Result<Self, Error> {
        let url = store.url().join(name).map_err(|source| TableError::FileName { name: name.to_owned(), source })?;
        let file = DataFileWriter::create(store, url, name.to_owned(), Arc::clone(&schema), &[])?;
        Ok(Self { context, schema, file, waiting: Vec::new(), waiting_bytes: 0, most_bytes, num_rows: 0 })
    }

    /// Takes rows.
    pub(super) fn push(&mut self, rows: RecordBatch) -> Result<(), Error> {
        self.num_rows += rows.num_rows() as u64;
        self.waiting_bytes += rows.get_array_memory_size();
        self.waiting.push(rows);
        if self.waiting_bytes < self.most_bytes { Ok(()) } else { self.flush() }
    }

    /// Writes what waits: a row group for each task that there are rows for.
    fn flush(&mut self) -> Result<(), Error> {
        let rows_error = |source| Error::Rows { table: "shuffle", source };
        let rows = concat_batches(&self.schema, &self.waiting).map_err(rows_error)?;
        self.waiting.clear();
        self.waiting_bytes = 0;
        // Stable, so that rows for one task keep their order.
        let mut order: Vec<u32> = (0..u32::try_from(rows.num_rows()).unwrap_or(u32::MAX)).collect();
        let to = rows.column(0).as_primitive::<Int32Type>();
        order.sort_by_key(|row| to.value(*row as usize));
        let rows = take_record_batch(&rows, &UInt32Array::from(order)).map_err(rows_error)?;
        for group in runs(rows.column(0).as_primitive::<Int32Type>()) {
            self.context.stop.check()?;
            self.context.block_on(async {
                self.file.write(&rows.slice(group.start, group.len())).await?;
                self.file.end_row_group().await
            })?;
        }
        Ok(())
    }

    /// Finishes the file.
    pub(super) fn close(mut self) -> Result<Moved, Error> {
        self.flush()?;
        let file = self.context.block_on(self.file.close())?;
        let puts = DataFileWriter::num_puts(file.size_bytes);
        Ok(Moved { rows_written: self.num_rows, bytes_written: file.size_bytes, puts, ..Moved::default() })
    }
}

/// Ranges of equal values.
fn runs(values: &Int32Array) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for row in 0..values.len() {
        match runs.last_mut() {
            Some(run) if values.value(run.start) == values.value(row) => run.end = row + 1,
            _ => runs.push(row..row + 1),
        }
    }
    runs
}

/// Reads the rows for task `to` in the files of a step, and hands them to `sink` a row group at a time, in the order of the files.
pub(super) fn gather(
    context: &Context,
    store: &Store,
    files: &[ObjectMeta],
    to: i32,
    mut sink: impl FnMut(RecordBatch) -> Result<(), Error>,
) -> Result<Moved, Error> {
    let mut moved = Moved::default();
    let opened = futures::stream::iter(files.to_vec()).map(|file| {
        let parquet = ParquetFile::new(Arc::clone(store.client()), file.location.clone(), file.size);
        let url = store.url_of(&store.relative(&file.location));
        async move {
            match parquet.clone().metadata().await {
                Ok(metadata) => Ok((parquet, metadata, url)),
                Err(source) => Err(TableError::Read { url, source }),
            }
        }
    });
    let mut opened = opened.buffered(FILES_IN_FLIGHT);
    while let Some((parquet, metadata, url)) = context.block_on(opened.try_next())? {
        for (number, group) in metadata.metadata().row_groups().iter().enumerate() {
            let first = group.columns().first().and_then(|chunk| chunk.statistics());
            if !matches!(first, Some(Statistics::Int32(values)) if values.min_opt() == Some(&to)) {
                continue;
            }
            context.stop.check()?;
            let num_rows = usize::try_from(group.num_rows()).unwrap_or(usize::MAX);
            let read = async {
                let reader = parquet.clone().reader(metadata.clone()).with_row_groups(vec![number]);
                reader.with_batch_size(num_rows).build()?.try_collect::<Vec<RecordBatch>>().await
            };
            let batches = context.block_on(read).map_err(|source| TableError::Read { url: url.clone(), source })?;
            for batch in batches {
                moved.rows_read += batch.num_rows() as u64;
                sink(batch)?;
            }
        }
        let (gets, bytes) = parquet.read_so_far();
        moved.gets += gets;
        moved.bytes_read += bytes;
    }
    Ok(moved)
}
