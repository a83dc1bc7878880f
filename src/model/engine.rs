//! A network that runs: rows of 32-bit floats go in, and 32-bit floats come out, whatever the network itself takes.
//!
//! Networks are exported with half-precision or 8-bit inputs, with outputs in double precision, and for one size of batch only. All of
//! that ends here: values are converted on the way in and out, and a network of a fixed batch gets full batches, the last one filled up
//! with copies of its last row, whose outputs are dropped.
//!
//! On a GPU, a batch is laid into pinned memory, from which it is copied to the device without another copy in between, and outputs
//! are bound to pinned memory too; the buffers stay. On the CPU the network reads the caller's memory and the caller reads the network's.

use std::borrow::Cow;
use std::fmt;

use half::f16;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{AutoDevicePolicy, GraphOptimizationLevel, PrepackedWeights};
use ort::session::{
    HasSelectedOutputs, IoBinding, OutputSelector, RunOptions, Session, SessionInputValue, SessionOutputs,
};
use ort::value::{DynTensor, DynValue, Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use super::provider::check_assignment;
use super::{Compute, ModelError, Network, Provider, Runtime, assignment};

/// Types of values that networks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Float32,
    Float16,
    /// Pixels as they are.
    Uint8,
}

impl Element {
    fn of(data_type: TensorElementType) -> Option<Self> {
        match data_type {
            TensorElementType::Float32 => Some(Self::Float32),
            TensorElementType::Float16 => Some(Self::Float16),
            TensorElementType::Uint8 => Some(Self::Uint8),
            _ => None,
        }
    }

    fn data_type(self) -> TensorElementType {
        match self {
            Self::Float32 => TensorElementType::Float32,
            Self::Float16 => TensorElementType::Float16,
            Self::Uint8 => TensorElementType::Uint8,
        }
    }
}

/// Whether values of an output can be read.
fn is_readable(data_type: TensorElementType) -> bool {
    matches!(data_type, TensorElementType::Float32 | TensorElementType::Float16 | TensorElementType::Float64)
}

/// Where networks run, and what is said of them in errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) provider: Provider,
    pub(super) compute: &'a Compute,
    pub(super) package: &'a str,
}

/// What goes into a network and what is wanted from it.
#[derive(Debug, Clone)]
pub(super) struct Tensors {
    /// The input; `None`: the only one there is.
    pub(super) input: Option<String>,
    /// Axes of a row of the input, without the one of the batch; `None`: one, of whatever length the rows have.
    pub(super) row: Option<Vec<usize>>,
    /// What a row is, in errors.
    pub(super) rows: &'static str,
    /// What the network's own input and output are called, in errors.
    pub(super) kinds: (&'static str, &'static str),
    /// The outputs, in the order in which they are handed out; `None`: the only one there is.
    pub(super) outputs: Option<Vec<String>>,
}

/// A network with ONNX Runtime, for one thread at a time.
pub(super) struct Engine {
    session: Session,
    options: RunOptions<HasSelectedOutputs>,
    input: String,
    element: Element,
    /// Axes of a row; `None`: one.
    row: Option<Vec<usize>>,
    outputs: Vec<String>,
    /// Rows of every batch, for a network that takes no other number.
    fixed_batch: Option<usize>,
    bound: Option<Bound>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { input, element, row, outputs, fixed_batch, .. } = self;
        write!(f, "Engine({input}: {element:?} {row:?} by {fixed_batch:?} -> {outputs:?})")
    }
}

/// Values of an output for all rows of a batch.
#[derive(Debug)]
pub(super) struct Output<'a> {
    /// The first axis is that of the batch.
    pub(super) shape: Vec<i64>,
    pub(super) values: Cow<'a, [f32]>,
}

impl Output<'_> {
    /// The shape in words.
    pub(super) fn shape(&self) -> String {
        format!("{:?}", self.shape)
    }

    /// Whether it has values of each of so many rows.
    pub(super) fn has_rows(&self, num_rows: usize) -> bool {
        let rows = self.shape.first().copied().unwrap_or_default();
        usize::try_from(rows) == Ok(num_rows)
            && !self.values.is_empty()
            && self.values.len().is_multiple_of(num_rows.max(1))
    }
}

