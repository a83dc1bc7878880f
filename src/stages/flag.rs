//! The flag stage: `latents` → `anomalies`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{
    Array as _, AsArray as _, BooleanArray, Float64Array, ListBuilder, RecordBatch, StringArray, StringBuilder,
};
use arrow::datatypes::{DataType, Field, Float64Type, Schema};

use super::{Job, PartitionReport, StageReport};
use crate::config::Anomaly;
use crate::error::Error;
use crate::flag::{Judgment, Reference, ReferenceBuilder, ReferenceError, cutoff, judge};
use crate::hash::Fingerprint;
use crate::schema::{TableName, column, data_schema};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::table::{Live, LiveFile, Published};

/// Name under which rows above the threshold are counted.
pub const FLAGGED: &str = "flagged";

/// The reference in use.
#[derive(Debug)]
pub struct ReferenceInUse {
    /// The scores.
    pub reference: Reference,
    /// Where it came from, for messages.
    pub url: String,
}

/// Scores every row of `latents` against the reference, and publishes every partition whose flags may have changed. Returns the
/// reference too.
pub fn flag(job: &Job<'_>, settings: &Anomaly) -> Result<(StageReport, ReferenceInUse), Error> {
    let started = Instant::now();
    let mut report = StageReport::default();
    let named = named_reference(job, settings)?;
    let is_own = named.is_none();
    let mut reference = named.map_or_else(|| own_reference(job, settings, &Live::default()), Ok)?;
    job.settle(&mut report, |latents, report| {
        if is_own {
            reference = own_reference(job, settings, latents)?;
        }
        flag_all(job, settings, latents, &reference, report)
    })?;
    report.secs = started.elapsed().as_secs_f64();
    Ok((report, reference))
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
    for partition in partitions {
        job.context.stop.check()?;
        let run_id = run_id(settings, latents, &reference.reference, &partition);
        let is_live = live.run_of(&partition) == Some(run_id.as_str());
        let entry = report.partitions.entry(partition.clone()).or_default();
        *entry = PartitionReport { run_id, written: entry.written, ..PartitionReport::default() };
        if is_live {
            count(job, &live, &partition, entry)?;
        } else {
            flag_partition(job, settings, latents, reference, &partition, entry)?;
        }
    }
    Ok(())
}

/// The reference that the pipeline names, if it names one; it must be of the pipeline's model.
pub fn named_reference(job: &Job<'_>, settings: &Anomaly) -> Result<Option<ReferenceInUse>, Error> {
    let Some(url) = &settings.reference else { return Ok(None) };
    let (store, name) = job.context.open_file(url)?;
    let reference = job.context.block_on(Reference::read(&store, &name, &job.model_sha256))?;
    Ok(Some(ReferenceInUse { reference, url: url.to_string() }))
}

/// The reference of a pipeline that names none: all rows that `latents` holds, so flags say "strange among these".
pub fn own_reference(job: &Job<'_>, settings: &Anomaly, latents: &Live) -> Result<ReferenceInUse, Error> {
    let rule = settings.rule;
    let mut builder = ReferenceBuilder::default();
    for (_, scores) in scores_of(job, latents.files.clone(), rule)? {
        scores.iter().flatten().for_each(|score| builder.push_score(rule, score));
    }
    let url = job.latents.store().url().to_string();
    Ok(ReferenceInUse { reference: builder.build(&job.model_sha256, &url, None), url })
}

/// The run id of a partition's flags.
pub fn run_id(settings: &Anomaly, latents: &Live, reference: &Reference, partition: &PartitionValues) -> String {
    Fingerprint::new("anomalies")
        .with("schema", &crate::schema::VERSION.to_string())
        .with("partition", &partition.to_string())
        .with("latents", latents.run_of(partition).unwrap_or_default())
        .with("reference", &reference.id)
        .with("rule", settings.rule.name())
        .with("threshold", &format!("{:?}", settings.threshold))
        .short()
}

