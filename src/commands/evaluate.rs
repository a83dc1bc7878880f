//! `evaluate`: how well each score tells rows known to be bad from rows known to be good, and what the model makes of these rows
//! otherwise; with a linear model of equal size beside it, if asked for.
//!
//! Scores come from the tables. The other model is fitted and run here, over the same images, and published nowhere.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{Array as _, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Schema};
use ndarray::ArrayView2;
use serde_json::json;
use url::Url;

use super::calibrate::{rows_where, score};
use super::fit::fit_beside;
use crate::config::{Anomaly, Pipeline, Threshold};
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::evaluation::{
    Confusion, LatentUnits, NeighborAccuracy, TotalVariance, VOTERS, auroc, average_precision, neighbor_accuracy,
};
use crate::flag::cutoff;
use crate::model::Model;
use crate::neighbors::exact::Metric;
use crate::reference::{Header, LatentRows};
use crate::report::{align, display};
use crate::sample::KeyedSample;
use crate::schema::{TableName, column, data_schema};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::source::predicate::{Predicate, PredicateError};
use crate::stages::flag::{ReferenceInUse, compare_rows, named_reference};
use crate::stages::{Backfill, Job};
use crate::table::DataFileWriter;

/// Rows whose neighbors are asked for their labels, at most: all pairs of them are compared.
const MAX_LABELED_ROWS: usize = 5_000;

/// What stands for all partitions together.
const ALL: &str = "all";

/// The pipeline's own model, in the tables.
const MODEL: &str = "model";

/// The model fitted for comparison.
const BASELINE: &str = "baseline";

/// What is asked.
#[derive(Debug)]
pub struct Question<'a> {
    /// SQL predicate: rows that should score high.
    pub positive: &'a str,
    /// SQL predicate: rows that should score low.
    pub negative: &'a str,
    /// Column of `latents`, or partition key, that the nearest neighbors of a row should agree in.
    pub label: Option<&'a str>,
    /// SQL predicate: rows that a model is fitted to for comparison.
    pub baseline: Option<&'a str>,
    /// Parquet file for the table.
    pub to: Option<Url>,
    /// Whether JSON is printed.
    pub as_json: bool,
}

/// Measures the rules of the pipeline's model, for each partition that it embedded, and for all rows of these.
pub fn evaluate(context: &Context, pipeline: &Pipeline, question: &Question<'_>) -> Result<ExitStatus, Error> {
    let positive = parse("--positive", question.positive)?;
    let negative = parse("--negative", question.negative)?;
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    let mut known = Known::default();
    let model = of_tables(&job, question, &positive, &negative, &mut known)?;
    require_both_classes(&job, &known)?;
    if question.label.is_none() && model.scores.is_empty() {
        return Err(Error::Usage {
            message: format!("the model {} gives no score that could be evaluated", job.contract.name),
            hint: "scores need a model with a reconstruction, or with mu and logvar; --label measures the embedding"
                .to_owned(),
        });
    }
    let mut variance = TotalVariance::default();
    let mut measured = vec![model];
    if let Some(rows) = question.baseline {
        let baseline = of_baseline(&job, rows, measured[0].latent_dim, &known, &mut variance)?;
        measured.push(baseline);
    }
    let separations = separations(&measured);
    let metric = pipeline.neighbors.as_ref().map_or(Metric::Cosine, |neighbors| neighbors.metric);
    let qualities =
        measured.iter().map(|measured| measured.quality(&variance, metric)).collect::<Result<Vec<_>, _>>()?;
    if let Some(to) = &question.to {
        write(context, to, &separations, &job.model_sha256)?;
    }
    if question.as_json {
        let rules: Vec<_> = separations.iter().map(Separation::to_json).collect();
        let models: Vec<_> = qualities.iter().map(Quality::to_json).collect();
        context.print(&json!({"rules": rules, "models": models}).to_string())?;
    } else {
        for line in rules_table(&separations).into_iter().chain(models_table(&qualities)) {
            context.print(&line)?;
        }
    }
    Ok(ExitStatus::Success)
}

