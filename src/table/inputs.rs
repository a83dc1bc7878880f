//! What a run read: the source files behind each partition's rows in `latents`.
//!
//! Written before the rows are committed. A later run that finds more files in the partition than these, and nothing else changed,
//! can embed the added ones alone and carry the rows of the others over.

use std::collections::HashSet;

use object_store::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::{Live, LiveFile, TableError, fingerprint};
use crate::source::SourceFile;
use crate::store::{Store, StoreError};

/// Folder of these records, below the output prefix.
const FOLDER: &str = "_lookalike/inputs";

/// The files that a partition's rows were made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// Fingerprint of all else that the rows depend on.
    pub settings: String,
    /// The files.
    pub files: Vec<SourceFile>,
}

impl Inputs {
    fn name(run_id: &str) -> String {
        format!("{FOLDER}/{}.json", fingerprint(run_id))
    }

    /// Keeps the record of a run. The same run always has the same record, whichever revision of its rows it made.
    pub async fn write(&self, output: &Store, run_id: &str) -> Result<(), TableError> {
        let name = Self::name(run_id);
        let text =
            serde_json::to_vec(self).map_err(|source| TableError::Entry { url: output.url_of(&name), source })?;
        Ok(output.put(&name, text.into()).await?)
    }

    /// The record of a run, if it was kept.
    pub async fn read(output: &Store, run_id: &str) -> Result<Option<Self>, TableError> {
        let name = Self::name(run_id);
        match output.get(&name).await {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|source| TableError::Entry { url: output.url_of(&name), source }),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The records of runs whose rows are not live in `latents`.
    pub async fn left_over(output: &Store, latents: &Live) -> Result<Vec<ObjectMeta>, StoreError> {
        let mut records = output.list(FOLDER).await?;
        let live: HashSet<&str> = latents.files.iter().filter_map(LiveFile::run_id).map(fingerprint).collect();
        records.retain(|record| {
            let run_id = record.location.filename().and_then(|name| name.strip_suffix(".json"));
            run_id.is_some_and(|run_id| !live.contains(run_id))
        });
        Ok(records)
    }
}
