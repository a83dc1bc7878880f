//! `fit`: learns probabilistic PCA, the linear VAE, from an image table, and writes a model package.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;

use super::seconds;
use crate::config::Pipeline;
use crate::context::Context;
use crate::decode::{Color, Filter, Fit, Layout, Normalizer};
use crate::error::{Error, ExitStatus};
use crate::model::package::{self, Golden, GoldenError, GoldenImage, WriteError};
use crate::model::ppca::{self, MomentAccumulator, Ppca, PpcaError};
use crate::model::{
    self, Compute, Contract, DEFAULT_INPUT_TOLERANCE, DEFAULT_OUTPUT_TOLERANCE, FORMAT_VERSION, GoldenFile, Graph,
    Input, Likelihood, Model, ModelError, Outputs, Role, Runtime,
};
use crate::source::{Selection, Source};
use crate::store::Store;

/// Fewer images determine no mean, no direction of variance, and no noise.
const MIN_IMAGES: usize = 3;

/// Images put into the package for replay.
const GOLDEN_IMAGES: usize = 4;

/// Pixels 0 to 255 become 0 to 1.
const PIXEL_SCALE: f32 = 1.0 / 255.0;

/// Name of the network's input.
const TENSOR: &str = "image";

/// Latents where none are asked for and there are images enough.
const DEFAULT_LATENT_DIM: usize = 64;

/// Side of the input where none is asked for, in pixels.
pub const DEFAULT_SIDE: u32 = 64;

/// Side of the input for a folder of pictures of any kind, in pixels: scenes are still told apart at 32 x 32 in color (Torralba,
/// Fergus & Freeman 2008), and the fit takes seconds.
const PICTURES_SIDE: u32 = 32;

/// Without a number of latents asked for, at least this many images stand for each: fewer would be learned by heart.
const MIN_IMAGES_PER_LATENT: usize = 4;

/// A model that cannot be fitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// The images do not determine a model.
    #[error("cannot fit a model to the {num_rows} readable images of {source_url}")]
    Ppca {
        /// Images that were read.
        num_rows: usize,
        /// The table.
        source_url: String,
        /// Why.
        source: PpcaError,
    },
    /// There is next to nothing to learn from.
    #[error(
        "only {num_rows} images of {source_url} could be read ({num_rejected} could not), and a model needs at least {MIN_IMAGES}"
    )]
    TooFewImages {
        /// Images that were read.
        num_rows: usize,
        /// Images that were rejected.
        num_rejected: usize,
        /// The table.
        source_url: String,
    },
    /// A model lies where this one should go.
    #[error("another model package is already at {url}, and packages never change")]
    Exists {
        /// The place.
        url: String,
    },
    /// The package cannot be put together.
    #[error("cannot put together the model package {url}")]
    Golden {
        /// The place.
        url: String,
        /// Why.
        source: GoldenError,
    },
    /// The package cannot be written.
    #[error("cannot write the model package {url}")]
    Write {
        /// The place.
        url: String,
        /// Why.
        source: WriteError,
    },
}

impl FitError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Ppca { source: PpcaError::LatentDim { largest, .. }, .. } => {
                Some(format!("ask for at most {largest} latents with --latent-dim, or give it more images"))
            }
            Self::TooFewImages { .. } => Some("check that these are images, or give more of them".to_owned()),
            Self::Exists { .. } => {
                Some("write to a new folder, such as …/2, and name that in [model] package".to_owned())
            }
            _ => None,
        }
    }
}

/// What is to be learned.
#[derive(Debug, Clone)]
pub struct FitSettings {
    /// Number of latents; `None`: 64, or fewer where there are few images.
    pub latent_dim: Option<usize>,
    /// Height of the input, in pixels.
    pub height: u32,
    /// Width of the input, in pixels.
    pub width: u32,
    /// Gray or RGB.
    pub color: Color,
    /// How pixels are resampled.
    pub filter: Filter,
    /// How an image of another shape is fitted.
    pub fit: Fit,
}

impl FitSettings {
    /// What suits a folder of pictures that nothing is known of.
    fn for_pictures() -> Self {
        Self {
            latent_dim: None,
            height: PICTURES_SIDE,
            width: PICTURES_SIDE,
            color: Color::Rgb,
            filter: Filter::Bilinear,
            fit: Fit::Stretch,
        }
    }

    /// The input of the model: pixels from 0 to 1.
    fn input(&self) -> Input {
        let channels = self.color.channels();
        Input {
            tensor: TENSOR.to_owned(),
            height: self.height,
            width: self.width,
            color: self.color,
            layout: Layout::Nchw,
            filter: self.filter,
            fit: self.fit,
            resize: None,
            scale: PIXEL_SCALE,
            mean: vec![0.0; channels],
            std: vec![1.0; channels],
            exif_rotation: true,
        }
    }
}

