//! The stage as tasks: a partition's rows are judged by one of them, as what is rejected at a false discovery rate depends on all.

use serde::{Deserialize, Serialize};

use super::{FLAGGED, Judge, ReferenceInUse, count, named_reference, own_reference, run_id};
use crate::config::Anomaly;
use crate::error::Error;
use crate::reference::Reference;
use crate::schema::TableName;
use crate::source::PartitionValues;
use crate::stages::{Job, PartitionReport, StageReport};
use crate::table::{Live, LiveFile, Published, Receipt, Receipts};
use crate::tasks::{PlanFolder, Share, TaskError};

/// File of the reference of a pipeline that names none, in the folder of the plan.
const OWN_REFERENCE: &str = "reference.parquet";

/// What is flagged, frozen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlagPlan {
    /// The rows.
    latents: Live,
    /// What stands for the reference.
    reference_id: String,
    /// Whether it is made of the rows themselves.
    is_own: bool,
    /// For each partition of `latents` the run of its flags, and whether they are live already.
    partitions: Vec<(PartitionValues, String, bool)>,
}

impl FlagPlan {
    /// Plans the flags of the latents that are live; makes their reference if the pipeline names none.
    pub fn make(job: &Job<'_>, settings: &Anomaly, folder: &PlanFolder) -> Result<Self, Error> {
        super::check_segment(job, settings)?;
        let latents = job.comparable_latents()?;
        let named = named_reference(job, settings)?;
        let is_own = named.is_none();
        let reference = named.unwrap_or_else(|| own_reference(job, settings, &latents));
        let live = job.context.block_on(job.anomalies.live())?;
        let partitions = latents.partitions().into_iter().map(|partition| {
            let run_id = run_id(settings, &latents, &reference, &partition);
            let is_live = live.run_of(&partition) == Some(run_id.as_str());
            (partition, run_id, is_live)
        });
        let partitions: Vec<_> = partitions.collect();
        if is_own && partitions.iter().any(|(.., is_live)| !is_live) {
            let made = reference.get(job, settings, &latents)?;
            job.context.block_on(made.write(&folder.store, OWN_REFERENCE))?;
        }
        Ok(Self { reference_id: reference.id.clone(), is_own, partitions, latents })
    }

    fn due(&self) -> Vec<&(PartitionValues, String, bool)> {
        self.partitions.iter().filter(|(.., is_live)| !is_live).collect()
    }

    /// Tasks that have something to do.
    pub fn num_units(&self) -> usize {
        self.due().len()
    }

    /// The reference that every task judges by.
    pub fn reference(&self, job: &Job<'_>, settings: &Anomaly, folder: &PlanFolder) -> Result<ReferenceInUse, Error> {
        if self.is_own {
            let reference = Reference::read(&folder.store, OWN_REFERENCE, &job.model_sha256);
            let reference = ReferenceInUse::in_memory(job.context.block_on(reference)?);
            return Ok(ReferenceInUse { id: self.reference_id.clone(), ..reference });
        }
        let named = named_reference(job, settings)?.filter(|reference| reference.id == self.reference_id);
        Ok(named.ok_or_else(|| TaskError::Changed { what: "the reference".to_owned() })?)
    }

    /// Judges a share of the partitions. Returns how many there were, how many of them were done before, and the rows of the others.
    pub fn flag(
        &self,
        job: &Job<'_>,
        settings: &Anomaly,
        folder: &PlanFolder,
        share: Share,
    ) -> Result<(usize, usize, u64), Error> {
        let due = self.due();
        let mine = &due[share.of(due.len())];
        let (mut done_before, mut num_rows) = (0, 0);
        if mine.is_empty() {
            return Ok((0, 0, 0));
        }
        let reference = self.reference(job, settings, folder)?;
        let progress = job.context.progress("flag", None);
        for (partition, run_id, _) in mine {
            job.context.stop.check()?;
            let receipts = receipts(job, run_id);
            if job.context.block_on(receipts.find(&job.anomalies, 0))?.is_some() {
                done_before += 1;
                continue;
            }
            let mut entry = PartitionReport { run_id: run_id.clone(), ..PartitionReport::default() };
            let of_reference = reference.get(job, settings, &self.latents)?;
            let judge = Judge { job, settings, reference: of_reference, partition, progress: &progress };
            let files: Vec<LiveFile> = self.latents.of(partition).cloned().collect();
            let file = judge.write(&files, &reference.id, &mut entry)?;
            num_rows += entry.num_rows;
            let receipt = Receipt { unit: 0, file, num_read: entry.num_rows, rows_by_status: entry.counts };
            job.context.block_on(receipts.hand_in(receipt))?;
        }
        progress.finish();
        Ok((mine.len(), done_before, num_rows))
    }

    /// Publishes the flags.
    pub fn publish(&self, job: &Job<'_>) -> Result<StageReport, Error> {
        let latents = job.comparable_latents()?;
        if latents != self.latents {
            return Err(TaskError::Changed { what: job.latents.store().url().to_string() }.into());
        }
        let live = job.context.block_on(job.anomalies.live())?;
        job.remove_vanished(&job.anomalies, &live)?;
        let mut report = StageReport::default();
        let mut missing = Vec::new();
        for (number, (partition, run_id, is_live)) in self.partitions.iter().enumerate() {
            job.context.stop.check()?;
            let entry = report.partitions.entry(partition.clone()).or_default();
            entry.run_id.clone_from(run_id);
            if *is_live || live.run_of(partition) == Some(run_id) {
                count(job, &live, partition, entry)?;
                continue;
            }
            let Some(receipt) = job.context.block_on(receipts(job, run_id).find(&job.anomalies, 0))? else {
                missing.push(number);
                continue;
            };
            entry.num_rows = receipt.num_read;
            entry.counts = receipt.rows_by_status.clone();
            entry.counts.entry(FLAGGED.to_owned()).or_default();
            let files = [receipt.file];
            let published = job.context.block_on(job.anomalies.replace_partition(partition, run_id, &files))?;
            entry.written = published != Published::Unchanged;
        }
        if missing.is_empty() { Ok(report) } else { Err(TaskError::incomplete("flagging", &missing).into()) }
    }
}

fn receipts(job: &Job<'_>, run_id: &str) -> Receipts {
    Receipts::new(&job.output, TableName::Anomalies, run_id)
}
