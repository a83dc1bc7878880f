//! What a process has one of: threads for input and output, object stores, and a way to talk.
//!
//! Standard output is for data that could be piped on; everything said to a person goes to standard error.

use std::fmt;
use std::future::Future;
use std::io::{IsTerminal as _, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use chrono::{SecondsFormat, Utc};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use url::Url;

use crate::config::{self, Pipeline};
use crate::decode::DecodeLimits;
use crate::error::Error;
use crate::pass::Pass;
use crate::redact::redact_line;
use crate::source::Source;
use crate::stop::Stop;
use crate::store::{Store, Stores};

/// A pass over images may have one in so many bytes of `execution.memory_limit` under way. The rest is for what it cannot count: the
/// network's own memory, images while they are decoded, row groups being written.
const PASS_SHARE: u64 = 4;

/// Seconds between two lines of progress where there is no terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What a process has one of.
#[derive(Debug)]
pub struct Context {
    runtime: tokio::runtime::Runtime,
    /// The object stores.
    pub stores: Stores,
    /// The ONNX Runtime library that the command line names.
    pub onnxruntime: Option<PathBuf>,
    /// The folder that relative paths of the command line refer to.
    pub current_dir: PathBuf,
    /// Whether the process has been told to stop.
    pub stop: Stop,
    quiet: bool,
    log_format: LogFormat,
    output: Output,
}

/// Form of what goes to standard error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

impl LogFormat {
    /// A line of the log, in the form in which `tracing` writes its events: for what is said past it.
    pub(crate) fn json_line(level: &str, fields: &serde_json::Value) -> String {
        let timestamp = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true);
        json!({"timestamp": timestamp, "level": level, "fields": fields, "target": env!("CARGO_PKG_NAME")}).to_string()
    }
}

/// Where lines of data go.
struct Output(Mutex<Box<dyn Write + Send>>);

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Output")
    }
}

impl Context {
    /// Starts the process's threads for input and output, and connects to stores as the environment says.
    pub fn new(onnxruntime: Option<PathBuf>, quiet: bool) -> Result<Self, Error> {
        Self::with_stores(Stores::default(), onnxruntime, quiet)
    }

