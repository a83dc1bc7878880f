//! All that the tables say of one image, and what the model sees in it: as lines, as a page, and as a picture.
//!
//! The page is one HTML file that needs nothing else: pictures are in it, there is no script, and nothing is fetched. Ids,
//! messages and values come from whoever made the images, so all text is escaped, and pictures are decoded and encoded anew.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{Array as _, AsArray, RecordBatch};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Float32Type, Float64Type, Int32Type};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::TryStreamExt as _;

use crate::decode::{self, Color, Filter, Fit, Layout, PixelSpec, Pixels};
use crate::error::Error;
use crate::model::Model;
use crate::picture::{Picture, sheet};
use crate::redact::redact;
use crate::report::{display, significant};
use crate::schema::{STATUS_OK, TableName, column, data_schema};
use crate::score::Rule;
use crate::source::PartitionValues;
use crate::stages::flag::ReferenceInUse;
use crate::stages::{Job, flag};

/// Neighbors that are shown as pictures on a page at most; all are in the list.
const NEIGHBORS_ON_PAGE: usize = 24;

/// Neighbors on a montage.
const NEIGHBORS_ON_MONTAGE: usize = 5;

/// The longest side of the image on a page, in pixels.
const IMAGE_SIDE: u32 = 512;

/// The longest side of a neighbor on a page, in pixels.
const THUMBNAIL_SIDE: u32 = 128;

/// Size of the color scale beside an error map, in pixels.
const SCALE_SIZE: (u32, u32) = (256, 8);

/// Rows of `latents` read at a time.
const LATENTS_BATCH: usize = 8192;

/// The page's style. Colors are those of the reader's system, light or dark.
const STYLE: &str = "\
:root{color-scheme:light dark}\
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;background:Canvas;color:CanvasText}\
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}\
.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}\
figure{margin:0}figcaption{font-size:.85rem;max-width:16rem;overflow-wrap:anywhere;opacity:.8}\
img{display:block;border:1px solid GrayText}.pixels{image-rendering:pixelated}\
.panel{width:16rem;height:auto}.scale{width:16rem;height:.5rem;margin-top:.25rem}\
table{border-collapse:collapse}td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}\
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}th{font-weight:600}";

/// Whether an image is the one that a command line names: by its id, with or without its partition before it.
pub fn is_named(name: &str, partition: &PartitionValues, image_id: &str) -> bool {
    image_id == name
        || name.strip_suffix(image_id).and_then(|rest| rest.strip_suffix('/')) == Some(partition.to_string().as_str())
}

/// All that the tables say of the images of one name.
#[derive(Debug, Default)]
pub struct Explanation {
    /// The rows of `latents`, `anomalies` and `groups`, table by table.
    pub rows: Vec<TableRow>,
    /// The rows of `neighbors`.
    pub neighbors: Vec<Near>,
}

/// A row of a table.
#[derive(Debug)]
pub struct TableRow {
    /// The table.
    pub table: TableName,
    /// Its partition.
    pub partition: PartitionValues,
    /// The image.
    pub image_id: String,
    /// The columns that have a value, without vectors.
    pub cells: Vec<Cell>,
}

/// A value of a row.
#[derive(Debug)]
pub struct Cell {
    /// The column.
    pub column: String,
    /// The value as text.
    pub text: String,
    /// The value of a column of 64-bit floats, such as a score.
    pub number: Option<f64>,
}

/// A neighbor.
#[derive(Debug)]
pub struct Near {
    /// Partition of the image whose neighbor it is.
    of: PartitionValues,
    rank: i32,
    distance: f32,
    image_id: String,
    /// As the table has it; empty in one without partitions.
    partition: String,
}

impl TableRow {
    fn text(&self, column: &str) -> Option<&str> {
        self.cells.iter().find(|cell| cell.column == column).map(|cell| cell.text.as_str())
    }
}

