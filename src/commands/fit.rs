//! `fit`: learns probabilistic PCA, the linear VAE, from a table of images or features, and writes a model package.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;

use super::seconds;
use crate::config::{DEFAULT_BATCH_SIZE, Pipeline};
use crate::context::Context;
use crate::decode::{Color, Filter, Fit, Layout, PixelSpec};
use crate::error::{Error, ExitStatus};
use crate::features::Tensor;
use crate::model::package::{self, Golden, GoldenError, GoldenImage, WriteError};
use crate::model::ppca::{self, MomentAccumulator, Ppca, PpcaError};
use crate::model::{
    self, Compute, Contract, DEFAULT_INPUT_TOLERANCE, DEFAULT_OUTPUT_TOLERANCE, FORMAT_VERSION, GoldenFile, Graph,
    ImageInput, Input, InputKind, Likelihood, Model, ModelError, Outputs, Preparation, Role, Runtime,
};
use crate::pass::{Pass, PassError, PassFault};
use crate::source::{Cells, Content, ReadOptions, Selection, Source};
use crate::store::Store;

/// Fewer images, or rows of features, determine no mean, no direction of variance, and no noise.
const MIN_IMAGES: usize = 3;

/// Images, or rows of features, put into the package for replay.
const GOLDEN_IMAGES: usize = 4;

/// Pixels 0 to 255 become 0 to 1.
const PIXEL_SCALE: f32 = 1.0 / 255.0;

/// Names of the network's input.
const IMAGE_TENSOR: &str = "image";
const FEATURES_TENSOR: &str = "features";

/// Latents where none are asked for and there are images enough.
const DEFAULT_LATENT_DIM: usize = 64;

/// Side of the input where none is asked for, in pixels.
const DEFAULT_SIDE: u32 = 64;

/// Side of the input for a folder of pictures of any kind, in pixels: scenes are still told apart at 32 x 32 in color (Torralba,
/// Fergus & Freeman 2008), and the fit takes seconds.
const PICTURES_SIDE: u32 = 32;

/// Without a number of latents asked for, at least this many images stand for each: fewer would be learned by heart.
const MIN_IMAGES_PER_LATENT: usize = 4;

/// A model that cannot be fitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// The images, or the features, do not determine a model.
    #[error("cannot fit a model to the {num_rows} readable rows of {source_url}")]
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
        "only {num_rows} rows of {source_url} could be read ({num_rejected} could not), and a model needs at least {MIN_IMAGES}"
    )]
    TooFewImages {
        /// Images that were read.
        num_rows: usize,
        /// Images that were rejected.
        num_rejected: usize,
        /// The table.
        source_url: String,
    },
    /// No row says what shape the features have.
    #[error("no row of {source_url} holds features that a model could be fitted to; the first one: {reject}")]
    NoShape {
        /// The table.
        source_url: String,
        /// Why not.
        reject: String,
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
                Some(format!("ask for at most {largest} latents with --latent-dim, or give it more rows"))
            }
            Self::TooFewImages { .. } => {
                Some("check that these are images, or features of one shape, or give more of them".to_owned())
            }
            Self::Exists { .. } => {
                Some("write to a new folder, such as …/2, and name that in [model] package".to_owned())
            }
            _ => None,
        }
    }
}

/// What is to be learned. What is not asked for has a default.
#[derive(Debug, Clone, Default)]
pub struct FitSettings {
    /// Number of latents: 64, or fewer where there are few rows.
    pub latent_dim: Option<usize>,
    /// Whether each value of the features is brought to mean 0 and standard deviation 1 first.
    pub standardize: bool,
    /// Height of the input in pixels: 64.
    pub height: Option<u32>,
    /// Width of the input in pixels: 64.
    pub width: Option<u32>,
    /// Gray or RGB: RGB.
    pub color: Option<Color>,
    /// How pixels are resampled: bilinear.
    pub filter: Option<Filter>,
    /// How an image of another shape is fitted: stretched.
    pub fit: Option<Fit>,
}

impl FitSettings {
    /// What suits a folder of pictures that nothing is known of.
    fn for_pictures() -> Self {
        Self { height: Some(PICTURES_SIDE), width: Some(PICTURES_SIDE), ..Self::default() }
    }

