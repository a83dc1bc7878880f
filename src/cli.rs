//! The command line: what can be typed, as it is typed. What it means is settled in [`crate::config`].

use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use chrono::NaiveDate;
use clap::{Args, Parser, Subcommand};
use serde_json::json;
use uuid::Uuid;

use crate::commands::{
    self, compare::CompareSettings, compare_tables::TableComparison, evaluate::Question, explain::ExplainSettings,
    export::Format, fit::FitSettings, generate::Draw, load_pipeline, report::ReportQuestion, tasks::Work,
};
use crate::config::{self, Device, Overrides, Pipeline};
use crate::context::{Context, FoldedStderr, LogFormat, Stderr, fold_to_terminal, write_line};
use crate::decode::{Color, Filter, Fit};
use crate::error::{Error, ExitStatus};
use crate::lineage::{self, End, Lineage};
use crate::memory;
use crate::metrics::RunMetrics;
use crate::model::inspect::Preset;
use crate::model::{Runtime, RuntimeError, runtime};
use crate::neighbors::exact::Metric;
use crate::redact::{self, Redacting};
use crate::report;
use crate::source::{PartitionValues, Selection};
use crate::stages::neighbors::shares::Step;
use crate::stages::{Backfill, Redo};
use crate::tasks::Share;
use crate::tasks::steps::Stage;

const EXIT_CODES: &str = "Exit codes: 0 committed or nothing to do, 1 unexpected, 2 usage or pipeline file, 3 committed but more \
images rejected than allowed, 4 data or model not as agreed, 5 transient (running again is safe), 6 something missing on this machine, \
99 nothing to do (only with --skip-exit-code), 130 and 143 stopped by SIGINT and SIGTERM";

const GLOBAL: &str = "Global options";

const LIBRARY_HELP: &str = "ONNX Runtime library to use (else: the variable ORT_DYLIB_PATH, ../lib beside the program, \
the Python environment that the program is in, .cache/onnxruntime, the active Python environment, the system)";

const LOG_HELP: &str = "Form of all that goes to standard error: lines for people, or a JSON object a line for log lines, summaries and \
errors alike; the variable RUST_LOG says what is logged";

const COMPARE_HELP: &str = "The first of these rules that applies is the verdict:
- the same bytes: the same file
- the same embedding: the model sees no difference
- a distance up to --duplicate-distance: near-duplicates
- with --table: alike if the two are nearer to each other than half of the table's images are to their nearest neighbor, else not alike
- with --duplicate-distance alone: not near-duplicates

Without --table and --duplicate-distance there is no further verdict: what a distance means depends on the model and the pictures.";

const GENERATE_HELP: &str = "The pictures are the means of p(x|z), without the noise of the likelihood. The way from A to B is straight: \
(1 - t) mu(A) + t mu(B), with t in even steps from 0 to 1.

A and B are image ids; where an id is in more than one partition, write the partition before it, as ds=2026-11-22/cell0001.

Of a model of features, the table has rows of these in place of pictures, in the units of the source, and there is no contact sheet.";

const REPORT_HELP: &str = "A run writes reports/NAME.html and reports/NAME.json beside its tables when it has changed them, where NAME is the \
pipeline's; this command writes them anew, or where --html and --json say. They are about the partitions that the last run changed, or those that are named here. The page \
needs nothing else and can be mailed: it is one file below 5 MB.";

const RECONSTRUCT_HELP: &str = "Images are those of the source that have latents of this model. Each latent becomes a byte: \
code = round(mu / scale), with scale = max |mu| / 127 over all images of the table latents, one for each latent; the scales are in the \
files' footers, as lookalike.code_scales. PSNR (dB) and SSIM (Wang et al. 2004, Gaussian window of 11 x 11 pixels, K1 0.01, K2 0.03) \
compare the decoded picture with the pixels that the model saw.";

const EXPORT_HELP: &str = "Rows are those of the table latents that have a vector of the model, in the order of its data files: by partition, then by file. Row i of a \
table is about row i of the array beside it. There are the kept columns, and scores, flags, reasons and groups where the pipeline has them. \
Ids are unique within a partition only, so `partition` belongs to the key.

In clip-retrieval, vectors have length 1, and image_path is the image's place in a folder of images, else the image column where it is a \
kept column of text, else the id. In embedding-atlas, neighbors.ids are numbers of rows, from 0. In fiftyone, pictures of a local folder are named where \
they lie; others are copied into data/, as the source has them now.

All tables must be up to date: those that a run would make anew are refused.";

const INSPECT_HELP: &str = "What is printed is TOML: correct it, and give it to `lookalike model package --contract`. Lines with # say what \
is in the network and what was guessed. Any tensor of the network may be named in [outputs], those within it too.";

const PACKAGE_HELP: &str = "The golden images are what the network makes of these pictures here, on the CPU. They prove that another \
machine, another version of ONNX Runtime or a GPU gives the same. They cannot prove that pictures are prepared as they were in training: \
compare an embedding with one that you have, or export with the module in models/, which asks the framework itself.";

