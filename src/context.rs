//! What a process has one of: threads for input and output, object stores, and a way to talk.
//!
//! Standard output is for data that could be piped on; everything said to a person goes to standard error.

use std::fmt;
use std::future::Future;
use std::io::{IsTerminal as _, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{SecondsFormat, Utc};
use console::{Term, measure_text_width, truncate_str};
use indicatif::{
    HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, WeakProgressBar,
};
use serde_json::json;
use url::Url;

use crate::config::{self, Pipeline};
use crate::decode::DecodeLimits;
use crate::error::Error;
use crate::lineage::Lineage;
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

/// Time between two looks of a bar, so that its clock goes on while images take long.
const BAR_EVERY: Duration = Duration::from_millis(200);

/// Columns of a bar at most, and at least: a shorter one says nothing.
const BAR_COLUMNS: (usize, usize) = (10, 30);

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
    /// Where it is told what runs read and write; nowhere, unless [`Context::with_lineage`] says so.
    pub lineage: Lineage,
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
            lineage: Lineage::default(),
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

    /// Sets where it is told what runs read and write.
    #[must_use]
    pub fn with_lineage(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
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

    /// Says a line to the person at the terminal, without secrets. Lines that are wider than the terminal are broken between words.
    pub fn say(&self, line: &str) -> Result<(), Error> {
        self.say_shaped(line, fold)
    }

    /// Says a row of a table. One that is wider than the terminal is cut.
    pub fn say_row(&self, row: &str) -> Result<(), Error> {
        self.say_shaped(row, |row, columns| truncate_str(row, columns, "…").into_owned())
    }

    fn say_shaped(&self, line: &str, shape: impl Fn(&str, usize) -> String) -> Result<(), Error> {
        if self.quiet {
            return Ok(());
        }
        let line = match self.log_format {
            LogFormat::Text => self.columns().map_or_else(|| line.to_owned(), |columns| shape(line, columns)),
            LogFormat::Json => LogFormat::json_line("INFO", &json!({"message": line.trim()})),
        };
        write_line(&mut Stderr, &line)
    }

    /// Columns of the terminal that lines are said to; `None` where they go elsewhere, or are for programs.
    pub fn columns(&self) -> Option<usize> {
        terminal_columns().filter(|_| self.log_format == LogFormat::Text)
    }

    /// Shows how far a stage has come, of so many rows where that is known.
    pub fn progress(&self, stage: &'static str, num_rows: Option<u64>) -> Progress {
        // A terminal that cannot go back on its line would show every look of the bar.
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let can_be_shown = std::io::stderr().is_terminal() && !is_dumb && num_rows != Some(0);
        let on_terminal = can_be_shown && !self.quiet && self.log_format == LogFormat::Text;
        let target = if on_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(num_rows, target);
        let num_rejected = Arc::new(AtomicU64::new(0));
        if on_terminal {
            let num_rejected = Arc::clone(&num_rejected);
            let look = move |state: &ProgressState, out: &mut dyn fmt::Write| {
                let columns = terminal_columns().unwrap_or(usize::MAX);
                let _ = out.write_str(&look(stage, state, num_rejected.load(Ordering::Relaxed), columns));
            };
            let style = ProgressStyle::with_template("{look}").unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.with_key("look", look));
            *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.downgrade());
            bar.enable_steady_tick(BAR_EVERY);
        }
        Progress { stage, num_rows, bar, on_terminal, num_rejected, said_at: Mutex::new(Instant::now()) }
    }
}

/// The bar that is on the terminal, which others must not write into.
static SHOWN: Mutex<Option<WeakProgressBar>> = Mutex::new(None);

/// Standard error, beside a bar: it is taken away while something else is written, and then shown again.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let bar = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(WeakProgressBar::upgrade);
        let write = || std::io::stderr().write(bytes);
        bar.map_or_else(write, |bar| bar.suspend(write))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// [`Stderr`], with lines that are wider than the terminal broken between words.
pub(crate) struct FoldedStderr;

impl Write for FoldedStderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Stderr.write_all(fold_to_terminal(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Stderr.flush()
    }
}

/// Columns of the terminal that standard error is; `None` where it is none.
fn terminal_columns() -> Option<usize> {
    Term::stderr().size_checked().map(|(_, columns)| columns.into())
}

/// Breaks lines that are wider than the terminal, where there is one.
pub(crate) fn fold_to_terminal(text: &str) -> String {
    terminal_columns().map_or_else(|| text.to_owned(), |columns| fold(text, columns))
}

