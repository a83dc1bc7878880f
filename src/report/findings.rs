//! What the tables say of the partitions of a report: counts, the strangest images, groups, rejects, the distribution of scores, and a
//! sample for the map.
//!
//! Tables are read a batch at a time, a partition after the other. What is held is bounded, but for the ids of near-duplicates of one
//! partition.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use arrow::array::{Array as _, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{Float32Type, Float64Type, Int64Type};
use futures::TryStreamExt as _;
use ndarray::Array2;
use serde_json::Value;

use super::data::{
    Group, GroupImage, Histogram, MapColumn, Panels, Rejected, RejectedImage, SegmentThreshold, Strange,
};
use super::pictures::Key;
use super::shown;
use crate::error::Error;
use crate::reference::Reference;
use crate::report::display;
use crate::sample::KeyedSample;
use crate::schema::{STATUS_OK, column};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::stages::Job;
use crate::table::{Live, LiveFile, Table};

/// Images of highest score that are shown.
pub(super) const STRANGEST: usize = 24;

/// Groups that are shown, and images of each.
pub(super) const GROUPS: usize = 12;
pub(super) const IMAGES_OF_A_GROUP: usize = 12;

/// Examples of each cause of a reject.
const EXAMPLES: usize = 5;

/// Points of the map.
pub(super) const POINTS: usize = 3000;

/// Kept columns of the points, and different texts of one: what has more is no group of images, such as a path.
const MAP_COLUMNS: usize = 8;
const MAX_TEXTS: usize = 40;

/// Bins of the histogram.
const BINS: usize = 60;

/// Scores whose largest is so many times their median are told apart by their logarithms.
const WIDE: f64 = 20.0;

/// Scores from which the middle of the distribution is known, for the bins.
const SAMPLED_SCORES: usize = 2000;

/// Thresholds that are drawn.
const THRESHOLDS: usize = 12;

/// Rows read at a time.
const BATCH_ROWS: usize = 8192;

/// The live files of a table in some partitions.
pub(super) fn files_of(live: &Live, partitions: &[PartitionValues]) -> Vec<LiveFile> {
    live.files.iter().filter(|file| partitions.contains(&file.partition)).cloned().collect()
}

/// Hands columns of a file to `sink`, some rows at a time, with the number of the first of them.
fn scan(
    job: &Job<'_>,
    table: &Table,
    file: &LiveFile,
    columns: &[&str],
    mut sink: impl FnMut(usize, &RecordBatch) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut batches = job.context.block_on(table.scan(file, columns, None, BATCH_ROWS))?;
    let mut first_row = 0;
    while let Some(rows) = job.context.block_on(batches.try_next())? {
        job.context.stop.check()?;
        sink(first_row, &rows)?;
        first_row += rows.num_rows();
    }
    Ok(())
}

fn texts<'a>(rows: &'a RecordBatch, name: &str) -> Option<&'a StringArray> {
    rows.column_by_name(name).and_then(|values| values.as_string_opt::<i32>())
}

fn float(rows: &RecordBatch, name: &str, row: usize) -> Option<f64> {
    let values = rows.column_by_name(name)?.as_primitive_opt::<Float64Type>()?;
    values.is_valid(row).then(|| values.value(row))
}

fn whole(rows: &RecordBatch, name: &str, row: usize) -> Option<u64> {
    let values = rows.column_by_name(name)?.as_primitive_opt::<Int64Type>()?;
    values.is_valid(row).then(|| u64::try_from(values.value(row)).ok()).flatten()
}

fn flag(rows: &RecordBatch, row: usize) -> Option<bool> {
    let values = rows.column_by_name(column::IS_ANOMALY)?.as_boolean_opt()?;
    values.is_valid(row).then(|| values.value(row))
}

/// A key by which rows of a run are sampled.
fn key(partition: &str, id: &str) -> String {
    format!("{partition}\0{id}")
}

