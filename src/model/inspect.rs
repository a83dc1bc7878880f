//! A network that came without a contract: what is in it, and a contract proposed for it.
//!
//! An ONNX file names its tensors and their shapes. It says nothing of how pictures were resized and normalized, nor what its outputs
//! mean. Names and shapes tell a lot of that, and families of exports have their habits ([`Preset`]); what is guessed is said to be.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use ort::session::builder::PrepackedWeights;
use ort::value::{Outlet, ValueType};
use serde::Serialize;

use super::engine::{Place, build};
use super::{
    Compute, Contract, DEFAULT_INPUT_TOLERANCE, DEFAULT_OUTPUT_TOLERANCE, FORMAT_VERSION, GoldenFile, Graph,
    ImageInput, Input, InputKind, ModelError, Network, Outputs, Provider, Role, Runtime, get, onnx_proto, package,
};
use crate::config::Device;
use crate::decode::{Color, Filter, Fit, Layout, PixelSpec};
use crate::store::Store;

/// Name of the golden file of the packages that are made here.
const GOLDEN_FILE: &str = "golden.parquet";

/// Nodes at the end of a graph among whose outputs vectors are looked for.
const LAST_NODES: usize = 200;

/// Vectors within the network that are told at most.
const MAX_WITHIN: usize = 8;

/// Side of the picture where neither the network nor its family says it.
const DEFAULT_SIDE: u32 = 224;

/// Side of what anomalib's models take, unless told otherwise.
const ANOMALIB_SIDE: u32 = 256;

/// Tolerance of outputs in half precision, which has ten bits of mantissa; sums are rounded in another order elsewhere.
const HALF_TOLERANCE: f32 = 2e-2;

/// Tolerance of outputs of integer arithmetic: a value that falls to the other side of a step is a step off, and processors without
/// 8-bit dot products saturate sums in between.
const INT8_TOLERANCE: f32 = 1e-1;

/// Mean and standard deviation of the pixels of ImageNet, by channel, as torchvision has them.
const IMAGENET: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// Those that CLIP was trained with.
const CLIP: ([f32; 3], [f32; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);

/// Families of exports, each with its own habits in preparing pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Pixels from 0 to 1, the picture stretched: autoencoders and whatever is not known better.
    Plain,
    /// Encoders trained on ImageNet, such as those of torchvision, timm and DINOv2: bicubic, shorter side 256 of 224, center, mean and
    /// standard deviation of ImageNet.
    Imagenet,
    /// CLIP and its relatives: bicubic, center, mean and standard deviation of their own.
    Clip,
    /// Exports of anomalib 2, which normalize within the network: pixels from 0 to 1, stretched.
    Anomalib,
    /// Keras: channels last, pixels from 0 to 1.
    Keras,
}

impl Preset {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Imagenet => "imagenet",
            Self::Clip => "clip",
            Self::Anomalib => "anomalib",
            Self::Keras => "keras",
        }
    }
}

/// A tensor, as the network describes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Type of its values, such as `f32`.
    pub element: String,
    /// Its axes; -1 for one that is left open.
    pub shape: Vec<i64>,
}

impl TensorInfo {
    fn of(outlet: &Outlet) -> Self {
        let (element, shape) = match outlet.dtype() {
            ValueType::Tensor { ty, shape, .. } => (ty.to_string(), shape.to_vec()),
            other => (other.to_string(), Vec::new()),
        };
        Self { name: outlet.name().to_owned(), element, shape }
    }

    /// Values for each row of a batch, where the axes say it.
    fn row_values(&self) -> Option<usize> {
        let [_, axes @ ..] = &self.shape[..] else { return None };
        axes.iter().map(|axis| usize::try_from(*axis).ok()).product()
    }

    /// In words, such as `image f32 n x 3 x 224 x 224`.
    pub fn told(&self) -> String {
        let axis = |(place, axis): (usize, &i64)| match (place, *axis) {
            (0, ..0) => "n".to_owned(),
            (_, ..0) => "?".to_owned(),
            (_, axis) => axis.to_string(),
        };
        let axes: Vec<String> = self.shape.iter().enumerate().map(axis).collect();
        format!("{} {} {}", self.name, self.element, axes.join(" x "))
    }
}

