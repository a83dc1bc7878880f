//! The log of a table published as plain Parquet, for warehouses without a Delta reader: each version is one JSON file, the
//! manifest, which lists every live data file.
//!
//! ```text
//! latents/_manifests/00000000000000000007.json     the newest manifest is the table
//! latents/runs/<run id>/ds=2026-11-22/part-….parquet
//! ```
//!
//! The rows of a run lie under a prefix of their own, written once. A manifest is put last, and only where none of its number is, so
//! that readers who go by the newest manifest see a partition's old rows or its new ones. Who reads the folders without a manifest
//! sees the rows of older runs too.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use delta_kernel::schema::StructType;
use serde::{Deserialize, Serialize};

use super::{Change, DataFile, History, Live, LiveFile, Outcome, Place, TableError};
use crate::source::PartitionValues;
use crate::store::{PutOutcome, Store};

/// The manifests' folder within a table.
pub(super) const FOLDER: &str = "_manifests";

/// Raised when a reader of older manifests could not read newer ones.
const FORMAT_VERSION: u32 = 1;

/// One version of the table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Version of this file's form.
    format_version: u32,
    /// Version of the table, from 0.
    pub(super) version: u64,
    /// Keys of the hive partitions, outermost first.
    partition_keys: Vec<String>,
    /// Columns, partition keys included, in the form in which Delta writes schemas.
    pub(super) schema: StructType,
    /// Rows in all files.
    num_rows: u64,
    /// All live files.
    files: Vec<ManifestFile>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ManifestFile {
    #[serde(flatten)]
    file: DataFile,
    /// Values of the partition keys, in their order; null is SQL's null.
    partition: Vec<Option<String>>,
}

/// The manifests of one table.
#[derive(Debug, Clone)]
pub(super) struct ManifestLog {
    store: Store,
    partition_keys: Vec<String>,
}

impl ManifestLog {
    pub(super) fn new(store: Store, partition_keys: Vec<String>) -> Self {
        Self { store, partition_keys }
    }

    /// The newest version, or `None` where there is no table yet.
    pub(super) async fn newest(&self) -> Result<Option<Arc<Manifest>>, TableError> {
        let Some(newest) = self.store.list(FOLDER).await?.pop() else { return Ok(None) };
        let name = self.store.relative(&newest.location);
        let text = self.store.get(&name).await?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|source| TableError::Entry { url: self.store.url_of(&name), source })?;
        if manifest.format_version > FORMAT_VERSION {
            return Err(TableError::NewerFormat { url: self.store.url_of(&name), found: manifest.format_version });
        }
        Ok(Some(Arc::new(manifest)))
    }

    /// Writes version 0. Somebody else's version 0 is no error: what it says is for the caller to check.
    pub(super) async fn create(&self, wanted: &StructType) -> Result<(), TableError> {
        self.put(&Manifest {
            format_version: FORMAT_VERSION,
            version: 0,
            partition_keys: self.partition_keys.clone(),
            schema: wanted.clone(),
            num_rows: 0,
            files: Vec::new(),
        })
        .await
        .map(|_| ())
    }

    async fn put(&self, manifest: &Manifest) -> Result<PutOutcome, TableError> {
        let name = format!("{FOLDER}/{:020}.json", manifest.version);
        let text = serde_json::to_vec_pretty(manifest)
            .map_err(|source| TableError::Entry { url: self.store.url_of(&name), source })?;
        Ok(self.store.put_if_absent(&name, text.into()).await?)
    }

    /// What a version names.
    pub(super) fn live(&self, manifest: &Manifest) -> Result<Live, TableError> {
        let files = manifest.files.iter().map(|entry| self.live_file(manifest, entry)).collect::<Result<_, _>>()?;
        Ok(Live::new(files))
    }

    fn live_file(&self, manifest: &Manifest, entry: &ManifestFile) -> Result<LiveFile, TableError> {
        let url = self
            .store
            .url()
            .join(&entry.file.path)
            .map_err(|source| TableError::FileName { name: entry.file.path.clone(), source })?;
        let partition = manifest.partition_keys.iter().cloned().zip(entry.partition.iter().cloned()).collect();
        let (size_bytes, num_rows) = (entry.file.size_bytes, entry.file.num_rows);
        Ok(LiveFile { url, size_bytes, num_rows, partition: PartitionValues::new(partition) })
    }

    /// Where a new data file of a partition goes.
    pub(super) fn place(&self, partition: &PartitionValues, run_id: &str, name: &str) -> Place {
        let mut url = self.store.url().clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("runs").push(run_id).extend(partition.folders()).push(name);
        }
        let path = url.path().strip_prefix(self.store.url().path()).unwrap_or_else(|| url.path()).to_owned();
        Place { url, path }
    }

    /// Tries to make the next version.
    pub(super) async fn commit(
        &self,
        manifest: &Manifest,
        partition: &PartitionValues,
        change: &Change<'_>,
    ) -> Result<Outcome, TableError> {
        let mut files = Vec::with_capacity(manifest.files.len() + change.add.len());
        for entry in &manifest.files {
            if change.remove == 0 || self.live_file(manifest, entry)?.partition != *partition {
                files.push(entry.clone());
            }
        }
        let values: Vec<Option<String>> = partition.pairs().iter().map(|(_, value)| value.clone()).collect();
        files.extend(change.add.iter().map(|file| ManifestFile { file: file.clone(), partition: values.clone() }));
        let next = Manifest {
            format_version: FORMAT_VERSION,
            version: manifest.version + 1,
            partition_keys: manifest.partition_keys.clone(),
            schema: manifest.schema.clone(),
            num_rows: files.iter().map(|entry| entry.file.num_rows).sum(),
            files,
        };
        Ok(match self.put(&next).await? {
            PutOutcome::Created => Outcome::Committed(next.version),
            PutOutcome::AlreadyThere => Outcome::Conflicted,
        })
    }

    /// What readers who opened the table since `cutoff` may still be reading, beside what is live now, and the manifests that no
    /// such reader needs.
    pub(super) async fn history(&self, cutoff: DateTime<Utc>) -> Result<History, TableError> {
        let objects = self.store.list(FOLDER).await?;
        // The version that was the newest at the cutoff is the oldest that somebody may have open.
        let num_older = objects.iter().take_while(|object| object.last_modified < cutoff).count();
        let (obsolete, kept) = objects.split_at(num_older.saturating_sub(1));
        let mut recent = HashSet::new();
        for object in kept {
            let name = self.store.relative(&object.location);
            let text = self.store.get(&name).await?;
            let manifest: Manifest = serde_json::from_slice(&text)
                .map_err(|source| TableError::Entry { url: self.store.url_of(&name), source })?;
            for entry in &manifest.files {
                recent.insert(self.live_file(&manifest, entry)?.url.path().to_owned());
            }
        }
        Ok(History { recent, obsolete: obsolete.to_vec() })
    }
}
