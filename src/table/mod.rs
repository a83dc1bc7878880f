//! The published tables: Delta tables without a catalog, or plain Parquet under manifests; either way one transaction for each change
//! of a partition.
//!
//! Readers see a partition's old rows or its new ones, never a mixture: data files are written first, under new names, and one
//! conditional put of a log entry swaps them in. Data files carry the id of the run that wrote them in their names, so that what is
//! live tells which run it is of, and running again finds that there is nothing to do.
//!
//! Two logs, one protocol: `delta` and `manifest` say how a version is read and how the next one is put; what a commit is, when
//! it is tried again and when it is not needed is said here once.

mod data_file;
mod delta;
mod inputs;
mod manifest;
mod presence;
mod receipt;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray as _, RecordBatch};
use arrow::datatypes::{Int32Type, Schema};
use chrono::{DateTime, Utc};
use delta_kernel::KernelError;
use delta_kernel::engine::arrow_conversion::TryIntoKernel as _;
use delta_kernel::schema::{DataType as KernelType, StructType};
use delta_kernel::snapshot::SnapshotRef;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{ObjectMeta, ObjectStoreExt as _};
use parquet::arrow::arrow_reader::RowSelection;
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::statistics::Statistics;
use serde::{Deserialize, Serialize};
use url::Url;

use data_file::FOOTER_PREFIX;
pub(crate) use data_file::ROW_GROUP_MAX_BYTES;
pub use data_file::{DataFile, DataFileWriter};
use delta::DeltaLog;
pub use inputs::Inputs;
use manifest::{Manifest, ManifestLog};
pub use presence::{Presence, Sign};
pub use receipt::{Receipt, Receipts};

use crate::config::Publish;
use crate::parquet_file::{ParquetFile, projection};
use crate::schema::{TableName, column};
use crate::source::PartitionValues;
use crate::store::{Store, StoreError};

/// Attempts at a commit before giving up: every lost race means that another writer got through, so this many writers would have
/// to publish while one waits for its turn.
const COMMIT_ATTEMPTS: u32 = 50;

/// Data files read at a time.
const READS_IN_FLIGHT: usize = 4;

/// Name of every data file, at its beginning.
const DATA_FILE_PREFIX: &str = "part-";

/// Between the fingerprint of what a partition's rows depend on and the number of their revision, in a run id. No hexadecimal digit.
const REVISION_MARK: char = 'r';

/// The fingerprint in a run id: what the rows depend on, without how often they were made again.
pub fn fingerprint(run_id: &str) -> &str {
    run_id.split(REVISION_MARK).next().unwrap_or(run_id)
}

/// How often the rows of a run had been made again on demand; 0 for those that were made once.
pub fn revision(run_id: &str) -> u32 {
    run_id.split_once(REVISION_MARK).and_then(|(_, revision)| revision.parse().ok()).unwrap_or(0)
}

/// The run id of the next revision of the same rows.
pub fn next_revision(run_id: &str) -> String {
    format!("{}{REVISION_MARK}{}", fingerprint(run_id), revision(run_id) + 1)
}

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
    /// An entry of the log is not what it should be.
    #[error("cannot read or write the log entry {url}")]
    Entry {
        /// The entry.
        url: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A newer program wrote the log.
    #[error("{url} is of format {found}, which this version of lookalike does not know")]
    NewerFormat {
        /// The manifest.
        url: String,
        /// Its format version.
        found: u32,
    },
    /// A name in the log is no name.
    #[error("`{name}` in the log is no name of a file")]
    FileName {
        /// The name.
        name: String,
        /// Why.
        source: url::ParseError,
    },
    /// The table is published in the other way.
    #[error("the table {table} is published as {found}, and the pipeline says {wanted}")]
    OtherLog {
        /// The table.
        table: String,
        /// How it is published.
        found: &'static str,
        /// How it should be.
        wanted: &'static str,
    },
    /// This run could not be seen for so long that others may have taken its files for left over.
    #[error("the sign of life {url} could not be renewed for {minutes} minutes; nothing more is published")]
    Lapsed {
        /// The sign of life.
        url: String,
        /// For how long.
        minutes: i64,
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
    /// Vectors of one model have one length.
    #[error("{url} holds a vector of {found} values among others of {expected}")]
    Vector {
        /// The data file.
        url: String,
        /// Values of the vector.
        found: usize,
        /// Values of the others.
        expected: usize,
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
                Some(
                "ids must be unique within a partition: choose another [source] id, or keep the first row of each with duplicates = \
                 \"keep_first\""
                    .to_owned(),
            )
            }
            Self::Contention { .. } => Some("run it again when fewer writers are active".to_owned()),
            Self::OtherLog { .. } => {
                Some("write to another [output] table, or set [output] publish as it was".to_owned())
            }
            Self::NewerFormat { .. } => Some("use the version of lookalike that writes this table".to_owned()),
            Self::Lapsed { .. } => Some("run it again: finished units are kept".to_owned()),
            _ => None,
        }
    }
}

