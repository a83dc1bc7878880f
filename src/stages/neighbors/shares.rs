//! The stage as tasks: sort ×n, then (probe ×n, join ×n, merge ×n) by cells, or join ×n exactly.
//!
//! **By cells**, all rows of a table are dealt to buckets ([`crate::neighbors::buckets`]). *Probe*: a task per bucket tells for each of
//! its rows which cells it looks into, and sends those that look into other buckets there, with their vectors.
//! *Join*: a task per bucket compares its own rows and those that have come with the rows of its cells, by the kernel of the search on one
//! machine, and sends what it finds on. *Merge*: a task per some rows of a partition takes the nearest of what was found for each in all
//! buckets, and writes their lists. Distances are those of one machine to the last bit, and ties go by id and partition on both, so the
//! lists are the same.
//!
//! **Exactly**, and within partitions, a join task per some rows compares these with all that the scope has, and writes their lists;
//! nothing travels.
//!
//! The files that are searched are frozen when the search is planned; should others be live at the commit, nothing is published.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray as _, Float32Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Float32Type, Int32Type, Int64Type, Schema, SchemaRef};
use futures::TryStreamExt as _;
use ndarray::ArrayView2;
use object_store::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::cells::{self, Codebook};
use super::output::{self, ListRow, ROWS_A_BATCH, list_columns};
use super::search::{self, Sides, Sink};
use super::searched::Searched;
use super::shuffle::{Moved, Scatter, TO, gather};
use super::{Found, Plan, Quality};
use crate::config::{NeighborScope, Neighbors};
use crate::corpus::Corpus;
use crate::error::Error;
use crate::neighbors::buckets::{Bucket, Buckets, bucket_rows};
use crate::neighbors::cells::Probes;
use crate::neighbors::exact::bytes_per_query;
use crate::neighbors::topk::{Neighbor, NeighborLists};
use crate::schema::{STATUS_OK, TableName, column, data_schema};
use crate::source::PartitionValues;
use crate::stages::{Job, PartitionReport, StageReport};
use crate::store::Store;
use crate::table::{DataFileWriter, Live, LiveFile, Published, Receipt, Receipts};
use crate::tasks::{PlanFolder, Share, TaskError};

/// Units of `execution.unit_rows` whose lists are written to one file: a task that merges holds what was found for so many, and one that
/// joins has as many rows of its own.
const UNITS_A_TASK: u64 = 4;

/// Folder of what is on its way, below that of the plan.
const SHUFFLE: &str = "shuffle";

/// Rows that are sent hold at most this part of `execution.memory_limit` before they are written.
const WAITING_SHARE: u64 = 8;

/// What is sorted by cells before anything is searched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SortPlan {
    /// File of the centroids, where there are any.
    codebook: Option<String>,
    /// The partitions that are not sorted by them, each with the run whose rows these are.
    partitions: Vec<(PartitionValues, String)>,
}

/// What is searched, frozen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchPlan {
    /// The vectors.
    latents: Live,
    /// Those of the table that is searched in their place.
    reference: Option<Live>,
    /// For each partition of `latents` the run of its lists, and whether they are live already.
    partitions: Vec<(PartitionValues, String, bool)>,
    /// Where it is kept that the lists are right for these latents.
    record: String,
    /// How the lists were found, where all are live and that is on record.
    recorded: Option<Quality>,
    /// How it is searched by cells.
    cells: Option<ByCells>,
    /// The rows whose lists are made, as they are dealt to tasks that write them.
    units: Vec<Unit>,
}

/// A search by cells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ByCells {
    /// File of the centroids.
    codebook: String,
    /// The tasks of a search of the whole table; without any, each partition is searched by itself.
    buckets: Vec<Bucket>,
    /// Cells that each row looks into, and the measured recall.
    nprobe: usize,
    recall: f64,
    /// Rows that travel, estimated from a sample.
    rows_to_travel: u64,
}

/// Rows whose lists one task writes to one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unit {
    /// Place of the partition in [`SearchPlan::partitions`].
    partition: usize,
    /// Number within the partition.
    number: usize,
    /// The rows, by their places in the partition.
    rows: Range<u64>,
}

/// The steps of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    /// Sort the latents by cells, where they are searched by cells and not sorted yet
    Sort,
    /// Find out which cells each image looks into, and send it to the tasks that have them
    Probe,
    /// Compare the images of each task's cells with those that have come
    Join,
    /// Take the nearest of all that was found, and write the lists
    Merge,
}

impl Step {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sort => "sort",
            Self::Probe => "probe",
            Self::Join => "join",
            Self::Merge => "merge",
        }
    }
}

/// What a task did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Worked {
    /// Units of its share.
    pub units: usize,
    /// Those of them that were done before.
    pub units_done_before: usize,
    /// Rows that it sorted, sent, searched for, or wrote lists of.
    pub rows: u64,
    /// What it moved between steps.
    pub moved: Moved,
}

impl SortPlan {
    /// Finds out what is to be sorted; trains the centroids if there are none.
    pub fn make(job: &Job<'_>, settings: &Neighbors) -> Result<Self, Error> {
        let latents = job.comparable_latents()?;
        if !super::by_cells(settings, &latents) {
            return Ok(Self::default());
        }
        let Some((name, codebook)) = cells::codebook(job, settings, &latents)? else { return Ok(Self::default()) };
        Ok(Self { codebook: Some(name), partitions: cells::unsorted(job, &latents, &codebook)? })
    }

    /// Tasks that have something to do.
    pub fn num_units(&self) -> usize {
        self.partitions.len()
    }

