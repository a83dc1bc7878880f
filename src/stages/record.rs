//! The record of a run: one row of `runs` for each partition that changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array as _, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray,
    StructArray, TimestampMicrosecondArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Schema, TimestampMicrosecondType};
use chrono::{DateTime, Utc};

use super::drift::drift;
use super::flag::{FLAGGED, ReferenceInUse};
use super::{Job, PartitionReport, StageReport};
use crate::drift::Check;
use crate::error::Error;
use crate::schema::{STATUS_OK, TableName, column, data_schema, drift_fields};
use crate::source::PartitionValues;
use crate::table::{Live, Published, TableError};

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
    /// The groups stage, if the pipeline has one.
    pub groups: Option<StageReport>,
    /// The flag stage, if the pipeline has one.
    pub flag: Option<StageReport>,
    /// The reference that the flags refer to.
    pub reference: Option<ReferenceInUse>,
    /// The checks of each partition that was compared with the reference.
    pub drift: BTreeMap<PartitionValues, Vec<Check>>,
    /// The version of ONNX Runtime that has embedded, if anything was embedded.
    pub onnxruntime_version: Option<String>,
}

impl RunReport {
    /// The run ids of a partition; `live` are the latents that are live, for a partition that this run did not look at.
    fn run_ids(&self, partition: &PartitionValues, live: &Live) -> RunIds {
        let of = |stage: &StageReport| stage.partitions.get(partition).map(|entry| entry.run_id.clone());
        RunIds {
            latents: of(&self.embed).or_else(|| live.run_of(partition).map(str::to_owned)).unwrap_or_default(),
            neighbors: self.neighbors.as_ref().and_then(of),
            groups: self.groups.as_ref().and_then(of),
            flags: self.flag.as_ref().and_then(of),
        }
    }

    /// The partitions that this run speaks of: all whose latents are of the pipeline's model, whether it embedded them or not.
    fn partitions(&self, job: &Job<'_>) -> Result<Vec<PartitionValues>, Error> {
        match self.flag.as_ref().or(self.neighbors.as_ref()) {
            Some(stage) => Ok(stage.partitions.keys().cloned().collect()),
            None => Ok(job.comparable_latents()?.partitions()),
        }
    }

    /// Whether this run changed a table.
    pub fn any_written(&self) -> bool {
        let stages = [Some(&self.embed), self.neighbors.as_ref(), self.groups.as_ref(), self.flag.as_ref()];
        stages.into_iter().flatten().any(StageReport::any_written)
    }

    /// The partitions that have drifted, and the checks that say so.
    pub fn drifted(&self) -> BTreeMap<&PartitionValues, Vec<&Check>> {
        let mut drifted: BTreeMap<&PartitionValues, Vec<&Check>> = BTreeMap::new();
        for (partition, checks) in &self.drift {
            for check in checks.iter().filter(|check| check.is_anomaly) {
                drifted.entry(partition).or_default().push(check);
            }
        }
        drifted
    }

    /// Rows that were read, by this run or an earlier attempt at it.
    pub fn rows_in(&self) -> u64 {
        self.embed.num_rows()
    }