fn parse(option: &str, sql: &str) -> Result<Predicate, Error> {
    Predicate::parse(sql).map_err(|error| Error::Usage {
        message: format!("cannot understand {option}: {error}"),
        hint: "write it as SQL, such as \"defect > 0.5 AND split = 'rest'\"".to_owned(),
    })
}

fn require_both_classes(job: &Job<'_>, known: &Known) -> Result<(), Error> {
    let latents = job.latents.store().url();
    if known.rows.is_empty() {
        return Err(Error::Usage {
            message: format!("no row of {latents} is positive or negative"),
            hint: "check the predicates, and that `lookalike run` has been run".to_owned(),
        });
    }
    for (option, class) in [("--positive", true), ("--negative", false)] {
        if !known.rows.values().any(|row| row.is_positive == class) {
            return Err(Error::Usage {
                message: format!("no row of {latents} satisfies {option}"),
                hint: "the predicate may use kept columns ([source] columns) and partition keys".to_owned(),
            });
        }
    }
    Ok(())
}

/// The rows that are evaluated, and the truth about them.
#[derive(Default)]
struct Known {
    rows: BTreeMap<(PartitionValues, String), KnownRow>,
    /// Names under which the rows of a partition count: its own, and that of all of them where there are several.
    names: BTreeMap<PartitionValues, Vec<String>>,
}

struct KnownRow {
    is_positive: bool,
    label: Option<String>,
}

impl Known {
    /// The rows of a batch that are evaluated: their numbers and ids.
    fn rows_of(&self, partition: &PartitionValues, batch: &RecordBatch) -> Vec<(usize, String, &KnownRow)> {
        let ids = batch.column_by_name(column::IMAGE_ID).map(AsArray::as_string::<i32>);
        let found = |(row, id): (usize, Option<&str>)| {
            let key = (partition.clone(), id?.to_owned());
            let known = self.rows.get(&key)?;
            Some((row, key.1, known))
        };
        ids.into_iter().flatten().enumerate().filter_map(found).collect()
    }
}

/// The scores of the two classes.
#[derive(Default)]
struct Classes {
    positive: Vec<f64>,
    negative: Vec<f64>,
}

/// The cutoffs of all rules by the pipeline's threshold and reference.
struct Cutoffs<'a> {
    settings: &'a Anomaly,
    reference: ReferenceInUse,
    /// The rule whose flags are in the table.
    decided: Option<Rule>,
}

impl Cutoffs<'_> {
    /// The cutoff of a rule for a row. The rule that decided needs none.
    fn of(&self, rule: Rule, partition: &PartitionValues, batch: &RecordBatch, row: usize) -> Option<f64> {
        if Some(rule) == self.decided || matches!(self.settings.threshold, Threshold::Value(_)) {
            return None;
        }
        let segment = self.settings.segment.as_deref().and_then(|name| {
            // `latents` has it as a kept column, `anomalies` under a name of its own, and either as a partition key.
            match batch.column_by_name(name).or_else(|| batch.column_by_name(column::SEGMENT)) {
                Some(values) => values.is_valid(row).then(|| display(values, row)),
                None => partition.get(name).map(str::to_owned),
            }
        });
        let scores = self.reference.reference()?.segment(segment.as_deref())?.scores(rule);
        cutoff(self.settings.threshold, scores)
    }
}

/// What is measured of one model.
struct Measured {
    model: &'static str,
    scores: BTreeMap<(String, Rule), Classes>,
    flags: BTreeMap<(String, Rule), Confusion>,
    squared_errors: Vec<f64>,
    units: LatentUnits,
    latent_dim: usize,
    embeddings: KeyedSample<(String, Vec<f32>)>,
}

impl Measured {
    fn new(model: &'static str) -> Self {
        Self {
            model,
            scores: BTreeMap::new(),
            flags: BTreeMap::new(),
            squared_errors: Vec::new(),
            units: LatentUnits::default(),
            latent_dim: 0,
            embeddings: KeyedSample::new(MAX_LABELED_ROWS),
        }
    }

