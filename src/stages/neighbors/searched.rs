//! Which lists were found to be right for which latents.
//!
//! A list stays right when rows are added that are farther than its last neighbor. Its partition then keeps the run id under which it
//! was written, which speaks of older latents; this record says that it was looked at. It is also what a later run starts from: the
//! latents that changed since are all that it has to compare.

use std::collections::BTreeMap;

use object_store::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::{Plan, Quality};
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::source::PartitionValues;
use crate::stages::{Job, StageReport};
use crate::store::{Store, StoreError};
use crate::table::{Live, TableError};

/// Folder of the records, below the output prefix.
const FOLDER: &str = "_lookalike/searched";

/// Records that are kept and looked at. The newest is the one that fits, unless runs with other settings share the tables.
const RECORDS_KEPT: usize = 8;

/// One record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Searched {
    /// Fingerprint of all that the lists depend on beside the latents.
    settings: String,
    /// The run of each partition of `latents`.
    latents: BTreeMap<String, String>,
    /// The run of each partition's lists.
    neighbors: BTreeMap<String, String>,
    /// How they were found.
    pub(super) quality: Quality,
}

impl Searched {
    /// What was found: the lists of these runs are right for the plan's latents. Those that are live may be of another process by now.
    pub(super) fn new(plan: &Plan<'_>, report: &StageReport, quality: Quality) -> Self {
        let latents = plan.latents.partitions().into_iter();
        Self {
            settings: plan.settings_fingerprint().full(),
            latents: latents
                .filter_map(|partition| Some((partition.to_string(), plan.latents.run_of(&partition)?.to_owned())))
                .collect(),
            neighbors: report
                .partitions
                .iter()
                .map(|(partition, entry)| (partition.to_string(), entry.run_id.clone()))
                .collect(),
            quality,
        }
    }

    /// The name of the record for the latents that would give lists of these run ids.
    pub(super) fn name(expected: &BTreeMap<PartitionValues, String>) -> String {
        let fingerprint = Fingerprint::new("searched");
        let fingerprint = expected
            .iter()
            .fold(fingerprint, |fingerprint, (partition, run_id)| fingerprint.with(&partition.to_string(), run_id));
        format!("{FOLDER}/{}.json", fingerprint.short())
    }

    pub(super) fn write(&self, job: &Job<'_>, name: &str) -> Result<(), Error> {
        let entry = |source| TableError::Entry { url: job.output.url_of(name), source };
        let text = serde_json::to_vec(self).map_err(entry)?;
        job.context.block_on(job.output.put(name, text.into()))?;
        Ok(())
    }

    pub(super) fn read(job: &Job<'_>, name: &str) -> Result<Option<Self>, Error> {
        match job.context.block_on(job.output.get(name)) {
            Ok(text) => {
                let entry = |source| TableError::Entry { url: job.output.url_of(name), source };
                Ok(Some(serde_json::from_slice(&text).map_err(entry)?))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The newest record that a plan can start from: of the same settings, and true of a list that is live.
    pub(super) fn base(job: &Job<'_>, plan: &Plan<'_>, live: &Live) -> Result<Option<Self>, Error> {
        let settings = plan.settings_fingerprint().full();
        for record in job.context.block_on(newest(&job.output))?.into_iter().take(RECORDS_KEPT) {
            let Some(searched) = Self::read(job, &job.output.relative(&record.location))? else { continue };
            let is_true = |partition: &PartitionValues| live.run_of(partition) == searched.run_of(partition);
            if searched.settings == settings && live.partitions().iter().any(is_true) {
                return Ok(Some(searched));
            }
        }
        Ok(None)
    }

    /// The run of a partition's lists.
    pub(super) fn run_of(&self, partition: &PartitionValues) -> Option<&str> {
        self.neighbors.get(&partition.to_string()).map(String::as_str)
    }

    /// The run of a partition's latents.
    pub(super) fn latents_of(&self, partition: &PartitionValues) -> Option<&str> {
        self.latents.get(&partition.to_string()).map(String::as_str)
    }
}

async fn newest(output: &Store) -> Result<Vec<ObjectMeta>, StoreError> {
    let mut records = output.list(FOLDER).await?;
    records.sort_by_key(|record| std::cmp::Reverse(record.last_modified));
    Ok(records)
}

/// Records that no run starts from any more.
pub async fn left_over(output: &Store) -> Result<Vec<ObjectMeta>, StoreError> {
    Ok(newest(output).await?.into_iter().skip(RECORDS_KEPT).collect())
}