    /// Sorts a share of the partitions.
    pub fn sort(&self, job: &Job<'_>, settings: &Neighbors, share: Share) -> Result<Worked, Error> {
        let mine = &self.partitions[share.of(self.partitions.len())];
        let mut worked = Worked { units: mine.len(), ..Worked::default() };
        let Some(name) = self.codebook.as_ref().filter(|_| !mine.is_empty()) else { return Ok(worked) };
        let codebook = cells::read(job, settings, name)?;
        for (partition, seen) in mine {
            job.context.stop.check()?;
            let mut latents = job.comparable_latents()?;
            latents.files.retain(|file| file.partition == *partition);
            if cells::unsorted(job, &latents, &codebook)?.is_empty() {
                worked.units_done_before += 1;
                continue;
            }
            if latents.run_of(partition) != Some(seen) {
                return Err(changed(job, partition).into());
            }
            cells::sort_partition(job, &latents, partition, seen, &codebook)?;
            worked.rows += latents.files.iter().map(|file| file.num_rows).sum::<u64>();
        }
        Ok(worked)
    }
}

fn changed(job: &Job<'_>, partition: &PartitionValues) -> TaskError {
    TaskError::Changed { what: format!("{} of {}", partition.name(), job.latents.store().url()) }
}

impl SearchPlan {
    /// Plans the search of the latents that are live, which must be sorted if they are searched by cells.
    pub fn make(job: &Job<'_>, settings: &Neighbors) -> Result<Self, Error> {
        let latents = job.comparable_latents()?;
        let by_cells = super::by_cells(settings, &latents);
        let codebook = if by_cells { cells::codebook(job, settings, &latents)? } else { None };
        if let Some((_, codebook)) = &codebook {
            let unsorted = cells::unsorted(job, &latents, codebook)?;
            let missing: Vec<usize> = (0..unsorted.len()).collect();
            if !missing.is_empty() {
                return Err(TaskError::incomplete("sorting latents by cells", &missing).into());
            }
        }
        let (name, codebook) = codebook.unzip();
        let plan = Plan::new(job, settings, &latents, codebook)?;
        let live = job.context.block_on(job.neighbors.live())?;
        let current = plan.current(job, &live)?;
        let expected: BTreeMap<_, _> =
            current.keys().map(|partition| (partition.clone(), plan.run_id(partition))).collect();
        let record = Searched::name(&expected);
        let partitions: Vec<(PartitionValues, String, bool)> = current
            .into_iter()
            .map(|(partition, live)| {
                let run_id = live.clone().unwrap_or_else(|| expected[&partition].clone());
                (partition, run_id, live.is_some())
            })
            .collect();
        let is_any_due = partitions.iter().any(|(.., is_live)| !is_live);
        let recorded = if is_any_due { None } else { Searched::read(job, &record)?.map(|searched| searched.quality) };
        // Lists within a partition by cells are made by one task, as is the choice of how many cells are looked into.
        let unit_rows = match (name.is_some(), settings.scope) {
            (true, NeighborScope::Corpus) => task_rows(job),
            (true, _) => u64::MAX,
            (false, _) => job.pipeline.execution.unit_rows.get() as u64,
        };
        // With nothing due and no record, an attempt ended before the record; what it would have said is found out anew.
        let is_lost = !is_any_due && recorded.is_none() && unit_rows == u64::MAX;
        let due = partitions.iter().enumerate().filter(|(_, (.., is_live))| !is_live || is_lost);
        let units = due.flat_map(|(number, (partition, ..))| units(number, num_rows(&latents, partition), unit_rows));
        let units: Vec<Unit> = units.collect();
        let cells = match (name, &plan.codebook) {
            (Some(codebook), Some(there)) if settings.scope == NeighborScope::Corpus && recorded.is_none() => {
                Some(ByCells::make(job, settings, &plan, there, codebook)?)
            }
            (Some(codebook), _) => {
                Some(ByCells { codebook, buckets: Vec::new(), nprobe: 0, recall: 1.0, rows_to_travel: 0 })
            }
            _ => None,
        };
        Ok(Self {
            reference: plan.reference.as_ref().map(|reference| reference.live.clone()),
            record,
            recorded,
            cells,
            units,
            partitions,
            latents,
        })
    }

    fn buckets(&self) -> Option<&ByCells> {
        self.cells.as_ref().filter(|cells| !cells.buckets.is_empty() && !self.units.is_empty())
    }

    /// Units of a step: the tasks that have something to do.
    pub fn num_units(&self, step: Step) -> usize {
        match (step, self.buckets()) {
            (Step::Probe | Step::Join, Some(cells)) => cells.buckets.len(),
            (Step::Merge, Some(_)) | (Step::Join, None) => self.units.len(),
            (Step::Sort, _) | (Step::Probe | Step::Merge, None) => 0,
        }
    }

    /// Rows whose lists are made.
    pub fn num_rows(&self) -> u64 {
        self.units.iter().map(|unit| unit.rows.end - unit.rows.start).sum()
    }

    /// Rows that are expected to travel.
    pub fn rows_to_travel(&self) -> u64 {
        self.buckets().map_or(0, |cells| cells.rows_to_travel)
    }

