//! Inference: a batch of input tensors goes in, the tensors of the model's roles come out.
//!
//! One session serves one thread (ONNX Runtime is fastest on the CPU with as many sessions as cores, one thread each). A
//! [`Session`] checks the shapes of what comes out, so that its callers can index without looking.

use ort::ep;
use ort::session::builder::{AutoDevicePolicy, GraphOptimizationLevel, PrepackedWeights, SessionBuilder};
use ort::value::{Outlet, TensorElementType, TensorRef, ValueType};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::onnx_proto::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto};
use super::{Contract, ModelError, Network, Role, Runtime, ppca};
use crate::features::shape_text;

/// The execution provider that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Provider {
    /// The word for it in settings, tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// A model loaded for one thread.
#[derive(Debug)]
pub struct Session {
    inner: ort::session::Session,
    contract: Contract,
    package: String,
}

/// What a model made of a batch: for each role it has, the values of all images, one image after the other.
#[derive(Debug, Clone, Copy)]
pub struct Latents<'a> {
    /// Images in the batch.
    pub batch: usize,
    /// The vector to search by, `batch x embedding_dim`; for a VAE without a separate one, `mu`.
    pub embedding: &'a [f32],
    /// Mean of the approximate posterior, `batch x latent_dim`.
    pub mu: Option<&'a [f32]>,
    /// Log-variance of the approximate posterior, `batch x latent_dim`.
    pub logvar: Option<&'a [f32]>,
    /// The model's picture of the input, in its shape and units.
    pub reconstruction: Option<&'a [f32]>,
}

impl<'a> Latents<'a> {
    /// The values of one image, by role.
    pub fn of(&self, role: Role) -> Option<&'a [f32]> {
        match role {
            Role::Embedding => Some(self.embedding),
            Role::Mu => self.mu,
            Role::Logvar => self.logvar,
            Role::Reconstruction => self.reconstruction,
        }
    }
}

/// Puts what is built on a provider.
fn on_provider(builder: SessionBuilder, runtime: &Runtime, provider: Provider) -> Result<SessionBuilder, ModelError> {
    if provider == Provider::Cpu {
        return Ok(builder);
    }
    // Without error_on_failure, ONNX Runtime would go on silently on the CPU. TF32 is off because anomaly thresholds feel its ten
    // bits of mantissa.
    let cuda = ep::CUDA::default().with_tf32(false).build().error_on_failure();
    builder.with_execution_providers([cuda]).map_err(|error| unavailable(provider, runtime, error.into()))
}

fn unavailable(provider: Provider, runtime: &Runtime, source: ort::Error) -> ModelError {
    ModelError::Provider { provider, library: runtime.library.clone(), source }
}

