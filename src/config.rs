//! The pipeline file: what a run reads, with which model, what it computes and where it writes.
//!
//! A pipeline file is TOML and passes through two states. *As written* (`written`) it is what the person typed: every key
//! optional, every value with its place in the file, unknown keys refused. *As resolved* ([`Pipeline`]) it is what the
//! stages see: defaults filled in, ranges checked, every location an absolute URL. Nothing after this module looks at the
//! text again. What is wrong with a file comes back as one [`ConfigError`] that lists all problems with their lines.
//!
//! This module is pure. It reads no file, no environment and no clock, and opens no store: whether a table exists, whether
//! its columns do and whether the predicate parses is found out by the stages. Credentials are never part of a pipeline;
//! they come from the standard environment variables of each cloud.

mod location;
mod problem;
mod resolve;
mod written;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use url::Url;

pub use location::LocationFault;
pub(crate) use location::resolve as resolve_location;
pub use problem::{ConfigError, Fault, Problem, nearest};

use crate::decode::DecodeMode;
use crate::neighbors::exact::Metric;
use crate::score::Rule;

/// Column that identifies an image where `source.id` is not given: the name the output tables use, so that a table
/// written for this program needs no setting.
pub const DEFAULT_ID_COLUMN: &str = "image_id";

/// Column that holds the image where `source.image` is not given: the name of Hugging Face image tables.
pub const DEFAULT_IMAGE_COLUMN: &str = "image";

/// Images per inference call on a GPU where `execution.batch_size` is not given, and the most on a CPU: 32 RGB images of 224 x 224 in
/// float32 are 19 MiB, which fits beside the activations on any GPU. A CPU gets fewer of large images, see [`crate::pass`].
pub const DEFAULT_BATCH_SIZE: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// Most threads of a session: more than any network keeps busy.
pub const MAX_THREADS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// Largest `model.elbo_samples`: the error of the mean is a thirtieth of one sample's.
pub const MAX_ELBO_SAMPLES: usize = 1024;

/// Most images per inference call. 4096 RGB images of 224 x 224 in float32 are 2.3 GiB: more is a typing error.
pub const MAX_BATCH_SIZE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Rows of a unit of work at most where `execution.unit_rows` is not given: what a crash can cost, some minutes on two cores, and
/// about the rows of one published data file.
pub const DEFAULT_UNIT_ROWS: NonZeroUsize = NonZeroUsize::new(32_768).unwrap();

/// Most rows of a unit. Ten million vectors of 256 floats are a data file of 10 GB: more is a typing error.
pub const MAX_UNIT_ROWS: NonZeroUsize = NonZeroUsize::new(10_000_000).unwrap();

/// Most worker threads: more than the largest machines have cores.
pub const MAX_WORKERS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Neighbors per image where `neighbors.k` is not given: one row of a contact sheet, and as many as a person compares.
pub const DEFAULT_NEIGHBORS: NonZeroUsize = NonZeroUsize::new(10).unwrap();

/// Most neighbors per image. The table has `k` rows an image, so 1000 already make a billion rows of a million images.
pub const MAX_NEIGHBORS: NonZeroUsize = NonZeroUsize::new(1000).unwrap();

/// Bytes that a stage may hold where `execution.memory_limit` is not given: the smallest machines that embed images have as
/// much, and half a million vectors of 512 floats are compared in it without reading any of them twice.
pub const DEFAULT_MEMORY_LIMIT: NonZeroU64 = NonZeroU64::new(4 << 30).unwrap();

/// Share of the true neighbors that an approximate search must find where `neighbors.recall` is not given: of ten neighbors of ten
/// images, one may be missed.
pub const DEFAULT_RECALL: f64 = 0.99;

/// Most cells of an approximate search. A million cells of a thousand images each are a billion images.
pub const MAX_CELLS: NonZeroUsize = NonZeroUsize::new(1 << 20).unwrap();

/// Neighbor in the reference whose distance is a score where `anomaly.k` is not given: the nearest one finds the most, and the mean over
/// the other rules keeps single odd rows of the reference from counting for much.
pub const DEFAULT_ANOMALY_NEIGHBOR: NonZeroUsize = NonZeroUsize::MIN;

/// Share of the reference above the cutoff where `anomaly.threshold` is not given: one image in twenty, a list short
/// enough to look through. It says how much to review and claims nothing about how many images are defective.
pub const DEFAULT_CONTAMINATION: f64 = 0.05;

/// Chance of a false alarm where `drift.alpha` is not given: one partition in a hundred.
pub const DEFAULT_DRIFT_ALPHA: f64 = 0.01;

