//! The command line: what can be typed, as it is typed. What it means is settled in [`crate::config`].

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::{self, fit::FitSettings, load_pipeline};
use crate::config::{Device, Overrides, Pipeline};
use crate::context::Context;
use crate::decode::{Color, Filter, Fit};
use crate::error::{Error, ExitStatus};
use crate::model::{Runtime, RuntimeError};

const EXIT_CODES: &str = "Exit codes: 0 committed or nothing to do, 1 unexpected, 2 usage or pipeline file, 3 committed but more \
images rejected than allowed, 4 data or model not as agreed, 5 transient (running again is safe), 6 something missing on this machine";

const GLOBAL: &str = "Global options";

const LIBRARY_HELP: &str = "ONNX Runtime library to use (else: the variable ORT_DYLIB_PATH, ../lib beside the program, \
.cache/onnxruntime, the active Python environment, the system)";

const LOG_HELP: &str = "Form of the log lines on standard error; the variable RUST_LOG says what is logged, and summaries and errors \
stay text";

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

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Embed, find neighbors, flag, and publish what changed
    Run(RunArgs),
    /// Show what a run would do; write nothing
    Plan {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        compute: ComputeArgs,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Run the embed stage alone: images to latents
    Embed {
        #[command(flatten)]
        pipeline: PipelineArgs,
        #[command(flatten)]
        compute: ComputeArgs,
    },
    /// Run the neighbors stage alone: latents to neighbors
    Neighbors(PipelineArgs),
    /// Run the flag stage alone: latents to anomalies
    Flag(PipelineArgs),
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
        /// Print one JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show everything the tables know of one image
    Explain {
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Id of the image
        image_id: String,
    },
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
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
    /// Number of latents (else: 64, or a quarter of the images if that is fewer)
    #[arg(long, value_name = "K")]
    latent_dim: Option<usize>,
    /// Height of the model's input in pixels
    #[arg(long, default_value_t = commands::fit::DEFAULT_SIDE, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    height: u32,
    /// Width of the model's input in pixels
    #[arg(long, default_value_t = commands::fit::DEFAULT_SIDE, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    width: u32,
    /// Color of the model's input
    #[arg(long, value_enum, default_value_t = Color::Rgb)]
    color: Color,
    /// How pixels are resampled
    #[arg(long, value_enum, default_value_t = Filter::Bilinear)]
    filter: Filter,
    /// How images of another shape are fitted
    #[arg(long, value_enum, default_value_t = Fit::Stretch)]
    fit: Fit,
}

impl OverrideArgs {
    fn resolve(&self, compute: &ComputeArgs, context: &Context) -> Overrides {
        Overrides {
            current_dir: context.current_dir.clone(),
            source_table: None,
            predicate: self.predicate.clone(),
            model_package: self.model.clone(),
            device: compute.device,
            batch_size: compute.batch_size,
            workers: compute.workers,
            output_table: self.out.clone(),
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
    let cli = Cli::parse();
    start_logging(cli.log_format, cli.quiet);
    let status = match run(&cli) {
        Ok(status) => status,
        Err(error) => {
            explain(&error);
            error.exit_status()
        }
    };
    ExitCode::from(status as u8)
}

fn run(cli: &Cli) -> Result<ExitStatus, Error> {
    let context = Context::new(cli.onnxruntime.clone(), cli.quiet)?;
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
        Command::Run(args) => match (&args.file, &args.images) {
            (Some(file), _) => {
                let pipeline = load_pipeline(&context, file, &args.overrides.resolve(&args.compute, &context))?;
                commands::run::run(&context, &pipeline)
            }
            (None, images) => {
                let out = args.overrides.out.clone().unwrap_or_default();
                let mut overrides = args.overrides.resolve(&args.compute, &context);
                let is_model_named = overrides.model_package.is_some();
                overrides.model_package.get_or_insert_with(|| format!("{}/model", out.trim_end_matches('/')));
                let pipeline = Pipeline::for_images(images.as_deref().unwrap_or_default(), &out, &overrides)?;
                commands::run::run_images(&context, &pipeline, is_model_named)
            }
        },
        Command::Plan { pipeline, compute, json } => {
            commands::plan::plan(&context, &pipeline.load_with(compute, &context)?, *json)
        }
        Command::Embed { pipeline, compute } => {
            commands::run::run_embed(&context, &pipeline.load_with(compute, &context)?)
        }
        Command::Neighbors(pipeline) => commands::run::run_neighbors(&context, &pipeline.load(&context)?),
        Command::Flag(pipeline) => commands::run::run_flag(&context, &pipeline.load(&context)?),
        Command::Fit(args) => {
            let settings = FitSettings {
                latent_dim: args.latent_dim,
                height: args.height,
                width: args.width,
                color: args.color,
                filter: args.filter,
                fit: args.fit,
            };
            commands::fit::fit(&context, &args.pipeline.load_with(&args.compute, &context)?, &settings)
        }
        Command::Calibrate { pipeline, compute, to } => {
            commands::calibrate::calibrate(&context, &pipeline.load_with(compute, &context)?, to.as_deref())
        }
        Command::Evaluate { pipeline, positive, negative, json } => {
            commands::evaluate::evaluate(&context, &pipeline.load(&context)?, positive, negative, *json)
        }
        Command::Explain { pipeline, image_id } => {
            commands::explain::explain(&context, &pipeline.load(&context)?, image_id)
        }
        Command::Completions { shell } => Ok(commands::completions::completions(*shell)),
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
/// `error`), and other libraries' warnings.
fn start_logging(format: LogFormat, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    let default = if quiet { "error" } else { "warn,lookalike=info,ort=error" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => subscriber.with_target(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

/// Says what failed, why, and what to do: the error, its causes, and a hint.
#[expect(clippy::print_stderr, reason = "the last words of the process; there is no context to say them through")]
fn explain(error: &Error) {
    if let Error::Config(error) = error {
        eprintln!("{:?}", miette::Report::new(error.as_ref().clone()));
        return;
    }
    eprintln!("error: {error}");
    let mut last = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        // Some wrappers repeat what they wrap.
        let text = error.to_string();
        if !last.contains(&text) {
            eprintln!("  because: {text}");
        }
        last = text;
        cause = error.source();
    }
    if let Some(hint) = error.hint() {
        eprintln!("  hint: {hint}");
    }
}
