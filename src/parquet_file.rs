//! Parquet files in a store: how one is opened for reading, for source tables and for our own alike.
//!
//! Footers and column chunks are fetched by range requests, only those that are asked for. A row group's chosen columns are in
//! memory while it is read; nothing else is.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _};
use object_store::path::Path;
use object_store::{DynObjectStore, OBJECT_STORE_COALESCE_DEFAULT, ObjectStoreExt as _};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use parquet::errors::ParquetError;
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::{FooterTail, ParquetMetaData, ParquetMetaDataReader};

/// Bytes fetched from the end of a file in the first request; most footers fit, so a footer costs one round trip.
const FOOTER_PREFETCH_BYTES: u64 = 16 * 1024;

/// A file to read by ranges. Its size is known beforehand because not every store can read from the end of an object.
#[derive(Debug, Clone)]
pub struct ParquetFile {
    client: Arc<DynObjectStore>,
    path: Path,
    size_bytes: u64,
    read: Arc<ReadSoFar>,
}

/// A footer as a file has it, which takes a sixth of the memory of one that is decoded: a table of many files has many.
#[derive(Debug, Clone)]
pub struct Footer(Bytes);

impl Footer {
    /// What it says.
    pub fn decode(&self) -> Result<ArrowReaderMetadata, ParquetError> {
        let metadata = ParquetMetaDataReader::decode_metadata(&self.0)?;
        ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new())
    }
}

/// Requests that were made of a file, and bytes that they brought.
#[derive(Debug, Default)]
struct ReadSoFar {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl ParquetFile {
    /// Names a file; nothing is read yet.
    pub fn new(client: Arc<DynObjectStore>, path: Path, size_bytes: u64) -> Self {
        Self { client, path, size_bytes, read: Arc::default() }
    }

    /// Requests made of the file by this and its clones, and bytes that they brought.
    pub fn read_so_far(&self) -> (u64, u64) {
        (self.read.requests.load(Ordering::Relaxed), self.read.bytes.load(Ordering::Relaxed))
    }

    fn count(&self, ranges: &[Range<u64>]) {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut end = None;
        for range in sorted {
            let is_near = end.is_some_and(|end| range.start <= end + OBJECT_STORE_COALESCE_DEFAULT);
            self.read.requests.fetch_add(u64::from(!is_near), Ordering::Relaxed);
            self.read.bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
            end = Some(range.end);
        }
    }

    /// Reads the footer, as the file has it.
    pub async fn footer(&mut self) -> Result<Footer, ParquetError> {
        let size_bytes = self.size_bytes;
        let too_short = || ParquetError::EOF(format!("{size_bytes} bytes are too few for a Parquet file"));
        let tail_start = size_bytes.checked_sub(FOOTER_SIZE as u64).ok_or_else(too_short)?;
        let end = self.get_bytes(size_bytes.saturating_sub(FOOTER_PREFETCH_BYTES)..size_bytes).await?;
        let (before, tail) = end.split_last_chunk().ok_or_else(too_short)?;
        let tail = FooterTail::try_new(tail)?;
        if tail.is_encrypted_footer() {
            return Err(ParquetError::NYI("an encrypted footer".to_owned()));
        }
        let len = tail.metadata_length();
        if let Some(start) = before.len().checked_sub(len) {
            // The rest of what was fetched is let go.
            return Ok(Footer(Bytes::copy_from_slice(&before[start..])));
        }
        let too_long = || ParquetError::EOF(format!("a footer of {len} bytes does not fit into {size_bytes} bytes"));
        let start = tail_start.checked_sub(len as u64).ok_or_else(too_long)?;
        Ok(Footer(self.get_bytes(start..tail_start).await?))
    }

    /// Reads and decodes the footer.
    pub async fn metadata(mut self) -> Result<ArrowReaderMetadata, ParquetError> {
        self.footer().await?.decode()
    }

    /// Starts a reader on a footer that was read before, so that it is fetched once.
    pub fn reader(self, metadata: ArrowReaderMetadata) -> ParquetRecordBatchStreamBuilder<Self> {
        ParquetRecordBatchStreamBuilder::new_with_metadata(self, metadata)
    }
}

impl AsyncFileReader for ParquetFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        self.count(std::slice::from_ref(&range));
        async move { self.client.get_range(&self.path, range).await }.map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        self.count(&ranges);
        async move { self.client.get_ranges(&self.path, &ranges).await }.map_err(external).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move { Ok(Arc::clone(self.footer().await?.decode()?.metadata())) }.boxed()
    }
}

/// The mask of top-level columns by name, all leaves of each; names that the file lacks are left out.
pub fn projection<'a>(footer: &ArrowReaderMetadata, names: impl IntoIterator<Item = &'a str>) -> ProjectionMask {
    let schema = footer.schema();
    let roots = names.into_iter().filter_map(|name| schema.index_of(name).ok());
    ProjectionMask::roots(footer.parquet_schema(), roots)
}

fn external(source: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(source))
}