/// A data file that the table's newest version names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LiveFile {
    /// URL of the file.
    pub url: Url,
    /// Its size.
    pub size_bytes: u64,
    /// Its rows, as the log says; 0 where the log of another program does not.
    pub num_rows: u64,
    /// Its partition.
    pub partition: PartitionValues,
}

impl LiveFile {
    /// The run that wrote the file, by its name.
    pub fn run_id(&self) -> Option<&str> {
        self.name_parts()?.nth(1)
    }

    /// Number of the unit whose rows the file holds, by its name.
    pub fn unit(&self) -> Option<usize> {
        self.name_parts()?.next()?.parse().ok()
    }

    fn name_parts(&self) -> Option<std::str::Split<'_, char>> {
        let name = self.url.path().rsplit('/').next()?;
        Some(name.strip_prefix(DATA_FILE_PREFIX)?.split('-'))
    }
}

/// What is live in a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// The files, sorted by partition and name.
    pub files: Vec<LiveFile>,
}

impl Live {
    fn new(mut files: Vec<LiveFile>) -> Self {
        files.sort_by(|a, b| (&a.partition, a.url.as_str()).cmp(&(&b.partition, b.url.as_str())));
        Self { files }
    }

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

/// What became of an attempt to make the next version.
enum Outcome {
    Committed(u64),
    /// There is a version of that number, which may be our own.
    Conflicted,
}

/// Where a new data file goes.
struct Place {
    url: Url,
    /// The same relative to the table, spelled as in a URL.
    path: String,
}

/// What older versions need.
struct History {
    /// URL paths of data files that were live at some time since the cutoff.
    recent: HashSet<String>,
    /// Log entries that nobody who opened the table since the cutoff needs.
    obsolete: Vec<ObjectMeta>,
}

/// What nobody needs any more in a table.
#[derive(Debug, Default)]
pub struct LeftOver {
    /// Data files that no version since the cutoff names.
    pub files: Vec<ObjectMeta>,
    /// Log entries that no version since the cutoff is built on.
    pub log: Vec<ObjectMeta>,
}

/// How a table's versions are kept.
#[derive(Debug, Clone)]
enum Log {
    Delta(DeltaLog),
    Manifest(ManifestLog),
}

/// One version of a table, with the log it is of.
enum Version {
    Delta(DeltaLog, SnapshotRef),
    Manifest(ManifestLog, Arc<Manifest>),
}

impl Version {
    fn live(&self) -> Result<Live, TableError> {
        match self {
            Self::Delta(log, snapshot) => log.live(snapshot),
            Self::Manifest(log, manifest) => log.live(manifest),
        }
    }

    fn number(&self) -> u64 {
        match self {
            Self::Delta(_, snapshot) => snapshot.version(),
            Self::Manifest(_, manifest) => manifest.version,
        }
    }

    fn columns(&self) -> Vec<(String, KernelType)> {
        match self {
            Self::Delta(_, snapshot) => columns(&snapshot.schema()),
            Self::Manifest(_, manifest) => columns(&manifest.schema),
        }
    }

