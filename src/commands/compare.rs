//! `compare`: how alike two images are, or each pair of several, by a model and against a table of neighbors.
//!
//! The images are fetched, decoded and embedded as a run does it, and their distances are those that `neighbors` would have. What a
//! distance means is another question: it depends on the model and on the pictures. So a verdict needs a yardstick, and the first of
//! these rules that applies gives it:
//!
//! 1. the same bytes: the same file;
//! 2. the same embedding: the model sees no difference;
//! 3. a distance up to `--duplicate-distance`: near-duplicates;
//! 4. with `--table`: alike if the two are nearer to each other than half of the table's images are to their nearest neighbor, else not
//!    alike;
//! 5. with `--duplicate-distance` alone: not near-duplicates.
//!
//! Without a yardstick there is no verdict.

use std::sync::Arc;

use arrow::array::{AsArray as _, StringArray};
use arrow::datatypes::{Float32Type, Int32Type};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use clap::ValueEnum as _;
use futures::TryStreamExt as _;
use ndarray::ArrayView2;
use serde_json::{Value, json};

use crate::config::{DEFAULT_BATCH_SIZE, Device};
use crate::context::Context;
use crate::decode::DecodeLimits;
use crate::error::{Error, ExitStatus};
use crate::model::{Compute, Model, Runtime};
use crate::neighbors::exact::{Metric, self_join};
use crate::pass::{EmbeddedImage, embed_images};
use crate::schema::{TableName, column};
use crate::source::{Cells, ImageBatch, read_image};
use crate::stages::MODEL_FOOTER;
use crate::table::{Presence, Table, TableError};

/// Share of a table's images, in percent, that must be at least as far from their nearest neighbor as two images are from each other for
/// these to count as alike.
const ALIKE_BELOW_PERCENTILE: f64 = 50.0;

/// Rows of a table read at a time.
const ROWS_A_BATCH: usize = 65_536;

/// What `compare` is asked.
#[derive(Debug, Clone)]
pub struct CompareSettings {
    /// The images: paths or URLs, at least two.
    pub images: Vec<String>,
    /// The model package.
    pub model: String,
    /// Where inference runs.
    pub device: Device,
    /// Prefix of the tables whose neighbors are the yardstick.
    pub table: Option<String>,
    /// Distance between embeddings; `None`: the table's, or else cosine.
    pub metric: Option<Metric>,
    /// Largest distance of near-duplicates, in the unit of the metric.
    pub duplicate_distance: Option<f64>,
    /// Whether one JSON object is printed instead of lines.
    pub as_json: bool,
}

/// Distances of a table's images to their nearest neighbors.
struct Yardstick {
    url: String,
    metric: Metric,
    /// Ascending.
    nearest: Vec<f32>,
}

impl Yardstick {
    /// Reads the neighbors that a model's vectors have in the tables below a prefix.
    fn read(context: &Context, option: &str, location: &str, model: &Model) -> Result<Self, Error> {
        let output = context.stores.open(&context.locate(option, location)?)?;
        let presence = Presence::new(&output, context.handle());
        let find = Table::find(&output, TableName::Neighbors, &presence, context.handle());
        let missing = |message: String, hint: &str| Error::Usage { message, hint: hint.to_owned() };
        let Some(table) = context.block_on(find)? else {
            let message = format!("there is no table `neighbors` below {}", output.url());
            return Err(missing(message, "name the [output] table of a pipeline that has been run, with neighbors"));
        };
        let url = table.store().url().to_string();
        let mut yardstick = Self { url: url.clone(), metric: Metric::Cosine, nearest: Vec::new() };
        let mut other_model = None;
        for file in context.block_on(table.live())?.files {
            context.stop.check()?;
            let footer = |key: &'static str| context.block_on(table.footer_value(&file, key));
            match footer(MODEL_FOOTER)? {
                Some(found) if found == model.sha256 => {}
                found => {
                    other_model = found.or(other_model);
                    continue;
                }
            }
            let metric = footer("metric")?.unwrap_or_default();
            yardstick.metric = Metric::from_str(&metric, false).map_err(|_| {
                missing(format!("{} does not say by which metric it was made", file.url), "run it again")
            })?;
            let nearest = &mut yardstick.nearest;
            context.block_on(async {
                let columns = [column::RANK, column::DISTANCE];
                let mut batches = table.scan(&file, &columns, None, ROWS_A_BATCH).await?;
                while let Some(rows) = batches.try_next().await? {
                    let ranks = rows.column(0).as_primitive::<Int32Type>().values();
                    let distances = rows.column(1).as_primitive::<Float32Type>().values();
                    nearest.extend(ranks.iter().zip(distances).filter(|(rank, _)| **rank == 1).map(|pair| *pair.1));
                }
                Ok::<_, TableError>(())
            })?;
        }
        match other_model {
            Some(found) if yardstick.nearest.is_empty() => Err(missing(
                format!("the vectors behind {url} are of the model {found}, and {} is another one", model.sha256),
                "distances of different models do not compare: name the model of the table with --model",
            )),
            _ if yardstick.nearest.is_empty() => {
                Err(missing(format!("no image in {url} has a neighbor"), "run the pipeline on more images"))
            }
            _ => {
                yardstick.nearest.sort_unstable_by(f32::total_cmp);
                Ok(yardstick)
            }
        }
    }

