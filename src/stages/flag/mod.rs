//! The flag stage: `latents` → `anomalies`.

pub mod shares;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use arrow::array::{
    ArrayRef, AsArray as _, BooleanArray, Float64Array, ListBuilder, RecordBatch, StringArray, StringBuilder,
};
use arrow::datatypes::{DataType, Field, Schema};
use futures::TryStreamExt as _;
use url::Url;

use super::{Job, PartitionReport, StageReport};
use crate::config::{Anomaly, Threshold};
use crate::context::Progress;
use crate::error::Error;
use crate::flag::{Judgment, benjamini_hochberg, cutoff, cutoff_of_p, judge};
use crate::hash::Fingerprint;
use crate::neighbors::exact::{JoinError, Metric};
use crate::normal::Compared;
use crate::reference::{
    FORMAT_VERSION, Header, LatentRows, Reference, ReferenceBuilder, ReferenceError, Segment, columns,
};
use crate::schema::{TableName, column, data_schema};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::table::{DataFile, Live, LiveFile, Published};

/// Name under which rows above the threshold are counted.
pub const FLAGGED: &str = "flagged";

/// Rows compared with the reference at a time.
const BATCH_ROWS: usize = 4096;

/// Raised whenever the same rows and references would give other flags.
const RULES_VERSION: u32 = 1;

/// The reference in use.
#[derive(Debug)]
pub struct ReferenceInUse {
    /// What stands for it.
    pub id: String,
    /// Where it came from, for messages.
    pub url: String,
    reference: OnceLock<Arc<Reference>>,
}

impl ReferenceInUse {
    /// The reference, which is read and learned from on first use if it is made of the rows of `latents`.
    fn get(&self, job: &Job<'_>, settings: &Anomaly, latents: &Live) -> Result<&Reference, Error> {
        if let Some(reference) = self.reference.get() {
            return Ok(reference);
        }
        let mut builder = ReferenceBuilder::new(header(job, settings, None, None));
        for file in &latents.files {
            scan(job, settings, file, |rows| Ok(builder.push(&file.partition, rows, true)?))?;
        }
        let reference = builder.build(&self.url)?;
        Ok(self.reference.get_or_init(|| Arc::new(reference)))
    }

    fn named(reference: Arc<Reference>, url: &Url) -> Self {
        Self { id: reference.id.clone(), url: url.to_string(), reference: OnceLock::from(reference) }
    }

    /// A reference that lies nowhere.
    pub fn in_memory(reference: Reference) -> Self {
        Self { id: reference.id.clone(), url: "memory".to_owned(), reference: OnceLock::from(Arc::new(reference)) }
    }

    /// The reference, if it was named or has been used.
    pub fn reference(&self) -> Option<&Reference> {
        self.reference.get().map(AsRef::as_ref)
    }
}

/// What a reference of the pipeline is of.
pub fn header(job: &Job<'_>, settings: &Anomaly, predicate: Option<String>, bank: Option<String>) -> Header {
    let metric = job.pipeline.neighbors.as_ref().map_or(Metric::Cosine, |neighbors| neighbors.metric);
    Header {
        format_version: FORMAT_VERSION,
        model_sha256: job.model_sha256.clone(),
        elbo_samples: job.pipeline.model.as_ref().map_or(0, |model| model.elbo_samples),
        decode: job.pipeline.execution.decode,
        source: job.source.url().to_string(),
        predicate,
        bank,
        segment: settings.segment.clone(),
        regions: job.embedding_regions(),
        // Products of vectors have no zero to measure from.
        metric: if metric == Metric::InnerProduct { Metric::L2 } else { metric },
        k: settings.k.get(),
    }
}

