//! What people want to know of the tables after a run: as a few lines at its end, and as a page.
//!
//! The lines are the strangest images, the pairs most alike, the largest groups: table mathematics in memory, by polars, on the few
//! columns that a question needs. The page, [`Report`], is read from the tables by `findings` and `recorded`, gets its pictures from
//! the source by `pictures`, and is written by `page`.

mod data;
mod findings;
mod page;
mod pictures;
mod projection;
mod recorded;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use arrow::array::{Array as _, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int32Type, Int64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use polars::prelude::{Column, DataFrame, SortMultipleOptions};

pub use self::data::Report;
use self::data::{AnomalyRule, Answer, Map, Named, PartitionRow, ReferenceOf, Timing};
use self::findings::{Embedded, Grouped, files_of};
use self::pictures::{Key, Pictures, Room, SHEET_COLUMNS, TILE_SIDE, Use};
use self::recorded::{RunRow, rfc3339};
use crate::config::Anomaly;
use crate::error::Error;
use crate::explanation::Look;
use crate::redact::redact;
use crate::schema::column;
use crate::source::PartitionValues;
use crate::stages::Job;
use crate::stages::flag::named_reference;
use crate::table::{Live, LiveFile, Table};

/// Folder of the reports beside the tables. Pipelines that share tables have a report each.
const FOLDER: &str = "reports";

/// Runs whose results a report tells beside the last one, where the command line does not say.
pub const DEFAULT_HISTORY: usize = 30;

/// Bytes of the pictures in a report: with the library that draws and all lists at their longest, it stays below 5 MB, which mail servers
/// take.
const MAX_PICTURE_BYTES: usize = 3 << 20;

/// Images on the map that can be seen.
const TILES: usize = 400;

/// Partitions that are listed.
const MAX_PARTITIONS: usize = 200;

/// Rows of earlier runs that are told.
const MAX_HISTORY: usize = 1000;

/// How long a run looks for pictures in the source.
pub const PICTURES_WITHIN: Duration = Duration::from_secs(6);

/// What a report is made of.
#[derive(Debug, Clone, Default)]
pub struct ReportSettings {
    /// The partitions that it is about; `None`: those that the last run changed.
    pub partitions: Option<Vec<PartitionValues>>,
    /// Runs whose results are told beside the last one.
    pub history: Option<usize>,
    /// How long pictures are looked for; `None`: until they are all there.
    pub pictures_within: Option<Duration>,
}

impl Report {
    /// Reads what the tables say, and the pictures that belong to it.
    pub fn read(job: &Job<'_>, settings: &ReportSettings) -> Result<Self, Error> {
        let recorded = recorded::read(job)?;
        let newest = recorded::newest(&recorded, settings.partitions.as_deref());
        let Some(run) = newest.iter().max_by_key(|row| row.finished_at).cloned() else {
            return Err(Error::Usage {
                message: format!(
                    "no run of the pipeline {} is recorded in {}",
                    job.pipeline.name,
                    job.runs.store().url()
                ),
                hint: "run `lookalike run` first; a partition that is asked for must have been in a run".to_owned(),
            });
        };
        let names: HashSet<&str> = newest.iter().map(|row| row.partition.as_str()).collect();
        let latents = job.context.block_on(job.latents.live())?;
        let partitions: Vec<PartitionValues> = latents
            .partitions()
            .into_iter()
            .filter(|partition| names.contains(shown(&partition.to_string()).as_str()))
            .collect();
        let mut report = Self {
            version: data::VERSION,
            pipeline: job.pipeline.name.clone(),
            kind: if job.contract.input.image().is_some() { "images" } else { "features" },
            generated_at: rfc3339(chrono::Utc::now()),
            started_at: rfc3339(run.started_at),
            finished_at: rfc3339(run.finished_at),
            timings: timings(&run, &newest),
            lineage: lineage(job, &run),
            history: recorded::history(&recorded, settings.history.unwrap_or(DEFAULT_HISTORY)),
            ..Self::default()
        };
        report.read_tables(job, &latents, &partitions, settings)?;
        report.answer(&newest, job.pipeline.groups().is_some());
        report.drift = newest.iter().flat_map(|row| row.drift.clone().unwrap_or_default()).collect();
        let excess = |check: &data::DriftCheck| check.value.unwrap_or_default() / check.threshold;
        report.drift.sort_by(|a, b| (b.is_anomaly.cmp(&a.is_anomaly)).then_with(|| excess(b).total_cmp(&excess(a))));
        report.partitions = newest.iter().map(partition_row).collect();
        report.cut();
        Ok(report)
    }