/// A float that sorts.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// What `anomalies` says.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) strangest: Vec<Strange>,
    /// Score and flag of the points of the map, in their order.
    pub(super) points: Vec<(Option<f64>, Option<bool>)>,
    pub(super) histogram: Option<Histogram>,
}

/// The rows of highest score, with the range of the scores and their middle.
struct Highest {
    rows: BTreeMap<(Reverse<Ordered>, String, String), Strange>,
    range: Option<(f64, f64)>,
    sampled: KeyedSample<f64>,
    missing: u64,
    thresholds: BTreeMap<Option<String>, f64>,
}

impl Highest {
    fn read(job: &Job<'_>, files: &[LiveFile]) -> Result<Self, Error> {
        let columns = [
            column::IMAGE_ID,
            column::ANOMALY_SCORE,
            column::SEVERITY_PERCENTILE,
            column::P_VALUE,
            column::ANOMALY_THRESHOLD,
            column::IS_ANOMALY,
            column::REASONS,
            column::SEGMENT,
        ];
        let (rows, sampled) = (BTreeMap::new(), KeyedSample::new(SAMPLED_SCORES));
        let mut highest = Self { rows, range: None, sampled, missing: 0, thresholds: BTreeMap::new() };
        for file in files {
            let partition = file.partition.to_string();
            scan(job, &job.anomalies, file, &columns, |_, rows| {
                let Some(ids) = texts(rows, column::IMAGE_ID) else { return Ok(()) };
                for row in 0..rows.num_rows() {
                    highest.push(rows, row, ids.value(row), &partition);
                }
                Ok(())
            })?;
        }
        Ok(highest)
    }

    fn push(&mut self, rows: &RecordBatch, row: usize, id: &str, partition: &str) {
        let Some(score) = float(rows, column::ANOMALY_SCORE, row) else {
            self.missing += 1;
            return;
        };
        let (low, high) = self.range.unwrap_or((score, score));
        self.range = Some((low.min(score), high.max(score)));
        self.sampled.push(&key(partition, id), || score);
        if self.thresholds.len() < THRESHOLDS
            && let Some(threshold) = float(rows, column::ANOMALY_THRESHOLD, row)
        {
            let segment = texts(rows, column::SEGMENT).filter(|values| values.is_valid(row));
            self.thresholds.entry(segment.map(|values| shown(values.value(row)))).or_insert(threshold);
        }
        let place = (Reverse(Ordered(score)), id.to_owned(), partition.to_owned());
        if self.rows.len() >= STRANGEST && self.rows.last_key_value().is_some_and(|(last, _)| place > *last) {
            return;
        }
        let lists = rows.column_by_name(column::REASONS).and_then(|values| values.as_list_opt::<i32>());
        let reasons = lists.filter(|lists| lists.is_valid(row)).map(|lists| lists.value(row));
        let reasons = reasons.as_ref().and_then(|reasons| reasons.as_string_opt::<i32>());
        let strange = Strange {
            image_id: id.to_owned(),
            partition: partition.to_owned(),
            score,
            percentile: float(rows, column::SEVERITY_PERCENTILE, row),
            p_value: float(rows, column::P_VALUE, row),
            is_anomaly: flag(rows, row) == Some(true),
            reasons: reasons.into_iter().flatten().flatten().map(str::to_owned).collect(),
            columns: serde_json::Map::new(),
            pictures: Panels::default(),
            largest_error: None,
        };
        self.rows.insert(place, strange);
        if self.rows.len() > STRANGEST {
            self.rows.pop_last();
        }
    }

