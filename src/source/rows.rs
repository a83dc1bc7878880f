//! Rows of a unit, streamed: keys and kept columns as Arrow, images as bytes, features as numbers.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray as _, BinaryViewArray, BooleanArray, ByteView, MAX_INLINE_VIEW_LEN, RecordBatch,
    RecordBatchOptions, StringArray,
};
use arrow::buffer::Buffer;
use arrow::compute::{BatchCoalescer, and, cast, filter_record_batch, prep_null_mask_filter};
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Schema};
use arrow::error::ArrowError;
use futures::channel::mpsc::{Receiver, channel};
use futures::stream::FuturesOrdered;
use futures::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use object_store::ObjectStoreExt as _;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::ColumnChunkMetaData;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use url::Url;

use super::buffers::Buffers;
use super::read_ahead::{self, ReadAhead};
use super::shard::{Sample, Shard, Wanted};
use super::{
    Cells, Content, ImageBatch, PartitionValues, Piece, Source, SourceError, SourceFile, SourceFormat, SourcePartition,
    WorkUnit, delta,
};
use crate::decode::Reject;
use crate::features::Tensor;
use crate::parquet_file::projection;
use crate::redact::redact;
use crate::store::{Store, StoreError};

/// Images fetched at a time where each is an object of its own: enough to hide a store's latency behind decoding.
const FETCHES_IN_FLIGHT: usize = 32;

/// Batches whose images are fetched at a time, so that a slow answer holds up its own batch and not the next.
const BATCHES_IN_FLIGHT: usize = 2;

/// Files of which the first bytes are fetched while an earlier one is read: small files take a store as long as large ones.
const FILES_AHEAD: usize = 4;

/// Bytes of images in a batch at most, going by the mean of their file, and unless a single one is larger.
const MAX_BATCH_BYTES: u64 = 64 << 20;

/// Bytes of a page at most that is kept in memory while one of its images waits to be decoded: writers begin a new page after one MiB, or
/// after some rows, of which a thousand may be a gigabyte. Up to this size a page is part of the block that was fetched.
const MAX_PAGE_BYTES: usize = read_ahead::WHOLE_BYTES;

/// How rows are read.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions {
    /// Rows in a batch at most. The last one of a file may be smaller, and so are those of a file of large images: about 64 MiB of them
    /// go into a batch.
    pub batch_rows: usize,
    /// An image object larger than this is rejected without being fetched.
    pub max_image_bytes: u64,
}

/// Rows to read: those of a unit, or some of them.
#[derive(Debug, Clone)]
pub struct Slice<'a> {
    /// The partition.
    pub partition: &'a SourcePartition,
    /// One of its units.
    pub unit: &'a WorkUnit,
    /// Rows with other ids are passed over, before their images are fetched. `None`: all rows.
    pub only_ids: Option<Arc<HashSet<String>>>,
}

impl<'a> Slice<'a> {
    /// All rows of a unit.
    pub fn all(partition: &'a SourcePartition, unit: &'a WorkUnit) -> Self {
        Self { partition, unit, only_ids: None }
    }

    /// Runs of pieces that lie in one file.
    fn runs(&self) -> impl Iterator<Item = &'a [Piece]> {
        self.unit.pieces.chunk_by(|a, b| a.file == b.file)
    }
}

/// What comes of reading.
#[derive(Debug)]
pub enum Read {
    /// Rows.
    Rows(ImageBatch),
    /// There are no more rows of the slice.
    End {
        /// Rows that there were.
        num_rows: u64,
    },
}

/// Whether a column of this type can be the key.
pub(super) fn is_id_type(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, value) => is_id_type(value),
        other => other.is_integer() || matches!(other, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
    }
}

/// What a column of this type holds, if it can be the image column.
pub(super) fn content_of(data_type: &DataType) -> Option<Content> {
    if is_image_type(data_type) {
        return Some(Content::Images);
    }
    let mut lengths = Vec::new();
    let mut inner = data_type;
    while let Some((length, element)) = list_of(inner) {
        lengths.push(length);
        inner = element;
    }
    let is_number = inner.is_numeric() || *inner == DataType::Boolean;
    (is_number && !lengths.is_empty()).then_some(Content::Features(lengths))
}

/// The length of the lists of a type, where all have the same, and the type of their elements.
fn list_of(data_type: &DataType) -> Option<(Option<usize>, &DataType)> {
    match data_type {
        DataType::FixedSizeList(field, length) => Some((usize::try_from(*length).ok(), field.data_type())),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field) => Some((None, field.data_type())),
        _ => None,
    }
}

/// Has the images of a file read as views of its pages, for nothing need be copied that is only to be decoded; a file that cannot be read so is
/// read as it is.
fn images_in_place(footer: &ArrowReaderMetadata, image: &str) -> ArrowReaderMetadata {
    let schema = footer.schema();
    let of_field = |field: &Arc<Field>| if field.name() == image { with_views(field) } else { Arc::clone(field) };
    let fields = schema.fields().iter().map(of_field);
    let viewed = Schema::new_with_metadata(fields.collect::<Fields>(), schema.metadata().clone());
    let options = ArrowReaderOptions::new().with_schema(Arc::new(viewed));
    ArrowReaderMetadata::try_new(Arc::clone(footer.metadata()), options).unwrap_or_else(|_| footer.clone())
}

/// A field of images, with views in the place of bytes.
fn with_views(field: &Arc<Field>) -> Arc<Field> {
    Arc::new(field.as_ref().clone().with_data_type(as_views(field.data_type())))
}

/// The type of a column of images, with views in the place of bytes.
fn as_views(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Binary | DataType::LargeBinary => DataType::BinaryView,
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(with_views).collect()),
        other => other.clone(),
    }
}

