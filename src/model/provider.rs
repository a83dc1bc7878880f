//! Execution providers: what computes, how it is asked for, and proof that it is what computes.
//!
//! Asked for a GPU, a run computes on that GPU or does not start. Three things see to it: the provider must register
//! (`error_on_failure`; ONNX Runtime would go on without it), no node that does the work may have been left to the CPU
//! (`assignment.rs` reads ONNX Runtime's record of it), and the golden images are replayed on it.

use std::num::NonZeroU64;

use ort::ep;
use ort::session::builder::SessionBuilder;
use ort::value::TensorRef;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::assignment::{Assigned, assignment};
use super::onnx_proto::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use super::{ModelError, Runtime};
use crate::config::{Device, Execution};

/// Sessions on a GPU, which the workers share: while one computes, the next batch is copied to the GPU and the last one back.
const SESSIONS_ON_GPU: usize = 2;

/// The operators that do the work of a network. On a GPU none of them may be left to the CPU; what computes shapes may.
const HEAVY_OPERATORS: &[&str] = &[
    "Attention",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "GRU",
    "LSTM",
    "MatMul",
    "MatMulInteger",
    "MatMulNBits",
    "MultiHeadAttention",
    "QLinearConv",
    "QLinearMatMul",
];

/// The execution provider that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An NVIDIA GPU, by engines that TensorRT builds for it. What it declines, CUDA computes.
    TensorRt,
    /// The processor, by OpenVINO.
    OpenVino,
}

impl Provider {
    /// The word for it in settings, tables and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::OpenVino => "openvino",
        }
    }

    /// The provider that a device stands for; `None` for the one that looks what there is.
    pub fn of(device: Device) -> Option<Self> {
        match device {
            Device::Cpu => Some(Self::Cpu),
            Device::Cuda => Some(Self::Cuda),
            Device::TensorRt => Some(Self::TensorRt),
            Device::OpenVino => Some(Self::OpenVino),
            Device::Auto => None,
        }
    }

    /// Whether it computes on a GPU, whose memory is not ours.
    pub fn is_gpu(self) -> bool {
        matches!(self, Self::Cuda | Self::TensorRt)
    }

    /// What makes it available, for people.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "install another build of ONNX Runtime",
            Self::Cuda => {
                "install the CUDA build (pip install onnxruntime-gpu[cuda,cudnn]) beside a CUDA 13 driver, or set device = \"cpu\" or \"auto\""
            }
            Self::TensorRt => {
                "install the CUDA build (pip install onnxruntime-gpu[cuda,cudnn]) and TensorRT (pip install tensorrt) beside a CUDA 13 \
                 driver, or set device = \"cuda\""
            }
            Self::OpenVino => "install the OpenVINO build (pip install onnxruntime-openvino), or set device = \"cpu\"",
        }
    }
}

/// Where and how networks compute.
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// The device asked for.
    pub device: Device,
    /// Threads that call sessions.
    pub workers: usize,
    /// Threads of ONNX Runtime within each session.
    pub threads: usize,
    /// Whether a GPU may round the factors of products to ten bits of mantissa.
    pub tf32: bool,
    /// Bytes of a GPU's memory that each session may take.
    pub gpu_memory_limit: Option<NonZeroU64>,
}

impl Compute {
    /// As the pipeline file says, for so many threads.
    pub fn new(execution: &Execution, workers: usize) -> Self {
        let Execution { device, threads, tf32, gpu_memory_limit, .. } = *execution;
        Self { device, workers, threads: threads.get(), tf32, gpu_memory_limit }
    }

    /// A device with all else as it is by default.
    pub fn on(device: Device, workers: usize) -> Self {
        Self { device, workers, threads: 1, tf32: false, gpu_memory_limit: None }
    }

    /// Sessions of a network.
    pub(super) fn num_sessions(&self, provider: Provider) -> usize {
        if provider.is_gpu() { self.workers.clamp(1, SESSIONS_ON_GPU) } else { self.workers.max(1) }
    }

