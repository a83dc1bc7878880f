//! References: frozen rows taken as normal, which later rows are measured against.
//!
//! A reference is one Parquet file, written once and never changed. It holds a row for each image that was taken as normal: its scores,
//! its pixel statistics and its vector. Everything else is learned from these when it is read ([`crate::normal`]), so any reader
//! can see, and check, what a flag means. The footer says which model, source and settings it is of.
//!
//! Rows are of two kinds. *Counted* rows are what scores are compared with. Rows of the *bank* are known to be normal too, but the
//! model may have learned from them, so their reconstruction says nothing of new images; they add their vectors alone.
//!
//! # Size
//! Up to [`MAX_ROWS`] counted rows, scores are exact. Of more, those are kept whose keys have the smallest hashes: a uniform sample, whose
//! quantiles are off by 0.2 % at most with a chance of 99.9 % (the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart), and
//! against which p-values stay valid. Vectors are kept of [`MAX_VECTORS`] rows of each kind, and scores that take vectors rest on these.
//! Both numbers are for each segment.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{
    Array as _, ArrayRef, AsArray as _, BooleanArray, Float32Builder, Float64Array, ListBuilder, RecordBatch,
    StringArray,
};
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};

use crate::caught::caught;
use crate::config::Threshold;
use crate::decode::DecodeMode;
use crate::hash::Fingerprint;
use crate::neighbors::exact::{JoinError, Metric};
use crate::normal::{Compared, Known, Normal, Space};
use crate::pixel_stats::PixelStat;
use crate::sample::KeyedSample;
use crate::schema::{STATUS_OK, column, vector_type};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::store::{PutOutcome, Store, StoreError};

/// The version of the reference's file format.
pub const FORMAT_VERSION: u32 = 3;

/// Counted rows of a segment that a reference holds at most.
pub const MAX_ROWS: usize = 1_000_000;

/// Vectors of a segment and kind that a reference holds at most: every image is compared with all of them.
pub const MAX_VECTORS: usize = 5_000;

/// Segments at most: each has its own vectors. A column with more values is no segment but a key.
pub const MAX_SEGMENTS: usize = 1_000;

/// Where the footer of the file has the header.
const HEADER_KEY: &str = "lookalike.reference";

/// Columns of the file, beside those of scores and pixel statistics.
const PARTITION: &str = "partition";
const SEGMENT: &str = "segment";
const IS_COUNTED: &str = "is_counted";

/// What to do with a model that gives no such score.
const NO_SCORE: &str = "choose another rule: `fused` takes whatever scores there are";

/// A reference that cannot be used or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is no reference.
    #[error("cannot read the reference {url}: {reason}")]
    Format {
        /// The file.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file was written by another version of the format.
    #[error("the reference {url} has format version {found}, but this program reads {FORMAT_VERSION}")]
    Version {
        /// The file.
        url: String,
        /// Its version.
        found: u32,
    },
    /// The file was changed after it was written.
    #[error("the reference {url} was changed: its rows do not give the id {id}")]
    Changed {
        /// The file.
        url: String,
        /// The id it claims.
        id: String,
    },
    /// The scores in it are another model's.
    #[error("the reference {url} was calibrated with the model {found}, but the pipeline uses {wanted}")]
    OtherModel {
        /// The file.
        url: String,
        /// Its model.
        found: String,
        /// Ours.
        wanted: String,
    },
    /// It was made with other settings.
    #[error("the reference {url} was calibrated with {key} = {found}, but the pipeline has {wanted}")]
    OtherSettings {
        /// The file.
        url: String,
        /// The setting.
        key: &'static str,
        /// Its value there.
        found: String,
        /// Its value here.
        wanted: String,
    },
    /// It has no scores for the rule.
    #[error("{url} has no scores for the rule {}", rule.name())]
    NoScores {
        /// The file, or what stands in for it.
        url: String,
        /// The rule.
        rule: Rule,
    },
    /// It has too few rows for what the threshold promises.
    #[error(
        "{url} has {found} rows{}, which can promise an error rate of {} and no smaller one: not {wanted}",
        segment.as_ref().map(|segment| format!(" of the segment {segment}")).unwrap_or_default(),
        percent(1.0 / (*found as f64 + 1.0)),
    )]
    TooFewRows {
        /// The file.
        url: String,
        /// The segment, where there are segments.
        segment: Option<String>,
        /// Rows with the rule's score.
        found: usize,
        /// The error rate asked for.
        wanted: f64,
    },
    /// More segments than anybody looks at.
    #[error("the column {column} has more than {MAX_SEGMENTS} values, and each would be a segment of its own")]
    TooManySegments {
        /// The column.
        column: String,
    },
    /// The column of the segments is not there.
    #[error("there is no column {column} to make segments by")]
    NoSegmentColumn {
        /// The column.
        column: String,
    },
    /// Another reference lies where this one should go.
    #[error("another reference is already at {url}, and references never change")]
    Exists {
        /// The file.
        url: String,
    },
    /// Its vectors cannot be compared.
    #[error("cannot compare the vectors of the reference {url}")]
    Vectors {
        /// The file, or what stands in for it.
        url: String,
        /// Why.
        source: JoinError,
    },
}