    /// Share of the images whose nearest neighbor is nearer than `distance`, in percent.
    fn percentile(&self, distance: f32) -> f64 {
        let nearer = self.nearest.partition_point(|nearest| *nearest < distance);
        100.0 * nearer as f64 / self.nearest.len() as f64
    }
}

/// What two images are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    SameFile,
    SameEmbedding,
    NearDuplicates,
    Alike,
    NotAlike,
    NotNearDuplicates,
}

impl Verdict {
    /// The first rule that applies; `None` where there is nothing to judge by.
    fn of(pair: &Pair, duplicate_distance: Option<f64>) -> Option<Self> {
        if pair.same_bytes {
            return Some(Self::SameFile);
        }
        if pair.same_embedding {
            return Some(Self::SameEmbedding);
        }
        let distance = f64::from(pair.distance?);
        match (duplicate_distance.map(|most| distance <= most), pair.percentile) {
            (Some(true), _) => Some(Self::NearDuplicates),
            (_, Some(percentile)) if percentile < ALIKE_BELOW_PERCENTILE => Some(Self::Alike),
            (_, Some(_)) => Some(Self::NotAlike),
            (Some(false), None) => Some(Self::NotNearDuplicates),
            (None, None) => None,
        }
    }

    /// For scripts.
    fn name(self) -> &'static str {
        match self {
            Self::SameFile => "same_file",
            Self::SameEmbedding => "same_embedding",
            Self::NearDuplicates => "near_duplicates",
            Self::Alike => "alike",
            Self::NotAlike => "not_alike",
            Self::NotNearDuplicates => "not_near_duplicates",
        }
    }

    /// For people.
    fn words(self) -> &'static str {
        match self {
            Self::SameFile => "the same file",
            Self::SameEmbedding => "the model sees no difference",
            Self::NearDuplicates => "near-duplicates",
            Self::Alike => "alike",
            Self::NotAlike => "not alike",
            Self::NotNearDuplicates => "not near-duplicates",
        }
    }
}

/// Two of the images, by their numbers.
struct Pair {
    a: usize,
    b: usize,
    /// `None` where an embedding has no direction, by cosine, or is too large.
    distance: Option<f32>,
    same_bytes: bool,
    same_embedding: bool,
    percentile: Option<f64>,
}