    /// Reads the tables and the pictures.
    fn read_tables(
        &mut self,
        job: &Job<'_>,
        latents: &Live,
        partitions: &[PartitionValues],
        settings: &ReportSettings,
    ) -> Result<(), Error> {
        let groups = job.context.block_on(job.groups.live())?;
        let has_groups = job.pipeline.groups().is_some();
        let grouped = if has_groups { findings::grouped(job, &groups, partitions)? } else { Grouped::default() };
        let of_groups: HashSet<Key> = grouped.groups.iter().flat_map(|group| &group.images).map(key_of_image).collect();
        let files = files_of(latents, partitions);
        let doubles = |partition: &PartitionValues| {
            if has_groups { findings::duplicates_of(job, &groups, partition) } else { Ok(HashSet::new()) }
        };
        let mut embedded = Embedded::default();
        let mut read_latents = |strangest: &[data::Strange]| {
            embedded = findings::embedded(job, &files, strangest, &of_groups, doubles)?;
            Ok(std::mem::take(&mut embedded.points))
        };
        let (judged, points) = match &job.pipeline.anomaly {
            Some(anomaly) => {
                let reference = named_reference(job, anomaly)?;
                let named = reference.as_ref().and_then(|reference| reference.reference());
                let anomalies = job.context.block_on(job.anomalies.live())?;
                let files = files_of(&anomalies, partitions);
                let (judged, points) = findings::judged(job, &files, anomaly.rule, named, read_latents)?;
                let rows = named
                    .map(|named| named.segments().map(|(_, segment)| segment.scores(anomaly.rule).len() as u64).sum());
                let reference = ReferenceOf {
                    id: self
                        .lineage
                        .iter()
                        .find(|named| named.name == "reference")
                        .map(|named| named.value.clone())
                        .unwrap_or_default(),
                    url: reference.map(|reference| shown(&reference.url)),
                    rows,
                };
                self.anomaly = Some(AnomalyRule {
                    rule: anomaly.rule.name().to_owned(),
                    threshold: threshold(anomaly),
                    reference,
                });
                (Some(judged), points)
            }
            None => (None, read_latents(&[])?),
        };
        let vectors = findings::vectors(job, &files, &points)?;
        let plane = vectors.and_then(projection::project);
        self.rejects = std::mem::take(&mut embedded.rejects);
        self.groups = grouped.groups;
        self.answer.groups = has_groups.then_some(grouped.num_groups);
        self.answer.duplicates = has_groups.then_some(grouped.num_duplicates);
        self.answer.duplicate_bytes = has_groups.then_some(embedded.duplicate_bytes);
        for group in &mut self.groups {
            group.bytes_saved = group.images.iter().filter_map(|image| embedded.bytes.get(&key_of_image(image))).sum();
        }
        let flags = judged.as_ref().map_or_else(|| vec![(None, None); points.len()], |judged| judged.points.clone());
        if let Some(judged) = judged {
            self.strangest = judged.strangest;
            self.scores = judged.histogram;
        }
        for strange in &mut self.strangest {
            let key = (strange.partition.clone(), strange.image_id.clone());
            strange.columns = embedded.kept.remove(&key).unwrap_or_default();
        }
        if let Some(plane) = plane {
            let (x, y) = plane.points.iter().map(|[x, y]| (*x, *y)).unzip();
            self.map = Some(Map {
                method: "pca",
                explained: plane.explained,
                image_id: points.iter().map(|point| point.image_id.clone()).collect(),
                partition: points.iter().map(|point| point.partition.clone()).collect(),
                x,
                y,
                score: flags.iter().map(|(score, _)| *score).collect(),
                is_anomaly: flags.iter().map(|(_, flag)| *flag).collect(),
                columns: findings::map_columns(job, &points),
                sheet_side: TILE_SIDE,
                sheet_columns: SHEET_COLUMNS,
                sheet_place: vec![-1; points.len()],
                ..Map::default()
            });
        }
        self.add_pictures(job, settings)
    }

