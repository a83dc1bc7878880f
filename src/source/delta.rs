//! Delta tables as sources: the log says which files are live, what partitions they belong to, and which of their rows are deleted.
//!
//! Files are read like those of a plain Parquet table; the log decides everything that the names of folders and the footers would
//! otherwise tell. The columns are those of the table: a file that was written before a column was added has nulls there.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray as _, MapArray, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{Int32Type, Int64Type, Schema, SchemaRef};
use chrono::DateTime;
use delta_kernel::actions::deletion_vector::DeletionVectorDescriptor;
use delta_kernel::engine::arrow_conversion::TryIntoArrow as _;
use delta_kernel::engine::arrow_data::EngineDataArrowExt as _;
use delta_kernel::scan::PartitionValuesOptions;
use delta_kernel::snapshot::SnapshotBuilder;
use delta_kernel::table_features::ColumnMappingMode;
use delta_kernel::{Engine as _, KernelError, Snapshot, SnapshotRef};
use delta_kernel_default_engine::executor::tokio::TokioMultiThreadExecutor;
use delta_kernel_default_engine::{DefaultEngine, DefaultEngineBuilder};
use url::Url;

use super::units::{Found, SourceFile};
use super::{PartitionValues, SourceError};
use crate::store::{Store, Stores};

/// A version of a Delta table: the newest when the source was planned.
#[derive(Debug)]
pub(super) struct DeltaTable {
    engine: Arc<DefaultEngine<TokioMultiThreadExecutor>>,
    root: Url,
    /// Number of the version.
    pub(super) version: u64,
    /// Names of the partition columns, in the order that the log has them.
    pub(super) partition_keys: Vec<String>,
    /// The columns that the data files hold: all but the partition columns.
    pub(super) schema: SchemaRef,
}

/// The deletion vector of a file: which rows are not part of the table any more. Only its description; it is read when needed.
#[derive(Debug)]
pub(super) struct DeletedRows(DeletionVectorDescriptor);

impl DeletedRows {
    /// Tells this vector from every other one of the table, as the Delta protocol defines it.
    fn id(&self) -> String {
        let offset = self.0.offset.map(|offset| format!("@{offset}")).unwrap_or_default();
        format!("{}{}{offset}", self.0.storage_type, self.0.path_or_inline_dv)
    }
}

impl DeltaTable {
    /// Reads the log: a version, or the newest one, and the files that it names, sorted by partition and name.
    pub(super) async fn open(
        stores: &Stores,
        store: &Store,
        version: Option<u64>,
    ) -> Result<(Self, Vec<(PartitionValues, Found)>), SourceError> {
        if store.list("_delta_log").await?.is_empty() {
            return Err(SourceError::Empty {
                url: store.url().to_string(),
                wanted: "Delta log (_delta_log)".to_owned(),
            });
        }
        let executor = Arc::new(TokioMultiThreadExecutor::new(tokio::runtime::Handle::current()));
        let engine = DefaultEngineBuilder::new(Arc::clone(store.client())).with_task_executor(executor).build();
        let root = store.url().clone();
        let (table, live) = tokio::task::block_in_place(|| {
            let builder = Snapshot::builder_for(root.as_str());
            let builder = version.into_iter().fold(builder, SnapshotBuilder::at_version);
            let snapshot = builder.build(&engine).map_err(|e| delta_error(&root, e))?;
            let mapping = snapshot.table_properties().column_mapping_mode.unwrap_or(ColumnMappingMode::None);
            if mapping != ColumnMappingMode::None {
                return Err(SourceError::ColumnMapping { url: root.to_string() });
            }
            let (partition_keys, live) = live_files(&engine, &snapshot).map_err(|e| delta_error(&root, e))?;
            let columns: Schema =
                snapshot.schema().as_ref().try_into_arrow().map_err(|e| delta_error(&root, e.into()))?;
            let is_stored = |field: &&Arc<arrow::datatypes::Field>| !partition_keys.contains(field.name());
            let schema = Arc::new(Schema::new(columns.fields().iter().filter(is_stored).cloned().collect::<Vec<_>>()));
            let version = snapshot.version();
            Ok((Self { engine: Arc::new(engine), root, version, partition_keys, schema }, live))
        })?;
        if live.is_empty() {
            return Err(SourceError::Empty {
                url: store.url().to_string(),
                wanted: "file in the version of the table that is read".to_owned(),
            });
        }
        let mut found = Vec::with_capacity(live.len());
        for mut live in live {
            let url = table.root.join(&live.path).map_err(|e| delta_error(&table.root, e.into()))?;
            let pairs = table.partition_keys.iter().map(|key| {
                // An empty text stands for null, as the protocol says.
                (key.clone(), live.partition.remove(key).filter(|value| !value.is_empty()))
            });
            let values = PartitionValues::new(pairs.collect());
            // A shallow clone names files of another table, which may lie in another bucket.
            let place = stores.open(&url)?;
            let (client, path) = (Arc::clone(place.client()), place.path("")?);
            let modified = DateTime::from_timestamp_millis(live.modified_ms).unwrap_or_default();
            let is_below = url.as_str().starts_with(table.root.as_str());
            let file = SourceFile {
                name: if is_below { store.relative(&path) } else { url.to_string() },
                size: live.size,
                version: live.deleted.as_ref().map(DeletedRows::id).unwrap_or_default(),
            };
            found.push((values, Found { file, client, path, modified, deleted: live.deleted }));
        }
        found.sort_by(|(a, x), (b, y)| (a, &x.file.name).cmp(&(b, &y.file.name)));
        Ok((table, found))
    }

