//! What is done of a plan: each step's share, and each stage's commit.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::documents::{Done, PLAN, Plan, PlanFolder};
use super::{Share, TaskError};
use crate::config::Pipeline;
use crate::context::Context;
use crate::error::Error;
use crate::schema::{STATUS_OK, TableName};
use crate::source::{PartitionValues, Selection};
use crate::stages::flag::shares::FlagPlan;
use crate::stages::groups::groups;
use crate::stages::neighbors::shares::{SearchPlan, SortPlan, Step, Worked};
use crate::stages::record::RunReport;
use crate::stages::{Backfill, Job, StageReport, embed};

/// Names of the documents, and what makes each.
const SORT: &str = "sort.json";
const SEARCH: &str = "neighbors.json";
const FLAG: &str = "flag.json";
const RUNTIME: &str = "runtime.json";
const EMBEDDED: &str = "embed.done.json";
const SEARCHED: &str = "neighbors.done.json";
const GROUPED: &str = "groups.done.json";
const COMMIT_EMBED: &str = "lookalike commit --stage embed";
const COMMIT_SORT: &str = "lookalike commit --stage sort";
const COMMIT_NEIGHBORS: &str = "lookalike commit --stage neighbors";

/// What is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// Publish latents, when all tasks of `embed` have ended
    Embed,
    /// Plan the search of neighbors, when all tasks of `neighbors --step sort` have ended
    Sort,
    /// Publish neighbors and groups, when all tasks of `neighbors --step merge` have ended
    Neighbors,
    /// Publish anomalies, record the run, and write its report, when all tasks of `flag` have ended
    Flag,
}

impl Stage {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Sort => "sort",
            Self::Neighbors => "neighbors",
            Self::Flag => "flag",
        }
    }
}

/// The version of ONNX Runtime that has embedded.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuntimeUsed {
    onnxruntime_version: String,
}

/// A plan with its settings.
pub struct Planned<'a> {
    context: &'a Context,
    folder: PlanFolder,
    /// The plan.
    pub plan: Plan,
    /// Its settings.
    pub pipeline: Pipeline,
}

/// What the last commit hands on, to be recorded.
pub struct Finished<'a> {
    /// The job.
    pub job: Job<'a>,
    /// What all stages did.
    pub report: RunReport,
}

/// Writes the plan of a run into a folder; an equal one that is there already counts. Returns it, and whether it was written now.
pub fn write_plan(context: &Context, folder: &PlanFolder, plan: &Plan) -> Result<(Plan, bool), Error> {
    let (written, is_ours) = folder.write(context, PLAN, plan.clone())?;
    if !is_ours && !written.is_like(plan) {
        return Err(TaskError::OtherPlan { url: folder.store.url_of(PLAN) }.into());
    }
    Ok((written, is_ours))
}

impl<'a> Planned<'a> {
    /// Reads a plan.
    pub fn read(context: &'a Context, folder: PlanFolder) -> Result<Self, Error> {
        let plan = folder.plan(context)?;
        let pipeline = plan.pipeline()?;
        Ok(Self { context, folder, plan, pipeline })
    }

