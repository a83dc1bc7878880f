//! From the file as written to the pipeline as resolved: defaults, ranges, locations, and combinations that cannot be.
//!
//! Checks do not stop at the first problem. A value with a problem is replaced by its default and the problem is kept;
//! as a pipeline with problems is never handed out, no stage can see such a default.

use std::fmt::Display;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use url::Url;

use super::location::{self, LocationFault};
use super::problem::{Fault, MODEL_FLAG, OUTPUT_FLAG, Problems, SOURCE_FLAG};
use super::written::{
    AnomalyTable, DriftTable, EncoderTable, ExecutionTable, LimitsTable, ModelTable, NeighborsTable, SourceTable,
    Table, ThresholdTable, Written,
};
use super::{
    Anomaly, DEFAULT_ANOMALY_NEIGHBOR, DEFAULT_CONTAMINATION, DEFAULT_DRIFT_ALPHA, DEFAULT_ID_COLUMN,
    DEFAULT_IMAGE_COLUMN, DEFAULT_MAX_REJECTED_FRACTION, DEFAULT_MEMORY_LIMIT, DEFAULT_NEIGHBORS, DEFAULT_RECALL,
    DEFAULT_UNIT_ROWS, Device, Drift, Duplicates, EncoderRef, Execution, Limits, MAX_BATCH_SIZE, MAX_CELLS,
    MAX_DECODE_SECS, MAX_ELBO_SAMPLES, MAX_NEIGHBORS, MAX_THREADS, MAX_UNIT_ROWS, MAX_WORKERS, MIN_DRIFT_ALPHA,
    ModelRef, NeighborScope, Neighbors, Output, Overrides, Pipeline, Publish, Search, Source, SourceFormat, Threshold,
};
use crate::decode::{DEFAULT_MAX_DECODE_SECS, DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_PIXELS};
use crate::neighbors::exact::Metric;
use crate::schema::RESERVED;
use crate::score::Rule;

/// The key of the model package, which some commands require and others do not.
pub(super) const MODEL_PACKAGE: &str = "model.package";

/// Hexadecimal digits of a SHA-256.
const SHA256_HEX_DIGITS: usize = 64;

/// A value with what it is called and where it stands.
struct Given<T> {
    /// The key with its table, or the flag.
    key: &'static str,
    value: T,
    origin: Origin,
}

/// Where a value was given.
enum Origin {
    /// At these bytes of the pipeline file.
    File(Range<usize>),
    /// By a flag on the command line.
    Flag,
}

impl<T> Given<T> {
    fn in_file(key: &'static str, written: Option<Spanned<T>>) -> Option<Self> {
        written.map(|written| Self { key, origin: Origin::File(written.span()), value: written.into_inner() })
    }

    fn by_flag(key: &'static str, value: Option<T>) -> Option<Self> {
        value.map(|value| Self { key, value, origin: Origin::Flag })
    }

    fn span(&self) -> Option<Range<usize>> {
        match &self.origin {
            Origin::File(span) => Some(span.clone()),
            Origin::Flag => None,
        }
    }
}

/// The folders that relative paths start from.
struct Folders<'a> {
    /// For paths in the file.
    file: &'a Path,
    /// For paths on the command line.
    command_line: &'a Path,
}