    /// Puts pictures to the images that are shown, those that matter most first.
    fn add_pictures(&mut self, job: &Job<'_>, settings: &ReportSettings) -> Result<(), Error> {
        if job.contract.input.image().is_none() {
            return Ok(());
        }
        let mut wanted: BTreeMap<Use, HashSet<Key>> = BTreeMap::new();
        let strange = |strange: &data::Strange| (strange.partition.clone(), strange.image_id.clone());
        wanted.insert(Use::Strange, self.strangest.iter().map(strange).collect());
        wanted.insert(Use::Group, self.groups.iter().flat_map(|group| &group.images).map(key_of_image).collect());
        // The strangest images stand at the end of the points, and the others in an order by chance.
        let points: Vec<Key> =
            self.map.iter().flat_map(|map| map.partition.iter().cloned().zip(map.image_id.iter().cloned())).collect();
        wanted.insert(Use::Point, points.iter().rev().take(TILES).cloned().collect());
        let deadline = settings.pictures_within.map(|within| Instant::now() + within);
        let pictures = Pictures::read(job, &wanted, deadline)?;
        let mut room = Room::new(MAX_PICTURE_BYTES);
        let model = if pictures.strange.is_empty() { None } else { Some(job.model()) };
        let model = model.and_then(|model| {
            let fault =
                |error| self.left_out.push(shown(&format!("what the model sees in the strangest images: {error}")));
            model.map_err(fault).ok()
        });
        for strange in &mut self.strangest {
            let Some((image, pixels)) = pictures.strange.get(&(strange.partition.clone(), strange.image_id.clone()))
            else {
                continue;
            };
            let look = model.map(|model| Look::into_image(model, pixels)).transpose()?;
            (strange.pictures, strange.largest_error) = room.panels(image, look.as_ref())?;
        }
        for image in self.groups.iter_mut().flat_map(|group| &mut group.images) {
            let picture = pictures.of_groups.get(&key_of_image(image));
            image.picture = picture.map(|picture| room.encode(picture)).transpose()?.flatten();
        }
        if let Some(map) = &mut self.map {
            let sheet = pictures::sheet(pictures.tiles.values());
            map.sheet = sheet.map(|sheet| room.encode(&sheet)).transpose()?.flatten();
            let places: BTreeMap<&Key, i64> = pictures.tiles.keys().zip(0..).collect();
            if map.sheet.is_some() {
                map.sheet_place = points.iter().map(|key| places.get(key).copied().unwrap_or(-1)).collect();
            }
        }
        if room.num_left_out > 0 {
            let size = MAX_PICTURE_BYTES >> 20;
            self.left_out.push(format!("{} pictures, for all together take more than {size} MiB", room.num_left_out));
        }
        let mut late: Vec<&str> = pictures.left_out.into_iter().collect();
        late.sort_unstable();
        if let Some(within) = settings.pictures_within.filter(|_| !late.is_empty()) {
            let what = late.join(", ");
            self.left_out.push(format!("pictures of {what}: reading them from the source takes more than {} s (`lookalike report` takes its time)", within.as_secs()));
        }
        Ok(())
    }