    /// Ends of bins that tell the scores apart.
    fn edges(&self) -> Option<Vec<f64>> {
        let (low, high) = self.range?;
        let mut scores: Vec<f64> = self.sampled.rows().copied().collect();
        scores.sort_by(f64::total_cmp);
        let median = scores.get(scores.len() / 2).copied().unwrap_or(low);
        let share = |number: usize| number as f64 / BINS as f64;
        let is_wide = low > 0.0 && high > WIDE * median;
        Some(match high - low {
            // All alike: one bin has them all.
            0.0 => (0..=BINS).map(|number| low - 0.5 + share(number)).collect(),
            _ if is_wide => (0..=BINS).map(|number| low * (high / low).powf(share(number))).collect(),
            width => (0..=BINS).map(|number| low + width * share(number)).collect(),
        })
    }
}

/// The bin of a score.
fn bin(edges: &[f64], score: f64) -> usize {
    edges.partition_point(|edge| *edge <= score).saturating_sub(1).min(edges.len().saturating_sub(2))
}

/// Reads what `anomalies` says of some partitions. Its columns are gone through twice: bins need the ends of the scores.
pub(super) fn judged(
    job: &Job<'_>,
    files: &[LiveFile],
    rule: Rule,
    reference: Option<&Reference>,
    points: impl FnOnce(&[Strange]) -> Result<Vec<Point>, Error>,
) -> Result<(Judged, Vec<Point>), Error> {
    let highest = Highest::read(job, files)?;
    let edges = highest.edges();
    let strangest: Vec<Strange> = highest.rows.into_values().collect();
    let points = points(&strangest)?;
    let mut found = vec![(None, None); points.len()];
    let mut places: HashMap<&str, HashMap<&str, usize>> = HashMap::new();
    for (place, point) in points.iter().enumerate() {
        places.entry(&point.partition).or_default().insert(&point.image_id, place);
    }
    let (mut counts, mut flagged) = (vec![0; BINS], vec![0; BINS]);
    for file in files {
        let partition = file.partition.to_string();
        let of_partition = places.get(partition.as_str());
        let columns = [column::IMAGE_ID, column::ANOMALY_SCORE, column::IS_ANOMALY];
        scan(job, &job.anomalies, file, &columns, |_, rows| {
            let Some(ids) = texts(rows, column::IMAGE_ID) else { return Ok(()) };
            for row in 0..rows.num_rows() {
                let (score, is_anomaly) = (float(rows, column::ANOMALY_SCORE, row), flag(rows, row));
                if let (Some(score), Some(edges)) = (score, &edges) {
                    counts[bin(edges, score)] += 1;
                    flagged[bin(edges, score)] += u64::from(is_anomaly == Some(true));
                }
                if let Some(place) = of_partition.and_then(|of| of.get(ids.value(row))) {
                    found[*place] = (score, is_anomaly);
                }
            }
            Ok(())
        })?;
    }
    let histogram = edges.map(|edges| {
        let of_reference = reference.map(|reference| {
            let mut counts = vec![0; BINS];
            for score in reference.segments().flat_map(|(_, segment)| segment.scores(rule)) {
                counts[bin(&edges, *score)] += 1;
            }
            counts
        });
        let threshold = |(segment, value)| SegmentThreshold { segment, value };
        Histogram {
            column: rule.name().to_owned(),
            edges,
            counts,
            flagged,
            reference: of_reference,
            thresholds: highest.thresholds.into_iter().map(threshold).collect(),
            missing: highest.missing,
        }
    });
    Ok((Judged { strangest, points: found, histogram }, points))
}

/// An image on the map.
#[derive(Debug)]
pub(super) struct Point {
    pub(super) image_id: String,
    pub(super) partition: String,
    /// Number of its file among those that were read, and its row there.
    place: (usize, usize),
    /// Its kept columns.
    kept: Vec<Value>,
}

/// What `latents` says.
#[derive(Debug, Default)]
pub(super) struct Embedded {
    pub(super) points: Vec<Point>,
    pub(super) rejects: Vec<Rejected>,
    /// Compressed bytes of the near-duplicates.
    pub(super) duplicate_bytes: u64,
    /// Compressed bytes of images of groups.
    pub(super) bytes: HashMap<Key, u64>,
    /// Kept columns of the strangest images.
    pub(super) kept: HashMap<Key, serde_json::Map<String, Value>>,
}