    /// Rows of the source that were dropped because an earlier one had their id.
    pub fn rows_duplicate(&self) -> u64 {
        self.embed.partitions.values().map(|partition| partition.num_duplicates).sum()
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

/// Attempts at appending to `runs` before giving up; each lost one means that another run was recorded.
const ATTEMPTS: u32 = 50;

/// Appends a row for each partition whose newest row in `runs` speaks of other rows than are live now: this run changed them, or an
/// earlier attempt did and was not there to record it. Returns whether there was any.
pub fn record(job: &Job<'_>, report: &mut RunReport) -> Result<bool, Error> {
    for _ in 0..ATTEMPTS {
        let seen = job.context.block_on(job.runs.live())?;
        let recorded = recorded(job, &seen)?;
        let live = LiveRuns::read(job)?;
        let mut partitions = report.partitions(job)?;
        partitions.retain(|partition| {
            let run_ids = report.run_ids(partition, &live.latents);
            recorded.get(&partition_text(partition)) != Some(&run_ids) && live.are(partition, &run_ids)
        });
        let Some(first) = partitions.first() else { return Ok(false) };
        let first_run_id = report.run_ids(first, &live.latents).newest();
        if let (Some(settings), Some(reference)) = (&job.pipeline.drift, &report.reference) {
            let is_new = |partition: &&PartitionValues| !report.drift.contains_key(*partition);
            let new: Vec<PartitionValues> = partitions.iter().filter(is_new).cloned().collect();
            let found = drift(job, settings, &new, reference)?;
            report.drift.extend(found);
        }
        // Partitions that the source did not have this time may change too: neighbors come and go.
        let mut embed = report.embed.partitions.clone();
        for partition in &partitions {
            if !embed.contains_key(partition) {
                embed.insert(partition.clone(), super::embed::count(job, partition)?);
            }
        }
        let schema = data_schema(TableName::Runs, &Schema::empty());
        let columns = schema
            .fields()
            .iter()
            .map(|field| values(job, report, &embed, &partitions, field.name()))
            .collect::<Result<Vec<_>, _>>()?;
        let rows = RecordBatch::try_new(Arc::clone(&schema), columns)
            .map_err(|source| Error::Rows { table: TableName::Runs.name(), source })?;
        let run_id = first_run_id;
        let footer = job.footer(&run_id)?;
        let append = async {
            let mut file = job.runs.create_file(&PartitionValues::default(), &run_id, 0, schema, &footer).await?;
            file.write(&rows).await?;
            job.runs.append_to(&seen, &[file.close().await?]).await
        };
        if job.context.block_on(append)? != Published::Unchanged {
            return Ok(true);
        }
    }
    Err(TableError::Contention { table: job.runs.store().url().to_string(), partition: "a row".to_owned() }.into())
}

/// What the tables hold when a run is about to be recorded.
struct LiveRuns {
    latents: Live,
    neighbors: Live,
    groups: Live,
    anomalies: Live,
}

impl LiveRuns {
    fn read(job: &Job<'_>) -> Result<Self, Error> {
        Ok(Self {
            latents: job.context.block_on(job.latents.live())?,
            neighbors: job.context.block_on(job.neighbors.live())?,
            groups: job.context.block_on(job.groups.live())?,
            anomalies: job.context.block_on(job.anomalies.live())?,
        })
    }

    /// Whether a partition's rows are of these runs. If another process has replaced them meanwhile, it is the one that records.
    fn are(&self, partition: &PartitionValues, run_ids: &RunIds) -> bool {
        let is_live = |live: &Live, run_id: Option<&str>| {
            run_id.is_none_or(|run_id| live.run_of(partition).is_none_or(|found| found == run_id))
        };
        is_live(&self.latents, Some(&run_ids.latents))
            && is_live(&self.neighbors, run_ids.neighbors.as_deref())
            && is_live(&self.groups, run_ids.groups.as_deref())
            && is_live(&self.anomalies, run_ids.flags.as_deref())
    }
}

/// The run ids of a partition's rows in each table; `None` where the pipeline has no such stage.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RunIds {
    latents: String,
    neighbors: Option<String>,
    groups: Option<String>,
    flags: Option<String>,
}

impl RunIds {
    /// That of the last stage.
    fn newest(self) -> String {
        self.flags.or(self.groups).or(self.neighbors).unwrap_or(self.latents)
    }
}

/// The run ids that the newest row of each partition names.
fn recorded(job: &Job<'_>, seen: &Live) -> Result<BTreeMap<Option<String>, RunIds>, Error> {
    let columns = ["partition", column::RUN_ID, "latents_run_id", "neighbors_run_id", "groups_run_id", "finished_at"];
    let batches = job.context.block_on(job.runs.read(seen.files.clone(), &columns))?;
    let mut newest: BTreeMap<Option<String>, (i64, RunIds)> = BTreeMap::new();
    for (_, batch) in &batches {
        let text = |name: &str, row: usize| {
            let values = batch.column_by_name(name)?.as_string::<i32>();
            values.is_valid(row).then(|| values.value(row).to_owned())
        };
        let times = batch.column_by_name("finished_at").map(AsArray::as_primitive::<TimestampMicrosecondType>);
        for row in 0..batch.num_rows() {
            let time = times.map_or(0, |times| times.value(row));
            let run_ids = RunIds {
                latents: text("latents_run_id", row).unwrap_or_default(),
                neighbors: text("neighbors_run_id", row),
                groups: text("groups_run_id", row),
                flags: text(column::RUN_ID, row),
            };
            let entry = newest.entry(text("partition", row)).or_insert_with(|| (time, run_ids.clone()));
            if time >= entry.0 {
                *entry = (time, run_ids);
            }
        }
    }
    Ok(newest.into_iter().map(|(partition, (_, run_ids))| (partition, run_ids)).collect())
}

/// The checks of each partition; null where it was not compared.
fn drift_column<'a>(partitions: impl Iterator<Item = Option<&'a [Check]>>) -> ArrayRef {
    let partitions: Vec<Option<&[Check]>> = partitions.collect();
    let checks: Vec<&Check> = partitions.iter().copied().flatten().flatten().collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(checks.iter().map(|check| &check.input))),
        Arc::new(StringArray::from_iter_values(checks.iter().map(|check| check.metric.name()))),
        Arc::new(Float64Array::from_iter_values(checks.iter().map(|check| check.threshold))),
        Arc::new(checks.iter().map(|check| check.value).collect::<Float64Array>()),
        Arc::new(checks.iter().map(|check| check.p_value).collect::<Float64Array>()),
        Arc::new(checks.iter().map(|check| i64::try_from(check.num_rows).ok()).collect::<Int64Array>()),
        Arc::new(checks.iter().map(|check| Some(check.is_anomaly)).collect::<BooleanArray>()),
    ];
    let fields = drift_fields();
    let element = Field::new("element", DataType::Struct(fields.clone()), false);
    let lengths = OffsetBuffer::from_lengths(partitions.iter().map(|checks| checks.map_or(0, <[_]>::len)));
    let nulls: NullBuffer = partitions.iter().map(Option::is_some).collect();
    Arc::new(ListArray::new(element.into(), lengths, Arc::new(StructArray::new(fields, columns, None)), Some(nulls)))
}

