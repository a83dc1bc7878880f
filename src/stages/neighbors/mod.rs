//! The neighbors stage: `latents` → `neighbors`.
//!
//! What is searched follows from the scope, how from the number of rows (`Plan`). A partition's lists depend on every row
//! that was searched, so each change of `latents` calls all of them into question; but lists that come out as they are stay where they
//! are, under the run id that they have, and `searched` keeps which runs' lists were found to be right for which latents.
//! With its help, a few added or replaced partitions are compared with the rest (`incremental`) instead of everything with everything.

mod cells;
mod incremental;
pub mod output;
pub mod search;
pub mod searched;
pub mod shares;
mod shuffle;

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use cells::{Codebook, Sorted};
use output::Output;
use searched::Searched;

use super::{Job, StageReport};
use crate::config::{NeighborScope, Neighbors, Search};
use crate::corpus::Corpus;
use crate::error::Error;
use crate::hash::Fingerprint;
use crate::schema::TableName;
use crate::source::PartitionValues;
use crate::table::{Live, Table};

/// Rows above which `search = "auto"` searches by cells. Exactly, that many rows of 128 values take about a minute and a half on two
/// cores, and the time grows with their square.
pub const EXACT_MAX_ROWS: u64 = 300_000;

/// How neighbors were found, for `runs`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// How well the lists that are live were found, by this run or an earlier attempt at it.
    pub quality: Quality,
    /// Rows that this process compared with all that is searched. Where little has changed, lists of the others were patched.
    pub rows_searched: u64,
}

/// How a search was made, and how much of the truth it found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// Cells of the table, and how many of them each row was compared with; `None` for the exact search.
    pub cells: Option<(usize, usize)>,
    /// Share of the true neighbors that are in the lists: measured for the search by cells, 1 for the exact one.
    pub recall: f64,
}

impl Quality {
    /// The exact search misses nothing.
    const EXACT: Self = Self { cells: None, recall: 1.0 };

    /// The value of `neighbors_search` in `runs`.
    pub fn search(&self) -> &'static str {
        if self.cells.is_some() { "ivf" } else { "exact" }
    }
}

impl Found {
    fn exact(rows_searched: usize) -> Self {
        Self { quality: Quality::EXACT, rows_searched: rows_searched as u64 }
    }
}

/// The table that is searched in place of the run's own.
struct Reference {
    table: Table,
    live: Live,
}

/// What is searched, and how.
pub struct Plan<'a> {
    settings: &'a Neighbors,
    latents: &'a Live,
    reference: Option<Reference>,
    /// The cells to search by. Without them, the search is exact.
    codebook: Option<Codebook>,
}

impl<'a> Plan<'a> {
    /// Reads what there is, without changing anything; `None` where cells are to be searched that are not made yet.
    pub fn read(job: &Job<'_>, settings: &'a Neighbors, latents: &'a Live) -> Result<Option<Self>, Error> {
        let codebook = if by_cells(settings, latents) {
            let Some(codebook) = cells::current(job, settings, latents)? else { return Ok(None) };
            Some(codebook)
        } else {
            None
        };
        Self::new(job, settings, latents, codebook).map(Some)
    }

    fn new(
        job: &Job<'_>,
        settings: &'a Neighbors,
        latents: &'a Live,
        codebook: Option<Codebook>,
    ) -> Result<Self, Error> {
        let reference = settings.reference.as_ref().map(|url| reference(job, url)).transpose()?;
        Ok(Self { settings, latents, reference, codebook })
    }

