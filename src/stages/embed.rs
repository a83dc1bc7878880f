//! The embed stage: images → `latents`.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Array as _, ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, new_null_array};
use arrow::compute::filter_record_batch;
use arrow::datatypes::SchemaRef;
use tokio::task::JoinHandle;

use super::{Job, PartitionReport, Redo, StageReport};
use crate::config::Duplicates;
use crate::context::Progress;
use crate::error::Error;
use crate::pass::{PassError, PassFault, Passed, ScoredBatch};
use crate::schema::{STATUS_OK, TableName, column, data_schema};
use crate::source::{PartitionValues, Slice, SourcePartition, WorkUnit};
use crate::table::{
    DataFile, DataFileWriter, Inputs, Live, LiveFile, Published, Receipt, Receipts, TableError, fingerprint,
    next_revision, sum_by_status,
};
use crate::tasks::TaskError;

/// Ids named in the error about ids that occur twice.
const EXAMPLES_NAMED: usize = 5;

/// Rows that are written at a time, or fewer that have so many bytes: what a call of the writer takes besides is divided by them.
const WRITTEN_ROWS: usize = 256;
const WRITTEN_BYTES: usize = 256 << 10;

/// Data files of a partition that are being finished at a time. Each holds a row group and up to two parts of an upload.
const FILES_CLOSING: usize = 2;

/// What is to be done with a partition of `latents`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Id of the rows that will be live afterwards.
    pub run_id: String,
    /// What it takes.
    pub work: Work,
}

/// What it takes to bring a partition up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Nothing: the rows are live.
    Nothing,
    /// All rows are embedded.
    All,
    /// The rows of these ids are tried again, and the others carried over.
    Rejected(Arc<HashSet<String>>),
    /// The rows of these files are embedded, and those that run `base` made of the others carried over.
    Added {
        /// Names of the files.
        names: HashSet<String>,
        /// The run whose rows are live.
        base: String,
    },
}

impl Decision {
    /// The receipts for this work. Units are numbered by it, so work of another kind for the same rows, or units of another size, have
    /// receipts of their own: whichever attempt was left unfinished, another takes up none of its numbers.
    pub fn receipts(&self, job: &Job<'_>) -> Receipts {
        let kind = match &self.work {
            Work::Nothing | Work::All => String::new(),
            Work::Rejected(_) => "-rejected".to_owned(),
            Work::Added { base, .. } => format!("-added-to-{base}"),
        };
        let cut = format!("{}/{}{kind}", self.run_id, job.pipeline.execution.unit_rows);
        Receipts::new(&job.output, TableName::Latents, &cut)
    }
}

/// Decides what to do with a partition, given what is live in `latents`.
pub fn decide(job: &Job<'_>, live: &Live, partition: &SourcePartition) -> Result<Decision, Error> {
    let run_id = job.latents_run_id(partition)?;
    let current = live.run_of(&partition.values).map(str::to_owned);
    let redo = job.backfill.redo;
    let has_rows = live.of(&partition.values).next().is_some();
    if redo == Redo::Missing && has_rows {
        return Ok(Decision { run_id: current.unwrap_or_default(), work: Work::Nothing });
    }
    let Some(current) = current else { return Ok(Decision { run_id, work: Work::All }) };
    if fingerprint(&current) == run_id {
        let next = || next_revision(&current);
        return Ok(match redo {
            Redo::All => Decision { run_id: next(), work: Work::All },
            Redo::Rejected => match rejected_ids(job, live, &partition.values)? {
                ids if ids.is_empty() => Decision { run_id: current, work: Work::Nothing },
                ids => Decision { run_id: next(), work: Work::Rejected(Arc::new(ids)) },
            },
            Redo::Changed | Redo::Missing => Decision { run_id: current, work: Work::Nothing },
        });
    }
    let added = if job.backfill.added_only { added_files(job, &current, partition)? } else { None };
    Ok(Decision { run_id, work: added.map_or(Work::All, |names| Work::Added { names, base: current }) })
}