    fn place(&self, partition: &PartitionValues, run_id: &str, name: &str) -> Result<Place, TableError> {
        match self {
            Self::Delta(log, snapshot) => log.place(snapshot, partition, name),
            Self::Manifest(log, _) => Ok(log.place(partition, run_id, name)),
        }
    }

    async fn commit(&self, partition: &PartitionValues, change: &Change<'_>) -> Result<Outcome, TableError> {
        match self {
            Self::Delta(log, snapshot) => log.commit(snapshot, partition, change),
            Self::Manifest(log, manifest) => log.commit(manifest, partition, change).await,
        }
    }
}

/// One published table.
#[derive(Debug, Clone)]
pub struct Table {
    name: TableName,
    store: Store,
    log: Log,
    presence: Presence,
}

impl Table {
    /// Names the table below the output prefix; nothing is read or written yet.
    pub fn new(
        output: &Store,
        name: TableName,
        partition_keys: &[String],
        publish: Publish,
        presence: &Presence,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self, StoreError> {
        let store = output.folder(name.name())?;
        let partition_keys = if name == TableName::Runs { Vec::new() } else { partition_keys.to_vec() };
        let log = match publish {
            Publish::Delta => Log::Delta(DeltaLog::new(store.clone(), partition_keys, runtime)),
            Publish::Parquet => Log::Manifest(ManifestLog::new(store.clone(), partition_keys)),
        };
        Ok(Self { name, store, log, presence: presence.clone() })
    }

    /// Names a table that is published below `output` in whichever way, by this pipeline or another; `None` where there is none.
    pub async fn find(
        output: &Store,
        name: TableName,
        presence: &Presence,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Option<Self>, TableError> {
        for publish in [Publish::Delta, Publish::Parquet] {
            let table = Self::new(output, name, &[], publish, presence, runtime)?;
            if table.newest().await?.is_some() {
                return Ok(Some(table));
            }
        }
        Ok(None)
    }

    /// The table's name.
    pub fn name(&self) -> TableName {
        self.name
    }

    /// The table's folder.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The newest version, or `None` where there is no table yet.
    async fn newest(&self) -> Result<Option<Version>, TableError> {
        Ok(match &self.log {
            Log::Delta(log) => log.newest().await?.map(|snapshot| Version::Delta(log.clone(), snapshot)),
            Log::Manifest(log) => log.newest().await?.map(|manifest| Version::Manifest(log.clone(), manifest)),
        })
    }

    async fn newest_there(&self) -> Result<Version, TableError> {
        let missing = || KernelError::generic("there is no log");
        self.newest().await?.ok_or_else(|| TableError::Delta {
            action: "find",
            table: self.store.url().to_string(),
            source: Box::new(missing()),
        })
    }

    /// Creates the table with the columns of `schema` (partition keys included), unless it is there; then checks its columns.
    pub async fn ensure(&self, schema: &Schema) -> Result<(), TableError> {
        let wanted: StructType = schema.try_into_kernel().map_err(|source| TableError::Delta {
            action: "define",
            table: self.store.url().to_string(),
            source: Box::new(KernelError::from(source)),
        })?;
        let found = self.newest_or_first(&wanted).await?.columns();
        if found == columns(&wanted) {
            Ok(())
        } else {
            Err(TableError::OtherSchema {
                table: self.store.url().to_string(),
                difference: difference(&found, &columns(&wanted)),
            })
        }
    }

    /// The newest version; where there is none, an empty one that is made now, by us or by somebody who was faster.
    async fn newest_or_first(&self, wanted: &StructType) -> Result<Version, TableError> {
        let (other, found, wanted_log) = match &self.log {
            Log::Delta(_) => (manifest::FOLDER, Publish::Parquet.name(), Publish::Delta.name()),
            Log::Manifest(_) => (delta::FOLDER, Publish::Delta.name(), Publish::Parquet.name()),
        };
        for _ in 0..COMMIT_ATTEMPTS {
            if let Some(version) = self.newest().await? {
                return Ok(version);
            }
            if !self.store.list(other).await?.is_empty() {
                return Err(TableError::OtherLog { table: self.store.url().to_string(), found, wanted: wanted_log });
            }
            // A store may refuse two puts of one name that meet, and then none has landed.
            match &self.log {
                Log::Delta(log) => log.create(wanted).await?,
                Log::Manifest(log) => log.create(wanted).await?,
            }
        }
        Err(TableError::Contention { table: self.store.url().to_string(), partition: "the first version".to_owned() })
    }

    /// The files that the newest version names; none where there is no table.
    pub async fn live(&self) -> Result<Live, TableError> {
        match self.newest().await? {
            Some(version) => version.live(),
            None => Ok(Live::default()),
        }
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
        // Attempts at one unit write to different files; the receipt decides which one counts.
        let attempt = uuid::Uuid::new_v4().simple().to_string();
        let name = format!("{DATA_FILE_PREFIX}{unit:05}-{run_id}-{}.parquet", &attempt[..8]);
        let place = self.newest_there().await?.place(partition, run_id, &name)?;
        DataFileWriter::create(&self.store, place.url, place.path, schema, footer)
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

    /// Makes `files` the whole content of a partition, if the partition's rows are still those of run `seen`: for rows that were made
    /// of those. Otherwise nothing is changed.
    pub async fn rewrite_partition(
        &self,
        partition: &PartitionValues,
        seen: &str,
        files: &[DataFile],
    ) -> Result<Published, TableError> {
        self.commit(partition, |live| {
            (live.run_of(partition) == Some(seen)).then(|| Change { add: files, remove: live.of(partition).count() })
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
        let mut tried: Vec<Url> = Vec::new();
        for _ in 0..COMMIT_ATTEMPTS {
            let version = self.newest_there().await?;
            let live = version.live()?;
            // The commit that came first may be our own, of which nobody told us.
            if !tried.is_empty() && tried.iter().all(|url| live.files.iter().any(|file| file.url == *url)) {
                return Ok(Published::Version(version.number()));
            }
            let Some(change) = decide(&live) else { return Ok(Published::Unchanged) };
            let urls = change.add.iter().map(|file| Ok(self.as_live(partition, file)?.url));
            tried = urls.collect::<Result<_, TableError>>()?;
            self.presence.check()?;
            if let Outcome::Committed(version) = version.commit(partition, &change).await? {
                return Ok(Published::Version(version));
            }
        }
        Err(TableError::Contention { table: self.store.url().to_string(), partition: partition.name() })
    }

    /// What nobody who opened the table since `cutoff` needs, and was written before it. Files of other programs are left alone.
    pub async fn left_over(&self, cutoff: DateTime<Utc>) -> Result<LeftOver, TableError> {
        // Listed before the log is read: a file that is committed in between is then in the log.
        let objects = self.store.list("").await?;
        let Some(version) = self.newest().await? else { return Ok(LeftOver::default()) };
        let history = match &self.log {
            Log::Delta(log) => log.history(cutoff).await?,
            Log::Manifest(log) => log.history(cutoff).await?,
        };
        let mut needed = HashSet::new();
        for url_path in version.live()?.files.iter().map(|file| file.url.path().to_owned()).chain(history.recent) {
            let path = object_store::path::Path::from_url_path(&url_path)
                .map_err(|e| self.store.request("name", &url_path, e.into()))?;
            needed.insert(path);
        }
        let is_data_file = |object: &ObjectMeta| {
            object
                .location
                .filename()
                .is_some_and(|name| name.starts_with(DATA_FILE_PREFIX) && name.ends_with(".parquet"))
        };
        let files = objects
            .into_iter()
            .filter(|object| {
                is_data_file(object) && object.last_modified < cutoff && !needed.contains(&object.location)
            })
            .collect();
        Ok(LeftOver { files, log: history.obsolete })
    }

    /// A data file as if it were live, to read it before it is.
    pub fn as_live(&self, partition: &PartitionValues, file: &DataFile) -> Result<LiveFile, TableError> {
        let url = self
            .store
            .url()
            .join(&file.path)
            .map_err(|source| TableError::FileName { name: file.path.clone(), source })?;
        Ok(LiveFile { url, size_bytes: file.size_bytes, num_rows: file.num_rows, partition: partition.clone() })
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

    /// Reads columns of some rows of a live file, in their order, `batch_rows` at a time. Row groups without any of these rows are not
    /// fetched; of the others, one is in memory at a time.
    pub async fn scan(
        &self,
        file: &LiveFile,
        columns: &[&str],
        rows: Option<&[Range<usize>]>,
        batch_rows: usize,
    ) -> Result<BoxStream<'static, Result<RecordBatch, TableError>>, TableError> {
        let url = file.url.to_string();
        let open = async {
            let parquet = self.open(file)?;
            let metadata = parquet.clone().metadata().await?;
            let mask = projection(&metadata, columns.iter().copied());
            let num_rows = usize::try_from(metadata.metadata().file_metadata().num_rows()).unwrap_or(usize::MAX);
            let mut reader = parquet.reader(metadata).with_projection(mask).with_batch_size(batch_rows);
            if let Some(rows) = rows {
                reader =
                    reader.with_row_selection(RowSelection::from_consecutive_ranges(rows.iter().cloned(), num_rows));
            }
            reader.build()
        };
        match open.await {
            Ok(stream) => Ok(stream.map_err(move |source| TableError::Read { url: url.clone(), source }).boxed()),
            Err(source) => Err(TableError::Read { url, source }),
        }
    }

    /// The rows of some cells in a live file that is sorted by cells: each cell with its rows, in the order of the file. Row groups of
    /// other cells are not fetched.
    pub async fn rows_of_cells(
        &self,
        file: &LiveFile,
        cells: &Range<u32>,
    ) -> Result<Vec<(u32, Range<usize>)>, TableError> {
        let read = async {
            let parquet = self.open(file)?;
            let metadata = parquet.clone().metadata().await?;
            let mask = projection(&metadata, [column::CELL]);
            let mut found: Vec<(u32, Range<usize>)> = Vec::new();
            let mut first = 0;
            for (number, group) in metadata.metadata().row_groups().iter().enumerate() {
                let num_rows = usize::try_from(group.num_rows()).unwrap_or(0);
                let start = first;
                first += num_rows;
                if !may_have_cells(group, cells) {
                    continue;
                }
                let reader = parquet.clone().reader(metadata.clone()).with_projection(mask.clone());
                let batches: Vec<RecordBatch> = reader.with_row_groups(vec![number]).build()?.try_collect().await?;
                let cells_of = batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int32Type>());
                for (row, cell) in (start..).zip(cells_of) {
                    let wanted = cell.and_then(|cell| u32::try_from(cell).ok()).filter(|cell| cells.contains(cell));
                    let Some(cell) = wanted else { continue };
                    match found.last_mut() {
                        Some((last, rows)) if *last == cell && rows.end == row => rows.end += 1,
                        _ => found.push((cell, row..row + 1)),
                    }
                }
            }
            Ok(found)
        };
        read.await.map_err(|source| TableError::Read { url: file.url.to_string(), source })
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

/// Whether a row group has rows of some cells, as far as its statistics tell.
fn may_have_cells(group: &RowGroupMetaData, cells: &Range<u32>) -> bool {
    let column = group.columns().iter().find(|chunk| chunk.column_path().string() == column::CELL);
    let Some(Statistics::Int32(values)) = column.and_then(|chunk| chunk.statistics()) else { return true };
    match (values.min_opt(), values.max_opt()) {
        (Some(min), Some(max)) => i64::from(*max) >= i64::from(cells.start) && i64::from(*min) < i64::from(cells.end),
        // Of rows without a vector alone.
        _ => values.null_count_opt() != u64::try_from(group.num_rows()).ok(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_count_up_and_keep_the_fingerprint() {
        let once = "0123456789abcdef";
        let again = next_revision(once);
        assert_eq!((revision(once), again.as_str()), (0, "0123456789abcdefr1"));
        assert_eq!((fingerprint(&again), revision(&again)), (once, 1));
        assert_eq!(next_revision("0123456789abcdefr9"), "0123456789abcdefr10");
    }
}
