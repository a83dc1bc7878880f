//! `reconstruct`: images as the model remembers them: their latents as a byte each, and the pictures that the decoder makes of
//! these.
//!
//! A code is `mu` in 8 bits: with one scale for each latent, over all images of the model that `latents` has,
//!
//! ```text
//! scale_i = max |mu_i| / 127        code_i = round(mu_i / scale_i), -127 to 127        z_i = code_i · scale_i
//! ```
//!
//! (symmetric quantization, as B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
//! Integer-Arithmetic-Only Inference", CVPR 2018, with the zero point at 0, where the prior has its mean). The scales are in the
//! footer of each file, as `lookalike.code_scales`, so a decoder and a file are all that is needed to make the pictures again.
//! They do not depend on which rows are chosen, so codes of several calls compare.
//!
//! Each picture is compared with the pixels that the model saw: the image decoded and resized, before its values are normalized.
//!
//! `mu` is computed anew while the images are read, since rows of `latents` and of the source have no common order. Memory holds
//! the ids of a partition and a few batches.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray as _, BinaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use futures::TryStreamExt as _;

use super::generate::{IMAGE_COLUMN, IMAGES_FILE};
use super::{file_in, new_folder};
use crate::config::Pipeline;
use crate::context::Context;
use crate::error::{Error, ExitStatus};
use crate::model::{Decoder, ImagePreparation, Model};
use crate::pass::PixelBatch;
use crate::picture::Picture;
use crate::quality::{psnr, ssim};
use crate::schema::{STATUS_OK, column};
use crate::source::SourcePartition;
use crate::stages::{Backfill, Job, MODEL_FOOTER};
use crate::table::{DataFileWriter, Live};

/// The largest code; the smallest is its negative.
const MAX_CODE: f32 = 127.0;

/// Footer value of the scales, a JSON list.
const SCALES_FOOTER: &str = "code_scales";

/// Rows of `latents` read at a time.
const LATENTS_BATCH: usize = 8192;

/// Writes the folder `to`: for each partition a table of reconstructed images, with their codes and how near they are to the
/// originals.
pub fn reconstruct(context: &Context, pipeline: &Pipeline, to: &str) -> Result<ExitStatus, Error> {
    let job = Job::prepare(context, pipeline, &Backfill::default())?;
    job.require_latents()?;
    let store = new_folder(context, "--to", to)?;
    let decoder = job.decoder()?;
    let live = job.comparable_latents()?;
    let model = job.model()?;
    let preparation = model.of_images("`reconstruct`, which compares pictures,")?;
    let (model, preparation) = (Arc::clone(model), preparation.clone());
    let coder = Arc::new(Coder { model, preparation, scales: scales(&job, &live, decoder.latent_dim)?, decoder });
    let schema = schema();
    let footer = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        (MODEL_FOOTER, job.model_sha256.clone()),
        (SCALES_FOOTER, serde_json::Value::from(coder.scales.clone()).to_string()),
    ];
    let progress = context.progress("reconstruct", job.source.num_rows());
    let mut tally = Tally::default();
    for partition in &job.source.partitions {
        let ids = ok_ids(&job, &live, partition)?;
        if ids.is_empty() {
            continue;
        }
        let mut pass = job.pass();
        pass.only_ids = Some(Arc::new(ids));
        let mut file: Option<DataFileWriter> = None;
        for unit in &partition.units {
            let coding = Arc::clone(&coder);
            let work = move |worker, batch| coding.code(worker, batch);
            let done = pass.map_unit(partition, unit, &coder.preparation.pixels, work, |coded| {
                let (num_read, num_coded) = (coded.num_read as u64, coded.ids.len() as u64);
                tally.add(&coded);
                progress.advance(num_read, num_read - num_coded);
                if num_coded == 0 {
                    return Ok(());
                }
                let writer = match &mut file {
                    Some(writer) => writer,
                    none => {
                        let url = file_in(&store, &partition.values, IMAGES_FILE);
                        let schema = Arc::clone(&schema);
                        none.insert(DataFileWriter::create(&store, url, IMAGES_FILE.to_owned(), schema, &footer)?)
                    }
                };
                Ok(context.block_on(writer.write(&coded.into_rows(&schema)?))?)
            });
            if let Err(error) = done {
                if let Some(file) = file {
                    context.block_on(file.abort());
                }
                return Err(error);
            }
        }
        if let Some(file) = file {
            context.block_on(file.close())?;
        }
    }
    progress.finish();
    if tally.num_images == 0 {
        return Err(Error::Usage {
            message: format!("no image of the source has latents of this model in {}", job.latents.store().url()),
            hint: "check --where, and that `lookalike run` has been run with this model".to_owned(),
        });
    }
    let input_bytes = coder.model.contract.input.num_values();
    let summary = tally.summary(coder.decoder.latent_dim, input_bytes);
    let number = |group: &str, name: &str| match summary[group][name].as_f64() {
        Some(number) => format!("{number:.2}"),
        None => "no noise".to_owned(),
    };
    context.say(&format!(
        "{} images below {}: {:.0} bytes each as they were, {} as the model saw them, {} as codes (1:{:.1})",
        tally.num_images,
        store.url(),
        summary["mean_image_bytes"].as_f64().unwrap_or_default(),
        input_bytes,
        coder.decoder.latent_dim,
        summary["compression_ratio"].as_f64().unwrap_or_default(),
    ))?;
    context.say(&format!(
        "mean PSNR {} dB and SSIM {} of codes; {} dB and {} of mu itself",
        number("int8", "mean_psnr"),
        number("int8", "mean_ssim"),
        number("float", "mean_psnr"),
        number("float", "mean_ssim"),
    ))?;
    if tally.num_rejected > 0 {
        context.say(&format!("{} images that have latents cannot be read any more", tally.num_rejected))?;
    }
    let mut summary = summary;
    summary["url"] = store.url().as_str().into();
    summary["model_sha256"] = job.model_sha256.as_str().into();
    context.print(&summary.to_string())?;
    Ok(ExitStatus::Success)
}

