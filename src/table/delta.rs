//! The Delta log: one JSON file a version, written with a conditional put, so that of two writers one wins and no catalog is needed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{Int64Array, StructArray};
use arrow::datatypes::{DataType, Field};
use chrono::{DateTime, Utc};
use delta_kernel::committer::FileSystemCommitter;
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
use object_store::ObjectMeta;
use serde::Deserialize;

use super::{Change, DataFile, History, Live, LiveFile, Outcome, Place, TableError};
use crate::source::PartitionValues;
use crate::store::Store;

/// The log's folder within a table.
pub(super) const FOLDER: &str = "_delta_log";

/// How the log names the program that wrote an entry.
const ENGINE_INFO: &str = concat!("lookalike/", env!("CARGO_PKG_VERSION"));

/// A checkpoint sums the log up after this many versions, so that readers open one file and a few more, however old the table is.
/// Ten is what other writers of Delta tables do.
const CHECKPOINT_EVERY: u64 = 10;

/// The log of one table.
#[derive(Debug, Clone)]
pub(super) struct DeltaLog {
    store: Store,
    engine: Arc<DefaultEngine<TokioMultiThreadExecutor>>,
    partition_keys: Vec<String>,
}

impl DeltaLog {
    pub(super) fn new(store: Store, partition_keys: Vec<String>, runtime: &tokio::runtime::Handle) -> Self {
        let executor = Arc::new(TokioMultiThreadExecutor::new(runtime.clone()));
        let engine = DefaultEngineBuilder::new(Arc::clone(store.client())).with_task_executor(executor).build();
        Self { store, engine: Arc::new(engine), partition_keys }
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
    pub(super) async fn newest(&self) -> Result<Option<SnapshotRef>, TableError> {
        if self.store.list(FOLDER).await?.is_empty() {
            return Ok(None);
        }
        let snapshot = tokio::task::block_in_place(|| {
            Snapshot::builder_for(self.store.url().as_str()).build(self.engine.as_ref())
        });
        snapshot.map(Some).map_err(self.error("read"))
    }

    /// Writes version 0. Somebody else's version 0 is no error: what it says is for the caller to check.
    pub(super) async fn create(&self, wanted: &StructType) -> Result<(), TableError> {
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
            Ok(CommitResult::Committed(_) | CommitResult::Conflicted(_)) => Ok(()),
            Ok(CommitResult::Retryable(failed)) => Err(self.error("create")(failed.error)),
            Err(_) if self.newest().await?.is_some() => Ok(()),
            Err(source) => Err(self.error("create")(source)),
        }
    }

    /// What a version names.
    pub(super) fn live(&self, snapshot: &SnapshotRef) -> Result<Live, TableError> {
        let root = snapshot.table_root();
        let read = || -> Result<Vec<LiveFile>, KernelError> {
            let scan = Arc::clone(snapshot).scan_builder().build()?;
            let mut found: Vec<(String, i64, u64, HashMap<String, String>)> = Vec::new();
            for metadata in scan.scan_metadata(self.engine.as_ref())? {
                found = metadata?.visit_scan_files(found, |found, file| {
                    let num_rows = file.stats.map_or(0, |stats| stats.num_records);
                    found.push((file.path, file.size, num_rows, file.partition_values));
                })?;
            }
            // A table that another run made was opened without knowing its keys; what its files are null in, their maps leave out.
            let keys: Vec<String> = if self.partition_keys.is_empty() {
                let has = |name: &str| found.iter().any(|(.., values)| values.contains_key(name));
                snapshot.schema().fields().map(|field| field.name().clone()).filter(|name| has(name)).collect()
            } else {
                self.partition_keys.clone()
            };
            found
                .into_iter()
                .map(|(path, size, num_rows, mut values)| {
                    let pairs = keys.iter().map(|key| (key.clone(), values.remove(key))).collect();
                    Ok(LiveFile {
                        url: root.join(&path)?,
                        size_bytes: u64::try_from(size).unwrap_or(0),
                        num_rows,
                        partition: PartitionValues::new(pairs),
                    })
                })
                .collect()
        };
        tokio::task::block_in_place(read).map(Live::new).map_err(self.error("read"))
    }

    /// Where a new data file of a partition goes.
    pub(super) fn place(
        &self,
        snapshot: &SnapshotRef,
        partition: &PartitionValues,
        name: &str,
    ) -> Result<Place, TableError> {
        let place = || -> Result<Place, KernelError> {
            let transaction = self.transaction(snapshot, partition)?;
            let context = write_context(&transaction, partition)?;
            let url = context.write_dir().join(name)?;
            let path = context.resolve_file_path(&url)?;
            Ok(Place { url, path })
        };
        tokio::task::block_in_place(place).map_err(self.error("write to"))
    }

