//! The model package: an exported network together with the contract that says how to use it.
//!
//! A package is a folder in any store, immutable:
//!
//! ```text
//! model.toml       the contract: input, preprocessing, outputs, likelihood, files with their SHA-256
//! vae.onnx         image or features -> mu, logvar, reconstruction (or any network with an `embedding`, or a score of its own)
//! decoder.onnx     z -> reconstruction (optional; for sampling the latent space, or where vae.onnx does not reconstruct)
//! golden.parquet   a few images with the exact input tensors and outputs that the exporter saw
//! ```
//!
//! [`Model::load`] checks every hash, and replays the golden images on the provider in use: decoding, preprocessing and
//! inference must give here what they gave there, or the run does not start. Nothing outside this module knows any model.
//!
//! A network keeps the types, the batch and the names that its exporter gave it: the engine between ONNX Runtime and [`Session`] converts and
//! pads, and any tensor of the network may have a role. For a file that came without a contract, [`inspect`] proposes one.
//! [`provider`] says what computes, and sees to it that it does.
//!
//! A package may come from anywhere. All that it names lies in its own folder and is listed with its hash, weights beside the network
//! too; ONNX Runtime is given bytes and never a path. Numbers, shapes, opset and operators are checked before it sees them. What
//! is not done: a network that is all this and computes forever, or badly, is not found out.

mod assignment;
pub mod decoder;
mod engine;
pub mod input;
pub mod inspect;
pub mod onnx_proto;
pub mod package;
pub mod ppca;
pub mod provider;
pub mod runtime;
pub mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ort::session::builder::PrepackedWeights;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::config::Device;
pub use crate::decode::Layout;
use crate::decode::{self, Fit, NormalizeError, PixelSpec, Reject};
use crate::features::FeatureNormalizer;
use crate::score::Rule;
use crate::score::elbo::Sampler;
use crate::store::{Store, StoreError};
pub use decoder::Decoder;
use engine::Place;
pub use input::{ImageInput, ImagePreparation, Input, InputKind, Preparation};
use package::{Golden, GoldenImage};
pub use provider::{Compute, Provider};
pub use runtime::{Runtime, RuntimeError};
pub use session::{Latents, Session};

/// The contract's file in a package.
pub const CONTRACT_FILE: &str = "model.toml";

/// The version of the contract's format that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Largest difference between a golden input tensor and ours, in units of the tensor, unless the contract says otherwise: rounding
/// of float32 only. A package whose golden images are JPEG needs more, for decoders differ.
pub const DEFAULT_INPUT_TOLERANCE: f32 = 1e-5;

/// Largest difference between a golden output and ours, relative to 1 + |golden|, unless the contract says otherwise: what other
/// instruction sets and batch sizes make of float32 sums.
pub const DEFAULT_OUTPUT_TOLERANCE: f32 = 1e-3;

/// Values of one image's input tensor at most: 2^26, or 256 MiB.
pub const MAX_INPUT_VALUES: usize = 1 << 26;

/// Digits of a SHA-256 in hexadecimal.
const SHA256_DIGITS: usize = 64;

/// What a network's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The vector to search by.
    Embedding,
    /// Mean of the approximate posterior.
    Mu,
    /// Log-variance of the approximate posterior.
    Logvar,
    /// The model's picture of its input.
    Reconstruction,
    /// How strange the model itself finds the image, one number; higher = stranger.
    PredScore,
    /// How strange it finds each place of the image.
    AnomalyMap,
}

impl Role {
    /// All roles, in the order in which tables have them.
    pub const ALL: [Self; 6] =
        [Self::Embedding, Self::Mu, Self::Logvar, Self::Reconstruction, Self::PredScore, Self::AnomalyMap];

    /// The word for it in contracts and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Mu => "mu",
            Self::Logvar => "logvar",
            Self::Reconstruction => "reconstruction",
            Self::PredScore => "pred_score",
            Self::AnomalyMap => "anomaly_map",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `model.toml`: how a package is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// What people call the model.
    pub name: String,
    /// The networks.
    pub graph: Graph,
    /// From a row of the source to the input tensor.
    pub input: Input,
    /// Which output means what.
    pub outputs: Outputs,
    /// The model's p(x|z), without which there is no ELBO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub likelihood: Option<Likelihood>,
    /// The images to replay.
    pub golden: GoldenFile,
    /// SHA-256 of every other file of the package.
    pub files: BTreeMap<String, String>,
}

impl Contract {
    /// Whether the model gives what a role means.
    pub fn has(&self, role: Role) -> bool {
        self.outputs.name(role).is_some() || (role == Role::Reconstruction && self.decodes_to_reconstruct())
    }

    /// Whether the reconstruction is what the decoder makes of mu, since the main graph has none.
    pub fn decodes_to_reconstruct(&self) -> bool {
        self.graph.decoder.is_some() && self.outputs.mu.is_some() && self.outputs.reconstruction.is_none()
    }

    /// The roles that the model gives, in order.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(|role| self.has(*role))
    }

    /// Whether the model has the input and the outputs that a score needs.
    pub fn gives(&self, rule: Rule) -> bool {
        let has = |roles: &[Role]| roles.iter().all(|role| self.has(*role));
        match rule {
            Rule::MeanSquaredError | Rule::MeanAbsoluteError | Rule::Top1PctSquaredError => {
                has(&[Role::Reconstruction])
            }
            // Complexity is how much neighbors differ, and the values of a vector have none.
            Rule::ComplexityAdjustedError => has(&[Role::Reconstruction]) && self.input.image().is_some(),
            Rule::KlDivergence => has(&[Role::Mu, Role::Logvar]),
            Rule::NegativeElbo => has(&[Role::Mu, Role::Logvar, Role::Reconstruction]) && self.likelihood.is_some(),
            Rule::PredScore => has(&[Role::PredScore]) || has(&[Role::AnomalyMap]),
            // There is always a vector to search by, be it that of an encoder.
            Rule::MahalanobisDistance | Rule::KnnDistance | Rule::Fused => true,
        }
    }
}

