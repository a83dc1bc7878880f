//! The published tables: Delta tables without a catalog, one transaction for each change of a partition.
//!
//! Readers see a partition's old rows or its new ones, never a mixture: data files are written first, under new names, and one
//! conditional put of a log entry swaps them in. Data files carry the id of the run that wrote them in their names, so that what is
//! live tells which run it is of, and running again finds that there is nothing to do.

mod data_file;
mod receipt;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch, StructArray};
use arrow::datatypes::{DataType, Field, Schema};
use delta_kernel::committer::FileSystemCommitter;
use delta_kernel::engine::arrow_conversion::TryIntoKernel as _;
use delta_kernel::expressions::{ColumnName, Expression, Predicate, Scalar};
use delta_kernel::schema::{DataType as KernelType, StructType};
use delta_kernel::snapshot::SnapshotRef;
use delta_kernel::transaction::create_table::create_table;
use delta_kernel::transaction::data_layout::DataLayout;
use delta_kernel::transaction::{BoundWriteContext, CommitResult, Transaction, UpdateTableOperation};
use delta_kernel::{FileMeta, KernelError, Snapshot};
use delta_kernel_default_engine::executor::tokio::TokioMultiThreadExecutor;
use delta_kernel_default_engine::parquet::DataFileMetadata;
use delta_kernel_default_engine::{DefaultEngine, DefaultEngineBuilder, build_add_file_metadata};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectStoreExt as _;
use parquet::errors::ParquetError;
use url::Url;

use data_file::FOOTER_PREFIX;
pub use data_file::{DataFile, DataFileWriter};
pub use receipt::{Receipt, Receipts};

use crate::parquet_file::{ParquetFile, projection};
use crate::schema::TableName;
use crate::source::PartitionValues;
use crate::store::{Store, StoreError};

/// How the log names the program that wrote an entry.
const ENGINE_INFO: &str = concat!("lookalike/", env!("CARGO_PKG_VERSION"));

/// Attempts at a commit before giving up: every lost race means that another writer got through, so this many writers would have
/// to publish while one waits for its turn.
const COMMIT_ATTEMPTS: u32 = 50;

/// Data files read at a time.
const READS_IN_FLIGHT: usize = 4;

/// A published table that cannot be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The Delta log cannot be read or written.
    #[error("cannot {action} the Delta table {table}")]
    Delta {
        /// What was tried.
        action: &'static str,
        /// The table.
        table: String,
        /// What the log says.
        source: Box<KernelError>,
    },
    /// Another program's table lies there, or an older version of ours, or one with other kept columns.
    #[error("the table {table} has other columns than this pipeline writes: {difference}")]
    OtherSchema {
        /// The table.
        table: String,
        /// What it lacks, and what it has in addition.
        difference: String,
    },
    /// Others kept publishing between our reading and our writing.
    #[error("gave up publishing {partition} of {table}: {COMMIT_ATTEMPTS} commits of others came first")]
    Contention {
        /// The table.
        table: String,
        /// The partition.
        partition: String,
    },
    /// A data file cannot be written.
    #[error("cannot write {url}")]
    Write {
        /// The file.
        url: String,
        /// Why.
        source: ParquetError,
    },
    /// A data file cannot be read.
    #[error("cannot read {url}")]
    Read {
        /// The file.
        url: String,
        /// Why.
        source: ParquetError,
    },
    /// A receipt is not what we write.
    #[error("cannot read or write the receipt {url}")]
    Receipt {
        /// The receipt.
        url: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The rows about to be published are not those that were read.
    #[error("{partition} of {table} would get {found} rows for {expected} source rows; nothing was published")]
    RowCount {
        /// The table.
        table: String,
        /// The partition.
        partition: String,
        /// Rows in the data files.
        found: u64,
        /// Rows that were read.
        expected: u64,
    },
    /// Two rows of a partition have one key.
    #[error("{count} ids occur more than once in {partition}, among them {examples}; nothing was published")]
    DuplicateIds {
        /// The partition.
        partition: String,
        /// How many.
        count: usize,
        /// Some of them.
        examples: String,
    },
}

impl TableError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::OtherSchema { .. } => {
                Some("write to another [output] table, or keep the same [source] columns".to_owned())
            }
            Self::DuplicateIds { .. } => {
                Some("ids must be unique within a partition: choose another [source] id".to_owned())
            }
            Self::Contention { .. } => Some("run it again when fewer writers are active".to_owned()),
            _ => None,
        }
    }
}