    /// Takes in the rules that a batch of a table has as columns.
    fn take_scores(
        &mut self,
        known: &Known,
        cutoffs: Option<&Cutoffs<'_>>,
        partition: &PartitionValues,
        batch: &RecordBatch,
    ) {
        let names = known.names.get(partition).map(Vec::as_slice).unwrap_or_default();
        let rows = known.rows_of(partition, batch);
        for rule in Rule::all() {
            let Some(scores) = batch.column_by_name(rule.name()) else { continue };
            let scores = scores.as_primitive::<Float64Type>();
            for (row, _, truth) in rows.iter().filter(|(row, ..)| scores.is_valid(*row)) {
                let score = scores.value(*row);
                if rule == Rule::MeanSquaredError {
                    self.squared_errors.push(score);
                }
                let cutoff = cutoffs.and_then(|cutoffs| cutoffs.of(rule, partition, batch, *row));
                for name in names {
                    if let Some(cutoff) = cutoff {
                        let flags = self.flags.entry((name.clone(), rule)).or_default();
                        flags.push(truth.is_positive, score > cutoff);
                    }
                    let classes = self.scores.entry((name.clone(), rule)).or_default();
                    if truth.is_positive { classes.positive.push(score) } else { classes.negative.push(score) }
                }
            }
        }
    }

    /// Takes in the vectors of a batch of `latents`.
    fn take_vectors(&mut self, known: &Known, partition: &PartitionValues, batch: &RecordBatch) {
        let vectors_of = |name: &str| batch.column_by_name(name).map(|vectors| vectors.as_list::<i32>().clone());
        let (embeddings, mus, logvars) =
            (vectors_of(column::EMBEDDING), vectors_of(column::MU), vectors_of(column::LOGVAR));
        let vector = |vectors: &Option<arrow::array::ListArray>, row: usize| {
            let vectors = vectors.as_ref().filter(|vectors| vectors.is_valid(row))?;
            Some(vectors.value(row).as_primitive::<Float32Type>().values().to_vec())
        };
        for (row, id, truth) in known.rows_of(partition, batch) {
            let Some(embedding) = vector(&embeddings, row) else { continue };
            // Without an embedding of its own, the model's mu is the embedding.
            let mu = vector(&mus, row);
            let mu = mu.as_ref().unwrap_or(&embedding);
            self.latent_dim = mu.len();
            if let Some(logvar) = vector(&logvars, row) {
                self.units.push(mu, &logvar);
            }
            if let Some(label) = &truth.label {
                self.embeddings.push(&format!("{partition}/{id}"), || (label.clone(), embedding));
            }
        }
    }

    /// Takes in the flags of a batch of `anomalies`.
    fn take_flags(&mut self, known: &Known, partition: &PartitionValues, batch: &RecordBatch) {
        let columns = batch.column_by_name(column::RULE).zip(batch.column_by_name(column::IS_ANOMALY));
        let Some((rules, flags)) = columns else { return };
        let (rules, flags) = (rules.as_string::<i32>(), flags.as_boolean());
        let names = known.names.get(partition).map(Vec::as_slice).unwrap_or_default();
        for (row, _, truth) in known.rows_of(partition, batch) {
            let Some(rule) = Rule::all().find(|rule| rule.name() == rules.value(row)) else { continue };
            if flags.is_null(row) {
                continue;
            }
            for name in names {
                self.flags.entry((name.clone(), rule)).or_default().push(truth.is_positive, flags.value(row));
            }
        }
    }

    fn quality(&self, variance: &TotalVariance, metric: Metric) -> Result<Quality, Error> {
        let count = self.squared_errors.len();
        let mean_squared_error = (count > 0).then(|| self.squared_errors.iter().sum::<f64>() / count as f64);
        let labels: Vec<String> = self.embeddings.rows().map(|(label, _)| label.clone()).collect();
        let dim = self.embeddings.rows().next().map_or(0, |(_, vector)| vector.len());
        let vectors: Vec<f32> = self.embeddings.rows().flat_map(|(_, vector)| vector.iter().copied()).collect();
        let vectors = ArrayView2::from_shape((labels.len(), dim), &vectors).map_err(crate::corpus::shape_error)?;
        Ok(Quality {
            model: self.model,
            latent_dim: self.latent_dim,
            mean_squared_error,
            explained_variance: mean_squared_error.and_then(|error| variance.explained(error)),
            active_units: (self.units.num_units() > 0).then(|| self.units.num_active()),
            divergences: self.units.divergences(),
            neighbors: neighbor_accuracy(&vectors, &labels, metric)?,
        })
    }
}