/// Ids and scores of each batch of rows; a score is `None` where the row could not be scored.
fn scores_of(job: &Job<'_>, files: Vec<LiveFile>, rule: Rule) -> Result<Vec<(StringArray, Float64Array)>, Error> {
    let batches = job.context.block_on(job.latents.read(files, &[column::IMAGE_ID, rule.name()]))?;
    Ok(batches
        .into_iter()
        .map(|(_, batch)| {
            (batch.column(0).as_string::<i32>().clone(), batch.column(1).as_primitive::<Float64Type>().clone())
        })
        .collect())
}

fn flag_partition(
    job: &Job<'_>,
    settings: &Anomaly,
    latents: &Live,
    reference: &ReferenceInUse,
    partition: &PartitionValues,
    entry: &mut PartitionReport,
) -> Result<(), Error> {
    let rule = settings.rule;
    // Where no row could be scored, the rows are no reference either, and nothing is judged.
    let sorted = match reference.reference.scores(rule, &reference.url) {
        Err(ReferenceError::NoScores { .. }) if settings.reference.is_none() => &[],
        scores => scores?,
    };
    let cutoff = cutoff(settings.threshold, sorted);
    let schema = data_schema(TableName::Anomalies, &Schema::empty());
    let footer = job.footer(&entry.run_id)?;
    let mut file =
        job.context.block_on(job.anomalies.create_file(partition, &entry.run_id, 0, Arc::clone(&schema), &footer))?;
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for (ids, scores) in scores_of(job, latents.of(partition).cloned().collect(), rule)? {
        let judged: Vec<Option<Judgment>> = scores.iter().map(|score| Some(judge(score?, sorted, cutoff?))).collect();
        let num_flagged = judged.iter().flatten().filter(|judgment| judgment.is_anomaly).count();
        *counts.entry(FLAGGED.to_owned()).or_default() += num_flagged as u64;
        entry.num_rows += ids.len() as u64;
        let rows = ids.len();
        let columns: Vec<arrow::array::ArrayRef> = vec![
            Arc::new(ids),
            Arc::new(scores),
            Arc::new(StringArray::from(vec![rule.name(); rows])),
            Arc::new(
                judged
                    .iter()
                    .map(|judgment| judgment.map(|judgment| judgment.severity_percentile))
                    .collect::<Float64Array>(),
            ),
            Arc::new(judged.iter().map(|judgment| judgment.map(|judgment| judgment.p_value)).collect::<Float64Array>()),
            Arc::new(judged.iter().map(|judgment| judgment.and(cutoff)).collect::<Float64Array>()),
            Arc::new(
                judged.iter().map(|judgment| judgment.map(|judgment| judgment.is_anomaly)).collect::<BooleanArray>(),
            ),
            reasons(&judged, rule),
            Arc::new(StringArray::from(vec![reference.reference.id.as_str(); rows])),
            Arc::new(StringArray::from(vec![entry.run_id.as_str(); rows])),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns)
            .map_err(|source| Error::Rows { table: TableName::Anomalies.name(), source })?;
        job.context.block_on(file.write(&batch))?;
    }
    entry.counts = counts;
    let file = job.context.block_on(file.close())?;
    let published = job.context.block_on(job.anomalies.replace_partition(partition, &entry.run_id, &[file]))?;
    entry.written |= published != Published::Unchanged;
    Ok(())
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

/// The rules that fired, for each row.
fn reasons(judged: &[Option<Judgment>], rule: Rule) -> arrow::array::ArrayRef {
    let element = Arc::new(Field::new("element", DataType::Utf8, false));
    let mut builder = ListBuilder::new(StringBuilder::new()).with_field(element);
    for judgment in judged {
        if judgment.is_some_and(|judgment| judgment.is_anomaly) {
            builder.values().append_value(rule.name());
        }
        builder.append(true);
    }
    Arc::new(builder.finish())
}