/// Reads what `latents` says of some partitions, without vectors: a sample of the images with the strangest among them, rejects, and the
/// bytes of near-duplicates, whose ids `duplicates` gives for a partition.
pub(super) fn embedded(
    job: &Job<'_>,
    files: &[LiveFile],
    strangest: &[Strange],
    of_groups: &HashSet<Key>,
    duplicates: impl Fn(&PartitionValues) -> Result<HashSet<String>, Error>,
) -> Result<Embedded, Error> {
    let kept: Vec<String> = job.source.kept_schema.fields().iter().map(|field| field.name().clone()).collect();
    let mut columns = vec![column::IMAGE_ID, column::STATUS, column::ERROR_MESSAGE, column::IMAGE_BYTES];
    columns.extend(kept.iter().map(String::as_str));
    let named: HashSet<(&str, &str)> =
        strangest.iter().map(|strange| (strange.partition.as_str(), strange.image_id.as_str())).collect();
    let mut embedded = Embedded::default();
    let mut rejects: BTreeMap<String, (u64, Vec<RejectedImage>)> = BTreeMap::new();
    let mut sample = KeyedSample::new(POINTS - STRANGEST);
    let mut of_strangest = Vec::new();
    let mut last: Option<(PartitionValues, HashSet<String>)> = None;
    for (number, file) in files.iter().enumerate() {
        let partition = file.partition.to_string();
        let doubles = match last.take() {
            Some((of, doubles)) if of == file.partition => doubles,
            _ => duplicates(&file.partition)?,
        };
        scan(job, &job.latents, file, &columns, |first_row, rows| {
            let (Some(ids), Some(statuses)) = (texts(rows, column::IMAGE_ID), texts(rows, column::STATUS)) else {
                return Ok(());
            };
            for row in 0..rows.num_rows() {
                let (id, status) = (ids.value(row), statuses.value(row));
                if status != STATUS_OK {
                    let (count, examples) = rejects.entry(status.to_owned()).or_default();
                    *count += 1;
                    if examples.len() < EXAMPLES {
                        let message = texts(rows, column::ERROR_MESSAGE).filter(|values| values.is_valid(row));
                        examples.push(RejectedImage {
                            image_id: shown(id),
                            partition: shown(&partition),
                            message: message.map(|values| shown(values.value(row))).unwrap_or_default(),
                        });
                    }
                    continue;
                }
                if doubles.contains(id) {
                    let bytes = whole(rows, column::IMAGE_BYTES, row).unwrap_or_default();
                    embedded.duplicate_bytes += bytes;
                    let key = (partition.clone(), id.to_owned());
                    if of_groups.contains(&key) {
                        embedded.bytes.insert(key, bytes);
                    }
                }
                let point = || Point {
                    image_id: id.to_owned(),
                    partition: partition.clone(),
                    place: (number, first_row + row),
                    kept: kept.iter().map(|name| value(rows, name, row)).collect(),
                };
                if named.contains(&(partition.as_str(), id)) {
                    let values = kept.iter().map(|name| (name.clone(), text_of(value(rows, name, row))));
                    embedded.kept.insert((partition.clone(), id.to_owned()), values.collect());
                    of_strangest.push(point());
                } else {
                    sample.push(&key(&partition, id), point);
                }
            }
            Ok(())
        })?;
        last = Some((file.partition.clone(), doubles));
    }
    embedded.points = sample.into_rows().chain(of_strangest).collect();
    let rejected = |(status, (rows, examples))| Rejected { status, rows, examples };
    embedded.rejects = rejects.into_iter().map(rejected).collect();
    embedded.rejects.sort_by_key(|rejected| Reverse(rejected.rows));
    Ok(embedded)
}