impl Explanation {
    /// Reads what the tables say of the images that `name` names; the vectors are not read.
    pub fn read(job: &Job<'_>, name: &str) -> Result<Self, Error> {
        let mut explanation = Self::default();
        for table in [&job.latents, &job.anomalies, &job.groups] {
            let live = job.context.block_on(table.live())?;
            let schema = data_schema(table.name(), &job.source.kept_schema);
            let columns: Vec<&str> = schema
                .fields()
                .iter()
                .filter(|field| !matches!(field.data_type(), DataType::List(element) if *element.data_type() == DataType::Float32))
                .map(|field| field.name().as_str())
                .collect();
            for (file, batch) in job.context.block_on(table.read(live.files, &columns))? {
                for row in rows_of(&batch, &file.partition, name) {
                    explanation.rows.push(TableRow {
                        table: table.name(),
                        partition: file.partition.clone(),
                        image_id: batch.column(0).as_string::<i32>().value(row).to_owned(),
                        cells: cells(&batch, row),
                    });
                }
            }
        }
        let live = job.context.block_on(job.neighbors.live())?;
        let names = [column::IMAGE_ID, column::RANK, column::NEIGHBOR_ID, column::DISTANCE, column::NEIGHBOR_PARTITION];
        for (file, batch) in job.context.block_on(job.neighbors.read(live.files, &names))? {
            for row in rows_of(&batch, &file.partition, name) {
                let text =
                    |name: &str| batch.column_by_name(name).map(|values| display(values, row)).unwrap_or_default();
                explanation.neighbors.push(Near {
                    of: file.partition.clone(),
                    rank: batch.column(1).as_primitive::<Int32Type>().value(row),
                    distance: batch.column(3).as_primitive::<Float32Type>().value(row),
                    image_id: text(column::NEIGHBOR_ID),
                    partition: text(column::NEIGHBOR_PARTITION),
                });
            }
        }
        Ok(explanation)
    }

    /// The same as lines; none where no table has the image.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let cells = self.rows.iter().flat_map(|row| &row.cells);
        let width = cells.map(|cell| cell.column.chars().count()).max().unwrap_or(0);
        for row in &self.rows {
            lines.push(format!("{} ({})", row.table.name(), row.partition.name()));
            lines.extend(row.cells.iter().map(|cell| format!("  {:<width$} {}", cell.column, cell.text)));
        }
        if !self.neighbors.is_empty() {
            lines.push("neighbors".to_owned());
        }
        lines.extend(self.neighbors.iter().map(|near| {
            let Near { rank, distance, image_id, partition, .. } = near;
            format!("  {rank:>4}  {distance:.6}  {image_id}  {partition}").trim_end().to_owned()
        }));
        lines
    }

    /// The row of `latents`, which the pipeline's model must have made; an error where there is none, or more than one.
    pub fn latents(&self, job: &Job<'_>) -> Result<&TableRow, Error> {
        let rows: Vec<&TableRow> = self.rows.iter().filter(|row| row.table == TableName::Latents).collect();
        match rows.as_slice() {
            [row] => match row.text(column::MODEL_SHA256) {
                Some(model) if model != job.model_sha256 => Err(Error::Usage {
                    message: format!(
                        "the latents of `{}` are of the model {model}, and that of the pipeline is {}",
                        row.image_id, job.model_sha256
                    ),
                    hint: "name the model that made them with --model, or run the pipeline first".to_owned(),
                }),
                _ => Ok(row),
            },
            [] => Err(Error::Usage {
                message: "the image is not in the table latents, which says what to show".to_owned(),
                hint: "run `lookalike run` first".to_owned(),
            }),
            [first, ..] => {
                let names: Vec<String> = rows.iter().map(|row| format!("{}/{}", row.partition, row.image_id)).collect();
                Err(Error::Usage {
                    message: format!(
                        "the id `{}` is in {} partitions, and a page shows one image",
                        first.image_id,
                        rows.len()
                    ),
                    hint: format!("write its partition before it: one of {}", names.join(", ")),
                })
            }
        }
    }
}