/// Compares all pairs of the images and prints what comes of it.
pub fn compare(context: &Context, settings: &CompareSettings) -> Result<ExitStatus, Error> {
    let package = context.stores.open(&context.locate("--model", &settings.model)?)?;
    let runtime = Runtime::load(context.onnxruntime.as_deref())?;
    let model = Arc::new(context.block_on(Model::load(&package, None, runtime, &Compute::on(settings.device, 1)))?);
    model.of_images("`compare`, which reads image files,")?;
    model.check_vector()?;
    let yardstick = settings.table.as_deref();
    let yardstick = yardstick.map(|table| Yardstick::read(context, "--table", table, &model)).transpose()?;
    let of_table = yardstick.as_ref().map(|yardstick| yardstick.metric);
    if let (Some(asked), Some(metric)) = (settings.metric, of_table)
        && asked != metric
    {
        return Err(Error::Usage {
            message: format!("the neighbors of the table were found by {}, not by {}", metric.name(), asked.name()),
            hint: "leave out --metric".to_owned(),
        });
    }
    let metric = settings.metric.or(of_table).unwrap_or(Metric::Cosine);
    let images = embed(context, &settings.images, &model)?;
    let pairs = pairs(&images, metric, yardstick.as_ref())?;
    if settings.as_json {
        let told = to_json(settings, metric, &model, yardstick.as_ref(), &images, &pairs);
        context.print(&told.to_string())?;
    } else {
        tell(context, settings, metric, yardstick.as_ref(), &images, &pairs)?;
    }
    Ok(ExitStatus::Success)
}

/// Fetches and embeds the images, a batch at a time.
fn embed(context: &Context, locations: &[String], model: &Arc<Model>) -> Result<Vec<EmbeddedImage>, Error> {
    let limits = DecodeLimits::default();
    let mut embedded = Vec::with_capacity(locations.len());
    for locations in locations.chunks(DEFAULT_BATCH_SIZE.get()) {
        context.stop.check()?;
        let mut images = Vec::new();
        for location in locations {
            let (store, name) = context.open_file(&context.locate("an image", location)?)?;
            let image = read_image(&store, &name, location.clone(), limits.max_image_bytes);
            images.push(context.block_on(image)?);
        }
        let num_rows = RecordBatchOptions::new().with_row_count(Some(images.len()));
        let kept = RecordBatch::try_new_with_options(arrow::datatypes::Schema::empty().into(), Vec::new(), &num_rows);
        let kept = kept.map_err(|source| Error::Rows { table: "the images", source })?;
        let batch = ImageBatch { ids: StringArray::from_iter_values(locations), cells: Cells::Images(images), kept };
        for (image, location) in embed_images(batch, model, &limits)?.into_iter().zip(locations) {
            embedded.push(image.map_err(|source| Error::Image { image: location.clone(), source })?);
        }
    }
    Ok(embedded)
}

fn pairs(images: &[EmbeddedImage], metric: Metric, yardstick: Option<&Yardstick>) -> Result<Vec<Pair>, Error> {
    let vectors: Vec<f32> = images.iter().flat_map(|image| &image.embedding).copied().collect();
    let dim = vectors.len() / images.len().max(1);
    let vectors = ArrayView2::from_shape((images.len(), dim), &vectors).map_err(|error| Error::Rows {
        table: "the images",
        source: arrow::error::ArrowError::from_external_error(Box::new(error)),
    })?;
    let lists = self_join(&vectors, metric, images.len().saturating_sub(1))?;
    let mut pairs = Vec::new();
    for a in 0..images.len() {
        for b in a + 1..images.len() {
            let near = lists.get(a).unwrap_or_default().iter().find(|near| near.row as usize == b);
            let distance = near.map(|near| near.distance);
            pairs.push(Pair {
                a,
                b,
                distance,
                same_bytes: images[a].content_sha256 == images[b].content_sha256,
                same_embedding: images[a].embedding == images[b].embedding,
                percentile: distance.zip(yardstick).map(|(distance, yardstick)| yardstick.percentile(distance)),
            });
        }
    }
    Ok(pairs)
}

fn to_json(
    settings: &CompareSettings,
    metric: Metric,
    model: &Model,
    yardstick: Option<&Yardstick>,
    images: &[EmbeddedImage],
    pairs: &[Pair],
) -> Value {
    let named = settings.images.iter().zip(images);
    let images: Vec<Value> = named
        .map(|(location, image)| {
            json!({
                "image": location,
                "width": image.width,
                "height": image.height,
                "bytes": image.num_bytes,
                "content_sha256": image.content_sha256,
            })
        })
        .collect();
    let pairs: Vec<Value> = pairs
        .iter()
        .map(|pair| {
            json!({
                "a": settings.images[pair.a],
                "b": settings.images[pair.b],
                "distance": pair.distance,
                "identical_bytes": pair.same_bytes,
                "identical_embedding": pair.same_embedding,
                "percentile": pair.percentile,
                "verdict": Verdict::of(pair, settings.duplicate_distance).map(Verdict::name),
            })
        })
        .collect();
    json!({
        "model_sha256": model.sha256,
        "metric": metric.name(),
        "duplicate_distance": settings.duplicate_distance,
        "table": yardstick.map(|yardstick| json!({"url": yardstick.url, "images": yardstick.nearest.len()})),
        "images": images,
        "pairs": pairs,
    })
}