/// A share in percent, with as many digits as it takes.
pub fn percent(share: f64) -> String {
    format!("{} %", crate::report::significant(&(100.0 * share).to_string()))
}

impl ReferenceError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::OtherModel { .. } | Self::Version { .. } => {
                Some("run `lookalike calibrate` with this model".to_owned())
            }
            Self::OtherSettings { .. } => {
                Some("calibrate anew under another name, or set what the reference has".to_owned())
            }
            Self::Exists { .. } => Some("write to a new name, and name it in [anomaly] reference".to_owned()),
            Self::TooFewRows { wanted, .. } => Some(format!(
                "take at least {} rows, or a larger share in [anomaly] threshold",
                (1.0 / wanted).ceil() - 1.0
            )),
            Self::NoScores { rule: Rule::KlDivergence | Rule::NegativeElbo, .. } => {
                Some(format!("the rule needs a model with mu and logvar (and, for the ELBO, a likelihood); {NO_SCORE}"))
            }
            Self::NoScores { rule: Rule::MahalanobisDistance | Rule::KnnDistance | Rule::Fused, .. } => {
                Some("a reference needs at least three different images".to_owned())
            }
            Self::NoScores { rule: Rule::PredScore, .. } => {
                Some(format!("the rule needs a model with `pred_score` or `anomaly_map` in its [outputs]; {NO_SCORE}"))
            }
            Self::NoScores { .. } => Some(format!("the rule needs a model with a reconstruction; {NO_SCORE}")),
            Self::NoSegmentColumn { .. } => {
                Some("[anomaly] segment names a kept column ([source] columns) or a partition key".to_owned())
            }
            Self::Format { .. } => Some("`lookalike calibrate` writes references, as Parquet files".to_owned()),
            Self::Store(error) if error.is_not_found() => Some("`lookalike calibrate` writes one".to_owned()),
            _ => None,
        }
    }
}

/// What a reference is of. In the footer of its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// The model, and with it the encoder, whose scores these are.
    pub model_sha256: String,
    /// Samples of which the negative ELBO is the mean; 0: it is taken at mu.
    pub elbo_samples: usize,
    /// How closely the rows' pixels follow those of the model's training.
    pub decode: DecodeMode,
    /// Where the rows came from.
    pub source: String,
    /// Which of them are counted.
    pub predicate: Option<String>,
    /// Which of them are the bank.
    pub bank: Option<String>,
    /// The column by whose values rows are compared with rows of their own kind.
    pub segment: Option<String>,
    /// Regions of the embedding.
    pub regions: usize,
    /// How distances to neighbors are measured.
    pub metric: Metric,
    /// Which neighbor's distance counts.
    pub k: usize,
}

impl Header {
    /// All but where the rows came from: the same rows of a copy elsewhere are the same reference.
    pub fn identity(&self) -> String {
        serde_json::to_string(&Self { source: String::new(), ..self.clone() }).unwrap_or_default()
    }

