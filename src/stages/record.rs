//! The record of a run: one row of `runs` for each partition that changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray as _, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Schema, TimeUnit};
use chrono::{DateTime, Utc};

use super::flag::{FLAGGED, InUse};
use super::{Job, StageReport};
use crate::error::Error;
use crate::schema::{STATUS_OK, TableName, column, data_schema};
use crate::source::PartitionValues;

/// What all stages did.
#[derive(Debug)]
pub struct RunReport {
    /// When the run began.
    pub started: DateTime<Utc>,
    /// When its last stage ended.
    pub finished: DateTime<Utc>,
    /// The embed stage.
    pub embed: StageReport,
    /// The neighbors stage, if the pipeline has one.
    pub neighbors: Option<StageReport>,
    /// The flag stage.
    pub flag: StageReport,
    /// The reference that the flags refer to.
    pub reference: InUse,
}

impl RunReport {
    /// Rows that were read, by this run or an earlier attempt at it.
    pub fn rows_in(&self) -> u64 {
        self.embed.num_rows()
    }

    /// Rows that could not be scored, by code.
    pub fn rejects(&self) -> BTreeMap<String, u64> {
        let mut rejects = BTreeMap::new();
        for partition in self.embed.partitions.values() {
            for (status, rows) in partition.counts.iter().filter(|(status, _)| *status != STATUS_OK) {
                *rejects.entry(status.clone()).or_default() += rows;
            }
        }
        rejects
    }
}

/// Appends a row for each partition that this run changed, or that an earlier attempt changed and did not live to record. Returns
/// whether there was any.
pub fn record(job: &Job<'_>, report: &mut RunReport) -> Result<bool, Error> {
    let recorded = recorded(job)?;
    let written = |stage: &StageReport, partition: &PartitionValues| {
        stage.partitions.get(partition).is_some_and(|entry| entry.written)
    };
    let partitions: Vec<PartitionValues> = report
        .flag
        .partitions
        .iter()
        .filter(|(partition, entry)| {
            entry.written
                || written(&report.embed, partition)
                || report.neighbors.as_ref().is_some_and(|stage| written(stage, partition))
                || !recorded.contains(&entry.run_id)
        })
        .map(|(partition, _)| partition.clone())
        .collect();
    let Some(first) = partitions.first() else { return Ok(false) };
    for partition in &partitions {
        if let Some(entry) = report.flag.partitions.get_mut(partition).filter(|entry| !entry.written) {
            super::flag::count(job, partition, entry)?;
        }
    }
    let report = &*report;
    let partitions_of_rows: Vec<&PartitionValues> = partitions.iter().collect();
    let schema = data_schema(TableName::Runs, &Schema::empty());
    let columns = schema
        .fields()
        .iter()
        .map(|field| values(job, report, &partitions_of_rows, field.name(), field.data_type()))
        .collect::<Result<Vec<_>, _>>()?;
    let rows = RecordBatch::try_new(Arc::clone(&schema), columns)
        .map_err(|source| Error::Rows { table: TableName::Runs.name(), source })?;
    let run_id = &report.flag.partitions[first].run_id;
    let footer = job.footer(run_id)?;
    let append = async {
        let mut file = job.runs.create_file(&PartitionValues::default(), run_id, 0, schema, &footer).await?;
        file.write(&rows).await?;
        job.runs.append(&[file.close().await?]).await
    };
    job.context.block_on(append)?;
    Ok(true)
}

/// The run ids that `runs` has.
fn recorded(job: &Job<'_>) -> Result<BTreeSet<String>, Error> {
    let live = job.context.block_on(job.runs.live())?;
    let batches = job.context.block_on(job.runs.read(live.files, &[column::RUN_ID]))?;
    let ids = batches.iter().flat_map(|(_, batch)| batch.column(0).as_string::<i32>().iter().flatten());
    Ok(ids.map(str::to_owned).collect())
}