/// The same for each partition of the source.
pub fn decide_all(job: &Job<'_>, live: &Live) -> Result<Vec<Decision>, Error> {
    let decide = |partition| {
        job.context.stop.check()?;
        decide(job, live, partition)
    };
    job.source.partitions.iter().map(decide).collect()
}

/// Ids of the rows of a partition that could not be used.
pub fn rejected_ids(job: &Job<'_>, live: &Live, partition: &PartitionValues) -> Result<HashSet<String>, Error> {
    let files = live.of(partition).cloned().collect();
    let batches = job.context.block_on(job.latents.read(files, &[column::IMAGE_ID, column::STATUS]))?;
    let mut rejected = HashSet::new();
    for (_, batch) in &batches {
        let (ids, statuses) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
        let of_bad = ids.iter().zip(statuses).filter(|(_, status)| *status != Some(STATUS_OK));
        rejected.extend(of_bad.filter_map(|(id, _)| id.map(str::to_owned)));
    }
    Ok(rejected)
}

/// The files that the partition has now and run `current` did not read, where nothing else changed.
fn added_files(job: &Job<'_>, current: &str, partition: &SourcePartition) -> Result<Option<HashSet<String>>, Error> {
    let Some(then) = job.context.block_on(Inputs::read(&job.output, current))? else { return Ok(None) };
    let now: HashSet<_> = partition.files.iter().collect();
    if then.settings != job.latents_settings()? || !then.files.iter().all(|file| now.contains(file)) {
        return Ok(None);
    }
    let read: HashSet<_> = then.files.iter().collect();
    Ok(Some(now.difference(&read).map(|file| file.name.clone()).collect()))
}

/// Embeds every partition whose rows are not live yet, in one pass, and publishes each as soon as all of it is there.
pub fn embed(job: &Job<'_>) -> Result<StageReport, Error> {
    let live = job.context.block_on(job.latents.live())?;
    let decisions = decide_all(job, &live)?;
    embed_units(job, &live, &decisions, |_| 0..usize::MAX, true)
}

/// Embeds those units that `mine` gives by the number of their partition in the source, as `decisions` has it for each partition, and
/// publishes nothing. What is done already is not done again.
pub fn embed_share(
    job: &Job<'_>,
    decisions: &[Decision],
    mine: impl Fn(usize) -> Range<usize>,
) -> Result<StageReport, Error> {
    embed_units(job, &job.context.block_on(job.latents.live())?, decisions, mine, false)
}

/// Publishes what all shares have embedded.
pub fn publish(job: &Job<'_>, decisions: &[Decision]) -> Result<StageReport, Error> {
    embed_units(job, &job.context.block_on(job.latents.live())?, decisions, |_| 0..0, true)
}

/// Units of a partition that a decision makes: the files that are carried over, and the slices that are embedded.
pub fn num_units(live: &Live, partition: &SourcePartition, decision: &Decision) -> usize {
    let num_carried = || live.of(&partition.values).count();
    match &decision.work {
        Work::Nothing => 0,
        Work::All => partition.units.len(),
        Work::Rejected(_) => num_carried() + partition.units.len(),
        Work::Added { names, .. } => num_carried() + partition.units_of(names).len(),
    }
}

fn embed_units(
    job: &Job<'_>,
    live: &Live,
    decisions: &[Decision],
    mine: impl Fn(usize) -> Range<usize>,
    publishes: bool,
) -> Result<StageReport, Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    let progress = job.context.progress("embed", job.source.num_rows().filter(|_| publishes));
    let mut decided = Vec::new();
    for (number, (partition, decision)) in job.source.partitions.iter().zip(decisions).enumerate() {
        if decision.work == Work::Nothing {
            progress.advance(partition.num_rows.unwrap_or(0), 0);
            let run_id = decision.run_id.clone();
            let done = PartitionReport { run_id, ..count_in(job, live, &partition.values)? };
            report.partitions.insert(partition.values.clone(), done);
        } else {
            decided.push((mine(number), Decided::new(partition, decision)));
        }
    }
    let mut waiting = VecDeque::new();
    for (mine, decided) in &decided {
        job.context.stop.check()?;
        waiting.push_back(PartitionWork::begin(job, decided, live, mine, &progress)?);
    }
    let slices: Vec<Slice<'_>> = waiting.iter().flat_map(PartitionWork::slices).collect();
    let mut rows_embedded = 0;
    end_read(&mut waiting, publishes, &mut report)?;
    if !slices.is_empty() {
        let embedded = job.pass().score(&slices, job.model()?, |_, passed| {
            let Some(work) = waiting.front_mut() else { return Ok(()) };
            match passed {
                Passed::Batch(batch) => {
                    rows_embedded += batch.num_rows() as u64;
                    work.take(batch)
                }
                Passed::End { num_rows } => {
                    work.end_unit(num_rows)?;
                    end_read(&mut waiting, publishes, &mut report)
                }
            }
        });
        if let Err(error) = embedded {
            waiting.into_iter().for_each(PartitionWork::abort);
            return Err(error);
        }
    }
    progress.finish();
    report.rows_embedded += rows_embedded;
    report.secs = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Ends the partitions of which all has been read, as far as those before them are ended: commits have the order of the source.