const TASKS_HELP: &str = "On many machines, a run is: plan --plan DIR; embed --plan DIR, as many tasks as you like; commit --plan DIR --stage embed; \
then neighbors --plan DIR --step sort; commit --stage sort; neighbors --step probe, join and merge; commit --stage neighbors; flag; \
commit --stage flag. Each step's tasks run in any order, at once, and may be run again; a step begins when the one before has ended. \
The last line of each command is a JSON object; `tasks` in it says how many tasks of the next steps have work. The tables are those of \
`lookalike run`. A plan's folder is of no use when its run is recorded.";

const METRICS_HELP: &str = "Write the numbers of the run there when it ends, however it ends, as OpenMetrics text (for node-exporter's \
textfile collector: a name ending in .prom)";

/// Which pictures look alike, and which look like nothing seen before?
///
/// Reads tables of images from object storage or disk, computes latent vectors and reconstruction errors with exported models, and
/// publishes Delta tables with vectors, nearest neighbors and anomaly flags.
#[derive(Debug, Parser)]
#[command(name = "lookalike", disable_version_flag = true, arg_required_else_help = true, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// Print the versions of lookalike and of ONNX Runtime
    #[arg(short = 'V', long)]
    version: bool,
    #[arg(long, global = true, value_name = "FILE", help_heading = GLOBAL, help = LIBRARY_HELP)]
    onnxruntime: Option<PathBuf>,
    /// Say nothing but errors and data
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    quiet: bool,
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, help_heading = GLOBAL, help = LOG_HELP)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Embed, find neighbors, flag, and publish what changed
    Run(RunArgs),
    /// Show what a run would do; or, with --plan, write it down for tasks to do it on many machines
    #[command(after_help = TASKS_HELP)]
    Plan {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        backfill: BackfillArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
        /// Write the plan into this folder, in a store that all tasks reach, and print how many tasks have work
        #[arg(long, value_name = "DIR", conflicts_with = "json", help_heading = TASKS)]
        plan: Option<String>,
        /// With --plan: exit with 99 instead of 0 when there is nothing to do, which Airflow takes as skipped
        #[arg(long, requires = "plan", help_heading = TASKS)]
        skip_exit_code: bool,
    },
    /// Measure a model with different settings, and decoding beside it; print the fastest ones for the pipeline file
    ///
    /// With --workers or --batch-size, that number alone is tried.
    Bench {
        /// Pipeline file (TOML), or the folder of a model package
        #[arg(value_name = "PIPELINE|MODEL")]
        target: String,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Print one JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Run the embed stage alone, or a task of it: images to latents
    Embed {
        #[command(flatten)]
        pipeline: StageArgs,
        #[command(flatten)]
        backfill: BackfillArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        #[command(flatten)]
        task: TaskArgs,
    },
    /// Run the neighbors stage alone, or a task of it: latents to neighbors
    Neighbors {
        #[command(flatten)]
        pipeline: StageArgs,
        #[command(flatten)]
        task: TaskArgs,
        /// Step of the plan
        #[arg(long, value_enum, requires = "plan", required_unless_present = "file", help_heading = TASKS)]
        step: Option<Step>,
    },
    /// Run the flag stage alone, or a task of it: latents to anomalies
    Flag {
        #[command(flatten)]
        pipeline: StageArgs,
        #[command(flatten)]
        task: TaskArgs,
    },
    /// Publish what the tasks of a stage have made, and plan what comes next
    #[command(after_help = TASKS_HELP)]
    Commit {
        /// Folder of the plan
        #[arg(long, value_name = "DIR")]
        plan: String,
        /// Which stage
        #[arg(long, value_enum)]
        stage: Stage,
    },
    /// Learn probabilistic PCA (the linear VAE) from the source and write a model package
    Fit(FitArgs),
    /// Score rows taken as normal and freeze their scores as the reference
    Calibrate {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Where the reference goes (else: where the pipeline file expects it)
        #[arg(long = "to", value_name = "FILE")]
        to: Option<String>,
        /// Further normal rows, such as those that the model has learned from: their vectors are compared with, their scores are not
        #[arg(long, value_name = "SQL")]
        bank: Option<String>,
    },
    /// Measure how well each score separates rows known to be bad from rows known to be good
    Evaluate {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// SQL predicate on kept columns and partition keys: rows that should score high
        #[arg(long, value_name = "SQL")]
        positive: String,
        /// SQL predicate: rows that should score low
        #[arg(long, value_name = "SQL")]
        negative: String,
        /// Kept column or partition key: whether an image's nearest neighbors, of the positive and negative ones, have the same label
        #[arg(long, value_name = "COLUMN")]
        label: Option<String>,
        /// SQL predicate on source columns: rows that a PCA with as many latents is fitted to, and measured beside the model
        #[arg(long, value_name = "SQL")]
        baseline: Option<String>,
        /// Write the table to this Parquet file too: a path or URL
        #[arg(long, value_name = "FILE")]
        to: Option<String>,
        /// Print one JSON object instead of tables
        #[arg(long)]
        json: bool,
    },
    /// Show everything the tables know of one image, and what the model sees in it
    Explain {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Id of the image; where it is in several partitions, with the partition before it, as ds=2026-11-22/cell0001
        image_id: String,
        /// Write a page with the image, its reconstruction, the error map, scores and neighbors: one HTML file, in any store
        #[arg(long, value_name = "FILE")]
        html: Option<String>,
        /// Write a picture of the same without text, in any store: what the model sees, its reconstruction, the error map, and neighbors
        #[arg(long, value_name = "FILE")]
        png: Option<String>,
    },
    /// Write a page about the last run: what is strange, what is alike, what changed, with pictures
    #[command(after_help = REPORT_HELP)]
    Report {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        selection: SelectionArgs,
        /// Runs whose results are shown beside it, by time
        #[arg(long, value_name = "LAST_N", default_value_t = report::DEFAULT_HISTORY)]
        runs: usize,
        /// Write the page there, in any store
        #[arg(long, value_name = "FILE")]
        html: Option<String>,
        /// Write the same as JSON there, in any store
        #[arg(long, value_name = "FILE")]
        json: Option<String>,
    },
    /// Sample the model's latent space, or go from one image to another in it, and write the pictures as an image table
    #[command(after_help = GENERATE_HELP)]
    Generate {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Folder that is made, in any store: the table images.parquet and the contact sheet sheet.png
        #[arg(long, value_name = "DIR")]
        to: String,
        /// Pictures of samples from N(0, I), 1 to 1000000
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        count: u32,
        /// Seed of the samples; a sample is the same however many there are
        #[arg(long, value_name = "S", default_value_t = 0)]
        seed: u64,
        /// Instead of samples, pictures on the way from one image of the table latents to another
        #[arg(long, value_names = ["A", "B"], num_args = 2, conflicts_with_all = ["count", "seed"])]
        interpolate: Option<Vec<String>>,
        /// Pictures on the way, A and B among them, 2 to 1000
        #[arg(long, value_name = "N", default_value_t = 8, requires = "interpolate", value_parser = clap::value_parser!(u32).range(2..=1000))]
        steps: u32,
    },
    /// Write the images as the model remembers them: latents in 8 bits, decoded again, with PSNR and SSIM
    #[command(after_help = RECONSTRUCT_HELP)]
    Reconstruct {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Folder that is made, in any store: a table images.parquet in the folder of each partition
        #[arg(long, value_name = "DIR")]
        to: String,
    },
    /// Write vectors, flags and neighbors in the form of another tool
    #[command(after_help = EXPORT_HELP)]
    Export {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Form of what is written
        #[arg(long, value_enum)]
        format: Format,
        /// Folder that is made, in any store
        #[arg(long, value_name = "DIR")]
        to: String,
    },
    /// Compare two images, or each pair of several: distance, percentile among a table's neighbors, and a verdict
    #[command(after_help = COMPARE_HELP)]
    Compare(CompareArgs),
    /// Find the nearest images of one table for every image of another, and write them to a Parquet file
    CompareTables {
        /// Prefix of the tables whose images are asked about: the output table of their run
        #[arg(value_name = "QUERY")]
        query: String,
        /// Prefix of the tables that are searched
        #[arg(value_name = "REFERENCE")]
        reference: String,
        /// File to write, in any store
        #[arg(long, value_name = "FILE")]
        out: String,
        /// Nearest images for each, 1 to 1000
        #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
        k: u16,
        /// Distance between embeddings
        #[arg(long, value_enum, default_value_t = Metric::Cosine)]
        metric: Metric,
        /// Count the images that have one within this distance
        #[arg(long, value_name = "D")]
        duplicate_distance: Option<f32>,
        /// Bytes to hold at most, whatever the size of the tables
        #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = config::byte_size)]
        memory_limit: NonZeroU64,
    },
    /// Look into an ONNX file, and make a model package of it
    #[command(subcommand)]
    Model(ModelCommand),
    /// Find out whether a run could do its work here: settings, runtime, model, stores; ✔ or ✖ with the fix
    Check {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// List what runs have left over below the output prefix; delete it only with --delete
    Vacuum {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// What was written or replaced since then is kept, for readers and for runs that are resumed
        #[arg(long, value_name = "N", default_value_t = commands::vacuum::DEFAULT_OLDER_THAN_DAYS)]
        older_than_days: u32,
        /// Delete what is listed
        #[arg(long)]
        delete: bool,
    },
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all commands
    Man {
        /// Folder for the pages, one for each command
        #[arg(long, value_name = "DIR")]
        to: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Print what is in a network, and a model.toml proposed for it
    #[command(after_help = INSPECT_HELP)]
    Inspect {
        #[command(flatten)]
        network: NetworkArgs,
        /// Print one JSON object instead of TOML
        #[arg(long)]
        json: bool,
    },
    /// Make a model package of a network: proposed or given contract, files with their hashes, golden images
    #[command(after_help = PACKAGE_HELP)]
    Package {
        #[command(flatten)]
        network: NetworkArgs,
        /// The contract: what `model inspect` printed, corrected (else: as it is proposed)
        #[arg(long, value_name = "TOML", conflicts_with = "preset")]
        contract: Option<String>,
        /// A folder of pictures, in any store: the first ones become the golden images
        #[arg(long, value_name = "DIR")]
        images: String,
        /// Folder that is made, in any store
        #[arg(long = "to", value_name = "DIR")]
        to: String,
    },
}

#[derive(Debug, Args)]
struct NetworkArgs {
    /// ONNX file, in any store; weights beside it are found
    #[arg(value_name = "FILE")]
    file: String,
    /// A second network, from latents to pictures, in the same folder
    #[arg(long, value_name = "FILE")]
    decoder: Option<String>,
    /// How pictures are prepared (else: by the names and shapes of the tensors)
    #[arg(long, value_enum)]
    preset: Option<Preset>,
}

#[derive(Debug, Args)]
struct PipelineArgs {
    /// Pipeline file (TOML)
    #[arg(value_name = "PIPELINE")]
    file: PathBuf,
    #[command(flatten)]
    overrides: OverrideArgs,
}

#[derive(Debug, Args)]
#[command(
    override_usage = "lookalike run [OPTIONS] <PIPELINE>\n       lookalike run [OPTIONS] --images <DIR> --out <DIR>"
)]
struct RunArgs {
    /// Pipeline file (TOML)
    #[arg(value_name = "PIPELINE", required_unless_present = "images", conflicts_with = "images")]
    file: Option<PathBuf>,
    /// Run on a folder of images without a pipeline file; fits a model to them unless --model names one
    #[arg(long, value_name = "DIR", requires = "out")]
    images: Option<String>,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[arg(long, value_name = "FILE", help = METRICS_HELP)]
    metrics_file: Option<PathBuf>,
    #[command(flatten)]
    backfill: BackfillArgs,
    /// Exit with 99 instead of 0 when there was nothing to do, which Airflow takes as skipped
    #[arg(long)]
    skip_exit_code: bool,
}