/// A data file that the table's newest version names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveFile {
    /// URL of the file.
    pub url: Url,
    /// Its size.
    pub size_bytes: u64,
    /// Its partition.
    pub partition: PartitionValues,
}

impl LiveFile {
    /// The run that wrote the file, by its name.
    pub fn run_id(&self) -> Option<&str> {
        let name = self.url.path().rsplit('/').next()?;
        name.strip_prefix("part-")?.split('-').nth(1)
    }
}

/// What is live in a table.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// The files, sorted by partition and name.
    pub files: Vec<LiveFile>,
}

impl Live {
    /// The files of one partition.
    pub fn of<'a>(&'a self, partition: &'a PartitionValues) -> impl Iterator<Item = &'a LiveFile> {
        self.files.iter().filter(move |file| file.partition == *partition)
    }

    /// The run whose rows a partition holds, if it holds any and all are of one run.
    pub fn run_of<'a>(&'a self, partition: &'a PartitionValues) -> Option<&'a str> {
        let mut runs = self.of(partition).map(LiveFile::run_id);
        let first = runs.next()??;
        runs.all(|run| run == Some(first)).then_some(first)
    }

    /// The partitions that hold rows.
    pub fn partitions(&self) -> Vec<PartitionValues> {
        let mut partitions: Vec<_> = self.files.iter().map(|file| file.partition.clone()).collect();
        partitions.dedup();
        partitions
    }
}

/// What publishing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The rows are live now, as this version of the table.
    Version(u64),
    /// Nothing was changed: they were live already, put there by an earlier attempt or by another process of the same run, or the
    /// table was not as it had been seen.
    Unchanged,
}

/// A change of one partition.
struct Change<'f> {
    add: &'f [DataFile],
    /// How many live files to remove: all of the partition, or none.
    remove: usize,
}

/// One Delta table.
#[derive(Debug, Clone)]
pub struct Table {
    name: TableName,
    store: Store,
    engine: Arc<DefaultEngine<TokioMultiThreadExecutor>>,
    partition_keys: Vec<String>,
}

impl Table {
    /// Names the table below the output prefix; nothing is read or written yet.
    pub fn new(
        output: &Store,
        name: TableName,
        partition_keys: &[String],
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self, StoreError> {
        let store = output.folder(name.name())?;
        let executor = Arc::new(TokioMultiThreadExecutor::new(runtime.clone()));
        let engine = DefaultEngineBuilder::new(Arc::clone(store.client())).with_task_executor(executor).build();
        let partition_keys = if name == TableName::Runs { Vec::new() } else { partition_keys.to_vec() };
        Ok(Self { name, store, engine: Arc::new(engine), partition_keys })
    }

    /// The table's name.
    pub fn name(&self) -> TableName {
        self.name
    }

    /// The table's folder.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn error(&self, action: &'static str) -> impl Fn(KernelError) -> TableError {
        let table = self.store.url().to_string();
        move |source| {
            // With RUST_BACKTRACE set, the library wraps its errors with a stack trace, which is nothing to tell a user.
            let source = match source {
                KernelError::Backtraced { source, .. } => source,
                other => Box::new(other),
            };
            TableError::Delta { action, table: table.clone(), source }
        }
    }

    /// The newest version, or `None` where there is no table yet.
    async fn snapshot(&self) -> Result<Option<SnapshotRef>, TableError> {
        if self.store.list("_delta_log").await?.is_empty() {
            return Ok(None);
        }
        let snapshot = tokio::task::block_in_place(|| {
            Snapshot::builder_for(self.store.url().as_str()).build(self.engine.as_ref())
        });
        snapshot.map(Some).map_err(self.error("read"))
    }