fn end_read(waiting: &mut VecDeque<PartitionWork<'_>>, publishes: bool, report: &mut StageReport) -> Result<(), Error> {
    while waiting.front().is_some_and(|work| work.units.is_empty())
        && let Some(work) = waiting.pop_front()
    {
        let values = work.partition.values.clone();
        if work.is_left_to_others {
            report.rows_embedded += work.embedded().map(|receipt| receipt.num_read).sum::<u64>();
        }
        report.partitions.insert(values, if publishes { work.publish()? } else { work.hand_in()? });
    }
    Ok(())
}

/// The run id and the rows by status of a partition that this run did not look at.
pub fn count(job: &Job<'_>, partition: &PartitionValues) -> Result<PartitionReport, Error> {
    count_in(job, &job.context.block_on(job.latents.live())?, partition)
}

fn count_in(job: &Job<'_>, live: &Live, partition: &PartitionValues) -> Result<PartitionReport, Error> {
    let run_id = live.run_of(partition).unwrap_or_default().to_owned();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let files = live.of(partition).cloned().collect();
    for (_, batch) in job.context.block_on(job.latents.read(files, &[column::STATUS]))? {
        for status in batch.column(0).as_string::<i32>().iter().flatten() {
            *counts.entry(status.to_owned()).or_default() += 1;
        }
    }
    Ok(PartitionReport { run_id, num_rows: counts.values().sum(), counts, ..PartitionReport::default() })
}

/// A partition that is not up to date.
struct Decided<'a> {
    partition: &'a SourcePartition,
    decision: &'a Decision,
    /// Units of added files alone, where these are all that is embedded.
    added: Option<Vec<WorkUnit>>,
}

impl<'a> Decided<'a> {
    fn new(partition: &'a SourcePartition, decision: &'a Decision) -> Self {
        let added = match &decision.work {
            Work::Added { names, .. } => Some(partition.units_of(names)),
            Work::Nothing | Work::All | Work::Rejected(_) => None,
        };
        Self { partition, decision, added }
    }
}

/// A partition being embedded.
struct PartitionWork<'a> {
    job: &'a Job<'a>,
    partition: &'a SourcePartition,
    decision: &'a Decision,
    progress: &'a Progress,
    schema: SchemaRef,
    receipts: Receipts,
    /// Files whose rows are carried over; their numbers come before those of the units.
    num_carried: usize,
    /// The receipts that there are, by number.
    done: BTreeMap<usize, Receipt>,
    /// The units to embed, with their numbers.
    units: VecDeque<(usize, &'a WorkUnit)>,
    /// Whether all that is to be done is done elsewhere.
    is_left_to_others: bool,
    /// Numbers of what is neither done nor to be done here.
    missing: Vec<usize>,
    /// The file of the first of them.
    open: Option<OpenFile>,
    /// Its rows that are not written yet.
    scored: Vec<ScoredBatch>,
    /// Files that are being finished while the next unit is embedded.
    closing: VecDeque<JoinHandle<Result<Receipt, TableError>>>,
}

/// The data file of a unit.
struct OpenFile {
    writer: DataFileWriter,
    rows_by_status: BTreeMap<String, u64>,
}

