//! The embed stage: images → `latents`.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use arrow::array::{Array as _, AsArray as _};

use super::{Job, PartitionReport, StageReport};
use crate::context::Progress;
use crate::error::Error;
use crate::schema::{TableName, column, data_schema};
use crate::source::{PartitionValues, SourcePartition, WorkUnit};
use crate::table::{DataFile, Live, Published, Receipt, Receipts, TableError, sum_by_status};

/// Ids named in the error about ids that occur twice.
const EXAMPLES_NAMED: usize = 5;

/// Embeds and publishes every partition whose rows are not live yet, one after the other.
pub fn embed(job: &Job<'_>) -> Result<StageReport, Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    let num_rows = job.source.partitions.iter().map(|partition| partition.num_rows).sum();
    let progress = job.context.progress("embed", num_rows);
    let live = job.context.block_on(job.latents.live())?;
    for partition in &job.source.partitions {
        let done = embed_partition(job, partition, &live, &progress)?;
        report.partitions.insert(partition.values.clone(), done);
    }
    progress.finish();
    report.secs = started.elapsed().as_secs_f64();
    Ok(report)
}

fn embed_partition(
    job: &Job<'_>,
    partition: &SourcePartition,
    live: &Live,
    progress: &Progress,
) -> Result<PartitionReport, Error> {
    let run_id = job.latents_run_id(partition)?;
    let receipts = Receipts::new(&job.output, TableName::Latents, &run_id);
    let mut done = job.context.block_on(receipts.read())?;
    let mut written = false;
    if live.run_of(&partition.values) == Some(run_id.as_str()) {
        progress.advance(partition.num_rows, 0);
    } else {
        for unit in &partition.units {
            if let Some(receipt) = done.get(&unit.index) {
                if job.context.block_on(job.latents.is_there(&receipt.file))? {
                    progress.advance(unit.num_rows, 0);
                    continue;
                }
                job.context.block_on(receipts.take_back(receipt))?;
            }
            let receipt = embed_unit(job, partition, unit, &run_id, progress)?;
            let receipt = job.context.block_on(receipts.hand_in(receipt))?;
            done.insert(unit.index, receipt);
        }
        written = publish(job, partition, &run_id, &done)? != Published::Unchanged;
    }
    let counts = sum_by_status(done.values());
    Ok(PartitionReport { run_id, written, num_rows: counts.values().sum(), counts })
}

fn embed_unit(
    job: &Job<'_>,
    partition: &SourcePartition,
    unit: &WorkUnit,
    run_id: &str,
    progress: &Progress,
) -> Result<Receipt, Error> {
    let model = job.model()?;
    let context = job.context;
    let schema = data_schema(TableName::Latents, &job.source.kept_schema);
    let footer = job.footer(run_id)?;
    let mut file = context.block_on(job.latents.create_file(
        &partition.values,
        run_id,
        unit.index,
        std::sync::Arc::clone(&schema),
        &footer,
    ))?;
    let mut rows_by_status: BTreeMap<String, u64> = BTreeMap::new();
    job.pass().score_unit(partition, unit, model, |batch| {
        let rows = batch
            .to_record_batch(&schema, run_id, &job.model_sha256)
            .map_err(|source| Error::Rows { table: TableName::Latents.name(), source })?;
        context.block_on(file.write(&rows))?;
        let mut rejected = 0;
        for status in batch.statuses() {
            *rows_by_status.entry(status.to_owned()).or_default() += 1;
            rejected += u64::from(status != crate::schema::STATUS_OK);
        }
        progress.advance(batch.num_rows() as u64, rejected);
        Ok(())
    })?;
    let file = context.block_on(file.close())?;
    Ok(Receipt { unit: unit.index, file, rows_by_status })
}

/// The run id and the rows by status of a partition that this run did not look at.
pub fn count(job: &Job<'_>, partition: &PartitionValues) -> Result<PartitionReport, Error> {
    let live = job.context.block_on(job.latents.live())?;
    let run_id = live.run_of(partition).unwrap_or_default().to_owned();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let files = live.of(partition).cloned().collect();
    for (_, batch) in job.context.block_on(job.latents.read(files, &[column::STATUS]))? {
        for status in batch.column(0).as_string::<i32>().iter().flatten() {
            *counts.entry(status.to_owned()).or_default() += 1;
        }
    }
    Ok(PartitionReport { run_id, written: false, num_rows: counts.values().sum(), counts })
}

/// Checks that every row that was read is there exactly once, and makes the files the partition's content.
fn publish(
    job: &Job<'_>,
    partition: &SourcePartition,
    run_id: &str,
    done: &BTreeMap<usize, Receipt>,
) -> Result<Published, Error> {
    let files: Vec<DataFile> =
        done.values().map(|receipt| receipt.file.clone()).filter(|file| file.num_rows > 0).collect();
    let written: u64 = files.iter().map(|file| file.num_rows).sum();
    // With a predicate, only reading tells how many rows there are; without one, the footers say it.
    let expected = match job.pipeline.source.predicate {
        Some(_) => sum_by_status(done.values()).values().sum(),
        None => partition.num_rows,
    };
    if written != expected {
        return Err(TableError::RowCount {
            table: job.latents.store().url().to_string(),
            partition: partition.values.to_string(),
            found: written,
            expected,
        }
        .into());
    }
    check_ids(job, partition, &files)?;
    Ok(job.context.block_on(job.latents.replace_partition(&partition.values, run_id, &files))?)
}

/// Reads the ids back from the data files and refuses duplicates. Holds the ids of one partition.
fn check_ids(job: &Job<'_>, partition: &SourcePartition, files: &[DataFile]) -> Result<(), Error> {
    let files = files.iter().map(|file| job.latents.as_live(&partition.values, file)).collect::<Result<_, _>>()?;
    let batches = job.context.block_on(job.latents.read(files, &[column::IMAGE_ID]))?;
    let mut seen = HashSet::new();
    let mut twice = HashSet::new();
    for (_, batch) in &batches {
        let ids = batch.column(0).as_string::<i32>();
        for id in (0..ids.len()).map(|row| ids.value(row)) {
            if !seen.insert(id) {
                twice.insert(id);
            }
        }
    }
    if twice.is_empty() {
        return Ok(());
    }
    let mut examples: Vec<&str> = twice.iter().copied().collect();
    examples.sort_unstable();
    examples.truncate(EXAMPLES_NAMED);
    Err(TableError::DuplicateIds {
        partition: partition.values.name(),
        count: twice.len(),
        examples: examples.join(", "),
    }
    .into())
}