    fn search<'c>(&self, job: &Job<'c>) -> search::Search<'c> {
        search_of(job, self.settings)
    }

    /// The run id of a partition's lists if they were made now.
    pub fn run_id(&self, partition: &PartitionValues) -> String {
        let settings = self.settings;
        let mut fingerprint = self.settings_fingerprint().with("partition", &partition.to_string());
        for searched in self.latents.partitions() {
            if settings.scope == NeighborScope::Corpus || searched == *partition {
                fingerprint =
                    fingerprint.with(&searched.to_string(), self.latents.run_of(&searched).unwrap_or_default());
            }
        }
        fingerprint.short()
    }

    /// Of all that lists depend on beside the run's own latents.
    fn settings_fingerprint(&self) -> Fingerprint {
        let settings = self.settings;
        let mut fingerprint = Fingerprint::new("neighbors")
            .with("schema", &crate::schema::VERSION.to_string())
            .with("k", &settings.k.to_string())
            .with("metric", settings.metric.name());
        if let Some(codebook) = &self.codebook {
            let nprobe = settings.nprobe.map(|nprobe| nprobe.to_string());
            fingerprint = fingerprint
                .with("cells", &codebook.id)
                .with("recall", &settings.recall.to_string())
                .with("nprobe", &nprobe.unwrap_or_default());
        }
        if let Some(reference) = &self.reference {
            fingerprint = fingerprint.with("reference", reference.table.store().url().as_str());
            for searched in reference.live.partitions() {
                let run_id = reference.live.run_of(&searched).unwrap_or_default();
                fingerprint = fingerprint.with(&searched.to_string(), run_id);
            }
        }
        fingerprint
    }

    /// The partitions of `latents`, each with the run of its lists where `live` has them up to date.
    pub fn current(&self, job: &Job<'_>, live: &Live) -> Result<BTreeMap<PartitionValues, Option<String>>, Error> {
        let partitions = self.latents.partitions();
        let expected: BTreeMap<_, _> =
            partitions.into_iter().map(|partition| (partition.clone(), self.run_id(&partition))).collect();
        let is_any_other = expected.iter().any(|(partition, run_id)| live.run_of(partition) != Some(run_id));
        let searched = if is_any_other { Searched::read(job, &Searched::name(&expected))? } else { None };
        let up_to_date = |(partition, expected): (PartitionValues, String)| {
            let run_id = live.run_of(&partition)?;
            let is_right = run_id == expected
                || searched.as_ref().and_then(|searched| searched.run_of(&partition)) == Some(run_id);
            is_right.then(|| run_id.to_owned())
        };
        Ok(expected
            .into_iter()
            .map(|(partition, expected)| (partition.clone(), up_to_date((partition, expected))))
            .collect())
    }
}

fn search_of<'c>(job: &Job<'c>, settings: &Neighbors) -> search::Search<'c> {
    search::Search {
        context: job.context,
        memory_limit: job.pipeline.execution.memory_limit,
        metric: settings.metric,
        k: settings.k.get(),
    }
}

/// Whether these latents are searched by cells.
fn by_cells(settings: &Neighbors, latents: &Live) -> bool {
    let rows = |partition: &PartitionValues| latents.of(partition).map(|file| file.num_rows).sum::<u64>();
    match (settings.search, settings.scope) {
        // What is searched is another table, and sorted by no cells of this one.
        (_, NeighborScope::Reference) | (Search::Exact, _) => false,
        (Search::Ivf, _) => true,
        (Search::Auto, NeighborScope::Corpus) => {
            latents.files.iter().map(|file| file.num_rows).sum::<u64>() > EXACT_MAX_ROWS
        }
        (Search::Auto, NeighborScope::Partition) => {
            latents.partitions().iter().any(|partition| rows(partition) > EXACT_MAX_ROWS)
        }
    }
}

/// The tables of another run, whose embeddings must be of the same model.
fn reference(job: &Job<'_>, url: &url::Url) -> Result<Reference, Error> {
    let table = job.find_table(url, TableName::Latents)?;
    let live = job.context.block_on(table.live())?;
    let comparable = job.of_this_model(&table, live.clone())?;
    if comparable.files.is_empty() || comparable != live {
        return Err(Error::Usage {
            message: format!("{} holds latents of other models than {}", table.store().url(), job.model_sha256),
            hint: "embed both tables with the same model package".to_owned(),
        });
    }
    Ok(Reference { table, live })
}