/// Writes a package where there is none yet, or the same. Returns its hash.
pub(super) fn publish(
    context: &Context,
    store: &Store,
    contract: Contract,
    files: BTreeMap<String, Bytes>,
) -> Result<String, Error> {
    let url = store.url().to_string();
    match context.block_on(model::read_contract(store)) {
        Ok((there, sha256)) => {
            let files = files.iter().map(|(name, bytes)| (name.clone(), crate::hash::sha256(bytes))).collect();
            if (Contract { files, ..contract }) == there { Ok(sha256) } else { Err(FitError::Exists { url }.into()) }
        }
        Err(ModelError::Store(error)) if error.is_not_found() => Ok(context
            .block_on(package::write(store, contract, files))
            .map_err(|source| FitError::Write { url, source })?),
        // Something lies there that is no package, or a package of another version.
        Err(ModelError::Contract { .. } | ModelError::Invalid { .. }) => Err(FitError::Exists { url }.into()),
        Err(error) => Err(error.into()),
    }
}

/// Fits a model to the pipeline's source and writes its package where `[model] package` says.
pub fn fit(context: &Context, pipeline: &Pipeline, settings: &FitSettings) -> Result<ExitStatus, Error> {
    let started = Instant::now();
    let url = pipeline.require_model()?.package.clone();
    let store = context.stores.open(&url)?;
    let learned = learn(context, pipeline, settings.input(), settings.latent_dim)?;
    let (contract, files) = learned.package(&pipeline.name, url.as_str())?;
    let sha256 = publish(context, &store, contract, files)?;
    let ppca = &learned.ppca;
    let explained = 100.0 * ppca.explained_variance.iter().sum::<f64>() / ppca.total_variance;
    context.say(&format!(
        "fitted {} latents to {} images ({} rejected) in {}; they explain {explained:.1} % of the variance; package {url}",
        ppca.latent_dim,
        ppca.num_rows,
        learned.num_rejected,
        seconds(started.elapsed().as_secs_f64()),
    ))?;
    context.print(
        &serde_json::json!({
            "package": url.to_string(),
            "sha256": sha256,
            "images": ppca.num_rows,
            "rejected": learned.num_rejected,
            "latent_dim": ppca.latent_dim,
            "explained_variance": explained / 100.0,
            "noise_variance": ppca.noise_variance,
        })
        .to_string(),
    )?;
    Ok(ExitStatus::Success)
}

/// Fits a model with default settings, unless a package lies where the pipeline expects one.
pub fn fit_unless_there(context: &Context, pipeline: &Pipeline) -> Result<(), Error> {
    let package = pipeline.require_model()?;
    let store = context.stores.open(&package.package)?;
    match context.block_on(store.head(model::CONTRACT_FILE)) {
        Ok(_) => context.say(&format!("using the model fitted before, in {}", package.package)),
        Err(error) if error.is_not_found() => {
            let settings = FitSettings::for_pictures();
            let learned = learn(context, pipeline, settings.input(), settings.latent_dim)?;
            let url = package.package.to_string();
            let (contract, files) = learned.package(&pipeline.name, &url)?;
            context
                .block_on(package::write(&store, contract, files))
                .map_err(|source| FitError::Write { url: url.clone(), source })?;
            context.say(&format!(
                "fitted a linear VAE of {} latents to {} images; package {url}",
                learned.ppca.latent_dim, learned.ppca.num_rows
            ))
        }
        Err(error) => Err(error.into()),
    }
}

/// Fits a model to the pipeline's source, through the input of another model, and loads it. Its package lies in memory.
pub fn fit_beside(context: &Context, pipeline: &Pipeline, input: Input, latent_dim: usize) -> Result<Model, Error> {
    let learned = learn(context, pipeline, input, Some(latent_dim))?;
    let store =
        context.stores.open(&context.locate("the place of the fitted model", "memory:///lookalike/fitted/")?)?;
    let url = store.url().to_string();
    let (contract, files) = learned.package(&pipeline.name, &url)?;
    let sha256 =
        context.block_on(package::write(&store, contract, files)).map_err(|source| FitError::Write { url, source })?;
    let runtime = Runtime::load(context.onnxruntime.as_deref())?;
    let compute = Compute::new(&pipeline.execution, context.workers(pipeline));
    Ok(context.block_on(Model::load(&store, Some(&sha256), runtime, &compute))?)
}

/// A model and the images to replay.
struct Learned {
    ppca: Ppca,
    input: Input,
    /// Compressed images and their tensors.
    golden: Vec<(Vec<u8>, Vec<f32>)>,
    num_rejected: usize,
}

