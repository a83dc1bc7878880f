//! What `runs` says: which partitions the last run changed, what it took, what it was made with, and what earlier runs found.

use std::collections::{BTreeMap, BTreeSet};

use arrow::array::{Array as _, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{Float64Type, Int64Type, TimestampMicrosecondType};
use chrono::{DateTime, SecondsFormat, Utc};

use super::data::{DriftCheck, HistoryRow};
use super::shown;
use crate::error::Error;
use crate::schema::{TableName, data_schema};
use crate::source::PartitionValues;
use crate::stages::Job;

/// A row of `runs`.
#[derive(Debug, Clone)]
pub(super) struct RunRow {
    /// As the table has it; empty in one without partitions.
    pub(super) partition: String,
    pub(super) started_at: DateTime<Utc>,
    pub(super) finished_at: DateTime<Utc>,
    numbers: BTreeMap<String, i64>,
    seconds: BTreeMap<String, f64>,
    texts: BTreeMap<String, String>,
    /// The checks; `None` where nothing was compared.
    pub(super) drift: Option<Vec<DriftCheck>>,
}

impl RunRow {
    /// A column of whole numbers.
    pub(super) fn number(&self, column: &str) -> Option<u64> {
        self.numbers.get(column).and_then(|number| u64::try_from(*number).ok())
    }

    /// A column of floats.
    pub(super) fn float(&self, column: &str) -> Option<f64> {
        self.seconds.get(column).copied()
    }

    /// A column of texts.
    pub(super) fn text(&self, column: &str) -> Option<String> {
        self.texts.get(column).cloned()
    }

    /// The checks that found drift.
    fn drifted(&self) -> Option<u64> {
        self.drift.as_ref().map(|checks| checks.iter().filter(|check| check.is_anomaly).count() as u64)
    }

    pub(super) fn history(&self) -> HistoryRow {
        HistoryRow {
            partition: self.partition.clone(),
            finished_at: rfc3339(self.finished_at),
            rows_in: self.number("rows_in").unwrap_or_default(),
            rows_rejected: self.number("rows_rejected").unwrap_or_default(),
            rows_flagged: self.number("rows_flagged"),
            drifted_checks: self.drifted(),
            model_sha256: self.text("model_sha256").unwrap_or_default(),
        }
    }
}

/// A time as a report has it.
pub(super) fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// What the pipeline's runs have recorded, oldest first.
pub(super) fn read(job: &Job<'_>) -> Result<Vec<RunRow>, Error> {
    let schema = data_schema(TableName::Runs, &arrow::datatypes::Schema::empty());
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let live = job.context.block_on(job.runs.live())?;
    let mut rows = Vec::new();
    for (_, batch) in job.context.block_on(job.runs.read(live.files, &names))? {
        rows.extend((0..batch.num_rows()).map(|row| run_row(&batch, row)));
    }
    rows.retain(|row| row.texts.get("pipeline") == Some(&job.pipeline.name));
    rows.sort_by(|a, b| (a.finished_at, &a.partition).cmp(&(b.finished_at, &b.partition)));
    Ok(rows)
}

fn run_row(batch: &RecordBatch, row: usize) -> RunRow {
    let (mut numbers, mut seconds, mut texts) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (field, values) in
        batch.schema().fields().iter().zip(batch.columns()).filter(|(_, values)| values.is_valid(row))
    {
        let name = field.name().clone();
        if let Some(values) = values.as_primitive_opt::<Int64Type>() {
            numbers.insert(name, values.value(row));
        } else if let Some(values) = values.as_primitive_opt::<Float64Type>() {
            seconds.insert(name, values.value(row));
        } else if let Some(values) = values.as_string_opt::<i32>() {
            texts.insert(name, shown(values.value(row)));
        }
    }
    let time = |name: &str| {
        let values =
            batch.column_by_name(name).and_then(|values| values.as_primitive_opt::<TimestampMicrosecondType>());
        values.and_then(|values| DateTime::from_timestamp_micros(values.value(row))).unwrap_or_default()
    };
    let partition = texts.get("partition").cloned().unwrap_or_default();
    let lists = batch.column_by_name("drift").and_then(|values| values.as_list_opt::<i32>());
    let checks = lists.filter(|lists| lists.is_valid(row)).map(|lists| lists.value(row));
    let drift =
        checks.map(|checks| checks.as_struct_opt().map(|checks| drift_checks(checks, &partition)).unwrap_or_default());
    RunRow {
        started_at: time("started_at"),
        finished_at: time("finished_at"),
        partition,
        numbers,
        seconds,
        texts,
        drift,
    }
}

fn drift_checks(checks: &StructArray, partition: &str) -> Vec<DriftCheck> {
    let text = |name: &str, row: usize| {
        let values = checks.column_by_name(name).and_then(|values| values.as_string_opt::<i32>());
        values.map(|values| values.value(row).to_owned()).unwrap_or_default()
    };
    let float = |name: &str, row: usize| {
        let values = checks.column_by_name(name)?.as_primitive_opt::<Float64Type>()?;
        values.is_valid(row).then(|| values.value(row))
    };
    let check = |row: usize| {
        let rows = checks.column_by_name("rows").and_then(|values| values.as_primitive_opt::<Int64Type>());
        let is_anomaly = checks.column_by_name("is_anomaly").and_then(|values| values.as_boolean_opt());
        DriftCheck {
            partition: partition.to_owned(),
            input: text("input", row),
            metric: text("metric", row),
            value: float("value", row),
            threshold: float("threshold", row).unwrap_or_default(),
            p_value: float("p_value", row),
            rows: rows.and_then(|rows| u64::try_from(rows.value(row)).ok()).unwrap_or_default(),
            is_anomaly: is_anomaly.is_some_and(|values| values.value(row)),
        }
    };
    (0..checks.len()).map(check).collect()
}

/// The newest row of each of the partitions that a report speaks of: those that are chosen, or else those that the last run changed.
pub(super) fn newest(rows: &[RunRow], chosen: Option<&[PartitionValues]>) -> Vec<RunRow> {
    let last = rows.last().map(|row| row.finished_at);
    let chosen: Option<BTreeSet<String>> = chosen.map(|chosen| chosen.iter().map(ToString::to_string).collect());
    let mut newest: BTreeMap<&str, &RunRow> = BTreeMap::new();
    for row in rows {
        newest.insert(&row.partition, row);
    }
    let is_wanted = |row: &&RunRow| match &chosen {
        Some(chosen) => chosen.contains(&row.partition),
        None => Some(row.finished_at) == last,
    };
    // A partition that has left the source has nothing more to show.
    let is_there = |row: &&RunRow| row.texts.get("latents_run_id").is_some_and(|run_id| !run_id.is_empty());
    newest.into_values().filter(is_wanted).filter(is_there).cloned().collect()
}

/// The rows of the last `num_runs` runs.
pub(super) fn history(rows: &[RunRow], num_runs: usize) -> Vec<HistoryRow> {
    let ends: BTreeSet<DateTime<Utc>> = rows.iter().map(|row| row.finished_at).collect();
    let from = ends.iter().rev().take(num_runs).next_back().copied().unwrap_or_default();
    rows.iter().filter(|row| row.finished_at >= from).map(RunRow::history).collect()
}
