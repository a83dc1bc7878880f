//! `run`, and its stages alone: `embed`, `neighbors`, `flag`.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;

use chrono::Utc;

use super::report::{beside_tables, write};
use super::{fit, required, seconds};
use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::metrics::RunMetrics;
use crate::report::{self, Report, ReportSettings};
use crate::schema::{STATUS_OK, TableName};
use crate::source::PartitionValues;
use crate::stages::flag::{FLAGGED, flag};
use crate::stages::groups::{DUPLICATES, GROUPS, groups};
use crate::stages::record::{RunReport, record};
use crate::stages::{Backfill, Job, StageReport, embed::embed, neighbors::neighbors};

/// Rows that the closing summary names, of all its tables together: with what is said besides, they fill a small screen.
const ROWS_SHOWN: usize = 8;

/// Partitions that it names, of those that are not like the reference.
const DRIFTED_SHOWN: usize = 3;

/// Runs all stages and publishes what changed; fills in `metrics` as far as it comes.
pub fn run(
    context: &Context,
    pipeline: &Pipeline,
    backfill: &Backfill,
    metrics: &mut RunMetrics,
) -> Result<ExitStatus, Error> {
    let started = Utc::now();
    metrics.pipeline = Some(pipeline.name.clone());
    let job = Job::prepare(context, pipeline, backfill)?;
    metrics.newest_source = job.source.newest;
    if job.source.partitions.is_empty() {
        return nothing_selected(&job);
    }
    job.check_rule()?;
    job.check_model()?;
    job.ensure(&job.tables())?;
    let mut embed = embed(&job)?;
    metrics.embedded(&embed);
    let neighbors = pipeline.neighbors.as_ref().map(|settings| neighbors(&job, settings)).transpose()?;
    if let Some(neighbors) = &neighbors {
        metrics.joined(neighbors);
    }
    embed.follow(&context.block_on(job.latents.live())?);
    let groups = pipeline.groups().map(|(settings, distance)| groups(&job, settings, distance)).transpose()?;
    if let Some(groups) = &groups {
        metrics.grouped(groups);
    }
    let (flag, reference) = pipeline.anomaly.as_ref().map(|settings| flag(&job, settings)).transpose()?.unzip();
    if let Some(flag) = &flag {
        metrics.flagged(flag);
    }
    let report = RunReport {
        started,
        finished: Utc::now(),
        embed,
        neighbors,
        groups,
        flag,
        reference,
        drift: BTreeMap::new(),
        onnxruntime_version: job.loaded_model().map(|model| model.runtime.version.clone()),
    };
    let (is_new, rejects) = finish(&job, report)?;
    Ok(if is_new { rejects } else { ExitStatus::NothingToDo })
}

/// Records a run of which everything is published, says what came of it, and writes its report. Returns whether there was anything new,
/// and whether more images were rejected than the pipeline allows.
pub fn finish(job: &Job<'_>, mut report: RunReport) -> Result<(bool, ExitStatus), Error> {
    let (context, pipeline) = (job.context, job.pipeline);
    // Rows that a table had lost may be back, and be recorded already.
    let is_new = record(job, &mut report)? || report.any_written();
    context.lineage.wrote(job, &report);
    // Before the report, which loads the model to show what it sees: the run may have needed none.
    let summary = summary(job, &report, is_new).to_string();
    // The last line is for programs; people at a terminal see last what is for them.
    let is_for_people = std::io::stdout().is_terminal();
    if is_for_people {
        context.print(&summary)?;
    }
    if is_new {
        say_what_was_found(job, &report)?;
        if pipeline.report {
            write_report(job)?;
        }
    } else {
        context.say("nothing to do: every partition is up to date")?;
    }
    if !is_for_people {
        context.print(&summary)?;
    }
    Ok((is_new, rejects_status(pipeline, report.rows_in(), report.rejects().values().sum())))
}

/// Writes the report beside the tables. These are published whatever comes of it, so what goes wrong here is told and is no error of the
/// run: another attempt would find nothing to do.
fn write_report(job: &Job<'_>) -> Result<(), Error> {
    let settings = ReportSettings { pictures_within: Some(report::PICTURES_WITHIN), ..ReportSettings::default() };
    let written = Report::read(job, &settings).and_then(|report| {
        write(job.context, &report, &beside_tables(job)?.map(Some))?;
        Ok(Report::files(&job.pipeline.name))
    });
    match written {
        Ok([page, _]) => job.context.say(&format!("report: {page}, beside them")),
        Err(error @ Error::Stopped { .. }) => Err(error),
        Err(error) => {
            let causes = error.causes().join(": ");
            tracing::warn!(
                causes,
                "the report could not be written; the tables are complete, and `lookalike report` writes it anew"
            );
            Ok(())
        }
    }
}