impl Engine {
    /// Gives the network to ONNX Runtime and checks its tensors: that those named are there, of types that are understood here, and
    /// that rows of this shape go in. `weights` are shared with the other sessions of the same network.
    pub(super) fn open(
        place: Place<'_>,
        network: &Network,
        tensors: &Tensors,
        weights: &PrepackedWeights,
    ) -> Result<Self, ModelError> {
        let session = build(place, network, weights)?;
        let unfit = |kind, outlet: &Outlet, expected: String| ModelError::TensorType {
            package: place.package.to_owned(),
            kind,
            name: outlet.name().to_owned(),
            found: outlet.dtype().to_string(),
            expected,
        };
        let input = find(place, network, (tensors.kinds.0, session.inputs()), tensors.input.as_deref())?;
        let others: Vec<&str> =
            session.inputs().iter().map(Outlet::name).filter(|name| *name != input.name()).collect();
        if !others.is_empty() {
            return Err(ModelError::MoreInputs {
                package: place.package.to_owned(),
                used: input.name().to_owned(),
                others: others.join(", "),
            });
        }
        let outputs = match &tensors.outputs {
            None => vec![find(place, network, (tensors.kinds.1, session.outputs()), None)?],
            Some(names) => names
                .iter()
                .map(|name| find(place, network, (tensors.kinds.1, session.outputs()), Some(name)))
                .collect::<Result<Vec<_>, _>>()?,
        };
        let (element, fixed_batch) = accepted(input.dtype(), tensors.row.as_deref()).ok_or_else(|| {
            let row = tensors.row.as_ref().map_or_else(
                || "any length".to_owned(),
                |row| row.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x "),
            );
            unfit(tensors.kinds.0, input, format!("f32, f16 or u8 of {} x {row}", tensors.rows))
        })?;
        for outlet in outputs.iter().copied() {
            if !matches!(outlet.dtype(), ValueType::Tensor { ty, .. } if is_readable(*ty)) {
                return Err(unfit(tensors.kinds.1, outlet, "f32, f16 or f64".to_owned()));
            }
        }
        let (input, outputs) = (input.name().to_owned(), outputs.iter().map(|outlet| outlet.name().to_owned()));
        let outputs: Vec<String> = outputs.collect();
        let failed = |source| ModelError::Inference { package: place.package.to_owned(), source };
        let selected = outputs.iter().fold(OutputSelector::no_default(), |selected, name| selected.with(name.as_str()));
        let bound = place.provider.is_gpu().then(|| Bound::new(&session, AllocationDevice::CUDA_PINNED));
        Ok(Self {
            options: RunOptions::new().map_err(failed)?.with_outputs(selected),
            bound: bound.transpose().map_err(failed)?,
            session,
            input,
            element,
            row: tensors.row.clone(),
            outputs,
            fixed_batch,
        })
    }

    /// Whether the network takes pixels as they are, 0 to 255.
    pub(super) fn takes_pixels(&self) -> bool {
        self.element == Element::Uint8
    }