    /// Counts what the partitions come to.
    fn answer(&mut self, newest: &[RunRow], has_groups: bool) {
        let sum = |column: &str| newest.iter().filter_map(|row| row.number(column)).sum();
        let any = |column: &str| newest.iter().any(|row| row.number(column).is_some());
        let checks = || newest.iter().filter_map(|row| Some((row, row.drift.as_ref()?)));
        let drifted = |checks: &Vec<data::DriftCheck>| checks.iter().filter(|check| check.is_anomaly).count() as u64;
        let has_drift = checks().next().is_some();
        self.answer = Answer {
            rows_in: sum("rows_in"),
            rows_ok: sum("rows_ok"),
            rows_rejected: sum("rows_rejected"),
            rows_flagged: any("rows_flagged").then(|| sum("rows_flagged")),
            groups: self.answer.groups.filter(|_| has_groups),
            duplicates: self.answer.duplicates,
            duplicate_bytes: self.answer.duplicate_bytes,
            drifted_checks: has_drift.then(|| checks().map(|(_, checks)| drifted(checks)).sum()),
            drifted_partitions: has_drift.then(|| checks().filter(|(_, checks)| drifted(checks) > 0).count() as u64),
            partitions: newest.len() as u64,
        };
        if let Some(map) = &mut self.map {
            map.of = self.answer.rows_ok;
        }
    }

    /// Bounds the lists, and takes secrets and what no screen should be shown out of the names that came from the source.
    fn cut(&mut self) {
        for (what, length, most) in [
            ("partitions", self.partitions.len(), MAX_PARTITIONS),
            ("rows of earlier runs", self.history.len(), MAX_HISTORY),
        ] {
            if length > most {
                self.left_out.push(format!("{} {what}", length - most));
            }
        }
        self.partitions.truncate(MAX_PARTITIONS);
        self.history.drain(..self.history.len().saturating_sub(MAX_HISTORY));
        let strangest = self.strangest.iter_mut().flat_map(|strange| [&mut strange.image_id, &mut strange.partition]);
        let images = self.groups.iter_mut().flat_map(|group| &mut group.images);
        let grouped = images.flat_map(|image| [&mut image.image_id, &mut image.partition]);
        let map = self.map.iter_mut().flat_map(|map| map.image_id.iter_mut().chain(&mut map.partition));
        for name in strangest.chain(grouped).chain(map) {
            *name = shown(name);
        }
    }

    /// Where a run of a pipeline writes its report, below the output prefix: the page, and the same as JSON.
    pub fn files(pipeline: &str) -> [String; 2] {
        ["html", "json"].map(|ending| format!("{FOLDER}/{pipeline}.{ending}"))
    }

    /// The page.
    pub fn html(&self) -> Result<String, Error> {
        page::html(self)
    }

