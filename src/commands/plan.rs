//! `plan`: what a run would do. Writes nothing, but with `--plan` the plan of tasks that do it.

use std::collections::BTreeMap;

use url::Url;

use crate::config::{Device, NeighborScope, Pipeline};
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::source::{PartitionValues, SourcePartition, WorkUnit};
use crate::stages::embed::{self, Decision, Work};
use crate::stages::{Backfill, Job};
use crate::stages::{flag, groups, neighbors};
use crate::table::Live;
use crate::tasks::steps::write_plan;
use crate::tasks::{Plan, PlanFolder};

/// What a run would do with one partition of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    UpToDate,
    Append,
    Replace,
    /// The pipeline has no such stage.
    Nothing,
}

impl Action {
    fn of(live: &Live, partition: &PartitionValues, is_current: bool) -> Self {
        match (is_current, live.of(partition).next()) {
            (true, _) => Self::UpToDate,
            (false, None) => Self::Append,
            (false, Some(_)) => Self::Replace,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::UpToDate => "up to date",
            Self::Append => "append",
            Self::Replace => "replace",
            Self::Nothing => "-",
        }
    }
}

/// What a run would do with one partition of the source.
#[derive(Debug)]
struct Planned<'a> {
    partition: &'a SourcePartition,
    run_id: String,
    embed: Action,
    neighbors: Action,
    groups: Action,
    flag: Action,
    units_done: usize,
    /// `None` where only reading tells.
    rows_to_embed: Option<u64>,
}

/// Prints a line for each partition, or one JSON object, and says what it comes to.
pub fn plan(context: &Context, pipeline: &Pipeline, backfill: &Backfill, as_json: bool) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, backfill)?;
    let latents = context.block_on(job.latents.live())?;
    let planned = decide(&job, &latents, &embed::decide_all(&job, &latents)?)?;
    if as_json {
        context.print(&to_json(&job, &planned).to_string())?;
        return Ok(ExitStatus::Success);
    }
    context.print(&format!(
        "{:<11} {:<11} {:<11} {:<11} {:>10} {:>14}  {:<11} partition",
        "embed", "neighbors", "groups", "flag", "rows", "bytes", "units done"
    ))?;
    for line in &planned {
        context.print(&format!(
            "{:<11} {:<11} {:<11} {:<11} {:>10} {:>14}  {:<11} {}",
            line.embed.name(),
            line.neighbors.name(),
            line.groups.name(),
            line.flag.name(),
            rows(line.partition.num_rows),
            line.partition.num_bytes,
            format!("{}/{}", line.units_done, line.partition.units.len()),
            line.partition.values.name(),
        ))?;
    }
    let to_embed: Option<u64> = planned.iter().map(|line| line.rows_to_embed).sum();
    let filtered = if to_embed != Some(0) && pipeline.source.predicate.is_some() {
        " at most (`where` may leave fewer)"
    } else {
        ""
    };
    context.say(&format!(
        "{} of {} to embed{filtered} with model {} ({}); tables go to {}",
        to_embed.map_or_else(|| "rows not counted yet".to_owned(), |rows| format!("{rows} rows")),
        job.source.url(),
        job.packages.names(),
        &job.model_sha256[..crate::hash::SHORT_DIGITS],
        job.output.url(),
    ))?;
    Ok(ExitStatus::Success)
}

/// Writes the plan of a run as tasks, and prints how many tasks have something to embed.
pub fn write(context: &Context, pipeline: &Pipeline, backfill: &Backfill, out: &Url) -> Result<ExitStatus, Error> {
    if pipeline.execution.device == Device::Auto {
        return Err(Error::Usage {
            message: "the pipeline says device = \"auto\", and tasks run on machines that may differ".to_owned(),
            hint: "say device = \"cpu\" or \"cuda\" in [execution], or with --device".to_owned(),
        });
    }
    let job = Job::prepare(context, pipeline, backfill)?;
    job.check_rule()?;
    let folder = PlanFolder::open(context, out)?;
    let is_due = |line: &Planned<'_>| {
        let actions = [line.embed, line.neighbors, line.groups, line.flag];
        actions.iter().any(|action| !matches!(action, Action::UpToDate | Action::Nothing))
    };
    let latents = context.block_on(job.latents.live())?;
    let decisions = embed::decide_all(&job, &latents)?;
    let is_any_due = decide(&job, &latents, &decisions)?.iter().any(is_due);
    let (plan, is_new) = write_plan(context, &folder, &Plan::of(&job, &latents, &decisions))?;
    if is_new && is_any_due {
        context.lineage.begin(context, plan.lineage_run(pipeline, &backfill.selection));
        context.lineage.leave(context);
    }
    let rows = plan.num_rows();
    context.say(&format!(
        "{} of {} to embed in {} units; the plan is at {}",
        rows.map_or_else(|| "rows not counted yet".to_owned(), |rows| format!("{rows} rows")),
        job.source.url(),
        plan.num_units(),
        folder.store.url(),
    ))?;
    let summary = serde_json::json!({
        "status": if is_any_due { "planned" } else { "nothing_to_do" },
        "plan": folder.store.url().to_string(),
        "pipeline": pipeline.name,
        "output": job.output.url().to_string(),
        "rows": rows,
        "bytes": plan.partitions.iter().map(|partition| partition.num_bytes).sum::<u64>(),
        "tasks": {"embed": plan.num_units()},
    });
    context.print(&summary.to_string())?;
    Ok(if is_any_due { ExitStatus::Success } else { ExitStatus::NothingToDo })
}

