//! What an operator alerts on, as a text file: numbers of the last run of one pipeline, for the textfile collector of
//! [node-exporter](https://github.com/prometheus/node_exporter#textfile-collector), and for people.
//!
//! The file is valid `OpenMetrics` and valid Prometheus text, which differ: so all metrics are gauges (they speak of one run, nothing
//! counts up from run to run), no name ends as a counter's or a summary's parts do, and no sample has a time of its own. It is
//! written after every run, however that ended, beside its place and then renamed, so that a collector never reads half of it.
//!
//! A run that failed has numbers for what it got to know before that, and no others. The time of the last success is then that of the
//! file before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use chrono::{DateTime, Utc};

use crate::error::{Error, ExitStatus};
use crate::source::PartitionValues;
use crate::stages::StageReport;
use crate::stages::flag::FLAGGED;

/// Metric that a failed run takes over from the file before it.
const LAST_SUCCESS: &str = "lookalike_last_success_timestamp_seconds";

/// The numbers of one run, filled in as the run gets to know them.
#[derive(Debug, Clone, PartialEq)]
pub struct RunMetrics {
    /// The pipeline's name; `None` while its file has not been read.
    pub pipeline: Option<String>,
    /// When the run began.
    pub started: DateTime<Utc>,
    /// When the newest file of the source was written, of those that the run is about.
    pub newest_source: Option<DateTime<Utc>>,
    /// Rows of the source by status, whether this run embedded them or an earlier one.
    rows_by_status: Option<BTreeMap<String, u64>>,
    rows_embedded: Option<u64>,
    rows_flagged: Option<u64>,
    partitions_written: BTreeSet<PartitionValues>,
    stage_secs: BTreeMap<&'static str, f64>,
}

/// What the file before said.
#[derive(Debug, Default, PartialEq)]
struct Previous {
    pipeline: Option<String>,
    last_success: Option<f64>,
}

impl RunMetrics {
    /// The numbers of a run that begins now.
    pub fn start() -> Self {
        Self {
            pipeline: None,
            started: Utc::now(),
            newest_source: None,
            rows_by_status: None,
            rows_embedded: None,
            rows_flagged: None,
            partitions_written: BTreeSet::new(),
            stage_secs: BTreeMap::new(),
        }
    }

    /// Takes over what the embed stage did.
    pub fn embedded(&mut self, report: &StageReport) {
        let mut rows_by_status: BTreeMap<String, u64> = BTreeMap::new();
        for (status, rows) in report.partitions.values().flat_map(|partition| &partition.counts) {
            *rows_by_status.entry(status.clone()).or_default() += rows;
        }
        self.rows_by_status = Some(rows_by_status);
        self.rows_embedded = Some(report.rows_embedded);
        self.stage("embed", report);
    }

    /// Takes over what the neighbors stage did.
    pub fn joined(&mut self, report: &StageReport) {
        self.stage("neighbors", report);
    }

    /// Takes over what the groups stage did.
    pub fn grouped(&mut self, report: &StageReport) {
        self.stage("groups", report);
    }

    /// Takes over what the flag stage did.
    pub fn flagged(&mut self, report: &StageReport) {
        self.rows_flagged = Some(report.total(FLAGGED));
        self.stage("flag", report);
    }

    fn stage(&mut self, name: &'static str, report: &StageReport) {
        self.stage_secs.insert(name, report.secs);
        let written = report.partitions.iter().filter(|(_, partition)| partition.written);
        self.partitions_written.extend(written.map(|(values, _)| values.clone()));
    }

    /// Writes the file of a run that has just ended with `status`.
    pub fn write(&self, file: &Path, pipeline_file: Option<&Path>, status: ExitStatus) -> Result<(), Error> {
        let previous = std::fs::read_to_string(file).map(|text| Previous::read(&text)).unwrap_or_default();
        // Where the pipeline file cannot be read, its own name is not known; the file before has it, or the file's name will do.
        let stem = || pipeline_file.and_then(Path::file_stem).map(|stem| as_name(&stem.to_string_lossy()));
        let pipeline = self.pipeline.clone().or_else(|| previous.pipeline.clone()).or_else(stem).unwrap_or_default();
        let text = self.text(&pipeline, &previous, status, Utc::now());
        replace(file, &text)
            .map_err(|source| Error::Io { action: format!("write the metrics file {}", file.display()), source })
    }