/// The bytes of a view, as part of its page unless that is so large that it should not wait for its last image.
fn viewed(array: &BinaryViewArray, row: usize) -> Buffer {
    let value = array.value(row);
    let view = ByteView::from(array.views()[row]);
    match array.data_buffers().get(view.buffer_index as usize) {
        Some(page) if value.len() > MAX_INLINE_VIEW_LEN as usize && page.len() <= MAX_PAGE_BYTES => {
            page.slice_with_length(view.offset as usize, value.len())
        }
        _ => Buffer::from(value),
    }
}

/// Whether a column of this type can hold images.
fn is_image_type(data_type: &DataType) -> bool {
    match data_type {
        DataType::Struct(fields) => fields
            .iter()
            .any(|field| matches!(field.name().as_str(), "bytes" | "path") && is_bytes_or_uri(field.data_type())),
        other => is_bytes_or_uri(other),
    }
}

fn is_bytes_or_uri(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, value) => is_bytes_or_uri(value),
        other => matches!(
            other,
            DataType::Binary
                | DataType::LargeBinary
                | DataType::BinaryView
                | DataType::Utf8
                | DataType::LargeUtf8
                | DataType::Utf8View
        ),
    }
}

/// The numbers of the rows of each row group within its file.
pub(super) fn row_groups(footer: &ArrowReaderMetadata) -> impl Iterator<Item = Range<u64>> {
    footer.metadata().row_groups().iter().scan(0, |next, group| {
        let start = *next;
        *next += u64::try_from(group.num_rows()).unwrap_or(0);
        Some(start..*next)
    })
}

/// Those of ascending numbers that lie within a range.
pub(super) fn within<'a>(numbers: &'a [u64], range: &Range<u64>) -> &'a [u64] {
    let place = |end: u64| numbers.partition_point(|number| *number < end);
    &numbers[place(range.start)..place(range.end)]
}

/// The rows of some row groups that are not deleted. A selection counts the rows of these groups alone, one after the other.
fn live_rows(footer: &ArrowReaderMetadata, groups: &[usize], deleted: &[u64]) -> RowSelection {
    let ranges: Vec<Range<u64>> = row_groups(footer).collect();
    let mut live: Vec<Range<usize>> = Vec::new();
    let mut offset = 0;
    let number = |row: u64| usize::try_from(row).unwrap_or(usize::MAX);
    for range in groups.iter().filter_map(|group| ranges.get(*group)) {
        let mut start = range.start;
        for row in within(deleted, range).iter().copied().chain([range.end]) {
            live.push(offset + number(start - range.start)..offset + number(row - range.start));
            start = row + 1;
        }
        offset += number(range.end - range.start);
    }
    RowSelection::from_consecutive_ranges(live.into_iter().filter(|rows| !rows.is_empty()), offset)
}

/// One image cell before any fetch.
enum Cell {
    Bytes(Buffer),
    Uri(String),
    Null,
}

/// Takes batches until it has enough, and counts the rows that it took.
struct Sink<'a> {
    emit: &'a mut dyn FnMut(ImageBatch) -> bool,
    num_rows: u64,
    /// The receiver is gone.
    is_closed: bool,
}

impl Sink<'_> {
    fn push(&mut self, batch: ImageBatch) {
        let num_rows = batch.ids.len() as u64;
        if num_rows > 0 && !self.is_closed {
            self.num_rows += num_rows;
            self.is_closed = !(self.emit)(batch);
        }
    }
}

/// A file of row groups that is about to be read.
struct Opened {
    file: ReadAhead,
    footer: ArrowReaderMetadata,
    row_groups: Vec<usize>,
}