fn rows_of<'a>(
    batch: &'a RecordBatch,
    partition: &'a PartitionValues,
    name: &'a str,
) -> impl Iterator<Item = usize> + 'a {
    let ids = batch.column_by_name(column::IMAGE_ID).map(AsArray::as_string::<i32>);
    ids.into_iter().flat_map(move |ids| (0..ids.len()).filter(move |row| is_named(name, partition, ids.value(*row))))
}

fn cells(batch: &RecordBatch, row: usize) -> Vec<Cell> {
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns()).filter(|(_, values)| values.is_valid(row));
    columns
        .map(|(field, values)| Cell {
            column: field.name().clone(),
            text: display(values, row),
            number: values.as_primitive_opt::<Float64Type>().map(|values| values.value(row)),
        })
        .collect()
}

/// A score's place among others.
#[derive(Debug)]
struct Standing {
    column: String,
    value: f64,
    /// Share of the others at or below it, in percent.
    percentile: f64,
    num_others: usize,
}

/// The pictures of one image and of its neighbors.
#[derive(Debug, Default)]
pub struct Gallery {
    /// The image, no larger than [`IMAGE_SIDE`]; `None` where it cannot be read.
    image: Option<Picture>,
    look: Option<Look>,
    /// The first neighbors, `None` where the source does not have them.
    neighbors: Vec<Option<Picture>>,
    /// Whether the image is another one than the tables speak of.
    is_other: bool,
}

/// What the error map shows, where the model reconstructs.
const SQUARED_ERROR: &str = "squared error of each pixel, mean over the channels, in squared units of the input tensor";

/// What it shows where the model has a map of its own instead.
const OWN_MAP: &str = "anomaly_map of the model, how strange it finds each place, in its own units";

/// Squared errors of each pixel in color, or what the model itself thinks of each place.
#[derive(Debug)]
pub(crate) struct ErrorMap {
    pub(crate) picture: Picture,
    /// What it is a map of.
    of: &'static str,
    /// The error at the end of the scale.
    pub(crate) largest: f64,
}

/// What a model sees in an image.
#[derive(Debug)]
pub(crate) struct Look {
    /// The image as the model sees it.
    pub(crate) input: Picture,
    pub(crate) reconstruction: Option<Picture>,
    pub(crate) errors: Option<ErrorMap>,
}

impl Look {
    /// Runs the model on the pixels of an image, in the size of its input.
    pub(crate) fn into_image(model: &Model, pixels: &Pixels) -> Result<Self, Error> {
        let preparation = model.of_images("a picture of what it sees")?;
        let spec = &preparation.pixels;
        let mut tensor = Vec::new();
        preparation.push_tensor(&pixels.data, &mut tensor);
        let input = Picture::of(spec, pixels.data.clone());
        let owned = |values: Option<&[f32]>| values.map(<[f32]>::to_vec);
        let (reconstruction, map) =
            model.session(0).run(&tensor, 1, |latents| (owned(latents.reconstruction), owned(latents.anomaly_map)))?;
        let Some(reconstruction) = reconstruction else {
            let errors = map.and_then(|map| own_map(&map, spec.width, spec.height));
            return Ok(Self { input, reconstruction: None, errors });
        };
        let errors = squared_errors(&tensor, &reconstruction, spec.color.channels(), preparation.layout);
        let largest = errors.iter().copied().fold(0.0, f64::max);
        let picture = Picture::heat(spec.width, spec.height, &errors, largest);
        let errors = Some(ErrorMap { picture, of: SQUARED_ERROR, largest });
        Ok(Self { input, reconstruction: Some(Picture::of(spec, preparation.to_pixels(&reconstruction))), errors })
    }

    /// The pictures, in the order in which they are shown.
    fn panels(&self) -> impl Iterator<Item = &Picture> {
        [Some(&self.input), self.reconstruction.as_ref(), self.errors.as_ref().map(|map| &map.picture)]
            .into_iter()
            .flatten()
    }
}

