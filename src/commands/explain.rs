//! `explain`: everything the tables know of one image, and what the model sees in it.

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::explanation::{self, Explanation, Gallery};
use crate::stages::{Backfill, Job};

/// What is explained, and where it is written beside the lines.
#[derive(Debug, Clone)]
pub struct ExplainSettings {
    /// Id of the image, with or without its partition before it.
    pub image_id: String,
    /// File for the page.
    pub html: Option<String>,
    /// File for the montage.
    pub png: Option<String>,
}

/// Prints the rows of an image in the tables and its neighbors; writes a page and a montage where they are asked for.
pub fn explain(context: &Context, pipeline: &Pipeline, settings: &ExplainSettings) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    let name = &settings.image_id;
    let explanation = Explanation::read(&job, name)?;
    let lines = explanation.lines();
    if lines.is_empty() {
        return Err(Error::Usage {
            message: format!("no image `{name}` in {}", job.latents.store().url()),
            hint: "ids are those of the source table, for a folder of images paths relative to it; check that `lookalike run` has been run"
                .to_owned(),
        });
    }
    for line in lines {
        context.print(&line)?;
    }
    if settings.html.is_none() && settings.png.is_none() {
        return Ok(ExitStatus::Success);
    }
    if settings.png.is_some() && job.contract.input.image().is_none() {
        return Err(Error::Usage {
            message: format!("--png shows pictures, and the model {} takes features", job.contract.name),
            hint: "leave out --png: the lines, and the page that --html writes, say what is known of the row"
                .to_owned(),
        });
    }
    let latents = explanation.latents(&job)?;
    let gallery = Gallery::read(&job, &explanation, latents)?;
    let put = |option: &str, location: &str, file: Vec<u8>| -> Result<(), Error> {
        let url = context.locate(option, location)?;
        let (store, name) = context.open_file(&url)?;
        context.block_on(store.put(&name, file.into()))?;
        context.say(&format!("written to {url}"))
    };
    if let Some(location) = &settings.html {
        put("--html", location, explanation::html(&job, &explanation, latents, &gallery)?.into_bytes())?;
    }
    if let Some(location) = &settings.png {
        put("--png", location, gallery.montage()?)?;
    }
    Ok(ExitStatus::Success)
}