fn tell(
    context: &Context,
    settings: &CompareSettings,
    metric: Metric,
    yardstick: Option<&Yardstick>,
    images: &[EmbeddedImage],
    pairs: &[Pair],
) -> Result<(), Error> {
    for (location, image) in settings.images.iter().zip(images) {
        context.print(&format!("{location}: {} x {} pixels, {} bytes", image.width, image.height, image.num_bytes))?;
    }
    let mut is_unjudged = false;
    for pair in pairs {
        context.print("")?;
        context.print(&format!("{} and {}", settings.images[pair.a], settings.images[pair.b]))?;
        let verdict = Verdict::of(pair, settings.duplicate_distance);
        is_unjudged |= verdict.is_none();
        match pair.distance {
            Some(distance) => context.print(&format!("  distance    {distance:.6} ({})", metric.name()))?,
            None => context.print(&format!(
                "  distance    none: an embedding has no direction, or is too large ({})",
                metric.name()
            ))?,
        }
        for (is_so, words) in [(pair.same_bytes, "identical bytes"), (pair.same_embedding, "identical embedding")] {
            if is_so {
                context.print(&format!("  {words}"))?;
            }
        }
        if let (Some(percentile), Some(yardstick)) = (pair.percentile, yardstick) {
            let count = yardstick.nearest.len();
            context.print(&format!(
                "  percentile  {percentile:.1}: so many percent of the table's {count} images have a neighbor that is nearer"
            ))?;
        }
        if let Some(verdict) = verdict {
            context.print(&format!("  verdict     {}", verdict.words()))?;
        }
    }
    if is_unjudged {
        context.say(
            "a distance alone is no verdict: --table tells what is near among your own images, --duplicate-distance what counts as one \
             picture",
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(distance: f32, percentile: Option<f64>) -> Pair {
        Pair { a: 0, b: 1, distance: Some(distance), same_bytes: false, same_embedding: false, percentile }
    }

    #[test]
    fn the_first_rule_that_applies_gives_the_verdict() {
        let verdict = |distance, percentile, most| Verdict::of(&pair(distance, percentile), most);
        assert_eq!(verdict(0.1, Some(99.0), Some(0.2)), Some(Verdict::NearDuplicates));
        assert_eq!(verdict(0.3, Some(49.9), Some(0.2)), Some(Verdict::Alike));
        assert_eq!(verdict(0.3, Some(50.0), Some(0.2)), Some(Verdict::NotAlike));
        assert_eq!(verdict(0.3, Some(50.0), None), Some(Verdict::NotAlike));
        assert_eq!(verdict(0.3, None, Some(0.2)), Some(Verdict::NotNearDuplicates));
        assert_eq!(verdict(0.3, None, None), None);
        let same = Pair { same_bytes: true, same_embedding: true, ..pair(0.0, None) };
        assert_eq!(Verdict::of(&same, None), Some(Verdict::SameFile));
        let same = Pair { same_bytes: false, ..same };
        assert_eq!(Verdict::of(&same, Some(0.0)), Some(Verdict::SameEmbedding));
        let none = Pair { distance: None, ..pair(0.0, None) };
        assert_eq!(Verdict::of(&none, Some(1.0)), None);
    }

    #[test]
    fn the_percentile_counts_the_images_that_have_a_nearer_neighbor() {
        let yardstick = Yardstick { url: String::new(), metric: Metric::L2, nearest: vec![1.0, 2.0, 2.0, 4.0] };
        for (distance, percentile) in [(0.5, 0.0), (1.0, 0.0), (2.0, 25.0), (3.0, 75.0), (5.0, 100.0)] {
            assert!((yardstick.percentile(distance) - percentile).abs() < 1e-9, "{distance}");
        }
    }
}