impl<'a> PartitionWork<'a> {
    /// Finds out what is done already, and carries over the rows that stay, of those units that are `mine`.
    fn begin(
        job: &'a Job<'a>,
        decided: &'a Decided<'a>,
        live: &Live,
        mine: &Range<usize>,
        progress: &'a Progress,
    ) -> Result<Self, Error> {
        let Decided { partition, decision, added } = decided;
        let receipts = decision.receipts(job);
        let there = job.context.block_on(receipts.read())?;
        let old: Vec<LiveFile> = match decision.work {
            Work::Rejected(_) | Work::Added { .. } => live.of(&partition.values).cloned().collect(),
            Work::Nothing | Work::All => Vec::new(),
        };
        let mut work = Self {
            job,
            partition,
            decision,
            progress,
            schema: data_schema(TableName::Latents, &job.source.kept_schema),
            receipts,
            num_carried: old.len(),
            done: BTreeMap::new(),
            units: VecDeque::new(),
            is_left_to_others: mine.is_empty(),
            missing: Vec::new(),
            open: None,
            scored: Vec::new(),
            closing: VecDeque::new(),
        };
        let units = added.as_ref().unwrap_or(&partition.units);
        // Rows that are carried over come first, as if their files were units.
        for number in 0..old.len() + units.len() {
            if let Some(receipt) = there.get(&number)
                && job.context.block_on(work.receipts.stands(&job.latents, receipt))?
            {
                progress.advance(receipt.num_read, 0);
                work.done.insert(number, receipt.clone());
                continue;
            }
            if !mine.contains(&number) {
                work.missing.push(number);
                continue;
            }
            match old.get(number) {
                Some(file) => {
                    let receipt = work.carry_over(number, file)?;
                    work.done.insert(number, job.context.block_on(work.receipts.hand_in(receipt))?);
                }
                None => work.units.push_back((number, &units[number - old.len()])),
            }
        }
        Ok(work)
    }

    /// Receipts of what was embedded, and not carried over.
    fn embedded(&self) -> impl Iterator<Item = &Receipt> {
        self.done.values().filter(|receipt| receipt.unit >= self.num_carried)
    }

    /// What is to be read.
    fn slices(&self) -> impl Iterator<Item = Slice<'a>> + use<'a> {
        let only_ids = match &self.decision.work {
            Work::Rejected(ids) => Some(Arc::clone(ids)),
            Work::Nothing | Work::All | Work::Added { .. } => None,
        };
        let (partition, units) = (self.partition, self.units.clone());
        units.into_iter().map(move |(_, unit)| Slice { partition, unit, only_ids: only_ids.clone() })
    }

    fn create_file(&self, number: usize) -> Result<DataFileWriter, Error> {
        let (job, run_id) = (self.job, &self.decision.run_id);
        let footer = job.footer(run_id)?;
        let schema = Arc::clone(&self.schema);
        let file = job.latents.create_file(&self.partition.values, run_id, number, schema, &footer);
        Ok(job.context.block_on(file)?)
    }

    /// The file of the unit that is embedded now.
    fn open(&mut self) -> Result<&mut OpenFile, Error> {
        let open = if let Some(open) = self.open.take() {
            open
        } else {
            let number = self.units.front().map_or(0, |(number, _)| *number);
            OpenFile { writer: self.create_file(number)?, rows_by_status: BTreeMap::new() }
        };
        Ok(self.open.insert(open))
    }

    /// Takes rows of the unit that is embedded now.
    fn take(&mut self, batch: ScoredBatch) -> Result<(), Error> {
        let open = self.open()?;
        let mut rejected = 0;
        for status in batch.statuses() {
            *open.rows_by_status.entry(status.to_owned()).or_default() += 1;
            rejected += u64::from(status != STATUS_OK);
        }
        self.progress.advance(batch.num_rows() as u64, rejected);
        self.scored.push(batch);
        let total = |of: fn(&ScoredBatch) -> usize| self.scored.iter().map(of).sum::<usize>();
        if total(ScoredBatch::num_rows) >= WRITTEN_ROWS || total(ScoredBatch::num_bytes) >= WRITTEN_BYTES {
            self.write()?;
        }
        Ok(())
    }