    /// The plan that the search on one machine would make, of these latents.
    fn plan<'a>(&'a self, job: &Job<'_>, settings: &'a Neighbors) -> Result<Plan<'a>, Error> {
        let codebook = self.cells.as_ref().map(|by| cells::read(job, settings, &by.codebook)).transpose()?;
        let mut plan = Plan::new(job, settings, &self.latents, codebook)?;
        if let (Some(reference), Some(live)) = (&mut plan.reference, &self.reference) {
            reference.live = live.clone();
        }
        Ok(plan)
    }

    /// Does a share of a step.
    pub fn work(
        &self,
        job: &Job<'_>,
        settings: &Neighbors,
        folder: &PlanFolder,
        step: Step,
        share: Share,
    ) -> Result<Worked, Error> {
        let mine = share.of(self.num_units(step));
        let mut worked = Worked { units: mine.len(), ..Worked::default() };
        if mine.is_empty() {
            return Ok(worked);
        }
        let plan = self.plan(job, settings)?;
        let task = Task { search: self, job, settings, plan: &plan, store: &folder.store, sent: OnceCell::new() };
        for number in mine {
            job.context.stop.check()?;
            match (step, self.buckets()) {
                (Step::Probe, Some(by)) => task.probe(by, number, &mut worked)?,
                (Step::Join, Some(by)) => task.join(by, number, &mut worked)?,
                (Step::Merge, Some(_)) => task.merge(number, &mut worked)?,
                (Step::Join, None) => task.search_unit(number, &mut worked)?,
                _ => {}
            }
        }
        Ok(worked)
    }

    /// Publishes the lists, and takes away what travelled.
    pub fn publish(&self, job: &Job<'_>, settings: &Neighbors, folder: &PlanFolder) -> Result<StageReport, Error> {
        let latents = job.comparable_latents()?;
        if let Some(partition) = self
            .partitions
            .iter()
            .map(|(partition, ..)| partition)
            .find(|partition| latents.run_of(partition) != self.latents.run_of(partition))
        {
            return Err(changed(job, partition).into());
        }
        if latents.partitions().len() != self.partitions.len() {
            let what = format!("the partitions of {}", job.latents.store().url());
            return Err(TaskError::Changed { what }.into());
        }
        let live = job.context.block_on(job.neighbors.live())?;
        job.remove_vanished(&job.neighbors, &live)?;
        let mut report = StageReport::default();
        for (number, (partition, run_id, is_live)) in self.partitions.iter().enumerate() {
            job.context.stop.check()?;
            let entry = report.partitions.entry(partition.clone()).or_default();
            entry.run_id.clone_from(run_id);
            if !is_live {
                self.publish_partition(job, number, partition, run_id, entry)?;
            }
        }
        let quality = self.quality(job, folder)?;
        report.found = Some(Found { quality, rows_searched: self.num_rows() });
        if self.recorded.is_none() {
            Searched::new(&self.plan(job, settings)?, &report, quality).write(job, &self.record)?;
        }
        let travelled = job.context.block_on(folder.store.list(SHUFFLE))?;
        let travelled = travelled.into_iter().map(|object| object.location).collect();
        job.context.block_on(folder.store.delete_all(travelled))?;
        Ok(report)
    }

    fn publish_partition(
        &self,
        job: &Job<'_>,
        number: usize,
        partition: &PartitionValues,
        run_id: &str,
        entry: &mut PartitionReport,
    ) -> Result<(), Error> {
        let receipts = self.receipts(job, run_id);
        let (mut files, mut missing) = (Vec::new(), Vec::new());
        for unit in self.units.iter().filter(|unit| unit.partition == number) {
            match job.context.block_on(receipts.find(&job.neighbors, unit.number))? {
                Some(receipt) => files.extend(Some(receipt.file).filter(|file| file.num_rows > 0)),
                None => missing.push(unit.number),
            }
        }
        if !missing.is_empty() {
            let what = format!("searching the neighbors of {}", partition.name());
            return Err(TaskError::incomplete(&what, &missing).into());
        }
        entry.num_rows = files.iter().map(|file| file.num_rows).sum();
        let published = job.context.block_on(job.neighbors.replace_partition(partition, run_id, &files))?;
        entry.written = published != Published::Unchanged;
        Ok(())
    }

    /// Units of another size have receipts of their own.
    fn receipts(&self, job: &Job<'_>, run_id: &str) -> Receipts {
        let kind = match (&self.cells, self.buckets()) {
            (None, _) => "exact",
            (Some(_), None) => "partition",
            (Some(_), Some(_)) => "cells",
        };
        let cut = format!("{run_id}/{}-{kind}", job.pipeline.execution.unit_rows);
        Receipts::new(&job.output, TableName::Neighbors, &cut)
    }

    /// How well it was searched: where each partition was searched by itself, the worst of them.
    fn quality(&self, job: &Job<'_>, folder: &PlanFolder) -> Result<Quality, Error> {
        if let Some(recorded) = self.recorded {
            return Ok(recorded);
        }
        let Some(by) = &self.cells else { return Ok(Quality::EXACT) };
        if !by.buckets.is_empty() {
            let codebook_len = by.buckets.last().map_or(0, |bucket| bucket.cells.end as usize);
            return Ok(Quality { cells: Some((codebook_len, by.nprobe)), recall: by.recall });
        }
        let mut worst: Option<Quality> = None;
        for number in 0..self.units.len() {
            let found: Option<Quality> = folder.read(job.context, &quality_name(number))?;
            worst = match (worst, found) {
                (Some(worst), Some(found)) if found.recall >= worst.recall => Some(worst),
                (worst, found) => found.or(worst),
            };
        }
        // What travelled is gone where the lists were published before.
        match worst {
            Some(worst) => Ok(worst),
            None => Ok(Searched::read(job, &self.record)?.map_or(Quality::EXACT, |searched| searched.quality)),
        }
    }
}

/// Where a task that searches a partition by cells says how well.
fn quality_name(unit: usize) -> String {
    format!("{SHUFFLE}/quality/{unit:05}.json")
}