impl Source {
    /// Reads slices, one after the other and each in order, and hands what comes of it to `emit` with the number of its slice, until that
    /// returns `false` (the receiver is gone).
    ///
    /// Holds a fixed number of blocks of a file, and few batches. Must be called within a runtime of several threads.
    pub async fn read(
        &self,
        slices: &[Slice<'_>],
        options: &ReadOptions,
        mut emit: impl FnMut(usize, Read) -> bool,
    ) -> Result<(), SourceError> {
        let mut to_come = slices.iter().flat_map(|slice| slice.runs().map(move |pieces| (slice.partition, pieces)));
        let mut opened: VecDeque<Opened> = VecDeque::new();
        let buffers = Buffers::default();
        for (number, slice) in slices.iter().enumerate() {
            let mut rows = |batch| emit(number, Read::Rows(batch));
            let mut sink = Sink { emit: &mut rows, num_rows: 0, is_closed: false };
            match self.settings.format {
                SourceFormat::Directory => self.read_image_files(slice, options, &mut sink).await?,
                SourceFormat::WebDataset => {
                    for piece in &slice.unit.pieces {
                        self.read_shard(slice, &slice.partition.files[piece.file].name, options, &mut sink).await?;
                    }
                }
                SourceFormat::Parquet | SourceFormat::Delta => {
                    for pieces in slice.runs() {
                        while opened.len() <= FILES_AHEAD
                            && let Some((partition, pieces)) = to_come.next()
                        {
                            opened.extend(self.open(partition, pieces, &buffers)?);
                        }
                        let Some(file) = opened.pop_front() else { continue };
                        file.file.then(opened.iter().map(|next| next.file.clone()));
                        self.read_row_groups(slice, pieces, file, options, &mut sink).await?;
                        if sink.is_closed {
                            break;
                        }
                    }
                }
            }
            let Sink { num_rows, is_closed, .. } = sink;
            if is_closed || !emit(number, Read::End { num_rows }) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads rows from the first partition on and hands them to `emit` batch by batch, until it returns `false`.
    pub async fn read_until(
        &self,
        options: &ReadOptions,
        mut emit: impl FnMut(ImageBatch) -> bool,
    ) -> Result<(), SourceError> {
        let mut slices = Vec::new();
        for partition in &self.partitions {
            slices.extend(partition.units.iter().map(|unit| Slice::all(partition, unit)));
        }
        let take = |_, read| match read {
            Read::Rows(batch) => emit(batch),
            Read::End { .. } => true,
        };
        self.read(&slices, options, take).await
    }

    async fn read_image_files(
        &self,
        slice: &Slice<'_>,
        options: &ReadOptions,
        sink: &mut Sink<'_>,
    ) -> Result<(), SourceError> {
        let batches = futures::stream::iter(slice.unit.pieces.chunks(options.batch_rows))
            .map(|pieces| self.image_files(slice, pieces, options))
            .buffered(BATCHES_IN_FLIGHT);
        let mut batches = std::pin::pin!(batches);
        while !sink.is_closed
            && let Some(batch) = batches.try_next().await?
        {
            sink.push(batch);
        }
        Ok(())
    }

    async fn image_files(
        &self,
        slice: &Slice<'_>,
        pieces: &[Piece],
        options: &ReadOptions,
    ) -> Result<ImageBatch, SourceError> {
        let files: Vec<&SourceFile> = pieces.iter().map(|piece| &slice.partition.files[piece.file]).collect();
        let ids = |files: &[&SourceFile]| files.iter().map(|file| Some(file.name.as_str())).collect::<StringArray>();
        let schema = Schema::new(vec![Field::new(&self.settings.id, DataType::Utf8, false)]);
        let rows = RecordBatch::try_new(Arc::new(schema), vec![Arc::new(ids(&files))]);
        let rows = rows.map_err(|e| self.arrow_error("", e))?;
        let keep = self.matching_rows("", &rows, slice)?;
        let is_kept = |row: usize| keep.as_ref().is_none_or(|keep| keep.value(row));
        let files: Vec<&SourceFile> =
            files.iter().enumerate().filter(|(row, _)| is_kept(*row)).map(|(_, file)| *file).collect();
        let images = futures::stream::iter(&files)
            .map(async |file| {
                if file.size > options.max_image_bytes {
                    return Ok(Err(Reject::TooLarge { bytes: file.size, limit: options.max_image_bytes }));
                }
                match self.store.get(&file.name).await {
                    Ok(bytes) => Ok(Ok(Buffer::from(bytes))),
                    // Listed a moment ago and gone now, perhaps: a row of this run all the same.
                    Err(error) => refused(error.answer(), file.name.clone()).map(Err).ok_or(SourceError::Store(error)),
                }
            })
            .buffered(FETCHES_IN_FLIGHT)
            .try_collect()
            .await?;
        let kept = self.kept("", Vec::new(), files.len())?;
        Ok(ImageBatch { kept, ids: ids(&files), cells: Cells::Images(images) })
    }

    /// Reads a shard sample by sample. Holds the samples of one batch, or of two where a predicate chooses among them.
    async fn read_shard(
        &self,
        slice: &Slice<'_>,
        name: &str,
        options: &ReadOptions,
        sink: &mut Sink<'_>,
    ) -> Result<(), SourceError> {
        let wanted = Wanted {
            columns: &self.settings.columns,
            max_member_bytes: options.max_image_bytes,
            keys: slice.only_ids.as_deref(),
        };
        let mut shard = Shard::open(&self.store, name, wanted).await?;
        let mut read = Vec::with_capacity(options.batch_rows);
        let mut matching: Vec<Sample> = Vec::new();
        let mut columns_met = vec![false; self.settings.columns.len()];
        while !sink.is_closed {
            let sample = shard.next().await?;
            let ended = sample.is_none();
            if let Some(sample) = sample {
                for (met, text) in columns_met.iter_mut().zip(&sample.texts) {
                    *met |= text.is_some();
                }
                read.push(sample);
            }
            if !ended && read.len() < options.batch_rows {
                continue;
            }
            let keep = self.matching_samples(name, &read, &slice.partition.values)?;
            let mut keep = keep.iter();
            read.retain(|_| keep.next().is_none_or(|keep| *keep));
            matching.append(&mut read);
            while matching.len() >= options.batch_rows || (ended && !matching.is_empty()) {
                let batch: Vec<Sample> = matching.drain(..options.batch_rows.min(matching.len())).collect();
                sink.push(self.sample_batch(name, batch)?);
            }
            if ended {
                break;
            }
        }
        if sink.num_rows > 0 && !sink.is_closed {
            for (column, _) in self.settings.columns.iter().zip(columns_met).filter(|(_, met)| !met) {
                tracing::warn!(shard = self.store.url_of(name), column, "no sample has a member of this extension");
            }
        }
        Ok(())
    }

    /// Whether each sample satisfies the predicate; empty where there is none.
    fn matching_samples(
        &self,
        name: &str,
        samples: &[Sample],
        values: &PartitionValues,
    ) -> Result<Vec<bool>, SourceError> {
        let Some(predicate) = &self.predicate else { return Ok(Vec::new()) };
        let text = |name: &String| Field::new(name, DataType::Utf8, true);
        let schema = std::iter::once(&self.settings.id).chain(&self.settings.columns).map(text).collect::<Vec<_>>();
        let mut columns = vec![Arc::new(samples.iter().map(|sample| Some(&sample.key)).collect::<StringArray>()) as _];
        columns.extend(texts(samples, self.settings.columns.len()));
        let rows = RecordBatch::try_new(Arc::new(Schema::new(schema)), columns);
        let rows = rows.and_then(|rows| values.extend_batch(&rows)).map_err(|e| self.arrow_error(name, e))?;
        let keep = predicate.evaluate(&rows);
        let keep = keep.map_err(|source| SourceError::Where { file: self.store.url_of(name), source })?;
        Ok(keep.iter().map(|keep| keep == Some(true)).collect())
    }

    fn sample_batch(&self, name: &str, samples: Vec<Sample>) -> Result<ImageBatch, SourceError> {
        let kept = self.kept(name, texts(&samples, self.settings.columns.len()), samples.len())?;
        let ids = samples.iter().map(|sample| Some(&sample.key)).collect();
        let images = samples.into_iter().map(|sample| sample.image.map(Buffer::from)).collect();
        Ok(ImageBatch { ids, cells: Cells::Images(images), kept })
    }

    fn kept(&self, file: &str, columns: Vec<ArrayRef>, num_rows: usize) -> Result<RecordBatch, SourceError> {
        let options = RecordBatchOptions::new().with_row_count(Some(num_rows));
        RecordBatch::try_new_with_options(Arc::clone(&self.kept_schema), columns, &options)
            .map_err(|e| self.arrow_error(file, e))
    }

    /// Makes ready to read row groups of a file.
    fn open(
        &self,
        partition: &SourcePartition,
        pieces: &[Piece],
        buffers: &Buffers,
    ) -> Result<Option<Opened>, SourceError> {
        let Some((file, table)) = partition.file_of(pieces) else { return Ok(None) };
        let footer = table.footer.decode().map_err(|source| self.parquet_error(file, source))?;
        let row_groups: Vec<usize> = pieces.iter().map(|piece| piece.row_group).collect();
        let mask = self.mask(&footer);
        let num_columns = footer.parquet_schema().num_columns();
        let columns: Vec<usize> = (0..num_columns).filter(|column| mask.leaf_included(*column)).collect();
        let places = |row_group: &usize| {
            let group = footer.metadata().row_group(*row_group);
            let place = |column: &usize| {
                let (start, length) = group.column(*column).byte_range();
                start..start.saturating_add(length)
            };
            columns.iter().map(place).collect()
        };
        let places: Vec<_> = row_groups.iter().map(places).collect();
        let (client, path) = (Arc::clone(&table.client), table.path.clone());
        let (buffers, runtime) = (buffers.clone(), Handle::current());
        let file = ReadAhead::new(client, path, file.size, &places, columns.len(), buffers, runtime);
        Ok(Some(Opened { file, footer, row_groups }))
    }

    /// What a file's reader found.
    fn parquet_error(&self, file: &SourceFile, source: ParquetError) -> SourceError {
        SourceError::Parquet { file: self.store.url_of(&file.name), source }
    }

    /// The columns of a file that are read.
    fn mask(&self, footer: &ArrowReaderMetadata) -> ProjectionMask {
        let needed = self.needed_columns(self.schema_of(footer));
        projection(footer, needed.iter().map(String::as_str))
    }

    /// The columns that a file has; of a file of a Delta table, those that the table has.
    fn schema_of<'a>(&'a self, footer: &'a ArrowReaderMetadata) -> &'a Schema {
        self.delta.as_ref().map_or_else(|| footer.schema(), |delta| &delta.schema)
    }

    /// Rows of a batch of a file.
    fn batch_rows(&self, footer: &ArrowReaderMetadata, row_groups: &[usize], options: &ReadOptions) -> usize {
        let image = self.settings.image.as_str();
        let (mut num_rows, mut num_bytes) = (0, 0);
        for row_group in row_groups {
            let group = footer.metadata().row_group(*row_group);
            num_rows += u64::try_from(group.num_rows()).unwrap_or(0);
            let of_image =
                |column: &&ColumnChunkMetaData| column.column_path().parts().first().is_some_and(|name| name == image);
            let bytes = group.columns().iter().filter(of_image).map(ColumnChunkMetaData::uncompressed_size);
            num_bytes += bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0)).sum::<u64>();
        }
        let row_bytes = num_bytes.checked_div(num_rows).unwrap_or(0);
        let fitting = MAX_BATCH_BYTES.checked_div(row_bytes).unwrap_or(u64::MAX);
        options.batch_rows.min(usize::try_from(fitting).unwrap_or(usize::MAX).max(1))
    }

    async fn read_row_groups(
        &self,
        slice: &Slice<'_>,
        pieces: &[Piece],
        opened: Opened,
        options: &ReadOptions,
        sink: &mut Sink<'_>,
    ) -> Result<(), SourceError> {
        let Some((file, table)) = slice.partition.file_of(pieces) else { return Ok(()) };
        let name = file.name.as_str();
        let parquet_error = |source| self.parquet_error(file, source);
        let Opened { file: ahead, footer, row_groups } = opened;
        let schema = self.schema_of(&footer);
        let needed = self.needed_columns(schema);
        let batch_rows = self.batch_rows(&footer, &row_groups, options);
        let in_place = images_in_place(&footer, &self.settings.image);
        let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(ahead.clone(), in_place)
            .with_projection(self.mask(&footer))
            .with_batch_size(batch_rows);
        let deleted = table.deleted_rows(self.delta.as_deref()).await?;
        if !deleted.is_empty() {
            reader = reader.with_row_selection(live_rows(&footer, &row_groups, &deleted));
        }
        let reader = reader.with_row_groups(row_groups).build().map_err(parquet_error)?;
        let mut batches = Background::start(reader, ahead);
        // Few rows of a batch may satisfy the predicate; the model wants full batches.
        let mut full: Option<BatchCoalescer> = None;
        let mut num_read = 0;
        let mut fetching = FuturesOrdered::new();
        let mut ended = false;
        while !sink.is_closed {
            let mut ready = Vec::new();
            if !ended {
                let rows = batches.next().await.map_err(parquet_error)?;
                ended = rows.is_none();
                if let Some(mut rows) = rows {
                    if self.delta.is_some() {
                        rows = delta::with_nulls(&rows, schema, &needed).map_err(|e| self.arrow_error(name, e))?;
                    }
                    match self.matching_rows(name, &rows, slice)? {
                        None => ready.push(rows),
                        Some(keep) => {
                            let rows = filter_record_batch(&rows, &keep).map_err(|e| self.arrow_error(name, e))?;
                            let full = full.get_or_insert_with(|| BatchCoalescer::new(rows.schema(), batch_rows));
                            full.push_batch(rows).map_err(|e| self.arrow_error(name, e))?;
                        }
                    }
                }
                if let Some(full) = &mut full {
                    if ended {
                        full.finish_buffered_batch().map_err(|e| self.arrow_error(name, e))?;
                    }
                    ready.extend(std::iter::from_fn(|| full.next_completed_batch()));
                }
            }
            for rows in ready {
                let first_row = num_read;
                num_read += rows.num_rows() as u64;
                fetching.push_back(self.image_batch(name, first_row, rows, options));
            }
            while !sink.is_closed && (ended || fetching.len() >= BATCHES_IN_FLIGHT) {
                let Some(batch) = fetching.try_next().await? else { return Ok(()) };
                sink.push(batch);
            }
        }
        Ok(())
    }

    fn needed_columns(&self, schema: &Schema) -> Vec<String> {
        let mut names = vec![self.settings.id.clone(), self.settings.image.clone()];
        names.extend(self.settings.columns.iter().cloned());
        if let Some(predicate) = &self.predicate {
            names.extend(predicate.columns().iter().filter(|name| schema.field_with_name(name).is_ok()).cloned());
        }
        names
    }

    /// Which rows satisfy the predicate and have an id that is asked for; `None` where all are.
    fn matching_rows(
        &self,
        file: &str,
        rows: &RecordBatch,
        slice: &Slice<'_>,
    ) -> Result<Option<BooleanArray>, SourceError> {
        let mut keep = None;
        if let Some(predicate) = &self.predicate {
            let rows = slice.partition.values.extend_batch(rows).map_err(|e| self.arrow_error(file, e))?;
            let found = predicate
                .evaluate(&rows)
                .map_err(|source| SourceError::Where { file: self.store.url_of(file), source })?;
            // SQL keeps a row where the predicate is true: null is not.
            keep = Some(if found.null_count() == 0 { found } else { prep_null_mask_filter(&found) });
        }
        if let Some(only) = &slice.only_ids {
            let ids = self.ids(file, rows)?;
            let wanted: BooleanArray = ids.iter().map(|id| Some(id.is_some_and(|id| only.contains(id)))).collect();
            keep = Some(match keep {
                Some(keep) => and(&keep, &wanted).map_err(|e| self.arrow_error(file, e))?,
                None => wanted,
            });
        }
        Ok(keep)
    }

    /// The ids as they are published.
    fn ids(&self, file: &str, rows: &RecordBatch) -> Result<StringArray, SourceError> {
        let name = &self.settings.id;
        let ids = rows.column_by_name(name).ok_or_else(|| super::missing_column(file, &rows.schema(), name))?;
        let ids = cast(ids, &DataType::Utf8).map_err(|e| self.arrow_error(file, e))?;
        Ok(ids.as_string::<i32>().clone())
    }

    async fn image_batch(
        &self,
        file: &str,
        first_row: u64,
        rows: RecordBatch,
        options: &ReadOptions,
    ) -> Result<ImageBatch, SourceError> {
        let column =
            |name: &str| rows.column_by_name(name).ok_or_else(|| super::missing_column(file, &rows.schema(), name));
        let ids = self.ids(file, &rows)?;
        if let Some(row) = (0..ids.len()).find(|row| ids.is_null(*row)) {
            return Err(SourceError::NullId {
                file: self.store.url_of(file),
                column: self.settings.id.clone(),
                row: first_row + row as u64,
            });
        }
        let image = column(&self.settings.image)?;
        let cells = if let Some(Content::Features(_)) = &self.content {
            Cells::Features(tensors(image).map_err(|e| self.arrow_error(file, e))?)
        } else {
            let images = futures::stream::iter(cells(image))
                .map(async |cell| match cell {
                    Cell::Bytes(bytes) => Ok(Ok(bytes)),
                    Cell::Null => Ok(Err(Reject::Missing)),
                    Cell::Uri(uri) => self.fetch(uri, options).await,
                })
                .buffered(FETCHES_IN_FLIGHT)
                .try_collect::<Vec<_>>()
                .await?;
            Cells::Images(images)
        };
        let kept: Vec<ArrayRef> = self
            .kept_schema
            .fields()
            .iter()
            .map(|field| cast(column(field.name())?, field.data_type()).map_err(|e| self.arrow_error(file, e)))
            .collect::<Result<_, _>>()?;
        Ok(ImageBatch { ids, cells, kept: self.kept(file, kept, rows.num_rows())? })
    }

    /// Fetches the image that a cell names: an absolute URL in any store, an absolute path, or a path relative to the table.
    async fn fetch(&self, uri: String, options: &ReadOptions) -> Result<Result<Buffer, Reject>, SourceError> {
        let named = split_uri(&uri);
        // A URI may be signed, or carry a password; what is told of it does not.
        let uri = redact(&uri).into_owned();
        let Some((origin, name)) = named else {
            return Ok(Err(Reject::InvalidUri { uri }));
        };
        let store = match origin {
            // In a web address the bucket may be anywhere, which no store could tell from a folder.
            Some(origin) if matches!(origin.scheme(), "http" | "https") => {
                return Ok(Err(Reject::InvalidUri { uri }));
            }
            // Nor are credentials taken from a cell; the user part of an Azure location names its container.
            Some(origin) if origin.password().is_some() => return Ok(Err(Reject::InvalidUri { uri })),
            Some(origin) => match self.stores.open(&origin) {
                Ok(store) => store,
                Err(error) if matches!(error.answer(), object_store::Error::NotSupported { .. }) => {
                    return Ok(Err(Reject::InvalidUri { uri }));
                }
                // A setting of this machine is missing; the image may be fine.
                Err(error) => return Err(error.into()),
            },
            None => self.store.clone(),
        };
        Ok(read_image(&store, &name, uri, options.max_image_bytes).await?)
    }

    fn arrow_error(&self, file: &str, source: ArrowError) -> SourceError {
        SourceError::Parquet { file: self.store.url_of(file), source: ParquetError::from(source) }
    }
}

/// Row groups that are read in a thread that may wait for bytes, one batch ahead.
struct Background {
    rows: Receiver<Result<RecordBatch, ParquetError>>,
    reading: Option<JoinHandle<()>>,
}

impl Background {
    /// Reads what `reader` makes of `file`.
    fn start(reader: ParquetRecordBatchReader, file: ReadAhead) -> Self {
        let (mut sender, rows) = channel(0);
        let runtime = Handle::current();
        let reading = runtime.clone().spawn_blocking(move || {
            for rows in reader {
                // Whoever asked may be gone.
                let rows = rows.map_err(|error| match file.fault() {
                    Some(fault) => ParquetError::External(Box::new(fault)),
                    None => ParquetError::from(error),
                });
                if runtime.block_on(sender.send(rows)).is_err() {
                    return;
                }
            }
        });
        Self { rows, reading: Some(reading) }
    }