/// A partition as `runs` has it: null for a table without partitions.
fn partition_text(partition: &PartitionValues) -> Option<String> {
    (!partition.is_empty()).then(|| partition.to_string())
}

fn values(
    job: &Job<'_>,
    report: &RunReport,
    embed: &BTreeMap<PartitionValues, PartitionReport>,
    partitions: &[PartitionValues],
    name: &str,
) -> Result<ArrayRef, Error> {
    let text = |value: &dyn Fn(&PartitionValues) -> Option<String>| -> ArrayRef {
        Arc::new(partitions.iter().map(value).collect::<StringArray>())
    };
    let number = |value: &dyn Fn(&PartitionValues) -> u64| -> ArrayRef {
        Arc::new(partitions.iter().map(|partition| i64::try_from(value(partition)).ok()).collect::<Int64Array>())
    };
    let count = |stage: &BTreeMap<PartitionValues, PartitionReport>, partition: &PartitionValues, name: &str| {
        stage.get(partition).and_then(|entry| entry.counts.get(name)).copied().unwrap_or(0)
    };
    let same_text = |value: String| -> ArrayRef { Arc::new(StringArray::from(vec![value; partitions.len()])) };
    let seconds = |value: f64| -> ArrayRef { Arc::new(Float64Array::from(vec![value; partitions.len()])) };
    let quality = report.neighbors.as_ref().and_then(|stage| stage.found).map(|found| found.quality);
    let same_number = |value: Option<usize>| -> ArrayRef {
        let value = value.and_then(|value| i64::try_from(value).ok());
        Arc::new(Int64Array::from(vec![value; partitions.len()]))
    };
    let time = |value: DateTime<Utc>| -> ArrayRef {
        let times = TimestampMicrosecondArray::from(vec![value.timestamp_micros(); partitions.len()]);
        Arc::new(times.with_timezone("UTC"))
    };
    let run_id = |stage: &StageReport, partition: &PartitionValues| {
        stage.partitions.get(partition).map(|entry| entry.run_id.clone())
    };
    let rows_in = |partition: &PartitionValues| embed.get(partition).map_or(0, |entry| entry.num_rows);
    Ok(match name {
        "run_id" => text(&|partition| report.flag.as_ref().and_then(|stage| run_id(stage, partition))),
        "latents_run_id" => text(&|partition| embed.get(partition).map(|entry| entry.run_id.clone())),
        "neighbors_run_id" => text(&|partition| report.neighbors.as_ref().and_then(|stage| run_id(stage, partition))),
        "groups_run_id" => text(&|partition| report.groups.as_ref().and_then(|stage| run_id(stage, partition))),
        "pipeline" => same_text(job.pipeline.name.clone()),
        "partition" => text(&partition_text),
        "started_at" => time(report.started),
        "finished_at" => time(report.finished),
        "rows_in" => number(&rows_in),
        "rows_ok" => number(&|partition| count(embed, partition, STATUS_OK)),
        "rows_rejected" => number(&|partition| rows_in(partition) - count(embed, partition, STATUS_OK)),
        "rows_duplicate" => number(&|partition| embed.get(partition).map_or(0, |entry| entry.num_duplicates)),
        "rejects" => text(&|partition| {
            let counts = embed.get(partition).map(|entry| entry.counts.clone()).unwrap_or_default();
            let rejects: BTreeMap<_, _> = counts.into_iter().filter(|(status, _)| status != STATUS_OK).collect();
            serde_json::to_string(&rejects).ok()
        }),
        "rows_flagged" => match &report.flag {
            Some(stage) => number(&|partition| count(&stage.partitions, partition, FLAGGED)),
            None => Arc::new(Int64Array::new_null(partitions.len())),
        },
        "drift" => drift_column(partitions.iter().map(|partition| report.drift.get(partition).map(Vec::as_slice))),
        "embed_secs" => seconds(report.embed.secs),
        "neighbors_secs" => seconds(report.neighbors.as_ref().map_or(0.0, |stage| stage.secs)),
        "flag_secs" => seconds(report.flag.as_ref().map_or(0.0, |stage| stage.secs)),
        "neighbors_search" => {
            let search = quality.map(|quality| quality.search());
            Arc::new(StringArray::from(vec![search; partitions.len()]))
        }
        "neighbors_cells" => same_number(quality.and_then(|quality| Some(quality.cells?.0))),
        "neighbors_nprobe" => same_number(quality.and_then(|quality| Some(quality.cells?.1))),
        "neighbors_recall" => {
            Arc::new(Float64Array::from(vec![quality.map(|quality| quality.recall); partitions.len()]))
        }
        "source_url" => same_text(job.source.url().to_string()),
        "source_version" => {
            let version = job.source.version.and_then(|version| i64::try_from(version).ok());
            Arc::new(Int64Array::from(vec![version; partitions.len()]))
        }
        "model_package" => same_text(job.pipeline.require_model()?.package.to_string()),
        "model_sha256" => same_text(job.model_sha256.clone()),
        "reference_id" => text(&|_| report.reference.as_ref().map(|reference| reference.id.clone())),
        "settings" => same_text(job.pipeline.settings_json().to_string()),
        "provider" => same_text(job.provider()?.name().to_owned()),
        "onnxruntime_version" => same_text(report.onnxruntime_version.clone().unwrap_or_default()),
        "lookalike_version" => same_text(env!("CARGO_PKG_VERSION").to_owned()),
        other => {
            return Err(Error::Rows {
                table: TableName::Runs.name(),
                source: arrow::error::ArrowError::SchemaError(format!("no value for the column `{other}`")),
            });
        }
    })
}