/// Resolves a pipeline. `None` if something required is missing; a problem is then reported, as for everything else.
pub(super) fn pipeline(
    written: Written,
    base_dir: &Path,
    overrides: &Overrides,
    problems: &mut Problems,
) -> Option<Pipeline> {
    let folders = Folders { file: base_dir, command_line: &overrides.current_dir };
    let (pipeline, pipeline_span) = open(written.pipeline);
    let (source_table, source_span) = open(written.source);
    let (model_table, model_span) = open(written.model);
    let (encoder_table, encoder_span) = open(written.encoder);
    let (execution_table, _) = open(written.execution);
    let (neighbors_table, neighbors_span) = open(written.neighbors);
    let (anomaly_table, _) = open(written.anomaly);
    let (drift_table, _) = open(written.drift);
    let (report_table, _) = open(written.report);
    let (output_table, output_span) = open(written.output);
    let (limits_table, _) = open(written.limits);

    let name = Given::in_file("pipeline.name", pipeline.name);
    let name = required(name, "pipeline.name", pipeline_span, problems);
    let name = name.map(|name| checked_name(name, problems));

    let source = source(source_table, source_span, overrides, &folders, problems);
    let model = model(model_table, model_span, overrides, &folders, problems);
    let encoder = encoder(encoder_table, encoder_span, &folders, problems);
    let output = Given::by_flag(OUTPUT_FLAG, overrides.output_table.clone())
        .or_else(|| Given::in_file("output.table", output_table.table));
    let output = required(output, "output.table", output_span, problems);
    let publish = output_table.publish.unwrap_or(Publish::Delta);
    let output_place = output.as_ref().map(|output| (output.key, output.span()));
    let output = output.and_then(|output| location(&output, &folders, problems));

    let execution = execution(execution_table, overrides, problems);
    let neighbors = neighbors(neighbors_table, neighbors_span, &folders, problems);
    let anomaly = anomaly(anomaly_table, &folders, problems);
    let drift = drift(drift_table, problems);
    let report = report_table.enabled.unwrap_or(true);
    let limits = limits(limits_table, problems);

    let (name, source, output, (output_key, output_span)) = (name?, source?, output?, output_place?);
    if location::is_inside(&output, &source.table) {
        problems.push(Fault::OutputInSource { key: output_key }, output_span);
    }
    let output = Output { table: output, publish };
    Some(Pipeline { name, source, model, encoder, execution, neighbors, anomaly, drift, report, output, limits })
}

fn source(
    written: SourceTable,
    span: Option<Range<usize>>,
    overrides: &Overrides,
    folders: &Folders<'_>,
    problems: &mut Problems,
) -> Option<Source> {
    let table = Given::by_flag(SOURCE_FLAG, overrides.source_table.clone())
        .or_else(|| Given::in_file("source.table", written.table));
    let table = required(table, "source.table", span, problems).and_then(|table| location(&table, folders, problems));

    let format = written.format.unwrap_or(SourceFormat::Parquet);
    let id_and_image = [
        ("source.id", written.id.as_ref().map(Spanned::span)),
        ("source.image", written.image.as_ref().map(Spanned::span)),
    ];
    match format {
        SourceFormat::Directory => {
            let columns = ("source.columns", written.columns.as_ref().map(Spanned::span));
            for (key, span) in id_and_image.into_iter().chain([columns]).filter(|(_, span)| span.is_some()) {
                problems.push(Fault::NoColumns { key }, span);
            }
        }
        SourceFormat::WebDataset => {
            for (key, span) in id_and_image.into_iter().filter(|(_, span)| span.is_some()) {
                problems.push(Fault::NamesDecide { key }, span);
            }
            for extension in written.columns.iter().flat_map(Spanned::get_ref) {
                if extension.get_ref().starts_with('.') || extension.get_ref().contains('/') {
                    let expected = "a list of extensions, without the dot before them";
                    problems.push(Fault::Malformed { key: "source.columns", expected }, Some(extension.span()));
                }
            }
        }
        SourceFormat::Parquet | SourceFormat::Delta => {}
    }

    let id = Given::in_file("source.id", written.id);
    let id = text_or(id, DEFAULT_ID_COLUMN, problems);
    let image = Given::in_file("source.image", written.image);
    let image = text_or(image, DEFAULT_IMAGE_COLUMN, problems);
    let columns = written.columns.map(Spanned::into_inner).unwrap_or_default();
    check_columns(&columns, written.partition.as_deref(), &id, &image, problems);

    let predicate = Given::by_flag("--where", overrides.predicate.clone())
        .or_else(|| Given::in_file("source.where", written.predicate));
    let predicate = predicate.map(|predicate| text(predicate, problems));

    let names = |list: Vec<Spanned<String>>| list.into_iter().map(Spanned::into_inner).collect();
    Some(Source {
        table: table?,
        format,
        id,
        image,
        columns: names(columns),
        predicate,
        duplicates: written.duplicates.unwrap_or(Duplicates::Refuse),
        partition: written.partition.map(names),
    })
}