fn values(
    job: &Job<'_>,
    report: &RunReport,
    partitions: &[&PartitionValues],
    name: &str,
    data_type: &DataType,
) -> Result<ArrayRef, Error> {
    let text = |value: &dyn Fn(&PartitionValues) -> Option<String>| -> ArrayRef {
        Arc::new(partitions.iter().map(|partition| value(partition)).collect::<StringArray>())
    };
    let number = |value: &dyn Fn(&PartitionValues) -> u64| -> ArrayRef {
        Arc::new(partitions.iter().map(|partition| i64::try_from(value(partition)).ok()).collect::<Int64Array>())
    };
    let count = |stage: &StageReport, partition: &PartitionValues, name: &str| {
        stage.partitions.get(partition).and_then(|entry| entry.counts.get(name)).copied().unwrap_or(0)
    };
    let same_text = |value: String| -> ArrayRef { Arc::new(StringArray::from(vec![value; partitions.len()])) };
    let seconds = |value: f64| -> ArrayRef { Arc::new(Float64Array::from(vec![value; partitions.len()])) };
    let time = |value: DateTime<Utc>| -> ArrayRef {
        let times = TimestampMicrosecondArray::from(vec![value.timestamp_micros(); partitions.len()]);
        Arc::new(times.with_timezone("UTC"))
    };
    let run_id = |stage: &StageReport, partition: &PartitionValues| {
        stage.partitions.get(partition).map(|entry| entry.run_id.clone())
    };
    let rows_in =
        |partition: &PartitionValues| report.embed.partitions.get(partition).map_or(0, |entry| entry.num_rows);
    debug_assert!(!matches!(data_type, DataType::Timestamp(unit, _) if *unit != TimeUnit::Microsecond));
    Ok(match name {
        "run_id" => text(&|partition| run_id(&report.flag, partition)),
        "latents_run_id" => text(&|partition| run_id(&report.embed, partition).or(Some(String::new()))),
        "neighbors_run_id" => text(&|partition| report.neighbors.as_ref().and_then(|stage| run_id(stage, partition))),
        "pipeline" => same_text(job.pipeline.name.clone()),
        "partition" => text(&|partition| Some(partition.to_string()).filter(|name| !name.is_empty())),
        "started_at" => time(report.started),
        "finished_at" => time(report.finished),
        "rows_in" => number(&rows_in),
        "rows_ok" => number(&|partition| count(&report.embed, partition, STATUS_OK)),
        "rows_rejected" => number(&|partition| rows_in(partition) - count(&report.embed, partition, STATUS_OK)),
        "rejects" => text(&|partition| {
            let counts = report.embed.partitions.get(partition).map(|entry| entry.counts.clone()).unwrap_or_default();
            let rejects: BTreeMap<_, _> = counts.into_iter().filter(|(status, _)| status != STATUS_OK).collect();
            serde_json::to_string(&rejects).ok()
        }),
        "rows_flagged" => number(&|partition| count(&report.flag, partition, FLAGGED)),
        "embed_secs" => seconds(report.embed.secs),
        "neighbors_secs" => seconds(report.neighbors.as_ref().map_or(0.0, |stage| stage.secs)),
        "flag_secs" => seconds(report.flag.secs),
        "source_url" => same_text(job.source.url().to_string()),
        "model_package" => same_text(job.pipeline.require_model()?.package.to_string()),
        "model_sha256" => same_text(job.model_sha256.clone()),
        "reference_id" => same_text(report.reference.reference.id.clone()),
        "settings" => same_text(job.pipeline.settings_json().to_string()),
        "provider" => same_text(job.provider()?.name().to_owned()),
        "onnxruntime_version" => {
            same_text(job.loaded_model().map(|model| model.runtime.version.clone()).unwrap_or_default())
        }
        "lookalike_version" => same_text(env!("CARGO_PKG_VERSION").to_owned()),
        other => {
            return Err(Error::Rows {
                table: TableName::Runs.name(),
                source: arrow::error::ArrowError::SchemaError(format!("no value for the column `{other}`")),
            });
        }
    })
}