/// A pipeline whose stage is run alone; not where a plan has it.
#[derive(Debug, Args)]
struct StageArgs {
    /// Pipeline file (TOML)
    #[arg(value_name = "PIPELINE", required_unless_present = "plan", conflicts_with = "plan")]
    file: Option<PathBuf>,
    #[command(flatten)]
    overrides: OverrideArgs,
}

impl StageArgs {
    fn load(&self, compute: &ComputeArgs, context: &Context) -> Result<Pipeline, Error> {
        let file = self.file.as_deref().unwrap_or_else(|| Path::new(""));
        load_pipeline(context, file, &self.overrides.resolve(compute, context))
    }
}

const TASKS: &str = "Tasks over a plan";

/// A share of a step of a plan.
#[derive(Debug, Args)]
struct TaskArgs {
    /// Do a share of this step of a plan instead: the folder that `lookalike plan --plan` wrote
    #[arg(long, value_name = "DIR", help_heading = TASKS, conflicts_with_all = TASK_CONFLICTS)]
    plan: Option<String>,
    #[arg(long, value_name = "I", requires = "plan", help_heading = TASKS, help = TASK_INDEX_HELP)]
    task_index: Option<usize>,
    /// Number of tasks among which the step is shared out (else: the engine's variable that goes with the index)
    #[arg(long, value_name = "N", requires = "plan", help_heading = TASKS)]
    task_count: Option<NonZeroUsize>,
}