    /// The input of the model: pixels from 0 to 1, or features as they are.
    fn input(&self, context: &Context, pass: &Pass<'_>) -> Result<Input, Error> {
        let unfit = |option: &str, kind: &str, holds: &str| Error::Usage {
            message: format!("{option} is for {kind}, and the image column of {} holds {holds}", pass.source.url()),
            hint: format!("leave out {option}"),
        };
        match pass.source.content() {
            Some(content @ Content::Features(lengths)) => {
                let of_pixels = [
                    ("--height", self.height.is_some()),
                    ("--width", self.width.is_some()),
                    ("--color", self.color.is_some()),
                    ("--filter", self.filter.is_some()),
                    ("--fit", self.fit.is_some()),
                ];
                if let Some((option, _)) = of_pixels.into_iter().find(|(_, is_asked)| *is_asked) {
                    return Err(unfit(option, "images", &content.to_string()));
                }
                let by_type: Option<Vec<usize>> = lengths.iter().copied().collect();
                let shape = by_type.map_or_else(|| shape_of_rows(context, pass), Ok)?;
                let kind = InputKind::Features { shape };
                Ok(Input { tensor: FEATURES_TENSOR.to_owned(), kind, scale: 1.0, mean: vec![0.0], std: vec![1.0] })
            }
            Some(Content::Images) | None => {
                if self.standardize {
                    return Err(unfit("--standardize", "features", "images"));
                }
                let color = self.color.unwrap_or(Color::Rgb);
                let pixels = PixelSpec {
                    height: self.height.unwrap_or(DEFAULT_SIDE),
                    width: self.width.unwrap_or(DEFAULT_SIDE),
                    color,
                    filter: self.filter.unwrap_or(Filter::Bilinear),
                    fit: self.fit.unwrap_or(Fit::Stretch),
                    resize: None,
                    exif_rotation: true,
                };
                Ok(Input {
                    tensor: IMAGE_TENSOR.to_owned(),
                    kind: InputKind::Image(ImageInput { pixels, layout: Layout::Nchw }),
                    scale: PIXEL_SCALE,
                    mean: vec![0.0; color.channels()],
                    std: vec![1.0; color.channels()],
                })
            }
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

/// The shape of the first row of features that has one.
fn shape_of_rows(context: &Context, pass: &Pass<'_>) -> Result<Vec<usize>, Error> {
    let options = ReadOptions { batch_rows: DEFAULT_BATCH_SIZE.get(), max_image_bytes: pass.limits.max_image_bytes };
    let (mut shape, mut first_reject) = (None, None);
    context.block_on(pass.source.read_until(&options, |batch| {
        let Cells::Features(rows) = batch.cells else { return false };
        for row in rows {
            match row {
                Ok(Tensor { shape: found, .. }) if !found.contains(&0) => shape = shape.take().or(Some(found)),
                Ok(_) => first_reject = first_reject.take().or(Some("it is empty".to_owned())),
                Err(reject) => first_reject = first_reject.take().or(Some(reject.to_string())),
            }
        }
        shape.is_none()
    }))?;
    if let Some(shape) = shape {
        return Ok(shape);
    }
    let reject = first_reject.unwrap_or_else(|| "there is none".to_owned());
    Err(FitError::NoShape { source_url: pass.source.url().to_string(), reject }.into())
}

/// Fits a model to the pipeline's source and writes its package where `[model] package` says.
pub fn fit(context: &Context, pipeline: &Pipeline, settings: &FitSettings) -> Result<ExitStatus, Error> {
    let started = Instant::now();
    let url = pipeline.require_model()?.package.clone();
    let store = context.stores.open(&url)?;
    let source = discover(context, pipeline)?;
    let pass = context.pass(pipeline, &source);
    let learned = learn(context, &pass, settings.input(context, &pass)?, settings.latent_dim, settings.standardize)?;
    let (contract, files) = learned.package(&pipeline.name, url.as_str())?;
    let sha256 = publish(context, &store, contract, files)?;
    let ppca = &learned.ppca;
    let explained = 100.0 * ppca.explained_variance.iter().sum::<f64>() / ppca.total_variance;
    context.say(&format!(
        "fitted {} latents to {} {} ({} rejected) in {}; they explain {explained:.1} % of the variance; package {url}",
        ppca.latent_dim,
        ppca.num_rows,
        if learned.input.image().is_some() { "images" } else { "rows" },
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
            let source = discover(context, pipeline)?;
            let pass = context.pass(pipeline, &source);
            let learned = learn(context, &pass, settings.input(context, &pass)?, settings.latent_dim, false)?;
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
    let source = discover(context, pipeline)?;
    let learned = learn(context, &context.pass(pipeline, &source), input, Some(latent_dim), false)?;
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

fn discover(context: &Context, pipeline: &Pipeline) -> Result<Source, Error> {
    let unit_rows = pipeline.execution.unit_rows.get() as u64;
    let all = Selection::default();
    Ok(context.block_on(Source::discover(&context.stores, &pipeline.source, unit_rows, &all))?)
}

/// A model and the rows to replay.
struct Learned {
    ppca: Ppca,
    input: Input,
    /// What the rows hold, a compressed image or features, and their tensors.
    golden: Vec<(Vec<u8>, Vec<f32>)>,
    num_rejected: usize,
}

/// What was learned so far.
struct Lesson<'a> {
    source: &'a Source,
    moments: MomentAccumulator,
    golden: Vec<(Vec<u8>, Vec<f32>)>,
    num_rejected: usize,
}

impl Lesson<'_> {
    /// Takes in a row: what it holds, and its tensor.
    fn take(&mut self, bytes: &[u8], tensor: &[f32]) -> Result<(), Error> {
        let num_rows = self.moments.num_rows();
        self.moments.push(tensor).map_err(|error| ppca_error(self.source, num_rows, error))?;
        if self.golden.len() < GOLDEN_IMAGES {
            self.golden.push((bytes.to_vec(), tensor.to_vec()));
        }
        Ok(())
    }
}

fn ppca_error(table: &Source, num_rows: usize, source: PpcaError) -> FitError {
    FitError::Ppca { num_rows, source_url: table.url().to_string(), source }
}

/// Learns from the rows of a pass, through this input. The network that comes of it has the axes of images in the order of
/// [`Layout::Nchw`].
fn learn(
    context: &Context,
    pass: &Pass<'_>,
    mut input: Input,
    latent_dim: Option<usize>,
    standardize: bool,
) -> Result<Learned, Error> {
    input.tensor = match &mut input.kind {
        InputKind::Image(image) => {
            image.layout = Layout::Nchw;
            IMAGE_TENSOR.to_owned()
        }
        InputKind::Features { .. } => FEATURES_TENSOR.to_owned(),
    };
    let source = pass.source;
    let not_one = |source| ModelError::Normalization { package: String::new(), source };
    let preparation = input.preparation().map_err(not_one)?;
    let dim = input.num_values();
    let moments = MomentAccumulator::new(dim).map_err(|error| ppca_error(source, 0, error))?;
    let mut lesson = Lesson { source, moments, golden: Vec::new(), num_rejected: 0 };
    let mut tensor = Vec::with_capacity(dim);
    let progress = context.progress("fit", source.num_rows());
    for partition in &source.partitions {
        for unit in &partition.units {
            let advance = |num_rows: usize, num_rejected: usize, lesson: &mut Lesson<'_>| {
                lesson.num_rejected += num_rejected;
                progress.advance(num_rows as u64, num_rejected as u64);
            };
            match &preparation {
                Preparation::Image(preparation) => pass.decode_unit(partition, unit, &preparation.pixels, |batch| {
                    let mut rejected = 0;
                    for (pixels, image) in batch.pixels.iter().zip(&batch.images) {
                        let (Ok(pixels), Some(image)) = (pixels, image) else {
                            rejected += 1;
                            continue;
                        };
                        tensor.clear();
                        preparation.push_tensor(&pixels.data, &mut tensor);
                        lesson.take(image, &tensor)?;
                    }
                    advance(batch.pixels.len(), rejected, &mut lesson);
                    Ok(())
                })?,
                Preparation::Features(normalizer) => pass.read_unit(partition, unit, |batch| {
                    let Cells::Features(rows) = batch.cells else {
                        let partition = partition.values.name();
                        return Err(PassError { partition, unit: unit.index, source: PassFault::OtherInput }.into());
                    };
                    let mut rejected = 0;
                    for row in &rows {
                        tensor.clear();
                        match row.as_ref().map(|row| (row, normalizer.push_tensor(row, &mut tensor))) {
                            Ok((row, Ok(()))) => lesson.take(&row.bytes, &tensor)?,
                            Ok((_, Err(_))) | Err(_) => rejected += 1,
                        }
                    }
                    advance(rows.len(), rejected, &mut lesson);
                    Ok(())
                })?,
            };
        }
    }
    progress.finish();
    let Lesson { mut moments, mut golden, num_rejected, .. } = lesson;
    let num_rows = moments.num_rows();
    if num_rows < MIN_IMAGES {
        let source_url = source.url().to_string();
        return Err(FitError::TooFewImages { num_rows, num_rejected, source_url }.into());
    }
    if standardize {
        (input.mean, input.std) = moments.standardize().into_iter().unzip();
        if let Preparation::Features(normalizer) = input.preparation().map_err(not_one)? {
            // Within n rows, nothing is further from the mean than the root of n deviations: all normalize.
            golden.retain_mut(|(bytes, tensor)| {
                tensor.clear();
                normalizer.push_tensor(&Tensor::flat(bytes.as_slice().into()), tensor).is_ok()
            });
        }
    }
    let latent_dim =
        latent_dim.unwrap_or_else(|| DEFAULT_LATENT_DIM.min(num_rows / MIN_IMAGES_PER_LATENT).min(dim - 1).max(1));
    let ppca = ppca::fit(moments, latent_dim).map_err(|error| ppca_error(source, num_rows, error))?;
    Ok(Learned { ppca, input, golden, num_rejected })
}

impl Learned {
    /// The contract and the files of the package.
    fn package(&self, name: &str, url: &str) -> Result<(Contract, BTreeMap<String, Bytes>), Error> {
        let ppca = &self.ppca;
        let shape = self.input.shape();
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
        let main = ppca.vae_onnx(&self.input.tensor, &shape).map_err(ppca_error)?;
        let decoder = ppca.decoder_onnx(&shape).map_err(ppca_error)?;
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