/// The end of a run over a range of dates in which the source has nothing.
fn nothing_selected(job: &Job<'_>) -> Result<ExitStatus, Error> {
    job.context.say(&format!("nothing to do: {} has no partition between --from and --to", job.source.url()))?;
    let summary = serde_json::json!({
        "status": "nothing_to_do",
        "pipeline": job.pipeline.name,
        "output": job.output.url().to_string(),
        "rows_in": 0,
        "rows_embedded": 0,
    });
    job.context.print(&summary.to_string())?;
    Ok(ExitStatus::NothingToDo)
}

/// Runs on a folder of images without a pipeline file: fits a model to the folder unless one is named or was fitted before.
pub fn run_images(
    context: &Context,
    pipeline: &Pipeline,
    is_model_named: bool,
    backfill: &Backfill,
    metrics: &mut RunMetrics,
) -> Result<ExitStatus, Error> {
    metrics.pipeline = Some(pipeline.name.clone());
    if !is_model_named {
        fit::fit_unless_there(context, pipeline)?;
    }
    run(context, pipeline, backfill, metrics)
}

/// Runs the embed stage alone.
pub fn run_embed(context: &Context, pipeline: &Pipeline, backfill: &Backfill) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, backfill)?;
    if job.source.partitions.is_empty() {
        return nothing_selected(&job).map(|_| ExitStatus::Success);
    }
    job.check_model()?;
    job.ensure(&[TableName::Latents])?;
    let report = embed(&job)?;
    context.print(&stage_summary("latents", &report).to_string())?;
    if report.any_written() {
        Ok(rejects_status(pipeline, report.num_rows(), report.num_rows() - report.total(STATUS_OK)))
    } else {
        Ok(ExitStatus::Success)
    }
}

/// Runs the neighbors stage alone, and after it, where there is one, the groups stage.
pub fn run_neighbors(context: &Context, pipeline: &Pipeline) -> Result<ExitStatus, Error> {
    let settings = required(pipeline.neighbors.as_ref(), "neighbors")?;
    let job = Job::prepare_after_embed(context, pipeline)?;
    job.require_latents()?;
    let tables = [TableName::Neighbors, TableName::Groups];
    job.ensure(&job.tables().into_iter().filter(|table| tables.contains(table)).collect::<Vec<_>>())?;
    let report = neighbors(&job, settings)?;
    context.print(&stage_summary("neighbors", &report).to_string())?;
    if let Some((settings, distance)) = pipeline.groups() {
        let report = groups(&job, settings, distance)?;
        context.print(&stage_summary("groups", &report).to_string())?;
    }
    Ok(ExitStatus::Success)
}

/// Runs the flag stage alone.
pub fn run_flag(context: &Context, pipeline: &Pipeline) -> Result<ExitStatus, Error> {
    let settings = required(pipeline.anomaly.as_ref(), "anomaly")?;
    let job = Job::prepare_after_embed(context, pipeline)?;
    job.require_latents()?;
    job.ensure(&[TableName::Anomalies])?;
    let (report, _) = flag(&job, settings)?;
    context.print(&stage_summary("anomalies", &report).to_string())?;
    Ok(ExitStatus::Success)
}

fn rejects_status(pipeline: &Pipeline, rows: u64, rejected: u64) -> ExitStatus {
    let fraction = if rows == 0 { 0.0 } else { rejected as f64 / rows as f64 };
    if fraction > pipeline.limits.max_rejected_fraction { ExitStatus::Rejects } else { ExitStatus::Success }
}

fn stage_summary(table: &str, report: &StageReport) -> serde_json::Value {
    serde_json::json!({
        "status": if report.any_written() { "committed" } else { "nothing_to_do" },
        "table": table,
        "partitions_written": report.partitions.values().filter(|partition| partition.written).count(),
        "rows": report.num_rows(),
        "counts": report.partitions.values().map(|partition| &partition.counts).collect::<Vec<_>>(),
        "secs": report.secs,
    })
}

/// The one line that a scheduler keeps.
fn summary(job: &Job<'_>, report: &RunReport, is_new: bool) -> serde_json::Value {
    let [neighbors, groups, flag] = [&report.neighbors, &report.groups, &report.flag].map(Option::as_ref);
    serde_json::json!({
        "status": if is_new { "committed" } else { "nothing_to_do" },
        "pipeline": job.pipeline.name,
        "output": job.output.url().to_string(),
        "rows_in": report.rows_in(),
        "rows_embedded": report.embed.rows_embedded,
        "rows_duplicate": report.rows_duplicate(),
        "rows_ok": report.embed.total(STATUS_OK),
        "rejects": report.rejects(),
        "rows_flagged": flag.map(|stage| stage.total(FLAGGED)),
        "drifted": report.drifted().len(),
        "neighbors_written": neighbors.map_or(0, StageReport::num_rows),
        "neighbors_searched": neighbors.and_then(|stage| stage.found).map_or(0, |found| found.rows_searched),
        "groups": groups.map(|stage| stage.total(GROUPS)),
        "duplicates": groups.map(|stage| stage.total(DUPLICATES)),
        "secs": {
            "embed": round(report.embed.secs),
            "neighbors": round(neighbors.map_or(0.0, |stage| stage.secs)),
            "groups": round(groups.map_or(0.0, |stage| stage.secs)),
            "flag": round(flag.map_or(0.0, |stage| stage.secs)),
        },
        "model_sha256": job.model_sha256,
        "reference_id": report.reference.as_ref().map(|reference| &reference.id),
        "provider": report.onnxruntime_version.as_ref().and_then(|_| Some(job.provider().ok()?.name())),
    })
}