    /// Writes the rows that were taken.
    fn write(&mut self) -> Result<(), Error> {
        let scored = std::mem::take(&mut self.scored);
        if scored.is_empty() {
            return Ok(());
        }
        let job = self.job;
        let rows = ScoredBatch::concat(scored)
            .and_then(|rows| rows.to_record_batch(&self.schema, &self.decision.run_id, &job.model_sha256))
            .map_err(|source| Error::Rows { table: TableName::Latents.name(), source })?;
        let open = self.open()?;
        Ok(job.context.block_on(open.writer.stream(&rows))?)
    }

    /// Finishes the unit that is embedded now, of which so many rows were read. Its file is closed, and its receipt handed in, while the
    /// next one is embedded.
    fn end_unit(&mut self, num_read: u64) -> Result<(), Error> {
        self.write()?;
        self.open()?;
        let (Some(OpenFile { writer, rows_by_status }), Some((unit, _))) = (self.open.take(), self.units.pop_front())
        else {
            return Ok(());
        };
        let receipts = self.receipts.clone();
        self.closing.push_back(self.job.context.handle().spawn(async move {
            let file = writer.close().await?;
            receipts.hand_in(Receipt { unit, file, num_read, rows_by_status }).await
        }));
        while self.closing.len() > FILES_CLOSING {
            self.await_receipt()?;
        }
        Ok(())
    }

    /// Waits for the oldest of the files that are being finished.
    fn await_receipt(&mut self) -> Result<(), Error> {
        let Some(closing) = self.closing.pop_front() else { return Ok(()) };
        let closed = self.job.context.block_on(closing).map_err(|fault| PassError {
            partition: self.partition.values.name(),
            unit: self.done.len(),
            source: PassFault::Panicked(fault.to_string()),
        })?;
        let receipt = closed?;
        self.done.insert(receipt.unit, receipt);
        Ok(())
    }

    /// Gives up what is not finished.
    fn abort(self) {
        if let Some(open) = self.open {
            self.job.context.block_on(open.writer.abort());
        }
        for closing in self.closing {
            // Whatever comes of it: another attempt takes up the receipt if there is one.
            let _ = self.job.context.block_on(closing);
        }
    }

    /// Writes the rows of a live file that stay as they are to a file of this run.
    fn carry_over(&self, number: usize, old: &LiveFile) -> Result<Receipt, Error> {
        let job = self.job;
        let names: Vec<&str> = self.schema.fields().iter().map(|field| field.name().as_str()).collect();
        let mut file = self.create_file(number)?;
        let mut rows_by_status: BTreeMap<String, u64> = BTreeMap::new();
        let mut num_read = 0;
        for (_, rows) in job.context.block_on(job.latents.read(vec![old.clone()], &names))? {
            num_read += rows.num_rows() as u64;
            let rows = self.still_good(&rows)?;
            let statuses = rows.column_by_name(column::STATUS).map(AsArray::as_string::<i32>);
            for status in statuses.into_iter().flatten().flatten() {
                *rows_by_status.entry(status.to_owned()).or_default() += 1;
            }
            job.context.block_on(file.stream(&rows))?;
        }
        self.progress.advance(rows_by_status.values().sum(), 0);
        let file = job.context.block_on(file.close())?;
        Ok(Receipt { unit: number, file, num_read, rows_by_status })
    }