/// Reports the kept columns and partition keys that are named twice or that `latents` has already.
fn check_columns(
    columns: &[Spanned<String>],
    partition: Option<&[Spanned<String>]>,
    id: &str,
    image: &str,
    problems: &mut Problems,
) {
    let columns = columns.iter().map(|column| ("source.columns", column));
    let partition = partition.unwrap_or_default();
    let partition = partition.iter().map(|column| ("source.partition", column));
    let mut seen: Vec<&str> = Vec::new();
    for (key, column) in columns.chain(partition) {
        let name = column.get_ref().as_str();
        let is_name = |other: &str| other.eq_ignore_ascii_case(name);
        let other = if name.trim().is_empty() {
            let expected = "a list of column names";
            problems.push(Fault::Malformed { key, expected }, Some(column.span()));
            continue;
        } else if seen.iter().any(|other| is_name(other)) {
            Some("a column or partition key named before")
        } else if is_name(id) {
            Some("the id")
        } else if is_name(image) {
            Some("the image")
        } else if RESERVED.iter().any(|other| is_name(other)) {
            Some("a column of its own")
        } else {
            None
        };
        seen.push(name);
        if let Some(other) = other {
            let span = Some(column.span());
            let column = name.to_owned();
            problems.push(Fault::RepeatedColumn { key, column, other }, span);
        }
    }
}

fn model(
    written: ModelTable,
    span: Option<Range<usize>>,
    overrides: &Overrides,
    folders: &Folders<'_>,
    problems: &mut Problems,
) -> Option<ModelRef> {
    let sha256 = Given::in_file("model.sha256", written.sha256);
    let sha256 = sha256.map(|sha256| checked_sha256(&sha256, problems));
    let elbo_samples = written.elbo_samples.map_or(0, |samples| {
        let count = usize::try_from(*samples.get_ref()).ok().filter(|count| *count <= MAX_ELBO_SAMPLES);
        let range = format!("0 to {MAX_ELBO_SAMPLES}");
        check_range("model.elbo_samples", &samples, count.is_some(), &range, problems);
        count.unwrap_or_default()
    });
    let flag = Given::by_flag(MODEL_FLAG, overrides.model_package.clone());
    if let Some(package) = flag {
        return Some(ModelRef { package: location(&package, folders, problems)?, sha256: None, elbo_samples });
    }
    let package = Given::in_file(MODEL_PACKAGE, written.package);
    // A [model] table without a package is a mistake; no [model] table is a pipeline for `fit`.
    let package = match span {
        Some(span) => required(package, MODEL_PACKAGE, Some(span), problems),
        None => package,
    };
    Some(ModelRef { package: location(&package?, folders, problems)?, sha256, elbo_samples })
}

fn encoder(
    written: EncoderTable,
    span: Option<Range<usize>>,
    folders: &Folders<'_>,
    problems: &mut Problems,
) -> Option<EncoderRef> {
    span.as_ref()?;
    let package = required(Given::in_file("encoder.package", written.package), "encoder.package", span, problems);
    let sha256 = Given::in_file("encoder.sha256", written.sha256);
    let sha256 = sha256.map(|sha256| checked_sha256(&sha256, problems));
    Some(EncoderRef { package: location(&package?, folders, problems)?, sha256 })
}

fn execution(written: ExecutionTable, overrides: &Overrides, problems: &mut Problems) -> Execution {
    let batch_size = Given::by_flag("--batch-size", overrides.batch_size.map(i64::from))
        .or_else(|| Given::in_file("execution.batch_size", written.batch_size));
    let workers = Given::by_flag("--workers", overrides.workers.map(i64::from))
        .or_else(|| Given::in_file("execution.workers", written.workers));
    let threads = Given::in_file("execution.threads", written.threads);
    let unit_rows = Given::in_file("execution.unit_rows", written.unit_rows);
    let memory_limit = written.memory_limit.map(|size| size.0);
    Execution {
        device: overrides.device.or(written.device).unwrap_or(Device::Cpu),
        batch_size: batch_size.map(|batch_size| count(&batch_size, MAX_BATCH_SIZE, problems)),
        workers: workers.map(|workers| count(&workers, MAX_WORKERS, problems)),
        threads: threads.map_or(NonZeroUsize::MIN, |threads| count(&threads, MAX_THREADS, problems)),
        unit_rows: unit_rows.map_or(DEFAULT_UNIT_ROWS, |unit_rows| count(&unit_rows, MAX_UNIT_ROWS, problems)),
        memory_limit: memory_limit.unwrap_or(DEFAULT_MEMORY_LIMIT),
        decode: written.decode.unwrap_or_default(),
        tf32: written.tf32.unwrap_or(false),
        gpu_memory_limit: written.gpu_memory_limit.map(|size| size.0),
    }
}

