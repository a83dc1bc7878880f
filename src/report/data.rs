//! What a report says, as its JSON has it. The page shows the same and nothing else.
//!
//! Numbers are those of the tables. Lists are bounded, so that a report of a billion rows is not larger than one of a thousand; what is
//! left out is counted, or named in [`Report::left_out`].

use serde::Serialize;

/// Raised whenever a field changes its meaning or goes away.
pub(super) const VERSION: u32 = 1;

/// A report.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Version of this form.
    pub version: u32,
    /// Name of the pipeline.
    pub pipeline: String,
    /// `images`, or `features`, of which there are no pictures.
    pub kind: &'static str,
    /// When the report was made. Times are UTC, as RFC 3339 has them.
    pub generated_at: String,
    /// When the run that it speaks of began.
    pub started_at: String,
    /// When that run ended.
    pub finished_at: String,
    /// What there is to know first.
    pub answer: Answer,
    /// How images were judged; `None` where the pipeline has no anomaly stage.
    pub anomaly: Option<AnomalyRule>,
    /// The images of highest score, strangest first.
    pub strangest: Vec<Strange>,
    /// The groups of most images, largest first.
    pub groups: Vec<Group>,
    /// How the scores are distributed.
    pub scores: Option<Histogram>,
    /// The latent space in two dimensions.
    pub map: Option<Map>,
    /// What was compared with the reference as a whole, drifted first.
    pub drift: Vec<DriftCheck>,
    /// Rows that could not be used, most frequent cause first.
    pub rejects: Vec<Rejected>,
    /// The stages of the run.
    pub timings: Vec<Timing>,
    /// The partitions that the report speaks of.
    pub partitions: Vec<PartitionRow>,
    /// What earlier runs found, oldest first.
    pub history: Vec<HistoryRow>,
    /// What made the rows: model, versions, settings.
    pub lineage: Vec<Named>,
    /// What was left out, in words.
    pub left_out: Vec<String>,
}

/// What there is to know first.
#[derive(Debug, Default, Serialize)]
pub struct Answer {
    /// Rows of the partitions.
    pub rows_in: u64,
    /// Rows with a vector.
    pub rows_ok: u64,
    /// Rows without.
    pub rows_rejected: u64,
    /// Rows that are flagged; `None`: nothing was judged.
    pub rows_flagged: Option<u64>,
    /// Groups of more than one image; `None`: there is no groups stage.
    pub groups: Option<u64>,
    /// Images that another one represents.
    pub duplicates: Option<u64>,
    /// Their compressed bytes.
    pub duplicate_bytes: Option<u64>,
    /// Checks that say that a partition is not like the reference; `None`: nothing was compared.
    pub drifted_checks: Option<u64>,
    /// Partitions with such a check.
    pub drifted_partitions: Option<u64>,
    /// Partitions that the report speaks of.
    pub partitions: u64,
}

/// How images were judged.
#[derive(Debug, Serialize)]
pub struct AnomalyRule {
    /// The score that decides.
    pub rule: String,
    /// How its threshold is found, as the pipeline file says it.
    pub threshold: String,
    /// What rows are compared with.
    pub reference: ReferenceOf,
}

/// What rows are compared with.
#[derive(Debug, Serialize)]
pub struct ReferenceOf {
    /// `reference_id` of the rows.
    pub id: String,
    /// Where it lies; `None`: the rows themselves are the reference.
    pub url: Option<String>,
    /// Rows whose scores are compared with; `None`: the rows themselves.
    pub rows: Option<u64>,
}

/// An image of high score.
#[derive(Debug, Serialize)]
pub struct Strange {
    /// The image.
    pub image_id: String,
    /// Its partition, as `key=value` pairs joined by slashes.
    pub partition: String,
    /// `anomaly_score`.
    pub score: f64,
    /// `severity_percentile`.
    pub percentile: Option<f64>,
    /// `p_value`.
    pub p_value: Option<f64>,
    /// `is_anomaly`.
    pub is_anomaly: bool,
    /// `reasons`.
    pub reasons: Vec<String>,
    /// The kept columns of the source, as text.
    pub columns: serde_json::Map<String, serde_json::Value>,
    /// What it looks like.
    pub pictures: Panels,
    /// The error at the bright end of the error map.
    pub largest_error: Option<f64>,
}

/// The pictures of an image; `None` where there is none, or no room for it.
#[derive(Debug, Default, Serialize)]
pub struct Panels {
    /// The image.
    pub image: Option<Encoded>,
    /// As the model sees it.
    pub input: Option<Encoded>,
    /// What the model makes of it.
    pub reconstruction: Option<Encoded>,
    /// Where these differ.
    pub error_map: Option<Encoded>,
}

/// A picture within the report.
#[derive(Debug, Clone, Serialize)]
pub struct Encoded {
    /// Pixels of a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// A `data:` URL.
    pub data: String,
}

/// A group of near-duplicates.
#[derive(Debug, Serialize)]
pub struct Group {
    /// `group_id`.
    #[serde(rename = "group_id")]
    pub id: String,
    /// `group_size`.
    pub size: u64,
    /// Compressed bytes of the images shown that another one represents.
    pub bytes_saved: u64,
    /// Its images, the representative first, then by distance; not all of a large group.
    pub images: Vec<GroupImage>,
}

