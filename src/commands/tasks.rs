//! `embed`, `neighbors` and `flag` over a plan, and `commit`.

use std::time::Instant;

use serde_json::{Value, json};
use url::Url;

use super::run::{finish, round};
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::lineage::End;
use crate::source::Selection;
use crate::stages::neighbors::shares::Step;
use crate::tasks::steps::{Planned, Stage};
use crate::tasks::{PlanFolder, Share};

/// What a task is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Images to latents.
    Embed,
    /// A step of the neighbors.
    Neighbors(Step),
    /// Latents to anomalies.
    Flag,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Neighbors(step) => step.name(),
            Self::Flag => "flag",
        }
    }
}

/// Does a share of a step of the plan at `url`.
pub fn work(context: &Context, url: &Url, work: Work, share: Share, found_by: &str) -> Result<ExitStatus, Error> {
    let started = Instant::now();
    context.say(&format!("{}: task {} of {} ({found_by})", work.name(), share.index(), share.count()))?;
    let planned = Planned::read(context, PlanFolder::open(context, url)?)?;
    let did = match work {
        Work::Embed => planned.embed(share)?,
        Work::Neighbors(step) => planned.neighbors(step, share)?,
        Work::Flag => planned.flag(share)?,
    };
    let mut summary = json!({
        "status": "done",
        "step": work.name(),
        "task_index": share.index(),
        "task_count": share.count(),
        "secs": round(started.elapsed().as_secs_f64()),
    });
    add(&mut summary, did);
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

/// Commits a stage of the plan at `url`.
pub fn commit(context: &Context, url: &Url, stage: Stage) -> Result<ExitStatus, Error> {
    let started = Instant::now();
    let planned = Planned::read(context, PlanFolder::open(context, url)?)?;
    let did = match stage {
        Stage::Embed => planned.commit_embed()?,
        Stage::Sort => planned.commit_sort()?,
        Stage::Neighbors => planned.commit_neighbors()?,
        Stage::Flag => {
            if let Some(finished) = planned.commit_flag()? {
                context.lineage.join(planned.plan.lineage_run(&planned.pipeline, &Selection::default()));
                let (_, rejects) = finish(&finished.job, finished.report)?;
                context.lineage.end(context, End::Code(rejects));
                return Ok(rejects);
            }
            json!({})
        }
    };
    let status = if planned.plan.partitions.is_empty() { "nothing_to_do" } else { "committed" };
    let mut summary = json!({
        "status": status,
        "stage": stage.name(),
        "pipeline": planned.pipeline.name,
        "output": planned.pipeline.output.table.as_str(),
        "secs": round(started.elapsed().as_secs_f64()),
    });
    add(&mut summary, did);
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

fn add(summary: &mut Value, more: Value) {
    if let (Value::Object(summary), Value::Object(more)) = (summary, more) {
        summary.extend(more);
    }
}