    /// Creates the table with the columns of `schema` (partition keys included), unless it is there; then checks its columns.
    pub async fn ensure(&self, schema: &Schema) -> Result<(), TableError> {
        let wanted: StructType = schema.try_into_kernel().map_err(|e| self.error("define")(e.into()))?;
        if self.snapshot().await?.is_none() {
            // The Delta library resolves links in local paths, for which the folder must be there.
            if let Ok(folder) = self.store.url().to_file_path() {
                std::fs::create_dir_all(&folder).map_err(|e| self.error("create")(e.into()))?;
            }
            let mut builder = create_table(self.store.url().as_str(), Arc::new(wanted.clone()), ENGINE_INFO, true);
            if !self.partition_keys.is_empty() {
                builder = builder.with_data_layout(DataLayout::partitioned(self.partition_keys.clone()));
            }
            let created = tokio::task::block_in_place(|| {
                builder.build(self.engine.as_ref(), Box::new(FileSystemCommitter::new()))?.commit(self.engine.as_ref())
            });
            match created {
                Ok(CommitResult::Committed(_) | CommitResult::Conflicted(_)) => {}
                Ok(CommitResult::Retryable(failed)) => return Err(self.error("create")(failed.error)),
                // Somebody else was faster; what they made is checked below.
                Err(_) if self.snapshot().await?.is_some() => {}
                Err(source) => return Err(self.error("create")(source)),
            }
        }
        let Some(snapshot) = self.snapshot().await? else {
            return Err(self.error("create")(KernelError::generic("the table is not there after it was created")));
        };
        let found = columns(&snapshot.schema());
        if found == columns(&wanted) {
            Ok(())
        } else {
            Err(TableError::OtherSchema {
                table: self.store.url().to_string(),
                difference: difference(&found, &columns(&wanted)),
            })
        }
    }

    /// The files that the newest version names; none where there is no table.
    pub async fn live(&self) -> Result<Live, TableError> {
        match self.snapshot().await? {
            Some(snapshot) => self.live_in(&snapshot),
            None => Ok(Live::default()),
        }
    }

    fn live_in(&self, snapshot: &SnapshotRef) -> Result<Live, TableError> {
        let root = snapshot.table_root();
        let read = || -> Result<Vec<LiveFile>, KernelError> {
            let scan = Arc::clone(snapshot).scan_builder().build()?;
            let mut found: Vec<(String, i64, HashMap<String, String>)> = Vec::new();
            for metadata in scan.scan_metadata(self.engine.as_ref())? {
                found = metadata?.visit_scan_files(found, |found, file| {
                    found.push((file.path, file.size, file.partition_values));
                })?;
            }
            found
                .into_iter()
                .map(|(path, size, mut values)| {
                    let pairs = self.partition_keys.iter().map(|key| (key.clone(), values.remove(key))).collect();
                    Ok(LiveFile {
                        url: root.join(&path)?,
                        size_bytes: u64::try_from(size).unwrap_or(0),
                        partition: PartitionValues::new(pairs),
                    })
                })
                .collect()
        };
        let mut files = tokio::task::block_in_place(read).map_err(self.error("read"))?;
        files.sort_by(|a, b| (&a.partition, a.url.as_str()).cmp(&(&b.partition, b.url.as_str())));
        Ok(Live { files })
    }

    /// Starts a data file for a unit of a run. The table must be there.
    pub async fn create_file(
        &self,
        partition: &PartitionValues,
        run_id: &str,
        unit: usize,
        schema: arrow::datatypes::SchemaRef,
        footer: &[(&str, String)],
    ) -> Result<DataFileWriter, TableError> {
        let snapshot = self.snapshot_there().await?;
        let context = tokio::task::block_in_place(|| {
            let transaction = self.transaction(&snapshot, partition)?;
            write_context(&transaction, partition)
        })
        .map_err(self.error("write to"))?;
        // Attempts at one unit write to different files; the receipt decides which one counts.
        let attempt = uuid::Uuid::new_v4().simple().to_string();
        let name = format!("part-{unit:05}-{run_id}-{}.parquet", &attempt[..8]);
        let url = context.write_dir().join(&name).map_err(|e| self.error("write to")(e.into()))?;
        let path = context.resolve_file_path(&url).map_err(self.error("write to"))?;
        DataFileWriter::create(&self.store, url, path, schema, footer)
    }

    async fn snapshot_there(&self) -> Result<SnapshotRef, TableError> {
        self.snapshot().await?.ok_or_else(|| self.error("find")(KernelError::generic("there is no Delta log")))
    }

    fn transaction(&self, snapshot: &SnapshotRef, partition: &PartitionValues) -> Result<Transaction, KernelError> {
        let version = i64::try_from(snapshot.version()).unwrap_or(i64::MAX - 1) + 1;
        Arc::clone(snapshot)
            .update_table(UpdateTableOperation::Write, ENGINE_INFO, true)
            .with_transaction_id(format!("lookalike/{partition}"), version)
            .build(self.engine.as_ref(), Box::new(FileSystemCommitter::new()))
    }

    /// Makes `files` the whole content of a partition, in one transaction. Where the partition already holds rows of the same run,
    /// nothing is changed: they are the same rows.
    pub async fn replace_partition(
        &self,
        partition: &PartitionValues,
        run_id: &str,
        files: &[DataFile],
    ) -> Result<Published, TableError> {
        self.commit(partition, |live| {
            let num_old = live.of(partition).count();
            let is_done = live.run_of(partition) == Some(run_id) || (files.is_empty() && num_old == 0);
            (!is_done).then_some(Change { add: files, remove: num_old })
        })
        .await
    }