/// Learns from `latents` which rows are evaluated, and measures them as the tables have them.
fn of_tables(
    job: &Job<'_>,
    question: &Question<'_>,
    positive: &Predicate,
    negative: &Predicate,
    known: &mut Known,
) -> Result<Measured, Error> {
    let mut columns: Vec<&str> = job.source.kept_schema.fields().iter().map(|field| field.name().as_str()).collect();
    columns.extend([column::IMAGE_ID, column::EMBEDDING, column::MU, column::LOGVAR]);
    columns.extend(Rule::OF_IMAGE.map(Rule::name));
    let mut measured = Measured::new(MODEL);
    let cutoffs = match &job.pipeline.anomaly {
        Some(settings) => named_reference(job, settings)?.map(|reference| Cutoffs {
            settings,
            reference,
            decided: Some(settings.rule),
        }),
        None => None,
    };
    let live = job.comparable_latents()?;
    let partitions = live.partitions();
    for partition in &partitions {
        let mut names = vec![partition.name()];
        names.extend((partitions.len() > 1).then(|| ALL.to_owned()));
        known.names.insert(partition.clone(), names);
    }
    // One file at a time: of what is read, only numbers of known rows stay.
    for file in live.files {
        for (file, batch) in job.context.block_on(job.latents.read(vec![file], &columns))? {
            classify(job, question, (positive, negative), &file.partition, &batch, known)?;
            measured.take_scores(known, cutoffs.as_ref(), &file.partition, &batch);
            measured.take_vectors(known, &file.partition, &batch);
        }
    }
    let mut columns = vec![column::IMAGE_ID, column::RULE, column::IS_ANOMALY];
    columns
        .extend(job.pipeline.anomaly.as_ref().and_then(|settings| settings.segment.as_ref()).map(|_| column::SEGMENT));
    columns.extend(Rule::OF_REFERENCE.map(Rule::name));
    for file in job.context.block_on(job.anomalies.live())?.files {
        for (file, batch) in job.context.block_on(job.anomalies.read(vec![file], &columns))? {
            measured.take_scores(known, cutoffs.as_ref(), &file.partition, &batch);
            measured.take_flags(known, &file.partition, &batch);
        }
    }
    Ok(measured)
}

/// Finds the positive and the negative rows of a batch; a row that is both is positive.
fn classify(
    job: &Job<'_>,
    question: &Question<'_>,
    (positive, negative): (&Predicate, &Predicate),
    partition: &PartitionValues,
    batch: &RecordBatch,
    known: &mut Known,
) -> Result<(), Error> {
    let latents = job.latents.store().url();
    let rows =
        partition.extend_batch(batch).map_err(|source| Error::Rows { table: job.latents.name().name(), source })?;
    let keep = |predicate: &Predicate| {
        let fits = |error: PredicateError| Error::Usage {
            message: format!("`{predicate}` does not fit the table {latents}: {error}"),
            hint: "a predicate may use kept columns ([source] columns) and partition keys".to_owned(),
        };
        predicate.check(&rows.schema()).map_err(fits)?;
        predicate.evaluate(&rows).map_err(fits)
    };
    let (is_positive, is_negative) = (keep(positive)?, keep(negative)?);
    let labels = question
        .label
        .map(|label| {
            rows.column_by_name(label).ok_or_else(|| Error::Usage {
                message: format!("{latents} has no column `{label}`"),
                hint: "--label may be a kept column ([source] columns) or a partition key".to_owned(),
            })
        })
        .transpose()?;
    let ids = batch.column_by_name(column::IMAGE_ID).map(AsArray::as_string::<i32>);
    for (row, id) in ids.into_iter().flatten().enumerate() {
        let positive = is_positive.is_valid(row) && is_positive.value(row);
        if positive || is_negative.is_valid(row) && is_negative.value(row) {
            let label = labels.filter(|labels| labels.is_valid(row)).map(|labels| display(labels, row));
            let key = (partition.clone(), id.unwrap_or_default().to_owned());
            known.rows.insert(key, KnownRow { is_positive: positive, label });
        }
    }
    Ok(())
}

