//! Data files: Parquet, written once under a name that is never used again.
//!
//! A file is invisible to readers until a commit names it. Its layout is the one that `DuckDB`, Spark, `BigQuery`, Polars and
//! pyarrow all read well: vectors PLAIN with zstd and without dictionary (a dictionary of floats is larger than the floats),
//! row groups no larger than `DuckDB`'s own.

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use object_store::ObjectStoreExt as _;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use parquet::arrow::AsyncArrowWriter;
use parquet::arrow::async_writer::AsyncFileWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde::{Deserialize, Serialize};
use url::Url;

use super::TableError;
use crate::memory::return_holes;
use crate::schema::column;
use crate::store::{Store, StoreError};

/// Rows of a row group at most: what `DuckDB` reads with one thread, and what it writes itself.
const ROW_GROUP_MAX_ROWS: usize = 122_880;

/// Bytes of a row group at most. The writer holds one row group in memory, and so does a reader.
pub(crate) const ROW_GROUP_MAX_BYTES: usize = 128 << 20;

/// Bytes of a row group, at least, whose rows come one by one: what a run holds does not grow with the rows that it has written. Such a row group
/// ends when it fills the part that is next uploaded, so that a part is held, and not a part and a row group. A scan of the vectors is no slower for
/// it, and one of the small columns by a few milliseconds for 100,000 rows.
const STREAMED_ROW_GROUP_BYTES: usize = 4 << 20;

/// By how many bytes a row group may turn out smaller than estimated, since its last pages are not compressed before it ends.
const ESTIMATE_BYTES: usize = 768 << 10;

/// Bytes by which such a row group grows until what is free between its buffers is returned: its columns are thousands of them, of all sizes, and as
/// many come and go beside them.
const RETURN_EVERY_BYTES: usize = 1 << 20;

/// Parts of a file that are uploaded at a time: so much is held of a file that is larger than one of them.
const PARTS_IN_FLIGHT: usize = 2;

/// Bytes of such a part, which are the fewest that S3 takes; a file up to this size is put at once.
const PART_BYTES: usize = 5 << 20;

/// Level of zstd: the fastest levels already take most of what floats give.
const ZSTD_LEVEL: i32 = 1;

/// Before the names of our values in a file's key-value metadata.
pub(super) const FOOTER_PREFIX: &str = "lookalike.";

/// A finished data file, as a receipt and a commit name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Its place relative to the table's folder, spelled as in a URL, so that a table can be moved.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// When it was written, in milliseconds since 1970, by the store's clock.
    pub modified_ms: i64,
    /// Its rows.
    pub num_rows: u64,
}

/// A data file being written. Holds one row group; dropped without [`DataFileWriter::close`], it leaves nothing that a reader
/// would see.
pub struct DataFileWriter {
    writer: AsyncArrowWriter<Upload>,
    store: Store,
    object: Path,
    url: Url,
    path: String,
    num_rows: u64,
}

