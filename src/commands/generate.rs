//! `generate`: pictures from the latent space, of samples or on the way from one image to another; rows of features, where the model is of
//! these.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray as _, BinaryArray, Float32Array, ListArray, RecordBatch, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use arrow::error::ArrowError;
use futures::TryStreamExt as _;
use rayon::prelude::*;

use super::{file_in, new_folder};
use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::explanation::is_named;
use crate::features::shape_text;
use crate::model::Preparation;
use crate::model::decoder::MAX_BATCH;
use crate::picture::{Picture, sheet};
use crate::random::SplitMix64;
use crate::schema::{STATUS_OK, column, vector_type};
use crate::source::PartitionValues;
use crate::stages::{Backfill, Job, MODEL_FOOTER};
use crate::table::{DataFileWriter, LiveFile, TableError};

/// The image table in the folder that is made. Its format is that of a source, so a run can read it.
pub(super) const IMAGES_FILE: &str = "images.parquet";

/// The contact sheet.
const SHEET_FILE: &str = "sheet.png";

/// Column of the PNG.
pub(super) const IMAGE_COLUMN: &str = "image";

/// Column of the features: flat lists, which a model of any shape takes.
const FEATURES_COLUMN: &str = "features";

/// Pictures on the contact sheet at most; those after it are in the table alone.
const SHEET_PICTURES: usize = 256;

/// The latents whose pictures are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Draw {
    /// From the prior, N(0, I).
    Samples {
        /// How many.
        count: u32,
        /// Decides which. A sample is the same however many there are.
        seed: u64,
    },
    /// On the way from one image to another.
    Between {
        /// Id of the first.
        from: String,
        /// Id of the last.
        to: String,
        /// How many, the two among them.
        steps: u32,
    },
}

/// Where the latents come from, once the tables are read.
enum Latents {
    Seed(u64),
    Ends { from: Vec<f32>, to: Vec<f32> },
}

/// Makes pictures of latents and writes them to the folder `to`: an image table with their latents, and a contact sheet. Of a model of features:
/// a table of these.
pub fn generate(context: &Context, pipeline: &Pipeline, draw: &Draw, to: &str) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    let store = new_folder(context, "--to", to)?;
    let model = job.model()?;
    let (count, latents) = match draw {
        Draw::Samples { count, seed } => (*count, Latents::Seed(*seed)),
        Draw::Between { from, to, steps } => {
            (*steps, Latents::Ends { from: latents_of(&job, from)?, to: latents_of(&job, to)? })
        }
    };
    let decoder = job.decoder()?;
    let schema = schema(&model.preparation);
    let footer = [("version", env!("CARGO_PKG_VERSION").to_owned()), (MODEL_FOOTER, job.model_sha256.clone())];
    let url = file_in(&store, &PartitionValues::default(), IMAGES_FILE);
    let mut file = DataFileWriter::create(&store, url, IMAGES_FILE.to_owned(), Arc::clone(&schema), &footer)?;
    let mut shown = Vec::new();
    for numbers in (0..count).collect::<Vec<_>>().chunks(MAX_BATCH) {
        context.stop.check()?;
        let mut z = vec![0.0; numbers.len() * decoder.latent_dim];
        for (number, z) in numbers.iter().zip(z.chunks_exact_mut(decoder.latent_dim)) {
            match &latents {
                Latents::Seed(seed) => SplitMix64::stream(*seed, u64::from(*number)).fill_normal(z),
                Latents::Ends { from, to } => between(from, to, f64::from(*number) / f64::from(count - 1), z),
            }
        }
        let made = match &model.preparation {
            Preparation::Image(preparation) => {
                let mut pictures = Vec::with_capacity(numbers.len());
                decoder.decode(0, &z, |tensors| {
                    let tensors = tensors.chunks_exact(decoder.num_values);
                    pictures
                        .extend(tensors.map(|tensor| Picture::of(&preparation.pixels, preparation.to_pixels(tensor))));
                })?;
                let images = pictures.par_iter().map(Picture::png).collect::<Result<Vec<_>, _>>()?;
                let room = SHEET_PICTURES - shown.len();
                shown.extend(pictures.into_iter().take(room));
                Made::Images(images)
            }
            Preparation::Features(normalizer) => {
                let mut features = Vec::with_capacity(numbers.len() * decoder.num_values);
                decoder.decode(0, &z, |tensors| {
                    let tensors = tensors.chunks_exact(decoder.num_values);
                    features.extend(tensors.flat_map(|tensor| normalizer.features(tensor)));
                })?;
                Made::Features(features)
            }
        };
        let ids: Vec<String> = numbers.iter().map(|number| image_id(draw, *number)).collect();
        context.block_on(file.write(&rows(&schema, &ids, made, z)?))?;
    }
    let written = context.block_on(file.close())?;
    let table = store.url_of(IMAGES_FILE);
    let mut sheet_url = None;
    if let Some(input) = model.contract.input.image() {
        let columns = match draw {
            // As near to a square as whole rows allow.
            Draw::Samples { .. } => shown.len().isqrt() + usize::from(shown.len().isqrt().pow(2) < shown.len()),
            Draw::Between { .. } => shown.len().min(SHEET_PICTURES.isqrt()),
        };
        context.block_on(store.put(SHEET_FILE, sheet(&shown, columns).png()?.into()))?;
        let sheet = store.url_of(SHEET_FILE);
        context.say(&format!(
            "{} pictures of {} x {} pixels in {table}; {} of them on {sheet}",
            written.num_rows,
            input.pixels.width,
            input.pixels.height,
            shown.len()
        ))?;
        sheet_url = Some(sheet);
    } else {
        let shape = shape_text(&model.contract.input.shape());
        context.say(&format!("{} rows of {shape} values in {table}", written.num_rows))?;
    }
    let mut summary = serde_json::json!({
        "images": written.num_rows,
        "url": table,
        "sheet": sheet_url,
        "latent_dim": decoder.latent_dim,
        "model_sha256": job.model_sha256,
    });
    match draw {
        Draw::Samples { seed, .. } => summary["seed"] = (*seed).into(),
        Draw::Between { from, to, .. } => summary["interpolate"] = serde_json::json!([from, to]),
    }
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