/// `y = x + x`.
fn doubling_network() -> Vec<u8> {
    let graph = GraphProto {
        name: "doubling".to_owned(),
        node: vec![NodeProto::new("Add", &["x", "x"], &["y"])],
        input: vec![ValueInfoProto::float_batch("x", "batch", &[])],
        output: vec![ValueInfoProto::float_batch("y", "batch", &[])],
        ..GraphProto::default()
    };
    let opset = OperatorSetIdProto { domain: String::new(), version: ppca::OPSET_VERSION };
    let model = ModelProto {
        ir_version: ppca::IR_VERSION,
        graph: Some(graph),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    model.encode_to_vec()
}

/// Finds out whether a provider computes here, with a network that adds a number to itself.
pub fn try_provider(runtime: &Runtime, provider: Provider) -> Result<(), ModelError> {
    let failed = |source| unavailable(provider, runtime, source);
    let builder = ort::session::Session::builder(runtime.environment()).map_err(failed)?;
    let mut session =
        on_provider(builder, runtime, provider)?.commit_from_memory(&doubling_network()).map_err(failed)?;
    let three = TensorRef::from_array_view(([1_usize], [3.0_f32].as_slice())).map_err(failed)?;
    let outputs = session.run(ort::inputs!["x" => three]).map_err(failed)?;
    let (_, six) = outputs["y"].try_extract_tensor::<f32>().map_err(failed)?;
    if *six == [6.0] { Ok(()) } else { Err(failed(ort::Error::new(format!("it computes 3 + 3 = {six:?}")))) }
}

/// Gives a network of a package to ONNX Runtime, for one thread.
pub(super) fn open(
    runtime: &Runtime,
    provider: Provider,
    package: &str,
    network: &Network,
    weights: &PrepackedWeights,
) -> Result<ort::session::Session, ModelError> {
    let graph_error = |source: ort::Error| ModelError::Graph {
        package: package.to_owned(),
        file: network.file.clone(),
        version: runtime.version.clone(),
        opset: network.opset,
        source,
    };
    let builder = || -> ort::Result<_> {
        let mut builder = ort::session::Session::builder(runtime.environment())?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_intra_threads(1)?
            .with_inter_threads(1)?
            // Newer runtimes may choose a provider by themselves; a run must not depend on what is plugged in.
            .with_auto_device(AutoDevicePolicy::PreferCPU)?
            .with_prepacked_weights(weights)?;
        for (name, bytes) in &network.external_data {
            builder = builder.with_external_initializer_file_in_memory(name, std::sync::Arc::clone(bytes))?;
        }
        Ok(builder)
    };
    let mut builder = on_provider(builder().map_err(graph_error)?, runtime, provider)?;
    builder.commit_from_memory(&network.bytes).map_err(graph_error)
}

impl Session {
    /// Builds a session of the model's main graph.
    pub(super) fn build(
        runtime: &Runtime,
        provider: Provider,
        contract: &Contract,
        package: &str,
        files: &Network,
        weights: &PrepackedWeights,
    ) -> Result<Self, ModelError> {
        let session = open(runtime, provider, package, files, weights)?;
        let session = Self { inner: session, contract: contract.clone(), package: package.to_owned() };
        session.check_names()?;
        session.check_types()?;
        Ok(session)
    }

    /// Checks that the tensors which the contract names are there, before anything is run.
    fn check_names(&self) -> Result<(), ModelError> {
        let missing = |kind, name: &str, available: &[Outlet]| ModelError::MissingTensor {
            package: self.package.clone(),
            kind,
            name: name.to_owned(),
            available: available
                .iter()
                .map(|outlet| format!("{} {}", outlet.name(), outlet.dtype()))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let has = |outlets: &[Outlet], name: &str| outlets.iter().any(|outlet| outlet.name() == name);
        let inputs = self.inner.inputs();
        if !has(inputs, &self.contract.input.tensor) {
            return Err(missing("input", &self.contract.input.tensor, inputs));
        }
        for (_, name) in self.contract.outputs.roles() {
            if !has(self.inner.outputs(), name) {
                return Err(missing("output", name, self.inner.outputs()));
            }
        }
        Ok(())
    }

    /// Checks that the tensors are of 32-bit floats, and that images of the contract's size go in, any number at a time.
    fn check_types(&self) -> Result<(), ModelError> {
        let unfit = |kind, outlet: &Outlet, expected: String| ModelError::TensorType {
            package: self.package.clone(),
            kind,
            name: outlet.name().to_owned(),
            found: outlet.dtype().to_string(),
            expected,
        };
        let image = &self.contract.input;
        let axes = image.shape();
        for outlet in self.inner.inputs().iter().filter(|outlet| outlet.name() == image.tensor) {
            let fits = match outlet.dtype() {
                // A shape without axes is one that the network leaves open.
                ValueType::Tensor { ty: TensorElementType::Float32, shape, .. } => match &shape[..] {
                    [] => true,
                    [batch, found @ ..] => {
                        let is_open = |axis: i64| axis < 0;
                        is_open(*batch)
                            && found.len() == axes.len()
                            && found
                                .iter()
                                .zip(&axes)
                                .all(|(&found, &axis)| is_open(found) || usize::try_from(found) == Ok(axis))
                    }
                },
                _ => false,
            };
            if !fits {
                let rows = if image.image().is_some() { "images" } else { "rows" };
                return Err(unfit("input", outlet, format!("f32 of any number of {rows} x {}", shape_text(&axes))));
            }
        }
        for (_, name) in self.contract.outputs.roles() {
            for outlet in self.inner.outputs().iter().filter(|outlet| outlet.name() == name) {
                if !matches!(outlet.dtype(), ValueType::Tensor { ty: TensorElementType::Float32, .. }) {
                    return Err(unfit("output", outlet, "f32".to_owned()));
                }
            }
        }
        Ok(())
    }

    /// Shape of the input tensor of a batch.
    fn shape(&self, batch: usize) -> Vec<usize> {
        let mut shape = vec![batch];
        shape.extend(self.contract.input.shape());
        shape
    }

    /// Runs `batch` images whose input tensors lie one after the other in `input`, and hands the outputs to `then`.
    pub fn run<T>(
        &mut self,
        input: &[f32],
        batch: usize,
        then: impl FnOnce(Latents<'_>) -> T,
    ) -> Result<T, ModelError> {
        let (image, shape) = (&self.contract.input, self.shape(batch));
        let package = &self.package;
        let inference = |source| ModelError::Inference { package: package.clone(), source };
        let tensor = TensorRef::from_array_view((shape, input)).map_err(inference)?;
        let outputs = self.inner.run(ort::inputs![image.tensor.as_str() => tensor]).map_err(inference)?;
        let misshapen = |role: Role, name: &str, shape: String| ModelError::OutputShape {
            package: package.clone(),
            role,
            name: name.to_owned(),
            shape,
            batch,
        };
        let values = |role: Role, name: &str| -> Result<&[f32], ModelError> {
            let (shape, values) = outputs[name].try_extract_tensor::<f32>().map_err(inference)?;
            let expected = match role {
                Role::Reconstruction => Some(input.len()),
                Role::Embedding | Role::Mu | Role::Logvar => None,
            };
            let rows = shape.first().copied().unwrap_or_default();
            let fits = usize::try_from(rows) == Ok(batch)
                && !values.is_empty()
                && values.len() % batch.max(1) == 0
                && expected.is_none_or(|expected| expected == values.len());
            if fits { Ok(values) } else { Err(misshapen(role, name, shape.to_string())) }
        };
        let role = |role: Role| self.contract.outputs.name(role).map(|name| values(role, name)).transpose();
        let mu = role(Role::Mu)?;
        let embedding = role(Role::Embedding)?.or(mu).unwrap_or_default();
        let logvar = role(Role::Logvar)?;
        if let (Some(mu), Some(logvar)) = (mu, logvar)
            && mu.len() != logvar.len()
        {
            let shape = format!("{} values an image beside the {} of mu", logvar.len() / batch, mu.len() / batch);
            return Err(misshapen(Role::Logvar, self.contract.outputs.name(Role::Logvar).unwrap_or_default(), shape));
        }
        let reconstruction = role(Role::Reconstruction)?;
        Ok(then(Latents { batch, embedding, mu, logvar, reconstruction }))
    }
}