    fn space(&self) -> Space {
        Space { regions: self.regions, metric: self.metric, k: self.k }
    }
}

/// The header with what follows from the rows: for people and other programs. What it does not know must be the header's.
#[derive(Debug, Serialize, Deserialize)]
struct Footer {
    id: String,
    /// A [`Header`]; of another version of the format, whatever that has.
    header: serde_json::Value,
    num_rows: usize,
    num_rejected: usize,
    moments: BTreeMap<String, BTreeMap<Rule, Moments>>,
}

/// Summary of the scores of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    /// Rows that have it.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation (divided by the count).
    pub standard_deviation: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// A row of a reference.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceRow {
    /// Its partition, as [`PartitionValues`] spells it.
    pub partition: String,
    /// Its id.
    pub image_id: String,
    /// Whether scores are compared with its scores.
    pub is_counted: bool,
    /// By the order of [`Rule::OF_IMAGE`].
    pub scores: [Option<f64>; Rule::OF_IMAGE.len()],
    /// By the order of [`PixelStat::ALL`].
    pub stats: [Option<f64>; PixelStat::ALL.len()],
    /// Its vector, if that is kept.
    pub embedding: Option<Vec<f32>>,
}

impl ReferenceRow {
    /// What the row is known by, among all of its segment.
    pub fn key(&self) -> String {
        key(&self.partition, &self.image_id)
    }

    fn known(&self) -> Known<'_> {
        known(&self.scores, &self.stats, self.embedding.as_deref())
    }

    fn fingerprint(&self) -> Vec<u8> {
        let mut bytes = format!("{}\0{}\0{}", self.partition, self.image_id, self.is_counted).into_bytes();
        for number in self.scores.iter().chain(&self.stats) {
            bytes.extend(number.unwrap_or(f64::NAN).to_le_bytes());
        }
        bytes.extend(self.embedding.iter().flatten().flat_map(|value| value.to_le_bytes()));
        bytes
    }
}

fn key(partition: &str, image_id: &str) -> String {
    format!("{partition}\0{image_id}")
}

fn known<'a>(scores: &[Option<f64>], stats: &[Option<f64>], embedding: Option<&'a [f32]>) -> Known<'a> {
    let error = Rule::OF_IMAGE.iter().position(|rule| *rule == Rule::Top1PctSquaredError);
    let complexity = PixelStat::ALL.iter().position(|stat| *stat == PixelStat::Complexity);
    Known {
        error: error.and_then(|place| scores[place]),
        complexity: complexity.and_then(|place| stats[place]),
        embedding,
    }
}

/// The columns of `latents` that a reference and the rules need, without those of the segment.
pub fn columns() -> Vec<&'static str> {
    let mut columns = vec![column::IMAGE_ID, column::STATUS, column::EMBEDDING];
    columns.extend(Rule::OF_IMAGE.map(Rule::name));
    columns.extend(PixelStat::ALL.map(PixelStat::name));
    columns
}

/// Rows of `latents`, taken apart.
#[derive(Debug)]
pub struct LatentRows<'a> {
    ids: &'a StringArray,
    statuses: &'a StringArray,
    embeddings: &'a arrow::array::ListArray,
    scores: Vec<&'a Float64Array>,
    stats: Vec<&'a Float64Array>,
    segments: Option<Vec<Option<String>>>,
}