fn decide<'a>(job: &'a Job<'_>, latents: &Live, decisions: &[Decision]) -> Result<Vec<Planned<'a>>, Error> {
    let context = job.context;
    let [live_neighbors, live_groups, live_flags] = [
        context.block_on(job.neighbors.live())?,
        context.block_on(job.groups.live())?,
        context.block_on(job.anomalies.live())?,
    ];
    let mut planned = Vec::new();
    for (partition, decision) in job.source.partitions.iter().zip(decisions) {
        let done = context.block_on(decision.receipts(job).read())?;
        let Decision { run_id, work } = decision;
        let action = Action::of(latents, &partition.values, *work == Work::Nothing);
        let rows_done: u64 = done.values().map(|receipt| receipt.num_read).sum();
        let rows_of = |units: &[WorkUnit]| units.iter().map(|unit| unit.num_rows).sum::<Option<u64>>();
        planned.push(Planned {
            partition,
            run_id: run_id.clone(),
            embed: action,
            neighbors: Action::Nothing,
            groups: Action::Nothing,
            flag: Action::Nothing,
            units_done: if *work == Work::Nothing { partition.units.len() } else { done.len() },
            rows_to_embed: match work {
                Work::Nothing => Some(0),
                Work::All => partition.num_rows.map(|rows| rows.saturating_sub(rows_done)),
                Work::Rejected(ids) => Some(ids.len() as u64),
                Work::Added { names, .. } => rows_of(&partition.units_of(names)),
            },
        });
    }
    let any_embedded = planned.iter().any(|line| line.embed != Action::UpToDate);
    // What the later stages would read is there only where nothing is to be embedded first.
    let comparable = if any_embedded { Live::default() } else { job.comparable_latents()? };
    let anomaly = job.pipeline.anomaly.as_ref();
    let reference = match anomaly.map(|settings| flag::named_reference(job, settings)).transpose()?.flatten() {
        // Without a reference of its own, every flag depends on all rows.
        None if any_embedded => None,
        None => anomaly.map(|settings| flag::own_reference(job, settings, &comparable)),
        named => named,
    };
    let searched = if any_embedded { latents } else { &comparable };
    let listed = match &job.pipeline.neighbors {
        Some(settings) => match neighbors::Plan::read(job, settings, searched)? {
            Some(plan) => plan.current(job, &live_neighbors)?,
            None => BTreeMap::new(),
        },
        None => BTreeMap::new(),
    };
    for line in &mut planned {
        let values = &line.partition.values;
        let is_embedded = line.embed == Action::UpToDate;
        if let Some(settings) = &job.pipeline.neighbors {
            // Lists within a partition do not depend on what is embedded into the others.
            let is_read = is_embedded && (settings.scope == NeighborScope::Partition || !any_embedded);
            let is_current = is_read && listed.get(values).is_some_and(Option::is_some);
            line.neighbors = Action::of(&live_neighbors, values, is_current);
            if let Some(distance) = settings.duplicate_distance {
                let run_id = groups::run_id(settings, distance, searched, &live_neighbors, values);
                let is_current = is_current && live_groups.run_of(values) == Some(run_id.as_str());
                line.groups = Action::of(&live_groups, values, is_current);
            }
        }
        if let Some(settings) = anomaly {
            let run_id = reference.as_ref().filter(|_| is_embedded).map(|reference| {
                flag::run_id(settings, if any_embedded { latents } else { &comparable }, reference, values)
            });
            let is_current = run_id.is_some() && live_flags.run_of(values) == run_id.as_deref();
            line.flag = Action::of(&live_flags, values, is_current);
        }
    }
    Ok(planned)
}

/// A number of rows as it is shown: shards say theirs only when they are read.
fn rows(number: Option<u64>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
}

fn to_json(job: &Job<'_>, planned: &[Planned<'_>]) -> serde_json::Value {
    let partitions: Vec<_> = planned
        .iter()
        .map(|line| {
            serde_json::json!({
                "partition": line.partition.values.name(),
                "embed": line.embed.name(),
                "neighbors": line.neighbors.name(),
                "groups": line.groups.name(),
                "flag": line.flag.name(),
                "rows": line.partition.num_rows,
                "bytes": line.partition.num_bytes,
                "units": line.partition.units.len(),
                "units_done": line.units_done,
                "rows_to_embed": line.rows_to_embed,
                "run_id": line.run_id,
            })
        })
        .collect();
    serde_json::json!({
        "pipeline": job.pipeline.name,
        "source": job.source.url().to_string(),
        "output": job.output.url().to_string(),
        "model_sha256": job.model_sha256,
        "settings": job.pipeline.settings_json(),
        "partitions": partitions,
    })
}