/// The networks of a package, as file names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// From the image to all roles.
    pub main: String,
    /// From z to the mean of p(x|z), a tensor as the input is: one input `batch x latent_dim` and one output, whatever their
    /// names. Where the main graph has no `reconstruction`, this makes it of `mu`; otherwise it is loaded only by what needs it:
    /// sampling, and pictures of codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoder: Option<String>,
}

/// Names of the network's outputs, by role. A tensor within the network can be named too, and becomes an output.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outputs {
    /// The vector to search by; without it, `mu` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<String>,
    /// Mean of the approximate posterior.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mu: Option<String>,
    /// Log-variance of the approximate posterior.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logvar: Option<String>,
    /// The model's picture of its input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<String>,
    /// The model's own score, one number an image; higher = stranger. Of a model that has only a map, the score is the map's maximum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pred_score: Option<String>,
    /// Its score of each place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anomaly_map: Option<String>,
    /// Parts of the embedding that lie one after the other, of equal length, each of another region of the image; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<NonZeroUsize>,
}

impl Outputs {
    /// The output of a role.
    pub fn name(&self, role: Role) -> Option<&str> {
        match role {
            Role::Embedding => self.embedding.as_deref(),
            Role::Mu => self.mu.as_deref(),
            Role::Logvar => self.logvar.as_deref(),
            Role::Reconstruction => self.reconstruction.as_deref(),
            Role::PredScore => self.pred_score.as_deref(),
            Role::AnomalyMap => self.anomaly_map.as_deref(),
        }
    }

    /// Gives a role to an output.
    pub fn set(&mut self, role: Role, name: &str) {
        let place = match role {
            Role::Embedding => &mut self.embedding,
            Role::Mu => &mut self.mu,
            Role::Logvar => &mut self.logvar,
            Role::Reconstruction => &mut self.reconstruction,
            Role::PredScore => &mut self.pred_score,
            Role::AnomalyMap => &mut self.anomaly_map,
        };
        *place = Some(name.to_owned());
    }

    /// The roles there are, with their outputs.
    pub fn roles(&self) -> impl Iterator<Item = (Role, &str)> {
        Role::ALL.into_iter().filter_map(|role| self.name(role).map(|name| (role, name)))
    }
}

/// p(x|z) of one value of the input tensor, given the reconstruction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Likelihood {
    /// Normal around the reconstruction, with one standard deviation for all values.
    Gaussian {
        /// The standard deviation, in units of the tensor.
        sigma: f64,
    },
    /// The reconstruction is the probability of 1. The input must lie in [0, 1].
    Bernoulli,
}

/// The golden images and how near is near enough.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenFile {
    /// File name in the package.
    pub file: String,
    /// See [`DEFAULT_INPUT_TOLERANCE`].
    #[serde(default = "default_input_tolerance")]
    pub input_tolerance: f32,
    /// See [`DEFAULT_OUTPUT_TOLERANCE`].
    #[serde(default = "default_output_tolerance")]
    pub output_tolerance: f32,
}

fn default_input_tolerance() -> f32 {
    DEFAULT_INPUT_TOLERANCE
}

fn default_output_tolerance() -> f32 {
    DEFAULT_OUTPUT_TOLERANCE
}