/// What is in a network.
#[derive(Debug, Serialize)]
pub struct Inspected {
    /// The file's name.
    pub file: String,
    /// Bytes of the file and of the weights beside it.
    pub num_bytes: usize,
    /// Version of the file format.
    pub ir_version: i64,
    /// Version of ONNX's own operators.
    pub opset: i64,
    /// The program that wrote it, with its version.
    pub producer: String,
    /// Free key-value pairs.
    pub metadata: BTreeMap<String, String>,
    /// Operators, and how often each occurs.
    pub operators: BTreeMap<String, usize>,
    /// Whether there are weights in half precision.
    pub has_half_weights: bool,
    /// What goes in.
    pub inputs: Vec<TensorInfo>,
    /// What comes out.
    pub outputs: Vec<TensorInfo>,
    /// Tensors within the network that are a vector for each image, the last ones, in order.
    pub within: Vec<TensorInfo>,
    /// The files: the network, and weights beside it.
    #[serde(skip)]
    pub files: BTreeMap<String, Bytes>,
}

/// Reads a network in a folder, and has ONNX Runtime say what its tensors are.
pub async fn inspect(store: &Store, file: &str, runtime: &Runtime) -> Result<Inspected, ModelError> {
    let folder = store.url().to_string();
    let read = async |name: &str| {
        if name != file && !package::is_file_name(name) {
            return Err(ModelError::OutsidePackage { package: folder.clone(), file: name.to_owned() });
        }
        get(store, name).await
    };
    let (mut network, proto) = Network::read(&folder, file, read).await?;
    let weights =
        network.external_data.iter().map(|(name, bytes)| (name.clone(), Bytes::from_owner(Arc::clone(bytes))));
    let files: BTreeMap<String, Bytes> = weights.chain([(file.to_owned(), network.bytes.clone())]).collect();
    let compute = Compute::on(Device::Cpu, 1);
    let place = Place { runtime, provider: Provider::Cpu, compute: &compute, package: &folder };
    let told = |outlets: &[Outlet]| outlets.iter().map(TensorInfo::of).collect::<Vec<_>>();
    let session = build(place, &network, &PrepackedWeights::new())?;
    let (inputs, outputs) = (told(session.inputs()), told(session.outputs()));
    let graph = proto.graph.unwrap_or_default();
    let late = graph.node.iter().rev().take(LAST_NODES).flat_map(|node| &node.output);
    let mut late: Vec<&str> = late
        .map(String::as_str)
        .filter(|name| !name.is_empty() && graph.output.iter().all(|output| output.name != *name))
        .collect();
    late.reverse();
    // What lies within has a shape once it is an output. Where that does not go, it is not told.
    network.bytes = onnx_proto::with_outputs(network.bytes, &late);
    let mut within =
        build(place, &network, &PrepackedWeights::new()).map(|session| told(session.outputs())).unwrap_or_default();
    within.retain(|tensor| {
        let axes = tensor.shape.get(1..).unwrap_or_default();
        late.contains(&tensor.name.as_str()) && axes.first() > Some(&1) && axes.iter().skip(1).all(|axis| *axis == 1)
    });
    within.drain(..within.len().saturating_sub(MAX_WITHIN));
    let mut operators = BTreeMap::new();
    for node in &graph.node {
        *operators.entry(node.op_type.clone()).or_default() += 1;
    }
    Ok(Inspected {
        file: file.to_owned(),
        num_bytes: files.values().map(Bytes::len).sum(),
        ir_version: proto.ir_version,
        opset: network.opset,
        producer: format!("{} {}", proto.producer_name, proto.producer_version).trim().to_owned(),
        metadata: proto.metadata_props.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect(),
        operators,
        has_half_weights: graph.initializer.iter().any(|tensor| tensor.data_type() == onnx_proto::DataType::Float16),
        inputs,
        outputs,
        within,
        files,
    })
}