fn neighbors(
    written: NeighborsTable,
    span: Option<Range<usize>>,
    folders: &Folders<'_>,
    problems: &mut Problems,
) -> Option<Neighbors> {
    let k = Given::in_file("neighbors.k", written.k);
    let nprobe = Given::in_file("neighbors.nprobe", written.nprobe);
    let cells = Given::in_file("neighbors.cells", written.cells);
    let scope = written.scope.unwrap_or(NeighborScope::Corpus);
    let reference = Given::in_file("neighbors.reference", written.reference);
    let reference = match (scope, reference) {
        (NeighborScope::Reference, reference) => required(reference, "neighbors.reference", span, problems),
        (_, None) => None,
        (_, Some(reference)) => {
            problems.push(Fault::UnusedReference, reference.span());
            None
        }
    };
    let search = Given::in_file("neighbors.search", written.search);
    if let Some(search) =
        search.as_ref().filter(|search| scope == NeighborScope::Reference && search.value == Search::Ivf)
    {
        problems.push(Fault::NotInReference { key: search.key }, search.span());
    }
    if let Some(recall) = &written.recall {
        let is_valid = *recall.get_ref() > 0.0 && *recall.get_ref() <= 1.0;
        check_range("neighbors.recall", recall, is_valid, "0 to 1, without 0", problems);
    }
    let metric = written.metric.unwrap_or(Metric::Cosine);
    let neighbors = Neighbors {
        k: k.map_or(DEFAULT_NEIGHBORS, |k| count(&k, MAX_NEIGHBORS, problems)),
        metric,
        scope,
        reference: reference.and_then(|reference| location(&reference, folders, problems)),
        search: search.map_or(Search::Auto, |search| search.value),
        recall: written.recall.map_or(DEFAULT_RECALL, Spanned::into_inner),
        nprobe: nprobe.map(|nprobe| count(&nprobe, MAX_CELLS, problems)),
        cells: cells.map(|cells| count(&cells, MAX_CELLS, problems)),
        duplicate_distance: duplicate_distance(written.duplicate_distance, metric, scope, problems),
    };
    written.enabled.unwrap_or(true).then_some(neighbors)
}

fn duplicate_distance(
    written: Option<Spanned<f64>>,
    metric: Metric,
    scope: NeighborScope,
    problems: &mut Problems,
) -> Option<f64> {
    let distance = written?;
    let is_valid = distance.get_ref().is_finite() && *distance.get_ref() >= 0.0;
    check_range("neighbors.duplicate_distance", &distance, is_valid, "the finite numbers from 0 on", problems);
    if metric == Metric::InnerProduct {
        problems.push(Fault::DuplicatesByInnerProduct, Some(distance.span()));
    }
    if scope == NeighborScope::Reference {
        problems.push(Fault::NotInReference { key: "neighbors.duplicate_distance" }, Some(distance.span()));
    }
    Some(distance.into_inner())
}

fn anomaly(written: AnomalyTable, folders: &Folders<'_>, problems: &mut Problems) -> Option<Anomaly> {
    let reference = Given::in_file("anomaly.reference", written.reference);
    let segment = Given::in_file("anomaly.segment", written.segment);
    let k = Given::in_file("anomaly.k", written.k);
    let anomaly = Anomaly {
        rule: written.rule.unwrap_or(Rule::Fused),
        threshold: threshold(written.threshold.as_ref(), problems),
        reference: reference.and_then(|reference| location(&reference, folders, problems)),
        segment: segment.map(|segment| text(segment, problems)),
        k: k.map_or(DEFAULT_ANOMALY_NEIGHBOR, |k| count(&k, MAX_NEIGHBORS, problems)),
    };
    written.enabled.unwrap_or(true).then_some(anomaly)
}