    /// Runs `num_rows` rows that lie one after the other in `values`, and hands the outputs to `then` in the order in which they were
    /// asked for.
    pub(super) fn run<T>(
        &mut self,
        values: &[f32],
        num_rows: usize,
        then: impl FnOnce(&[Output<'_>]) -> T,
    ) -> ort::Result<T> {
        let Some(fixed) = self.fixed_batch else {
            return self.run_batch(values, num_rows, then);
        };
        let row_values = values.len() / num_rows.max(1);
        let mut all: Vec<Output<'_>> = Vec::new();
        for batch in values.chunks((fixed * row_values).max(1)) {
            let num_rows = batch.len() / row_values.max(1);
            let mut full = Cow::Borrowed(batch);
            for _ in num_rows..fixed {
                full.to_mut().extend_from_within(batch.len() - row_values..batch.len());
            }
            self.run_batch(&full, fixed, |outputs| append(&mut all, outputs, num_rows, fixed))?;
        }
        Ok(then(&all))
    }

    /// Runs one batch of a size that the network takes.
    fn run_batch<T>(
        &mut self,
        values: &[f32],
        num_rows: usize,
        then: impl FnOnce(&[Output<'_>]) -> T,
    ) -> ort::Result<T> {
        let mut shape = vec![num_rows];
        match &self.row {
            Some(row) => shape.extend(row),
            None => shape.push(values.len() / num_rows.max(1)),
        }
        let found = if let Some(bound) = &mut self.bound {
            bound.bind(&self.input, self.element, &shape, values, &self.outputs)?;
            self.session.run_binding(&bound.binding)?
        } else {
            let input: SessionInputValue<'_> = match self.element {
                Element::Float32 => TensorRef::from_array_view((shape, values))?.into(),
                Element::Float16 => {
                    Tensor::from_array((shape, values.iter().copied().map(to_f16).collect::<Vec<_>>()))?.into()
                }
                Element::Uint8 => {
                    Tensor::from_array((shape, values.iter().copied().map(to_u8).collect::<Vec<_>>()))?.into()
                }
            };
            self.session.run_with_options(ort::inputs![self.input.as_str() => input], &self.options)?
        };
        Ok(then(&read(&found, &self.outputs)?))
    }
}

fn to_f16(value: f32) -> f16 {
    f16::from_f32(value)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pixels, which are 0 to 255 as they are")]
fn to_u8(value: f32) -> u8 {
    value as u8
}

/// Finds a tensor among the inputs or outputs of a network: by its name, or as the only one.
fn find<'a>(
    place: Place<'_>,
    network: &Network,
    (kind, outlets): (&'static str, &'a [Outlet]),
    name: Option<&str>,
) -> Result<&'a Outlet, ModelError> {
    let package = place.package.to_owned();
    match (name, outlets) {
        (None, [only]) => Ok(only),
        (None, outlets) => Err(ModelError::DecoderTensors {
            package,
            file: network.file.clone(),
            kind,
            available: outlets.len().to_string(),
        }),
        (Some(name), outlets) => outlets.iter().find(|outlet| outlet.name() == name).ok_or_else(|| {
            ModelError::MissingTensor { package, kind, name: name.to_owned(), available: told(outlets) }
        }),
    }
}

/// The tensors of a network, for people.
fn told(outlets: &[Outlet]) -> String {
    outlets.iter().map(|outlet| format!("{} {}", outlet.name(), outlet.dtype())).collect::<Vec<_>>().join(", ")
}

/// The element type of an input that takes rows of these axes, and the batch that it is fixed to, if it is; `None` where it does not
/// take them.
fn accepted(found: &ValueType, row: Option<&[usize]>) -> Option<(Element, Option<usize>)> {
    let ValueType::Tensor { ty, shape, .. } = found else { return None };
    let element = Element::of(*ty)?;
    // A shape without axes is one that the network leaves open, and so is an axis below 0.
    let [batch, axes @ ..] = &shape[..] else { return Some((element, None)) };
    let fits = |(found, axis): (&i64, &usize)| *found < 0 || usize::try_from(*found) == Ok(*axis);
    let takes = match row {
        Some(row) => axes.len() == row.len() && axes.iter().zip(row).all(fits),
        None => axes.len() == 1,
    };
    if !takes || *batch == 0 {
        return None;
    }
    Some((element, usize::try_from(*batch).ok()))
}

/// Gives a network of a package to ONNX Runtime.
pub(super) fn build(place: Place<'_>, network: &Network, weights: &PrepackedWeights) -> Result<Session, ModelError> {
    let Place { runtime, provider, compute, package } = place;
    let graph_error = |source: ort::Error| ModelError::Graph {
        package: package.to_owned(),
        file: network.file.clone(),
        version: runtime.version.clone(),
        opset: network.opset,
        source,
    };
    let builder = || -> ort::Result<_> {
        let mut builder = Session::builder(runtime.environment())?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_intra_threads(compute.threads)?
            // Threads that wait for work by looking at the clock take it from the other workers.
            .with_intra_op_spinning(false)?
            .with_inter_threads(1)?
            // Newer runtimes may choose a provider by themselves; a run must not depend on what is plugged in.
            .with_auto_device(AutoDevicePolicy::PreferCPU)?
            .with_config_entry(assignment::RECORD_KEY, "1")?
            .with_prepacked_weights(weights)?;
        for (name, bytes) in &network.external_data {
            builder = builder.with_external_initializer_file_in_memory(name, std::sync::Arc::clone(bytes))?;
        }
        Ok(builder)
    };
    let mut builder = compute.place(builder().map_err(graph_error)?, runtime, provider)?;
    let session = builder.commit_from_memory(&network.bytes).map_err(graph_error)?;
    check_assignment(&session, runtime, provider, package)?;
    Ok(session)
}

/// Reads outputs as 32-bit floats.
fn read<'a>(found: &'a SessionOutputs<'_>, names: &[String]) -> ort::Result<Vec<Output<'a>>> {
    let values = |value: &'a DynValue| -> ort::Result<(Vec<i64>, Cow<'a, [f32]>)> {
        let ValueType::Tensor { ty, .. } = value.dtype() else { return Err(ort::Error::new("an output is no tensor")) };
        Ok(match ty {
            TensorElementType::Float16 => {
                let (shape, values) = value.try_extract_tensor::<f16>()?;
                (shape.to_vec(), values.iter().map(|value| value.to_f32()).collect())
            }
            TensorElementType::Float64 => {
                let (shape, values) = value.try_extract_tensor::<f64>()?;
                #[expect(clippy::cast_possible_truncation, reason = "tables and scores are of 32-bit tensors")]
                let values = values.iter().map(|value| *value as f32).collect();
                (shape.to_vec(), values)
            }
            _ => {
                let (shape, values) = value.try_extract_tensor::<f32>()?;
                (shape.to_vec(), Cow::Borrowed(values))
            }
        })
    };
    names
        .iter()
        .map(|name| {
            let value = found.get(name).ok_or_else(|| ort::Error::new(format!("no output {name} came back")))?;
            let (shape, values) = values(value)?;
            Ok(Output { shape, values })
        })
        .collect()
}

/// Appends the first `num_rows` rows of the outputs of a batch of `fixed`. Outputs that have not a row for each are left as they are,
/// and found out by their shape.
fn append(all: &mut Vec<Output<'_>>, outputs: &[Output<'_>], num_rows: usize, fixed: usize) {
    let is_first = all.is_empty();
    for (place, output) in outputs.iter().enumerate() {
        let kept = if output.has_rows(fixed) { output.values.len() / fixed * num_rows } else { output.values.len() };
        let values = &output.values[..kept];
        if is_first {
            let mut shape = output.shape.clone();
            if let Some(rows) = shape.first_mut().filter(|_| output.has_rows(fixed)) {
                *rows = i64::try_from(num_rows).unwrap_or(i64::MAX);
            }
            all.push(Output { shape, values: Cow::Owned(values.to_vec()) });
        } else if let Some(whole) = all.get_mut(place) {
            whole.values.to_mut().extend_from_slice(values);
            if let Some(rows) = whole.shape.first_mut().filter(|_| output.has_rows(fixed)) {
                *rows += i64::try_from(num_rows).unwrap_or(i64::MAX);
            }
        }
    }
}