const TASK_INDEX_HELP: &str = "Number of this task, from 0 (else: the variable of the engine that started it: JOB_COMPLETION_INDEX, \
AWS_BATCH_JOB_ARRAY_INDEX, CLOUD_RUN_TASK_INDEX, SLURM_ARRAY_TASK_ID or BATCH_TASK_INDEX, the first that is set)";

/// What the plan has settled.
const TASK_CONFLICTS: [&str; 3] = ["out", "model", "predicate"];

impl TaskArgs {
    /// Does the share, where there is a plan.
    fn work(&self, context: &Context, work: Work) -> Result<Option<ExitStatus>, Error> {
        let Some(plan) = &self.plan else { return Ok(None) };
        let (share, found_by) = Share::find(self.task_index, self.task_count, |name| std::env::var_os(name))?;
        commands::tasks::work(context, &context.locate("--plan", plan)?, work, share, &found_by).map(Some)
    }
}

const BACKFILL: &str = "Backfill";

/// Which partitions are looked at.
#[derive(Debug, Default, Args)]
struct SelectionArgs {
    /// Take only this partition of the source, as `ds=2026-11-22` or `ds=2026-11-22/region=eu`; may be given more than once
    #[arg(long, value_name = "KEY=VALUE", value_parser = partition, help_heading = BACKFILL)]
    partition: Vec<PartitionValues>,
    /// Take only partitions of this date and later
    #[arg(long, value_name = "YYYY-MM-DD", help_heading = BACKFILL)]
    from: Option<NaiveDate>,
    /// Take only partitions of this date and earlier
    #[arg(long, value_name = "YYYY-MM-DD", help_heading = BACKFILL)]
    to: Option<NaiveDate>,
}

