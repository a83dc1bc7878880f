//! `report`: the page about the last run, or about partitions that are named. A run writes it too.

use url::Url;

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::report::{Report, ReportSettings};
use crate::source::{PartitionValues, Selection, Source};
use crate::stages::{Backfill, Job};

/// What the report is about, and where it goes.
#[derive(Debug, Clone)]
pub struct ReportQuestion {
    /// The partitions; all: those that the last run changed.
    pub selection: Selection,
    /// Runs whose results are shown beside it.
    pub num_runs: usize,
    /// File for the page. Where neither is named, both go beside the tables.
    pub html: Option<String>,
    /// File for the JSON.
    pub json: Option<String>,
}

/// Writes the report, and prints where it is.
pub fn report(context: &Context, pipeline: &Pipeline, question: &ReportQuestion) -> Result<ExitStatus, Error> {
    // All of the source is at hand, for an image of a partition may be a near-duplicate of one elsewhere.
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    let partitions = if question.selection == Selection::default() { None } else { Some(selected(&job, question)?) };
    let settings = ReportSettings { partitions, history: Some(question.num_runs), pictures_within: None };
    let report = Report::read(&job, &settings)?;
    let locate = |option: &str, location: &Option<String>| {
        location.as_ref().map(|location| context.locate(option, location)).transpose()
    };
    let (html, json) = (locate("--html", &question.html)?, locate("--json", &question.json)?);
    let files = match (html, json) {
        (None, None) => beside_tables(&job)?.map(Some),
        (html, json) => [html, json],
    };
    for url in write(context, &report, &files)? {
        context.print(url.as_str())?;
    }
    Ok(ExitStatus::Success)
}

/// The partitions of the source that are asked for.
fn selected(job: &Job<'_>, question: &ReportQuestion) -> Result<Vec<PartitionValues>, Error> {
    let unit_rows = job.pipeline.execution.unit_rows.get() as u64;
    let settings = &job.pipeline.source;
    let found = Source::discover(&job.context.stores, settings, unit_rows, &question.selection);
    let partitions = job.context.block_on(found)?.partitions;
    Ok(partitions.into_iter().map(|partition| partition.values).collect())
}

/// Where a run writes its report: the page, and the JSON.
pub fn beside_tables(job: &Job<'_>) -> Result<[Url; 2], Error> {
    let [html, json] = Report::files(&job.pipeline.name);
    let url = |name: &str| job.context.locate("[output] table", &job.output.url_of(name));
    Ok([url(&html)?, url(&json)?])
}

/// Writes the page and the JSON, as far as they have a place. Returns where they are.
pub fn write<'a>(context: &Context, report: &Report, files: &'a [Option<Url>; 2]) -> Result<Vec<&'a Url>, Error> {
    let mut written = Vec::new();
    for (number, url) in files.iter().enumerate() {
        let Some(url) = url else { continue };
        let content = if number == 0 { report.html()? } else { report.json()? };
        let (store, name) = context.open_file(url)?;
        context.block_on(store.put(&name, content.into()))?;
        written.push(url);
    }
    Ok(written)
}