/// Scores every row of `latents` against the reference, and publishes every partition whose flags may have changed. Returns the
/// reference too.
pub fn flag(job: &Job<'_>, settings: &Anomaly) -> Result<(StageReport, ReferenceInUse), Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    check_segment(job, settings)?;
    let named = named_reference(job, settings)?;
    let is_own = named.is_none();
    let mut reference = named.unwrap_or_else(|| own_reference(job, settings, &Live::default()));
    job.settle(&mut report, |latents, report| {
        if is_own {
            reference = own_reference(job, settings, latents);
        }
        flag_all(job, settings, latents, &reference, report)
    })?;
    report.secs = started.elapsed().as_secs_f64();
    Ok((report, reference))
}

/// Fails where the column of the segments is neither kept nor a partition key.
pub fn check_segment(job: &Job<'_>, settings: &Anomaly) -> Result<(), ReferenceError> {
    let Some(segment) = &settings.segment else { return Ok(()) };
    let is_kept = job.source.kept_schema.fields().iter().any(|field| field.name() == segment);
    if is_kept || job.source.partition_keys.contains(segment) {
        return Ok(());
    }
    Err(ReferenceError::NoSegmentColumn { column: segment.clone() })
}

fn flag_all(
    job: &Job<'_>,
    settings: &Anomaly,
    latents: &Live,
    reference: &ReferenceInUse,
    report: &mut StageReport,
) -> Result<(), Error> {
    let live = job.context.block_on(job.anomalies.live())?;
    job.remove_vanished(&job.anomalies, &live)?;
    let partitions = latents.partitions();
    report.partitions.retain(|partition, _| partitions.contains(partition));
    let run_ids: Vec<String> =
        partitions.iter().map(|partition| run_id(settings, latents, reference, partition)).collect();
    let is_live = |partition: &PartitionValues, run_id: &str| live.run_of(partition) == Some(run_id);
    let due = partitions.iter().zip(&run_ids).filter(|(partition, run_id)| !is_live(partition, run_id));
    let num_due = due.flat_map(|(partition, _)| latents.of(partition)).map(|file| file.num_rows).sum();
    let progress = job.context.progress("flag", Some(num_due));
    for (partition, run_id) in partitions.into_iter().zip(run_ids) {
        job.context.stop.check()?;
        let is_live = is_live(&partition, &run_id);
        let entry = report.partitions.entry(partition.clone()).or_default();
        *entry = PartitionReport { run_id, written: entry.written, ..PartitionReport::default() };
        if is_live {
            count(job, &live, &partition, entry)?;
        } else {
            let judge = Judge {
                job,
                settings,
                reference: reference.get(job, settings, latents)?,
                partition: &partition,
                progress: &progress,
            };
            let files: Vec<LiveFile> = latents.of(&partition).cloned().collect();
            let files = [judge.write(&files, &reference.id, entry)?];
            let published = job.context.block_on(job.anomalies.replace_partition(&partition, &entry.run_id, &files))?;
            entry.written |= published != Published::Unchanged;
        }
    }
    progress.finish();
    Ok(())
}

/// The reference that the pipeline names, if it names one; it must be of the pipeline's model and settings, and keep what the threshold
/// promises.
pub fn named_reference(job: &Job<'_>, settings: &Anomaly) -> Result<Option<ReferenceInUse>, Error> {
    let Some(url) = &settings.reference else { return Ok(None) };
    if let Some(reference) = job.named_reference.get() {
        return Ok(Some(ReferenceInUse::named(Arc::clone(reference), url)));
    }
    let (store, name) = job.context.open_file(url)?;
    let reference = job.context.block_on(Reference::read(&store, &name, &job.model_sha256))?;
    check_settings(&reference.header, &header(job, settings, None, None), url.as_str())?;
    reference.check(settings.rule, settings.threshold, url.as_str())?;
    let reference = job.named_reference.get_or_init(|| Arc::new(reference));
    Ok(Some(ReferenceInUse::named(Arc::clone(reference), url)))
}