    /// Numbers of a file's deleted rows, ascending.
    pub(super) async fn deleted_rows(&self, deleted: &DeletedRows) -> Result<Vec<u64>, SourceError> {
        let (storage, root, vector) = (self.engine.storage_handler(), self.root.clone(), deleted.0.clone());
        // The library waits for the store in its own way, so it gets a thread that may wait.
        let read = tokio::task::spawn_blocking(move || vector.row_indexes(storage, &root)).await;
        read.unwrap_or_else(|error| Err(KernelError::generic(error))).map_err(|e| delta_error(&self.root, e))
    }
}

/// A file that a version names, as its log has it.
struct LiveFile {
    path: String,
    size: u64,
    modified_ms: i64,
    partition: HashMap<String, String>,
    deleted: Option<DeletedRows>,
}

/// The partition columns and the live files of a version.
fn live_files(
    engine: &DefaultEngine<TokioMultiThreadExecutor>,
    snapshot: &SnapshotRef,
) -> Result<(Vec<String>, Vec<LiveFile>), KernelError> {
    // The library tells the order of the partition columns by this struct alone.
    let scan =
        Arc::clone(snapshot).scan_builder().with_partition_values(PartitionValuesOptions::with_struct()).build()?;
    let mut keys = Vec::new();
    let mut files = Vec::new();
    for metadata in scan.scan_metadata(engine)? {
        let rows = metadata?.scan_files.apply_selection_vector()?.try_into_record_batch()?;
        if let Some(values) = rows.column_by_name("partitionValues_parsed").and_then(|column| column.as_struct_opt()) {
            keys = values.fields().iter().map(|field| field.name().clone()).collect();
        }
        read_files(&rows, &mut files)?;
    }
    Ok((keys, files))
}

/// The files in rows of the form that `scan_row_schema` documents.
fn read_files(rows: &RecordBatch, files: &mut Vec<LiveFile>) -> Result<(), KernelError> {
    let missing = || KernelError::generic("the scan of the log lacks a column");
    let field = |of: &StructArray, name: &str| of.column_by_name(name).cloned().ok_or_else(missing);
    let rows = StructArray::from(rows.clone());
    let (paths, sizes, times) = (field(&rows, "path")?, field(&rows, "size")?, field(&rows, "modificationTime")?);
    let (paths, sizes, times) =
        (paths.as_string::<i32>(), sizes.as_primitive::<Int64Type>(), times.as_primitive::<Int64Type>());
    let constants = field(&rows, "fileConstantValues")?;
    let partitions = field(constants.as_struct(), "partitionValues")?;
    let vectors = field(&rows, "deletionVector")?;
    let vectors = vectors.as_struct();
    let part = |name| field(vectors, name);
    let (kinds, places, offsets) = (part("storageType")?, part("pathOrInlineDv")?, part("offset")?);
    let (lengths, cardinalities) = (part("sizeInBytes")?, part("cardinality")?);
    for row in 0..rows.len() {
        let kinds = kinds.as_string::<i32>();
        let deleted = if vectors.is_valid(row) && kinds.is_valid(row) {
            let offsets = offsets.as_primitive::<Int32Type>();
            Some(DeletedRows(DeletionVectorDescriptor::try_new(
                kinds.value(row).parse()?,
                places.as_string::<i32>().value(row),
                offsets.is_valid(row).then(|| offsets.value(row)),
                lengths.as_primitive::<Int32Type>().value(row),
                cardinalities.as_primitive::<Int64Type>().value(row),
            )?))
        } else {
            None
        };
        files.push(LiveFile {
            path: paths.value(row).to_owned(),
            size: u64::try_from(sizes.value(row)).unwrap_or(0),
            modified_ms: times.value(row),
            partition: partitions.as_map_opt().map(|map| pairs(map, row)).unwrap_or_default(),
            deleted,
        });
    }
    Ok(())
}

/// The pairs of a map from text to text; those without a value are left out.
fn pairs(map: &MapArray, row: usize) -> HashMap<String, String> {
    if map.is_null(row) {
        return HashMap::new();
    }
    let entries = map.value(row);
    let texts = |column: usize| entries.column(column).as_string::<i32>().clone();
    let (keys, values): (StringArray, StringArray) = (texts(0), texts(1));
    keys.iter().zip(&values).filter_map(|(key, value)| Some((key?.to_owned(), value?.to_owned()))).collect()
}

/// The columns of a batch with nulls for those of `schema` that the file does not have.
pub(super) fn with_nulls(
    rows: &RecordBatch,
    schema: &Schema,
    needed: &[String],
) -> Result<RecordBatch, arrow::error::ArrowError> {
    let mut fields = rows.schema().fields().to_vec();
    let mut columns = rows.columns().to_vec();
    for name in needed.iter().filter(|name| rows.column_by_name(name).is_none()) {
        let Ok(field) = schema.field_with_name(name) else { continue };
        fields.push(Arc::new(field.clone().with_nullable(true)));
        columns.push(arrow::array::new_null_array(field.data_type(), rows.num_rows()));
    }
    let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
}

fn delta_error(root: &Url, source: KernelError) -> SourceError {
    // With RUST_BACKTRACE set, the library wraps its errors with a stack trace, which is nothing to tell a user.
    let source = match source {
        KernelError::Backtraced { source, .. } => source,
        other => Box::new(other),
    };
    SourceError::Delta { url: root.to_string(), source }
}