    /// The job over some partitions of the source.
    fn job_over(&self, partitions: Vec<PartitionValues>) -> Result<Job<'_>, Error> {
        let partitions = partitions.into_iter().filter(|values| !values.is_empty()).collect();
        let version = self.plan.source_version;
        let selection = Selection { partitions, version, ..Selection::default() };
        Job::prepare(self.context, &self.pipeline, &Backfill { selection, ..Backfill::default() })
    }

    fn job_after_embed(&self, tables: &[TableName]) -> Result<Job<'_>, Error> {
        let job = Job::prepare_after_embed(self.context, &self.pipeline)?;
        let tables: Vec<TableName> = job.tables().into_iter().filter(|table| tables.contains(table)).collect();
        job.ensure(&tables)?;
        Ok(job)
    }

    /// Embeds a share of the units.
    pub fn embed(&self, share: Share) -> Result<Value, Error> {
        let mine = share.of(self.plan.num_units());
        // The first unit of each partition that the share has a part of.
        let mut first = 0;
        let mut wanted = Vec::new();
        for partition in &self.plan.partitions {
            let end = first + partition.num_units;
            if first < mine.end && mine.start < end {
                wanted.push((partition.values.clone(), first));
            }
            first = end;
        }
        if mine.is_empty() || wanted.is_empty() {
            return Ok(json!({"units": 0, "units_done_before": 0, "rows": 0}));
        }
        let job = self.job_over(wanted.iter().map(|(values, _)| values.clone()).collect())?;
        job.ensure(&[TableName::Latents])?;
        let live = self.context.block_on(job.latents.live())?;
        let decisions = self.plan.decisions(&job, &live)?;
        let of_partition = |number: usize| {
            let values = &job.source.partitions[number].values;
            let first = wanted.iter().find(|(wanted, _)| wanted == values).map_or(usize::MAX, |(_, first)| *first);
            mine.start.saturating_sub(first)..mine.end.saturating_sub(first)
        };
        let report = embed::embed_share(&job, &decisions, of_partition)?;
        if let Some(model) = job.loaded_model() {
            let used = RuntimeUsed { onnxruntime_version: model.runtime.version.clone() };
            self.folder.write(self.context, RUNTIME, used)?;
        }
        Ok(json!({
            "units": mine.len(),
            "rows": report.rows_embedded,
            "rows_rejected": report.num_rows() - report.total(STATUS_OK),
            "provider": job.loaded_model().map(|model| model.provider.name()),
        }))
    }

    /// Publishes what was embedded. Returns the tasks of the next step.
    pub fn commit_embed(&self) -> Result<Value, Error> {
        let mut report = StageReport::default();
        let mut to_sort = 0;
        if !self.plan.partitions.is_empty() {
            let values = self.plan.partitions.iter().map(|partition| partition.values.clone());
            let job = self.job_over(values.collect())?;
            job.ensure(&[TableName::Latents])?;
            let live = self.context.block_on(job.latents.live())?;
            if job.source.partitions.len() < self.plan.partitions.len() {
                return Err(TaskError::Changed { what: format!("the partitions of {}", job.source.url()) }.into());
            }
            report = embed::publish(&job, &self.plan.decisions(&job, &live)?)?;
            let (done, _) = self.folder.write(self.context, EMBEDDED, Done::of(&report, self.plan.created_at))?;
            report = done.report();
            if let Some(settings) = &self.pipeline.neighbors {
                let make = || SortPlan::make(&job, settings);
                let sort = self.folder.read_or_make(self.context, SORT, make)?;
                to_sort = sort.num_units();
            }
        }
        Ok(json!({
            "rows_in": report.num_rows(),
            "rows_ok": report.total(STATUS_OK),
            "tasks": {"sort": to_sort},
        }))
    }

    /// Does a share of a step of the neighbors.
    pub fn neighbors(&self, step: Step, share: Share) -> Result<Value, Error> {
        let mut worked = Worked::default();
        if let (Some(settings), false) = (&self.pipeline.neighbors, self.plan.partitions.is_empty()) {
            worked = if step == Step::Sort {
                let sort: SortPlan = self.folder.require(self.context, SORT, COMMIT_EMBED)?;
                if share.of(sort.num_units()).is_empty() {
                    worked
                } else {
                    sort.sort(&self.job_after_embed(&[TableName::Latents])?, settings, share)?
                }
            } else {
                let search: SearchPlan = self.folder.require(self.context, SEARCH, COMMIT_SORT)?;
                if share.of(search.num_units(step)).is_empty() {
                    worked
                } else {
                    search.work(&self.job_after_embed(&[TableName::Neighbors])?, settings, &self.folder, step, share)?
                }
            };
        }
        Ok(json!({
            "units": worked.units,
            "units_done_before": worked.units_done_before,
            "rows": worked.rows,
            "shuffle": worked.moved,
        }))
    }

    /// Plans the search of neighbors, when all is sorted.
    pub fn commit_sort(&self) -> Result<Value, Error> {
        let mut search = None;
        if let (Some(settings), false) = (&self.pipeline.neighbors, self.plan.partitions.is_empty()) {
            let _: SortPlan = self.folder.require(self.context, SORT, COMMIT_EMBED)?;
            let make =
                || SearchPlan::make(&self.job_after_embed(&[TableName::Latents, TableName::Neighbors])?, settings);
            search = Some(self.folder.read_or_make(self.context, SEARCH, make)?);
        }
        let tasks = |step| search.as_ref().map_or(0, |search| search.num_units(step));
        Ok(json!({
            "rows_to_search": search.as_ref().map_or(0, SearchPlan::num_rows),
            "rows_to_travel": search.as_ref().map_or(0, SearchPlan::rows_to_travel),
            "tasks": {"probe": tasks(Step::Probe), "join": tasks(Step::Join), "merge": tasks(Step::Merge)},
        }))
    }

    /// Publishes the lists, and the groups that follow from them; plans the flags.
    pub fn commit_neighbors(&self) -> Result<Value, Error> {
        let (mut num_rows, mut to_flag) = (0, 0);
        if !self.plan.partitions.is_empty() {
            let embedded: Done = self.folder.require(self.context, EMBEDDED, COMMIT_EMBED)?;
            let job = self.job_after_embed(&[TableName::Neighbors, TableName::Groups, TableName::Anomalies])?;
            if let Some(settings) = &self.pipeline.neighbors {
                let search: SearchPlan = self.folder.require(self.context, SEARCH, COMMIT_SORT)?;
                if self.folder.read::<Done>(self.context, SEARCHED)?.is_none() {
                    let report = search.publish(&job, settings, &self.folder)?;
                    self.folder.write(self.context, SEARCHED, Done::of(&report, embedded.finished_at))?;
                }
                let searched: Done = self.folder.require(self.context, SEARCHED, COMMIT_NEIGHBORS)?;
                num_rows = searched.report().num_rows();
            }
            if let Some((settings, distance)) = self.pipeline.groups() {
                let started = Utc::now();
                let report = groups(&job, settings, distance)?;
                self.folder.write(self.context, GROUPED, Done::of(&report, started))?;
            }
            if let Some(settings) = &self.pipeline.anomaly {
                let make = || FlagPlan::make(&job, settings, &self.folder);
                let flag = self.folder.read_or_make(self.context, FLAG, make)?;
                to_flag = flag.num_units();
            }
        }
        Ok(json!({"neighbors": num_rows, "tasks": {"flag": to_flag}}))
    }

    /// Flags a share of the partitions.
    pub fn flag(&self, share: Share) -> Result<Value, Error> {
        let (mut units, mut units_done_before, mut rows) = (0, 0, 0);
        if let (Some(settings), false) = (&self.pipeline.anomaly, self.plan.partitions.is_empty()) {
            let flag: FlagPlan = self.folder.require(self.context, FLAG, COMMIT_NEIGHBORS)?;
            if !share.of(flag.num_units()).is_empty() {
                let job = self.job_after_embed(&[TableName::Anomalies])?;
                (units, units_done_before, rows) = flag.flag(&job, settings, &self.folder, share)?;
            }
        }
        Ok(json!({"units": units, "units_done_before": units_done_before, "rows": rows}))
    }

    /// Publishes the flags. Returns what all stages did, to be recorded; nothing where the plan has no partition.
    pub fn commit_flag(&self) -> Result<Option<Finished<'_>>, Error> {
        if self.plan.partitions.is_empty() {
            return Ok(None);
        }
        let context = self.context;
        let embedded: Done = self.folder.require(context, EMBEDDED, COMMIT_EMBED)?;
        // With all of the source at hand, as the report shows pictures.
        let job = self.job_over(self.plan.partitions.iter().map(|partition| partition.values.clone()).collect())?;
        job.ensure(&job.tables())?;
        let searched = self.done_if(self.pipeline.neighbors.is_some(), SEARCHED)?;
        let grouped = self.done_if(self.pipeline.groups().is_some(), GROUPED)?;
        let since = [Some(&embedded), searched.as_ref(), grouped.as_ref()].into_iter().flatten();
        let since: DateTime<Utc> = since.map(|done| done.finished_at).max().unwrap_or_default();
        let (mut flag, mut reference) = (None, None);
        if let Some(settings) = &self.pipeline.anomaly {
            let plan: FlagPlan = self.folder.require(context, FLAG, COMMIT_NEIGHBORS)?;
            flag = Some(Done::of(&plan.publish(&job)?, since).report());
            reference = Some(plan.reference(&job, settings, &self.folder)?);
        }
        let mut embed = embedded.report();
        embed.follow(&context.block_on(job.latents.live())?);
        let runtime: Option<RuntimeUsed> = self.folder.read(context, RUNTIME)?;
        let report = RunReport {
            started: self.plan.created_at,
            finished: Utc::now(),
            embed,
            neighbors: searched.map(|done| done.report()),
            groups: grouped.map(|done| done.report()),
            flag,
            reference,
            drift: std::collections::BTreeMap::new(),
            onnxruntime_version: runtime.map(|runtime| runtime.onnxruntime_version),
        };
        Ok(Some(Finished { job, report }))
    }

    fn done_if(&self, is_asked_for: bool, name: &str) -> Result<Option<Done>, Error> {
        let read = || self.folder.require(self.context, name, COMMIT_NEIGHBORS);
        is_asked_for.then(read).transpose()
    }
}