/// A package that cannot be used, or a model that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// ONNX Runtime cannot be had.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// `model.toml` is not one.
    #[error("cannot read the contract {package}{CONTRACT_FILE}")]
    Contract {
        /// The package.
        package: String,
        /// What the parser found, with the line.
        source: toml::de::Error,
    },
    /// `model.toml` contradicts itself.
    #[error("{package}{CONTRACT_FILE}: `{key}` {reason}")]
    Invalid {
        /// The package.
        package: String,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Mean, std or scale are no normalization.
    #[error("[input] of {package}{CONTRACT_FILE} does not normalize")]
    Normalization {
        /// The package.
        package: String,
        /// Why.
        source: NormalizeError,
    },
    /// The source does not hold what the model takes.
    #[error("the model {package} takes {takes}, but the image column of {table} holds {holds}")]
    OtherInput {
        /// The package.
        package: String,
        /// What the model takes.
        takes: String,
        /// The source.
        table: String,
        /// What that holds.
        holds: String,
    },
    /// What is asked for is done with models that take the other kind of input.
    #[error("the model {package} takes {takes}, and {what} needs one that takes {wanted}")]
    OtherKind {
        /// The package.
        package: String,
        /// What the model takes.
        takes: &'static str,
        /// What is asked for.
        what: &'static str,
        /// What a model must take for that.
        wanted: &'static str,
    },
    /// The package is another one than the pipeline file pins.
    #[error("the model package {package} has sha256 {found}, but the pipeline file pins {pinned}")]
    Pin {
        /// The package.
        package: String,
        /// Its hash.
        found: String,
        /// The hash asked for.
        pinned: String,
    },
    /// A file has changed since the package was made.
    #[error("{package}{file} has sha256 {found}, but {CONTRACT_FILE} lists {expected}")]
    FileHash {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// Its hash.
        found: String,
        /// The hash listed.
        expected: String,
    },
    /// A file is used that the contract does not list with its hash.
    #[error("{package}{CONTRACT_FILE} does not list `{file}` under [files]")]
    NotListed {
        /// The package.
        package: String,
        /// The file.
        file: String,
    },
    /// A file is named that is not in the package.
    #[error("{package} names the file `{file}`, which is not within the package")]
    OutsidePackage {
        /// The package.
        package: String,
        /// The file.
        file: String,
    },
    /// A network is no ONNX file.
    #[error("{package}{file} is not an ONNX model")]
    NotOnnx {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// What the parser found.
        source: prost::DecodeError,
    },
    /// A network is not given to ONNX Runtime.
    #[error("{package}{file} cannot be used")]
    Unusable {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// Why.
        source: onnx_proto::GraphFault,
    },
    /// ONNX Runtime refuses the network.
    #[error("ONNX Runtime {version} cannot load {package}{file}, which is of opset {opset}")]
    Graph {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// The version of ONNX Runtime.
        version: String,
        /// The opset of the network.
        opset: i64,
        /// What it says.
        source: ort::Error,
    },
    /// A network that is none for pictures.
    #[error("no contract can be proposed for {file}: {reason}")]
    NoProposal {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// An output of an image is not a number.
    #[error("{package} gives numbers that are none (NaN or infinite) for image {image}: output {role}")]
    NotFinite {
        /// The package.
        package: String,
        /// Number of the image, from 0.
        image: usize,
        /// The role of the output.
        role: Role,
    },
    /// The network has no tensor of a name that the contract uses.
    #[error("the network of {package} has no {kind} `{name}`; it has {available}")]
    MissingTensor {
        /// The package.
        package: String,
        /// Input or output.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// What there is.
        available: String,
    },
    /// A tensor of the network is of another type or shape than the contract says.
    #[error("the {kind} `{name}` of {package} is {found}, and by {CONTRACT_FILE} it is {expected}")]
    TensorType {
        /// The package.
        package: String,
        /// Input or output.
        kind: &'static str,
        /// The tensor.
        name: String,
        /// What the network has.
        found: String,
        /// What the contract has.
        expected: String,
    },
    /// The network wants more than images.
    #[error("the network of {package} has inputs beside `{used}`: {others}")]
    MoreInputs {
        /// The package.
        package: String,
        /// The input that images go into.
        used: String,
        /// The others.
        others: String,
    },
    /// Nothing gives a vector.
    #[error("the model {package} gives no vector to search by, and there is no [encoder]")]
    NoVector {
        /// The package.
        package: String,
    },
    /// A GPU was asked for, and the CPU would do the work.
    #[error("device \"{}\" would leave work of {package} to the CPU: {operators}", provider.name())]
    LeftToCpu {
        /// The provider asked for.
        provider: Provider,
        /// The package.
        package: String,
        /// The operators that it does not compute.
        operators: String,
    },
    /// The device asked for cannot be used.
    #[error("device \"{}\" is not available with the ONNX Runtime at {}", provider.name(), library.display())]
    Provider {
        /// The provider asked for.
        provider: Provider,
        /// The library in use.
        library: std::path::PathBuf,
        /// What it says.
        source: ort::Error,
    },
    /// The golden file is unreadable.
    #[error("cannot read {package}{file}")]
    GoldenFile {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// Why.
        source: package::GoldenError,
    },
    /// A golden image does not decode, or a golden row is of another shape.
    #[error("golden image {image} of {package} cannot be used: {reject}")]
    GoldenImage {
        /// The package.
        package: String,
        /// Number of the image, from 0.
        image: usize,
        /// Why.
        reject: Reject,
    },
    /// Replaying a golden image gave something else, or the decoder another reconstruction.
    #[error(
        "golden image {image} of {package} does not replay: {what} differs by {difference:e} (tolerance {tolerance:e})"
    )]
    GoldenDiffers {
        /// The package.
        package: String,
        /// Number of the image, from 0.
        image: usize,
        /// The input tensor, or the role of an output.
        what: &'static str,
        /// The largest difference; NaN where an output is not a number.
        difference: f32,
        /// The largest one allowed.
        tolerance: f32,
    },
    /// Pictures of latents are asked for, and the package has nothing that makes them.
    #[error("{package} cannot make pictures of latents: its {CONTRACT_FILE} {reason}")]
    NoDecoder {
        /// The package.
        package: String,
        /// What is missing.
        reason: &'static str,
    },
    /// The ELBO is to be averaged over samples, and the package has not what that takes.
    #[error("elbo_samples needs {missing}, and {package}{CONTRACT_FILE} names none")]
    NoElbo {
        /// The package.
        package: String,
        /// What is missing.
        missing: &'static str,
    },
    /// The decoder has more or fewer tensors than one in and one out.
    #[error("{package}{file} must have one {kind}, and has {available}")]
    DecoderTensors {
        /// The package.
        package: String,
        /// The file.
        file: String,
        /// Input or output.
        kind: &'static str,
        /// What there is.
        available: String,
    },
    /// An output has a shape that does not fit its role.
    #[error("output `{name}` of {package} has shape {shape} for {batch} images, which does not fit the role {role}")]
    OutputShape {
        /// The package.
        package: String,
        /// The role.
        role: Role,
        /// The output.
        name: String,
        /// Its shape.
        shape: String,
        /// Images in the batch.
        batch: usize,
    },
    /// Inference failed.
    #[error("inference with {package} failed")]
    Inference {
        /// The package.
        package: String,
        /// What ONNX Runtime says.
        source: ort::Error,
    },
}