/// A contract for a network, and what in it is a guess, in words.
#[derive(Debug)]
pub struct Proposal {
    /// The contract; without the hashes of files.
    pub contract: Contract,
    /// The family that it follows.
    pub preset: Preset,
    /// What should be checked.
    pub guesses: Vec<String>,
}

/// Words by which outputs are known, in lower case and without `_`, by role.
const NAMES: [(Role, &[&str]); 6] = [
    (
        Role::Embedding,
        &["embedding", "embeddings", "imageembeds", "imageembedding", "pooleroutput", "features", "feature"],
    ),
    (Role::Mu, &["mu", "mean", "zmean", "zmu", "latent", "latents", "code", "z"]),
    (Role::Logvar, &["logvar", "zlogvar", "logvariance"]),
    (Role::Reconstruction, &["reconstruction", "recon", "reconstructed", "decoded", "xhat", "rec"]),
    (Role::PredScore, &["predscore", "anomalyscore", "score"]),
    (Role::AnomalyMap, &["anomalymap", "scoremap", "heatmap"]),
];

/// Proposes a contract. `decoder` is a second network of the package, from latents to pictures.
pub fn propose(
    main: &Inspected,
    decoder: Option<&Inspected>,
    preset: Option<Preset>,
    folder: &str,
) -> Result<Proposal, ModelError> {
    let mut guesses = Vec::new();
    let refused = |reason: String| ModelError::NoProposal { file: format!("{folder}{}", main.file), reason };
    let tensor = match &main.inputs[..] {
        [only] => only,
        inputs => {
            let names: Vec<String> = inputs.iter().map(TensorInfo::told).collect();
            return Err(refused(format!("it has {} inputs, and a picture is one: {}", inputs.len(), names.join(", "))));
        }
    };
    let [_, first, second, third] = tensor.shape[..] else {
        return Err(refused(format!("its input {} has not the four axes of a batch of pictures", tensor.told())));
    };
    let is_channels = |axis: i64| axis == 1 || axis == 3;
    let (layout, channels, height, width) = match (is_channels(first), is_channels(third)) {
        (true, _) => (Layout::Nchw, first, second, third),
        (false, true) => (Layout::Nhwc, third, first, second),
        (false, false) => {
            guesses.push("color and layout: no axis of the input says that it has 1 or 3 channels".to_owned());
            (Layout::Nchw, 3, second, third)
        }
    };
    let outputs = roles(main, decoder, tensor, &mut guesses);
    let preset = preset.unwrap_or_else(|| {
        let found = family(main, &outputs, layout, channels);
        guesses.push(format!(
            "how pictures are prepared: as for --preset {}, by the names and shapes of the tensors",
            found.name()
        ));
        found
    });
    let takes_pixels = tensor.element == "u8";
    let color = if channels == 1 { Color::Gray } else { Color::Rgb };
    let side = |axis: i64, guesses: &mut Vec<String>, name: &str| {
        u32::try_from(axis).ok().filter(|side| *side > 0).unwrap_or_else(|| {
            let side = if preset == Preset::Anomalib { ANOMALIB_SIDE } else { DEFAULT_SIDE };
            guesses.push(format!("{name}: the network takes any, and {side} is usual"));
            side
        })
    };
    let (height, width) = (side(height, &mut guesses, "height"), side(width, &mut guesses, "width"));
    let plain = || (vec![0.0; color.channels()], vec![1.0; color.channels()]);
    let statistics = |(mean, std): ([f32; 3], [f32; 3])| {
        if color == Color::Rgb { (mean.to_vec(), std.to_vec()) } else { (mean[..1].to_vec(), std[..1].to_vec()) }
    };
    let (mean, std) = match preset {
        _ if takes_pixels => plain(),
        Preset::Plain | Preset::Anomalib | Preset::Keras => plain(),
        Preset::Imagenet => statistics(IMAGENET),
        Preset::Clip => statistics(CLIP),
    };
    let is_centered = matches!(preset, Preset::Imagenet | Preset::Clip);
    let is_integer =
        main.operators.keys().any(|operator| operator.contains("Integer") || operator.starts_with("QLinear"))
            || main.operators.contains_key("QuantizeLinear");
    let output_tolerance = match (is_integer, main.has_half_weights) {
        (true, _) => INT8_TOLERANCE,
        (_, true) => HALF_TOLERANCE,
        _ => DEFAULT_OUTPUT_TOLERANCE,
    };
    let name = main.file.rsplit('/').next().unwrap_or_default();
    let contract = Contract {
        format_version: FORMAT_VERSION,
        name: name.strip_suffix(".onnx").unwrap_or(name).to_owned(),
        graph: Graph { main: main.file.clone(), decoder: decoder.map(|decoder| decoder.file.clone()) },
        input: Input {
            tensor: tensor.name.clone(),
            kind: InputKind::Image(ImageInput {
                pixels: PixelSpec {
                    height,
                    width,
                    color,
                    filter: if is_centered { Filter::Bicubic } else { Filter::Bilinear },
                    fit: if is_centered { Fit::Crop } else { Fit::Stretch },
                    // Resize(256) and CenterCrop(224), or in that proportion.
                    resize: (preset == Preset::Imagenet).then(|| (height.max(width) * 8).div_ceil(7)),
                    exif_rotation: true,
                },
                layout,
            }),
            scale: if takes_pixels { 1.0 } else { 1.0 / 255.0 },
            mean,
            std,
        },
        outputs,
        likelihood: None,
        golden: GoldenFile { file: GOLDEN_FILE.to_owned(), input_tolerance: DEFAULT_INPUT_TOLERANCE, output_tolerance },
        files: BTreeMap::new(),
    };
    if contract.outputs.roles().next().is_none() {
        let names: Vec<String> = main.outputs.iter().map(TensorInfo::told).collect();
        guesses.push(format!("[outputs] is empty: nothing tells what these mean: {}", names.join(", ")));
    }
    Ok(Proposal { contract, preset, guesses })
}