impl<'a> LatentRows<'a> {
    /// Takes apart a batch that has [`columns`] and the column of the segments.
    pub fn of(batch: &'a RecordBatch, segment: Option<&str>) -> Result<Self, ReferenceError> {
        let column = |name: &str| {
            batch.column_by_name(name).ok_or_else(|| ReferenceError::NoSegmentColumn { column: name.to_owned() })
        };
        let numbers = |names: &[&str]| {
            names
                .iter()
                .map(|name| Ok(column(name)?.as_primitive::<Float64Type>()))
                .collect::<Result<Vec<_>, ReferenceError>>()
        };
        let text = |name: &str| {
            let values = column(name)?;
            let value = |row: usize| values.is_valid(row).then(|| crate::report::display(values, row));
            Ok::<_, ReferenceError>((0..batch.num_rows()).map(value).collect())
        };
        Ok(Self {
            ids: column(column::IMAGE_ID)?.as_string(),
            statuses: column(column::STATUS)?.as_string(),
            embeddings: column(column::EMBEDDING)?.as_list(),
            scores: numbers(&Rule::OF_IMAGE.map(Rule::name))?,
            stats: numbers(&PixelStat::ALL.map(PixelStat::name))?,
            segments: segment.map(text).transpose()?,
        })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The ids.
    pub fn ids(&self) -> &StringArray {
        self.ids
    }

    /// Whether the image of a row could be used.
    pub fn is_ok(&self, row: usize) -> bool {
        self.statuses.value(row) == STATUS_OK
    }

    /// The segment of a row; `None` where it has none.
    pub fn segment(&self, row: usize) -> Option<&str> {
        self.segments.as_ref().and_then(|segments| segments[row].as_deref())
    }

    /// The score of a row by a rule that looks at one image.
    pub fn score(&self, row: usize, rule: Rule) -> Option<f64> {
        let place = Rule::OF_IMAGE.iter().position(|other| *other == rule)?;
        number(self.scores[place], row)
    }

    fn scores(&self, row: usize) -> [Option<f64>; Rule::OF_IMAGE.len()] {
        std::array::from_fn(|place| number(self.scores[place], row))
    }

    /// The pixel statistics of a row, by the order of [`PixelStat::ALL`].
    pub fn stats(&self, row: usize) -> [Option<f64>; PixelStat::ALL.len()] {
        std::array::from_fn(|place| number(self.stats[place], row))
    }

    /// The vector of a row; empty where it has none.
    pub fn embedding(&self, row: usize) -> &[f32] {
        let offsets = self.embeddings.value_offsets();
        let range = usize::try_from(offsets[row]).unwrap_or(0)..usize::try_from(offsets[row + 1]).unwrap_or(0);
        let values = self.embeddings.values().as_primitive::<Float32Type>().values();
        if self.embeddings.is_valid(row) { &values[range] } else { &[] }
    }
}

fn number(values: &Float64Array, row: usize) -> Option<f64> {
    values.is_valid(row).then(|| values.value(row))
}

/// Gathers rows into a reference.
#[derive(Debug)]
pub struct ReferenceBuilder {
    header: Header,
    segments: BTreeMap<Option<String>, Samples>,
    num_rows: usize,
    num_rejected: usize,
}

#[derive(Debug)]
struct Samples {
    counted: KeyedSample<ReferenceRow>,
    /// Vectors of counted rows.
    vectors: KeyedSample<(String, Vec<f32>)>,
    bank: KeyedSample<ReferenceRow>,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            counted: KeyedSample::new(MAX_ROWS),
            vectors: KeyedSample::new(MAX_VECTORS),
            bank: KeyedSample::new(MAX_VECTORS),
        }
    }
}

impl ReferenceBuilder {
    /// A reference without rows.
    pub fn new(header: Header) -> Self {
        Self { header, segments: BTreeMap::new(), num_rows: 0, num_rejected: 0 }
    }

    /// Adds rows of `latents`, counted or to the bank. Rows that could not be used are only told.
    pub fn push(
        &mut self,
        partition: &PartitionValues,
        rows: &LatentRows<'_>,
        is_counted: bool,
    ) -> Result<(), ReferenceError> {
        let partition = partition.to_string();
        for row in 0..rows.len() {
            if !rows.is_ok(row) {
                self.num_rejected += usize::from(is_counted);
                continue;
            }
            self.num_rows += usize::from(is_counted);
            let segment = rows.segment(row).map(str::to_owned);
            let samples = self.segments.entry(segment).or_default();
            let image_id = rows.ids.value(row);
            let key = key(&partition, image_id);
            let embedding = rows.embedding(row);
            let found = |embedding| ReferenceRow {
                partition: partition.clone(),
                image_id: image_id.to_owned(),
                is_counted,
                scores: rows.scores(row),
                stats: rows.stats(row),
                embedding,
            };
            if is_counted {
                samples.counted.push(&key, || found(None));
                samples.vectors.push(&key, || (key.clone(), embedding.to_vec()));
            } else {
                samples.bank.push(&key, || found(Some(embedding.to_vec())));
            }
            if self.segments.len() > MAX_SEGMENTS {
                let column = self.header.segment.clone().unwrap_or_default();
                return Err(ReferenceError::TooManySegments { column });
            }
        }
        Ok(())
    }