fn threshold(written: Option<&Spanned<Table<ThresholdTable>>>, problems: &mut Problems) -> Threshold {
    let default = Threshold::Contamination(DEFAULT_CONTAMINATION);
    let Some(table) = written else {
        return default;
    };
    let span = table.span();
    let Table(table) = table.get_ref();
    let choices = (&table.contamination, &table.quantile, &table.value, &table.fdr);
    match choices {
        (Some(share), None, None, None) => {
            let is_valid = (0.0..=0.5).contains(share.get_ref());
            let key = "anomaly.threshold.contamination";
            check_range(key, share, is_valid, "0 to 0.5", problems);
            Threshold::Contamination(*share.get_ref())
        }
        (None, Some(quantile), None, None) => {
            let is_valid = (0.5..1.0).contains(quantile.get_ref());
            let key = "anomaly.threshold.quantile";
            check_range(key, quantile, is_valid, "0.5 to 1, without 1", problems);
            Threshold::Quantile(*quantile.get_ref())
        }
        (None, None, Some(value), None) => {
            let is_valid = value.get_ref().is_finite();
            let key = "anomaly.threshold.value";
            check_range(key, value, is_valid, "the finite numbers", problems);
            Threshold::Value(*value.get_ref())
        }
        (None, None, None, Some(rate)) => {
            let is_valid = *rate.get_ref() > 0.0 && *rate.get_ref() <= 0.5;
            check_range("anomaly.threshold.fdr", rate, is_valid, "0 to 0.5, without 0", problems);
            Threshold::Fdr(*rate.get_ref())
        }
        _ => {
            let given = [choices.0, choices.1, choices.2, choices.3];
            let num_given = given.into_iter().flatten().count();
            // A choice that could not be read is reported already.
            if num_given > 0 || !problems.has_unreadable("anomaly.threshold") {
                problems.push(Fault::ThresholdChoice { num_given }, Some(span));
            }
            default
        }
    }
}

/// Checked even where drift is switched off, so that switching it on brings no surprise.
fn drift(written: DriftTable, problems: &mut Problems) -> Option<Drift> {
    if let Some(alpha) = &written.alpha {
        let is_valid = (MIN_DRIFT_ALPHA..=0.5).contains(alpha.get_ref());
        check_range("drift.alpha", alpha, is_valid, &format!("{MIN_DRIFT_ALPHA} to 0.5"), problems);
    }
    let alpha = written.alpha.map_or(DEFAULT_DRIFT_ALPHA, Spanned::into_inner);
    written.enabled.unwrap_or(true).then_some(Drift { alpha })
}

fn limits(written: LimitsTable, problems: &mut Problems) -> Limits {
    let max_image_bytes = written.max_image_bytes.map(|size| size.0);
    let max_pixels = written.max_pixels.map_or(DEFAULT_MAX_PIXELS, |pixels| {
        let positive = u64::try_from(*pixels.get_ref()).ok().and_then(NonZeroU64::new);
        let key = "limits.max_pixels";
        check_range(key, &pixels, positive.is_some(), "1 and more", problems);
        positive.unwrap_or(DEFAULT_MAX_PIXELS)
    });
    let max_decode_secs = written.max_decode_secs.map_or(DEFAULT_MAX_DECODE_SECS, |secs| {
        let valid = u64::try_from(*secs.get_ref()).ok().and_then(NonZeroU64::new);
        let valid = valid.filter(|secs| *secs <= MAX_DECODE_SECS);
        let range = format!("1 to {MAX_DECODE_SECS}");
        check_range("limits.max_decode_secs", &secs, valid.is_some(), &range, problems);
        valid.unwrap_or(DEFAULT_MAX_DECODE_SECS)
    });
    let fraction = written.max_rejected_fraction;
    if let Some(fraction) = &fraction {
        let is_valid = (0.0..=1.0).contains(fraction.get_ref());
        let key = "limits.max_rejected_fraction";
        check_range(key, fraction, is_valid, "0 to 1", problems);
    }
    Limits {
        max_image_bytes: max_image_bytes.unwrap_or(DEFAULT_MAX_IMAGE_BYTES),
        max_pixels,
        max_decode_secs,
        max_rejected_fraction: fraction.map_or(DEFAULT_MAX_REJECTED_FRACTION, Spanned::into_inner),
    }
}