/// Rows of a task of the search by cells, as long as there are not too many tasks.
fn task_rows(job: &Job<'_>) -> u64 {
    UNITS_A_TASK * job.pipeline.execution.unit_rows.get() as u64
}

fn num_rows(latents: &Live, partition: &PartitionValues) -> u64 {
    latents.of(partition).map(|file| file.num_rows).sum()
}

/// Cuts the rows of a partition into units.
fn units(partition: usize, num_rows: u64, unit_rows: u64) -> impl Iterator<Item = Unit> {
    let num_units = num_rows.div_ceil(unit_rows);
    (0..num_units).map(move |number| {
        let start = number * unit_rows;
        let rows = start..num_rows.min(start.saturating_add(unit_rows));
        Unit { partition, number: usize::try_from(number).unwrap_or(usize::MAX), rows }
    })
}

impl ByCells {
    /// Chooses how many cells are looked into, as on one machine, deals the cells, and estimates from the same sample how many rows
    /// travel.
    fn make(
        job: &Job<'_>,
        settings: &Neighbors,
        plan: &Plan<'_>,
        codebook: &Codebook,
        name: String,
    ) -> Result<Self, Error> {
        let search = plan.search(job);
        let files = plan.latents.files.clone();
        let corpus = Corpus::read(job.context, &job.latents, files, true, job.pipeline.execution.memory_limit)?;
        let (nprobe, recall) = search::measure(search, settings, &corpus, codebook)?;
        let rows_of = corpus.rows_of_cells(codebook.cells.len());
        let buckets = Buckets::deal(&rows_of, bucket_rows(rows_of.iter().sum(), task_rows(job)));
        let sample = corpus.load(job.context, &search::sample(&corpus, 2 * search::SAMPLE_ROWS))?;
        let probes = codebook.cells.nearest(&sample.vectors()?, nprobe)?;
        let mut to_travel = 0;
        for row in 0..probes.num_rows() {
            let cells = probes.get(row);
            // Of a split cell, whichever part is home.
            let Some(home) = cells.first().map(|cell| buckets.of_cell(*cell).start) else { continue };
            to_travel += buckets.destinations(home, cells).len() as u64;
        }
        let scale = corpus.len() as f64 / probes.num_rows().max(1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of rows")]
        let rows_to_travel = (to_travel as f64 * scale).round() as u64;
        Ok(Self { codebook: name, buckets: buckets.list().to_vec(), nprobe, recall, rows_to_travel })
    }
}

/// What the units of a task share.
struct Task<'a, 'j> {
    search: &'a SearchPlan,
    job: &'a Job<'j>,
    settings: &'a Neighbors,
    plan: &'a Plan<'a>,
    store: &'a Store,
    /// The files of the step before, once one of the units wants them.
    sent: OnceCell<Vec<ObjectMeta>>,
}

impl Task<'_, '_> {
    fn is_there(&self, name: &str) -> Result<bool, Error> {
        match self.job.context.block_on(self.store.head(name)) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn waiting_bytes(&self) -> usize {
        let limit = self.job.pipeline.execution.memory_limit.get() / WAITING_SHARE;
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    fn codebook(&self) -> Result<&Codebook, Error> {
        let missing = || TaskError::Changed { what: "the file of the centroids".to_owned() };
        Ok(self.plan.codebook.as_ref().ok_or_else(missing)?)
    }

    /// The place in the search plan of the partition of a row of a corpus.
    fn partition_of(&self, corpus: &Corpus, position: usize) -> usize {
        let partition = &corpus.partitions()[corpus.partition_at(position)];
        self.search.partitions.binary_search_by(|(values, ..)| values.cmp(partition)).unwrap_or(usize::MAX)
    }

    /// The unit that writes the list of a row; none where its lists are live already.
    fn unit_of(&self, partition: usize, row: u64) -> Option<usize> {
        let units = &self.search.units;
        let unit = units.partition_point(|unit| (unit.partition, unit.rows.end) <= (partition, row));
        (units.get(unit)?.partition == partition).then_some(unit)
    }

    fn corpus_of(&self, bucket: &Bucket) -> Result<Corpus, Error> {
        let memory_limit = self.job.pipeline.execution.memory_limit;
        Corpus::read_bucket(self.job.context, &self.job.latents, &self.search.latents.files, bucket, memory_limit)
    }

    /// The files that the tasks of the step before have written, one for each unit.
    fn sent(&self, before: Step) -> Result<&[ObjectMeta], Error> {
        if let Some(files) = self.sent.get() {
            return Ok(files);
        }
        let mut files = self.job.context.block_on(self.store.list(&format!("{SHUFFLE}/{}", before.name())))?;
        files.sort_by(|a, b| a.location.cmp(&b.location));
        let names: Vec<String> = files.iter().map(|file| self.store.relative(&file.location)).collect();
        let is_there = |unit: &usize| names.binary_search(&shuffle_name(before, *unit)).is_ok();
        let missing: Vec<usize> = (0..self.search.num_units(before)).filter(|unit| !is_there(unit)).collect();
        if missing.is_empty() {
            return Ok(self.sent.get_or_init(|| files));
        }
        Err(TaskError::incomplete(&format!("the step {}", before.name()), &missing).into())
    }

    /// Sends the rows of a bucket to the other buckets that they look into.
    fn probe(&self, by: &ByCells, number: usize, worked: &mut Worked) -> Result<(), Error> {
        let name = shuffle_name(Step::Probe, number);
        if self.is_there(&name)? {
            worked.units_done_before += 1;
            return Ok(());
        }
        let (context, cells) = (self.job.context, &self.codebook()?.cells);
        let buckets = Buckets::of(by.buckets.clone());
        let corpus = self.corpus_of(&by.buckets[number])?;
        let mut scatter = Scatter::create(context, self.store, &name, travellers_schema(), self.waiting_bytes())?;
        for block in corpus.stream(context, &[corpus.all()]) {
            let block = block?;
            let vectors = block.vectors()?;
            let probes = cells.nearest(&vectors, by.nprobe)?;
            let mut travellers = Travellers::default();
            for (row, position) in block.positions.iter().enumerate() {
                let position = *position as usize;
                let partition = self.partition_of(&corpus, position);
                let row_in_partition = corpus.row_in_partition(position);
                if self.unit_of(partition, row_in_partition).is_none() {
                    continue;
                }
                for to in buckets.destinations(number, probes.get(row)) {
                    let there = &by.buckets[to].cells;
                    let cells = probes.get(row).iter().copied().filter(|cell| there.contains(cell));
                    travellers.push(to, partition, row_in_partition, cells, vectors.row(row).iter().copied());
                }
            }
            worked.rows += block.positions.len() as u64;
            scatter.push(travellers.finish(corpus.dim())?)?;
        }
        worked.moved.add(scatter.close()?);
        Ok(())
    }

    /// Compares the rows of a bucket, and those that have come, with the rows of its cells.
    fn join(&self, by: &ByCells, number: usize, worked: &mut Worked) -> Result<(), Error> {
        let name = shuffle_name(Step::Join, number);
        if self.is_there(&name)? {
            worked.units_done_before += 1;
            return Ok(());
        }
        let sent = self.sent(Step::Probe)?;
        let (context, search) = (self.job.context, self.plan.search(self.job));
        let cells = &self.codebook()?.cells;
        let bucket = &by.buckets[number];
        let corpus = self.corpus_of(bucket)?;
        let per_row = bytes_per_query(corpus.dim(), search.k) + by.nprobe * size_of::<u32>() * 2;
        let room = search::room(search, &[&corpus], per_row)?;
        let mut scatter = Scatter::create(context, self.store, &name, candidates_schema(), self.waiting_bytes())?;
        for chunk in search::chunks(&[corpus.all()], room) {
            let block = corpus.load(context, &chunk)?;
            let vectors = block.vectors()?;
            let own_rows = search::own_rows(&corpus, &block, true);
            let probes = cells.nearest(&vectors, by.nprobe)?.within(&bucket.cells);
            let lists = search::probe(search, &corpus, &vectors, &own_rows, &probes, |_, _| {})?;
            let queries = block.positions.iter().map(|position| {
                let position = *position as usize;
                (self.partition_of(&corpus, position), corpus.row_in_partition(position))
            });
            self.send_lists(&corpus, &queries.collect::<Vec<_>>(), &lists, &mut scatter)?;
            worked.rows += block.positions.len() as u64;
        }
        let mut waiting = Arrived::default();
        let to = i32::try_from(number).unwrap_or(i32::MAX);
        let read = gather(context, self.store, sent, to, |batch| {
            waiting.take(&batch);
            worked.rows += batch.num_rows() as u64;
            if waiting.queries.len() >= room { self.join_arrived(&corpus, &mut waiting, &mut scatter) } else { Ok(()) }
        })?;
        self.join_arrived(&corpus, &mut waiting, &mut scatter)?;
        worked.moved.add(read);
        worked.moved.add(scatter.close()?);
        Ok(())
    }

    fn join_arrived(&self, corpus: &Corpus, waiting: &mut Arrived, scatter: &mut Scatter<'_>) -> Result<(), Error> {
        let Arrived { queries, cells, vectors } = std::mem::take(waiting);
        if queries.is_empty() || corpus.is_empty() {
            return Ok(());
        }
        let search = self.plan.search(self.job);
        let vectors =
            ArrayView2::from_shape((queries.len(), corpus.dim()), &vectors).map_err(crate::corpus::shape_error)?;
        let lists =
            search::probe(search, corpus, &vectors, &vec![None; queries.len()], &Probes::new(cells), |_, _| {})?;
        self.send_lists(corpus, &queries, &lists, scatter)
    }

    /// Sends what was found for some rows to the tasks that write their lists.
    fn send_lists(
        &self,
        corpus: &Corpus,
        queries: &[(usize, u64)],
        lists: &NeighborLists,
        scatter: &mut Scatter<'_>,
    ) -> Result<(), Error> {
        let mut found: Vec<(usize, u64, Neighbor)> = Vec::new();
        for ((partition, row), list) in queries.iter().zip(lists.iter()) {
            // Rows whose lists are live already were not asked for.
            let Some(unit) = self.unit_of(*partition, *row) else { continue };
            found.extend(list.iter().map(|near| (unit, *row, *near)));
            if found.len() >= ROWS_A_BATCH {
                scatter.push(self.candidates(corpus, &found)?)?;
                found.clear();
            }
        }
        scatter.push(self.candidates(corpus, &found)?)
    }

    fn candidates(&self, corpus: &Corpus, found: &[(usize, u64, Neighbor)]) -> Result<RecordBatch, Error> {
        let near = |neighbor: &Neighbor| corpus.position(neighbor.row);
        let number = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        RecordBatch::try_new(
            candidates_schema(),
            vec![
                Arc::new(Int32Array::from_iter_values(found.iter().map(|(unit, ..)| number(*unit)))),
                Arc::new(Int64Array::from_iter_values(
                    found.iter().map(|(_, row, _)| i64::try_from(*row).unwrap_or(i64::MAX)),
                )),
                Arc::new(StringArray::from_iter_values(
                    found.iter().map(|(.., near_row)| corpus.id_at(near(near_row))),
                )),
                Arc::new(Int32Array::from_iter_values(
                    found.iter().map(|(.., near_row)| number(self.partition_of(corpus, near(near_row)))),
                )),
                Arc::new(Float32Array::from_iter_values(found.iter().map(|(.., neighbor)| neighbor.distance))),
            ],
        )
        .map_err(rows_error)
    }

    /// The writer of a unit's lists; none where they are there already.
    fn begin_unit(&self, number: usize, worked: &mut Worked) -> Result<Option<UnitFile<'_>>, Error> {
        let (job, unit) = (self.job, &self.search.units[number]);
        let (partition, run_id, _) = &self.search.partitions[unit.partition];
        let receipts = self.search.receipts(job, run_id);
        if job.context.block_on(receipts.find(&job.neighbors, unit.number))?.is_some() {
            worked.units_done_before += 1;
            return Ok(None);
        }
        let schema = data_schema(TableName::Neighbors, &Schema::empty());
        let footer = job.footer(run_id)?;
        let file = job.neighbors.create_file(partition, run_id, unit.number, schema, &footer);
        let file = job.context.block_on(file)?;
        Ok(Some(UnitFile { job, unit, run_id, receipts, file, due: 0..0 }))
    }

    /// Writes the lists of a unit, of what was found in all buckets.
    fn merge(&self, number: usize, worked: &mut Worked) -> Result<(), Error> {
        let Some(mut file) = self.begin_unit(number, worked)? else { return Ok(()) };
        let unit = &self.search.units[number];
        let mut batches: Vec<RecordBatch> = Vec::new();
        let to = i32::try_from(number).unwrap_or(i32::MAX);
        let read = gather(self.job.context, self.store, self.sent(Step::Join)?, to, |batch| {
            batches.push(batch);
            Ok(())
        })?;
        worked.moved.add(read);
        let found = Candidates::of(&batches);
        let (partition, ..) = &self.search.partitions[unit.partition];
        let ids = self.ids(partition, &unit.rows)?;
        file.write_merged(&found, &ids, self.settings.k.get(), &self.search.partitions)?;
        worked.rows += unit.rows.end - unit.rows.start;
        file.close()
    }

    /// The ids of some rows of a partition.
    fn ids(&self, partition: &PartitionValues, rows: &Range<u64>) -> Result<Vec<RecordBatch>, Error> {
        let job = self.job;
        let mut batches = Vec::new();
        let mut first = 0;
        for file in self.search.latents.of(partition) {
            let within = |row: u64| {
                let row = row.clamp(first, first + file.num_rows) - first;
                usize::try_from(row).unwrap_or(usize::MAX)
            };
            let here = within(rows.start)..within(rows.end);
            first += file.num_rows;
            if !here.is_empty() {
                let here = std::slice::from_ref(&here);
                let read = async {
                    let stream = job.latents.scan(file, &[column::IMAGE_ID], Some(here), ROWS_A_BATCH).await?;
                    stream.try_collect::<Vec<_>>().await
                };
                batches.extend(job.context.block_on(read)?);
            }
        }
        Ok(batches)
    }

    /// Searches for the rows of a unit in all that the scope has, and writes their lists.
    fn search_unit(&self, number: usize, worked: &mut Worked) -> Result<(), Error> {
        let Some(mut file) = self.begin_unit(number, worked)? else { return Ok(()) };
        let (job, search, unit) = (self.job, self.plan.search(self.job), &self.search.units[number]);
        let memory_limit = job.pipeline.execution.memory_limit;
        let (partition, ..) = &self.search.partitions[unit.partition];
        let of_partition = || self.search.latents.of(partition).cloned().collect::<Vec<LiveFile>>();
        let by_cells = self.plan.codebook.is_some();
        let read = |files| Corpus::read(job.context, &job.latents, files, by_cells, memory_limit);
        match self.settings.scope {
            NeighborScope::Corpus => {
                let corpus = read(self.search.latents.files.clone())?;
                file.due = due(&corpus, partition, &unit.rows);
                search::exact(search, &corpus, &mut file)?;
            }
            NeighborScope::Partition => {
                let corpus = read(of_partition())?;
                file.due = due(&corpus, partition, &unit.rows);
                if let Some(codebook) = &self.plan.codebook {
                    let found = search::by_cells(search, self.settings, &corpus, codebook, &mut file)?;
                    let quality = serde_json::to_vec(&found.quality);
                    let name = quality_name(number);
                    let document = |source| TaskError::Document { url: self.store.url_of(&name), source };
                    job.context.block_on(self.store.put(&name, quality.map_err(document)?.into()))?;
                } else {
                    search::exact(search, &corpus, &mut file)?;
                }
            }
            NeighborScope::Reference => {
                let queries = read(of_partition())?;
                let reference = self.plan.reference.as_ref();
                let files = reference.map(|reference| reference.live.files.clone()).unwrap_or_default();
                let table = reference.map_or(&job.latents, |reference| &reference.table);
                let corpus = Corpus::read(job.context, table, files, false, memory_limit)?;
                file.due = due(&queries, partition, &unit.rows);
                search::between(search, Sides { queries: &queries, corpus: &corpus }, &mut file)?;
            }
        }
        worked.rows += unit.rows.end - unit.rows.start;
        file.close()
    }
}

/// The positions of some rows of a partition.
fn due(corpus: &Corpus, partition: &PartitionValues, rows: &Range<u64>) -> Range<usize> {
    let number = corpus.partitions().iter().position(|values| values == partition);
    let all = number.map_or(0..0, |number| corpus.positions_of(number));
    let at = |row: u64| (all.start + usize::try_from(row).unwrap_or(usize::MAX)).min(all.end);
    at(rows.start)..at(rows.end)
}

fn shuffle_name(step: Step, bucket: usize) -> String {
    format!("{SHUFFLE}/{}/{bucket:05}.parquet", step.name())
}

fn rows_error(source: arrow::error::ArrowError) -> Error {
    Error::Rows { table: "shuffle", source }
}

/// Rows on their way to a bucket: the partition and the row's place in it, the cells there that it looks into, and its vector.
fn travellers_schema() -> SchemaRef {
    let list =
        |name, data_type| Field::new(name, DataType::List(Arc::new(Field::new("element", data_type, false))), false);
    Arc::new(Schema::new(vec![
        Field::new(TO, DataType::Int32, false),
        Field::new("partition", DataType::Int32, false),
        Field::new("row", DataType::Int64, false),
        list("cells", DataType::Int32),
        list("vector", DataType::Float32),
    ]))
}

/// What was found, on its way to the task that writes the list: the row's place in its partition, and the neighbor.
fn candidates_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(TO, DataType::Int32, false),
        Field::new("row", DataType::Int64, false),
        Field::new("neighbor_id", DataType::Utf8, false),
        Field::new("neighbor_partition", DataType::Int32, false),
        Field::new("distance", DataType::Float32, false),
    ]))
}