    /// Freezes the reference. `url` names it in errors.
    pub fn build(self, url: &str) -> Result<Reference, ReferenceError> {
        let segments = self.segments.into_iter().map(|(segment, samples)| {
            let vectors: HashMap<&str, &Vec<f32>> =
                samples.vectors.rows().map(|(key, vector)| (key.as_str(), vector)).collect();
            let counted = samples.counted.rows().map(|row| ReferenceRow {
                embedding: vectors.get(row.key().as_str()).map(|vector| (*vector).clone()),
                ..row.clone()
            });
            // A row that is in both counts: the caller says that the model has not learned from it.
            let counted: Vec<ReferenceRow> = counted.collect();
            let keys: std::collections::HashSet<String> = counted.iter().map(ReferenceRow::key).collect();
            let bank = samples.bank.rows().filter(|row| !keys.contains(&row.key())).cloned();
            let bank: Vec<ReferenceRow> = bank.collect();
            (segment, counted.into_iter().chain(bank).collect())
        });
        Reference::assemble(self.header, (self.num_rows, self.num_rejected), segments.collect(), url)
    }
}

/// Frozen rows taken as normal, with what was learned from them.
#[derive(Debug)]
pub struct Reference {
    /// Fingerprint of the header and of all rows: equal ids mean equal references.
    pub id: String,
    /// What it is of.
    pub header: Header,
    /// Counted rows that it was made of.
    pub num_rows: usize,
    /// Rows that could not be used, which are not in it.
    pub num_rejected: usize,
    segments: BTreeMap<Option<String>, Segment>,
}

/// The rows of one segment.
#[derive(Debug)]
pub struct Segment {
    rows: Vec<ReferenceRow>,
    /// By row.
    compared: Vec<Compared>,
    normal: Normal,
    /// Place in the bank of vectors, by key.
    places: HashMap<String, (u32, usize)>,
    /// The scores of counted rows by each rule that they have, ascending.
    sorted: BTreeMap<Rule, Vec<f64>>,
}

impl Segment {
    fn learn(rows: Vec<ReferenceRow>, space: Space) -> Result<Self, JoinError> {
        let known: Vec<Known<'_>> = rows.iter().map(ReferenceRow::known).collect();
        let (normal, compared) = Normal::learn(&known, |row| rows[row].is_counted, space)?;
        let with_vector = rows.iter().enumerate().filter(|(_, row)| row.embedding.is_some());
        let places = (0..).zip(with_vector).map(|(place, (number, row))| (row.key(), (place, number))).collect();
        let mut sorted: BTreeMap<Rule, Vec<f64>> = BTreeMap::new();
        for (row, compared) in rows.iter().zip(&compared).filter(|(row, _)| row.is_counted) {
            let of_image = Rule::OF_IMAGE.into_iter().zip(row.scores);
            let of_reference = Rule::OF_REFERENCE.into_iter().map(|rule| (rule, compared.get(rule)));
            for (rule, score) in of_image.chain(of_reference) {
                if let Some(score) = score {
                    sorted.entry(rule).or_default().push(score);
                }
            }
        }
        for scores in sorted.values_mut() {
            scores.sort_unstable_by(f64::total_cmp);
        }
        Ok(Self { rows, compared, normal, places, sorted })
    }

    /// The rows, each with its scores as if it were not in the reference.
    pub fn rows(&self) -> impl Iterator<Item = (&ReferenceRow, &Compared)> {
        self.rows.iter().zip(&self.compared)
    }

    /// The counted scores of a rule, ascending; none where there are no such scores.
    pub fn scores(&self, rule: Rule) -> &[f64] {
        self.sorted.get(&rule).map(Vec::as_slice).unwrap_or_default()
    }