/// Which partitions are taken up, and how.
#[derive(Debug, Default, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
struct BackfillArgs {
    #[command(flatten)]
    selection: SelectionArgs,
    /// Embed only partitions that have no rows yet; leave the others as they are, even if the source or the model changed
    #[arg(long, group = "redo", help_heading = BACKFILL)]
    only_missing: bool,
    /// Try the images again that could not be used, also in partitions that are up to date
    #[arg(long, group = "redo", help_heading = BACKFILL)]
    retry_rejected: bool,
    /// Embed partitions again that are up to date
    #[arg(long, group = "redo", help_heading = BACKFILL)]
    force: bool,
    /// Where files were added to a partition since its rows were published, read only these and carry the other rows over
    #[arg(long, conflicts_with = "redo", help_heading = BACKFILL)]
    changed_since_last_run: bool,
}

fn partition(text: &str) -> Result<PartitionValues, String> {
    Selection::parse_partition(text)
        .ok_or_else(|| "a partition is written KEY=VALUE, or KEY=VALUE/KEY=VALUE as in folder names".to_owned())
}

impl NetworkArgs {
    fn resolve(&self) -> commands::model::NetworkFile {
        commands::model::NetworkFile { file: self.file.clone(), decoder: self.decoder.clone(), preset: self.preset }
    }
}

impl SelectionArgs {
    fn resolve(&self) -> Result<Selection, Error> {
        if let (Some(from), Some(to)) = (self.from, self.to)
            && to < from
        {
            return Err(Error::Usage {
                message: format!("--from {from} is later than --to {to}"),
                hint: "both days are taken, and all between them".to_owned(),
            });
        }
        Ok(Selection { partitions: self.partition.clone(), from: self.from, to: self.to, version: None })
    }
}

impl BackfillArgs {
    fn resolve(&self) -> Result<Backfill, Error> {
        Ok(Backfill {
            selection: self.selection.resolve()?,
            redo: match self {
                Self { force: true, .. } => Redo::All,
                Self { retry_rejected: true, .. } => Redo::Rejected,
                Self { only_missing: true, .. } => Redo::Missing,
                _ => Redo::Changed,
            },
            added_only: self.changed_since_last_run,
        })
    }
}

/// Settings that go before those of the pipeline file.
#[derive(Debug, Args)]
struct OverrideArgs {
    /// Where the tables go, in place of the pipeline file's output table
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Model package to use, or for `fit` to write, in place of the pipeline file's
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Rows to take, in place of the pipeline file's `where`
    #[arg(long = "where", value_name = "SQL")]
    predicate: Option<String>,
}

/// How images are worked on, before what the pipeline file says.
#[derive(Debug, Default, Args)]
struct ComputeArgs {
    /// Where inference runs, in place of the pipeline file's device
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// Images per inference call, in place of the pipeline file's batch size
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Worker threads, in place of the pipeline file's
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
}

#[derive(Debug, Args)]
struct FitArgs {
    #[command(flatten)]
    pipeline: PipelineArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Number of latents (else: 64, or a quarter of the rows if that is fewer)
    #[arg(long, value_name = "K")]
    latent_dim: Option<usize>,
    /// Of features: bring each to mean 0 and standard deviation 1 first, so that their units do not matter
    #[arg(long)]
    standardize: bool,
    /// Of images: height of the model's input in pixels (else: 64)
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    height: Option<u32>,
    /// Of images: width of the model's input in pixels (else: 64)
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    width: Option<u32>,
    /// Of images: color of the model's input (else: rgb)
    #[arg(long, value_enum)]
    color: Option<Color>,
    /// Of images: how pixels are resampled (else: bilinear)
    #[arg(long, value_enum)]
    filter: Option<Filter>,
    /// Of images: how those of another shape are fitted (else: stretch)
    #[arg(long, value_enum)]
    fit: Option<Fit>,
}

#[derive(Debug, Args)]
struct CompareArgs {
    /// Images: paths or URLs in any store
    #[arg(value_name = "IMAGE", required = true, num_args = 2..)]
    images: Vec<String>,
    /// Model package whose embeddings are compared
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Where inference runs
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Output prefix of a pipeline with this model: its neighbors tell what is near
    #[arg(long, value_name = "DIR")]
    table: Option<String>,
    /// Distance between embeddings (else: that of the table, or cosine)
    #[arg(long, value_enum)]
    metric: Option<Metric>,
    /// Largest distance of near-duplicates, in the unit of the metric
    #[arg(long, value_name = "D", value_parser = distance)]
    duplicate_distance: Option<f64>,
    /// Lines for people, or one JSON object
    #[arg(long, value_enum, default_value_t = CompareFormat::Text)]
    format: CompareFormat,
}

/// Form of what `compare` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CompareFormat {
    Text,
    Json,
}

fn distance(text: &str) -> Result<f64, String> {
    let distance = text.parse::<f64>().ok().filter(|distance| distance.is_finite() && *distance >= 0.0);
    distance.ok_or_else(|| "a distance is a finite number from 0 on".to_owned())
}

impl CompareArgs {
    fn resolve(&self) -> CompareSettings {
        CompareSettings {
            images: self.images.clone(),
            model: self.model.clone(),
            device: self.device,
            table: self.table.clone(),
            metric: self.metric,
            duplicate_distance: self.duplicate_distance,
            as_json: self.format == CompareFormat::Json,
        }
    }
}

