//! `report`: the page about the last run, or about partitions that are named. A run writes it too.

use url::Url;

use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::report::{Report, ReportSettings};
use crate::source::Selection;
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
    let backfill = Backfill { selection: question.selection.clone(), ..Backfill::default() };
    let job = Job::prepare(context, pipeline, &backfill)?;
    let settings = ReportSettings {
        all_selected: question.selection != Selection::default(),
        history: Some(question.num_runs),
        pictures_within: None,
    };
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