/// An image of the source.
struct Seen {
    bytes: Buffer,
    pixels: Pixels,
}

impl Gallery {
    /// Reads the image of a row of `latents` and its neighbors from the source again, and runs the model on the image. Of features there
    /// are no pictures.
    pub fn read(job: &Job<'_>, explanation: &Explanation, latents: &TableRow) -> Result<Self, Error> {
        let Some(input) = job.contract.input.image() else { return Ok(Self::default()) };
        let near = explanation.neighbors.iter().filter(|near| near.of == latents.partition).take(NEIGHBORS_ON_PAGE);
        let near: Vec<(String, String)> = near.map(|near| (near.partition.clone(), near.image_id.clone())).collect();
        let own = (latents.partition.to_string(), latents.image_id.clone());
        // Neighbors in another table are images of another source.
        let is_own_source = job.pipeline.neighbors.as_ref().is_none_or(|neighbors| neighbors.reference.is_none());
        let mut wanted: BTreeMap<String, HashSet<String>> = BTreeMap::new();
        for (partition, id) in near.iter().filter(|_| is_own_source).chain([&own]) {
            wanted.entry(partition.clone()).or_default().insert(id.clone());
        }
        let seen = images(job, &input.pixels, &wanted)?;
        let view = |key: &(String, String), side: u32| -> Option<Picture> {
            seen.get(key).and_then(|seen| view(job, &seen.bytes, &seen.pixels, side, input.pixels.exif_rotation))
        };
        let mut gallery = Self {
            image: view(&own, IMAGE_SIDE),
            neighbors: near.iter().map(|key| view(key, THUMBNAIL_SIDE).filter(|_| is_own_source)).collect(),
            ..Self::default()
        };
        if let Some(seen) = seen.get(&own) {
            let sha256 = crate::hash::sha256(&seen.bytes);
            gallery.is_other = latents.text(column::CONTENT_SHA256) != Some(sha256.as_str());
            gallery.look = Some(Look::into_image(job.model()?, &seen.pixels)?);
        }
        Ok(gallery)
    }

    /// What the model sees, its reconstruction, the error map and the first neighbors, side by side; without a reconstruction,
    /// the image and the neighbors.
    pub fn montage(&self) -> Result<Vec<u8>, Error> {
        let Some(look) = &self.look else {
            return Err(Error::Usage {
                message: "the image cannot be read from the source, so there is nothing to show".to_owned(),
                hint: "explain it without --png: the table latents has the reason, or the source has changed"
                    .to_owned(),
            });
        };
        let neighbors = self.neighbors.iter().flatten().take(NEIGHBORS_ON_MONTAGE);
        let pictures: Vec<Picture> = look.panels().chain(neighbors).cloned().collect();
        Ok(sheet(&pictures, pictures.len()).png()?)
    }
}

/// A model's own map of an input of this size, which it may have made coarser by a whole number. `None` for one of another shape.
fn own_map(map: &[f32], width: u32, height: u32) -> Option<ErrorMap> {
    let sizes = (1..=width.min(height)).map(|step| (step, width / step, height / step));
    let (_, width, height) = sizes
        .filter(|(step, ..)| width.is_multiple_of(*step) && height.is_multiple_of(*step))
        .find(|(_, width, height)| *width as usize * *height as usize == map.len())?;
    let values: Vec<f64> = map.iter().map(|value| f64::from(*value)).collect();
    let largest = values.iter().copied().fold(0.0, f64::max);
    let picture = Picture::heat(width, height, &values, largest);
    Some(ErrorMap { picture, of: OWN_MAP, largest })
}