/// Rows that are sent to buckets.
#[derive(Default)]
struct Travellers {
    to: Vec<i32>,
    partitions: Vec<i32>,
    rows: Vec<i64>,
    cells: Vec<i32>,
    num_cells: Vec<usize>,
    vectors: Vec<f32>,
}

impl Travellers {
    fn push(
        &mut self,
        to: usize,
        partition: usize,
        row: u64,
        cells: impl Iterator<Item = u32>,
        vector: impl Iterator<Item = f32>,
    ) {
        let before = self.cells.len();
        self.to.push(i32::try_from(to).unwrap_or(i32::MAX));
        self.partitions.push(i32::try_from(partition).unwrap_or(i32::MAX));
        self.rows.push(i64::try_from(row).unwrap_or(i64::MAX));
        self.cells.extend(cells.map(|cell| i32::try_from(cell).unwrap_or(i32::MAX)));
        self.num_cells.push(self.cells.len() - before);
        self.vectors.extend(vector);
    }

    fn finish(self, dim: usize) -> Result<RecordBatch, Error> {
        let num_rows = self.to.len();
        let element = |data_type| Arc::new(Field::new("element", data_type, false));
        let cells = ListArray::try_new(
            element(DataType::Int32),
            OffsetBuffer::from_lengths(self.num_cells),
            Arc::new(Int32Array::from(self.cells)),
            None,
        );
        let vectors = ListArray::try_new(
            element(DataType::Float32),
            OffsetBuffer::from_lengths(vec![dim; num_rows]),
            Arc::new(Float32Array::from(self.vectors)),
            None,
        );
        RecordBatch::try_new(
            travellers_schema(),
            vec![
                Arc::new(Int32Array::from(self.to)),
                Arc::new(Int32Array::from(self.partitions)),
                Arc::new(Int64Array::from(self.rows)),
                Arc::new(cells.map_err(rows_error)?),
                Arc::new(vectors.map_err(rows_error)?),
            ],
        )
        .map_err(rows_error)
    }
}