/// Memory between this program and a device: the input lies in it, and outputs are written to it.
struct Bound {
    binding: IoBinding,
    memory: MemoryInfo<'static>,
    allocator: Allocator,
    /// The input of the last batch, for the next one of its size.
    input: Option<(Vec<usize>, DynTensor)>,
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Bound {
    fn new(session: &Session, device: AllocationDevice<'_>) -> ort::Result<Self> {
        let memory = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::CPUOutput)?;
        Ok(Self {
            binding: session.create_binding()?,
            allocator: Allocator::new(session, memory.clone())?,
            memory,
            input: None,
        })
    }

    /// Lays a batch into the memory and binds it, and room for the outputs.
    fn bind(
        &mut self,
        name: &str,
        element: Element,
        shape: &[usize],
        values: &[f32],
        outputs: &[String],
    ) -> ort::Result<()> {
        let mut tensor = match self.input.take() {
            Some((of, tensor)) if of == shape => tensor,
            _ => DynTensor::new(&self.allocator, element.data_type(), shape)?,
        };
        match element {
            Element::Float32 => tensor.try_extract_tensor_mut::<f32>()?.1.copy_from_slice(values),
            Element::Float16 => fill(tensor.try_extract_tensor_mut::<f16>()?.1, values, to_f16),
            Element::Uint8 => fill(tensor.try_extract_tensor_mut::<u8>()?.1, values, to_u8),
        }
        // ONNX Runtime copies to the device when it is told of the tensor, so it must be told each time.
        self.binding.bind_input(name, &tensor)?;
        for output in outputs {
            // And what it made of the last batch has the size of the last batch.
            self.binding.bind_output_to_device(output, &self.memory)?;
        }
        self.input = Some((shape.to_vec(), tensor));
        Ok(())
    }
}