/// Smallest chance of a false alarm that `drift.alpha` may ask for: [`Significance::permutations`] can prove no smaller one.
///
/// [`Significance::permutations`]: crate::drift::Significance::permutations
pub const MIN_DRIFT_ALPHA: f64 = 0.001;

/// Largest share of rejected images where `limits.max_rejected_fraction` is not given. Single broken files are normal in
/// a large table; when one image in ten cannot be read, the table or the column is the wrong one.
pub const DEFAULT_MAX_REJECTED_FRACTION: f64 = 0.1;

/// Most seconds that `limits.max_decode_secs` may give to one image. An image that takes an hour holds a worker as one does that never
/// ends.
pub const MAX_DECODE_SECS: NonZeroU64 = NonZeroU64::new(3600).unwrap();

/// Name of the pipeline that [`Pipeline::for_images`] makes.
const IMAGES_PIPELINE_NAME: &str = "images";

/// What [`Pipeline::for_images`] names in its errors, where a pipeline file would be named by its path.
const COMMAND_LINE: &str = "command line";

/// The settings of a run, resolved and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    /// Name of the pipeline, `[a-z0-9_-]+`; part of transaction ids and paths.
    pub name: String,
    /// The table of images.
    pub source: Source,
    /// The model package. `None` only where no key and no flag names one; see [`Pipeline::require_model`].
    pub model: Option<ModelRef>,
    /// A second package, whose vectors are searched instead of the model's; `None`: the model's are.
    pub encoder: Option<EncoderRef>,
    /// Device, batch size and resources.
    pub execution: Execution,
    /// The neighbors stage; `None` when `neighbors.enabled = false`.
    pub neighbors: Option<Neighbors>,
    /// The flag stage; `None` when `anomaly.enabled = false`.
    pub anomaly: Option<Anomaly>,
    /// Comparison of partitions with the reference; `None` when `drift.enabled = false`.
    pub drift: Option<Drift>,
    /// Whether a run writes a report beside the tables, `report.enabled`.
    pub report: bool,
    /// Where the tables are written.
    pub output: Output,
    /// What one image and one run may cost.
    pub limits: Limits,
}

/// The table of images, `[source]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Location of the table: a file, a folder or a prefix.
    pub table: Url,
    /// How the table is stored.
    pub format: SourceFormat,
    /// Column that identifies an image. For [`SourceFormat::Directory`] and [`SourceFormat::WebDataset`] only what `predicate` calls
    /// the id, which is a relative path or the key of a sample.
    pub id: String,
    /// Column that holds the image, or features in its place. Unused for [`SourceFormat::Directory`] and [`SourceFormat::WebDataset`].
    pub image: String,
    /// Source columns kept in `latents`, in the order given. Empty for [`SourceFormat::Directory`]; for
    /// [`SourceFormat::WebDataset`] the extensions of members that are text.
    pub columns: Vec<String>,
    /// SQL predicate that chooses rows, as text; it is parsed by the source.
    pub predicate: Option<String>,
    /// What happens to rows with the id of another row of the partition.
    pub duplicates: Duplicates,
    /// Hive partition keys expected in the paths. `None`: those found in the paths.
    pub partition: Option<Vec<String>>,
}

/// How the source table is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceFormat {
    /// Parquet files with an image column.
    Parquet,
    /// A folder of image files.
    Directory,
    /// Tar archives of samples, as the library `WebDataset` reads them.
    WebDataset,
    /// A Delta table with an image column.
    Delta,
}

impl SourceFormat {
    /// The value as written in a pipeline file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Directory => "directory",
            Self::WebDataset => "webdataset",
            Self::Delta => "delta",
        }
    }
}

/// The model package, `[model]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRef {
    /// Location of the package folder.
    pub package: Url,
    /// Expected SHA-256 of the package, 64 lower case hexadecimal digits.
    pub sha256: Option<String>,
    /// Samples of z over which the negative ELBO is averaged, up to [`MAX_ELBO_SAMPLES`]; 0: it is taken at mu.
    pub elbo_samples: usize,
}

/// A separate encoder, `[encoder]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderRef {
    /// Location of the package folder.
    pub package: Url,
    /// Expected SHA-256 of the package, 64 lower case hexadecimal digits.
    pub sha256: Option<String>,
}