/// Rows that have come to a bucket.
#[derive(Default)]
struct Arrived {
    /// Partition and row.
    queries: Vec<(usize, u64)>,
    cells: Vec<Vec<u32>>,
    vectors: Vec<f32>,
}

impl Arrived {
    fn take(&mut self, batch: &RecordBatch) {
        let partitions = batch.column(1).as_primitive::<Int32Type>().values();
        let rows = batch.column(2).as_primitive::<Int64Type>().values();
        let cells = batch.column(3).as_list::<i32>();
        let of_cells = cells.values().as_primitive::<Int32Type>().values();
        let vectors = batch.column(4).as_list::<i32>();
        let [from, to] = [0, batch.num_rows()].map(|row| vectors.value_offsets()[row].unsigned_abs() as usize);
        self.vectors.extend_from_slice(&vectors.values().as_primitive::<Float32Type>().values()[from..to]);
        for row in 0..batch.num_rows() {
            self.queries.push((partitions[row].unsigned_abs() as usize, rows[row].unsigned_abs()));
            let [from, to] = [row, row + 1].map(|row| cells.value_offsets()[row].unsigned_abs() as usize);
            self.cells.push(of_cells[from..to].iter().map(|cell| cell.unsigned_abs()).collect());
        }
    }
}

/// What was found for the rows of a unit in all buckets.
struct Candidates<'a> {
    batches: &'a [RecordBatch],
    /// The row's place in its partition, the batch, and the row of the batch: by row, nearest first, ties by id and partition.
    order: Vec<(i64, u32, u32)>,
}