    /// The rows that need not be made again, under this run's id.
    fn still_good(&self, rows: &RecordBatch) -> Result<RecordBatch, Error> {
        let rows_error = |source| Error::Rows { table: TableName::Latents.name(), source };
        let kept = match (&self.decision.work, rows.column_by_name(column::STATUS)) {
            (Work::Rejected(_), Some(statuses)) => {
                let good: BooleanArray =
                    statuses.as_string::<i32>().iter().map(|status| Some(status == Some(STATUS_OK))).collect();
                filter_record_batch(rows, &good).map_err(rows_error)?
            }
            _ => rows.clone(),
        };
        let run_id = StringArray::from(vec![self.decision.run_id.as_str(); kept.num_rows()]);
        let columns: Vec<ArrayRef> = self
            .schema
            .fields()
            .iter()
            .map(|field| match field.name().as_str() {
                column::RUN_ID => Some(Arc::new(run_id.clone()) as ArrayRef),
                // Rows carried over stand among others now; the partition is sorted by cells anew.
                column::CELL => Some(new_null_array(field.data_type(), kept.num_rows())),
                name => kept.column_by_name(name).cloned(),
            })
            .collect::<Option<_>>()
            .ok_or_else(|| {
                rows_error(arrow::error::ArrowError::SchemaError("a live file of latents lacks a column".to_owned()))
            })?;
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(rows_error)
    }

    /// Waits for the receipts of all that was done here, and counts its rows.
    fn hand_in(mut self) -> Result<PartitionReport, Error> {
        while !self.closing.is_empty() {
            self.await_receipt()?;
        }
        let counts = sum_by_status(self.done.values());
        let num_rows = counts.values().sum();
        Ok(PartitionReport { run_id: self.decision.run_id.clone(), num_rows, counts, ..PartitionReport::default() })
    }

    /// Checks that every row that was read is there exactly once, and makes the files the partition's content.
    fn publish(mut self) -> Result<PartitionReport, Error> {
        while !self.closing.is_empty() {
            self.await_receipt()?;
        }
        if !self.missing.is_empty() {
            let what = format!("embedding {}", self.partition.values.name());
            return Err(TaskError::incomplete(&what, &self.missing).into());
        }
        let (job, partition, done) = (self.job, self.partition, &self.done);
        let mut counts = sum_by_status(done.values());
        let written: u64 = done.values().map(|receipt| receipt.file.num_rows).sum();
        let expected = self.expected_rows();
        if written != expected || counts.values().sum::<u64>() != expected {
            return Err(TableError::RowCount {
                table: job.latents.store().url().to_string(),
                partition: partition.values.to_string(),
                found: written,
                expected,
            }
            .into());
        }
        let files = done.values().map(|receipt| receipt.file.clone()).filter(|file| file.num_rows > 0).collect();
        let (files, num_duplicates) = self.settle_duplicates(files, &mut counts)?;
        let inputs = Inputs { settings: job.latents_settings()?, files: partition.files.clone() };
        let run_id = &self.decision.run_id;
        job.context.block_on(inputs.write(&job.output, run_id))?;
        let published = job.context.block_on(job.latents.replace_partition(&partition.values, run_id, &files))?;
        Ok(PartitionReport {
            run_id: run_id.clone(),
            written: published != Published::Unchanged,
            num_rows: counts.values().sum(),
            counts,
            num_duplicates,
        })
    }

    /// The rows that there must be, by another count than that of the writers: the source's own where it has one and every row is
    /// taken, else that of the readers.
    fn expected_rows(&self) -> u64 {
        let source = &self.job.pipeline.source;
        let is_filtered = source.predicate.is_some();
        // Rows that were dropped as duplicates are in the source and not among those carried over.
        let is_exact = source.duplicates == Duplicates::Refuse;
        let (carried, embedded): (Vec<_>, Vec<_>) =
            self.done.values().partition(|receipt| receipt.unit < self.num_carried);
        let read = |receipts: &[&Receipt]| receipts.iter().map(|receipt| receipt.num_read).sum::<u64>();
        match (&self.decision.work, self.partition.num_rows) {
            (Work::Rejected(_), _) if is_exact => read(&carried),
            (Work::Rejected(_), _) => sum_by_status(carried).values().sum::<u64>() + read(&embedded),
            (Work::Added { .. }, Some(num_rows)) if !is_filtered && is_exact => num_rows,
            (Work::All, Some(num_rows)) if !is_filtered => num_rows,
            _ => read(&carried) + read(&embedded),
        }
    }