/// What the outputs mean, by their names, and where these say nothing, by their shapes.
fn roles(main: &Inspected, decoder: Option<&Inspected>, input: &TensorInfo, guesses: &mut Vec<String>) -> Outputs {
    let mut outputs = Outputs::default();
    let mut unknown = Vec::new();
    for tensor in &main.outputs {
        let word = tensor.name.to_lowercase().replace(['_', '-', '.'], "");
        let known = NAMES.iter().find(|(_, names)| names.contains(&word.as_str())).map(|(role, _)| *role);
        match known {
            Some(role) if outputs.name(role).is_none() => outputs.set(role, &tensor.name),
            _ => unknown.push(tensor),
        }
    }
    for tensor in unknown {
        let is_picture = tensor.shape.len() == 4 && tensor.row_values() == input.row_values();
        let is_vector = tensor.shape.len() == 2 && tensor.row_values() > Some(1);
        let role = match (is_picture, is_vector, decoder) {
            (true, ..) => Role::Reconstruction,
            // What a decoder decodes is the mean, be it of an autoencoder without a variance.
            (_, true, Some(_)) => Role::Mu,
            (_, true, None) => Role::Embedding,
            _ => continue,
        };
        if outputs.name(role).is_none() {
            guesses.push(format!("{role}: by the shape of {}", tensor.told()));
            outputs.set(role, &tensor.name);
        }
    }
    // A score of every image and place needs a vector beside it.
    if outputs.embedding.is_none()
        && outputs.mu.is_none()
        && let Some(vector) = main.within.last()
    {
        guesses.push(format!("embedding: a tensor within the network, {}", vector.told()));
        outputs.set(Role::Embedding, &vector.name);
    }
    outputs
}