/// The columns of a file.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(column::IMAGE_ID, DataType::Utf8, false),
        Field::new(IMAGE_COLUMN, DataType::Binary, false),
        Field::new("code", DataType::Binary, false),
        Field::new("code_bytes", DataType::Int32, false),
        Field::new(column::IMAGE_BYTES, DataType::Int64, false),
        Field::new("psnr", DataType::Float64, true),
        Field::new("ssim", DataType::Float64, false),
    ]))
}

/// The scale of each latent, over all rows that have latents.
fn scales(job: &Job<'_>, live: &Live, latent_dim: usize) -> Result<Vec<f32>, Error> {
    let mut largest = vec![0.0_f32; latent_dim];
    for file in &live.files {
        job.context.block_on(async {
            let mut batches = job.latents.scan(file, &[job.code_column()], None, LATENTS_BATCH).await?;
            while let Some(rows) = batches.try_next().await? {
                job.context.stop.check()?;
                let vectors = rows.column(0).as_list::<i32>();
                for vector in vectors.iter().flatten() {
                    let values = vector.as_primitive::<Float32Type>().values().iter();
                    for (largest, value) in largest.iter_mut().zip(values) {
                        *largest = largest.max(value.abs());
                    }
                }
            }
            Ok::<_, Error>(())
        })?;
    }
    Ok(largest.into_iter().map(|largest| largest / MAX_CODE).collect())
}

/// The ids of a partition's rows that have latents.
fn ok_ids(job: &Job<'_>, live: &Live, partition: &SourcePartition) -> Result<HashSet<String>, Error> {
    let mut ids = HashSet::new();
    let files = live.of(&partition.values).cloned().collect();
    for (_, batch) in job.context.block_on(job.latents.read(files, &[column::IMAGE_ID, column::STATUS]))? {
        let statuses = batch.column(1).as_string::<i32>().iter();
        let ok = batch.column(0).as_string::<i32>().iter().zip(statuses);
        ids.extend(ok.filter(|(_, status)| *status == Some(STATUS_OK)).filter_map(|(id, _)| id.map(str::to_owned)));
    }
    Ok(ids)
}

/// What makes codes of images, and pictures of codes.
struct Coder {
    model: Arc<Model>,
    preparation: ImagePreparation,
    decoder: Decoder,
    scales: Vec<f32>,
}

