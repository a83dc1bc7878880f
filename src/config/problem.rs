//! What can be wrong with a pipeline file, and how it is told.
//!
//! A [`Fault`] is one wrong thing in the domain's words, a [`Problem`] is a fault at its place, and a [`ConfigError`] is
//! all problems of one file together with the file's text, with secrets covered. Finding faults is not done here.

use std::error::Error;
use std::fmt::{self, Display};
use std::ops::Range;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};

use super::location::LocationFault;
use crate::redact::{self, redact};

/// Least Jaro-Winkler similarity of a misspelling to the name meant. At 0.8, `tabel`, `batchsize` and `neighbours` find
/// their keys, and words that have nothing to do with any key find none.
const MIN_SIMILARITY: f64 = 0.8;

/// Flags that give a required key in place of the file.
pub(super) const SOURCE_FLAG: &str = "--images";
pub(super) const MODEL_FLAG: &str = "--model";
pub(super) const OUTPUT_FLAG: &str = "--out";

/// One line for each key that can be in a pipeline file, shown where that key is missing or cannot be read.
pub(super) const EXAMPLES: [(&str, &str); 52] = [
    ("pipeline.name", r#"name = "cells""#),
    ("source.table", r#"table = "s3://lake/images""#),
    ("source.format", r#"format = "parquet""#),
    ("source.id", r#"id = "image_id""#),
    ("source.image", r#"image = "image""#),
    ("source.columns", r#"columns = ["module", "defect"]"#),
    ("source.where", r#"where = "defect = 0""#),
    ("source.duplicates", r#"duplicates = "keep_first""#),
    ("source.partition", r#"partition = ["ds"]"#),
    ("model.package", r#"package = "s3://models/solar/3""#),
    ("model.sha256", r#"sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855""#),
    ("model.elbo_samples", "elbo_samples = 16"),
    ("execution.device", r#"device = "cpu""#),
    ("execution.batch_size", "batch_size = 8"),
    ("execution.workers", "workers = 4"),
    ("execution.threads", "threads = 1"),
    ("execution.unit_rows", "unit_rows = 32768"),
    ("execution.memory_limit", r#"memory_limit = "4GiB""#),
    ("execution.decode", r#"decode = "exact""#),
    ("execution.tf32", "tf32 = false"),
    ("execution.gpu_memory_limit", r#"gpu_memory_limit = "8GiB""#),
    ("neighbors.enabled", "enabled = true"),
    ("neighbors.k", "k = 10"),
    ("neighbors.metric", r#"metric = "cosine""#),
    ("neighbors.scope", r#"scope = "corpus""#),
    ("neighbors.reference", r#"reference = "s3://lake/train""#),
    ("neighbors.search", r#"search = "auto""#),
    ("neighbors.recall", "recall = 0.99"),
    ("neighbors.nprobe", "nprobe = 16"),
    ("neighbors.cells", "cells = 1024"),
    ("neighbors.duplicate_distance", "duplicate_distance = 0.05"),
    ("anomaly.enabled", "enabled = true"),
    ("anomaly.rule", r#"rule = "mean_squared_error""#),
    ("anomaly.threshold", "threshold = { contamination = 0.05 }"),
    ("anomaly.threshold.contamination", "threshold = { contamination = 0.05 }"),
    ("anomaly.threshold.quantile", "threshold = { quantile = 0.95 }"),
    ("anomaly.threshold.value", "threshold = { value = 0.01 }"),
    ("anomaly.threshold.fdr", "threshold = { fdr = 0.1 }"),
    ("anomaly.reference", r#"reference = "s3://lake/reference.parquet""#),
    ("anomaly.segment", r#"segment = "module""#),
    ("anomaly.k", "k = 1"),
    ("encoder.package", r#"package = "s3://models/encoder/1""#),
    ("encoder.sha256", r#"sha256 = "…""#),
    ("drift.enabled", "enabled = true"),
    ("drift.alpha", "alpha = 0.01"),
    ("report.enabled", "enabled = true"),
    ("output.table", r#"table = "s3://lake/lookalike""#),
    ("output.publish", r#"publish = "delta""#),
    ("limits.max_image_bytes", r#"max_image_bytes = "64MiB""#),
    ("limits.max_pixels", "max_pixels = 67108864"),
    ("limits.max_decode_secs", "max_decode_secs = 30"),
    ("limits.max_rejected_fraction", "max_rejected_fraction = 0.1"),
];

/// One wrong thing in a pipeline.
///
/// Keys are written with their table, as `source.table`, or as the flag that replaces them, as `--images`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The text is not TOML.
    #[error("not valid TOML: {detail}")]
    Syntax {
        /// What the TOML parser found.
        detail: String,
    },
    /// A key or table that does not exist.
    #[error("unknown key `{key}` in {}", table_name(table))]
    UnknownKey {
        /// The key as written.
        key: String,
        /// The table it is in; empty for the top level.
        table: String,
        /// The keys of that table.
        allowed: Vec<String>,
    },
    /// A value that is none of the choices.
    #[error("`{key}` cannot be `{value}`")]
    UnknownValue {
        /// The key.
        key: String,
        /// The value as written.
        value: String,
        /// The choices.
        allowed: Vec<String>,
    },
    /// A value of another type than the key has.
    #[error("`{key}` cannot be read: {detail}")]
    Unreadable {
        /// The key.
        key: String,
        /// What was found and what was expected.
        detail: String,
    },
    /// A required key that is not given.
    #[error("`{key}` is required and not given")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A number outside its range.
    #[error("`{key}` is {value}, outside of {range}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// The number as written.
        value: String,
        /// The range, as text.
        range: String,
    },
    /// A text that does not have the form it needs.
    #[error("`{key}` is not {expected}")]
    Malformed {
        /// The key.
        key: &'static str,
        /// The form.
        expected: &'static str,
    },
    /// A location that cannot be used.
    #[error("`{key}` {source}")]
    Location {
        /// The key.
        key: &'static str,
        /// Why not.
        source: LocationFault,
    },
    /// No way, or several ways, to find the anomaly threshold.
    #[error(
        "`anomaly.threshold` needs exactly one of `contamination`, `quantile`, `value` and `fdr`, and has {num_given}"
    )]
    ThresholdChoice {
        /// How many are given.
        num_given: usize,
    },
    /// A table to search that the scope does not search.
    #[error("`neighbors.reference` names a table, and `neighbors.scope` does not search it")]
    UnusedReference,
    /// A source column that would appear twice in the output.
    #[error("`{key}` names the column `{column}`, which the output has already as {other}")]
    RepeatedColumn {
        /// The key.
        key: &'static str,
        /// The column.
        column: String,
        /// What it is already.
        other: &'static str,
    },
    /// A key about columns where the source has none.
    #[error("`{key}` is about columns, and a source of format `directory` has none")]
    NoColumns {
        /// The key.
        key: &'static str,
    },
    /// A key that says what the id or the image is, where names of members say it.
    #[error("`{key}` is not for a source of format `webdataset`, where the names in the archives say it")]
    NamesDecide {
        /// The key.
        key: &'static str,
    },
    /// A distance that does not say whether two images are the same.
    #[error(
        "`neighbors.duplicate_distance` needs a metric by which an image is nearest to itself, and `inner_product` is none"
    )]
    DuplicatesByInnerProduct,
    /// What there is for a table that is searched itself, and not for another one.
    #[error("`{key}` is about the neighbors of images within a table, and `neighbors.scope` searches another one")]
    NotInReference {
        /// The key.
        key: &'static str,
    },
    /// Output that the next run would read as source.
    #[error("`{key}` lies in `source.table`: the next run would read these tables as images")]
    OutputInSource {
        /// The key.
        key: &'static str,
    },
}

impl Fault {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Syntax { .. } => {
                "a pipeline file has [tables] with lines `key = value`; texts are in quotes".to_owned()
            }
            Self::UnknownKey {
                key,
                table,
                allowed,
            } => {
                let what = if table.is_empty() { "tables" } else { "keys" };
                let list = quoted(allowed);
                format!("{}{what} of {}: {list}", did_you_mean(key, allowed), table_name(table))
            }
            Self::UnknownValue { value, allowed, .. } => {
                format!("{}supported: {}", did_you_mean(value, allowed), quoted(allowed))
            }
            Self::Unreadable { key, .. } => match example(key) {
                Some(example) => format!("for example: {example}"),
                None => format!("start a table with a line [{key}]"),
            },
            Self::Missing { key } => {
                let table = key.split('.').next().unwrap_or_default();
                let example = example(key).unwrap_or_default();
                let flag = match *key {
                    "source.table" => format!(" (or give {SOURCE_FLAG})"),
                    "model.package" => format!(" (or give {MODEL_FLAG})"),
                    "output.table" => format!(" (or give {OUTPUT_FLAG})"),
                    _ => String::new(),
                };
                format!("add to [{table}]: {example}{flag}")
            }
            Self::OutOfRange { range, .. } => format!("give a number in {range}"),
            Self::Malformed { key, .. } => match example(key) {
                Some(example) => format!("for example: {example}"),
                None => "leave the flag out if it is not needed".to_owned(),
            },
            Self::Location { source, .. } => source.help(),
            Self::ThresholdChoice { .. } => {
                "keep one: the share of the reference above the cutoff, a quantile of the reference, the cutoff itself, or the share of flags that may be false"
                    .to_owned()
            }
            Self::UnusedReference => "set scope = \"reference\", or leave the table out".to_owned(),
            Self::RepeatedColumn { .. } => {
                "name a column once, and rename it in the source where the name is taken".to_owned()
            }
            Self::NoColumns { .. } => {
                "leave it out: the relative path of a file is its id, and its content the image".to_owned()
            }
            Self::NamesDecide { .. } => {
                "leave it out: a sample's key is its id, and its member with the extension of an image the image".to_owned()
            }
            Self::DuplicatesByInnerProduct => "set metric = \"cosine\" or \"l2\"".to_owned(),
            Self::NotInReference { .. } => {
                "leave it out: another table is searched exactly, and `lookalike compare-tables` counts the images that it has too".to_owned()
            }
            Self::OutputInSource { .. } => {
                "give a prefix beside the source, such as `s3://lake/lookalike` beside `s3://lake/images`".to_owned()
            }
        }
    }

    /// A few words for the place in the file.
    fn label(&self) -> &'static str {
        match self {
            Self::Syntax { .. } => "here",
            Self::UnknownKey { .. } => "no such key",
            Self::UnknownValue { .. } => "no such choice",
            Self::Unreadable { .. } => "wrong type or form",
            Self::Missing { .. } => "missing here",
            Self::OutOfRange { .. } => "out of range",
            Self::Malformed { .. } => "wrong form",
            Self::Location { .. } => "this location",
            Self::ThresholdChoice { .. } => "exactly one",
            Self::UnusedReference => "not searched",
            Self::RepeatedColumn { .. } => "name already taken",
            Self::NoColumns { .. } => "not with `directory`",
            Self::NamesDecide { .. } => "not with `webdataset`",
            Self::DuplicatesByInnerProduct => "not with `inner_product`",
            Self::NotInReference { .. } => "not with `reference`",
            Self::OutputInSource { .. } => "inside the source",
        }
    }
}

/// One fault at its place in the pipeline file.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}", redact(&fault.to_string()))]
pub struct Problem {
    fault: Fault,
    /// Bytes of the file. `None` for flags and for what is missing altogether.
    span: Option<Range<usize>>,
}

impl Problem {
    /// What is wrong.
    pub fn fault(&self) -> &Fault {
        &self.fault
    }
}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn Display + 'a>> {
        Some(Box::new(redact(&self.fault.help()).into_owned()))
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.span.clone()?;
        let label = self.fault.label().to_owned();
        let label = LabeledSpan::new(Some(label), span.start, span.len());
        Some(Box::new(std::iter::once(label)))
    }
}

/// Everything that is wrong with one pipeline, in the order of the file.
///
/// The text kept for display has asterisks over everything that may be a secret, and so have the messages. For the same
/// reason the errors of the parsers are not kept as sources: they carry the text as it was.
#[derive(Debug, Clone)]
pub struct ConfigError {
    text: NamedSource<String>,
    problems: Vec<Problem>,
}

impl ConfigError {
    /// The problems, at least one, in the order of the file; those without a place come last.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    pub(super) fn new(problems: Problems, text: &str, file_name: &str) -> Self {
        let mut shown = redact(text).into_owned();
        for span in problems.secret_spans {
            redact::hide(&mut shown, span);
        }
        let mut list = problems.list;
        list.sort_by_key(|problem| problem.span.as_ref().map_or(usize::MAX, |span| span.start));
        Self { text: NamedSource::new(file_name, shown), problems: list }
    }

    /// The line of a problem, from 1.
    pub fn line(&self, problem: &Problem) -> Option<usize> {
        let start = problem.span.as_ref()?.start;
        let before = self.text.inner().get(..start)?;
        Some(1 + before.matches('\n').count())
    }
}

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file_name = self.text.name();
        if let [problem] = self.problems.as_slice() {
            return match self.line(problem) {
                Some(line) => write!(f, "{file_name}, line {line}: {problem}"),
                None => write!(f, "{file_name}: {problem}"),
            };
        }
        write!(f, "{file_name} has {} problems", self.problems.len())?;
        let mut separator = ", on line ";
        for line in self.problems.iter().filter_map(|problem| self.line(problem)) {
            write!(f, "{separator}{line}")?;
            separator = ", ";
        }
        Ok(())
    }
}

impl Error for ConfigError {}

/// A single problem is shown as the error itself, several as related ones below a summary.
impl Diagnostic for ConfigError {
    fn help<'a>(&'a self) -> Option<Box<dyn Display + 'a>> {
        match self.problems.as_slice() {
            [problem] => problem.help(),
            _ => None,
        }
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&self.text)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        match self.problems.as_slice() {
            [problem] => problem.labels(),
            _ => None,
        }
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        match self.problems.as_slice() {
            [_] => None,
            problems => Some(Box::new(problems.iter().map(|problem| problem as &dyn Diagnostic))),
        }
    }
}

/// The problems found so far.
#[derive(Debug, Default)]
pub(super) struct Problems {
    list: Vec<Problem>,
    /// Keys that are written and could not be read, and those meant by a misspelling. They are not
    /// missing.
    unreadable: Vec<String>,
    /// Bytes of the file to cover when it is shown.
    secret_spans: Vec<Range<usize>>,
}

impl Problems {
    pub(super) fn push(&mut self, fault: Fault, span: Option<Range<usize>>) {
        self.list.push(Problem { fault, span });
    }

    /// Reports an entry that was taken out of the file because it could not be read.
    pub(super) fn push_unreadable(&mut self, path: &[String], fault: Fault, span: Range<usize>) {
        self.unreadable.push(path.join("."));
        if let Fault::UnknownKey { key, allowed, .. } = &fault
            && let Some(meant) = nearest(key, allowed)
            && let Some((_, tables)) = path.split_last()
        {
            // A required key that is misspelled is one problem, not two.
            let meant = [tables, &[meant.to_owned()]].concat();
            self.unreadable.push(meant.join("."));
        }
        self.push(fault, Some(span));
    }

    /// Reports that `key` is not given, in the table at `span`, unless it is given and was reported as unreadable.
    pub(super) fn missing(&mut self, key: &'static str, span: Option<Range<usize>>) {
        if !self.has_unreadable(key) {
            self.push(Fault::Missing { key }, span);
        }
    }

    /// Whether `key`, the table it is in, or something in it could not be read.
    pub(super) fn has_unreadable(&self, key: &str) -> bool {
        let is_in = |inner: &str, outer: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.unreadable.iter().any(|unreadable| is_in(key, unreadable) || is_in(unreadable, key))
    }

    /// Covers a part of the file when it is shown.
    pub(super) fn hide(&mut self, span: Range<usize>) {
        self.secret_spans.push(span);
    }

    /// The resolved value if there are no problems, else all of them.
    pub(super) fn finish<T>(self, resolved: Option<T>, text: &str, file_name: &str) -> Result<T, ConfigError> {
        match resolved {
            Some(resolved) if self.list.is_empty() => Ok(resolved),
            _ => Err(ConfigError::new(self, text, file_name)),
        }
    }
}

fn table_name(table: &str) -> String {
    match table {
        "" => "the file".to_owned(),
        table => format!("[{table}]"),
    }
}

fn quoted(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

/// The allowed name nearest to `written`, if any is near.
pub fn nearest<'a, S: AsRef<str>>(written: &str, allowed: &'a [S]) -> Option<&'a str> {
    let written = written.to_lowercase();
    allowed
        .iter()
        .map(|name| (strsim::jaro_winkler(&written, name.as_ref()), name.as_ref()))
        .filter(|(similarity, _)| *similarity >= MIN_SIMILARITY)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

/// The start of a help text: "did you mean `x`? ", or nothing when no allowed name is near.
fn did_you_mean(written: &str, allowed: &[String]) -> String {
    nearest(written, allowed).map_or_else(String::new, |name| format!("did you mean `{name}`? "))
}

pub(super) fn example(key: &str) -> Option<&'static str> {
    let (_, example) = EXAMPLES.iter().find(|(name, _)| *name == key)?;
    Some(example)
}