/// Device, batch size and resources, `[execution]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execution {
    /// Where inference runs.
    pub device: Device,
    /// Images per inference call, 1 to [`MAX_BATCH_SIZE`]. `None`: as many as suit the model and the device.
    pub batch_size: Option<NonZeroUsize>,
    /// Worker threads, 1 to [`MAX_WORKERS`]. `None`: the parallelism available where the run starts. It is not looked up here, so that the same
    /// file resolves to the same settings on every machine.
    pub workers: Option<NonZeroUsize>,
    /// Threads of ONNX Runtime for each worker, 1 to [`MAX_THREADS`]. One is the fastest for most networks; more need less memory, as there
    /// are fewer workers then. Another number may change the last bits of what the network gives.
    pub threads: NonZeroUsize,
    /// Rows of a unit of work at most, 1 to [`MAX_UNIT_ROWS`]: what a crash can cost. Smaller units make more and smaller data files. A
    /// row group or a shard is never divided, so one that has more rows is a unit of that size.
    pub unit_rows: NonZeroUsize,
    /// Bytes that the neighbors stage may hold, whatever the size of the table. Of embedding, a quarter bounds what is under way; the
    /// network's own memory and that of images being decoded are set by the batch size, the workers and the limits of an image.
    pub memory_limit: NonZeroU64,
    /// How closely pixels follow those of the model's training.
    pub decode: DecodeMode,
    /// Whether a GPU may round the factors of products to ten bits of mantissa, which is faster. Off, for thresholds feel it.
    pub tf32: bool,
    /// Bytes of the GPU's memory that each of its two sessions may take. `None`: all there is.
    pub gpu_memory_limit: Option<NonZeroU64>,
}

/// Where inference runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The CPU. The default, as its results are the same on every machine of one kind.
    Cpu,
    /// An NVIDIA GPU; an error where there is none.
    Cuda,
    /// An NVIDIA GPU by TensorRT, which builds an engine for the model first, in minutes.
    #[serde(rename = "tensorrt")]
    #[value(name = "tensorrt")]
    TensorRt,
    /// The CPU by OpenVINO.
    #[serde(rename = "openvino")]
    #[value(name = "openvino")]
    OpenVino,
    /// A GPU where there is one, else the CPU. The run records which it was.
    Auto,
}

/// The neighbors stage, `[neighbors]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighbors {
    /// Neighbors per image, 1 to [`MAX_NEIGHBORS`].
    pub k: NonZeroUsize,
    /// Distance between embeddings.
    pub metric: Metric,
    /// Which images are searched.
    pub scope: NeighborScope,
    /// Prefix of the tables of another run, whose images are searched. With [`NeighborScope::Reference`] and only then.
    pub reference: Option<Url>,
    /// Whether every image is compared with every other.
    pub search: Search,
    /// Share of the true neighbors that an approximate search must find, in (0, 1].
    pub recall: f64,
    /// Cells read for each image by an approximate search, 1 to [`MAX_CELLS`]. `None`: as few as reach `recall` on a sample.
    pub nprobe: Option<NonZeroUsize>,
    /// Cells of an approximate search, 1 to [`MAX_CELLS`]. `None`: by the number of images.
    pub cells: Option<NonZeroUsize>,
    /// Largest distance at which two images count as the same picture, in the unit of the metric; finite and not negative, and never with
    /// [`Metric::InnerProduct`]. `None`: there is no groups stage.
    pub duplicate_distance: Option<f64>,
}

/// How neighbors are searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Search {
    /// Exact up to a number of images, and by cells above it.
    Auto,
    /// Every image is compared with every other.
    Exact,
    /// An image is compared with those of the cells nearest to it (an inverted file, IVF).
    Ivf,
}

/// Which images are searched for the neighbors of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NeighborScope {
    /// Every image of the table.
    Corpus,
    /// The images of the same partition.
    Partition,
    /// The images of another table.
    Reference,
}

/// The flag stage, `[anomaly]`: rule and threshold of the anomaly flags.
#[derive(Debug, Clone, PartialEq)]
pub struct Anomaly {
    /// The score that is compared with the threshold.
    pub rule: Rule,
    /// How the threshold is found.
    pub threshold: Threshold,
    /// Location of a reference written by `calibrate`. `None`: the rows of the run are their own reference, so that
    /// scores of different runs do not compare.
    pub reference: Option<Url>,
    /// Kept column or partition key by whose values rows are compared with rows of their own kind. `None`: with all.
    pub segment: Option<String>,
    /// Which neighbor in the reference [`Rule::KnnDistance`] measures to, 1 to [`MAX_NEIGHBORS`]; 1 = the nearest.
    pub k: NonZeroUsize,
}