    /// Puts what is built on a provider.
    pub(super) fn place(
        &self,
        builder: SessionBuilder,
        runtime: &Runtime,
        provider: Provider,
    ) -> Result<SessionBuilder, ModelError> {
        if provider.is_gpu() {
            runtime.preload_cuda();
        }
        // TF32 is off unless asked for: anomaly thresholds feel its ten bits of mantissa. ONNX Runtime has it on.
        let cuda = || {
            let mut cuda = ep::CUDA::default()
                .with_tf32(self.tf32)
                .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested)
                // The last batch of a unit has a size of its own, and the default would try all algorithms for each size.
                .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic);
            if let Some(limit) = self.gpu_memory_limit {
                cuda = cuda.with_memory_limit(usize::try_from(limit.get()).unwrap_or(usize::MAX));
            }
            cuda.build()
        };
        let providers = match provider {
            Provider::Cpu => return Ok(builder),
            Provider::Cuda => vec![cuda()],
            Provider::TensorRt => vec![ep::TensorRT::default().build(), cuda()],
            // Otherwise it takes 16-bit floats where the processor has them.
            Provider::OpenVino => {
                vec![ep::OpenVINO::default().with_device_type("CPU").with_precision("ACCURACY").build()]
            }
        };
        // Without error_on_failure, ONNX Runtime would go on silently on the CPU.
        let providers: Vec<_> = providers.into_iter().map(ep::ExecutionProviderDispatch::error_on_failure).collect();
        builder.with_execution_providers(providers).map_err(|error| unavailable(provider, runtime, error.into()))
    }
}

pub(super) fn unavailable(provider: Provider, runtime: &Runtime, source: ort::Error) -> ModelError {
    ModelError::Provider { provider, library: runtime.library.clone(), source }
}

/// Checks that a session computes on its provider what makes up the work.
pub(super) fn check_assignment(
    session: &ort::session::Session,
    runtime: &Runtime,
    provider: Provider,
    package: &str,
) -> Result<(), ModelError> {
    if provider == Provider::Cpu {
        return Ok(());
    }
    let assigned = assignment(session).map_err(|source| unavailable(provider, runtime, source))?;
    tracing::debug!(provider = provider.name(), nodes = %told(&assigned), "assigned");
    let on_cpu = heavy_on_cpu(&assigned);
    if on_cpu.is_empty() {
        return Ok(());
    }
    Err(ModelError::LeftToCpu { provider, package: package.to_owned(), operators: on_cpu.join(", ") })
}

fn told(assigned: &[Assigned]) -> String {
    let each = assigned.iter().map(|part| format!("{} {}", part.operators.len(), part.provider));
    each.collect::<Vec<_>>().join(", ")
}

/// The heavy operators that the CPU computes, each kind once.
fn heavy_on_cpu(assigned: &[Assigned]) -> Vec<String> {
    let on_cpu = assigned.iter().filter(|part| part.provider == "CPUExecutionProvider");
    let mut heavy: Vec<String> = on_cpu
        .flat_map(|part| &part.operators)
        .filter(|operator| HEAVY_OPERATORS.contains(&operator.as_str()))
        .cloned()
        .collect();
    heavy.sort();
    heavy.dedup();
    heavy
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
    ModelProto::of(graph).encode_to_vec()
}

/// Finds out whether a provider computes here, with a network that adds a number to itself.
pub fn try_provider(runtime: &Runtime, provider: Provider) -> Result<(), ModelError> {
    let failed = |source| unavailable(provider, runtime, source);
    let builder = ort::session::Session::builder(runtime.environment()).map_err(failed)?;
    let compute = Compute::on(Device::Cpu, 1);
    let mut session =
        compute.place(builder, runtime, provider)?.commit_from_memory(&doubling_network()).map_err(failed)?;
    let three = TensorRef::from_array_view(([1_usize], [3.0_f32].as_slice())).map_err(failed)?;
    let outputs = session.run(ort::inputs!["x" => three]).map_err(failed)?;
    let (_, six) = outputs["y"].try_extract_tensor::<f32>().map_err(failed)?;
    if *six == [6.0] { Ok(()) } else { Err(failed(ort::Error::new(format!("it computes 3 + 3 = {six:?}")))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_is_left_to_the_cpu_is_told_and_shapes_are_not() {
        let part = |provider: &str, operators: &[&str]| Assigned {
            provider: provider.to_owned(),
            operators: operators.iter().map(ToString::to_string).collect(),
        };
        let mixed = [
            part("CUDAExecutionProvider", &["Conv", "Relu"]),
            part("CPUExecutionProvider", &["Shape", "MatMul", "Gather", "Conv", "Conv"]),
        ];
        assert_eq!(heavy_on_cpu(&mixed), ["Conv", "MatMul"]);
        assert!(heavy_on_cpu(&mixed[..1]).is_empty());
        assert!(heavy_on_cpu(&[part("CPUExecutionProvider", &["Shape", "Gather"])]).is_empty());
        assert_eq!(told(&mixed), "2 CUDAExecutionProvider, 5 CPUExecutionProvider");
    }
}