/// Learns from the pipeline's source, through this input. The network that comes of it has its axes in the order of [`Layout::Nchw`].
fn learn(context: &Context, pipeline: &Pipeline, input: Input, latent_dim: Option<usize>) -> Result<Learned, Error> {
    let input = Input { tensor: TENSOR.to_owned(), layout: Layout::Nchw, ..input };
    let source = context.block_on(Source::discover(
        &context.stores,
        &pipeline.source,
        pipeline.execution.unit_rows.get() as u64,
        &Selection::default(),
    ))?;
    let spec = input.pixel_spec();
    let normalizer = Normalizer::new(input.color, input.scale, &input.mean, &input.std)
        .map_err(|source| ModelError::Normalization { package: String::new(), source })?;
    let dim = input.num_values();
    let ppca_error = |num_rows| {
        let source_url = source.url().to_string();
        move |source| FitError::Ppca { num_rows, source_url: source_url.clone(), source }
    };
    let mut moments = MomentAccumulator::new(dim).map_err(ppca_error(0))?;
    let mut golden = Vec::new();
    let mut num_rejected = 0;
    let mut tensor = vec![0.0; dim];
    let progress = context.progress("fit", source.num_rows());
    let pass = context.pass(pipeline, &source);
    for partition in &source.partitions {
        for unit in &partition.units {
            pass.decode_unit(partition, unit, &spec, |batch| {
                let mut rejected = 0;
                for (pixels, image) in batch.pixels.iter().zip(&batch.images) {
                    let Ok(pixels) = pixels else {
                        rejected += 1;
                        continue;
                    };
                    normalizer.write_tensor(&pixels.data, Layout::Nchw, &mut tensor);
                    moments.push(&tensor).map_err(ppca_error(moments.num_rows()))?;
                    if let Some(image) = image.as_ref().filter(|_| golden.len() < GOLDEN_IMAGES) {
                        golden.push((image.to_vec(), tensor.clone()));
                    }
                }
                num_rejected += rejected;
                progress.advance(batch.pixels.len() as u64, rejected as u64);
                Ok(())
            })?;
        }
    }
    progress.finish();
    let num_rows = moments.num_rows();
    if num_rows < MIN_IMAGES {
        let source_url = source.url().to_string();
        return Err(FitError::TooFewImages { num_rows, num_rejected, source_url }.into());
    }
    let latent_dim =
        latent_dim.unwrap_or_else(|| DEFAULT_LATENT_DIM.min(num_rows / MIN_IMAGES_PER_LATENT).min(dim - 1).max(1));
    let ppca = ppca::fit(moments, latent_dim).map_err(ppca_error(num_rows))?;
    Ok(Learned { ppca, input, golden, num_rejected })
}

impl Learned {
    /// The contract and the files of the package.
    fn package(&self, name: &str, url: &str) -> Result<(Contract, BTreeMap<String, Bytes>), Error> {
        let ppca = &self.ppca;
        let (channels, height, width) = (self.input.channels(), self.input.height as usize, self.input.width as usize);
        let ppca_error = |source| FitError::Ppca { num_rows: ppca.num_rows, source_url: url.to_owned(), source };
        // The expected outputs are computed here by the closed form, not by running the network, so that the replay proves the
        // network too.
        let images = self
            .golden
            .iter()
            .map(|(image, tensor)| {
                let inferred = ppca.infer(tensor);
                GoldenImage {
                    image: image.clone(),
                    input: tensor.clone(),
                    outputs: vec![
                        (Role::Mu, inferred.mu),
                        (Role::Logvar, inferred.logvar),
                        (Role::Reconstruction, inferred.reconstruction),
                    ],
                }
            })
            .collect();
        let golden = Golden { images }.write().map_err(|source| FitError::Golden { url: url.to_owned(), source })?;
        let main = ppca.vae_onnx(channels, height, width).map_err(ppca_error)?;
        let decoder = ppca.decoder_onnx(channels, height, width).map_err(ppca_error)?;
        let files = BTreeMap::from([
            ("vae.onnx".to_owned(), Bytes::from(main)),
            ("decoder.onnx".to_owned(), Bytes::from(decoder)),
            ("golden.parquet".to_owned(), golden),
        ]);
        let contract = Contract {
            format_version: FORMAT_VERSION,
            name: format!("{name}-ppca-{}", ppca.latent_dim),
            graph: Graph { main: "vae.onnx".to_owned(), decoder: Some("decoder.onnx".to_owned()) },
            input: self.input.clone(),
            outputs: Outputs {
                mu: Some("mu".to_owned()),
                logvar: Some("logvar".to_owned()),
                reconstruction: Some("reconstruction".to_owned()),
                ..Outputs::default()
            },
            likelihood: Some(Likelihood::Gaussian { sigma: ppca.noise_variance.sqrt() }),
            golden: GoldenFile {
                file: "golden.parquet".to_owned(),
                input_tolerance: DEFAULT_INPUT_TOLERANCE,
                output_tolerance: DEFAULT_OUTPUT_TOLERANCE,
            },
            files: BTreeMap::new(),
        };
        Ok((contract, files))
    }
}