impl Coder {
    /// The code of one image.
    fn quantize(&self, mu: &[f32]) -> Vec<i8> {
        mu.iter().zip(&self.scales).map(|(mu, scale)| quantize(*mu, *scale)).collect()
    }

    /// Codes and pictures of a batch. Images that cannot be read, or of which the model makes no numbers, are left out.
    fn code(&self, worker: usize, batch: PixelBatch) -> Result<Coded, Error> {
        let mut coded = Coded { num_read: batch.pixels.len(), ..Coded::default() };
        let mut tensors = Vec::new();
        let mut originals = Vec::new();
        for (row, pixels) in batch.pixels.into_iter().enumerate() {
            let (Ok(pixels), Some(image)) = (pixels, &batch.images[row]) else { continue };
            self.preparation.push_tensor(&pixels.data, &mut tensors);
            originals.push((batch.ids.value(row).to_owned(), image.len(), pixels.data));
        }
        if originals.is_empty() {
            return Ok(coded);
        }
        let num_images = originals.len();
        let mu = self
            .model
            .session(worker)
            .run(&tensors, num_images, |latents| latents.mu.map(<[f32]>::to_vec).unwrap_or_default())?;
        drop(tensors);
        let (mut kept, mut kept_mu, mut kept_z) = (Vec::new(), Vec::new(), Vec::new());
        for (original, mu) in originals.into_iter().zip(mu.chunks_exact(self.decoder.latent_dim)) {
            if mu.iter().all(|value| value.is_finite()) {
                let code = self.quantize(mu);
                kept_mu.extend_from_slice(mu);
                kept_z.extend(code.iter().zip(&self.scales).map(|(code, scale)| f32::from(*code) * scale));
                kept.push((original, code));
            }
        }
        let pictures = self.pictures(worker, &kept_z)?;
        let unquantized = self.pictures(worker, &kept_mu)?;
        let spec = &self.preparation.pixels;
        for ((((id, image_bytes, original), code), picture), of_mu) in kept.into_iter().zip(pictures).zip(unquantized) {
            let quality = |other: &[u8]| Quality {
                psnr: psnr(&original, other),
                ssim: ssim(&original, other, spec.width as usize, spec.color.channels()),
            };
            coded.int8.push(quality(&picture));
            coded.float.push(quality(&of_mu));
            coded.images.push(Picture::of(spec, picture).png()?);
            coded.ids.push(id);
            coded.image_bytes.push(image_bytes);
            coded.codes.push(code.into_iter().map(i8::cast_unsigned).collect());
        }
        Ok(coded)
    }

    /// The pixels that the decoder makes of latents.
    fn pictures(&self, worker: usize, z: &[f32]) -> Result<Vec<Vec<u8>>, Error> {
        let mut pictures = Vec::new();
        self.decoder.decode(worker, z, |tensors| {
            let tensors = tensors.chunks_exact(self.decoder.num_values);
            pictures.extend(tensors.map(|tensor| self.preparation.to_pixels(tensor)));
        })?;
        Ok(pictures)
    }
}

/// A latent as a byte. One that is zero in all images has the code 0.
fn quantize(mu: f32, scale: f32) -> i8 {
    #[expect(clippy::cast_possible_truncation, reason = "clamped; and what is not a number becomes 0")]
    let code = (mu / scale).round().clamp(-MAX_CODE, MAX_CODE) as i8;
    code
}

/// How near a picture is to the original.
#[derive(Debug, Clone, Copy)]
struct Quality {
    psnr: Option<f64>,
    ssim: f64,
}

/// A batch of images with their codes.
#[derive(Debug, Default)]
struct Coded {
    /// Rows that the source gave.
    num_read: usize,
    ids: Vec<String>,
    /// PNGs of what the decoder makes of the codes.
    images: Vec<Vec<u8>>,
    codes: Vec<Vec<u8>>,
    /// Sizes of the original files.
    image_bytes: Vec<usize>,
    /// Of the pictures.
    int8: Vec<Quality>,
    /// Of pictures of mu itself.
    float: Vec<Quality>,
}