/// The content of a table and its place in the file. A table that is not there is an empty one without a place.
fn open<T: Default>(table: Option<Spanned<Table<T>>>) -> (T, Option<Range<usize>>) {
    match table {
        Some(table) => {
            let span = table.span();
            (table.into_inner().0, Some(span))
        }
        None => (T::default(), None),
    }
}

/// Reports `key` as missing from the table at `table_span` if it is not given.
fn required<T>(
    given: Option<Given<T>>,
    key: &'static str,
    table_span: Option<Range<usize>>,
    problems: &mut Problems,
) -> Option<Given<T>> {
    if given.is_none() {
        problems.missing(key, table_span);
    }
    given
}

fn location(given: &Given<String>, folders: &Folders<'_>, problems: &mut Problems) -> Option<Url> {
    let base_dir = match given.origin {
        Origin::File(_) => folders.file,
        Origin::Flag => folders.command_line,
    };
    match location::resolve(&given.value, base_dir) {
        Ok(url) => Some(url),
        Err(source) => {
            let span = given.span();
            let is_secret = matches!(source, LocationFault::Credentials | LocationFault::Query);
            if let Some(span) = span.clone().filter(|_| is_secret) {
                // Within the quotes. The text as written may hide the secret from `redact`, by escapes or blanks.
                problems.hide(span.start + 1..span.end.saturating_sub(1));
            }
            let key = given.key;
            problems.push(Fault::Location { key, source }, span);
            None
        }
    }
}

fn checked_name(given: Given<String>, problems: &mut Problems) -> String {
    let is_name_byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
    let is_name = !given.value.is_empty() && given.value.bytes().all(is_name_byte);
    let expected = "made of lower case letters, digits, `_` and `-` alone";
    check_form(&given, is_name, expected, problems);
    given.value
}

fn checked_sha256(given: &Given<String>, problems: &mut Problems) -> String {
    let is_hex = given.value.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_sha256 = is_hex && given.value.len() == SHA256_HEX_DIGITS;
    check_form(given, is_sha256, "64 hexadecimal digits", problems);
    given.value.to_ascii_lowercase()
}

fn text(given: Given<String>, problems: &mut Problems) -> String {
    let is_text = !given.value.trim().is_empty();
    check_form(&given, is_text, "a text with something in it", problems);
    given.value
}

fn text_or(given: Option<Given<String>>, default: &str, problems: &mut Problems) -> String {
    given.map_or_else(|| default.to_owned(), |given| text(given, problems))
}

fn check_form(given: &Given<String>, is_valid: bool, expected: &'static str, problems: &mut Problems) {
    if !is_valid {
        let key = given.key;
        problems.push(Fault::Malformed { key, expected }, given.span());
    }
}

/// A whole number from 1 to `max`.
fn count(given: &Given<i64>, max: NonZeroUsize, problems: &mut Problems) -> NonZeroUsize {
    let count = usize::try_from(given.value).ok().and_then(NonZeroUsize::new);
    match count {
        Some(count) if count <= max => count,
        _ => {
            let fault =
                Fault::OutOfRange { key: given.key, value: given.value.to_string(), range: format!("1 to {max}") };
            problems.push(fault, given.span());
            max
        }
    }
}

fn check_range<T: Display>(
    key: &'static str,
    written: &Spanned<T>,
    is_valid: bool,
    range: &str,
    problems: &mut Problems,
) {
    if !is_valid {
        let fault = Fault::OutOfRange { key, value: written.get_ref().to_string(), range: range.to_owned() };
        problems.push(fault, Some(written.span()));
    }
}