impl ModelError {
    /// What the user can do about it, where there is more to say than the message does.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Runtime(error) => error.hint(),
            Self::Provider { provider, .. } => Some(provider.remedy().to_owned()),
            Self::LeftToCpu { .. } => Some(
                "export the model in operators and types that the provider computes (32-bit or 16-bit floats), or set device = \"cpu\""
                    .to_owned(),
            ),
            Self::MissingTensor { .. } => Some(
                "check the names in model.toml; `lookalike model inspect` lists the tensors of a network, those within it too".to_owned(),
            ),
            Self::MoreInputs { .. } => {
                Some("export the model so that the picture is all it takes: bind the others to constants".to_owned())
            }
            Self::NotFinite { .. } => Some(
                "check scale, mean and std in [input]; a network in half precision overflows above 65504, and some exports divide by zero"
                    .to_owned(),
            ),
            Self::NoVector { .. } => Some(
                "name a package in [encoder], or a tensor within the network as `embedding` in [outputs] of model.toml; \
                 `lookalike model inspect` lists them"
                    .to_owned(),
            ),
            Self::GoldenDiffers { what: "input", .. } => Some(
                "the package's preprocessing is not what the exporter did: check [input] of model.toml".to_owned(),
            ),
            Self::GoldenDiffers { what: decoder::GOLDEN, .. } => Some(
                "export the decoder and the main graph from one network: of a golden image's mu, or of mu / (1 - e^logvar) where the \
                 posterior is that of a linear model, the decoder must make the reconstruction"
                    .to_owned(),
            ),
            Self::NoDecoder { .. } => Some(
                "a VAE exported with its decoder is needed, such as `lookalike fit` writes; an encoder alone cannot do it".to_owned(),
            ),
            Self::NoElbo { .. } => Some("take elbo_samples out of [model], or export the model with it".to_owned()),
            Self::Unusable { source, .. } => source.hint(),
            Self::OutsidePackage { .. } => Some(
                "a package holds its own files: name them relative to its folder, without `..`, and copy what is a link to elsewhere"
                    .to_owned(),
            ),
            Self::OtherInput { .. } => Some(
                "name the column in [source] image that the model was made for, or another model in [model] package".to_owned(),
            ),
            Self::OtherKind { takes: "features", .. } => Some(
                "of features, the tables have the errors, `explain` prints them, and `generate` makes rows".to_owned(),
            ),
            Self::TensorType { kind: "input", .. } => {
                Some("check height, width, color and layout in [input] of model.toml; `lookalike model inspect` proposes them".to_owned())
            }
            Self::FileHash { .. } => Some("the package was changed or copied incompletely; export it again".to_owned()),
            Self::Store(error) if error.is_not_found() => {
                Some("check [model] package in the pipeline file; `lookalike fit` makes one".to_owned())
            }
            _ => None,
        }
    }
}

/// A network of a package, read and checked: what sessions are built from.
#[derive(Debug)]
struct Network {
    file: String,
    bytes: Bytes,
    opset: i64,
    /// Weights stored beside the network, by the name that the network uses.
    external_data: Vec<(String, Arc<[u8]>)>,
}

/// A model, loaded and proven on its golden images.
#[derive(Debug)]
pub struct Model {
    /// How it is used.
    pub contract: Contract,
    /// SHA-256 of the contract, which lists the hashes of all other files: it stands for the whole package.
    pub sha256: String,
    /// What computes.
    pub provider: Provider,
    /// The runtime that computes.
    pub runtime: Runtime,
    /// Another model, whose embedding takes the place of this one's.
    pub encoder: Option<Box<Self>>,
    /// Length of this model's own embedding.
    pub embedding_dim: usize,
    /// Length of `mu` and `logvar`, for a model that has them.
    pub latent_dim: Option<usize>,
    /// What averages the negative ELBO over samples, where [`Model::sample_elbo`] was asked for it.
    pub elbo: Option<Sampler>,
    /// What makes input tensors.
    pub preparation: Preparation,
    package: String,
    compute: Compute,
    sessions: Vec<Mutex<Session>>,
}

impl Model {
    /// Loads the package in `store`. `pin` is the package hash that the pipeline file asks for, if it does.
    pub async fn load(
        store: &Store,
        pin: Option<&str>,
        runtime: Runtime,
        compute: &Compute,
    ) -> Result<Self, ModelError> {
        let package = store.url().to_string();
        let (contract, sha256) = read_contract(store).await?;
        if let Some(pinned) = pin.filter(|pin| *pin != sha256) {
            return Err(ModelError::Pin { package, found: sha256, pinned: pinned.to_owned() });
        }
        let (main, decoder) = read_networks(store, &contract).await?;
        let golden = read_golden(store, &contract).await?;
        let (provider, sessions) = build_sessions(&runtime, compute, &contract, &package, (&main, decoder.as_ref()))?;
        let preparation = contract.preparation(&package)?;
        let mut model = Self {
            preparation,
            contract,
            sha256,
            provider,
            runtime,
            compute: *compute,
            encoder: None,
            embedding_dim: 0,
            latent_dim: None,
            elbo: None,
            package,
            sessions,
        };
        model.replay(&golden)?;
        Ok(model)
    }

    /// Refuses a model without a vector, unless an encoder gives it one.
    pub fn check_vector(&self) -> Result<(), ModelError> {
        if self.encoder.is_none() && self.embedding_dim == 0 {
            return Err(ModelError::NoVector { package: self.package.clone() });
        }
        Ok(())
    }