    /// The same as JSON, on one line.
    pub fn json(&self) -> Result<String, Error> {
        page::json(self)
    }
}

/// Text of the source as a report has it: without secrets.
fn shown(text: &str) -> String {
    redact(text).into_owned()
}

fn key_of_image(image: &data::GroupImage) -> Key {
    (image.partition.clone(), image.image_id.clone())
}

/// The threshold as the pipeline file says it.
fn threshold(anomaly: &Anomaly) -> String {
    let value = serde_json::to_value(anomaly.threshold).unwrap_or_default();
    let pairs = value.as_object().into_iter().flatten();
    pairs.map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
}

fn timings(run: &RunRow, newest: &[RunRow]) -> Vec<Timing> {
    // Partitions that an earlier run changed last are not in the times of this one.
    let rows =
        newest.iter().filter(|row| row.finished_at == run.finished_at).filter_map(|row| row.number("rows_in")).sum();
    let of = |stage, column: &str| {
        let secs = run.float(column).filter(|secs| *secs > 0.0)?;
        Some(Timing { stage, secs, rows: Some(rows) })
    };
    [of("embed", "embed_secs"), of("neighbors", "neighbors_secs"), of("flag", "flag_secs")]
        .into_iter()
        .flatten()
        .collect()
}

fn partition_row(row: &RunRow) -> PartitionRow {
    PartitionRow {
        partition: row.partition.clone(),
        rows_in: row.number("rows_in").unwrap_or_default(),
        rows_rejected: row.number("rows_rejected").unwrap_or_default(),
        rows_flagged: row.number("rows_flagged"),
        latents_run_id: row.text("latents_run_id").unwrap_or_default(),
        neighbors_run_id: row.text("neighbors_run_id"),
        groups_run_id: row.text("groups_run_id"),
        run_id: row.text(column::RUN_ID),
    }
}

/// What made the rows, as `runs` has it.
fn lineage(job: &Job<'_>, run: &RunRow) -> Vec<Named> {
    let text = |column: &str| run.text(column);
    let number = |column: &str| run.number(column).map(|number| number.to_string());
    let recall = run.float("neighbors_recall").map(|recall| significant(&recall.to_string()));
    let values = [
        ("pipeline", text("pipeline")),
        ("source", text("source_url")),
        ("source version", number("source_version")),
        ("output", Some(shown(job.output.url().as_str()))),
        ("model", Some(shown(&job.packages.names()))),
        ("model package", text("model_package")),
        ("model sha256", text("model_sha256")),
        ("reference", text(column::REFERENCE_ID)),
        ("neighbors", text("neighbors_search")),
        ("neighbors recall", recall),
        ("provider", text("provider")),
        ("ONNX Runtime", text("onnxruntime_version").filter(|version| !version.is_empty())),
        ("lookalike", text("lookalike_version")),
        ("settings", text("settings")),
    ];
    values.into_iter().filter_map(|(name, value)| Some(Named { name, value: value? })).collect()
}

/// Column of the frames here that holds the partition's name.
const PARTITION: &str = "partition";

/// Characters of a cell at most, where tables are shown to a person: more than a line of a screen helps nobody, and formatting has
/// its own limit.
const CELL_MAX_CHARS: usize = 80;

/// The `count` images of highest score in some partitions, strangest first, as lines of a table, with the kept columns of the source.
pub fn strangest(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let names =
        [column::IMAGE_ID, column::ANOMALY_SCORE, column::SEVERITY_PERCENTILE, column::P_VALUE, column::IS_ANOMALY];
    let live = job.context.block_on(job.anomalies.live())?;
    let anomalies = read_frame(job, &job.anomalies, of_partitions(live, partitions), &names, |_, rows| {
        // The rows that could not be scored are not strange, they are unknown.
        let scores = rows.column(1).as_primitive::<Float64Type>();
        first(rows, count, |row| scores.is_valid(row).then(|| -scores.value(row)))
    })?;
    let order = SortMultipleOptions::new().with_order_descending_multi([true, false]).with_maintain_order(true);
    let sorted = anomalies
        .sort([column::ANOMALY_SCORE, column::IMAGE_ID], order)
        .map_err(frame_error("the strangest images"))?
        .head(Some(count));
    if sorted.height() == 0 {
        return Ok(Vec::new());
    }
    let kept = kept_columns(job, &sorted)?;
    let mut table = vec![header(job, &["score", "percentile", "p-value", "flag"])];
    for row in 0..sorted.height() {
        let id = cell(&sorted, column::IMAGE_ID, row);
        let partition = cell(&sorted, PARTITION, row);
        let mut cells = vec![
            id.clone(),
            significant(&cell(&sorted, column::ANOMALY_SCORE, row)),
            significant(&cell(&sorted, column::SEVERITY_PERCENTILE, row)),
            significant(&cell(&sorted, column::P_VALUE, row)),
            if cell(&sorted, column::IS_ANOMALY, row) == "true" { "strange".to_owned() } else { String::new() },
        ];
        if !job.source.partition_keys.is_empty() {
            cells.push(partition.clone());
        }
        cells.extend(kept.get(&(id, partition)).cloned().unwrap_or_default());
        table.push(cells);
    }
    Ok(align_within(&table, cell_chars(job)))
}

/// The `count` pairs of smallest distance in some partitions, each pair once, as lines of a table.
pub fn nearest_pairs(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let live = job.context.block_on(job.neighbors.live())?;
    let names = [column::IMAGE_ID, column::RANK, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];
    let nearest = read_frame(job, &job.neighbors, of_partitions(live, partitions), &names, |_, rows| {
        let distances = rows.column(3).as_primitive::<Float32Type>();
        // A pair stands there twice, seen from either side.
        first(rows, 2 * count, |row| Some(f64::from(distances.value(row))))
    })?;
    let order = SortMultipleOptions::new().with_maintain_order(true);
    let sorted = nearest
        .sort([column::DISTANCE, column::IMAGE_ID, column::RANK], order)
        .map_err(frame_error("the pairs most alike"))?;
    let mut table = vec![vec!["image".to_owned(), "neighbor".to_owned(), "distance".to_owned()]];
    let mut seen = std::collections::BTreeSet::new();
    for row in 0..sorted.height() {
        if table.len() > count {
            break;
        }
        // Ids are unique within a partition only.
        let place = |id: &str, partition: &str| [cell(&sorted, id, row), cell(&sorted, partition, row)];
        let mut pair = [place(column::IMAGE_ID, PARTITION), place(column::NEIGHBOR_ID, column::NEIGHBOR_PARTITION)];
        pair.sort();
        let [[first, _], [second, _]] = pair.clone();
        if seen.insert(pair) {
            table.push(vec![first, second, significant(&cell(&sorted, column::DISTANCE, row))]);
        }
    }
    Ok(if table.len() > 1 { align_within(&table, cell_chars(job)) } else { Vec::new() })
}

/// The `count` groups of most images whose representatives lie in some partitions, as lines of a table.
pub fn largest_groups(job: &Job<'_>, partitions: &[PartitionValues], count: usize) -> Result<Vec<String>, Error> {
    let live = job.context.block_on(job.groups.live())?;
    let names = [column::IMAGE_ID, column::REPRESENTATIVE_ID, column::REPRESENTATIVE_PARTITION, column::GROUP_SIZE];
    let largest = read_frame(job, &job.groups, of_partitions(live, partitions), &names, |partition, rows| {
        let [ids, heads, partitions] = [0, 1, 2].map(|number| rows.column(number).as_string::<i32>());
        let sizes = rows.column(3).as_primitive::<Int64Type>();
        let own = partition.to_string();
        first(rows, count, |row| {
            let is_own = partitions.is_null(row) || partitions.value(row) == own;
            let is_head = is_own && ids.value(row) == heads.value(row) && sizes.value(row) > 1;
            is_head.then(|| -(sizes.value(row) as f64))
        })
    })?;
    let order = SortMultipleOptions::new().with_order_descending_multi([true, false]).with_maintain_order(true);
    let sorted = largest
        .sort([column::GROUP_SIZE, column::IMAGE_ID], order)
        .map_err(frame_error("the largest groups"))?
        .head(Some(count));
    let mut table = vec![vec!["representative".to_owned(), "images".to_owned()]];
    for row in 0..sorted.height() {
        let size = cell(&sorted, column::GROUP_SIZE, row);
        table.push(vec![cell(&sorted, column::IMAGE_ID, row), size.trim_end_matches(".0").to_owned()]);
    }
    Ok(if table.len() > 1 { align_within(&table, cell_chars(job)) } else { Vec::new() })
}

/// The kept columns of the rows that a frame names, by id and partition, as text.
fn kept_columns(job: &Job<'_>, frame: &DataFrame) -> Result<BTreeMap<(String, String), Vec<String>>, Error> {
    let wanted: std::collections::BTreeSet<(String, String)> =
        (0..frame.height()).map(|row| (cell(frame, column::IMAGE_ID, row), cell(frame, PARTITION, row))).collect();
    let mut names = vec![column::IMAGE_ID];
    names.extend(job.source.kept_schema.fields().iter().map(|field| field.name().as_str()));
    let mut kept = BTreeMap::new();
    if names.len() == 1 {
        return Ok(kept);
    }
    let live = job.context.block_on(job.latents.live())?;
    for file in live.files {
        let partition = file.partition.to_string();
        if !wanted.iter().any(|(_, wanted)| *wanted == partition) {
            continue;
        }
        for (_, batch) in job.context.block_on(job.latents.read(vec![file], &names))? {
            let ids = batch.column(0).as_string::<i32>();
            for row in 0..batch.num_rows() {
                let key = (ids.value(row).to_owned(), partition.clone());
                if wanted.contains(&key) {
                    kept.insert(key, batch.columns()[1..].iter().map(|values| display(values, row)).collect());
                }
            }
        }
    }
    Ok(kept)
}

fn of_partitions(live: Live, partitions: &[PartitionValues]) -> Vec<LiveFile> {
    live.files.into_iter().filter(|file| partitions.contains(&file.partition)).collect()
}

fn header(job: &Job<'_>, columns: &[&str]) -> Vec<String> {
    let mut header = vec!["image".to_owned()];
    header.extend(columns.iter().map(|name| (*name).to_owned()));
    if !job.source.partition_keys.is_empty() {
        header.push(PARTITION.to_owned());
    }
    header.extend(job.source.kept_schema.fields().iter().map(|field| field.name().clone()));
    header
}

/// The `count` rows of smallest key, ties by id; rows without a key are left out.
fn first(rows: &RecordBatch, count: usize, key: impl Fn(usize) -> Option<f64>) -> Vec<usize> {
    let ids = rows.column(0).as_string::<i32>();
    let mut keyed: Vec<(f64, usize)> = (0..rows.num_rows()).filter_map(|row| Some((key(row)?, row))).collect();
    keyed.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| ids.value(a.1).cmp(ids.value(b.1))));
    keyed.truncate(count);
    keyed.into_iter().map(|(_, row)| row).collect()
}