impl ComputeArgs {
    fn overrides(&self, context: &Context) -> Overrides {
        Overrides {
            current_dir: context.current_dir.clone(),
            device: self.device,
            batch_size: self.batch_size,
            workers: self.workers,
            ..Overrides::default()
        }
    }
}

impl OverrideArgs {
    fn resolve(&self, compute: &ComputeArgs, context: &Context) -> Overrides {
        Overrides {
            predicate: self.predicate.clone(),
            model_package: self.model.clone(),
            output_table: self.out.clone(),
            ..compute.overrides(context)
        }
    }
}

impl PipelineArgs {
    fn load(&self, context: &Context) -> Result<Pipeline, Error> {
        self.load_with(&ComputeArgs::default(), context)
    }

    fn load_with(&self, compute: &ComputeArgs, context: &Context) -> Result<Pipeline, Error> {
        load_pipeline(context, &self.file, &self.overrides.resolve(compute, context))
    }
}

/// Parses the command line, runs the verb, and turns what it comes to into an exit code.
pub fn main() -> ExitCode {
    runtime::refuse_telemetry();
    memory::return_what_is_freed();
    redact::learn(std::env::vars_os());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, log_format_asked()),
    };
    start_logging(cli.log_format, cli.quiet);
    tell_panics(cli.log_format);
    let status = match std::panic::catch_unwind(|| run(&cli)) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            explain(&error, cli.log_format);
            error.exit_status()
        }
        // The panic hook has told what it was.
        Err(_) => ExitStatus::Unexpected,
    };
    ExitCode::from(status as u8)
}

#[expect(clippy::too_many_lines, reason = "a verb after the other, which is easier to find than spread over functions")]
fn run(cli: &Cli) -> Result<ExitStatus, Error> {
    let context = Context::new(cli.onnxruntime.clone(), cli.quiet)?.with_log_format(cli.log_format);
    let log_format = cli.log_format;
    context
        .stop
        .listen(move |signal| explain(&Error::Stopped { signal }, log_format))
        .map_err(|source| Error::Io { action: "listen for signals".to_owned(), source })?;
    if cli.version {
        return print_version(&context);
    }
    let Some(command) = &cli.command else {
        return Err(Error::Usage {
            message: "no command was given".to_owned(),
            hint: "see `lookalike --help`".to_owned(),
        });
    };
    match command {
        Command::Run(args) => {
            let context = context.with_lineage(Lineage::from_environment());
            traced(&context, || measured(args, |metrics| run_pipeline(args, &context, metrics)))
        }
        Command::Plan { pipeline, backfill, compute, json, plan, skip_exit_code } => {
            let (backfill, pipeline) = (backfill.resolve()?, pipeline.load_with(compute, &context)?);
            match plan {
                Some(plan) => {
                    let plan = context.locate("--plan", plan)?;
                    let context = context.with_lineage(Lineage::from_environment());
                    let status = commands::plan::write(&context, &pipeline, &backfill, &plan)?;
                    Ok(if *skip_exit_code || status != ExitStatus::NothingToDo { status } else { ExitStatus::Success })
                }
                None => commands::plan::plan(&context, &pipeline, &backfill, *json),
            }
        }
        Command::Bench { target, compute, json } => {
            commands::bench::bench(&context, target, &compute.overrides(&context), *json)
        }
        Command::Embed { pipeline, backfill, compute, task } => match task.work(&context, Work::Embed)? {
            Some(status) => Ok(status),
            None => commands::run::run_embed(&context, &pipeline.load(compute, &context)?, &backfill.resolve()?),
        },
        Command::Neighbors { pipeline, task, step } => {
            match step.map(|step| task.work(&context, Work::Neighbors(step))).transpose()?.flatten() {
                Some(status) => Ok(status),
                None => commands::run::run_neighbors(&context, &pipeline.load(&ComputeArgs::default(), &context)?),
            }
        }
        Command::Flag { pipeline, task } => match task.work(&context, Work::Flag)? {
            Some(status) => Ok(status),
            None => commands::run::run_flag(&context, &pipeline.load(&ComputeArgs::default(), &context)?),
        },
        Command::Commit { plan, stage } => {
            let plan = context.locate("--plan", plan)?;
            commands::tasks::commit(&context.with_lineage(Lineage::from_environment()), &plan, *stage)
        }
        Command::Fit(args) => {
            let settings = FitSettings {
                latent_dim: args.latent_dim,
                standardize: args.standardize,
                height: args.height,
                width: args.width,
                color: args.color,
                filter: args.filter,
                fit: args.fit,
            };
            commands::fit::fit(&context, &args.pipeline.load_with(&args.compute, &context)?, &settings)
        }
        Command::Calibrate { pipeline, compute, to, bank } => {
            let pipeline = pipeline.load_with(compute, &context)?;
            commands::calibrate::calibrate(&context, &pipeline, to.as_deref(), bank.as_deref())
        }
        Command::Evaluate { pipeline, positive, negative, label, baseline, to, json } => {
            let question = Question {
                positive,
                negative,
                label: label.as_deref(),
                baseline: baseline.as_deref(),
                to: to.as_deref().map(|to| context.locate("--to", to)).transpose()?,
                as_json: *json,
            };
            commands::evaluate::evaluate(&context, &pipeline.load(&context)?, &question)
        }
        Command::Explain { pipeline, image_id, html, png } => {
            let settings = ExplainSettings { image_id: image_id.clone(), html: html.clone(), png: png.clone() };
            commands::explain::explain(&context, &pipeline.load(&context)?, &settings)
        }
        Command::Report { pipeline, selection, runs, html, json } => {
            let question = ReportQuestion {
                selection: selection.resolve()?,
                num_runs: *runs,
                html: html.clone(),
                json: json.clone(),
            };
            commands::report::report(&context, &pipeline.load(&context)?, &question)
        }
        Command::Generate { pipeline, to, count, seed, interpolate, steps } => {
            let latents = match interpolate.as_deref() {
                Some([from, to]) => Draw::Between { from: from.clone(), to: to.clone(), steps: *steps },
                _ => Draw::Samples { count: *count, seed: *seed },
            };
            commands::generate::generate(&context, &pipeline.load(&context)?, &latents, to)
        }
        Command::Reconstruct { pipeline, compute, to } => {
            commands::reconstruct::reconstruct(&context, &pipeline.load_with(compute, &context)?, to)
        }
        Command::Export { pipeline, format, to } => {
            commands::export::export(&context, &pipeline.load(&context)?, *format, to)
        }
        Command::Compare(args) => commands::compare::compare(&context, &args.resolve()),
        Command::CompareTables { query, reference, out, k, metric, duplicate_distance, memory_limit } => {
            let comparison = TableComparison {
                query: context.locate("QUERY", query)?,
                reference: context.locate("REFERENCE", reference)?,
                out: context.locate("--out", out)?,
                metric: *metric,
                k: NonZeroUsize::try_from(usize::from(*k)).unwrap_or(NonZeroUsize::MIN),
                duplicate_distance: *duplicate_distance,
                memory_limit: *memory_limit,
            };
            commands::compare_tables::compare_tables(&context, &comparison)
        }
        Command::Check { pipeline, compute, json } => {
            commands::check::check(&context, &pipeline.file, &pipeline.overrides.resolve(compute, &context), *json)
        }
        Command::Model(ModelCommand::Inspect { network, json }) => {
            commands::model::inspect(&context, &network.resolve(), *json)
        }
        Command::Model(ModelCommand::Package { network, contract, images, to }) => {
            let package =
                commands::model::Packaging { contract: contract.clone(), images: images.clone(), to: to.clone() };
            commands::model::package(&context, &network.resolve(), &package)
        }
        Command::Vacuum { pipeline, older_than_days, delete } => {
            commands::vacuum::vacuum(&context, &pipeline.load(&context)?, *older_than_days, *delete)
        }
        Command::Completions { shell } => Ok(commands::completions::completions(*shell)),
        Command::Man { to } => commands::man::man(&context, to.as_deref()),
    }
}

