//! The documents of a plan's folder: JSON, each written once.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use url::Url;

use super::TaskError;
use crate::config::Pipeline;
use crate::context::Context;
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::lineage;
use crate::source::{PartitionValues, Selection, SourcePartition};
use crate::stages::embed::{self, Decision, Work};
use crate::stages::neighbors::Quality;
use crate::stages::{Job, PartitionReport, Redo, StageReport};
use crate::store::{PutOutcome, Store};
use crate::table::{Live, fingerprint, revision};

/// Name of the plan in its folder.
pub const PLAN: &str = "plan.json";

/// Form of the documents. Raised whenever an older program would misunderstand them.
const FORMAT_VERSION: u32 = 1;

/// What a run does, frozen: everything that a task must know and cannot find out by itself in the same way as all others.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    format_version: u32,
    /// The version of the program.
    lookalike_version: String,
    /// When it was made, by the clock of the machine that made it.
    pub created_at: DateTime<Utc>,
    /// The settings, resolved: keys are those of the pipeline file.
    pipeline: serde_json::Value,
    /// What stands for the model packages.
    model_sha256: String,
    /// Version of the source table that is read, where it has versions.
    pub source_version: Option<u64>,
    redo: Redo,
    added_only: bool,
    /// The partitions of the source that are looked at.
    pub partitions: Vec<PlannedPartition>,
}

/// What is done with one partition of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedPartition {
    /// Which one.
    pub values: PartitionValues,
    /// Fingerprint of its files.
    identity: String,
    /// Id of the rows that will be live.
    run_id: String,
    work: PlannedWork,
    /// Units of it: files that are carried over, and slices that are embedded.
    pub num_units: usize,
    /// Rows before `where`; `None` where only reading tells.
    pub num_rows: Option<u64>,
    /// Compressed bytes of its files.
    pub num_bytes: u64,
}

/// [`Work`], with what is found in the tables left to be found there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum PlannedWork {
    Nothing,
    All,
    Rejected {
        /// The run whose rows are tried again or carried over.
        base: String,
    },
    Added {
        /// Names of the files.
        names: Vec<String>,
        /// The run whose rows are carried over.
        base: String,
    },
}

impl Plan {
    /// Freezes what a run of the job would embed: what was decided for each partition of the source, given what was live in `latents`.
    pub fn of(job: &Job<'_>, live: &Live, decisions: &[Decision]) -> Self {
        let decided = job.source.partitions.iter().zip(decisions);
        Self {
            format_version: FORMAT_VERSION,
            lookalike_version: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: Utc::now(),
            pipeline: job.pipeline.settings_json(),
            model_sha256: job.model_sha256.clone(),
            source_version: job.source.version,
            redo: job.backfill.redo,
            added_only: job.backfill.added_only,
            partitions: decided.map(|(partition, decision)| PlannedPartition::of(live, partition, decision)).collect(),
        }
    }

    /// Fingerprint of what the plan was made of, without what was done then: the plan of the same run has the same one later.
    fn identity(&self) -> String {
        let mut fingerprint = Fingerprint::new("plan")
            .with("format", &self.format_version.to_string())
            .with("version", &self.lookalike_version)
            .with("pipeline", &self.pipeline.to_string())
            .with("model", &self.model_sha256)
            .with("redo", &format!("{:?}", self.redo))
            .with("added_only", &self.added_only.to_string());
        for partition in &self.partitions {
            fingerprint = fingerprint.with(&partition.values.to_string(), &partition.identity);
        }
        fingerprint.full()
    }

    /// Whether it would do what another plan does.
    pub fn is_like(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }

    /// The run as events tell of it, in whichever process.
    pub fn lineage_run(&self, pipeline: &Pipeline, selection: &Selection) -> lineage::Run {
        lineage::Run::of(pipeline, selection, lineage::run_id(self.created_at, &self.identity()))
    }

    /// The settings.
    pub fn pipeline(&self) -> Result<Pipeline, Error> {
        Ok(Pipeline::from_settings(&self.pipeline)?)
    }