    /// This one, and the encoder beside it if there is one.
    pub fn with_encoder(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.encoder.as_deref())
    }

    /// The pixels that each of these takes of an image, as far as they take images.
    pub fn pixel_specs(&self) -> Vec<PixelSpec> {
        let spec = |model: &Self| match &model.preparation {
            Preparation::Image(preparation) => Some(preparation.pixels.clone()),
            Preparation::Features(_) => None,
        };
        self.with_encoder().filter_map(spec).collect()
    }

    /// The session for one of the threads; on a GPU the threads share a few and wait for them.
    pub fn session(&self, thread: usize) -> MutexGuard<'_, Session> {
        self.sessions[thread % self.sessions.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What makes input tensors of images. An error for a model of features, which says that `what` needs images.
    pub fn of_images(&self, what: &'static str) -> Result<&ImagePreparation, ModelError> {
        match &self.preparation {
            Preparation::Image(image) => Ok(image),
            Preparation::Features(_) => {
                Err(ModelError::OtherKind { package: self.package.clone(), takes: "features", what, wanted: "images" })
            }
        }
    }

    /// What makes input tensors of features. An error for a model of images, which says that `what` needs features.
    pub fn of_features(&self, what: &'static str) -> Result<&FeatureNormalizer, ModelError> {
        match &self.preparation {
            Preparation::Features(normalizer) => Ok(normalizer),
            Preparation::Image(_) => {
                Err(ModelError::OtherKind { package: self.package.clone(), takes: "images", what, wanted: "features" })
            }
        }
    }

    /// Whether the vectors to search by are others than `mu`.
    pub fn has_embedding(&self) -> bool {
        self.encoder.is_some() || self.contract.outputs.embedding.is_some()
    }

    /// Loads the package's decoder, for as many threads as the model, and proves it on the golden images. `store` is the package, as
    /// [`Model::load`] had it.
    pub async fn decoder(&self, store: &Store) -> Result<Decoder, ModelError> {
        let contract = &self.contract;
        let package = &self.package;
        let no_decoder = |reason| ModelError::NoDecoder { package: package.clone(), reason };
        let file = contract.graph.decoder.as_ref().ok_or_else(|| no_decoder("names no [graph] decoder"))?;
        let latent_dim = self.latent_dim.ok_or_else(|| no_decoder("names no output `mu`"))?;
        let network = read_network(store, contract, file).await?;
        let golden = read_golden(store, contract).await?;
        let place = Place { runtime: &self.runtime, provider: self.provider, compute: &self.compute, package };
        let decoder = Decoder::open(place, &network, latent_dim, contract.input.num_values())?;
        decoder.replay(&golden, contract.golden.output_tolerance)?;
        Ok(decoder)
    }

    /// Has the negative ELBO averaged over samples from here on; with no samples, it stays at mu. `store` is the package, as
    /// [`Model::load`] had it.
    pub async fn sample_elbo(&mut self, store: &Store, num_samples: usize) -> Result<(), ModelError> {
        if let Some(likelihood) = self.contract.sampled_likelihood(&self.package, num_samples)? {
            let decoder = self.decoder(store).await?;
            self.elbo = Some(Sampler { decoder, likelihood, num_samples });
        }
        Ok(())
    }

    /// Decodes, preprocesses and runs each golden image, and compares all of it with what the exporter saw. Learns the lengths of
    /// the vectors on the way.
    fn replay(&mut self, golden: &Golden) -> Result<(), ModelError> {
        let tolerances = &self.contract.golden;
        let package = &self.package;
        let mut tensor = Vec::with_capacity(self.contract.input.num_values());
        let mut dims = (0, None);
        for (image, expected) in golden.images.iter().enumerate() {
            tensor.clear();
            let prepared = self.preparation.push_content(&expected.image, &mut tensor);
            prepared.map_err(|reject| ModelError::GoldenImage { package: package.clone(), image, reject })?;
            let differs = |what, difference, tolerance| ModelError::GoldenDiffers {
                package: package.clone(),
                image,
                what,
                difference,
                tolerance,
            };
            let difference = max_difference(&tensor, &expected.input, |_| 1.0);
            if difference.is_nan() || difference > tolerances.input_tolerance {
                return Err(differs("input", difference, tolerances.input_tolerance));
            }
            self.session(0).run(&expected.input, 1, |latents| {
                for (role, expected) in &expected.outputs {
                    let found = latents.of(*role).unwrap_or_default();
                    let difference = max_difference(found, expected, |golden| 1.0 + golden.abs());
                    if difference.is_nan() || difference > tolerances.output_tolerance {
                        return Err(differs(role.name(), difference, tolerances.output_tolerance));
                    }
                }
                dims = (latents.embedding.len(), latents.mu.map(<[f32]>::len));
                Ok(())
            })??;
        }
        (self.embedding_dim, self.latent_dim) = dims;
        let regions = self.contract.outputs.regions.map_or(1, NonZeroUsize::get);
        if !self.embedding_dim.is_multiple_of(regions) {
            return Err(ModelError::Invalid {
                package: self.package.clone(),
                key: "outputs.regions",
                reason: format!(
                    "is {regions}, which does not divide the {} values of the embedding",
                    self.embedding_dim
                ),
            });
        }
        Ok(())
    }
}

/// What a network makes of images here, on the CPU: the golden images of a package that is made of somebody else's file. `store` has the
/// files that the contract lists. Fails where an image does not decode or an output is not a number.
pub async fn observe(
    store: &Store,
    contract: &Contract,
    runtime: &Runtime,
    images: Vec<Vec<u8>>,
) -> Result<Golden, ModelError> {
    let package = store.url().to_string();
    let (main, decoder) = read_networks(store, contract).await?;
    let compute = Compute::on(Device::Cpu, 1);
    let (_, sessions) = build_sessions(runtime, &compute, contract, &package, (&main, decoder.as_ref()))?;
    let preparation = contract.preparation(&package)?;
    let mut golden = Golden { images: Vec::new() };
    for (number, image) in images.into_iter().enumerate() {
        let mut tensor = Vec::with_capacity(contract.input.num_values());
        preparation.push_content(&image, &mut tensor).map_err(|reject| ModelError::GoldenImage {
            package: package.clone(),
            image: number,
            reject,
        })?;
        let mut session = sessions[0].lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = session.run(&tensor, 1, |latents| {
            contract.roles().map(|role| (role, latents.of(role).unwrap_or_default().to_vec())).collect::<Vec<_>>()
        })?;
        if let Some((role, _)) = outputs.iter().find(|(_, values)| !values.iter().all(|value| value.is_finite())) {
            return Err(ModelError::NotFinite { package, image: number, role: *role });
        }
        golden.images.push(GoldenImage { image, input: tensor, outputs });
    }
    Ok(golden)
}