/// Seconds to the millisecond.
pub(super) fn round(secs: f64) -> f64 {
    (secs * 1000.0).round() / 1000.0
}

fn say_what_was_found(job: &Job<'_>, report: &RunReport) -> Result<(), Error> {
    let context = job.context;
    let rejected: u64 = report.rejects().values().sum();
    let ok = report.embed.total(STATUS_OK);
    let judged = match &report.flag {
        Some(flag) => format!("{ok} scored, {rejected} rejected, {} flagged as strange", flag.total(FLAGGED)),
        None => format!("{ok} embedded, {rejected} rejected"),
    };
    context.say(&format!("{} images in, {judged}", report.rows_in()))?;
    let drifted = report.drifted();
    for (partition, checks) in drifted.iter().take(DRIFTED_SHOWN) {
        let checks: Vec<String> = checks.iter().map(ToString::to_string).collect();
        context.say_row(&format!("  {} is not like the reference: {}", partition.name(), checks.join(", ")))?;
    }
    if let Some(more) = drifted.len().checked_sub(DRIFTED_SHOWN).filter(|more| *more > 0) {
        context.say(&format!("  and {more} more partitions are not: see `drift` in runs"))?;
    }
    if let Some(groups) = &report.groups {
        let (groups, duplicates) = (groups.total(GROUPS), groups.total(DUPLICATES));
        context.say(&format!(
            "{groups} groups of near-duplicates, in which {duplicates} images are represented by another"
        ))?;
    }
    if rejected > 0 {
        let rejects: Vec<String> = report.rejects().iter().map(|(code, rows)| format!("{rows} {code}")).collect();
        context.say(&format!("  rejected: {}", rejects.join(", ")))?;
    }
    let done = |stage: Option<&StageReport>, what: String| {
        let Some(stage) = stage else { return "not asked for".to_owned() };
        if stage.any_written() { format!("{}{what}", seconds(stage.secs)) } else { "up to date".to_owned() }
    };
    let neighbor_rows = report.neighbors.as_ref().map_or(0, StageReport::rows_written);
    let rate = report.embed.rows_written() as f64 / report.embed.secs.max(f64::MIN_POSITIVE);
    context.say(&format!(
        "embed {}, neighbors {}, flag {}",
        done(Some(&report.embed), format!(" ({rate:.0} images/s)")),
        done(report.neighbors.as_ref(), format!(" ({neighbor_rows} rows)")),
        done(report.flag.as_ref(), String::new()),
    ))?;
    if let Some(model) = job.loaded_model() {
        context.say(&format!(
            "model {} ({}) on {}, ONNX Runtime {} from {} ({})",
            job.packages.names(),
            &job.model_sha256[..crate::hash::SHORT_DIGITS],
            model.provider.name(),
            model.runtime.version,
            model.runtime.library.display(),
            model.runtime.found_by,
        ))?;
    }
    let num_tables = [report.flag.is_some(), report.neighbors.is_some(), report.groups.is_some()];
    let num_shown = ROWS_SHOWN / num_tables.into_iter().filter(|is_there| *is_there).count().max(1);
    // Rows of other pipelines in the same tables were scored by other models.
    let partitions = |stage: &StageReport| stage.partitions.keys().cloned().collect::<Vec<PartitionValues>>();
    if let (Some(settings), Some(flag)) = (&job.pipeline.anomaly, &report.flag) {
        let title = format!("strangest by {}", settings.rule.name());
        say_table(context, &title, &report::strangest(job, &partitions(flag), num_shown)?)?;
    }
    if let Some(neighbors) = &report.neighbors {
        say_table(context, "most alike", &report::nearest_pairs(job, &partitions(neighbors), num_shown)?)?;
    }
    if let Some(groups) = &report.groups {
        say_table(context, "largest groups", &report::largest_groups(job, &partitions(groups), num_shown)?)?;
    }
    context.say(&format!("\ntables: {}", job.output.url()))
}

/// Says lines under a title; nothing where there are none.
fn say_table(context: &Context, title: &str, lines: &[String]) -> Result<(), Error> {
    if !lines.is_empty() {
        context.say(&format!("\n{title}:"))?;
    }
    lines.iter().try_for_each(|line| context.say_row(line))
}