    async fn next(&mut self) -> Result<Option<RecordBatch>, ParquetError> {
        if let Some(rows) = self.rows.next().await {
            return rows.map(Some);
        }
        // A reader that panicked has not come to its end.
        if let Some(reading) = self.reading.take() {
            reading.await.map_err(|fault| ParquetError::External(Box::new(fault)))?;
        }
        Ok(None)
    }
}

/// Reads an image that is an object of its own: below the folder of `store`, under `name`. What concerns this image alone is a reject, in
/// which it is called `uri`.
pub async fn read_image(
    store: &Store,
    name: &str,
    uri: String,
    max_image_bytes: u64,
) -> Result<Result<Buffer, Reject>, StoreError> {
    let Ok(path) = store.path(name) else {
        return Ok(Err(Reject::InvalidUri { uri }));
    };
    let read = async {
        let found = store.client().get(&path).await?;
        if found.meta.size > max_image_bytes {
            return Ok(Err(Reject::TooLarge { bytes: found.meta.size, limit: max_image_bytes }));
        }
        Ok(Ok(Buffer::from(found.bytes().await?)))
    };
    match read.await {
        Ok(image) => Ok(image),
        Err(source) => refused(&source, uri).map(Err).ok_or_else(|| store.request("read", name, source)),
    }
}

/// The kept texts of samples as columns.
fn texts(samples: &[Sample], num_columns: usize) -> Vec<ArrayRef> {
    let column = |number: usize| samples.iter().map(|sample| sample.texts[number].as_deref()).collect::<StringArray>();
    (0..num_columns).map(|number| Arc::new(column(number)) as ArrayRef).collect()
}

/// The root of the store that a URI names (`None`: the table's own folder), and the object's name below it. `None` where it is no
/// location at all.
fn split_uri(uri: &str) -> Option<(Option<Url>, String)> {
    let (origin, name) = if let Some((scheme, rest)) = uri.split_once("://") {
        let (authority, key) = rest.split_once('/')?;
        let origin = Url::parse(&format!("{scheme}://{authority}/")).ok()?;
        // A key is what the store says it is; only file URLs spell names with percent signs.
        let key = if scheme == "file" {
            percent_encoding::percent_decode_str(key).decode_utf8().ok()?.into_owned()
        } else {
            key.to_owned()
        };
        (Some(origin), key)
    } else if let Some(path) = uri.strip_prefix('/') {
        (Some(Url::parse("file:///").ok()?), path.to_owned())
    } else {
        (None, uri.to_owned())
    };
    let name = without_dots(&name)?;
    (!name.is_empty()).then_some((origin, name))
}

/// The path with `.` and `..` taken out; `None` where it leaves the folder it starts from.
fn without_dots(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The reject for an answer that concerns one image and not the store: it does not exist, or its own name or permission is wrong.
fn refused(answer: &object_store::Error, uri: String) -> Option<Reject> {
    use std::io::ErrorKind;
    if matches!(answer, object_store::Error::NotFound { .. }) {
        return Some(Reject::NotFound { uri });
    }
    let mut cause: Option<&dyn std::error::Error> = Some(answer);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                ErrorKind::InvalidFilename => Some(Reject::InvalidUri { uri }),
                ErrorKind::PermissionDenied | ErrorKind::IsADirectory | ErrorKind::NotADirectory => {
                    Some(Reject::Unreadable { uri })
                }
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

/// The image cells of a column: binary, URI strings, or a struct of `bytes` and `path` in any order, where `bytes` goes first.
fn cells(column: &ArrayRef) -> Vec<Cell> {
    if let Some(fields) = column.as_struct_opt() {
        let bytes = fields.column_by_name("bytes").map(cells);
        let paths = fields.column_by_name("path").map(cells);
        let mut bytes = bytes.into_iter().flatten();
        let mut paths = paths.into_iter().flatten();
        return (0..column.len())
            .map(|row| {
                let (bytes, path) = (bytes.next(), paths.next());
                if fields.is_null(row) {
                    return Cell::Null;
                }
                match (bytes, path) {
                    (Some(Cell::Bytes(bytes)), _) => Cell::Bytes(bytes),
                    (_, Some(Cell::Uri(uri))) => Cell::Uri(uri),
                    _ => Cell::Null,
                }
            })
            .collect();
    }
    let unpacked = match column.data_type() {
        DataType::Dictionary(_, value) => cast(column, value).ok(),
        _ => None,
    };
    let column = unpacked.as_ref().unwrap_or(column);
    // Files are read so already; what was a dictionary, or is null for want of a column, is not.
    let column = cast(column, &as_views(column.data_type())).unwrap_or_else(|_| Arc::clone(column));
    (0..column.len())
        .map(|row| {
            if column.is_null(row) {
                return Cell::Null;
            }
            if let Some(array) = column.as_binary_view_opt() {
                Cell::Bytes(viewed(array, row))
            } else if let Some(array) = column.as_string_opt::<i32>() {
                Cell::Uri(array.value(row).to_owned())
            } else if let Some(array) = column.as_string_opt::<i64>() {
                Cell::Uri(array.value(row).to_owned())
            } else if let Some(array) = column.as_string_view_opt() {
                Cell::Uri(array.value(row).to_owned())
            } else {
                Cell::Null
            }
        })
        .collect()
}

/// The rows of a column of lists, or lists of lists, of any kind of list and number.
fn tensors(column: &ArrayRef) -> Result<Vec<Result<Tensor, Reject>>, ArrowError> {
    let mut depth = 0;
    let mut inner = column.data_type();
    while let Some((_, element)) = list_of(inner) {
        depth += 1;
        inner = element;
    }
    let large_list = |element: DataType, _| DataType::LargeList(Arc::new(Field::new("element", element, true)));
    let column = cast(column, &(0..depth).fold(DataType::Float32, large_list))?;
    Ok((0..column.len()).map(|row| tensor(&column, row)).collect())
}

/// A row of a column of large lists of 32-bit floats. Lists that lie side by side have their elements side by side, so the numbers of a row
/// lie one after the other, however deep its lists are.
fn tensor(column: &ArrayRef, row: usize) -> Result<Tensor, Reject> {
    if column.is_null(row) {
        return Err(Reject::Missing);
    }
    let mut shape = Vec::new();
    let (mut values, mut range) = (column, row..row + 1);
    while let Some(lists) = values.as_list_opt::<i64>() {
        if range.clone().any(|list| lists.is_null(list)) {
            return Err(Reject::NullValue);
        }
        let offsets = &lists.value_offsets()[range.start..=range.end];
        let length = |ends: &[i64]| ends[1] - ends[0];
        let lengths = || offsets.windows(2).map(length);
        let first = lengths().next().unwrap_or(0);
        if lengths().any(|length| length != first) {
            return Err(Reject::Ragged);
        }
        let place = |offset: i64| usize::try_from(offset).unwrap_or(0);
        shape.push(place(first));
        range = place(offsets[0])..place(offsets[offsets.len() - 1]);
        values = lists.values();
    }
    let Some(numbers) = values.as_primitive_opt::<Float32Type>() else { return Err(Reject::NullValue) };
    let numbers = numbers.slice(range.start, range.len());
    if numbers.null_count() > 0 {
        return Err(Reject::NullValue);
    }
    Ok(Tensor::new(shape, numbers.values()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(uri: &str) -> Option<(Option<String>, String)> {
        split_uri(uri).map(|(origin, name)| (origin.map(|origin| origin.to_string()), name))
    }

    #[test]
    fn keys_of_clouds_are_taken_as_they_are_and_file_urls_are_decoded() {
        let at = |origin: &str, name: &str| Some((Some(origin.to_owned()), name.to_owned()));
        assert_eq!(split("s3://lake/a b/c#1%20?.png"), at("s3://lake/", "a b/c#1%20?.png"));
        assert_eq!(split("file:///a%20b/c%231.png"), at("file:///", "a b/c#1.png"));
        assert_eq!(split("/a%20b.png"), at("file:///", "a%20b.png"));
        assert_eq!(split("a/./b/../c.png"), Some((None, "a/c.png".to_owned())));
    }

    #[test]
    fn images_lie_within_their_page_unless_they_are_tiny_or_the_page_is_large() {
        let (tiny, image) = (b"tiny".as_slice(), [7; 100]);
        let of_page = |page_bytes: usize| {
            let mut page = vec![0; page_bytes];
            page[..image.len()].copy_from_slice(&image);
            let mut values = arrow::array::BinaryViewBuilder::new();
            let block = values.append_block(page.into());
            values.try_append_view(block, 0, 100).unwrap();
            values.append_value(tiny);
            values.append_null();
            values.finish()
        };
        for (page_bytes, is_within) in [(MAX_PAGE_BYTES, true), (MAX_PAGE_BYTES + 1, false)] {
            let views = of_page(page_bytes);
            let page = views.data_buffers()[0].as_ptr_range();
            let column: ArrayRef = Arc::new(views);
            let cells = cells(&column);
            let [Cell::Bytes(first), Cell::Bytes(second), Cell::Null] = &cells[..] else { panic!("other cells") };
            assert_eq!((first.as_slice(), second.as_slice()), (&image[..], tiny));
            assert_eq!(page.contains(&first.as_ptr()), is_within);
        }
    }

    #[test]
    fn a_selection_counts_the_live_rows_of_the_chosen_row_groups_alone() {
        let row = arrow::array::Int32Array::from_iter_values(0..10);
        let rows = RecordBatch::try_from_iter([("row", Arc::new(row) as ArrayRef)]).unwrap();
        let groups =
            parquet::file::properties::WriterProperties::builder().set_max_row_group_row_count(Some(3)).build();
        let mut bytes = Vec::new();
        let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, rows.schema(), Some(groups)).unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
        let bytes = bytes::Bytes::from(bytes);
        let footer = ArrowReaderMetadata::load(&bytes, ArrowReaderOptions::new()).unwrap();
        assert_eq!(row_groups(&footer).collect::<Vec<_>>(), [0..3, 3..6, 6..9, 9..10]);
        let read = |groups: &[usize], deleted: &[u64]| -> Vec<i32> {
            let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), footer.clone());
            let reader =
                reader.with_row_groups(groups.to_vec()).with_row_selection(live_rows(&footer, groups, deleted));
            let batches: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
            let column =
                |rows: &RecordBatch| rows.column(0).as_primitive::<arrow::datatypes::Int32Type>().values().to_vec();
            batches.iter().flat_map(column).collect()
        };
        assert_eq!(read(&[0, 1, 2, 3], &[0, 4, 8, 9]), [1, 2, 3, 5, 6, 7]);
        assert_eq!(read(&[1, 3], &[0, 1, 4, 6]), [3, 5, 9]);
        assert_eq!(read(&[0, 2], &[0, 1, 2]), [6, 7, 8]);
        assert_eq!(read(&[1], &[3, 4, 5, 70]), [0; 0]);
    }

    /// Rows of two lists of two numbers, as one type of column.
    fn lists(data_type: &DataType) -> ArrayRef {
        use arrow::array::{FixedSizeListArray, Float64Array};
        let numbers: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
        let pairs = |values: ArrayRef| -> ArrayRef {
            let field = Arc::new(Field::new("item", values.data_type().clone(), true));
            Arc::new(FixedSizeListArray::new(field, 2, values, None))
        };
        cast(&pairs(pairs(numbers)), data_type).unwrap()
    }

    #[test]
    fn numbers_are_the_same_in_every_kind_of_list_and_number() {
        let field = |element: DataType| Arc::new(Field::new("item", element, true));
        let kinds: [fn(Arc<Field>) -> DataType; 5] =
            [DataType::List, DataType::LargeList, DataType::ListView, DataType::LargeListView, |field| {
                DataType::FixedSizeList(field, 2)
            }];
        let expected = [Tensor::new(vec![2, 2], &[1.0, 0.0, 2.0, 3.0]), Tensor::new(vec![2, 2], &[4.0, 5.0, 6.0, 7.0])];
        for number in [
            DataType::Float64,
            DataType::Float32,
            DataType::Float16,
            DataType::Int8,
            DataType::UInt8,
            DataType::Int32,
            DataType::Int64,
            DataType::UInt64,
            DataType::Decimal128(10, 2),
        ] {
            for kind in kinds {
                let data_type = kind(field(kind(field(number.clone()))));
                let length = matches!(data_type, DataType::FixedSizeList(..)).then_some(2);
                assert_eq!(content_of(&data_type), Some(Content::Features(vec![length; 2])), "{data_type}");
                let found: Vec<Tensor> = tensors(&lists(&data_type)).unwrap().into_iter().map(Result::unwrap).collect();
                assert_eq!(found, expected, "{data_type}");
                // A part of a column has its own rows.
                let found = tensors(&lists(&data_type).slice(1, 1)).unwrap();
                assert_eq!(found, [Ok(expected[1].clone())], "{data_type}");
            }
        }
        let bits = tensors(&lists(&DataType::List(field(DataType::List(field(DataType::Boolean)))))).unwrap();
        assert_eq!(bits[0], Ok(Tensor::new(vec![2, 2], &[1.0, 0.0, 1.0, 1.0])));
        for other in [DataType::Utf8, DataType::Date32, DataType::Binary] {
            assert_eq!(content_of(&DataType::List(field(other))), None);
        }
        assert_eq!(content_of(&DataType::Float32), None);
    }

    /// A row of lists of numbers, in which anything may be null.
    type Row<'a> = Option<&'a [Option<&'a [Option<i64>]>]>;

    #[test]
    fn lists_that_are_no_tensor_are_rejected_each_for_its_own_reason() {
        use arrow::array::{Int64Builder, ListBuilder};
        let mut rows = ListBuilder::new(ListBuilder::new(Int64Builder::new()));
        let written: [Row<'_>; 6] = [
            Some(&[Some(&[Some(1), Some(2)]), Some(&[Some(3), Some(4)])]),
            None,
            Some(&[Some(&[Some(1), None])]),
            Some(&[Some(&[Some(1)]), None]),
            Some(&[Some(&[Some(1), Some(2)]), Some(&[Some(3)])]),
            Some(&[]),
        ];
        for row in written {
            for list in row.unwrap_or_default() {
                for value in list.unwrap_or_default() {
                    rows.values().values().append_option(*value);
                }
                rows.values().append(list.is_some());
            }
            rows.append(row.is_some());
        }
        let found = tensors(&(Arc::new(rows.finish()) as ArrayRef)).unwrap();
        assert_eq!(found[0], Ok(Tensor::new(vec![2, 2], &[1.0, 2.0, 3.0, 4.0])));
        assert_eq!(found[1], Err(Reject::Missing));
        assert_eq!(found[2], Err(Reject::NullValue));
        assert_eq!(found[3], Err(Reject::NullValue));
        assert_eq!(found[4], Err(Reject::Ragged));
        assert_eq!(found[5], Ok(Tensor::new(vec![0, 0], &[])));
    }

    #[test]
    fn what_is_no_location_is_none() {
        for uri in ["", ".", "../x.png", "s3://lake", "s3://lake/", "not a scheme://x/y"] {
            assert_eq!(split(uri), None, "{uri}");
        }
    }
}