/// The mean over the channels of the squared error of each pixel, in squared units of the tensor.
fn squared_errors(x: &[f32], reconstruction: &[f32], channels: usize, layout: Layout) -> Vec<f64> {
    let num_pixels = x.len() / channels.max(1);
    let error = |place: usize| (f64::from(x[place]) - f64::from(reconstruction[place])).powi(2);
    let mean = |pixel: usize| {
        let sum: f64 = (0..channels)
            .map(|channel| match layout {
                Layout::Nchw => error(channel * num_pixels + pixel),
                Layout::Nhwc => error(pixel * channels + channel),
            })
            .sum();
        sum / channels as f64
    };
    (0..num_pixels).map(mean).collect()
}

/// Reads images of the source by partition and id. What cannot be read is left out.
fn images(
    job: &Job<'_>,
    spec: &PixelSpec,
    wanted: &BTreeMap<String, HashSet<String>>,
) -> Result<BTreeMap<(String, String), Seen>, Error> {
    let mut found = BTreeMap::new();
    for partition in &job.source.partitions {
        let name = partition.values.to_string();
        let Some(ids) = wanted.get(&name) else { continue };
        let mut pass = job.pass();
        pass.only_ids = Some(Arc::new(ids.clone()));
        let mut missing = ids.len();
        for unit in &partition.units {
            if missing == 0 {
                break;
            }
            pass.decode_unit(partition, unit, spec, |batch| {
                missing = missing.saturating_sub(batch.pixels.len());
                for (row, pixels) in batch.pixels.into_iter().enumerate() {
                    if let (Ok(pixels), Some(bytes)) = (pixels, &batch.images[row]) {
                        let key = (name.clone(), batch.ids.value(row).to_owned());
                        found.entry(key).or_insert(Seen { bytes: bytes.clone(), pixels });
                    }
                }
                Ok(())
            })?;
        }
    }
    Ok(found)
}

/// An image in its own shape and color, with no side longer than `side`.
pub(crate) fn view(job: &Job<'_>, bytes: &[u8], pixels: &Pixels, side: u32, exif_rotation: bool) -> Option<Picture> {
    let (width, height) = (pixels.source_width, pixels.source_height);
    let share = (f64::from(side) / f64::from(width.max(height).max(1))).min(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "no longer than side")]
    let shorter = |length: u32| (f64::from(length) * share).round().max(1.0) as u32;
    let spec = PixelSpec {
        height: shorter(height),
        width: shorter(width),
        color: Color::Rgb,
        filter: Filter::Bilinear,
        fit: Fit::Stretch,
        resize: None,
        exif_rotation,
    };
    let pixels = decode::decode(bytes, &spec, &job.pass().limits).ok()?;
    Some(Picture::of(&spec, pixels.data))
}