/// Fails where rows would be compared otherwise than the rows of the reference were.
fn check_settings(found: &Header, wanted: &Header, url: &str) -> Result<(), ReferenceError> {
    let named = |segment: &Option<String>| segment.clone().unwrap_or_else(|| "none".to_owned());
    let settings = [
        ("model.elbo_samples", found.elbo_samples.to_string(), wanted.elbo_samples.to_string()),
        ("execution.decode", found.decode.name().to_owned(), wanted.decode.name().to_owned()),
        ("anomaly.segment", named(&found.segment), named(&wanted.segment)),
        ("anomaly.k", found.k.to_string(), wanted.k.to_string()),
        ("neighbors.metric", found.metric.name().to_owned(), wanted.metric.name().to_owned()),
    ];
    match settings.into_iter().find(|(_, found, wanted)| found != wanted) {
        Some((key, found, wanted)) => Err(ReferenceError::OtherSettings { url: url.to_owned(), key, found, wanted }),
        None => Ok(()),
    }
}

/// The reference of a pipeline that names none: all rows that `latents` holds, so flags say "strange among these".
pub fn own_reference(job: &Job<'_>, settings: &Anomaly, latents: &Live) -> ReferenceInUse {
    let header = header(job, settings, None, None);
    let mut fingerprint = Fingerprint::new("own reference").with("header", &header.identity());
    for partition in latents.partitions() {
        let run_id = latents.run_of(&partition).unwrap_or_default();
        fingerprint = fingerprint.with("partition", &partition.to_string()).with("latents", run_id);
    }
    let url = job.latents.store().url().to_string();
    ReferenceInUse { id: fingerprint.short(), url, reference: OnceLock::new() }
}

/// The run id of a partition's flags.
pub fn run_id(settings: &Anomaly, latents: &Live, reference: &ReferenceInUse, partition: &PartitionValues) -> String {
    Fingerprint::new("anomalies")
        .with("schema", &crate::schema::VERSION.to_string())
        .with("rules", &RULES_VERSION.to_string())
        .with("partition", &partition.to_string())
        .with("latents", latents.run_of(partition).unwrap_or_default())
        .with("reference", &reference.id)
        .with("rule", settings.rule.name())
        .with("threshold", &format!("{:?}", settings.threshold))
        .short()
}

/// Hands the rows of a live file of `latents` to `sink`, some at a time.
pub(super) fn scan(
    job: &Job<'_>,
    settings: &Anomaly,
    file: &LiveFile,
    mut sink: impl FnMut(&LatentRows<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut names = columns();
    let segment = settings.segment.as_deref();
    let is_key = segment.is_some_and(|segment| job.source.partition_keys.iter().any(|key| key == segment));
    names.extend(segment.filter(|_| !is_key));
    let mut batches = job.context.block_on(job.latents.scan(file, &names, None, BATCH_ROWS))?;
    while let Some(batch) = job.context.block_on(batches.try_next())? {
        job.context.stop.check()?;
        let batch = file
            .partition
            .extend_batch(&batch)
            .map_err(|source| Error::Rows { table: TableName::Latents.name(), source })?;
        sink(&LatentRows::of(&batch, segment)?)?;
    }
    Ok(())
}

/// Compares rows with the reference rows of their segments. Of rows that could not be used, and where the reference has no such segment,
/// there is nothing to say.
pub fn compare_rows<'a>(
    reference: &'a Reference,
    partition: &PartitionValues,
    rows: &LatentRows<'_>,
) -> Result<Vec<Option<(&'a Segment, Compared)>>, JoinError> {
    let mut by_segment: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
    for row in (0..rows.len()).filter(|row| rows.is_ok(*row)) {
        by_segment.entry(rows.segment(row)).or_default().push(row);
    }
    let mut found = vec![None; rows.len()];
    for (name, numbers) in by_segment {
        let Some(segment) = reference.segment(name) else { continue };
        let compared = segment.compare(&partition.to_string(), rows, &numbers)?;
        for (number, compared) in numbers.into_iter().zip(compared) {
            found[number] = Some((segment, compared));
        }
    }
    Ok(found)
}

/// What judges the rows of a partition.
struct Judge<'a> {
    job: &'a Job<'a>,
    settings: &'a Anomaly,
    reference: &'a Reference,
    partition: &'a PartitionValues,
    progress: &'a Progress,
}

