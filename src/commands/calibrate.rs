//! `calibrate`: scores rows taken as normal, and freezes them as a reference.

use std::sync::Arc;

use crate::config::{self, Anomaly, Pipeline};
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::flag::{Promise, cutoff};
use crate::model::Model;
use crate::reference::{Header, LatentRows, Reference, ReferenceBuilder, percent};
use crate::schema::{TableName, data_schema};
use crate::source::Source;
use crate::stages::{Backfill, Job, flag};

/// Scores the rows of the source and writes the reference to `out` (or where the pipeline file expects it). `bank` are further rows
/// known as normal, of which only the vectors are used, since the model may have learned from them.
pub fn calibrate(
    context: &Context,
    pipeline: &Pipeline,
    out: Option<&str>,
    bank: Option<&str>,
) -> Result<ExitStatus, Error> {
    let settings = super::required(pipeline.anomaly.as_ref(), "anomaly")?;
    let url = match (out, &settings.reference) {
        (Some(out), _) => context.locate("--to", out)?,
        (None, Some(url)) => url.clone(),
        (None, None) => {
            return Err(Error::Usage {
                message: "it is not said where the reference should go".to_owned(),
                hint: "name it with --to, or as [anomaly] reference in the pipeline file".to_owned(),
            });
        }
    };
    let (store, name) = context.open_file(&url)?;
    // Not what is flagged with the reference, which may not be there yet.
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    flag::check_segment(&job, settings)?;
    let header = flag::header(&job, settings, job.source.predicate_text(), bank.map(str::to_owned));
    let reference = score(&job, settings, job.model()?, header, &job.source, url.as_str())?;
    // What cannot be promised would fail later, in every run.
    reference.check(settings.rule, settings.threshold, url.as_str())?;
    context.block_on(reference.write(&store, &name))?;
    context.say(&format!(
        "reference {} of {} rows ({} rejected) written to {url}",
        reference.id, reference.num_rows, reference.num_rejected
    ))?;
    let promises = say_promises(context, &reference, settings)?;
    context.print(
        &serde_json::json!({
            "reference_id": reference.id,
            "rows": reference.num_rows,
            "rejected": reference.num_rejected,
            "url": url.to_string(),
            "promises": promises,
        })
        .to_string(),
    )?;
    Ok(ExitStatus::Success)
}

/// Scores the rows of `counted`, and those of the bank that the header names, by any model. `url` names the reference in errors.
pub(super) fn score(
    job: &Job<'_>,
    settings: &Anomaly,
    model: &Arc<Model>,
    header: Header,
    counted: &Source,
    url: &str,
) -> Result<Reference, Error> {
    let bank = header.bank.clone();
    let mut builder = ReferenceBuilder::new(header);
    take(job, settings, model, counted, &mut builder, true)?;
    if bank.is_some() {
        take(job, settings, model, &rows_where(job, bank)?, &mut builder, false)?;
    }
    Ok(builder.build(url)?)
}

/// The pipeline's source with other rows taken.
pub(super) fn rows_where(job: &Job<'_>, predicate: Option<String>) -> Result<Source, Error> {
    let wanted = config::Source { predicate, ..job.pipeline.source.clone() };
    let unit_rows = job.pipeline.execution.unit_rows.get() as u64;
    let source = Source::discover(&job.context.stores, &wanted, unit_rows, &job.backfill.selection);
    Ok(job.context.block_on(source)?)
}

/// Adds the rows of a source.
fn take(
    job: &Job<'_>,
    settings: &Anomaly,
    model: &Arc<Model>,
    source: &Source,
    builder: &mut ReferenceBuilder,
    is_counted: bool,
) -> Result<(), Error> {
    let progress = job.context.progress("calibrate", source.num_rows());
    let pass = job.context.pass(job.pipeline, source);
    let schema = data_schema(TableName::Latents, &source.kept_schema);
    let rows_error = |error| Error::Rows { table: TableName::Latents.name(), source: error };
    for partition in &source.partitions {
        for unit in &partition.units {
            pass.score_unit(partition, unit, model, |batch| {
                let num_rejected = batch.num_rows() - batch.scores().count();
                let rows = batch.to_record_batch(&schema, "", &job.model_sha256).map_err(rows_error)?;
                let rows = partition.values.extend_batch(&rows).map_err(rows_error)?;
                let rows = LatentRows::of(&rows, settings.segment.as_deref())?;
                builder.push(&partition.values, &rows, is_counted)?;
                progress.advance(batch.num_rows() as u64, num_rejected as u64);
                Ok(())
            })?;
        }
    }
    progress.finish();
    Ok(())
}

/// Says, for each segment, how often a normal image will be flagged.
fn say_promises(context: &Context, reference: &Reference, settings: &Anomaly) -> Result<serde_json::Value, Error> {
    let mut promises = Vec::new();
    for (name, segment) in reference.segments() {
        let scores = segment.scores(settings.rule);
        let Some(cutoff) = cutoff(settings.threshold, scores) else { continue };
        let promise = Promise::of(cutoff, scores);
        let of = match &settings.segment {
            Some(column) => format!("{column} = {}: ", name.unwrap_or("null")),
            None => String::new(),
        };
        context.say(&format!(
            "  {of}a new normal image is flagged with a chance of {} on average over references of {} rows, and with this one of at most {} (95 % sure)",
            percent(promise.average),
            scores.len(),
            percent(promise.at_most),
        ))?;
        promises.push(serde_json::json!({
            "segment": name,
            "rows": scores.len(),
            "threshold": cutoff,
            "false_positive_rate": promise.average,
            "false_positive_rate_at_most": promise.at_most,
        }));
    }
    Ok(promises.into())
}