    /// Compares rows of `latents`, by their numbers in the batch. A row that is in the reference is compared with the others.
    pub fn compare(
        &self,
        partition: &str,
        rows: &LatentRows<'_>,
        numbers: &[usize],
    ) -> Result<Vec<Compared>, JoinError> {
        let scores: Vec<_> = numbers.iter().map(|row| (rows.scores(*row), rows.stats(*row))).collect();
        let known: Vec<Known<'_>> = numbers
            .iter()
            .zip(&scores)
            .map(|(row, (scores, stats))| known(scores, stats, Some(rows.embedding(*row))))
            .collect();
        let own = |row: usize| {
            let (place, number) = self.places.get(&key(partition, rows.ids.value(row)))?;
            // An id may have got another image since.
            (self.rows[*number].embedding.as_deref() == Some(rows.embedding(row))).then_some((*place, *number))
        };
        let own: Vec<Option<(u32, usize)>> = numbers.iter().map(|row| own(*row)).collect();
        let places: Vec<Option<u32>> = own.iter().map(|own| own.map(|(place, _)| place)).collect();
        let mut compared = self.normal.compare(&known, &places)?;
        for (compared, own) in compared.iter_mut().zip(own) {
            if let Some((_, number)) = own {
                *compared = self.compared[number];
            }
        }
        Ok(compared)
    }
}

impl Reference {
    fn assemble(
        header: Header,
        (num_rows, num_rejected): (usize, usize),
        segments: BTreeMap<Option<String>, Vec<ReferenceRow>>,
        url: &str,
    ) -> Result<Self, ReferenceError> {
        let mut fingerprint = Fingerprint::new("reference")
            .with("header", &header.identity())
            .with("rows", &num_rows.to_string())
            .with("rejected", &num_rejected.to_string());
        for (segment, rows) in &segments {
            let bytes: Vec<u8> = rows.iter().flat_map(ReferenceRow::fingerprint).collect();
            fingerprint =
                fingerprint.with("segment", &format!("{segment:?}")).with("content", &crate::hash::sha256(&bytes));
        }
        let space = header.space();
        let learn = |(segment, rows)| Ok((segment, Segment::learn(rows, space)?));
        let segments = segments
            .into_iter()
            .map(learn)
            .collect::<Result<_, JoinError>>()
            .map_err(|source| ReferenceError::Vectors { url: url.to_owned(), source })?;
        Ok(Self { id: fingerprint.short(), header, num_rows, num_rejected, segments })
    }

    /// The segments, by the value of the column that they are made by.
    pub fn segments(&self) -> impl Iterator<Item = (Option<&str>, &Segment)> {
        self.segments.iter().map(|(name, segment)| (name.as_deref(), segment))
    }

    /// The segment of a value; `None` where the reference has no rows of it.
    pub fn segment(&self, name: Option<&str>) -> Option<&Segment> {
        self.segments.get(&name.map(str::to_owned))
    }

    /// Fails where the reference cannot keep what a threshold promises: no scores of the rule, or so few that the smallest
    /// p-value they allow is larger than the share asked for.
    pub fn check(&self, rule: Rule, threshold: Threshold, url: &str) -> Result<(), ReferenceError> {
        if self.segments.values().all(|segment| segment.scores(rule).is_empty()) {
            return Err(ReferenceError::NoScores { url: url.to_owned(), rule });
        }
        let Some(wanted) = threshold.share().filter(|share| *share > 0.0) else { return Ok(()) };
        for (name, segment) in &self.segments {
            let found = segment.scores(rule).len();
            // As many as it takes, but for rounding.
            if wanted * (found as f64 + 1.0) < 1.0 - 1e-9 {
                let segment = self
                    .header
                    .segment
                    .as_ref()
                    .map(|column| format!("{column} = {}", name.as_deref().unwrap_or("null")));
                return Err(ReferenceError::TooFewRows { url: url.to_owned(), segment, found, wanted });
            }
        }
        Ok(())
    }