/// The name of a picture.
fn image_id(draw: &Draw, number: u32) -> String {
    match draw {
        Draw::Samples { .. } => format!("sample-{number:06}"),
        Draw::Between { from, to, .. } => format!("{from}..{to}-{number:02}"),
    }
}

/// What was made of latents.
enum Made {
    /// PNGs.
    Images(Vec<Vec<u8>>),
    /// The values of all rows, one row after the other, in the units of the source.
    Features(Vec<f32>),
}

/// The columns of the table.
fn schema(preparation: &Preparation) -> SchemaRef {
    let made = match preparation {
        Preparation::Image(_) => Field::new(IMAGE_COLUMN, DataType::Binary, false),
        Preparation::Features(_) => Field::new(FEATURES_COLUMN, vector_type(), false),
    };
    Arc::new(Schema::new(vec![
        Field::new(column::IMAGE_ID, DataType::Utf8, false),
        made,
        Field::new("z", vector_type(), false),
    ]))
}

fn rows(schema: &SchemaRef, ids: &[String], made: Made, z: Vec<f32>) -> Result<RecordBatch, Error> {
    let vectors = |values: Vec<f32>| -> Result<ArrayRef, ArrowError> {
        let DataType::List(element) = vector_type() else {
            return Err(ArrowError::SchemaError("vectors are lists".to_owned()));
        };
        let lengths = OffsetBuffer::from_lengths(std::iter::repeat_n(values.len() / ids.len().max(1), ids.len()));
        Ok(Arc::new(ListArray::try_new(element, lengths, Arc::new(Float32Array::from(values)), None)?))
    };
    let rows = || {
        let made = match made {
            Made::Images(images) => Arc::new(BinaryArray::from_iter_values(&images)),
            Made::Features(features) => vectors(features)?,
        };
        let columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from_iter_values(ids)), made, vectors(z)?];
        RecordBatch::try_new(Arc::clone(schema), columns)
    };
    rows().map_err(|source| Error::Rows { table: "generated images", source })
}

/// The point at the share `t` of the straight way from `a` to `b`; the ends are `a` and `b` exactly.
///
/// Straight, and not on an arc around the origin, which is the advice for draws from N(0, I), of which nearly all lie near a
/// sphere (T. White, "Sampling Generative Networks", 2016). These are no draws but means of posteriors, of all lengths, and on
/// the arc between a usual image and a strange one lie latents larger than either has: of two gray cells, black ones came out.
fn between(a: &[f32], b: &[f32], t: f64, z: &mut [f32]) {
    for ((z, a), b) in z.iter_mut().zip(a).zip(b) {
        #[expect(clippy::cast_possible_truncation, reason = "rounded to the latents' own precision")]
        let value = ((1.0 - t) * f64::from(*a) + t * f64::from(*b)) as f32;
        *z = value;
    }
}

/// The latents of an image, which is named by its id, with or without its partition before it.
fn latents_of(job: &Job<'_>, name: &str) -> Result<Vec<f32>, Error> {
    let mut found: Vec<(LiveFile, String, usize)> = Vec::new();
    for file in job.comparable_latents()?.files {
        let batches =
            job.context.block_on(job.latents.read(vec![file.clone()], &[column::IMAGE_ID, column::STATUS]))?;
        let mut start = 0;
        for (_, batch) in &batches {
            let (ids, statuses) = (batch.column(0).as_string::<i32>(), batch.column(1).as_string::<i32>());
            for row in 0..batch.num_rows() {
                let id = ids.value(row);
                if is_named(name, &file.partition, id) {
                    found.push((file.clone(), statuses.value(row).to_owned(), start + row));
                }
            }
            start += batch.num_rows();
        }
    }
    let url = job.latents.store().url();
    match found.as_slice() {
        [] => Err(Error::Usage {
            message: format!("no image `{name}` of this model in {url}"),
            hint: "ids are those of the source table; check that `lookalike run` has been run with this model"
                .to_owned(),
        }),
        [(file, status, row)] if status == STATUS_OK => {
            let column = job.code_column();
            let batches: Result<Vec<RecordBatch>, TableError> = job.context.block_on(async {
                let row = *row..row + 1;
                job.latents.scan(file, &[column], Some(std::slice::from_ref(&row)), 1).await?.try_collect().await
            });
            let vector = batches?.first().map(|batch| batch.column(0).as_list::<i32>().value(0));
            Ok(vector.map(|vector| vector.as_primitive::<Float32Type>().values().to_vec()).unwrap_or_default())
        }
        [(_, status, _)] => Err(Error::Usage {
            message: format!("the image `{name}` has no latents: its status in {url} is {status}"),
            hint: "choose an image that could be read".to_owned(),
        }),
        several => {
            let names: Vec<String> = several.iter().map(|(file, ..)| format!("{}/{name}", file.partition)).collect();
            Err(Error::Usage {
                message: format!("the id `{name}` is in {} partitions of {url}", several.len()),
                hint: format!("write its partition before it: one of {}", names.join(", ")),
            })
        }
    }
}
