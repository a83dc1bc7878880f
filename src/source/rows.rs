//! Rows of a unit, streamed: keys and kept columns as Arrow, images as bytes.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray as _, BinaryArray, BinaryViewArray, LargeBinaryArray, RecordBatch, RecordBatchOptions,
    StringArray,
};
use arrow::buffer::Buffer;
use arrow::compute::{BatchCoalescer, cast, filter_record_batch, prep_null_mask_filter};
use arrow::datatypes::{DataType, Field, Schema};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{ObjectMeta, ObjectStoreExt as _};
use parquet::errors::ParquetError;
use url::Url;

use super::{ImageBatch, PartitionValues, Source, SourceError, TableFile, UnitInput, WorkUnit};
use crate::decode::Reject;
use crate::parquet_file::{ParquetFile, projection};

/// Images fetched at a time where each is an object of its own: enough to hide a store's latency behind decoding.
const FETCHES_IN_FLIGHT: usize = 32;

/// How rows are read.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions {
    /// Rows in a batch; the last one of a unit may be smaller.
    pub batch_rows: usize,
    /// An image object larger than this is rejected without being fetched.
    pub max_image_bytes: u64,
}

/// Whether a column of this type can be the key.
pub(super) fn is_id_type(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, value) => is_id_type(value),
        other => other.is_integer() || matches!(other, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
    }
}

/// Whether a column of this type can hold images.
pub(super) fn is_image_type(data_type: &DataType) -> bool {
    match data_type {
        DataType::Struct(fields) => fields
            .iter()
            .any(|field| matches!(field.name().as_str(), "bytes" | "path") && is_bytes_or_uri(field.data_type())),
        other => is_bytes_or_uri(other),
    }
}

fn is_bytes_or_uri(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
            | DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
    )
}

/// One image cell before any fetch.
enum Cell {
    Bytes(Buffer),
    Uri(String),
    Null,
}