impl DataFileWriter {
    /// Starts the file `url`, which must lie in the store's bucket; `path` is the same relative to the table. `footer` goes into the file's key-value metadata.
    pub fn create(
        store: &Store,
        url: Url,
        path: String,
        schema: SchemaRef,
        footer: &[(&str, String)],
    ) -> Result<Self, TableError> {
        let object = Path::from_url_path(url.path()).map_err(|source| StoreError::Request {
            action: "name",
            url: url.to_string(),
            source: source.into(),
        })?;
        let mut properties = WriterProperties::builder()
            .set_created_by(concat!("lookalike version ", env!("CARGO_PKG_VERSION")).to_owned())
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(ZSTD_LEVEL).unwrap_or_default()))
            .set_max_row_group_row_count(Some(ROW_GROUP_MAX_ROWS))
            .set_max_row_group_bytes(Some(ROW_GROUP_MAX_BYTES))
            .set_key_value_metadata(Some(
                footer
                    .iter()
                    .map(|(key, value)| KeyValue::new(format!("{FOOTER_PREFIX}{key}"), value.clone()))
                    .collect(),
            ))
            .set_column_bloom_filter_enabled(ColumnPath::from(column::IMAGE_ID), true);
        for field in schema.fields() {
            if matches!(field.data_type(), DataType::List(element) if *element.data_type() == DataType::Float32) {
                let leaf = ColumnPath::new(vec![field.name().clone(), "list".to_owned(), "element".to_owned()]);
                properties = properties
                    .set_column_dictionary_enabled(leaf.clone(), false)
                    .set_column_statistics_enabled(leaf, EnabledStatistics::None);
            }
        }
        let sink = BufWriter::with_capacity(std::sync::Arc::clone(store.client()), object.clone(), PART_BYTES)
            .with_max_concurrency(PARTS_IN_FLIGHT);
        let writer = AsyncArrowWriter::try_new(Upload { sink, waiting: 0 }, schema, Some(properties.build()))
            .map_err(|source| TableError::Write { url: url.to_string(), source })?;
        Ok(Self { writer, store: store.clone(), object, url, path, num_rows: 0 })
    }

    /// Requests by which a file of so many bytes is written: one, or one for each part, the first word and the last.
    pub fn num_puts(size_bytes: u64) -> u64 {
        let num_parts = size_bytes.div_ceil(PART_BYTES as u64);
        if num_parts > 1 { num_parts + 2 } else { 1 }
    }

    /// Appends rows.
    pub async fn write(&mut self, rows: &RecordBatch) -> Result<(), TableError> {
        self.num_rows += rows.num_rows() as u64;
        self.writer.write(rows).await.map_err(|source| write_error(&self.url, source))
    }

    /// Appends rows as they come, to row groups that are small enough for many of them to be written while others are made.
    pub async fn stream(&mut self, rows: &RecordBatch) -> Result<(), TableError> {
        let before = self.writer.in_progress_size();
        self.write(rows).await?;
        let (row_group, waiting) = (self.writer.in_progress_size(), self.writer.bytes_written() % PART_BYTES);
        let is_full = row_group >= STREAMED_ROW_GROUP_BYTES && waiting + row_group >= PART_BYTES + ESTIMATE_BYTES;
        if is_full {
            self.end_row_group().await?;
        }
        if is_full || row_group / RETURN_EVERY_BYTES > before / RETURN_EVERY_BYTES {
            return_holes();
        }
        Ok(())
    }

    /// Ends the row group, so that the rows to come are in another one.
    pub async fn end_row_group(&mut self) -> Result<(), TableError> {
        self.writer.flush().await.map_err(|source| write_error(&self.url, source))
    }

    /// Gives the file up, so that no half of it stays in the store. A store that does not do that either keeps parts that no reader sees.
    pub async fn abort(self) {
        if let Err(error) = self.writer.into_inner().sink.abort().await {
            tracing::debug!("cannot take back the unfinished {}: {error}", self.url);
        }
    }

    /// Finishes the file.
    pub async fn close(self) -> Result<DataFile, TableError> {
        self.writer.close().await.map_err(|source| write_error(&self.url, source))?;
        let meta = self.store.client().head(&self.object).await.map_err(|source| StoreError::Request {
            action: "look up",
            url: self.url.to_string(),
            source,
        })?;
        Ok(DataFile {
            path: self.path,
            size_bytes: meta.size,
            modified_ms: meta.last_modified.timestamp_millis(),
            num_rows: self.num_rows,
        })
    }
}

/// A file on its way to the store, part by part.
struct Upload {
    sink: BufWriter,
    /// Bytes that wait for their part to be full.
    waiting: usize,
}

impl AsyncFileWriter for Upload {
    /// Uploads parts from where the row group was put together. What begins the next part is copied, for it would keep all of the row group in
    /// memory until that part is full.
    fn write(&mut self, mut row_group: Bytes) -> BoxFuture<'_, Result<(), ParquetError>> {
        async move {
            let rest = (self.waiting + row_group.len()) % PART_BYTES;
            let rest = row_group.split_off(row_group.len().saturating_sub(rest));
            self.waiting = (self.waiting + row_group.len()) % PART_BYTES + rest.len();
            for bytes in [row_group, Bytes::copy_from_slice(&rest)] {
                if !bytes.is_empty() {
                    self.sink.put(bytes).await?;
                }
            }
            Ok(())
        }
        .boxed()
    }

    fn complete(&mut self) -> BoxFuture<'_, Result<(), ParquetError>> {
        self.sink.complete()
    }
}

fn write_error(url: &Url, source: ParquetError) -> TableError {
    TableError::Write { url: url.to_string(), source }
}
