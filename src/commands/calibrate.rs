//! `calibrate`: scores rows taken as normal, and freezes the scores as a reference.

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::flag::ReferenceBuilder;
use crate::model::Model;
use crate::model::Runtime;
use crate::source::{Selection, Source};

/// Scores the rows of the source and writes the reference to `out` (or where the pipeline file expects it).
pub fn calibrate(context: &Context, pipeline: &Pipeline, out: Option<&str>) -> Result<ExitStatus, Error> {
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
    let package = pipeline.require_model()?;
    let source = context.block_on(Source::discover(
        &context.stores,
        &pipeline.source,
        pipeline.execution.unit_rows.get() as u64,
        &Selection::default(),
    ))?;
    let runtime = Runtime::load(context.onnxruntime.as_deref())?;
    let package_store = context.stores.open(&package.package)?;
    let workers = context.workers(pipeline);
    let mut model = context.block_on(Model::load(
        &package_store,
        package.sha256.as_deref(),
        runtime,
        pipeline.execution.device,
        workers,
    ))?;
    context.block_on(model.sample_elbo(&package_store, package.elbo_samples, workers))?;
    let mut builder = ReferenceBuilder::default();
    let progress = context.progress("calibrate", source.num_rows());
    let pass = context.pass(pipeline, &source);
    for partition in &source.partitions {
        for unit in &partition.units {
            pass.score_unit(partition, unit, &model, |batch| {
                let num_scored = batch.scores().map(|scores| builder.push(Some(scores))).count();
                let num_rejected = batch.num_rows() - num_scored;
                (0..num_rejected).for_each(|_| builder.push(None));
                progress.advance(batch.num_rows() as u64, num_rejected as u64);
                Ok(())
            })?;
        }
    }
    progress.finish();
    let reference = builder.build(&model.sha256, source.url().as_str(), source.predicate_text());
    // A reference without scores would fail later, in every run.
    reference.scores(settings.rule, url.as_str())?;
    context.block_on(reference.write(&store, &name))?;
    context.say(&format!(
        "reference {} of {} rows ({} rejected) written to {url}",
        reference.id, reference.num_rows, reference.num_rejected
    ))?;
    context.print(
        &serde_json::json!({
            "reference_id": reference.id,
            "rows": reference.num_rows,
            "rejected": reference.num_rejected,
            "url": url.to_string(),
        })
        .to_string(),
    )?;
    Ok(ExitStatus::Success)
}