impl<'a> Candidates<'a> {
    fn of(batches: &'a [RecordBatch]) -> Self {
        let mut order: Vec<(i64, u32, u32)> = Vec::new();
        for (number, batch) in (0_u32..).zip(batches) {
            let rows = batch.column(1).as_primitive::<Int64Type>().values();
            order.extend(rows.iter().zip(0_u32..).map(|(row, place)| (*row, number, place)));
        }
        let found = Self { batches, order: Vec::new() };
        order.sort_unstable_by(|(row, batch, place), (other_row, other_batch, other_place)| {
            row.cmp(other_row).then_with(|| {
                let (id, partition, distance) = found.get(*batch, *place);
                let (other_id, other_partition, other_distance) = found.get(*other_batch, *other_place);
                distance.total_cmp(&other_distance).then(id.cmp(other_id)).then(partition.cmp(&other_partition))
            })
        });
        Self { batches, order }
    }

    /// Id, partition and distance of a neighbor.
    fn get(&self, batch: u32, place: u32) -> (&'a str, usize, f32) {
        let (batch, place) = (&self.batches[batch as usize], place as usize);
        (
            batch.column(2).as_string::<i32>().value(place),
            batch.column(3).as_primitive::<Int32Type>().value(place).unsigned_abs() as usize,
            batch.column(4).as_primitive::<Float32Type>().value(place),
        )
    }