/// Fits a linear model with the input and the latents of the pipeline's model to the rows that satisfy `sql`, and measures the known
/// rows with it. Learns on the way how much the images vary.
fn of_baseline(
    job: &Job<'_>,
    sql: &str,
    latent_dim: usize,
    known: &Known,
    variance: &mut TotalVariance,
) -> Result<Measured, Error> {
    parse("--baseline", sql)?;
    let mut pipeline = job.pipeline.clone();
    let own = pipeline.source.predicate.take();
    pipeline.source.predicate = Some(own.map_or_else(|| sql.to_owned(), |own| format!("({own}) AND ({sql})")));
    let model = Arc::new(fit_beside(job.context, &pipeline, job.contract.input.clone(), latent_dim)?);
    let cutoffs = baseline_reference(job, &model)?;
    let mut measured = Measured::new(BASELINE);
    let mut pass = job.pass();
    pass.only_ids = Some(Arc::new(known.rows.keys().map(|(_, id)| id.clone()).collect::<HashSet<_>>()));
    let schema = data_schema(TableName::Latents, &job.source.kept_schema);
    let progress = job.context.progress("evaluate", job.source.num_rows());
    for partition in job.source.partitions.iter().filter(|partition| known.names.contains_key(&partition.values)) {
        for unit in &partition.units {
            let num_rows = pass.score_unit_with_tensors(partition, unit, &model, |scored, tensors| {
                let batch = scored
                    .to_record_batch(&schema, "", "")
                    .map_err(|source| Error::Rows { table: TableName::Latents.name(), source })?;
                let batch = with_comparison(cutoffs.as_ref(), &partition.values, batch)?;
                measured.take_scores(known, cutoffs.as_ref(), &partition.values, &batch);
                measured.take_vectors(known, &partition.values, &batch);
                let is_known: HashSet<usize> =
                    known.rows_of(&partition.values, &batch).into_iter().map(|(row, ..)| row).collect();
                scored
                    .inputs(&tensors)
                    .filter(|(row, _)| is_known.contains(row))
                    .for_each(|(_, tensor)| variance.push(tensor));
                Ok(())
            })?;
            progress.advance(num_rows, 0);
        }
    }
    progress.finish();
    Ok(measured)
}

/// The reference of the pipeline as another model scores it, where the pipeline names one that was made of its source.
fn baseline_reference<'a>(job: &'a Job<'_>, model: &Arc<Model>) -> Result<Option<Cutoffs<'a>>, Error> {
    let Some(settings) = &job.pipeline.anomaly else { return Ok(None) };
    let named = named_reference(job, settings)?;
    let Some(header) = named.as_ref().and_then(ReferenceInUse::reference).map(|reference| reference.header.clone())
    else {
        return Ok(None);
    };
    if header.source != job.source.url().as_str() {
        return Ok(None);
    }
    let header = Header { model_sha256: model.sha256.clone(), elbo_samples: 0, regions: 1, ..header };
    let counted = rows_where(job, header.predicate.clone())?;
    let reference = score(job, settings, model, header, &counted, "the baseline's reference")?;
    Ok(Some(Cutoffs { settings, reference: ReferenceInUse::in_memory(reference), decided: None }))
}