    /// Units of the embed step.
    pub fn num_units(&self) -> usize {
        self.partitions.iter().map(|partition| partition.num_units).sum()
    }

    /// Rows that are embedded; `None` where only reading tells.
    pub fn num_rows(&self) -> Option<u64> {
        let is_embedded = |partition: &&PlannedPartition| partition.work != PlannedWork::Nothing;
        self.partitions.iter().filter(is_embedded).map(|partition| partition.num_rows).sum()
    }

    /// What is to be done with the partitions of the job's source, which are some of the plan's, given what is live in `latents`. Fails
    /// where the source, or what rows are carried over from, is not as it was.
    pub fn decisions(&self, job: &Job<'_>, live: &Live) -> Result<Vec<Decision>, Error> {
        if job.model_sha256 != self.model_sha256 {
            let what = format!("the model package {}", job.packages.names());
            return Err(TaskError::Changed { what }.into());
        }
        let mut decisions = Vec::with_capacity(job.source.partitions.len());
        for partition in &job.source.partitions {
            let planned = self.partitions.iter().find(|planned| planned.values == partition.values);
            let changed =
                || TaskError::Changed { what: format!("{} of {}", partition.values.name(), job.source.url()) };
            let planned = planned.filter(|planned| planned.identity == partition.identity).ok_or_else(changed)?;
            decisions.push(planned.decision(job, live, partition)?);
        }
        Ok(decisions)
    }
}

impl PlannedPartition {
    fn of(live: &Live, partition: &SourcePartition, decision: &Decision) -> Self {
        let base = live.run_of(&partition.values).unwrap_or_default().to_owned();
        Self {
            values: partition.values.clone(),
            identity: partition.identity.clone(),
            run_id: decision.run_id.clone(),
            num_units: embed::num_units(live, partition, decision),
            num_rows: partition.num_rows,
            num_bytes: partition.num_bytes,
            work: match &decision.work {
                Work::Nothing => PlannedWork::Nothing,
                Work::All => PlannedWork::All,
                Work::Rejected(_) => PlannedWork::Rejected { base },
                Work::Added { names, base } => {
                    let mut names: Vec<String> = names.iter().cloned().collect();
                    names.sort_unstable();
                    PlannedWork::Added { names, base: base.clone() }
                }
            },
        }
    }

    fn decision(&self, job: &Job<'_>, live: &Live, partition: &SourcePartition) -> Result<Decision, Error> {
        let current = live.run_of(&partition.values).unwrap_or_default();
        let is_live =
            |run_id: &str| fingerprint(current) == fingerprint(run_id) && revision(current) >= revision(run_id);
        // Sorting by cells revises the rows once more.
        if is_live(&self.run_id) || self.work == PlannedWork::Nothing {
            return Ok(Decision { run_id: current.to_owned(), work: Work::Nothing });
        }
        if self.work == PlannedWork::All && fingerprint(&self.run_id) != job.latents_run_id(partition)? {
            let what = "what the rows depend on (the program, or the device that computes)".to_owned();
            return Err(TaskError::Changed { what }.into());
        }
        let check_base = |base: &str| {
            let what = format!("{} of {}", partition.values.name(), job.latents.store().url());
            if current == base { Ok(()) } else { Err(TaskError::Changed { what }) }
        };
        let work = match &self.work {
            PlannedWork::Nothing => Work::Nothing,
            PlannedWork::All => Work::All,
            PlannedWork::Rejected { base } => {
                check_base(base)?;
                Work::Rejected(Arc::new(embed::rejected_ids(job, live, &partition.values)?))
            }
            PlannedWork::Added { names, base } => {
                check_base(base)?;
                Work::Added { names: names.iter().cloned().collect::<HashSet<_>>(), base: base.clone() }
            }
        };
        Ok(Decision { run_id: self.run_id.clone(), work })
    }
}

/// What a stage came to, as its commit leaves it for the last one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    partitions: Vec<(PartitionValues, PartitionReport)>,
    rows_embedded: u64,
    quality: Option<Quality>,
    rows_searched: u64,
    secs: f64,
    /// When the commit had published everything.
    pub finished_at: DateTime<Utc>,
}