/// Reads columns of live files into a frame, with the partition's name beside them: of each batch the rows that `keep` names, so that
/// the frame is small however large the table is. Holds one file's columns.
fn read_frame(
    job: &Job<'_>,
    table: &Table,
    files: Vec<LiveFile>,
    columns: &[&str],
    keep: impl Fn(&PartitionValues, &RecordBatch) -> Vec<usize>,
) -> Result<DataFrame, Error> {
    let mut values: BTreeMap<&str, Values> = BTreeMap::new();
    let mut partitions: Vec<String> = Vec::new();
    for file in files {
        for (file, batch) in job.context.block_on(table.read(vec![file], columns))? {
            let rows = keep(&file.partition, &batch);
            partitions.extend(rows.iter().map(|_| file.partition.to_string()));
            for name in columns {
                let Some(array) = batch.column_by_name(name) else { continue };
                values.entry(name).or_insert_with(|| Values::of(array.data_type())).extend(array, &rows);
            }
        }
    }
    let height = partitions.len();
    let mut frame: Vec<Column> = columns
        .iter()
        .map(|name| values.remove(name).unwrap_or_else(|| Values::Text(Vec::new())).into_column(name))
        .collect();
    frame.push(Column::new(PARTITION.into(), partitions));
    DataFrame::new(height, frame).map_err(frame_error(table.name().name()))
}