/// Breaks lines that are wider than so many columns between words; what follows is indented by two more. A word that is wider by itself
/// stays whole.
fn fold(text: &str, columns: usize) -> String {
    let fold_line = |line: &str| {
        let indent = line.len() - line.trim_start().len() + 2;
        let mut lines: Vec<String> = Vec::new();
        for word in line.split(' ') {
            match lines.last_mut() {
                Some(last) if measure_text_width(last) + 1 + measure_text_width(word) <= columns => {
                    last.push(' ');
                    last.push_str(word);
                }
                Some(last) if !last.trim().is_empty() => lines.push(format!("{:indent$}{word}", "")),
                Some(last) => last.extend([" ", word]),
                None => lines.push(word.to_owned()),
            }
        }
        lines.join("\n")
    };
    text.split('\n').map(fold_line).collect::<Vec<_>>().join("\n")
}

/// A line that says how far a stage has come, narrower than so many columns; with a bar where there is room.
fn look(stage: &str, state: &ProgressState, num_rejected: u64, columns: usize) -> String {
    let per_sec = state.per_sec();
    let decimals = usize::from(per_sec < 10.0);
    let of = state.len().map(|num_rows| format!("/{}", HumanCount(num_rows)));
    let left = state.len().filter(|_| state.pos() > 0).map(|_| format!(", {:#} left", HumanDuration(state.eta())));
    let rejected = (num_rejected > 0).then(|| format!(", {} rejected", HumanCount(num_rejected)));
    let [of, left, rejected] = [of, left, rejected].map(Option::unwrap_or_default);
    let text = format!("{}{of} images, {per_sec:.decimals$}/s{left}{rejected}", HumanCount(state.pos()));
    lay_out(stage, &text, state.len().map(|_| state.fraction()), columns)
}

/// Puts the stage before a text, and between them a bar that is filled to a share, where there is room for one.
fn lay_out(stage: &str, text: &str, share: Option<f32>, columns: usize) -> String {
    // The last column is left to the cursor.
    let columns = columns.saturating_sub(1);
    let (least, most) = BAR_COLUMNS;
    let room = columns.saturating_sub(measure_text_width(stage) + measure_text_width(text) + " [] ".len()).min(most);
    let line = match share.filter(|_| room >= least) {
        Some(share) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a few columns")]
            let filled = ((room as f32 * share) as usize).min(room);
            format!("{stage} [{}{}] {text}", "#".repeat(filled), "-".repeat(room - filled))
        }
        None => format!("{stage} {text}"),
    };
    truncate_str(&line, columns, "…").into_owned()
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
    num_rejected: Arc<AtomicU64>,
    said_at: Mutex<Instant>,
}

impl Progress {
    /// Counts rows that are done, and how many of them were rejected.
    pub fn advance(&self, rows: u64, rejected: u64) {
        self.num_rejected.fetch_add(rejected, Ordering::Relaxed);
        self.bar.inc(rows);
        self.say();
    }

    /// Says that `done` of `of` steps are done, where rows are not done one after the other.
    pub fn reach(&self, done: usize, of: usize) {
        let rows = self.num_rows.unwrap_or(0) as f64 * done as f64 / of.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a number of rows")]
        self.bar.set_position(rows as u64);
        self.say();
    }

    fn say(&self) {
        if self.on_terminal {
            return;
        }
        let mut said_at = self.said_at.lock().unwrap_or_else(PoisonError::into_inner);
        if said_at.elapsed() >= PROGRESS_EVERY {
            *said_at = Instant::now();
            let per_sec = self.bar.per_sec().round();
            let left_secs = self.num_rows.map(|_| self.bar.eta().as_secs());
            tracing::info!(
                stage = self.stage,
                rows = self.bar.position(),
                of = self.num_rows,
                rejected = self.num_rejected.load(Ordering::Relaxed),
                per_sec,
                left_secs,
                "working"
            );
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_gives_way_to_what_is_said_and_that_is_cut_last() {
        let text = "1,000,000/2,000,000 images, 1234/s, 13m left, 12,345 rejected";
        for columns in [100, 80, 70, 60, 40, 20] {
            let line = lay_out("embed", text, Some(0.5), columns);
            assert!(measure_text_width(&line) < columns, "{columns}: {line}");
        }
        assert!(lay_out("embed", text, Some(0.5), 120).contains(&format!(
            "[{}{}] 1,0",
            "#".repeat(15),
            "-".repeat(15)
        )));
        assert_eq!(lay_out("embed", text, Some(0.5), 70), format!("embed {text}"));
        assert_eq!(lay_out("embed", text, Some(0.5), 30), "embed 1,000,000/2,000,000 im…");
        assert_eq!(lay_out("embed", "3 images", None, 80), "embed 3 images");
        assert!(lay_out("embed", "3/3 images", Some(1.0), 40).ends_with("#] 3/3 images"));
    }

    #[test]
    fn lines_are_broken_between_words_and_words_stay_whole() {
        assert_eq!(fold("a line that fits", 16), "a line that fits");
        assert_eq!(fold("a line that does not", 16), "a line that does\n  not");
        assert_eq!(fold("  an indented one", 12), "  an\n    indented\n    one");
        assert_eq!(fold("\ntables: file:///a/long/name", 12), "\ntables:\n  file:///a/long/name");
    }
}