/// An image of a group.
#[derive(Debug, Serialize)]
pub struct GroupImage {
    /// The image.
    pub image_id: String,
    /// Its partition.
    pub partition: String,
    /// `distance_to_representative`.
    pub distance: f64,
    /// Whether it represents the group.
    pub is_representative: bool,
    /// What it looks like.
    pub picture: Option<Encoded>,
}

/// How scores are distributed.
#[derive(Debug, Serialize)]
pub struct Histogram {
    /// The score.
    pub column: String,
    /// Ends of the bins, one more than there are bins; the first and the last bin take what lies beyond.
    pub edges: Vec<f64>,
    /// Rows in each bin.
    pub counts: Vec<u64>,
    /// Flagged rows among them.
    pub flagged: Vec<u64>,
    /// Rows of the reference in each bin; `None` where the rows are their own reference.
    pub reference: Option<Vec<u64>>,
    /// The thresholds.
    pub thresholds: Vec<SegmentThreshold>,
    /// Rows without a score.
    pub missing: u64,
}

/// The threshold of a segment.
#[derive(Debug, Serialize)]
pub struct SegmentThreshold {
    /// The segment; `None` where rows are not told apart.
    pub segment: Option<String>,
    /// `anomaly_threshold`.
    pub value: f64,
}

/// A sample of the images, by the two directions in which their vectors differ the most. Lists are as long as there are points.
#[derive(Debug, Default, Serialize)]
pub struct Map {
    /// `pca`.
    pub method: &'static str,
    /// Share of the sample's variance in either direction.
    pub explained: [f64; 2],
    /// Images of which these are a sample.
    pub of: u64,
    /// The images.
    pub image_id: Vec<String>,
    /// Their partitions.
    pub partition: Vec<String>,
    /// First coordinate.
    pub x: Vec<f64>,
    /// Second coordinate.
    pub y: Vec<f64>,
    /// `anomaly_score`.
    pub score: Vec<Option<f64>>,
    /// `is_anomaly`.
    pub is_anomaly: Vec<Option<bool>>,
    /// Kept columns of the source.
    pub columns: Vec<MapColumn>,
    /// Small pictures, all of one size, on one sheet.
    pub sheet: Option<Encoded>,
    /// Side of such a picture, in pixels.
    pub sheet_side: u32,
    /// Pictures in a row of the sheet.
    pub sheet_columns: u32,
    /// Number of the picture of each point, by rows; -1: none.
    pub sheet_place: Vec<i64>,
}

/// A column of the points of a map.
#[derive(Debug, Serialize)]
pub struct MapColumn {
    /// Its name.
    pub name: String,
    /// Texts, numbers and nulls.
    pub values: Vec<serde_json::Value>,
}

/// A comparison of a partition with the reference: an element of `drift` in the table `runs`.
#[derive(Debug, Clone, Serialize)]
pub struct DriftCheck {
    /// The partition.
    pub partition: String,
    /// What was compared.
    pub input: String,
    /// How.
    pub metric: String,
    /// The effect size.
    pub value: Option<f64>,
    /// The largest one that does not matter.
    pub threshold: f64,
    /// How likely it is by chance.
    pub p_value: Option<f64>,
    /// Rows that were looked at.
    pub rows: u64,
    /// Whether it is too large, and not by chance.
    pub is_anomaly: bool,
}

/// Rows that could not be used, for one cause.
#[derive(Debug, Serialize)]
pub struct Rejected {
    /// `status`.
    pub status: String,
    /// How many.
    pub rows: u64,
    /// Some of them.
    pub examples: Vec<RejectedImage>,
}

/// A row that could not be used.
#[derive(Debug, Serialize)]
pub struct RejectedImage {
    /// The image.
    pub image_id: String,
    /// Its partition.
    pub partition: String,
    /// `error_message`.
    pub message: String,
}

/// How long a stage took.
#[derive(Debug, Serialize)]
pub struct Timing {
    /// The stage.
    pub stage: &'static str,
    /// Wall time in seconds, for all partitions together.
    pub secs: f64,
    /// Rows that went through it.
    pub rows: Option<u64>,
}

/// A partition that the report speaks of.
#[derive(Debug, Serialize)]
pub struct PartitionRow {
    /// The partition.
    pub partition: String,
    /// Its rows.
    pub rows_in: u64,
    /// Those without a vector.
    pub rows_rejected: u64,
    /// Those flagged.
    pub rows_flagged: Option<u64>,
    /// Run id of its rows in `latents`.
    pub latents_run_id: String,
    /// In `neighbors`.
    pub neighbors_run_id: Option<String>,
    /// In `groups`.
    pub groups_run_id: Option<String>,
    /// In `anomalies`.
    pub run_id: Option<String>,
}

/// What a run found in a partition: a row of `runs`.
#[derive(Debug, Serialize)]
pub struct HistoryRow {
    /// The partition.
    pub partition: String,
    /// When the run ended.
    pub finished_at: String,
    /// Rows of the partition.
    pub rows_in: u64,
    /// Those without a vector.
    pub rows_rejected: u64,
    /// Those flagged.
    pub rows_flagged: Option<u64>,
    /// Checks that say that the partition is not like the reference.
    pub drifted_checks: Option<u64>,
    /// The model.
    pub model_sha256: String,
}

/// A value with its name.
#[derive(Debug, Serialize)]
pub struct Named {
    /// What it is.
    pub name: &'static str,
    /// The value.
    pub value: String,
}