    fn text(&self, pipeline: &str, previous: &Previous, status: ExitStatus, finished: DateTime<Utc>) -> String {
        let last_success = if status.is_success() {
            Some(seconds(finished))
        } else {
            // A file of another pipeline says nothing of this one.
            previous.last_success.filter(|_| previous.pipeline.as_deref() == Some(pipeline))
        };
        let rows = self.rows_by_status.as_ref();
        let mut text = Text { text: String::new(), pipeline: escape(pipeline) };
        text.family("lookalike_build_info", "", "Version of the program that ran.");
        text.sample("lookalike_build_info", Some(("version", env!("CARGO_PKG_VERSION"))), 1.0);
        text.gauge("lookalike_exit_code", "", "Exit code of the last run; 0 is success.", f64::from(status as u8));
        text.gauge("lookalike_start_timestamp_seconds", "seconds", "When the last run began.", seconds(self.started));
        text.gauge("lookalike_finish_timestamp_seconds", "seconds", "When the last run ended.", seconds(finished));
        text.gauge(LAST_SUCCESS, "seconds", "When the last successful run ended.", last_success);
        text.gauge(
            "lookalike_source_newest_timestamp_seconds",
            "seconds",
            "When the newest file of the source that the last run looked at was written.",
            self.newest_source.map(seconds),
        );
        text.gauge(
            "lookalike_source_lag_seconds",
            "seconds",
            "Age of the newest file of the source when the last run ended.",
            self.newest_source.map(|newest| (seconds(finished) - seconds(newest)).max(0.0)),
        );
        text.gauge(
            "lookalike_rows_in",
            "",
            "Rows of the source that the last run accounted for.",
            rows.map(|rows| rows.values().sum::<u64>() as f64),
        );
        if let Some(rows) = rows {
            let help = "Rows of the source by status: ok, or the code of what was wrong with the image.";
            text.family("lookalike_rows", "", help);
            for (status, rows) in rows {
                text.sample("lookalike_rows", Some(("status", status)), *rows as f64);
            }
        }
        text.gauge(
            "lookalike_rows_flagged",
            "",
            "Rows whose score is above the threshold.",
            self.rows_flagged.map(|rows| rows as f64),
        );
        text.gauge(
            "lookalike_rows_embedded",
            "",
            "Rows that the last run itself put through the model.",
            self.rows_embedded.map(|rows| rows as f64),
        );
        text.gauge(
            "lookalike_partitions_written",
            "",
            "Partitions of which the last run wrote rows, in any table.",
            self.partitions_written.len() as f64,
        );
        if !self.stage_secs.is_empty() {
            text.family("lookalike_stage_duration_seconds", "seconds", "Wall time of each stage of the last run.");
            for (stage, secs) in &self.stage_secs {
                text.sample("lookalike_stage_duration_seconds", Some(("stage", stage)), *secs);
            }
        }
        text.text.push_str("# EOF\n");
        text.text
    }
}

impl Previous {
    fn read(text: &str) -> Self {
        let prefix = format!("{LAST_SUCCESS}{{pipeline=\"");
        let labeled = text.lines().find_map(|line| line.split_once("{pipeline=\"")?.1.split_once('"'));
        let last_success = text.lines().find_map(|line| line.strip_prefix(&prefix)?.rsplit_once(' ')?.1.parse().ok());
        Self { pipeline: labeled.map(|(pipeline, _)| pipeline.to_owned()), last_success }
    }
}

/// The file's text as it grows.
struct Text {
    text: String,
    /// The pipeline's name, escaped.
    pipeline: String,
}