    /// Appends files to a table without partitions, if it is still as `seen`. Otherwise others have appended: look again.
    pub async fn append_to(&self, seen: &Live, files: &[DataFile]) -> Result<Published, TableError> {
        self.commit(&PartitionValues::default(), |live| {
            (live.files == seen.files).then_some(Change { add: files, remove: 0 })
        })
        .await
    }

    /// Commits the change that `decide` makes of what is live, until it gets through or there is nothing left to change.
    async fn commit<'f>(
        &self,
        partition: &PartitionValues,
        decide: impl Fn(&Live) -> Option<Change<'f>>,
    ) -> Result<Published, TableError> {
        for _ in 0..COMMIT_ATTEMPTS {
            let snapshot = self.snapshot_there().await?;
            let Some(change) = decide(&self.live_in(&snapshot)?) else { return Ok(Published::Unchanged) };
            let commit = || -> Result<CommitResult, KernelError> {
                let mut transaction = self.transaction(&snapshot, partition)?;
                if change.remove > 0 {
                    self.remove_partition(&snapshot, &mut transaction, partition, change.remove)?;
                }
                add_files(&mut transaction, partition, change.add)?;
                transaction.commit(self.engine.as_ref())
            };
            match tokio::task::block_in_place(commit) {
                Ok(CommitResult::Committed(committed)) => return Ok(Published::Version(committed.commit_version())),
                // Another writer came first, or our own put succeeded and its answer was lost. The newest version tells: next round.
                Ok(CommitResult::Conflicted(_)) => {}
                Ok(CommitResult::Retryable(failed)) => return Err(self.error("publish to")(failed.error)),
                Err(source) => return Err(self.error("publish to")(source)),
            }
        }
        Err(TableError::Contention { table: self.store.url().to_string(), partition: partition.name() })
    }

    /// Removes the live files of a partition, which must be `expected` many.
    fn remove_partition(
        &self,
        snapshot: &SnapshotRef,
        transaction: &mut Transaction,
        partition: &PartitionValues,
        expected: usize,
    ) -> Result<(), KernelError> {
        let conditions = partition.pairs().iter().map(|(key, value)| {
            let column = Expression::column(ColumnName::new([key.as_str()]));
            match value {
                Some(value) => Predicate::eq(column, Expression::literal(value.clone())),
                None => Predicate::is_null(column),
            }
        });
        let mut scan = Arc::clone(snapshot).scan_builder();
        if !partition.is_empty() {
            scan = scan.with_predicate(Arc::new(Predicate::and_from(conditions)));
        }
        let mut removed = 0;
        for metadata in scan.build()?.scan_metadata(self.engine.as_ref())? {
            let files = metadata?.scan_files;
            removed += files.selection_vector().iter().filter(|selected| **selected).count();
            transaction.remove_files(files);
        }
        // A predicate on partition columns selects whole files exactly; anything else would lose rows of other partitions.
        if removed == expected {
            Ok(())
        } else {
            Err(KernelError::generic(format!("{removed} files would be removed where {expected} are live")))
        }
    }

    /// A data file as if it were live, to read it before it is.
    pub fn as_live(&self, partition: &PartitionValues, file: &DataFile) -> Result<LiveFile, TableError> {
        let url = self.store.url().join(&file.path).map_err(|e| self.error("name a file of")(e.into()))?;
        Ok(LiveFile { url, size_bytes: file.size_bytes, partition: partition.clone() })
    }

    /// Whether a data file is there and whole. One may be gone: a vacuum takes files that no commit names.
    pub async fn is_there(&self, file: &DataFile) -> Result<bool, TableError> {
        let live = self.as_live(&PartitionValues::default(), file)?;
        let path = object_store::path::Path::from_url_path(live.url.path())
            .map_err(|e| self.store.request("name", &file.path, e.into()))?;
        match self.store.client().head(&path).await {
            Ok(meta) => Ok(meta.size == file.size_bytes),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.store.request("look up", &file.path, source).into()),
        }
    }

    /// Reads columns of live files, in the files' order; each batch with its file.
    pub async fn read(
        &self,
        files: Vec<LiveFile>,
        columns: &[&str],
    ) -> Result<Vec<(LiveFile, RecordBatch)>, TableError> {
        let batches: Vec<Vec<(LiveFile, RecordBatch)>> = futures::stream::iter(files)
            .map(async |file| {
                let batches = self
                    .read_file(&file, columns)
                    .await
                    .map_err(|source| TableError::Read { url: file.url.to_string(), source })?;
                Ok::<_, TableError>(batches.into_iter().map(|batch| (file.clone(), batch)).collect())
            })
            .buffered(READS_IN_FLIGHT)
            .try_collect()
            .await?;
        Ok(batches.into_iter().flatten().collect())
    }

    /// A value of a live file's footer, as [`Table::create_file`] was given it.
    pub async fn footer_value(&self, file: &LiveFile, key: &str) -> Result<Option<String>, TableError> {
        let read = async { self.open(file)?.metadata().await };
        let metadata = read.await.map_err(|source| TableError::Read { url: file.url.to_string(), source })?;
        let pairs = metadata.metadata().file_metadata().key_value_metadata();
        let key = format!("{FOOTER_PREFIX}{key}");
        Ok(pairs.into_iter().flatten().find(|pair| pair.key == key).and_then(|pair| pair.value.clone()))
    }

    fn open(&self, file: &LiveFile) -> Result<ParquetFile, ParquetError> {
        let path = object_store::path::Path::from_url_path(file.url.path())
            .map_err(|source| ParquetError::External(Box::new(object_store::Error::from(source))))?;
        Ok(ParquetFile::new(Arc::clone(self.store.client()), path, file.size_bytes))
    }

    async fn read_file(&self, file: &LiveFile, columns: &[&str]) -> Result<Vec<RecordBatch>, ParquetError> {
        let parquet = self.open(file)?;
        let metadata = parquet.clone().metadata().await?;
        let mask = projection(&metadata, columns.iter().copied());
        parquet.reader(metadata).with_projection(mask).build()?.try_collect().await
    }
}