/// The places of the scores of a row of `latents`, each among the scores of the pipeline's reference, or where that has none, among all
/// rows of `latents` that this model made; and what the others are.
fn standings(
    job: &Job<'_>,
    latents: &TableRow,
    anomalies: Option<&TableRow>,
) -> Result<(Vec<Standing>, String), Error> {
    let kept = &job.source.kept_schema;
    let of_image = latents.cells.iter().filter(|cell| kept.field_with_name(&cell.column).is_err());
    let is_score = |cell: &&Cell| Rule::OF_REFERENCE.iter().any(|rule| rule.name() == cell.column);
    let of_reference = anomalies.into_iter().flat_map(|row| row.cells.iter().filter(is_score));
    let scores = of_image.chain(of_reference);
    let scores: Vec<(&str, f64)> = scores.filter_map(|cell| Some((cell.column.as_str(), cell.number?))).collect();
    let segment = anomalies.and_then(|row| row.text(column::SEGMENT));
    let settings = job.pipeline.anomaly.as_ref();
    let reference = settings.map(|settings| flag::named_reference(job, settings)).transpose()?.flatten();
    let mut standings = Vec::new();
    let mut others: Vec<(&str, f64, usize, usize)> = Vec::new();
    for (name, value) in scores {
        let rule = Rule::all().find(|rule| rule.name() == name);
        let segment =
            reference.as_ref().and_then(ReferenceInUse::reference).and_then(|reference| reference.segment(segment));
        let frozen = segment.zip(rule).map(|(segment, rule)| segment.scores(rule)).filter(|scores| !scores.is_empty());
        match frozen {
            Some(scores) => {
                let below = scores.partition_point(|other| *other <= value);
                standings.push(Standing::new(name, value, below, scores.len()));
            }
            // Without a reference there is nothing that these scores compare with.
            None if rule.is_some_and(|rule| Rule::OF_REFERENCE.contains(&rule)) => {}
            None => others.push((name, value, 0, 0)),
        }
    }
    let names: Vec<&str> = others.iter().map(|other| other.0).collect();
    if !names.is_empty() {
        for file in job.comparable_latents()?.files {
            job.context.block_on(async {
                let mut batches = job.latents.scan(&file, &names, None, LATENTS_BATCH).await?;
                while let Some(rows) = batches.try_next().await? {
                    for (name, value, below, count) in &mut others {
                        let Some(scores) = rows.column_by_name(name) else { continue };
                        for score in scores.as_primitive::<Float64Type>().iter().flatten() {
                            *below += usize::from(score <= *value);
                            *count += 1;
                        }
                    }
                }
                Ok::<_, Error>(())
            })?;
        }
    }
    standings.extend(others.into_iter().map(|(name, value, below, count)| Standing::new(name, value, below, count)));
    let among = match reference {
        Some(reference) => format!("the reference {}", reference.url),
        None => "all rows of latents that this model made".to_owned(),
    };
    Ok((standings, among))
}

impl Standing {
    fn new(column: &str, value: f64, at_or_below: usize, num_others: usize) -> Self {
        let percentile = 100.0 * at_or_below as f64 / num_others.max(1) as f64;
        Self { column: column.to_owned(), value, percentile, num_others }
    }
}

/// Text as HTML shows it, without secrets.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for sign in redact(text).chars() {
        match sign {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // A line may turn around where an id says so; here it may not.
            sign if sign.is_control()
                || ('\u{202a}'..='\u{202e}').contains(&sign)
                || ('\u{2066}'..='\u{2069}').contains(&sign) =>
            {
                escaped.push('\u{fffd}');
            }
            sign => escaped.push(sign),
        }
    }
    escaped
}

/// A page being written. Writing to a text cannot fail.
struct Page(String);

impl Page {
    fn add(&mut self, html: std::fmt::Arguments<'_>) {
        let _ = self.0.write_fmt(html);
    }

    fn figure(&mut self, class: &str, picture: &Picture, caption: &str) -> Result<(), Error> {
        self.add(format_args!(
            "<figure>{}<figcaption>{}</figcaption></figure>\n",
            image(class, picture, caption)?,
            escaped(caption)
        ));
        Ok(())
    }
}

/// A picture that lies within the page.
fn image(class: &str, picture: &Picture, alt: &str) -> Result<String, Error> {
    let Picture { width, height, .. } = picture;
    let data = STANDARD.encode(picture.png()?);
    let alt = escaped(alt);
    Ok(format!(
        "<img class=\"{class}\" width=\"{width}\" height=\"{height}\" alt=\"{alt}\" src=\"data:image/png;base64,{data}\">"
    ))
}