/// How the anomaly threshold is found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// Share of the reference above the cutoff, in [0, 0.5].
    Contamination(f64),
    /// Quantile of the reference scores, in [0.5, 1).
    Quantile(f64),
    /// The cutoff itself, in the unit of the rule; finite.
    Value(f64),
    /// Expected share of false ones among the flags of a partition, in (0, 0.5]: as many rows are flagged as that allows.
    Fdr(f64),
}

impl Threshold {
    /// The error rate that is asked for, if it is a promise about the reference.
    pub fn share(self) -> Option<f64> {
        match self {
            Self::Contamination(share) | Self::Fdr(share) => Some(share),
            Self::Quantile(quantile) => Some(1.0 - quantile),
            Self::Value(_) => None,
        }
    }
}

/// Where the tables are written, `[output]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Prefix under which the tables lie, each in a folder of its own.
    pub table: Url,
    /// How they are published.
    pub publish: Publish,
}

/// How tables are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Publish {
    /// Delta tables.
    Delta,
    /// Parquet files under a prefix for each run, and manifests that list the live ones.
    Parquet,
}

impl Publish {
    /// The value as written in a pipeline file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Parquet => "parquet",
        }
    }
}

/// What happens to a row whose id another row of its partition has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duplicates {
    /// The ids are named, and the partition is not published.
    Refuse,
    /// The first row is kept, in the order of the source: files by path, rows as they stand in a file.
    KeepFirst,
}

impl Duplicates {
    /// The value as written in a pipeline file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::KeepFirst => "keep_first",
        }
    }
}

/// How partitions are compared with the reference as a whole, `[drift]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// Chance that a partition is told to have drifted which has not, [`MIN_DRIFT_ALPHA`] to 0.5.
    pub alpha: f64,
}

/// What one image and one run may cost, `[limits]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Most bytes of one encoded image.
    pub max_image_bytes: NonZeroU64,
    /// Most pixels (width times height) of one decoded image.
    pub max_pixels: NonZeroU64,
    /// Most seconds that decoding one image may take, 1 to [`MAX_DECODE_SECS`].
    pub max_decode_secs: NonZeroU64,
    /// Largest share of rejected images of a run that still counts as success, in [0, 1].
    pub max_rejected_fraction: f64,
}

/// Settings given on the command line, which go before those of the file.
///
/// They are checked like those of the file; an error names the flag.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Folder that relative paths of the command line are relative to; absolute. Paths in a pipeline file are relative to
    /// the folder of that file.
    pub current_dir: PathBuf,
    /// `--images`, in place of `source.table`.
    pub source_table: Option<String>,
    /// `--where`, in place of `source.where`.
    pub predicate: Option<String>,
    /// `--model`, in place of `model.package`. A `model.sha256` of the file belongs to the package of the file and is
    /// not kept.
    pub model_package: Option<String>,
    /// `--device`, in place of `execution.device`.
    pub device: Option<Device>,
    /// `--batch-size`, in place of `execution.batch_size`.
    pub batch_size: Option<u32>,
    /// `--workers`, in place of `execution.workers`.
    pub workers: Option<u32>,
    /// `--out`, in place of `output.table`.
    pub output_table: Option<String>,
}

/// Reads a byte size as a pipeline file has it, in quotes: `"4GiB"`.
pub fn byte_size(text: &str) -> Result<NonZeroU64, String> {
    written::ByteSize::parse(text).map(|size| size.0).map_err(|fault| fault.to_string())
}

impl Pipeline {
    /// Resolves the text of a pipeline file.
    ///
    /// `file_name` is what errors call the file. `base_dir` is the absolute folder of the file, which relative paths in it
    /// are relative to.
    pub fn load_str(text: &str, file_name: &str, base_dir: &Path) -> Result<Self, ConfigError> {
        Self::load_str_with(text, file_name, base_dir, &Overrides::default())
    }

    /// Resolves the text of a pipeline file with the settings of the command line before those of the file.
    pub fn load_str_with(
        text: &str,
        file_name: &str,
        base_dir: &Path,
        overrides: &Overrides,
    ) -> Result<Self, ConfigError> {
        let mut problems = problem::Problems::default();
        let pipeline = written::read(text, &mut problems)
            .and_then(|written| resolve::pipeline(written, base_dir, overrides, &mut problems));
        problems.finish(pipeline, text, file_name)
    }

    /// The settings of a run without a pipeline file: the images in the folder `images`, tables under `out`, and defaults
    /// for everything that `overrides` leaves open. Paths are relative to [`Overrides::current_dir`].
    pub fn for_images(images: &str, out: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        let overrides = Overrides {
            source_table: Some(images.to_owned()),
            output_table: Some(out.to_owned()),
            ..overrides.clone()
        };
        let written = written::Written::directory(IMAGES_PIPELINE_NAME);
        let mut problems = problem::Problems::default();
        let pipeline = resolve::pipeline(written, &overrides.current_dir, &overrides, &mut problems);
        problems.finish(pipeline, "", COMMAND_LINE)
    }