    /// Starts the process's threads for input and output; buckets that `stores` has clients for are reached by these.
    pub fn with_stores(stores: Stores, onnxruntime: Option<PathBuf>, quiet: bool) -> Result<Self, Error> {
        let io = |action: &str| {
            let action = action.to_owned();
            move |source| Error::Io { action, source }
        };
        Ok(Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .map_err(io("start the threads for input and output"))?,
            stores,
            onnxruntime,
            current_dir: std::env::current_dir().map_err(io("find the working folder"))?,
            stop: Stop::default(),
            quiet,
            log_format: LogFormat::default(),
            output: Output(Mutex::new(Box::new(std::io::stdout()))),
        })
    }

    /// Sets the form of what is said.
    #[must_use]
    pub fn with_log_format(self, log_format: LogFormat) -> Self {
        Self { log_format, ..self }
    }

    /// Sends lines of data to `output` instead of standard output, for a program that runs pipelines inside itself.
    #[must_use]
    pub fn printing_to(self, output: impl Write + Send + 'static) -> Self {
        Self { output: Output(Mutex::new(Box::new(output))), ..self }
    }

    /// Waits for a store or a table.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// For code that runs its own requests.
    pub fn handle(&self) -> &tokio::runtime::Handle {
        self.runtime.handle()
    }

    /// Threads that work on images: as set, or as many as this process may use, divided by those of their sessions.
    pub fn workers(&self, pipeline: &Pipeline) -> usize {
        let execution = &pipeline.execution;
        execution.workers.map_or_else(|| (self.cores() / execution.threads).max(1), NonZeroUsize::get)
    }

    /// Threads that this process may have at work at a time.
    pub fn cores(&self) -> usize {
        std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
    }

    /// The settings of a pass over the images of a source.
    pub fn pass<'a>(&self, pipeline: &Pipeline, source: &'a Source) -> Pass<'a> {
        Pass {
            source,
            limits: DecodeLimits {
                max_image_bytes: pipeline.limits.max_image_bytes.get(),
                max_pixels: pipeline.limits.max_pixels.get(),
                max_decode: Duration::from_secs(pipeline.limits.max_decode_secs.get()),
            },
            decode: pipeline.execution.decode,
            batch_size: pipeline.execution.batch_size,
            workers: self.workers(pipeline),
            max_bytes: pipeline.execution.memory_limit.get() / PASS_SHARE,
            only_ids: None,
            runtime: self.handle().clone(),
            stop: self.stop.clone(),
        }
    }

    /// The folder of a file's URL, and the file's name.
    pub fn open_file(&self, url: &Url) -> Result<(Store, String), Error> {
        let mut folder = url.clone();
        let (parent, name) = url.path().rsplit_once('/').unwrap_or(("", url.path()));
        folder.set_path(&format!("{parent}/"));
        let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned();
        Ok((self.stores.open(&folder)?, name))
    }

    /// The location that an option of the command line names.
    pub fn locate(&self, option: &str, location: &str) -> Result<Url, Error> {
        config::resolve_location(location, &self.current_dir)
            .map_err(|fault| Error::Usage { message: format!("{option} {fault}"), hint: fault.help() })
    }

    /// Writes a line of data to standard output, or where [`Context::printing_to`] says, without secrets.
    pub fn print(&self, line: &str) -> Result<(), Error> {
        write_line(&mut **self.output.0.lock().unwrap_or_else(PoisonError::into_inner), line)
    }

    /// Says a line to the person at the terminal, without secrets.
    pub fn say(&self, line: &str) -> Result<(), Error> {
        if self.quiet {
            return Ok(());
        }
        match self.log_format {
            LogFormat::Text => write_line(&mut std::io::stderr().lock(), line),
            LogFormat::Json => {
                let line = LogFormat::json_line("INFO", &json!({"message": line.trim()}));
                write_line(&mut std::io::stderr().lock(), &line)
            }
        }
    }

    /// Shows how far a stage has come, of so many rows where that is known.
    pub fn progress(&self, stage: &'static str, num_rows: Option<u64>) -> Progress {
        let on_terminal = std::io::stderr().is_terminal() && !self.quiet && self.log_format == LogFormat::Text;
        let target = if on_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(num_rows, target);
        let style = match num_rows {
            Some(_) => "{prefix:>10} [{bar:30}] {human_pos}/{human_len} images, {per_sec:.0}, {eta} left{msg}",
            None => "{prefix:>10} {spinner} {human_pos} images, {per_sec:.0}{msg}",
        };
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(stage);
        Progress {
            stage,
            num_rows,
            bar,
            on_terminal,
            said: Mutex::new(Said { at: Instant::now(), rows: 0, rejected: 0 }),
        }
    }
}

/// Writes a line without its secrets. A reader that closed its end has had enough; that is no error.
pub(crate) fn write_line(out: &mut dyn Write, line: &str) -> Result<(), Error> {
    match writeln!(out, "{}", redact_line(line)) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Io { action: "write to the terminal".to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// A bar on a terminal, a line every few seconds elsewhere.
#[derive(Debug)]
pub struct Progress {
    stage: &'static str,
    num_rows: Option<u64>,
    bar: ProgressBar,
    on_terminal: bool,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    rows: u64,
    rejected: u64,
}

impl Progress {
    /// Counts rows that are done, and how many of them were rejected.
    pub fn advance(&self, rows: u64, rejected: u64) {
        self.bar.inc(rows);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.rows += rows;
        said.rejected += rejected;
        if rejected > 0 {
            self.bar.set_message(format!(", {} rejected", said.rejected));
        }
        if !self.on_terminal && said.at.elapsed() >= PROGRESS_EVERY {
            said.at = Instant::now();
            tracing::info!(
                stage = self.stage,
                rows = said.rows,
                of = self.num_rows,
                rejected = said.rejected,
                "working"
            );
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