/// The page of one image.
pub fn html(job: &Job<'_>, explanation: &Explanation, latents: &TableRow, gallery: &Gallery) -> Result<String, Error> {
    let title = escaped(&latents.image_id);
    let mut page = Page(String::new());
    page.add(format_args!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    ));
    let model = escaped(&job.contract.name);
    page.add(format_args!(
        "<p>{}; model {model}, {}</p>\n",
        escaped(&latents.partition.name()),
        escaped(&job.model_sha256)
    ));
    if let Some(status) = latents.text(column::STATUS).filter(|status| *status != STATUS_OK) {
        let message = latents.text(column::ERROR_MESSAGE).unwrap_or_default();
        page.add(format_args!("<p>The image could not be used ({}): {}</p>\n", escaped(status), escaped(message)));
    } else if gallery.image.is_none() && job.contract.input.image().is_some() {
        page.add(format_args!("<p>The source does not have this image any more, or it cannot be read.</p>\n"));
    } else if gallery.is_other {
        page.add(format_args!(
            "<p>The source has another image under this id now: the pictures are of that one.</p>\n"
        ));
    }
    page.add(format_args!("<div class=\"row\">\n"));
    let look = gallery.look.as_ref();
    for (picture, class, caption) in [
        (gallery.image.as_ref(), "panel", "the image"),
        (look.map(|look| &look.input), "panel pixels", "as the model sees it"),
        (look.and_then(|look| look.reconstruction.as_ref()), "panel pixels", "its reconstruction"),
    ] {
        if let Some(picture) = picture {
            page.figure(class, picture, caption)?;
        }
    }
    if let Some(map) = look.and_then(|look| look.errors.as_ref()) {
        let scale = Picture::heat_scale(SCALE_SIZE.0, SCALE_SIZE.1);
        page.add(format_args!(
            "<figure>{}{}<figcaption>{}: from 0 (black) to {}, the largest of this image (bright)</figcaption></figure>\n",
            image("panel pixels", &map.picture, "error map")?,
            image("scale", &scale, "color scale")?,
            map.of,
            escaped(&significant(&map.largest.to_string())),
        ));
    }
    page.add(format_args!("</div>\n"));
    let is_own = |row: &&TableRow| row.table == TableName::Anomalies && row.partition == latents.partition;
    scores_of(&mut page, job, latents, explanation.rows.iter().find(is_own))?;
    neighbors_of(&mut page, explanation, latents, gallery)?;
    for row in explanation.rows.iter().filter(|row| row.partition == latents.partition) {
        page.add(format_args!("<h2>{}</h2>\n<table>\n", row.table.name()));
        for cell in &row.cells {
            page.add(format_args!("<tr><th>{}</th><td>{}</td></tr>\n", escaped(&cell.column), escaped(&cell.text)));
        }
        page.add(format_args!("</table>\n"));
    }
    page.add(format_args!("</body>\n</html>\n"));
    Ok(page.0)
}

fn scores_of(page: &mut Page, job: &Job<'_>, latents: &TableRow, anomalies: Option<&TableRow>) -> Result<(), Error> {
    let (standings, among) = standings(job, latents, anomalies)?;
    if standings.is_empty() {
        return Ok(());
    }
    page.add(format_args!(
        "<h2>Scores</h2>\n<p>Higher is stranger. The percentile is the share of the others at or below the score: of {}.</p>\n<table>\n\
         <tr><th>score</th><th class=\"number\">value</th><th class=\"number\">percentile</th><th class=\"number\">others</th></tr>\n",
        escaped(&among)
    ));
    for standing in standings {
        page.add(format_args!(
            "<tr><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{:.1}</td><td class=\"number\">{}</td></tr>\n",
            escaped(&standing.column),
            escaped(&significant(&standing.value.to_string())),
            standing.percentile,
            standing.num_others,
        ));
    }
    page.add(format_args!("</table>\n"));
    Ok(())
}