    /// Reads the reference `name` of `store` and checks that it is whole and of this model.
    pub async fn read(store: &Store, name: &str, model_sha256: &str) -> Result<Self, ReferenceError> {
        let url = store.url_of(name);
        let bytes = store.get(name).await?;
        let format = |reason: String| ReferenceError::Format { url: url.clone(), reason };
        // The reader owns all that it touches.
        let (footer, segments) = caught(|| parse(bytes)).map_err(format)?.map_err(|error| format(error.to_string()))?;
        let version = footer.header.get("format_version").and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(FORMAT_VERSION)) {
            let found = version.and_then(|version| u32::try_from(version).ok()).unwrap_or_default();
            return Err(ReferenceError::Version { url, found });
        }
        let header: Header = serde_json::from_value(footer.header).map_err(|error| format(error.to_string()))?;
        if header.model_sha256 != model_sha256 {
            return Err(ReferenceError::OtherModel {
                url,
                found: header.model_sha256,
                wanted: model_sha256.to_owned(),
            });
        }
        let reference = Self::assemble(header, (footer.num_rows, footer.num_rejected), segments, &url)?;
        if reference.id == footer.id { Ok(reference) } else { Err(ReferenceError::Changed { url, id: footer.id }) }
    }

    /// Writes the reference as `name`, once: the same one again is fine, another one is refused.
    pub async fn write(&self, store: &Store, name: &str) -> Result<(), ReferenceError> {
        let url = store.url_of(name);
        let file = self
            .to_parquet()
            .map_err(|error| ReferenceError::Format { url: url.clone(), reason: error.to_string() })?;
        match store.put_if_absent(name, file).await? {
            PutOutcome::Created => Ok(()),
            PutOutcome::AlreadyThere => match Self::read(store, name, &self.header.model_sha256).await {
                Ok(there) if there.id == self.id => Ok(()),
                Ok(_)
                | Err(
                    ReferenceError::OtherModel { .. } | ReferenceError::Version { .. } | ReferenceError::Format { .. },
                ) => Err(ReferenceError::Exists { url }),
                Err(error) => Err(error),
            },
        }
    }

    fn footer(&self) -> Footer {
        let moments = |segment: &Segment| {
            let of = |(rule, scores): (&Rule, &Vec<f64>)| Some((*rule, Moments::of(scores)?));
            segment.sorted.iter().filter_map(of).collect()
        };
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "null".to_owned());
        Footer {
            id: self.id.clone(),
            header: serde_json::to_value(&self.header).unwrap_or_default(),
            num_rows: self.num_rows,
            num_rejected: self.num_rejected,
            moments: self.segments.iter().map(|(segment, found)| (name(segment), moments(found))).collect(),
        }
    }

    fn to_parquet(&self) -> Result<Bytes, ParquetError> {
        let rows: Vec<(Option<&str>, &ReferenceRow)> =
            self.segments().flat_map(|(name, segment)| segment.rows.iter().map(move |row| (name, row))).collect();
        let element = Arc::new(Field::new("element", DataType::Float32, false));
        let mut embeddings = ListBuilder::new(Float32Builder::new()).with_field(element);
        for (_, row) in &rows {
            if let Some(embedding) = &row.embedding {
                embeddings.values().append_slice(embedding);
            }
            embeddings.append(row.embedding.is_some());
        }
        let mut columns: Vec<(&str, bool, ArrayRef)> = vec![
            (
                column::IMAGE_ID,
                false,
                Arc::new(rows.iter().map(|(_, row)| Some(&row.image_id)).collect::<StringArray>()),
            ),
            (PARTITION, false, Arc::new(rows.iter().map(|(_, row)| Some(&row.partition)).collect::<StringArray>())),
            (SEGMENT, true, Arc::new(rows.iter().map(|(segment, _)| *segment).collect::<StringArray>())),
            (IS_COUNTED, false, Arc::new(rows.iter().map(|(_, row)| Some(row.is_counted)).collect::<BooleanArray>())),
        ];
        for (place, rule) in Rule::OF_IMAGE.into_iter().enumerate() {
            let values: Float64Array = rows.iter().map(|(_, row)| row.scores[place]).collect();
            columns.push((rule.name(), true, Arc::new(values)));
        }
        for (place, stat) in PixelStat::ALL.into_iter().enumerate() {
            let values: Float64Array = rows.iter().map(|(_, row)| row.stats[place]).collect();
            columns.push((stat.name(), true, Arc::new(values)));
        }
        columns.push((column::EMBEDDING, true, Arc::new(embeddings.finish())));
        let fields =
            columns.iter().map(|(name, nullable, values)| Field::new(*name, values.data_type().clone(), *nullable));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let batch =
            RecordBatch::try_new(Arc::clone(&schema), columns.into_iter().map(|(.., values)| values).collect())?;
        let header = serde_json::to_string(&self.footer()).map_err(|error| ParquetError::External(Box::new(error)))?;
        let properties = WriterProperties::builder()
            .set_compression(parquet::basic::Compression::ZSTD(parquet::basic::ZstdLevel::default()))
            .set_dictionary_enabled(false)
            .set_key_value_metadata(Some(vec![KeyValue::new(HEADER_KEY.to_owned(), header)]))
            .build();
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, schema, Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(file.into())
    }
}