/// A column on its way from Arrow to polars.
enum Values {
    Text(Vec<Option<String>>),
    Number(Vec<Option<f64>>),
    Flag(Vec<Option<bool>>),
}

impl Values {
    fn of(data_type: &DataType) -> Self {
        match data_type {
            DataType::Boolean => Self::Flag(Vec::new()),
            DataType::Float64 | DataType::Float32 | DataType::Int32 | DataType::Int64 => Self::Number(Vec::new()),
            _ => Self::Text(Vec::new()),
        }
    }

    fn extend(&mut self, array: &arrow::array::ArrayRef, rows: &[usize]) {
        match self {
            Self::Flag(values) => {
                let array = array.as_boolean();
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| array.value(*row))));
            }
            Self::Number(values) => {
                let number = |row: usize| match array.data_type() {
                    DataType::Float32 => f64::from(array.as_primitive::<Float32Type>().value(row)),
                    DataType::Int32 => f64::from(array.as_primitive::<Int32Type>().value(row)),
                    DataType::Int64 => array.as_primitive::<Int64Type>().value(row) as f64,
                    _ => array.as_primitive::<Float64Type>().value(row),
                };
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| number(*row))));
            }
            Self::Text(values) => {
                values.extend(rows.iter().map(|row| array.is_valid(*row).then(|| display(array, *row))));
            }
        }
    }

    fn into_column(self, name: &str) -> Column {
        match self {
            Self::Text(values) => Column::new(name.into(), values),
            Self::Number(values) => Column::new(name.into(), values),
            Self::Flag(values) => Column::new(name.into(), values),
        }
    }
}