fn run_pipeline(args: &RunArgs, context: &Context, metrics: &mut RunMetrics) -> Result<ExitStatus, Error> {
    let backfill = args.backfill.resolve()?;
    let mut overrides = args.overrides.resolve(&args.compute, context);
    let begin = |pipeline: &Pipeline| {
        let id = lineage::run_id(metrics.started, &Uuid::new_v4().to_string());
        context.lineage.begin(context, lineage::Run::of(pipeline, &backfill.selection, id));
    };
    let status = if let Some(file) = &args.file {
        let pipeline = load_pipeline(context, file, &overrides)?;
        begin(&pipeline);
        commands::run::run(context, &pipeline, &backfill, metrics)
    } else {
        let out = args.overrides.out.clone().unwrap_or_default();
        let is_model_named = overrides.model_package.is_some();
        overrides.model_package.get_or_insert_with(|| format!("{}/model", out.trim_end_matches('/')));
        let pipeline = Pipeline::for_images(args.images.as_deref().unwrap_or_default(), &out, &overrides)?;
        begin(&pipeline);
        commands::run::run_images(context, &pipeline, is_model_named, &backfill, metrics)
    }?;
    Ok(match status {
        ExitStatus::NothingToDo if !args.skip_exit_code => ExitStatus::Success,
        status => status,
    })
}