/// Rows of `latents` with the scores that compare them with a reference.
fn with_comparison(
    cutoffs: Option<&Cutoffs<'_>>,
    partition: &PartitionValues,
    batch: RecordBatch,
) -> Result<RecordBatch, Error> {
    let Some((cutoffs, reference)) = cutoffs.and_then(|cutoffs| Some((cutoffs, cutoffs.reference.reference()?))) else {
        return Ok(batch);
    };
    let rows_error = |source| Error::Rows { table: TableName::Latents.name(), source };
    let extended = partition.extend_batch(&batch).map_err(rows_error)?;
    let rows = LatentRows::of(&extended, cutoffs.settings.segment.as_deref())?;
    let compared = compare_rows(reference, partition, &rows)?;
    let mut fields = batch.schema().fields().to_vec();
    let mut columns = batch.columns().to_vec();
    for rule in Rule::OF_REFERENCE {
        fields.push(Arc::new(Field::new(rule.name(), DataType::Float64, true)));
        let scores = compared.iter().map(|found| found.as_ref().and_then(|(_, compared)| compared.get(rule)));
        columns.push(Arc::new(scores.collect::<Float64Array>()));
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(rows_error)
}

/// How well a rule of a model separates positive rows from negative ones.
struct Separation {
    partition: String,
    model: &'static str,
    rule: Rule,
    /// Positive rows that have the score.
    num_positive: usize,
    /// Negative rows that have the score.
    num_negative: usize,
    auroc: Option<f64>,
    average_precision: Option<f64>,
    /// How the flags in `anomalies` meet the truth, where they are of this rule.
    flags: Option<Confusion>,
}

fn separations(measured: &[Measured]) -> Vec<Separation> {
    let mut separations: Vec<Separation> = measured
        .iter()
        .flat_map(|measured| measured.scores.iter().map(move |scores| (measured, scores)))
        .map(|(measured, (key, Classes { positive, negative }))| Separation {
            partition: key.0.clone(),
            model: measured.model,
            rule: key.1,
            num_positive: positive.len(),
            num_negative: negative.len(),
            auroc: auroc(positive, negative),
            average_precision: average_precision(positive, negative),
            flags: measured.flags.get(key).copied(),
        })
        .collect();
    // The sort is stable: the model comes before the baseline.
    separations.sort_by(|a, b| (&a.partition, a.rule).cmp(&(&b.partition, b.rule)));
    separations
}

impl Separation {
    /// The numbers at the threshold, under their names.
    fn at_threshold(&self) -> [(&'static str, Option<f64>); 3] {
        let of = |measure: fn(Confusion) -> Option<f64>| self.flags.and_then(measure);
        [("precision", of(Confusion::precision)), ("recall", of(Confusion::recall)), ("f1", of(Confusion::f1))]
    }

    fn to_json(&self) -> serde_json::Value {
        let mut row = json!({
            "partition": self.partition,
            "model": self.model,
            "rule": self.rule.name(),
            "positive": self.num_positive,
            "negative": self.num_negative,
            "auroc": self.auroc,
            "average_precision": self.average_precision,
        });
        for (name, value) in self.at_threshold() {
            row[name] = value.into();
        }
        row
    }
}

/// What a model makes of the rows, whichever class they are of.
struct Quality {
    model: &'static str,
    latent_dim: usize,
    mean_squared_error: Option<f64>,
    explained_variance: Option<f64>,
    active_units: Option<usize>,
    /// Mean KL divergence of each unit.
    divergences: Vec<f64>,
    neighbors: Option<NeighborAccuracy>,
}

impl Quality {
    fn to_json(&self) -> serde_json::Value {
        json!({
            "model": self.model,
            "latent_dim": self.latent_dim,
            "mean_squared_error": self.mean_squared_error,
            "explained_variance": self.explained_variance,
            "active_units": self.active_units,
            "kl_divergence_per_unit": self.divergences,
            "neighbor_accuracy": self.neighbors.map(|found| found.accuracy),
            "majority_share": self.neighbors.map(|found| found.majority_share),
            "labels": self.neighbors.map(|found| found.num_labels),
            "rows_labeled": self.neighbors.map(|found| found.num_rows),
        })
    }
}

fn four_digits(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
}

/// The rules, by partition: at most 100 characters a line, but for the names of partitions.
fn rules_table(separations: &[Separation]) -> Vec<String> {
    let header = ["rule", "model", "positive", "negative", "AUROC", "AP", "precision", "recall", "F1"];
    let mut table = vec![header.map(str::to_owned).to_vec()];
    table.extend(separations.iter().map(|separation| {
        let mut cells = vec![separation.rule.name().to_owned(), separation.model.to_owned()];
        cells.extend([separation.num_positive, separation.num_negative].map(|count| count.to_string()));
        cells.extend([separation.auroc, separation.average_precision].map(four_digits));
        cells.extend(separation.at_threshold().map(|(_, value)| four_digits(value)));
        cells
    }));
    if separations.is_empty() {
        return Vec::new();
    }
    let mut lines = align(&table).into_iter();
    let mut shown: Vec<String> = lines.next().into_iter().collect();
    let mut partition = None;
    for (separation, line) in separations.iter().zip(lines) {
        if partition != Some(&separation.partition) {
            shown.push(separation.partition.clone());
            partition = Some(&separation.partition);
        }
        shown.push(line);
    }
    shown
}

/// The models side by side, a line for each number that at least one of them has.
fn models_table(qualities: &[Quality]) -> Vec<String> {
    let mut table = vec![vec![String::new()]];
    table[0].extend(qualities.iter().map(|quality| quality.model.to_owned()));
    let mut line = |name: String, cell: &dyn Fn(&Quality) -> Option<String>| {
        let cells: Vec<Option<String>> = qualities.iter().map(cell).collect();
        if cells.iter().any(Option::is_some) {
            let mut row = vec![name];
            row.extend(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "-".to_owned())));
            table.push(row);
        }
    };
    line("latents".to_owned(), &|quality| Some(quality.latent_dim.to_string()));
    line("mean squared error".to_owned(), &|quality| Some(format!("{:.6}", quality.mean_squared_error?)));
    line("explained variance".to_owned(), &|quality| Some(four_digits(Some(quality.explained_variance?))));
    line("active units".to_owned(), &|quality| {
        Some(format!("{} of {}", quality.active_units?, quality.divergences.len()))
    });
    line("KL divergence a unit, nats".to_owned(), &|quality| {
        let largest = quality.divergences.iter().copied().reduce(f64::max)?;
        let mean = quality.divergences.iter().sum::<f64>() / quality.divergences.len() as f64;
        Some(format!("{mean:.3} (largest {largest:.3})"))
    });
    line(format!("label of {VOTERS} neighbors is right"), &|quality| {
        let found = quality.neighbors?;
        Some(format!("{:.4} (guessing {:.4})", found.accuracy, found.majority_share))
    });
    let mut lines = vec![String::new()];
    lines.extend(align(&table));
    lines
}