/// What tells two lists of columns apart, in words.
fn difference(found: &[(String, KernelType)], wanted: &[(String, KernelType)]) -> String {
    let only = |these: &[(String, KernelType)], those: &[(String, KernelType)]| -> Vec<String> {
        let missing = these.iter().filter(|column| !those.contains(column));
        missing.map(|(name, data_type)| format!("`{name}` ({data_type})")).collect()
    };
    let (lacks, has) = (only(wanted, found), only(found, wanted));
    let parts = [("it lacks", lacks), ("it has in addition", has)];
    let parts: Vec<String> = parts
        .into_iter()
        .filter(|(_, columns)| !columns.is_empty())
        .map(|(words, columns)| format!("{words} {}", columns.join(", ")))
        .collect();
    if parts.is_empty() { "the same ones in another order".to_owned() } else { parts.join("; ") }
}

fn columns(schema: &StructType) -> Vec<(String, KernelType)> {
    schema.fields().map(|field| (field.name().clone(), field.data_type().clone())).collect()
}

fn add_files(
    transaction: &mut Transaction,
    partition: &PartitionValues,
    files: &[DataFile],
) -> Result<(), KernelError> {
    let context = write_context(transaction, partition)?;
    for file in files {
        let url = context.table_root_dir().join(&file.path)?;
        let meta = FileMeta::new(url, file.modified_ms, file.size_bytes);
        let num_rows = i64::try_from(file.num_rows).unwrap_or(i64::MAX);
        let stats = StructArray::from(vec![(
            Arc::new(Field::new("numRecords", DataType::Int64, true)),
            Arc::new(Int64Array::from(vec![num_rows])) as _,
        )]);
        transaction.add_files(build_add_file_metadata(DataFileMetadata::new(meta, stats), &context)?);
    }
    Ok(())
}

fn write_context(transaction: &Transaction, partition: &PartitionValues) -> Result<BoundWriteContext, KernelError> {
    let builder = transaction.write_state()?.write_context_builder();
    if partition.is_empty() {
        return builder.build();
    }
    let values = partition
        .pairs()
        .iter()
        .map(|(key, value)| {
            let value = value.clone().map_or(Scalar::Null(KernelType::STRING), Scalar::from);
            (key.clone(), value)
        })
        .collect();
    builder.with_partition_values(values).build()
}

/// Rows by status, summed over receipts.
pub fn sum_by_status<'a>(receipts: impl IntoIterator<Item = &'a Receipt>) -> BTreeMap<String, u64> {
    let mut sum = BTreeMap::new();
    for receipt in receipts {
        for (status, rows) in &receipt.rows_by_status {
            *sum.entry(status.clone()).or_default() += rows;
        }
    }
    sum
}
