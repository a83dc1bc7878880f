//! Inference: a batch of input tensors goes in, the tensors of the model's roles come out.
//!
//! One session serves one thread (ONNX Runtime is fastest on the CPU with as many sessions as cores, one thread each). A
//! [`Session`] checks the shapes of what comes out, so that its callers can index without looking.

use ort::ep;
use ort::session::builder::{AutoDevicePolicy, GraphOptimizationLevel, PrepackedWeights};
use ort::value::TensorRef;
use serde::{Deserialize, Serialize};

use super::{Contract, Layout, ModelError, Role, Runtime};

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

impl Session {
    /// Builds a session of the model's main graph.
    pub(super) fn build(
        runtime: &Runtime,
        provider: Provider,
        contract: &Contract,
        package: &str,
        files: &super::PackageFiles,
        weights: &PrepackedWeights,
    ) -> Result<Self, ModelError> {
        let graph = &contract.graph.main;
        let graph_error =
            |source: ort::Error| ModelError::Graph { package: package.to_owned(), file: graph.clone(), source };
        let builder = || -> ort::Result<_> {
            let mut builder = ort::session::Session::builder(runtime.environment())?
                .with_optimization_level(GraphOptimizationLevel::All)?
                .with_intra_threads(1)?
                .with_inter_threads(1)?
                // Newer runtimes may choose a provider by themselves; a run must not depend on what is plugged in.
                .with_auto_device(AutoDevicePolicy::PreferCPU)?
                .with_prepacked_weights(weights)?;
            for (name, bytes) in &files.external_data {
                builder = builder.with_external_initializer_file_in_memory(name, std::sync::Arc::clone(bytes))?;
            }
            Ok(builder)
        };
        let mut builder = builder().map_err(graph_error)?;
        if provider == Provider::Cuda {
            // Without error_on_failure, ONNX Runtime would go on silently on the CPU. TF32 is off because anomaly thresholds
            // feel its ten bits of mantissa.
            let cuda = ep::CUDA::default().with_tf32(false).build().error_on_failure();
            builder = builder.with_execution_providers([cuda]).map_err(|error| ModelError::Provider {
                provider,
                library: runtime.library.clone(),
                source: error.into(),
            })?;
        }
        let session = builder.commit_from_memory(&files.main).map_err(graph_error)?;
        let session = Self { inner: session, contract: contract.clone(), package: package.to_owned() };
        session.check_names()?;
        Ok(session)
    }

    /// Checks that the tensors which the contract names are there, before anything is run.
    fn check_names(&self) -> Result<(), ModelError> {
        let missing = |kind, name: &str, available: &[ort::value::Outlet]| ModelError::MissingTensor {
            package: self.package.clone(),
            kind,
            name: name.to_owned(),
            available: available
                .iter()
                .map(|outlet| format!("{} {}", outlet.name(), outlet.dtype()))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let has = |outlets: &[ort::value::Outlet], name: &str| outlets.iter().any(|outlet| outlet.name() == name);
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

    /// Runs `batch` images whose input tensors lie one after the other in `input`, and hands the outputs to `then`.
    pub fn run<T>(
        &mut self,
        input: &[f32],
        batch: usize,
        then: impl FnOnce(Latents<'_>) -> T,
    ) -> Result<T, ModelError> {
        let image = &self.contract.input;
        let (channels, height, width) = (image.channels(), image.height as usize, image.width as usize);
        let shape = match image.layout {
            Layout::Nchw => [batch, channels, height, width],
            Layout::Nhwc => [batch, height, width, channels],
        };
        let package = &self.package;
        let inference = |source| ModelError::Inference { package: package.clone(), source };
        let tensor = TensorRef::from_array_view((shape, input)).map_err(inference)?;
        let outputs = self.inner.run(ort::inputs![image.tensor.as_str() => tensor]).map_err(inference)?;
        let values = |role: Role, name: &str| -> Result<&[f32], ModelError> {
            let (shape, values) = outputs[name].try_extract_tensor::<f32>().map_err(inference)?;
            let expected = match role {
                Role::Reconstruction => Some(input.len()),
                Role::Embedding | Role::Mu | Role::Logvar => None,
            };
            let rows = shape.first().copied().unwrap_or_default();
            let fits = usize::try_from(rows) == Ok(batch)
                && values.len() % batch.max(1) == 0
                && expected.is_none_or(|expected| expected == values.len());
            if fits {
                Ok(values)
            } else {
                Err(ModelError::OutputShape {
                    package: package.clone(),
                    role,
                    name: name.to_owned(),
                    shape: shape.to_string(),
                    batch,
                })
            }
        };
        let role = |role: Role| self.contract.outputs.name(role).map(|name| values(role, name)).transpose();
        let mu = role(Role::Mu)?;
        let embedding = role(Role::Embedding)?.or(mu).unwrap_or_default();
        let logvar = role(Role::Logvar)?;
        let reconstruction = role(Role::Reconstruction)?;
        Ok(then(Latents { batch, embedding, mu, logvar, reconstruction }))
    }
}