/// Writes the table of rules as Parquet.
fn write(context: &Context, to: &Url, separations: &[Separation], model_sha256: &str) -> Result<(), Error> {
    type Number = fn(&Separation) -> Option<f64>;
    let text = |name: &str, value: fn(&Separation) -> &str| {
        let values: ArrayRef = Arc::new(StringArray::from_iter_values(separations.iter().map(value)));
        (Field::new(name, DataType::Utf8, false), values)
    };
    let count = |name: &str, value: fn(&Separation) -> usize| {
        let counts = separations.iter().map(|separation| i64::try_from(value(separation)).ok());
        let values: ArrayRef = Arc::new(counts.collect::<Int64Array>());
        (Field::new(name, DataType::Int64, false), values)
    };
    let number = |name: &str, value: Number| {
        let values: ArrayRef = Arc::new(separations.iter().map(value).collect::<Float64Array>());
        (Field::new(name, DataType::Float64, true), values)
    };
    let (fields, columns): (Vec<Field>, Vec<ArrayRef>) = [
        text("partition", |separation| &separation.partition),
        text("model", |separation| separation.model),
        text("rule", |separation| separation.rule.name()),
        count("positive", |separation| separation.num_positive),
        count("negative", |separation| separation.num_negative),
        number("auroc", |separation| separation.auroc),
        number("average_precision", |separation| separation.average_precision),
        number("precision", |separation| separation.flags.and_then(Confusion::precision)),
        number("recall", |separation| separation.flags.and_then(Confusion::recall)),
        number("f1", |separation| separation.flags.and_then(Confusion::f1)),
    ]
    .into_iter()
    .unzip();
    let schema = Arc::new(Schema::new(fields));
    let rows = RecordBatch::try_new(Arc::clone(&schema), columns)
        .map_err(|source| Error::Rows { table: "evaluated rules", source })?;
    let (store, name) = context.open_file(to)?;
    let footer =
        [("version", env!("CARGO_PKG_VERSION").to_owned()), (crate::stages::MODEL_FOOTER, model_sha256.to_owned())];
    let mut file = DataFileWriter::create(&store, to.clone(), name, schema, &footer)?;
    context.block_on(file.write(&rows))?;
    context.block_on(file.close())?;
    Ok(())
}