/// Largest difference between two tensors, each divided by `scale` of the golden value; NaN where the lengths differ or a value
/// is not a number.
fn max_difference(found: &[f32], golden: &[f32], scale: impl Fn(f32) -> f32) -> f32 {
    if found.len() != golden.len() {
        return f32::NAN;
    }
    found.iter().zip(golden).fold(0.0, |largest: f32, (found, golden)| {
        let difference = (found - golden).abs() / scale(*golden);
        if difference.is_nan() || largest.is_nan() { f32::NAN } else { largest.max(difference) }
    })
}

/// Builds the sessions on the device asked for; `auto` takes CUDA where it works and says so.
fn build_sessions(
    runtime: &Runtime,
    compute: &Compute,
    contract: &Contract,
    package: &str,
    (main, decoder): (&Network, Option<&Network>),
) -> Result<(Provider, Vec<Mutex<Session>>), ModelError> {
    let (main_weights, decoder_weights) = (PrepackedWeights::new(), PrepackedWeights::new());
    let build = |provider| {
        let place = Place { runtime, provider, compute, package };
        let decoder = || decoder.map(|network| (network, &decoder_weights));
        let sessions = (0..compute.num_sessions(provider))
            .map(|_| Session::build(place, contract, (main, &main_weights), decoder()).map(Mutex::new));
        Ok((provider, sessions.collect::<Result<Vec<_>, _>>()?))
    };
    match Provider::of(compute.device) {
        Some(provider) => build(provider),
        None => match build(Provider::Cuda) {
            Err(error @ (ModelError::Provider { .. } | ModelError::LeftToCpu { .. })) => {
                let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                tracing::info!(reason, "device \"auto\": no CUDA, so the CPU computes");
                build(Provider::Cpu)
            }
            built => built,
        },
    }
}