fn frame_error(what: &'static str) -> impl Fn(polars::error::PolarsError) -> Error {
    move |source| Error::Frame { what, source }
}

/// A cell of a frame as text; empty where it is null.
fn cell(frame: &DataFrame, name: &str, row: usize) -> String {
    let value = frame.column(name).ok().and_then(|column| column.get(row).ok());
    match value {
        Some(value) if !value.is_null() => value.str_value().into_owned(),
        _ => String::new(),
    }
}

/// A value of an Arrow array as text.
pub(crate) fn display(array: &dyn arrow::array::Array, row: usize) -> String {
    ArrayFormatter::try_new(array, &FormatOptions::default())
        .map_or_else(|_| String::new(), |formatter| formatter.value(row).to_string())
}

/// A number with four significant digits; other text as it is.
pub(crate) fn significant(text: &str) -> String {
    match text.parse::<f64>() {
        Ok(0.0) => "0".to_owned(),
        Ok(number) if (1e-4..1e6).contains(&number.abs()) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a logarithm between -4 and 6")]
            let decimals = (3 - number.abs().log10().floor() as i32).max(0) as usize;
            format!("{number:.decimals$}")
        }
        Ok(number) => format!("{number:.3e}"),
        Err(_) => text.to_owned(),
    }
}

/// Characters of a cell at most, so that two ids and a number find room on the terminal.
fn cell_chars(job: &Job<'_>) -> usize {
    job.context.columns().map_or(CELL_MAX_CHARS, |columns| (columns * 2 / 5).min(CELL_MAX_CHARS))
}

/// Puts cells into columns of equal width, long ones cut.
pub fn align(table: &[Vec<String>]) -> Vec<String> {
    align_within(table, CELL_MAX_CHARS)
}

/// [`align`] with cells of at most so many characters. Long ones are cut in the middle: of paths, the end tells more than the beginning.
fn align_within(table: &[Vec<String>], max_chars: usize) -> Vec<String> {
    let cut = |cell: &String| {
        let num_chars = cell.chars().count();
        if num_chars <= max_chars {
            return cell.clone();
        }
        let end = max_chars / 2;
        let start = max_chars.saturating_sub(end + 1);
        cell.chars().take(start).chain(['…']).chain(cell.chars().skip(num_chars - end)).collect()
    };
    let table: Vec<Vec<String>> = table.iter().map(|row| row.iter().map(cut).collect()).collect();
    let num_columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..num_columns)
        .map(|column| {
            table.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    table
        .iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_with_four_digits_whatever_their_size() {
        assert_eq!(significant("0.00123456"), "0.001235");
        assert_eq!(significant("97.26027397"), "97.26");
        assert_eq!(significant("0"), "0");
        assert_eq!(significant("0.00000123456"), "1.235e-6");
        assert_eq!(significant("cell0001"), "cell0001");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let table = [vec!["a".to_owned(), "b".to_owned()], vec!["long".to_owned(), "c".to_owned()]];
        assert_eq!(align(&table), ["  a     b", "  long  c"]);
    }

    #[test]
    fn a_cell_that_no_screen_holds_is_cut() {
        let table = [vec!["é".repeat(100_000), "b".to_owned()]];
        assert_eq!(align(&table), [format!("  {}…{}  b", "é".repeat(39), "é".repeat(40))]);
        assert_eq!(align_within(&[vec!["folder/a.png".to_owned()]], 8), ["  fol….png"]);
    }
}