impl Coded {
    fn into_rows(self, schema: &SchemaRef) -> Result<RecordBatch, Error> {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(self.ids)),
            Arc::new(BinaryArray::from_iter_values(&self.images)),
            Arc::new(BinaryArray::from_iter_values(&self.codes)),
            Arc::new(self.codes.iter().map(|code| i32::try_from(code.len()).ok()).collect::<Int32Array>()),
            Arc::new(self.image_bytes.iter().map(|bytes| i64::try_from(*bytes).ok()).collect::<Int64Array>()),
            Arc::new(self.int8.iter().map(|quality| quality.psnr).collect::<Float64Array>()),
            Arc::new(self.int8.iter().map(|quality| Some(quality.ssim)).collect::<Float64Array>()),
        ];
        RecordBatch::try_new(Arc::clone(schema), columns)
            .map_err(|source| Error::Rows { table: "reconstructed images", source })
    }
}

/// Sums over all images, in the order of the rows.
#[derive(Debug, Default)]
struct Tally {
    num_images: u64,
    num_rejected: u64,
    image_bytes: u64,
    int8: QualitySum,
    float: QualitySum,
}

/// Sums of qualities.
#[derive(Debug, Default)]
struct QualitySum {
    psnr: f64,
    num_psnr: u64,
    ssim: f64,
}

impl Tally {
    fn add(&mut self, coded: &Coded) {
        self.num_images += coded.ids.len() as u64;
        self.num_rejected += (coded.num_read - coded.ids.len()) as u64;
        self.image_bytes += coded.image_bytes.iter().map(|bytes| *bytes as u64).sum::<u64>();
        for (sum, qualities) in [(&mut self.int8, &coded.int8), (&mut self.float, &coded.float)] {
            for quality in qualities {
                sum.psnr += quality.psnr.unwrap_or_default();
                sum.num_psnr += u64::from(quality.psnr.is_some());
                sum.ssim += quality.ssim;
            }
        }
    }

    /// Means over the images; pictures without any noise have no PSNR, and are not in its mean.
    fn summary(&self, code_bytes: usize, input_bytes: usize) -> serde_json::Value {
        let count = self.num_images as f64;
        let quality = |sum: &QualitySum| {
            serde_json::json!({
                "mean_psnr": (sum.num_psnr > 0).then(|| sum.psnr / sum.num_psnr as f64),
                "mean_ssim": sum.ssim / count,
            })
        };
        serde_json::json!({
            "images": self.num_images,
            "rejected": self.num_rejected,
            "code_bytes": code_bytes,
            "mean_image_bytes": self.image_bytes as f64 / count,
            "input_bytes": input_bytes,
            "compression_ratio": self.image_bytes as f64 / (count * code_bytes as f64),
            "compression_ratio_of_input": input_bytes as f64 / code_bytes as f64,
            "int8": quality(&self.int8),
            "float": quality(&self.float),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_nearest_of_255_steps() {
        let scale = 2.54 / MAX_CODE;
        for (mu, code) in [(2.54, 127), (-2.54, -127), (0.0, 0), (0.02, 1), (0.011, 1), (-0.009, 0), (9.0, 127)] {
            assert_eq!(quantize(mu, scale), code, "{mu}");
        }
        assert_eq!(quantize(0.0, 0.0), 0);
    }

    #[test]
    fn pictures_without_noise_are_not_in_the_mean_of_the_psnr() {
        let quality = |psnr| Quality { psnr, ssim: 0.5 };
        let coded = Coded {
            num_read: 3,
            ids: vec!["a".to_owned(), "b".to_owned()],
            image_bytes: vec![100, 300],
            int8: vec![quality(None), quality(Some(30.0))],
            float: vec![quality(None), quality(None)],
            ..Coded::default()
        };
        let mut tally = Tally::default();
        tally.add(&coded);
        let summary = tally.summary(20, 600);
        assert_eq!((&summary["images"], &summary["rejected"]), (&2.into(), &1.into()));
        assert_eq!((&summary["mean_image_bytes"], &summary["compression_ratio"]), (&200.0.into(), &10.0.into()));
        assert_eq!(summary["compression_ratio_of_input"], 30.0);
        assert_eq!(summary["int8"]["mean_psnr"], 30.0);
        assert!(summary["float"]["mean_psnr"].is_null());
    }
}