/// The family that a network looks like.
fn family(main: &Inspected, outputs: &Outputs, layout: Layout, channels: i64) -> Preset {
    let names = |words: &[&str]| {
        main.inputs.iter().chain(&main.outputs).any(|tensor| words.contains(&tensor.name.to_lowercase().as_str()))
    };
    if outputs.pred_score.is_some() || outputs.anomaly_map.is_some() {
        Preset::Anomalib
    } else if layout == Layout::Nhwc {
        Preset::Keras
    } else if names(&["image_embeds", "image_features"]) {
        Preset::Clip
    } else if outputs.reconstruction.is_some() || outputs.mu.is_some() || channels == 1 {
        Preset::Plain
    } else {
        Preset::Imagenet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, element: &str, shape: &[i64]) -> TensorInfo {
        TensorInfo { name: name.to_owned(), element: element.to_owned(), shape: shape.to_vec() }
    }

    fn network(inputs: &[TensorInfo], outputs: &[TensorInfo]) -> Inspected {
        Inspected {
            file: "net.onnx".to_owned(),
            num_bytes: 1,
            ir_version: 8,
            opset: 17,
            producer: String::new(),
            metadata: BTreeMap::new(),
            operators: BTreeMap::new(),
            has_half_weights: false,
            inputs: inputs.to_vec(),
            outputs: outputs.to_vec(),
            within: vec![tensor("/pool/out", "f32", &[-1, 64])],
            files: BTreeMap::new(),
        }
    }

    fn proposed(inputs: &[TensorInfo], outputs: &[TensorInfo]) -> Proposal {
        propose(&network(inputs, outputs), None, None, "models/").unwrap()
    }

    #[test]
    fn families_are_known_by_their_tensors() {
        let image = tensor("pixel_values", "f32", &[-1, 3, -1, -1]);
        let vit = proposed(std::slice::from_ref(&image), &[tensor("pooler_output", "f32", &[-1, 768])]);
        assert_eq!(vit.preset, Preset::Imagenet);
        let pixels = |proposal: &Proposal| proposal.contract.input.image().unwrap().pixels.clone();
        assert_eq!((pixels(&vit).height, pixels(&vit).resize), (224, Some(256)));
        assert_eq!(vit.contract.outputs.embedding.as_deref(), Some("pooler_output"));
        assert!(vit.guesses.iter().any(|guess| guess.starts_with("height")), "{:?}", vit.guesses);

        let clip = proposed(&[image], &[tensor("image_embeds", "f32", &[-1, 512])]);
        assert_eq!((clip.preset, clip.contract.input.mean.as_slice()), (Preset::Clip, CLIP.0.as_slice()));

        let maps = [tensor("pred_score", "f32", &[-1]), tensor("anomaly_map", "f32", &[-1, 1, 256, 256])];
        let anomalib = proposed(&[tensor("input", "f32", &[-1, 3, 256, 256])], &maps);
        let outputs = &anomalib.contract.outputs;
        assert_eq!((anomalib.preset, outputs.pred_score.as_deref()), (Preset::Anomalib, Some("pred_score")));
        assert_eq!(outputs.embedding.as_deref(), Some("/pool/out"));

        let keras = proposed(&[tensor("keras_tensor", "u8", &[-1, 96, 64, 3])], &[tensor("dense", "f32", &[-1, 16])]);
        let input = &keras.contract.input;
        assert_eq!((keras.preset, input.shape()), (Preset::Keras, vec![96, 64, 3]));
        assert!(input.is_identity());

        let names = ["z_mean", "z_log_var", "decoded"].map(|name| match name {
            "decoded" => tensor(name, "f32", &[-1, 1, 64, 64]),
            latent => tensor(latent, "f32", &[-1, 8]),
        });
        let vae = proposed(&[tensor("x", "f32", &[-1, 1, 64, 64])], &names);
        let outputs = &vae.contract.outputs;
        assert_eq!((vae.preset, pixels(&vae).color), (Preset::Plain, Color::Gray));
        let found = [&outputs.mu, &outputs.logvar, &outputs.reconstruction].map(|name| name.as_deref().unwrap_or("-"));
        assert_eq!(found, ["z_mean", "z_log_var", "decoded"]);
    }

    #[test]
    fn what_takes_no_pictures_is_refused_with_what_it_takes() {
        let text = [tensor("input_ids", "i64", &[-1, -1]), tensor("attention_mask", "i64", &[-1, -1])];
        let refused =
            |inputs: &[TensorInfo]| propose(&network(inputs, &[]), None, None, "models/").unwrap_err().to_string();
        assert!(refused(&text).contains("it has 2 inputs"), "{}", refused(&text));
        assert!(refused(&text[..1]).contains("input_ids i64 n x ?"), "{}", refused(&text[..1]));
    }
}