/// A row with what the reference says of it.
#[derive(Debug, Default, Clone)]
struct Judged<'a> {
    segment: Option<&'a Segment>,
    compared: Compared,
    score: Option<f64>,
    judgment: Option<Judgment>,
}

impl<'a> Judge<'a> {
    /// Writes the flags of the partition's rows, and counts them.
    fn write(&self, files: &[LiveFile], reference_id: &str, entry: &mut PartitionReport) -> Result<DataFile, Error> {
        let (job, rule) = (self.job, self.settings.rule);
        // Which rows are rejected at a false discovery rate depends on all of them.
        let p_cutoff = match self.settings.threshold {
            Threshold::Fdr(rate) => {
                let mut p_values = Vec::new();
                for file in files {
                    scan(job, self.settings, file, |rows| {
                        let judged = self.judge(rows)?;
                        p_values.extend(judged.iter().filter_map(|row| row.judgment).map(|judgment| judgment.p_value));
                        Ok(())
                    })?;
                }
                benjamini_hochberg(&mut p_values, rate)
            }
            _ => None,
        };
        let cutoff_of = |segment: &Segment, rule: Rule| match self.settings.threshold {
            Threshold::Fdr(_) => cutoff_of_p(p_cutoff?, segment.scores(rule)),
            threshold => cutoff(threshold, segment.scores(rule)),
        };
        let schema = data_schema(TableName::Anomalies, &Schema::empty());
        let footer = job.footer(&entry.run_id)?;
        let mut file = job.context.block_on(job.anomalies.create_file(
            self.partition,
            &entry.run_id,
            0,
            Arc::clone(&schema),
            &footer,
        ))?;
        let mut num_unknown = 0;
        for live in files {
            scan(job, self.settings, live, |rows| {
                let judged = self.judge(rows)?;
                let cutoffs: Vec<Option<f64>> = judged
                    .iter()
                    .map(|row| row.judgment.and(row.segment).and_then(|segment| cutoff_of(segment, rule)))
                    .collect();
                let flags: Vec<Option<bool>> = judged
                    .iter()
                    .zip(&cutoffs)
                    .map(|(row, cutoff)| {
                        let score = row.judgment.and(row.score)?;
                        Some(cutoff.is_some_and(|cutoff| score > cutoff))
                    })
                    .collect();
                num_unknown += (0..rows.len()).filter(|row| rows.is_ok(*row) && judged[*row].segment.is_none()).count();
                entry.num_rows += rows.len() as u64;
                let num_flagged = flags.iter().filter(|flag| **flag == Some(true)).count();
                *entry.counts.entry(FLAGGED.to_owned()).or_default() += num_flagged as u64;
                let number = |of: &dyn Fn(&Judged<'_>) -> Option<f64>| -> ArrayRef {
                    Arc::new(judged.iter().map(of).collect::<Float64Array>())
                };
                let columns = schema.fields().iter().map(|field| -> ArrayRef {
                    let same = |text: &str| Arc::new(StringArray::from(vec![text; rows.len()]));
                    match field.name().as_str() {
                        column::IMAGE_ID => Arc::new(rows.ids().clone()),
                        column::ANOMALY_SCORE => number(&|row| row.score),
                        column::RULE => same(rule.name()),
                        column::SEVERITY_PERCENTILE => number(&|row| Some(row.judgment?.severity_percentile)),
                        column::P_VALUE => number(&|row| Some(row.judgment?.p_value)),
                        column::ANOMALY_THRESHOLD => Arc::new(cutoffs.iter().copied().collect::<Float64Array>()),
                        column::IS_ANOMALY => Arc::new(flags.iter().copied().collect::<BooleanArray>()),
                        column::REASONS => reasons(&judged, &flags, |row, row_number| {
                            self.fired(row, |rule| rows.score(row_number, rule), cutoff_of)
                        }),
                        column::SEGMENT => Arc::new(
                            (0..rows.len()).map(|row| rows.segment(row).map(str::to_owned)).collect::<StringArray>(),
                        ),
                        column::REFERENCE_ID => same(reference_id),
                        column::RUN_ID => same(&entry.run_id),
                        name => {
                            let rule = Rule::OF_REFERENCE.into_iter().find(|rule| rule.name() == name);
                            number(&|row| row.compared.get(rule?))
                        }
                    }
                });
                let batch = RecordBatch::try_new(Arc::clone(&schema), columns.collect())
                    .map_err(|source| Error::Rows { table: TableName::Anomalies.name(), source })?;
                job.context.block_on(file.write(&batch))?;
                self.progress.advance(rows.len() as u64, 0);
                Ok(())
            })?;
        }
        if num_unknown > 0 {
            tracing::warn!(
                partition = self.partition.name(),
                rows = num_unknown,
                "the reference has no rows of these rows' segment, so they have no flag"
            );
        }
        Ok(job.context.block_on(file.close())?)
    }