/// A value as JSON: a number where it is one that JSON has.
fn value(rows: &RecordBatch, name: &str, row: usize) -> Value {
    let Some(values) = rows.column_by_name(name).filter(|values| values.is_valid(row)) else { return Value::Null };
    let text = display(values, row);
    if values.data_type().is_numeric() {
        return serde_json::from_str(&text).unwrap_or(Value::String(text));
    }
    Value::String(shown(&text))
}

fn text_of(value: Value) -> Value {
    match value {
        Value::Number(number) => Value::String(super::significant(&number.to_string())),
        other => other,
    }
}

/// The vectors of points, one a row; `None` where they are not of one length.
pub(super) fn vectors(job: &Job<'_>, files: &[LiveFile], points: &[Point]) -> Result<Option<Array2<f32>>, Error> {
    let mut by_file: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
    for (number, point) in points.iter().enumerate() {
        by_file.entry(point.place.0).or_default().push((point.place.1, number));
    }
    let mut found: Vec<Vec<f32>> = vec![Vec::new(); points.len()];
    for (file, mut wanted) in by_file {
        wanted.sort_unstable();
        let ranges: Vec<_> = wanted.iter().map(|(row, _)| *row..row + 1).collect();
        let scan = job.latents.scan(&files[file], &[column::EMBEDDING], Some(&ranges), BATCH_ROWS);
        let mut batches = job.context.block_on(scan)?;
        let mut wanted = wanted.into_iter();
        while let Some(rows) = job.context.block_on(batches.try_next())? {
            let Some(lists) = rows.column_by_name(column::EMBEDDING).and_then(|values| values.as_list_opt::<i32>())
            else {
                continue;
            };
            for (row, (_, number)) in (0..lists.len()).zip(&mut wanted) {
                let vector = lists.value(row);
                if let Some(vector) = vector.as_primitive_opt::<Float32Type>() {
                    found[number] = vector.values().to_vec();
                }
            }
        }
    }
    let dim = found.first().map_or(0, Vec::len);
    let is_even = dim > 0 && found.iter().all(|vector| vector.len() == dim);
    Ok(Array2::from_shape_vec((found.len(), dim), found.concat()).ok().filter(|_| is_even))
}

/// The kept columns of the points that tell groups of them apart.
pub(super) fn map_columns(job: &Job<'_>, points: &[Point]) -> Vec<MapColumn> {
    let fields = job.source.kept_schema.fields().iter().enumerate();
    let columns = fields.map(|(number, field)| MapColumn {
        name: field.name().clone(),
        values: points.iter().map(|point| point.kept.get(number).cloned().unwrap_or_default()).collect(),
    });
    let is_telling = |column: &MapColumn| {
        let texts: HashSet<&str> = column.values.iter().filter_map(Value::as_str).collect();
        texts.len() <= MAX_TEXTS && column.values.iter().any(|value| !value.is_null())
    };
    columns.filter(is_telling).take(MAP_COLUMNS).collect()
}

/// What `groups` says.
#[derive(Debug, Default)]
pub(super) struct Grouped {
    pub(super) groups: Vec<Group>,
    pub(super) num_groups: u64,
    pub(super) num_duplicates: u64,
}

/// Ids of the images of a partition that another one represents.
pub(super) fn duplicates_of(job: &Job<'_>, live: &Live, partition: &PartitionValues) -> Result<HashSet<String>, Error> {
    let mut ids = HashSet::new();
    for file in live.of(partition) {
        each_member(job, file, |member| {
            if !member.is_representative {
                ids.insert(member.image_id.to_owned());
            }
        })?;
    }
    Ok(ids)
}

/// An image that is alike another one.
struct Member<'a> {
    image_id: &'a str,
    group_id: &'a str,
    representative_partition: &'a str,
    is_representative: bool,
    distance: f64,
    size: u64,
}

