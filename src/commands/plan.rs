//! `plan`: what a run would do. Writes nothing.

use super::{Context, partition_name};
use crate::config::Pipeline;
use crate::error::{Error, ExitStatus};
use crate::schema::TableName;
use crate::stages::Job;
use crate::table::Receipts;

/// Prints one line a partition, as JSON where asked, and says what it comes to.
pub fn plan(context: &Context, pipeline: &Pipeline, as_json: bool) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline)?;
    let live = context.block_on(job.latents.live())?;
    let (mut todo_rows, mut todo_partitions) = (0, 0);
    let mut lines = Vec::new();
    for partition in &job.source.partitions {
        let run_id = job.latents_run_id(partition)?;
        let done = context.block_on(Receipts::new(&job.output, TableName::Latents, &run_id).read())?;
        let live_run = live.run_of(&partition.values);
        let action = if live_run == Some(run_id.as_str()) {
            "up to date"
        } else if live.of(&partition.values).next().is_some() {
            "replace"
        } else {
            "append"
        };
        if action != "up to date" {
            todo_partitions += 1;
            let rows_done: u64 = done.values().map(|receipt| receipt.file.num_rows).sum();
            todo_rows += partition.num_rows.saturating_sub(rows_done);
        }
        lines.push(serde_json::json!({
            "partition": partition_name(&partition.values),
            "action": action,
            "rows": partition.num_rows,
            "bytes": partition.num_bytes,
            "units": partition.units.len(),
            "units_done": if action == "up to date" { partition.units.len() } else { done.len() },
            "run_id": run_id,
        }));
    }
    if as_json {
        let plan = serde_json::json!({
            "pipeline": pipeline.name,
            "source": job.source.url().to_string(),
            "output": job.output.url().to_string(),
            "model_sha256": job.model_sha256,
            "settings": pipeline.settings_json(),
            "partitions": lines,
        });
        context.print(&plan.to_string())?;
        return Ok(ExitStatus::Success);
    }
    for line in &lines {
        context.print(&format!(
            "{:<12} {:<32} {:>10} rows  {:>12} bytes  {}/{} units done",
            text(&line["action"]),
            text(&line["partition"]),
            line["rows"],
            line["bytes"],
            line["units_done"],
            line["units"],
        ))?;
    }
    let filtered = if pipeline.source.predicate.is_some() { " (before `where`)" } else { "" };
    context.say(&format!(
        "{} partitions of {}; {todo_partitions} to embed with model {} ({}), {todo_rows} rows{filtered}; tables go to {}",
        lines.len(),
        job.source.url(),
        job.contract.name,
        &job.model_sha256[..crate::hash::SHORT_DIGITS],
        job.output.url(),
    ))?;
    Ok(ExitStatus::Success)
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or_default()
}