/// Finds the nearest neighbors of every row of `latents`, and publishes every partition whose lists have changed.
pub fn neighbors(job: &Job<'_>, settings: &Neighbors) -> Result<StageReport, Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    job.settle(&mut report, |latents, report| {
        let codebook = match by_cells(settings, latents).then(|| cells::sort(job, settings, latents)).transpose()? {
            // They are others now, and are looked at again.
            Some(Sorted::Replaced) => return Ok(()),
            Some(Sorted::By(codebook)) => codebook.map(|codebook| *codebook),
            None => None,
        };
        find(job, &Plan::new(job, settings, latents, codebook)?, report)
    })?;
    report.secs = started.elapsed().as_secs_f64();
    Ok(report)
}

fn find(job: &Job<'_>, plan: &Plan<'_>, report: &mut StageReport) -> Result<(), Error> {
    let (settings, latents, memory_limit) = (plan.settings, plan.latents, job.pipeline.execution.memory_limit);
    let live = job.context.block_on(job.neighbors.live())?;
    job.remove_vanished(&job.neighbors, &live)?;
    let current = plan.current(job, &live)?;
    report.partitions.retain(|partition, _| current.contains_key(partition));
    let mut expected = BTreeMap::new();
    for (partition, run_id) in &current {
        let entry = report.partitions.entry(partition.clone()).or_default();
        entry.run_id = run_id.clone().unwrap_or_else(|| plan.run_id(partition));
        expected.insert(partition.clone(), plan.run_id(partition));
    }
    let due: Vec<PartitionValues> =
        current.iter().filter(|(_, run_id)| run_id.is_none()).map(|(partition, _)| partition.clone()).collect();
    let record = Searched::name(&expected);
    if due.is_empty()
        && let Some(searched) = Searched::read(job, &record)?
    {
        report.found = report.found.or(Some(Found { quality: searched.quality, rows_searched: 0 }));
        return Ok(());
    }
    // With nothing due and no record, an attempt ended after the last list and before the record: what it would have said is found out
    // anew.
    let mut output = Output::new(job, &live, &due, report);
    let found = match settings.scope {
        NeighborScope::Corpus => {
            let corpus =
                Corpus::read(job.context, &job.latents, latents.files.clone(), plan.codebook.is_some(), memory_limit)?;
            if let Some(codebook) = &plan.codebook {
                search::by_cells(plan.search(job), settings, &corpus, codebook, &mut output)?
            } else {
                match incremental::patch(job, plan, &corpus, &live, &mut output)? {
                    Some(found) => found,
                    None => search::exact(plan.search(job), &corpus, &mut output)?,
                }
            }
        }
        NeighborScope::Partition => {
            let mut found = Found::exact(0);
            for partition in if due.is_empty() { plan.latents.partitions() } else { due.clone() } {
                let files: Vec<_> = latents.of(&partition).cloned().collect();
                let corpus = Corpus::read(job.context, &job.latents, files, plan.codebook.is_some(), memory_limit)?;
                let here = match &plan.codebook {
                    Some(codebook) => search::by_cells(plan.search(job), settings, &corpus, codebook, &mut output)?,
                    None => search::exact(plan.search(job), &corpus, &mut output)?,
                };
                // The worst of the partitions, so that the number promises nothing that one of them does not keep.
                let (so_far, here_too) = (found.quality, here.quality);
                let is_worse = here_too.recall < so_far.recall || so_far.cells.is_none();
                let quality = if is_worse { here_too } else { so_far };
                found = Found { quality, rows_searched: found.rows_searched + here.rows_searched };
            }
            found
        }
        NeighborScope::Reference => {
            let files = latents.files.iter().filter(|file| due.contains(&file.partition)).cloned().collect();
            let queries = Corpus::read(job.context, &job.latents, files, false, memory_limit)?;
            let reference = plan.reference.as_ref();
            let files = reference.map(|reference| reference.live.files.clone()).unwrap_or_default();
            let table = reference.map_or(&job.latents, |reference| &reference.table);
            let corpus = Corpus::read(job.context, table, files, false, memory_limit)?;
            let sides = search::Sides { queries: &queries, corpus: &corpus };
            search::between(plan.search(job), sides, &mut output)?
        }
    };
    output.finish()?;
    let so_far = report.found.map_or(0, |found| found.rows_searched);
    report.found = Some(Found { rows_searched: so_far + found.rows_searched, ..found });
    Searched::new(plan, report, found.quality).write(job, &record)
}