fn neighbors_of(
    page: &mut Page,
    explanation: &Explanation,
    latents: &TableRow,
    gallery: &Gallery,
) -> Result<(), Error> {
    let near: Vec<&Near> = explanation.neighbors.iter().filter(|near| near.of == latents.partition).collect();
    if near.is_empty() {
        return Ok(());
    }
    page.add(format_args!("<h2>Nearest neighbors</h2>\n<div class=\"row\">\n"));
    for (near, picture) in near.iter().zip(&gallery.neighbors) {
        let caption = format!("{}. {} at {:.6}", near.rank, near.image_id, near.distance);
        match picture {
            Some(picture) => page.figure("near", picture, &caption)?,
            None => page.add(format_args!(
                "<figure><figcaption>{} (not in the source)</figcaption></figure>\n",
                escaped(&caption)
            )),
        }
    }
    page.add(format_args!(
        "</div>\n<table>\n<tr><th class=\"number\">rank</th><th class=\"number\">distance</th><th>image</th><th>partition</th></tr>\n"
    ));
    for near in near {
        page.add(format_args!(
            "<tr><td class=\"number\">{}</td><td class=\"number\">{:.6}</td><td>{}</td><td>{}</td></tr>\n",
            near.rank,
            near.distance,
            escaped(&near.image_id),
            escaped(&near.partition),
        ));
    }
    page.add(format_args!("</table>\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_own_map_may_be_coarser_than_its_input_by_a_whole_number() {
        let is_map = |values: usize, width, height| own_map(&vec![1.0; values], width, height).is_some();
        assert!(is_map(24, 6, 4) && is_map(6, 6, 4) && is_map(1, 5, 5));
        assert!(!is_map(7, 6, 4) && !is_map(12, 6, 4) && !is_map(0, 6, 4));
    }

    #[test]
    fn values_of_all_tables_stand_in_one_column() {
        let row = |table, columns: &[&str]| {
            let cell = |column: &&str| Cell { column: (*column).to_owned(), text: "value".to_owned(), number: None };
            let cells = columns.iter().map(cell).collect();
            TableRow { table, partition: PartitionValues::default(), image_id: "a".to_owned(), cells }
        };
        let rows = vec![
            row(TableName::Latents, &["image_id", "größe"]),
            row(TableName::Anomalies, &[Rule::ComplexityAdjustedError.name()]),
        ];
        let lines = Explanation { rows, neighbors: Vec::new() }.lines();
        let places: Vec<usize> = lines
            .iter()
            .filter_map(|line| line.split_once("value"))
            .map(|(before, _)| before.chars().count())
            .collect();
        assert_eq!(places, [28, 28, 28], "{lines:?}");
    }

    #[test]
    fn an_image_is_named_by_its_id_or_by_its_partition_and_id() {
        let partition = PartitionValues::from_path("ds=1/part=a/x.parquet");
        assert!(is_named("cell", &partition, "cell"));
        assert!(is_named("ds=1/part=a/cell", &partition, "cell"));
        assert!(!is_named("ds=2/part=a/cell", &partition, "cell"));
        assert!(!is_named("cell", &partition, "other cell"));
        assert!(is_named("a/b.png", &PartitionValues::default(), "a/b.png"));
        assert!(!is_named("a/b.png", &PartitionValues::default(), "b.png"));
    }

    #[test]
    fn text_cannot_leave_its_place_on_the_page() {
        assert_eq!(escaped("<img src=x onerror='f()'>&\""), "&lt;img src=x onerror=&#39;f()&#39;&gt;&amp;&quot;");
        assert_eq!(escaped("gnp.\u{202e}exe\n\0"), "gnp.\u{fffd}exe\u{fffd}\u{fffd}");
    }

    #[test]
    fn errors_are_of_pixels_in_either_layout() {
        // Two pixels of two channels; the second pixel is off by 1 and 3.
        let planes = squared_errors(&[0.0, 1.0, 0.0, 3.0], &[0.0; 4], 2, Layout::Nchw);
        let pixels = squared_errors(&[0.0, 0.0, 1.0, 3.0], &[0.0; 4], 2, Layout::Nhwc);
        for errors in [planes, pixels] {
            assert!(errors[0].abs() < 1e-12 && (errors[1] - 5.0).abs() < 1e-12, "{errors:?}");
        }
    }

    #[test]
    fn a_standing_is_the_share_at_or_below() {
        assert!((Standing::new("s", 1.0, 3, 4).percentile - 75.0).abs() < 1e-12);
        assert!(Standing::new("s", 1.0, 0, 0).percentile.abs() < 1e-12);
    }
}