/// Runs, and tells how that ended where the environment asks for it.
fn traced(context: &Context, run: impl FnOnce() -> Result<ExitStatus, Error>) -> Result<ExitStatus, Error> {
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(run));
    let end = match &outcome {
        Ok(Ok(status)) => End::Code(*status),
        Ok(Err(error)) => End::Failed(error),
        Err(_) => End::Panicked,
    };
    context.lineage.end(context, end);
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs with the metrics file that was asked for, written at the end, however that comes.
fn measured(
    args: &RunArgs,
    run: impl FnOnce(&mut RunMetrics) -> Result<ExitStatus, Error>,
) -> Result<ExitStatus, Error> {
    let mut metrics = RunMetrics::start();
    let Some(file) = &args.metrics_file else { return run(&mut metrics) };
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| run(&mut metrics)));
    let status = match &outcome {
        Ok(Ok(status)) => *status,
        Ok(Err(error)) => error.exit_status(),
        Err(_) => ExitStatus::Unexpected,
    };
    let written = metrics.write(file, args.file.as_deref(), status);
    match outcome {
        Ok(Ok(status)) => written.map(|()| status),
        Ok(Err(error)) => {
            // The run's own error is the one to end with.
            if let Err(error) = written {
                tracing::error!("{error}: {}", error.causes().join(": "));
            }
            Err(error)
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn print_version(context: &Context) -> Result<ExitStatus, Error> {
    context.print(concat!("lookalike ", env!("CARGO_PKG_VERSION")))?;
    match Runtime::load(context.onnxruntime.as_deref()) {
        Ok(runtime) => context.print(&format!(
            "ONNX Runtime {} from {} ({})",
            runtime.version,
            runtime.library.display(),
            runtime.found_by
        ))?,
        Err(error @ RuntimeError::NotFound { .. }) => {
            context.print("ONNX Runtime: not found")?;
            context.say(&format!("hint: {}", error.hint().unwrap_or_default()))?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitStatus::Success)
}

/// Sends log lines to standard error. `RUST_LOG` chooses them; without it, what `lookalike` says at level `info` (with `--quiet`:
/// `error`), requests to stores that have to be made again, and other libraries' warnings; but what the Delta library calls an error
/// comes back to us, and is told once.
fn start_logging(format: LogFormat, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    let default = if quiet {
        "error,delta_kernel=off"
    } else {
        "warn,lookalike=info,ort=error,object_store::client::retry=info,delta_kernel=off"
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(console::colors_enabled_stderr());
    match format {
        LogFormat::Text => subscriber.with_writer(|| Redacting(FoldedStderr)).with_target(false).init(),
        LogFormat::Json => subscriber.with_writer(|| Redacting(Stderr)).json().init(),
    }
}

/// The form of the log that a command line asks for which cannot be parsed.
fn log_format_asked() -> LogFormat {
    let args: Vec<OsString> = std::env::args_os().collect();
    let is_json = args.iter().any(|arg| arg == "--log-format=json")
        || args.windows(2).any(|pair| pair[0] == "--log-format" && pair[1] == "json");
    if is_json { LogFormat::Json } else { LogFormat::Text }
}

/// Says what is wrong with the command line, or, when that was asked for, prints its help.
fn refuse(error: &clap::Error, format: LogFormat) -> ExitCode {
    if !error.use_stderr() {
        // Help; there is nobody to tell when it cannot be printed.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render();
    let line = match format {
        LogFormat::Text if console::colors_enabled_stderr() => text.ansi().to_string(),
        LogFormat::Text => text.to_string(),
        LogFormat::Json => {
            let text = text.to_string();
            let message = text.trim().trim_start_matches("error: ");
            LogFormat::json_line("ERROR", &json!({"message": message, "exit_code": ExitStatus::Usage as u8}))
        }
    };
    say_last(line.trim_end());
    ExitCode::from(ExitStatus::Usage as u8)
}

/// Says what failed, why, and what to do: the error, its causes, and a hint.
fn explain(error: &Error, format: LogFormat) {
    if format == LogFormat::Json {
        say_last(&LogFormat::json_line("ERROR", &explanation(error)));
        return;
    }
    if let Error::Config(error) = error {
        say_last(&format!("{:?}", miette::Report::new(error.as_ref().clone())));
        return;
    }
    say_last(&fold_to_terminal(&format!("error: {error}")));
    for cause in error.causes() {
        say_last(&fold_to_terminal(&format!("  because: {cause}")));
    }
    if let Some(hint) = error.hint() {
        say_last(&fold_to_terminal(&format!("  hint: {hint}")));
    }
}

/// The same for a machine. A pipeline file may have several problems, each with its line and hint.
fn explanation(error: &Error) -> serde_json::Value {
    let mut fields = json!({
        "message": error.to_string(),
        "causes": error.causes(),
        "hint": error.hint(),
        "exit_code": error.exit_status() as u8,
    });
    if let Error::Config(error) = error {
        let problems = error.problems().iter().map(|problem| {
            json!({"message": problem.to_string(), "line": error.line(problem), "hint": problem.fault().help()})
        });
        fields["problems"] = problems.collect();
    }
    fields
}

/// Has panics told like everything else: without secrets, in the form asked for.
pub fn tell_panics(format: LogFormat) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("without a name");
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
        match format {
            LogFormat::Text => {
                say_last(&format!("thread '{thread}' {panic}"));
                if let Some(backtrace) = backtrace {
                    say_last(&backtrace);
                }
            }
            LogFormat::Json => {
                let fields = json!({"message": panic.to_string(), "thread": thread, "backtrace": backtrace});
                say_last(&LogFormat::json_line("ERROR", &fields));
            }
        }
    }));
}

/// Says a line when there is no context to say it through, or no way to go on if it cannot be said.
fn say_last(line: &str) {
    let _ = write_line(&mut Stderr, line);
}