    /// The pipeline that [`Pipeline::settings_json`] gave these settings of.
    pub fn from_settings(settings: &serde_json::Value) -> Result<Self, ConfigError> {
        let text = toml::to_string(&without_nulls(settings)).unwrap_or_default();
        Self::load_str(&text, "the settings of the plan", Path::new("/"))
    }

    /// The model package, or an error for those commands that cannot do without.
    pub fn require_model(&self) -> Result<&ModelRef, ConfigError> {
        self.model.as_ref().ok_or_else(|| {
            let mut problems = problem::Problems::default();
            problems.missing(resolve::MODEL_PACKAGE, None);
            ConfigError::new(problems, "", &self.name)
        })
    }

    /// The settings of the groups stage: those of the neighbors, and `duplicate_distance`; `None` where there is no such stage.
    pub fn groups(&self) -> Option<(&Neighbors, f64)> {
        let neighbors = self.neighbors.as_ref()?;
        Some((neighbors, neighbors.duplicate_distance?))
    }

    /// The resolved settings as JSON, for the `runs` table and for fingerprints.
    ///
    /// Keys are those of the pipeline file; what was not given and has no default is null. Two files that mean the same
    /// give the same JSON, on every machine. There are no secrets in it, as a pipeline with a secret does not resolve.
    pub fn settings_json(&self) -> serde_json::Value {
        let neighbors = match &self.neighbors {
            Some(neighbors) => json!({
                "enabled": true,
                "k": neighbors.k,
                "metric": neighbors.metric,
                "scope": neighbors.scope,
                "reference": neighbors.reference.as_ref().map(Url::as_str),
                "search": neighbors.search,
                "recall": neighbors.recall,
                "nprobe": neighbors.nprobe,
                "cells": neighbors.cells,
                "duplicate_distance": neighbors.duplicate_distance,
            }),
            None => json!({ "enabled": false }),
        };
        let anomaly = match &self.anomaly {
            Some(anomaly) => json!({
                "enabled": true,
                "rule": anomaly.rule,
                "threshold": anomaly.threshold,
                "reference": anomaly.reference.as_ref().map(Url::as_str),
                "segment": anomaly.segment,
                "k": anomaly.k,
            }),
            None => json!({ "enabled": false }),
        };
        json!({
            "pipeline": { "name": self.name },
            "source": {
                "table": self.source.table.as_str(),
                "format": self.source.format,
                "id": self.source.id,
                "image": self.source.image,
                "columns": self.source.columns,
                "where": self.source.predicate,
                "duplicates": self.source.duplicates,
                "partition": self.source.partition,
            },
            "model": self.model.as_ref().map(|model| json!({
                "package": model.package.as_str(),
                "sha256": model.sha256,
                "elbo_samples": model.elbo_samples,
            })),
            "encoder": self.encoder.as_ref().map(|encoder| json!({
                "package": encoder.package.as_str(),
                "sha256": encoder.sha256,
            })),
            "execution": {
                "device": self.execution.device,
                "batch_size": self.execution.batch_size,
                "workers": self.execution.workers,
                "threads": self.execution.threads,
                "unit_rows": self.execution.unit_rows,
                "memory_limit": self.execution.memory_limit,
                "decode": self.execution.decode,
                "tf32": self.execution.tf32,
                "gpu_memory_limit": self.execution.gpu_memory_limit,
            },
            "neighbors": neighbors,
            "anomaly": anomaly,
            "drift": match &self.drift {
                Some(drift) => json!({ "enabled": true, "alpha": drift.alpha }),
                None => json!({ "enabled": false }),
            },
            "report": { "enabled": self.report },
            "output": { "table": self.output.table.as_str(), "publish": self.output.publish },
            "limits": {
                "max_image_bytes": self.limits.max_image_bytes,
                "max_pixels": self.limits.max_pixels,
                "max_decode_secs": self.limits.max_decode_secs,
                "max_rejected_fraction": self.limits.max_rejected_fraction,
            },
        })
    }
}

/// TOML has no nulls: what was not given is not there.
fn without_nulls(settings: &serde_json::Value) -> serde_json::Value {
    match settings {
        serde_json::Value::Object(keys) => {
            let given = keys.iter().filter(|(_, value)| !value.is_null());
            given.map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests;