impl Text {
    /// Announces a metric. Its unit, if it has one, is the end of its name.
    fn family(&mut self, name: &str, unit: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# TYPE {name} gauge");
        if !unit.is_empty() {
            let _ = writeln!(self.text, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.text, "# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, label: Option<(&str, &str)>, value: f64) {
        let label = label.map(|(label, value)| format!(",{label}=\"{}\"", escape(value))).unwrap_or_default();
        let _ = writeln!(self.text, "{name}{{pipeline=\"{}\"{label}}} {value}", self.pipeline);
    }

    /// A metric of one sample; without a value it is left out.
    fn gauge(&mut self, name: &str, unit: &str, help: &str, value: impl Into<Option<f64>>) {
        if let Some(value) = value.into() {
            self.family(name, unit, help);
            self.sample(name, None, value);
        }
    }
}

/// A label's value as both formats write it.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The name that a pipeline may have which is nearest to `text`.
fn as_name(text: &str) -> String {
    let sign = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c.to_ascii_lowercase() } else { '_' };
    text.chars().map(sign).collect()
}

/// Seconds since 1970, to the millisecond.
fn seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_millis() as f64 / 1000.0
}

/// Replaces a file as a whole. The temporary file beside it has an ending that no collector reads.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = file.with_file_name(name);
    #[expect(clippy::disallowed_methods, reason = "a collector on this machine reads the file; no store has it")]
    let written = std::fs::File::create(&temporary)
        .and_then(|mut out| out.write_all(text.as_bytes()).and_then(|()| out.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, file));
    if written.is_err() {
        // The first error counts.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::PartitionReport;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    fn full() -> RunMetrics {
        let mut metrics = RunMetrics { started: at(1_000), newest_source: Some(at(900)), ..RunMetrics::start() };
        let counts = BTreeMap::from([("ok".to_owned(), 5), ("truncated_image".to_owned(), 2)]);
        let entry = PartitionReport { written: true, num_rows: 7, counts, ..PartitionReport::default() };
        let partitions = BTreeMap::from([(PartitionValues::default(), entry)]);
        metrics.embedded(&StageReport { partitions, rows_embedded: 7, secs: 1.5, ..StageReport::default() });
        metrics
    }

    #[test]
    fn a_run_that_succeeded_says_so_and_when() {
        let text = full().text("cells", &Previous::default(), ExitStatus::Success, at(1_010));
        for line in [
            "lookalike_exit_code{pipeline=\"cells\"} 0",
            "lookalike_last_success_timestamp_seconds{pipeline=\"cells\"} 1010",
            "lookalike_source_lag_seconds{pipeline=\"cells\"} 110",
            "lookalike_rows_in{pipeline=\"cells\"} 7",
            "lookalike_rows{pipeline=\"cells\",status=\"truncated_image\"} 2",
            "lookalike_partitions_written{pipeline=\"cells\"} 1",
            "lookalike_stage_duration_seconds{pipeline=\"cells\",stage=\"embed\"} 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        assert!(text.ends_with("\n# EOF\n"));
    }

    #[test]
    fn a_run_that_failed_keeps_the_last_success_of_its_own_pipeline_alone() {
        let before = full().text("cells", &Previous::default(), ExitStatus::Success, at(1_010));
        let previous = Previous::read(&before);
        assert_eq!(previous, Previous { pipeline: Some("cells".to_owned()), last_success: Some(1010.0) });
        let failed = RunMetrics { started: at(2_000), ..RunMetrics::start() };
        for status in [ExitStatus::Transient, ExitStatus::Rejects] {
            let text = failed.text("cells", &previous, status, at(2_001));
            assert!(text.contains("lookalike_last_success_timestamp_seconds{pipeline=\"cells\"} 1010\n"), "{text}");
            assert!(!text.contains("lookalike_rows"), "what is not known is not told: {text}");
            // Twice in a row, too.
            assert_eq!(Previous::read(&text), previous);
        }
        assert!(!failed.text("other", &previous, ExitStatus::Transient, at(2_001)).contains(LAST_SUCCESS));
        assert_eq!(Previous::read("no metrics"), Previous::default());
    }
}