impl Done {
    /// Keeps a report. The stage took from `since` until now, with all that its tasks waited for.
    pub fn of(report: &StageReport, since: DateTime<Utc>) -> Self {
        let now = Utc::now();
        Self {
            partitions: report.partitions.iter().map(|(values, entry)| (values.clone(), entry.clone())).collect(),
            rows_embedded: report.rows_embedded,
            quality: report.found.map(|found| found.quality),
            rows_searched: report.found.map_or(0, |found| found.rows_searched),
            secs: (now - since).as_seconds_f64().max(0.0),
            finished_at: now,
        }
    }

    /// The report.
    pub fn report(&self) -> StageReport {
        let rows_searched = self.rows_searched;
        StageReport {
            partitions: self.partitions.iter().cloned().collect(),
            rows_embedded: self.rows_embedded,
            found: self.quality.map(|quality| crate::stages::neighbors::Found { quality, rows_searched }),
            secs: self.secs,
        }
    }
}

/// The folder of a plan.
#[derive(Debug, Clone)]
pub struct PlanFolder {
    /// Where it is.
    pub store: Store,
}

impl PlanFolder {
    /// Opens a folder that need not be there yet.
    pub fn open(context: &Context, url: &Url) -> Result<Self, Error> {
        Ok(Self { store: context.stores.open(url)? })
    }

    /// The plan in it.
    pub fn plan(&self, context: &Context) -> Result<Plan, Error> {
        let plan: Option<Plan> = self.read(context, PLAN)?;
        let url = self.store.url_of(PLAN);
        let plan = plan.ok_or_else(|| TaskError::NotThere {
            url: url.clone(),
            made_by: "lookalike plan PIPELINE --plan DIR",
            may_come: false,
        })?;
        let own = env!("CARGO_PKG_VERSION");
        if plan.lookalike_version != own {
            return Err(TaskError::OtherVersion { url, found: plan.lookalike_version, own }.into());
        }
        Ok(plan)
    }

    /// A document, if it is there.
    pub fn read<T: DeserializeOwned>(&self, context: &Context, name: &str) -> Result<Option<T>, Error> {
        match context.block_on(self.store.get(name)) {
            Ok(text) => {
                let document = |source| TaskError::Document { url: self.store.url_of(name), source };
                Ok(Some(serde_json::from_slice(&text).map_err(document)?))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A document that a commit before has made.
    pub fn require<T: DeserializeOwned>(
        &self,
        context: &Context,
        name: &str,
        made_by: &'static str,
    ) -> Result<T, Error> {
        let found = self.read(context, name)?;
        let not_there = || TaskError::NotThere { url: self.store.url_of(name), made_by, may_come: true };
        Ok(found.ok_or_else(not_there)?)
    }

    /// A document; where it is not there yet, it is made and written. The one that counts is returned.
    pub fn read_or_make<T: Serialize + DeserializeOwned>(
        &self,
        context: &Context,
        name: &str,
        make: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.read(context, name)? {
            Some(there) => Ok(there),
            None => Ok(self.write(context, name, make()?)?.0),
        }
    }

    /// Writes a document unless there is one; returns the one that counts, and whether it is ours.
    pub fn write<T: Serialize + DeserializeOwned>(
        &self,
        context: &Context,
        name: &str,
        document: T,
    ) -> Result<(T, bool), Error> {
        let url = || self.store.url_of(name);
        let text = serde_json::to_vec(&document).map_err(|source| TaskError::Document { url: url(), source })?;
        match context.block_on(self.store.put_if_absent(name, text.into()))? {
            PutOutcome::Created => Ok((document, true)),
            PutOutcome::AlreadyThere => {
                let text = context.block_on(self.store.get(name))?;
                let there = serde_json::from_slice(&text);
                Ok((there.map_err(|source| TaskError::Document { url: url(), source })?, false))
            }
        }
    }
}