    /// Compares rows with the reference rows of their segments.
    fn judge(&self, rows: &LatentRows<'_>) -> Result<Vec<Judged<'a>>, Error> {
        let compared = compare_rows(self.reference, self.partition, rows)
            .map_err(|source| ReferenceError::Vectors { url: self.job.latents.store().url().to_string(), source })?;
        let rule = self.settings.rule;
        let judged = compared.into_iter().enumerate().map(|(number, compared)| {
            let Some((segment, compared)) = compared else { return Judged::default() };
            let sorted = segment.scores(rule);
            let score = rows.score(number, rule).or_else(|| compared.get(rule));
            let judgment = score.filter(|_| !sorted.is_empty()).map(|score| judge(score, sorted));
            Judged { segment: Some(segment), compared, score, judgment }
        });
        Ok(judged.collect())
    }

    /// The rules that find a flagged row strange: the one that decides, and the others by whose scores it lies beyond the same share
    /// of the reference. A fixed cutoff is one rule's alone.
    fn fired(
        &self,
        row: &Judged<'_>,
        score: impl Fn(Rule) -> Option<f64>,
        cutoff_of: impl Fn(&Segment, Rule) -> Option<f64>,
    ) -> Vec<Rule> {
        let decides = self.settings.rule;
        let mut fired = vec![decides];
        let Some(segment) = row.segment.filter(|_| !matches!(self.settings.threshold, Threshold::Value(_))) else {
            return fired;
        };
        fired.extend(Rule::all().filter(|rule| {
            let found = score(*rule).or_else(|| row.compared.get(*rule));
            let is_beyond = found.zip(cutoff_of(segment, *rule)).is_some_and(|(score, cutoff)| score > cutoff);
            *rule != decides && is_beyond
        }));
        fired
    }
}

/// Counts the rows of a partition whose flags were there before this run.
fn count(job: &Job<'_>, live: &Live, partition: &PartitionValues, entry: &mut PartitionReport) -> Result<(), Error> {
    let files = live.of(partition).cloned().collect();
    for (_, batch) in job.context.block_on(job.anomalies.read(files, &[column::IS_ANOMALY]))? {
        entry.num_rows += batch.num_rows() as u64;
        *entry.counts.entry(FLAGGED.to_owned()).or_default() += batch.column(0).as_boolean().true_count() as u64;
    }
    Ok(())
}

/// The rules that fired, for each row that is flagged.
fn reasons(judged: &[Judged<'_>], flags: &[Option<bool>], fired: impl Fn(&Judged<'_>, usize) -> Vec<Rule>) -> ArrayRef {
    let element = Arc::new(Field::new("element", DataType::Utf8, false));
    let mut builder = ListBuilder::new(StringBuilder::new()).with_field(element);
    for (number, (row, flag)) in judged.iter().zip(flags).enumerate() {
        if *flag == Some(true) {
            for rule in fired(row, number) {
                builder.values().append_value(rule.name());
            }
        }
        builder.append(true);
    }
    Arc::new(builder.finish())
}