impl Contract {
    /// Reads the text of a `model.toml` and checks all that can be checked without the other files. `package` is what errors call the
    /// package.
    pub fn parse(package: &str, text: &[u8]) -> Result<Self, ModelError> {
        let contract: Self =
            toml::from_slice(text).map_err(|source| ModelError::Contract { package: package.to_owned(), source })?;
        let invalid = |key, reason: String| ModelError::Invalid { package: package.to_owned(), key, reason };
        if contract.format_version != FORMAT_VERSION {
            return Err(invalid(
                "format_version",
                format!("is {}, but this program reads {FORMAT_VERSION}", contract.format_version),
            ));
        }
        let input = &contract.input;
        let (size, row) = match &input.kind {
            InputKind::Image(_) => ("input.height and width", "an image"),
            InputKind::Features { .. } => ("input.shape", "a row"),
        };
        let num_values = input.num_values();
        if num_values == 0 {
            return Err(invalid(size, "must be at least 1".to_owned()));
        }
        if num_values > MAX_INPUT_VALUES {
            return Err(invalid(size, format!("make {num_values} values, and {row} may have {MAX_INPUT_VALUES}")));
        }
        if let Some(ImageInput { pixels, .. }) = input.image()
            && let Some(resize) = pixels.resize
            && (pixels.fit != Fit::Crop || resize < pixels.height.max(pixels.width) || resize > decode::MAX_SIDE)
        {
            let reason = format!(
                "is {resize}: it goes with fit = \"crop\" alone, and lies between the longer side of the tensor and {}",
                decode::MAX_SIDE
            );
            return Err(invalid("input.resize", reason));
        }
        contract.preparation(package)?;
        if contract.outputs.roles().all(|(role, _)| matches!(role, Role::Logvar | Role::Reconstruction)) {
            return Err(invalid(
                "outputs",
                "needs `embedding` or `mu`, the vector to search by, or a `pred_score` or `anomaly_map` to judge by"
                    .to_owned(),
            ));
        }
        if let Some(Likelihood::Gaussian { sigma }) = contract.likelihood
            && !(sigma.is_finite() && sigma > 0.0)
        {
            return Err(invalid("likelihood.sigma", "must be above 0".to_owned()));
        }
        let golden = &contract.golden;
        // With a tolerance that is not a number, all golden images would replay.
        for (key, tolerance) in
            [("golden.input_tolerance", golden.input_tolerance), ("golden.output_tolerance", golden.output_tolerance)]
        {
            if !(tolerance.is_finite() && tolerance >= 0.0) {
                return Err(invalid(key, format!("is {tolerance}, and must be a finite number, 0 or above")));
            }
        }
        if let Some(file) = contract.files.keys().find(|file| !package::is_file_name(file)) {
            return Err(ModelError::OutsidePackage { package: package.to_owned(), file: file.clone() });
        }
        let is_sha256 = |text: &&String| {
            text.len() == SHA256_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        if let Some(text) = contract.files.values().find(|text| !is_sha256(text)) {
            let reason =
                format!("lists `{text}`, which is no SHA-256 of {SHA256_DIGITS} lower case hexadecimal digits");
            return Err(invalid("files", reason));
        }
        let named = [Some(&contract.graph.main), contract.graph.decoder.as_ref(), Some(&contract.golden.file)];
        for file in named.into_iter().flatten() {
            contract.sha256_of(package, file)?;
        }
        Ok(contract)
    }

    /// What makes input tensors. `package` is what errors call the package.
    pub fn preparation(&self, package: &str) -> Result<Preparation, ModelError> {
        let not_one = |source| ModelError::Normalization { package: package.to_owned(), source };
        self.input.preparation().map_err(not_one)
    }

    /// The likelihood to average over so many samples of z, `None` for no samples; an error where the model cannot be sampled.
    pub fn sampled_likelihood(&self, package: &str, num_samples: usize) -> Result<Option<Likelihood>, ModelError> {
        if num_samples == 0 {
            return Ok(None);
        }
        let missing = |missing| ModelError::NoElbo { package: package.to_owned(), missing };
        if self.graph.decoder.is_none() {
            return Err(missing("a [graph] decoder"));
        }
        for (role, name) in [
            (Role::Mu, "an output `mu`"),
            (Role::Logvar, "an output `logvar`"),
            (Role::Reconstruction, "an output `reconstruction`"),
        ] {
            if !self.has(role) {
                return Err(missing(name));
            }
        }
        self.likelihood.map(Some).ok_or_else(|| missing("a [likelihood]"))
    }

    /// The hash listed for a file.
    fn sha256_of(&self, package: &str, file: &str) -> Result<&str, ModelError> {
        if !package::is_file_name(file) {
            return Err(ModelError::OutsidePackage { package: package.to_owned(), file: file.to_owned() });
        }
        let listed = self.files.get(file).map(String::as_str);
        listed.ok_or_else(|| ModelError::NotListed { package: package.to_owned(), file: file.to_owned() })
    }
}

/// Reads and checks `model.toml`; returns it with the hash that stands for the package.
pub async fn read_contract(store: &Store) -> Result<(Contract, String), ModelError> {
    let bytes = get(store, CONTRACT_FILE).await?;
    let contract = Contract::parse(store.url().as_str(), &bytes)?;
    Ok((contract, crate::hash::sha256(&bytes)))
}

/// Reads the networks that make the rows: the main graph, and the decoder where that is what reconstructs.
async fn read_networks(store: &Store, contract: &Contract) -> Result<(Network, Option<Network>), ModelError> {
    let main = read_network(store, contract, &contract.graph.main).await?;
    let decoder = match contract.graph.decoder.as_ref().filter(|_| contract.decodes_to_reconstruct()) {
        Some(file) => Some(read_network(store, contract, file).await?),
        None => None,
    };
    Ok((main, decoder))
}

/// Reads a network of the package with its weights, and checks what can be checked before ONNX Runtime sees it.
async fn read_network(store: &Store, contract: &Contract, file: &str) -> Result<Network, ModelError> {
    let read = async |name: &str| read_file(store, contract, name).await;
    let (mut network, proto) = Network::read(store.url().as_str(), file, read).await?;
    if file == contract.graph.main {
        // Tensors within the network that have a role become outputs.
        let within: Vec<&str> =
            contract.outputs.roles().map(|(_, name)| name).filter(|name| onnx_proto::is_within(&proto, name)).collect();
        network.bytes = onnx_proto::with_outputs(network.bytes, &within);
    }
    Ok(network)
}

impl Network {
    /// Reads a network of `folder` and the weights beside it by `read`, and checks what can be checked before ONNX Runtime sees it.
    async fn read(
        folder: &str,
        file: &str,
        read: impl AsyncFn(&str) -> Result<Bytes, ModelError>,
    ) -> Result<(Self, onnx_proto::ModelProto), ModelError> {
        let (package, file) = (folder.to_owned(), file.to_owned());
        let bytes = read(&file).await?;
        let proto = match onnx_proto::ModelProto::decode(bytes.clone()) {
            Ok(proto) => proto,
            Err(source) => return Err(ModelError::NotOnnx { package, file, source }),
        };
        if let Err(source) = onnx_proto::check(&proto) {
            return Err(ModelError::Unusable { package, file, source });
        }
        let mut external_data = Vec::new();
        for name in onnx_proto::external_data_locations(&proto) {
            let weights = read(&name).await?;
            external_data.push((name, Arc::from(&*weights)));
        }
        let opset = onnx_proto::opset(&proto).unwrap_or_default();
        Ok((Self { file, bytes, opset, external_data }, proto))
    }
}

/// Reads the golden images of the package.
/// The golden rows of a package.
pub async fn read_golden(store: &Store, contract: &Contract) -> Result<Golden, ModelError> {
    let file = &contract.golden.file;
    let bytes = read_file(store, contract, file).await?;
    let roles: Vec<Role> = contract.roles().collect();
    Golden::read(bytes, contract.input.num_values(), &roles).map_err(|source| ModelError::GoldenFile {
        package: store.url().to_string(),
        file: file.clone(),
        source,
    })
}

/// Reads a file of the package, if it lies within.
async fn get(store: &Store, file: &str) -> Result<Bytes, ModelError> {
    if package::is_link_out_of(store, file) {
        return Err(ModelError::OutsidePackage { package: store.url().to_string(), file: file.to_owned() });
    }
    Ok(store.get(file).await?)
}

/// Reads a file of the package and checks its hash.
async fn read_file(store: &Store, contract: &Contract, file: &str) -> Result<Bytes, ModelError> {
    let package = store.url().to_string();
    let expected = contract.sha256_of(&package, file)?;
    let bytes = get(store, file).await?;
    let found = crate::hash::sha256(&bytes);
    if found == expected {
        Ok(bytes)
    } else {
        Err(ModelError::FileHash { package, file: file.to_owned(), found, expected: expected.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A contract that can be used, for one value to be changed in.
    const CONTRACT: &str = r#"
format_version = 1
name = "cells"
[graph]
main = "vae.onnx"
[input]
tensor = "image"
height = 8
width = 8
color = "gray"
layout = "nchw"
filter = "bilinear"
fit = "stretch"
scale = 0.5
mean = [0.0]
std = [1.0]
[outputs]
mu = "mu"
[likelihood]
kind = "gaussian"
sigma = 0.25
[golden]
file = "golden.parquet"
input_tolerance = 0.001
[files]
"vae.onnx" = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"golden.parquet" = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"#;

    #[test]
    fn a_contract_of_features_is_checked_as_one_of_images_is() {
        let image =
            "height = 8\nwidth = 8\ncolor = \"gray\"\nlayout = \"nchw\"\nfilter = \"bilinear\"\nfit = \"stretch\"\n";
        let contract = CONTRACT.replace(image, "kind = \"features\"\nshape = [2, 3]\n");
        assert!(!Contract::parse("models/", contract.as_bytes()).unwrap().gives(Rule::ComplexityAdjustedError));
        let each = contract.replace("mean = [0.0]", "mean = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]");
        Contract::parse("models/", each.as_bytes()).unwrap();
        for (written, instead, expected) in [
            ("[2, 3]", "[2, 0]", "`input.shape` must be at least 1"),
            ("[2, 3]", "[65536, 65536, 65536, 65536]", "`input.shape` make"),
            ("[2, 3]", "[4294967296]", "4294967296"),
            ("mean = [0.0]", "mean = [0.0, 0.0]", "mean has 2 numbers and a row has 6"),
            ("std = [1.0]", "std = [0.0]", "std has the value 0"),
            ("scale = 0.5", "scale = inf", "scale has the value inf"),
        ] {
            let error = Contract::parse("models/", contract.replacen(written, instead, 1).as_bytes()).unwrap_err();
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            assert!(format!("{error}: {cause}").contains(expected), "{instead}: {error}: {cause}");
        }
    }

    #[test]
    fn a_contract_with_a_value_that_makes_no_sense_is_refused_by_its_key() {
        Contract::parse("models/", CONTRACT.as_bytes()).unwrap();
        for (written, instead, expected) in [
            ("height = 8", "height = 4294967295", "input.height and width"),
            ("height = 8", "height = 4294967296", "4294967296"),
            ("height = 8", "height = -1", "-1"),
            ("height = 8", "height = 0", "input.height and width"),
            ("height = 8", "height = 99999999999999999999", "line 8"),
            ("height = 8", "height = \"8\"", "line 8"),
            ("width = 8", "width = 2097152\nexif_rotation = 1", "line 10"),
            ("fit = \"stretch\"", "fit = \"stretch\"\nresize = 10", "input.resize"),
            ("fit = \"stretch\"", "fit = \"crop\"\nresize = 7", "input.resize"),
            ("scale = 0.5", "scale = nan", "scale has the value NaN"),
            ("scale = 0.5", "scale = 1e300", "scale has the value inf"),
            ("mean = [0.0]", "mean = []", "mean has 0 numbers"),
            ("mean = [0.0]", "mean = [0.0, 0.0]", "mean has 2 numbers"),
            ("std = [1.0]", "std = [0.0]", "std has the value 0"),
            ("std = [1.0]", "std = [-inf]", "std has the value -inf"),
            ("sigma = 0.25", "sigma = nan", "likelihood.sigma"),
            ("sigma = 0.25", "sigma = -1.0", "likelihood.sigma"),
            ("mu = \"mu\"", "", "needs `embedding` or `mu`"),
            ("mu = \"mu\"", "reconstruction = \"r\"", "needs `embedding` or `mu`"),
            ("input_tolerance = 0.001", "input_tolerance = nan", "golden.input_tolerance"),
            ("input_tolerance = 0.001", "output_tolerance = inf", "golden.output_tolerance"),
            ("input_tolerance = 0.001", "output_tolerance = -1.0", "golden.output_tolerance"),
            ("format_version = 1", "format_version = 2", "format_version"),
            ("main = \"vae.onnx\"", "main = \"../vae.onnx\"", "names the file `../vae.onnx`, which is not within"),
            ("main = \"vae.onnx\"", "main = \"/etc/vae.onnx\"", "names the file `/etc/vae.onnx`, which is not within"),
            ("main = \"vae.onnx\"", "main = \"other.onnx\"", "does not list `other.onnx`"),
            ("main = \"vae.onnx\"", "main = \"vae.onnx\"\ndecoder = \"d.onnx\"", "does not list `d.onnx`"),
            ("file = \"golden.parquet\"", "file = \"..\"", "names the file `..`, which is not within"),
            ("\"vae.onnx\" = \"e3", "\"../vae.onnx\" = \"e3", "names the file `../vae.onnx`, which is not within"),
            ("\"vae.onnx\" = \"e3", "\"vae.onnx\" = \"E3", "no SHA-256"),
            ("\"vae.onnx\" = \"e3", "\"vae.onnx\" = \"", "no SHA-256"),
        ] {
            assert!(CONTRACT.contains(written), "{written}");
            let text = CONTRACT.replacen(written, instead, 1);
            let error = Contract::parse("models/", text.as_bytes()).unwrap_err();
            let mut words = error.to_string();
            if let Some(cause) = std::error::Error::source(&error) {
                words = format!("{words}: {cause}");
            }
            assert!(words.contains(expected), "{instead}: {words}");
        }
    }
}