    fn transaction(&self, snapshot: &SnapshotRef, partition: &PartitionValues) -> Result<Transaction, KernelError> {
        let version = i64::try_from(snapshot.version()).unwrap_or(i64::MAX - 1) + 1;
        Arc::clone(snapshot)
            .update_table(UpdateTableOperation::Write, ENGINE_INFO, true)
            .with_transaction_id(format!("lookalike/{partition}"), version)
            .build(self.engine.as_ref(), Box::new(FileSystemCommitter::new()))
    }

    /// Tries to make the next version.
    pub(super) fn commit(
        &self,
        snapshot: &SnapshotRef,
        partition: &PartitionValues,
        change: &Change<'_>,
    ) -> Result<Outcome, TableError> {
        let commit = || -> Result<CommitResult, KernelError> {
            let mut transaction = self.transaction(snapshot, partition)?;
            if change.remove > 0 {
                self.remove_partition(snapshot, &mut transaction, partition, change.remove)?;
            }
            add_files(&mut transaction, partition, change.add)?;
            transaction.commit(self.engine.as_ref())
        };
        match tokio::task::block_in_place(commit) {
            Ok(CommitResult::Committed(committed)) => {
                let version = committed.commit_version();
                if version > 0 && version.is_multiple_of(CHECKPOINT_EVERY) {
                    self.checkpoint(version);
                }
                Ok(Outcome::Committed(version))
            }
            // Another writer came first, or our own put succeeded and its answer was lost. The newest version tells.
            Ok(CommitResult::Conflicted(_)) => Ok(Outcome::Conflicted),
            Ok(CommitResult::Retryable(failed)) => Err(self.error("publish to")(failed.error)),
            Err(source) => Err(self.error("publish to")(source)),
        }
    }

    /// Sums the log up. What was committed is committed whether or not this succeeds, and a later version tries again.
    fn checkpoint(&self, version: u64) {
        let write = || -> Result<(), KernelError> {
            let snapshot =
                Snapshot::builder_for(self.store.url().as_str()).at_version(version).build(self.engine.as_ref())?;
            snapshot.checkpoint(self.engine.as_ref(), None).map(|_| ())
        };
        match tokio::task::block_in_place(write).map_err(self.error("write a checkpoint of")) {
            Ok(()) => tracing::debug!(table = %self.store.url(), version, "wrote a checkpoint of the log"),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(version, cause, "{error}; a later commit tries again");
            }
        }
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

    /// What readers who opened the table since `cutoff` may still be reading, beside what is live now, and the log entries that no
    /// such reader needs.
    pub(super) async fn history(&self, cutoff: DateTime<Utc>) -> Result<History, TableError> {
        let objects = self.store.list(FOLDER).await?;
        let versioned: Vec<(u64, &str, &ObjectMeta)> = objects
            .iter()
            .filter_map(|object| {
                let (version, kind) = object.location.filename()?.split_once('.')?;
                Some((version.parse().ok()?, kind, object))
            })
            .collect();
        let mut recent = HashSet::new();
        // The version that was the newest at the cutoff.
        let mut oldest_needed = 0;
        for (version, _, object) in versioned.iter().filter(|(_, kind, _)| *kind == "json") {
            if object.last_modified < cutoff {
                oldest_needed = oldest_needed.max(*version);
                continue;
            }
            let name = self.store.relative(&object.location);
            let text = self.store.get(&name).await?;
            for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let action: Action = serde_json::from_slice(line)
                    .map_err(|source| TableError::Entry { url: self.store.url_of(&name), source })?;
                for file in [action.add, action.remove].into_iter().flatten() {
                    let url = self.store.url().join(&file.path).map_err(|e| self.error("read")(e.into()))?;
                    recent.insert(url.path().to_owned());
                }
            }
        }
        let is_checkpoint = |kind: &str| kind.starts_with("checkpoint") && kind.ends_with("parquet");
        let summed_up = versioned
            .iter()
            .filter(|(version, kind, _)| is_checkpoint(kind) && *version <= oldest_needed)
            .map(|(version, ..)| *version)
            .max()
            .unwrap_or(0);
        let obsolete = versioned
            .iter()
            .filter(|(version, ..)| *version < summed_up)
            .map(|(_, _, object)| (*object).clone())
            .collect();
        Ok(History { recent, obsolete })
    }
}

/// What a log entry says of a data file; all else is left out.
#[derive(Debug, Deserialize)]
struct Action {
    add: Option<Named>,
    remove: Option<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    path: String,
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