/// Hands the rows of a file whose group has more than one image to `sink`.
fn each_member(job: &Job<'_>, file: &LiveFile, mut sink: impl FnMut(&Member<'_>)) -> Result<(), Error> {
    let columns = [
        column::IMAGE_ID,
        column::GROUP_ID,
        column::REPRESENTATIVE_ID,
        column::REPRESENTATIVE_PARTITION,
        column::DISTANCE_TO_REPRESENTATIVE,
        column::GROUP_SIZE,
    ];
    let own = file.partition.to_string();
    scan(job, &job.groups, file, &columns, |_, rows| {
        let [ids, groups, representatives, partitions] =
            [column::IMAGE_ID, column::GROUP_ID, column::REPRESENTATIVE_ID, column::REPRESENTATIVE_PARTITION]
                .map(|name| texts(rows, name));
        let (Some(ids), Some(groups), Some(representatives)) = (ids, groups, representatives) else { return Ok(()) };
        let distances = rows.column_by_name(column::DISTANCE_TO_REPRESENTATIVE);
        let distances = distances.and_then(|values| values.as_primitive_opt::<Float32Type>());
        for row in 0..rows.num_rows() {
            let size = whole(rows, column::GROUP_SIZE, row).unwrap_or_default();
            if size < 2 {
                continue;
            }
            let partition = partitions.filter(|values| values.is_valid(row)).map_or("", |values| values.value(row));
            sink(&Member {
                image_id: ids.value(row),
                group_id: groups.value(row),
                representative_partition: partition,
                is_representative: partition == own && ids.value(row) == representatives.value(row),
                distance: distances.map_or(0.0, |values| f64::from(values.value(row))),
                size,
            });
        }
        Ok(())
    })
}

/// Reads what `groups` says of some partitions. Of the largest groups, images of these partitions are shown, and of those in which the
/// groups' representatives lie.
pub(super) fn grouped(job: &Job<'_>, live: &Live, partitions: &[PartitionValues]) -> Result<Grouped, Error> {
    let mut grouped = Grouped::default();
    // Size, id, partition of the representative.
    let mut largest: BTreeSet<(Reverse<u64>, String, String)> = BTreeSet::new();
    for file in files_of(live, partitions) {
        each_member(job, &file, |member| {
            if member.is_representative {
                grouped.num_groups += 1;
            } else {
                grouped.num_duplicates += 1;
            }
            let place = (Reverse(member.size), member.group_id.to_owned(), member.representative_partition.to_owned());
            if largest.len() < GROUPS || largest.last().is_some_and(|last| place < *last) {
                largest.insert(place);
                if largest.len() > GROUPS {
                    largest.pop_last();
                }
            }
        })?;
    }
    let mut images: HashMap<&str, BTreeSet<(bool, Ordered, String, String)>> =
        largest.iter().map(|(_, group, _)| (group.as_str(), BTreeSet::new())).collect();
    let with_representatives: Vec<PartitionValues> = live
        .partitions()
        .into_iter()
        .filter(|partition| {
            let name = partition.to_string();
            partitions.contains(partition) || largest.iter().any(|(_, _, of)| *of == name)
        })
        .collect();
    for file in files_of(live, &with_representatives) {
        let partition = file.partition.to_string();
        each_member(job, &file, |member| {
            let Some(images) = images.get_mut(member.group_id) else { return };
            let place =
                (!member.is_representative, Ordered(member.distance), member.image_id.to_owned(), partition.clone());
            images.insert(place);
            if images.len() > IMAGES_OF_A_GROUP {
                images.pop_last();
            }
        })?;
    }
    grouped.groups = largest
        .iter()
        .map(|(size, group, _)| Group {
            id: group.clone(),
            size: size.0,
            bytes_saved: 0,
            images: images
                .remove(group.as_str())
                .into_iter()
                .flatten()
                .map(|(is_other, distance, image_id, partition)| GroupImage {
                    image_id,
                    partition,
                    distance: distance.0,
                    is_representative: !is_other,
                    picture: None,
                })
                .collect(),
        })
        .collect();
    Ok(grouped)
}