    /// Finds the ids that occur more than once, and refuses them, or drops all rows but the first of each. Reads the ids back from the
    /// data files, and holds eight bytes for each of those of one partition: the hash, by which nearly all of them are told apart, so that
    /// the few of equal hashes alone are compared, in a second reading. Returns the number of rows dropped.
    fn settle_duplicates(
        &self,
        files: Vec<DataFile>,
        counts: &mut BTreeMap<String, u64>,
    ) -> Result<(Vec<DataFile>, u64), Error> {
        let job = self.job;
        let hasher = RandomState::new();
        let num_rows: u64 = files.iter().map(|file| file.num_rows).sum();
        let mut hashes: Vec<u64> = Vec::with_capacity(usize::try_from(num_rows).unwrap_or_default());
        for file in &files {
            self.for_each_id(file, |id| hashes.push(hasher.hash_one(id)))?;
        }
        hashes.sort_unstable();
        let repeated: HashSet<u64> = hashes.windows(2).filter(|two| two[0] == two[1]).map(|two| two[0]).collect();
        drop(hashes);
        if repeated.is_empty() {
            return Ok((files, 0));
        }
        let mut seen: HashSet<String> = HashSet::new();
        let mut twice: Vec<String> = Vec::new();
        let mut with_duplicates = Vec::new();
        for (number, file) in files.iter().enumerate() {
            let mut is_first = Vec::new();
            self.for_each_id(file, |id| {
                let first = !repeated.contains(&hasher.hash_one(id)) || seen.insert(id.to_owned());
                if !first {
                    twice.push(id.to_owned());
                }
                is_first.push(first);
            })?;
            if is_first.contains(&false) {
                with_duplicates.push((number, is_first));
            }
        }
        if twice.is_empty() {
            return Ok((files, 0));
        }
        let num_duplicates = twice.len() as u64;
        if job.pipeline.source.duplicates == Duplicates::Refuse {
            twice.sort_unstable();
            twice.dedup();
            let count = twice.len();
            twice.truncate(EXAMPLES_NAMED);
            let examples = twice.join(", ");
            return Err(TableError::DuplicateIds { partition: self.partition.values.name(), count, examples }.into());
        }
        let mut kept = files;
        for (number, is_first) in with_duplicates {
            kept[number] = self.without_duplicates(&kept[number], &BooleanArray::from(is_first), counts)?;
        }
        kept.retain(|file| file.num_rows > 0);
        Ok((kept, num_duplicates))
    }

    /// Reads the ids of a data file of this partition, in their order.
    fn for_each_id(&self, file: &DataFile, mut take: impl FnMut(&str)) -> Result<(), Error> {
        let job = self.job;
        let live = job.latents.as_live(&self.partition.values, file)?;
        for (_, batch) in &job.context.block_on(job.latents.read(vec![live], &[column::IMAGE_ID]))? {
            let ids = batch.column(0).as_string::<i32>();
            (0..ids.len()).for_each(|row| take(ids.value(row)));
        }
        Ok(())
    }

    /// Writes those rows of a file to a new one that are the first of their id.
    fn without_duplicates(
        &self,
        file: &DataFile,
        is_first: &BooleanArray,
        counts: &mut BTreeMap<String, u64>,
    ) -> Result<DataFile, Error> {
        let job = self.job;
        let names: Vec<&str> = self.schema.fields().iter().map(|field| field.name().as_str()).collect();
        let live = job.latents.as_live(&self.partition.values, file)?;
        let number = live.unit().unwrap_or_default();
        let mut shorter = self.create_file(number)?;
        let mut start = 0;
        for (_, rows) in job.context.block_on(job.latents.read(vec![live], &names))? {
            let first = is_first.slice(start, rows.num_rows());
            start += rows.num_rows();
            let statuses = rows.column_by_name(column::STATUS).map(AsArray::as_string::<i32>);
            for (status, first) in statuses.into_iter().flatten().zip(&first) {
                if let (Some(status), Some(false)) = (status, first)
                    && let Some(count) = counts.get_mut(status)
                {
                    *count -= 1;
                }
            }
            let rows = filter_record_batch(&rows, &first)
                .map_err(|source| Error::Rows { table: TableName::Latents.name(), source })?;
            job.context.block_on(shorter.stream(&rows))?;
        }
        Ok(job.context.block_on(shorter.close())?)
    }
}