impl Moments {
    fn of(scores: &[f64]) -> Option<Self> {
        let (min, max) = (*scores.first()?, *scores.last()?);
        let count = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / count;
        let variance = scores.iter().map(|score| (score - mean) * (score - mean)).sum::<f64>() / count;
        Some(Self { count: scores.len(), mean, standard_deviation: variance.sqrt(), min, max })
    }
}

type Parsed = (Footer, BTreeMap<Option<String>, Vec<ReferenceRow>>);

/// Takes a reference's file apart.
fn parse(file: Bytes) -> Result<Parsed, Box<dyn std::error::Error>> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let pairs = reader.metadata().file_metadata().key_value_metadata();
    let header = pairs.into_iter().flatten().find(|pair| pair.key == HEADER_KEY).and_then(|pair| pair.value.as_deref());
    let footer: Footer = serde_json::from_str(header.ok_or("its footer is not that of a reference")?)?;
    let mut segments: BTreeMap<Option<String>, Vec<ReferenceRow>> = BTreeMap::new();
    for batch in reader.build()? {
        let batch = batch?;
        let column = |name: &str, data_type: &DataType| {
            let column = batch.column_by_name(name).filter(|column| column.data_type() == data_type);
            column.ok_or_else(|| format!("it has no column `{name}` of type {data_type}"))
        };
        let text = |name: &str| Ok::<_, String>(column(name, &DataType::Utf8)?.as_string::<i32>());
        let (ids, partitions, names) = (text(column::IMAGE_ID)?, text(PARTITION)?, text(SEGMENT)?);
        let counted = column(IS_COUNTED, &DataType::Boolean)?.as_boolean();
        let numbers = |name: &str| Ok::<_, String>(column(name, &DataType::Float64)?.as_primitive::<Float64Type>());
        let scores = Rule::OF_IMAGE.iter().map(|rule| numbers(rule.name())).collect::<Result<Vec<_>, _>>()?;
        let stats = PixelStat::ALL.iter().map(|stat| numbers(stat.name())).collect::<Result<Vec<_>, _>>()?;
        let embeddings = column(column::EMBEDDING, &vector_type())?.as_list::<i32>();
        for row in 0..batch.num_rows() {
            let embedding = embeddings.is_valid(row).then(|| embeddings.value(row));
            let found = ReferenceRow {
                partition: partitions.value(row).to_owned(),
                image_id: ids.value(row).to_owned(),
                is_counted: counted.value(row),
                scores: std::array::from_fn(|place| number(scores[place], row)),
                stats: std::array::from_fn(|place| number(stats[place], row)),
                embedding: embedding.map(|values| values.as_primitive::<Float32Type>().values().to_vec()),
            };
            let name = names.is_valid(row).then(|| names.value(row).to_owned());
            segments.entry(name).or_default().push(found);
        }
    }
    Ok((footer, segments))
}