impl Source {
    /// Reads the rows of a unit in order and hands them to `emit` batch by batch, until it returns `false` (the receiver is gone).
    ///
    /// Holds one row group's columns, and one batch.
    pub async fn read_unit(
        &self,
        values: &PartitionValues,
        unit: &WorkUnit,
        options: ReadOptions,
        mut emit: impl FnMut(ImageBatch) -> bool,
    ) -> Result<(), SourceError> {
        match &unit.input {
            UnitInput::ImageFiles(files) => self.read_image_files(values, files, options, &mut emit).await,
            UnitInput::RowGroups(files) => {
                for (file, row_groups) in files {
                    if !self.read_row_groups(values, file, row_groups, options, &mut emit).await? {
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    async fn read_image_files(
        &self,
        values: &PartitionValues,
        files: &[ObjectMeta],
        options: ReadOptions,
        emit: &mut impl FnMut(ImageBatch) -> bool,
    ) -> Result<(), SourceError> {
        let schema = Arc::new(Schema::new(vec![Field::new(&self.settings.id, DataType::Utf8, false)]));
        for files in files.chunks(options.batch_rows) {
            let ids: StringArray = files.iter().map(|file| Some(self.store.relative(&file.location))).collect();
            let rows =
                RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(ids)]).map_err(|e| self.arrow_error("", e))?;
            let keep = self.matching_rows("", &rows, values)?;
            let files: Vec<&ObjectMeta> = files
                .iter()
                .enumerate()
                .filter(|(row, _)| keep.as_ref().is_none_or(|keep| keep.value(*row)))
                .map(|(_, file)| file)
                .collect();
            let ids: StringArray = files.iter().map(|file| Some(self.store.relative(&file.location))).collect();
            let images = futures::stream::iter(files)
                .map(async |file| {
                    if file.size > options.max_image_bytes {
                        return Ok(Err(Reject::TooLarge { bytes: file.size, limit: options.max_image_bytes }));
                    }
                    let name = self.store.relative(&file.location);
                    match self.store.get(&name).await {
                        Ok(bytes) => Ok(Ok(Buffer::from(bytes))),
                        // Listed a moment ago and gone now, perhaps: a row of this run all the same.
                        Err(error) => refused(error.answer(), name).map(Err).ok_or(SourceError::Store(error)),
                    }
                })
                .buffered(FETCHES_IN_FLIGHT)
                .try_collect()
                .await?;
            let kept = RecordBatch::try_new_with_options(
                Arc::clone(&self.kept_schema),
                Vec::new(),
                &RecordBatchOptions::new().with_row_count(Some(ids.len())),
            )
            .map_err(|e| self.arrow_error("", e))?;
            if !ids.is_empty() && !emit(ImageBatch { ids, images, kept }) {
                break;
            }
        }
        Ok(())
    }

    /// Returns whether the receiver wants more.
    async fn read_row_groups(
        &self,
        values: &PartitionValues,
        file: &TableFile,
        row_groups: &[usize],
        options: ReadOptions,
        emit: &mut impl FnMut(ImageBatch) -> bool,
    ) -> Result<bool, SourceError> {
        let name = self.store.relative(&file.meta.location);
        let parquet_error = |source| SourceError::Parquet { file: self.store.url_of(&name), source };
        let needed = self.needed_columns(file.footer.schema());
        let mask = projection(&file.footer, needed.iter().map(String::as_str));
        let mut stream = ParquetFile::new(Arc::clone(self.store.client()), file.meta.location.clone(), file.meta.size)
            .reader(file.footer.clone())
            .with_projection(mask)
            .with_row_groups(row_groups.to_vec())
            .with_batch_size(options.batch_rows)
            .build()
            .map_err(parquet_error)?;
        let mut num_read = 0;
        if self.predicate.is_none() {
            while let Some(rows) = stream.try_next().await.map_err(parquet_error)? {
                let batch = self.image_batch(&name, num_read, &rows, options).await?;
                num_read += rows.num_rows() as u64;
                if !emit(batch) {
                    return Ok(false);
                }
            }
            return Ok(true);
        }
        // Few rows of a batch may satisfy the predicate; the model wants full batches.
        let mut full: Option<BatchCoalescer> = None;
        loop {
            let rows = stream.try_next().await.map_err(parquet_error)?;
            let ended = rows.is_none();
            if let Some(rows) = rows {
                let full = full.get_or_insert_with(|| BatchCoalescer::new(rows.schema(), options.batch_rows));
                let rows = match self.matching_rows(&name, &rows, values)? {
                    Some(keep) => filter_record_batch(&rows, &keep).map_err(|e| self.arrow_error(&name, e))?,
                    None => rows,
                };
                full.push_batch(rows).map_err(|e| self.arrow_error(&name, e))?;
            }
            let Some(full) = &mut full else { return Ok(true) };
            if ended {
                full.finish_buffered_batch().map_err(|e| self.arrow_error(&name, e))?;
            }
            while let Some(rows) = full.next_completed_batch() {
                let batch = self.image_batch(&name, num_read, &rows, options).await?;
                num_read += rows.num_rows() as u64;
                if !emit(batch) {
                    return Ok(false);
                }
            }
            if ended {
                return Ok(true);
            }
        }
    }

    fn needed_columns(&self, schema: &Schema) -> Vec<String> {
        let mut names = vec![self.settings.id.clone(), self.settings.image.clone()];
        names.extend(self.settings.columns.iter().cloned());
        if let Some(predicate) = &self.predicate {
            names.extend(predicate.columns().iter().filter(|name| schema.field_with_name(name).is_ok()).cloned());
        }
        names
    }

    /// Which rows satisfy the predicate; `None` where there is no predicate.
    fn matching_rows(
        &self,
        file: &str,
        rows: &RecordBatch,
        values: &PartitionValues,
    ) -> Result<Option<arrow::array::BooleanArray>, SourceError> {
        let Some(predicate) = &self.predicate else { return Ok(None) };
        let rows = values.extend_batch(rows).map_err(|e| self.arrow_error(file, e))?;
        predicate
            .evaluate(&rows)
            // SQL keeps a row where the predicate is true: null is not.
            .map(|keep| Some(if keep.null_count() == 0 { keep } else { prep_null_mask_filter(&keep) }))
            .map_err(|source| SourceError::Where { file: self.store.url_of(file), source })
    }

    async fn image_batch(
        &self,
        file: &str,
        first_row: u64,
        rows: &RecordBatch,
        options: ReadOptions,
    ) -> Result<ImageBatch, SourceError> {
        let column =
            |name: &str| rows.column_by_name(name).ok_or_else(|| super::missing_column(file, &rows.schema(), name));
        let ids = cast(column(&self.settings.id)?, &DataType::Utf8).map_err(|e| self.arrow_error(file, e))?;
        if let Some(row) = (0..ids.len()).find(|row| ids.is_null(*row)) {
            return Err(SourceError::NullId {
                file: self.store.url_of(file),
                column: self.settings.id.clone(),
                row: first_row + row as u64,
            });
        }
        let cells = cells(column(&self.settings.image)?);
        let images = futures::stream::iter(cells)
            .map(async |cell| match cell {
                Cell::Bytes(bytes) => Ok(Ok(bytes)),
                Cell::Null => Ok(Err(Reject::Missing)),
                Cell::Uri(uri) => self.fetch(uri, options).await,
            })
            .buffered(FETCHES_IN_FLIGHT)
            .try_collect()
            .await?;
        let kept: Vec<ArrayRef> = self
            .kept_schema
            .fields()
            .iter()
            .map(|field| cast(column(field.name())?, field.data_type()).map_err(|e| self.arrow_error(file, e)))
            .collect::<Result<_, _>>()?;
        let kept = RecordBatch::try_new_with_options(
            Arc::clone(&self.kept_schema),
            kept,
            &RecordBatchOptions::new().with_row_count(Some(rows.num_rows())),
        )
        .map_err(|e| self.arrow_error(file, e))?;
        Ok(ImageBatch { ids: ids.as_string::<i32>().clone(), images, kept })
    }

    /// Fetches the image that a cell names: an absolute URL in any store, an absolute path, or a path relative to the table.
    async fn fetch(&self, uri: String, options: ReadOptions) -> Result<Result<Buffer, Reject>, SourceError> {
        let Some((origin, name)) = split_uri(&uri) else {
            return Ok(Err(Reject::InvalidUri { uri }));
        };
        let store = match origin {
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
        let Ok(path) = store.path(&name) else {
            return Ok(Err(Reject::InvalidUri { uri }));
        };
        let read = async {
            let found = store.client().get(&path).await?;
            if found.meta.size > options.max_image_bytes {
                return Ok(Err(Reject::TooLarge { bytes: found.meta.size, limit: options.max_image_bytes }));
            }
            Ok(Ok(Buffer::from(found.bytes().await?)))
        };
        match read.await {
            Ok(image) => Ok(image),
            Err(source) => refused(&source, uri).map(Err).ok_or_else(|| store.request("read", &name, source).into()),
        }
    }

    fn arrow_error(&self, file: &str, source: arrow::error::ArrowError) -> SourceError {
        SourceError::Parquet { file: self.store.url_of(file), source: ParquetError::from(source) }
    }
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
    (0..column.len())
        .map(|row| {
            if column.is_null(row) {
                return Cell::Null;
            }
            if let Some(array) = column.as_any().downcast_ref::<BinaryArray>() {
                let offsets = array.value_offsets();
                let (start, end) = (offsets[row].unsigned_abs() as usize, offsets[row + 1].unsigned_abs() as usize);
                Cell::Bytes(array.values().slice_with_length(start, end - start))
            } else if let Some(array) = column.as_any().downcast_ref::<LargeBinaryArray>() {
                Cell::Bytes(Buffer::from(array.value(row)))
            } else if let Some(array) = column.as_any().downcast_ref::<BinaryViewArray>() {
                Cell::Bytes(Buffer::from(array.value(row)))
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
    fn what_is_no_location_is_none() {
        for uri in ["", ".", "../x.png", "s3://lake", "s3://lake/", "not a scheme://x/y"] {
            assert_eq!(split(uri), None, "{uri}");
        }
    }
}
