//! `explain`: everything the tables know of one image.

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::report;
use crate::stages::{Backfill, Job};

/// Prints the row of an image in `latents` and `anomalies`, and its neighbors.
pub fn explain(context: &Context, pipeline: &Pipeline, image_id: &str) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    let lines = report::explain(&job, image_id)?;
    if lines.is_empty() {
        return Err(Error::Usage {
            message: format!("no image `{image_id}` in {}", job.latents.store().url()),
            hint: "ids are those of the source table, for a folder of images paths relative to it; check that `lookalike run` has been run"
                .to_owned(),
        });
    }
    for line in lines {
        context.print(&line)?;
    }
    Ok(ExitStatus::Success)
}