fn fill<T>(places: &mut [T], values: &[f32], convert: impl Fn(f32) -> T) {
    for (place, value) in places.iter_mut().zip(values) {
        *place = convert(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Device;
    use crate::model::onnx_proto::{self, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
    use prost::Message as _;

    /// `y = x W` with `W` of 3 x 2.
    fn product() -> Network {
        let graph = GraphProto {
            name: "product".to_owned(),
            node: vec![NodeProto::new("MatMul", &["x", "w"], &["y"])],
            initializer: vec![TensorProto::float("w", &[3, 2], [1.0, 0.0, 0.0, 10.0, 1.0, 100.0])],
            input: vec![ValueInfoProto::float_batch("x", "batch", &[3])],
            output: vec![ValueInfoProto::float_batch("y", "batch", &[2])],
            ..GraphProto::default()
        };
        let bytes = ModelProto::of(graph).encode_to_vec().into();
        Network { file: "product.onnx".to_owned(), bytes, opset: onnx_proto::OPSET_VERSION, external_data: Vec::new() }
    }

    fn opened<T>(then: impl FnOnce(Place<'_>, Engine) -> T) -> T {
        let runtime = Runtime::load(None).unwrap();
        let compute = Compute::on(Device::Cpu, 1);
        let place = Place { runtime: &runtime, provider: Provider::Cpu, compute: &compute, package: "memory:///" };
        let tensors =
            Tensors { input: None, row: Some(vec![3]), rows: "rows", kinds: ("input", "output"), outputs: None };
        then(place, Engine::open(place, &product(), &tensors, &PrepackedWeights::new()).unwrap())
    }

    fn run(engine: &mut Engine, num_rows: usize) -> (Vec<i64>, Vec<f32>) {
        let values: Vec<f32> = (0..num_rows * 3).map(|value| value as f32).collect();
        let copied = |outputs: &[Output<'_>]| (outputs[0].shape.clone(), outputs[0].values.to_vec());
        engine.run(&values, num_rows, copied).unwrap()
    }

    #[test]
    fn memory_bound_beforehand_gives_what_the_callers_memory_gives_whatever_the_batch() {
        opened(|_, mut engine| {
            let sizes = [2, 5, 5, 2, 1];
            let expected = sizes.map(|size| run(&mut engine, size));
            assert_eq!(expected[0], (vec![2, 2], vec![2.0, 210.0, 8.0, 540.0]));
            // The memory of a GPU is bound in the same way; that of the CPU is there everywhere.
            engine.bound = Some(Bound::new(&engine.session, AllocationDevice::CPU).unwrap());
            assert_eq!(sizes.map(|size| run(&mut engine, size)), expected);
        });
    }

    #[test]
    fn a_network_of_a_fixed_batch_is_given_full_batches_and_a_rest_filled_up() {
        opened(|_, mut engine| {
            let expected = [1, 3, 6, 7].map(|size| run(&mut engine, size));
            engine.fixed_batch = Some(3);
            assert_eq!([1, 3, 6, 7].map(|size| run(&mut engine, size)), expected);
        });
    }

    #[test]
    fn work_that_is_left_to_the_cpu_is_found_in_the_runtimes_own_record() {
        opened(|place, engine| {
            let found = assignment::assignment(&engine.session).unwrap();
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(
                (found[0].provider.as_str(), &*found[0].operators),
                ("CPUExecutionProvider", &["MatMul".to_owned()][..])
            );
            check_assignment(&engine.session, place.runtime, Provider::Cpu, place.package).unwrap();
            let error = check_assignment(&engine.session, place.runtime, Provider::Cuda, place.package).unwrap_err();
            assert_eq!(error.to_string(), "device \"cuda\" would leave work of memory:/// to the CPU: MatMul");
        });
    }
}