    /// The nearest of a row, at most `k`.
    fn of_row(&self, row: u64, k: usize) -> &[(i64, u32, u32)] {
        let row = i64::try_from(row).unwrap_or(i64::MAX);
        let start = self.order.partition_point(|(other, ..)| *other < row);
        let len = self.order[start..].iter().take(k).take_while(|(other, ..)| *other == row).count();
        &self.order[start..start + len]
    }
}

/// The file of a unit's lists, being written.
struct UnitFile<'a> {
    job: &'a Job<'a>,
    unit: &'a Unit,
    run_id: &'a str,
    receipts: Receipts,
    file: DataFileWriter,
    /// Where the rows are in the corpus.
    due: Range<usize>,
}

impl UnitFile<'_> {
    /// Writes what was found for each row, whose ids are given in their order.
    fn write_merged(
        &mut self,
        found: &Candidates<'_>,
        ids: &[RecordBatch],
        k: usize,
        partitions: &[(PartitionValues, String, bool)],
    ) -> Result<(), Error> {
        let names: Vec<String> = partitions.iter().map(|(partition, ..)| partition.to_string()).collect();
        let mut row = self.unit.rows.start;
        for batch in ids {
            let mut lists: Vec<ListRow<'_>> = Vec::new();
            let ids = batch.column(0).as_string::<i32>();
            for place in 0..batch.num_rows() {
                lists.extend(found.of_row(row, k).iter().zip(1_usize..).map(|((_, batch, at), rank)| {
                    let (neighbor_id, partition, distance) = found.get(*batch, *at);
                    let image_id = ids.value(place);
                    ListRow { image_id, rank, neighbor_id, distance, neighbor_partition: &names[partition] }
                }));
                row += 1;
            }
            for lists in lists.chunks(ROWS_A_BATCH) {
                let rows = output::batch(list_columns(lists.iter().copied()), self.run_id)?;
                self.job.context.block_on(self.file.write(&rows))?;
            }
        }
        Ok(())
    }

    /// Finishes the file and hands in its receipt.
    fn close(self) -> Result<(), Error> {
        let file = self.job.context.block_on(self.file.close())?;
        let num_read = self.unit.rows.end - self.unit.rows.start;
        let rows_by_status = BTreeMap::from([(STATUS_OK.to_owned(), file.num_rows)]);
        let receipt = Receipt { unit: self.unit.number, file, num_read, rows_by_status };
        self.job.context.block_on(self.receipts.hand_in(receipt))?;
        Ok(())
    }
}

impl Sink for UnitFile<'_> {
    fn due(&self, _: &Corpus) -> Vec<Range<usize>> {
        vec![self.due.clone()]
    }

    fn take<'l>(
        &mut self,
        sides: Sides<'_>,
        positions: &[Range<usize>],
        list: impl Fn(usize) -> &'l [Neighbor],
    ) -> Result<(), Error> {
        self.job.context.stop.check()?;
        output::write_lists(self.job, &mut self.file, self.run_id, sides, positions.iter().cloned().flatten(), list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_cut_into_units_that_hold_each_row_once() {
        let cut = |num_rows, unit_rows| units(3, num_rows, unit_rows).map(|unit| unit.rows).collect::<Vec<_>>();
        assert_eq!(cut(10, 4), [0..4, 4..8, 8..10]);
        assert_eq!(cut(8, 4), [0..4, 4..8]);
        assert_eq!(cut(7, u64::MAX), vec![0..7]);
        assert!(cut(0, 4).is_empty());
    }

    #[test]
    fn the_nearest_of_all_that_was_found_are_taken_ties_by_id_and_partition() {
        let batch = |rows: &[(i64, &str, i32, f32)]| {
            RecordBatch::try_new(
                candidates_schema(),
                vec![
                    Arc::new(Int32Array::from(vec![0; rows.len()])),
                    Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.0))),
                    Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.1))),
                    Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.2))),
                    Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| row.3))),
                ],
            )
            .unwrap()
        };
        let batches = [
            batch(&[(5, "m", 0, 0.5), (5, "z", 0, 0.25), (7, "a", 1, 0.0)]),
            batch(&[(5, "b", 1, 0.5), (5, "b", 0, 0.5), (6, "q", 0, f32::INFINITY)]),
        ];
        let found = Candidates::of(&batches);
        let list = |row, k| {
            let list = found.of_row(row, k).iter().map(|(_, batch, place)| found.get(*batch, *place));
            list.map(|(id, partition, _)| (id, partition)).collect::<Vec<_>>()
        };
        assert_eq!(list(5, 3), [("z", 0), ("b", 0), ("b", 1)]);
        assert_eq!(list(5, 9).len(), 4);
        assert_eq!(list(6, 3), [("q", 0)]);
        assert_eq!(list(7, 3), [("a", 1)]);
        assert!(list(8, 3).is_empty());
    }
}
