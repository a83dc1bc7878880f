//! The part of the ONNX protobuf format that this program writes and inspects.
//!
//! Field numbers are those of `onnx.proto` (<https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>); a field that is
//! not declared here is skipped when reading. So any ONNX file can be read for its versions, its graph's inputs and
//! outputs and the files that hold its weights, but a model that was read **must not be written back**: it would lose
//! what is not declared. This is not an ONNX library: it checks no types and runs nothing.
//!
//! Decode from [`Bytes`] (`ModelProto::decode(bytes)`): the tensors then share the file's buffer instead of copying
//! the weights. Nested messages are refused by `prost` beyond a depth of 100, which bounds every recursion here.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::{Enumeration, Message, Oneof};

/// A model file: versions, where it comes from, and its graph.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the file format itself (8 goes with opset 17).
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    /// Program that wrote the file.
    #[prost(string, tag = "2")]
    pub producer_name: String,
    /// Version of that program.
    #[prost(string, tag = "3")]
    pub producer_version: String,
    /// What the model is, in words.
    #[prost(string, tag = "6")]
    pub doc_string: String,
    /// The computation.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets that the nodes are written in.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Free key-value pairs.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
    /// Functions that nodes of the graph may call.
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
}

/// An operator set: a domain (empty for ONNX's own) and its version.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct OperatorSetIdProto {
    /// Domain of the operators; empty for ONNX's own.
    #[prost(string, tag = "1")]
    pub domain: String,
    /// Version of the operator set.
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// A key with its value.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct StringStringEntryProto {
    /// The key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Nodes in topological order, the constants they use, and what goes in and out.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// The operations, each after those whose outputs it uses.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the graph.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Named constants, such as weights.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// What the caller gives. Files of IR version 3 and before list the initializers here too.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// What the caller gets.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
    /// Named sparse constants.
    #[prost(message, repeated, tag = "15")]
    pub sparse_initializer: Vec<SparseTensorProto>,
}

/// One operation.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of the values it reads.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the values it makes.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Name of the operator, such as `Gemm`.
    #[prost(string, tag = "4")]
    pub op_type: String,
    /// Settings of the operator.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Domain of the operator; empty for ONNX's own.
    #[prost(string, tag = "7")]
    pub domain: String,
}

/// A setting of an operator. Which field holds it is told by `kind`.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name of the setting.
    #[prost(string, tag = "1")]
    pub name: String,
    /// An integer; optional, since a reader tells a zero from an absent value.
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// A tensor, as in a `Constant` node.
    #[prost(message, optional, tag = "5")]
    pub t: Option<TensorProto>,
    /// A subgraph, as in an `If` node.
    #[prost(message, optional, tag = "6")]
    pub g: Option<GraphProto>,
    /// Several tensors.
    #[prost(message, repeated, tag = "10")]
    pub tensors: Vec<TensorProto>,
    /// Several subgraphs.
    #[prost(message, repeated, tag = "11")]
    pub graphs: Vec<GraphProto>,
    /// Which kind of value it is (`type` in the format).
    #[prost(enumeration = "AttributeKind", tag = "20")]
    pub kind: i32,
    /// A sparse tensor.
    #[prost(message, optional, tag = "22")]
    pub sparse_tensor: Option<SparseTensorProto>,
    /// Several sparse tensors.
    #[prost(message, repeated, tag = "23")]
    pub sparse_tensors: Vec<SparseTensorProto>,
}

/// Kinds of attributes that this program writes; others are kept as numbers when read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum AttributeKind {
    /// Not said.
    Undefined = 0,
    /// The value is in `i`.
    Int = 2,
}

/// A constant: its values stand in the file, or in a file beside it.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Shape; empty for a scalar.
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    /// Type of the elements.
    #[prost(enumeration = "DataType", tag = "2")]
    pub data_type: i32,
    /// Name by which nodes refer to it.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Values, row-major, little-endian. (Files may hold them in typed fields instead; those are not read here.)
    #[prost(bytes = "bytes", tag = "9")]
    pub raw_data: Bytes,
    /// For values in another file: `location` (path relative to the model), `offset`, `length`, `checksum`.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// Where the values are.
    #[prost(enumeration = "DataLocation", tag = "14")]
    pub data_location: i32,
}

/// Where a tensor's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum DataLocation {
    /// In the model file.
    Default = 0,
    /// In the file that `external_data` names.
    External = 1,
}

/// A tensor stored as its non-zero values and their places.
#[derive(Clone, PartialEq, Message)]
pub struct SparseTensorProto {
    /// The values, which also carry the tensor's name.
    #[prost(message, optional, tag = "1")]
    pub values: Option<TensorProto>,
    /// Their places.
    #[prost(message, optional, tag = "2")]
    pub indices: Option<TensorProto>,
}

/// Element types of the images, latents and scores that a model takes or gives; others are kept as numbers when read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum DataType {
    /// Not said.
    Undefined = 0,
    /// 32-bit float.
    Float = 1,
    /// 8-bit unsigned integer.
    Uint8 = 2,
    /// 8-bit signed integer.
    Int8 = 3,
    /// 32-bit signed integer.
    Int32 = 6,
    /// 64-bit signed integer.
    Int64 = 7,
    /// UTF-8 text.
    String = 8,
    /// Truth value.
    Bool = 9,
    /// IEEE 16-bit float.
    Float16 = 10,
    /// 64-bit float.
    Double = 11,
    /// Brain float: the upper half of a 32-bit float.
    Bfloat16 = 16,
}

/// Name and type of a value that goes into or comes out of a graph.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name of the value.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

/// Type of a value.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// Element type and shape of a dense tensor; `None` for the other kinds (sequence, map, optional, sparse tensor).
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

/// Type of a dense tensor (`TypeProto.Tensor` in the format).
#[derive(Clone, PartialEq, Message)]
pub struct TensorTypeProto {
    /// Type of the elements.
    #[prost(enumeration = "DataType", tag = "1")]
    pub elem_type: i32,
    /// Shape; `None` when even the number of dimensions is open.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

/// Shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// Its dimensions.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// One dimension (`TensorShapeProto.Dimension` in the format).
#[derive(Clone, PartialEq, Message)]
pub struct DimensionProto {
    /// Its size; `None` when open and without a name.
    #[prost(oneof = "DimensionSize", tags = "1, 2")]
    pub size: Option<DimensionSize>,
}

/// Size of a dimension: a number, or a name where the caller chooses.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum DimensionSize {
    /// A fixed size.
    #[prost(int64, tag = "1")]
    Value(i64),
    /// A dynamic size; equal names are equal sizes.
    #[prost(string, tag = "2")]
    Param(String),
}

/// A function that a model defines for its own nodes.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    /// Name of the function.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its operations.
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<NodeProto>,
    /// Domain in which nodes find it.
    #[prost(string, tag = "10")]
    pub domain: String,
    /// Settings with their values where a node gives none.
    #[prost(message, repeated, tag = "11")]
    pub attribute_proto: Vec<AttributeProto>,
}

impl ModelProto {
    /// A model of a graph, in [`OPSET_VERSION`].
    pub fn of(graph: GraphProto) -> Self {
        Self {
            ir_version: IR_VERSION,
            graph: Some(graph),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET_VERSION }],
            ..Self::default()
        }
    }
}

impl NodeProto {
    /// A node without attributes, named after its first output.
    pub fn new(op_type: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        Self {
            input: inputs.iter().copied().map(String::from).collect(),
            output: outputs.iter().copied().map(String::from).collect(),
            name: outputs.first().copied().unwrap_or_default().to_owned(),
            op_type: op_type.to_owned(),
            attribute: Vec::new(),
            domain: String::new(),
        }
    }

    /// The same node with an integer attribute more.
    #[must_use]
    pub fn with_int(mut self, name: &str, value: i64) -> Self {
        self.attribute.push(AttributeProto {
            name: name.to_owned(),
            i: Some(value),
            kind: AttributeKind::Int.into(),
            ..AttributeProto::default()
        });
        self
    }
}

impl TensorProto {
    /// A 32-bit float constant from its row-major values.
    pub fn float(name: &str, dims: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let raw_data = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self::from_raw(name, dims, DataType::Float, raw_data)
    }

    /// A one-dimensional 64-bit integer constant, such as a shape.
    pub fn int64_vector(name: &str, values: &[usize]) -> Self {
        let raw_data = values.iter().flat_map(|&value| to_i64(value).to_le_bytes()).collect();
        Self::from_raw(name, &[values.len()], DataType::Int64, raw_data)
    }

    fn from_raw(name: &str, dims: &[usize], data_type: DataType, raw_data: Bytes) -> Self {
        Self {
            dims: dims.iter().copied().map(to_i64).collect(),
            data_type: data_type.into(),
            name: name.to_owned(),
            raw_data,
            ..Self::default()
        }
    }
}

impl ValueInfoProto {
    /// A 32-bit float tensor whose first dimension has the name `first_dim` and whose others are fixed.
    pub fn float_batch(name: &str, first_dim: &str, other_dims: &[usize]) -> Self {
        let sizes = std::iter::once(DimensionSize::Param(first_dim.to_owned()))
            .chain(other_dims.iter().map(|&size| DimensionSize::Value(to_i64(size))));
        let shape = TensorShapeProto { dim: sizes.map(|size| DimensionProto { size: Some(size) }).collect() };
        let tensor_type = TensorTypeProto { elem_type: DataType::Float.into(), shape: Some(shape) };
        Self { name: name.to_owned(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
    }
}

/// A size as the format writes it.
#[expect(clippy::cast_possible_wrap, reason = "no tensor in memory has more than isize::MAX elements")]
fn to_i64(size: usize) -> i64 {
    size as i64
}

/// ONNX operator set of the models that this program writes, and the version of the file format that goes with it.
pub const OPSET_VERSION: i64 = 17;
const IR_VERSION: i64 = 8;

/// The oldest opset for which ONNX Runtime promises to run a model.
pub const OLDEST_OPSET: i64 = 7;

/// Domains whose operators ONNX Runtime brings itself. All others are libraries of somebody's own, which are not loaded.
const KNOWN_DOMAINS: [&str; 4] = ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"];

/// Why a network is not given to ONNX Runtime.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphFault {
    /// There is nothing to run.
    #[error("it has no graph")]
    NoGraph,
    /// There is no opset of ONNX's own.
    #[error("it names no opset")]
    NoOpset,
    /// An opset from before ONNX was stable.
    #[error("its opset is {version}, and the oldest that is run is {OLDEST_OPSET}")]
    OldOpset {
        /// Version of the opset.
        version: i64,
    },
    /// An operator that needs a library of its own.
    #[error("its operator `{op_type}` is of the domain `{domain}`, and operators of one's own are not loaded")]
    ForeignOperator {
        /// Name of the operator.
        op_type: String,
        /// Its domain.
        domain: String,
    },
}

impl GraphFault {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoGraph => None,
            Self::NoOpset | Self::OldOpset { .. } => Some("export the model again, with opset 17 or so".to_owned()),
            Self::ForeignOperator { .. } => Some("export the model with ONNX's own operators alone".to_owned()),
        }
    }
}

/// Whether a tensor of this name lies within the graph: made by one of its nodes, and no output.
pub fn is_within(model: &ModelProto, name: &str) -> bool {
    let Some(graph) = &model.graph else { return false };
    graph.node.iter().any(|node| node.output.iter().any(|output| output == name))
        && graph.output.iter().all(|output| output.name != name)
}

/// The file of a model with more of its tensors as outputs.
///
/// Protobuf merges what is written one after the other, and appends to lists. So the outputs are appended to the file, and what is
/// not declared here stays in it. Their types are left to whoever loads it.
pub fn with_outputs(file: Bytes, names: &[&str]) -> Bytes {
    if names.is_empty() {
        return file;
    }
    let output = names.iter().map(|name| ValueInfoProto { name: (*name).to_owned(), r#type: None }).collect();
    let more = ModelProto { graph: Some(GraphProto { output, ..GraphProto::default() }), ..ModelProto::default() };
    [file, more.encode_to_vec().into()].concat().into()
}

/// Version of the opset of ONNX's own operators, if the model names one.
pub fn opset(model: &ModelProto) -> Option<i64> {
    let mut own = model.opset_import.iter().filter(|opset| matches!(opset.domain.as_str(), "" | "ai.onnx"));
    own.next().map(|opset| opset.version)
}

/// Checks what can be told of a network without running it: that it has an opset which is run, and operators that are there.
pub fn check(model: &ModelProto) -> Result<(), GraphFault> {
    let graph = model.graph.as_ref().ok_or(GraphFault::NoGraph)?;
    let version = opset(model).ok_or(GraphFault::NoOpset)?;
    if version < OLDEST_OPSET {
        return Err(GraphFault::OldOpset { version });
    }
    // The functions of the model itself are as good as known operators.
    let functions: BTreeSet<(&str, &str)> =
        model.functions.iter().map(|function| (function.domain.as_str(), function.name.as_str())).collect();
    let is_known = |node: &NodeProto| {
        KNOWN_DOMAINS.contains(&node.domain.as_str()) || functions.contains(&(&node.domain, &node.op_type))
    };
    let mut foreign = None;
    let mut visit = |part: Part<'_>| {
        if let Part::Node(node) = part
            && !is_known(node)
            && foreign.is_none()
        {
            foreign = Some(GraphFault::ForeignOperator { op_type: node.op_type.clone(), domain: node.domain.clone() });
        }
    };
    visit_graph(graph, &mut visit);
    visit_functions(&model.functions, &mut visit);
    foreign.map_or(Ok(()), Err)
}

/// Files, relative to the model's folder, that hold weights of the model, each once and in order.
///
/// Looks into the graph, its subgraphs and the model's functions, at initializers and at tensors in attributes. The
/// paths are as the file has them: whoever opens one must first refuse those that leave the model's folder.
pub fn external_data_locations(model: &ModelProto) -> Vec<String> {
    let mut locations = BTreeSet::new();
    let mut visit = |part: Part<'_>| {
        if let Part::Tensor(tensor) = part
            && tensor.data_location() == DataLocation::External
        {
            let entries = tensor.external_data.iter().filter(|entry| entry.key == "location");
            locations.extend(entries.map(|entry| entry.value.clone()));
        }
    };
    if let Some(graph) = &model.graph {
        visit_graph(graph, &mut visit);
    }
    visit_functions(&model.functions, &mut visit);
    locations.into_iter().collect()
}

/// What a model is made of, as far as somebody asks for it.
enum Part<'model> {
    Node(&'model NodeProto),
    Tensor(&'model TensorProto),
}

fn visit_functions<'model>(functions: &'model [FunctionProto], visit: &mut impl FnMut(Part<'model>)) {
    for function in functions {
        visit_nodes(&function.node, visit);
        visit_attributes(&function.attribute_proto, visit);
    }
}

fn visit_graph<'model>(graph: &'model GraphProto, visit: &mut impl FnMut(Part<'model>)) {
    visit_tensors(&graph.initializer, &graph.sparse_initializer, visit);
    visit_nodes(&graph.node, visit);
}

fn visit_nodes<'model>(nodes: &'model [NodeProto], visit: &mut impl FnMut(Part<'model>)) {
    for node in nodes {
        visit(Part::Node(node));
        visit_attributes(&node.attribute, visit);
    }
}

fn visit_attributes<'model>(attributes: &'model [AttributeProto], visit: &mut impl FnMut(Part<'model>)) {
    for attribute in attributes {
        visit_tensors(&attribute.t, &attribute.sparse_tensor, visit);
        visit_tensors(&attribute.tensors, &attribute.sparse_tensors, visit);
        for graph in attribute.g.iter().chain(&attribute.graphs) {
            visit_graph(graph, visit);
        }
    }
}

fn visit_tensors<'model>(
    dense: impl IntoIterator<Item = &'model TensorProto>,
    sparse: impl IntoIterator<Item = &'model SparseTensorProto>,
    visit: &mut impl FnMut(Part<'model>),
) {
    let sparse_parts = sparse.into_iter().flat_map(|tensor| tensor.values.iter().chain(&tensor.indices));
    for tensor in dense.into_iter().chain(sparse_parts) {
        visit(Part::Tensor(tensor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external_tensor(location: &str) -> TensorProto {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        TensorProto {
            external_data: vec![entry("offset", "4096"), entry("location", location)],
            data_location: DataLocation::External.into(),
            ..TensorProto::default()
        }
    }

    fn node_with(attribute: AttributeProto) -> NodeProto {
        NodeProto { attribute: vec![attribute], ..NodeProto::default() }
    }

    #[test]
    fn a_value_info_has_the_bytes_that_the_format_prescribes() {
        // Written by hand from onnx.proto: name (1), type (2) { tensor_type (1) { elem_type (1), shape (2) { dim (1)
        // { dim_param (2) }, dim (1) { dim_value (1) } } } }.
        let expected = b"\x0a\x01x\x12\x0f\x0a\x0d\x08\x01\x12\x09\x0a\x03\x12\x01n\x0a\x02\x08\x07";
        assert_eq!(ValueInfoProto::float_batch("x", "n", &[7]).encode_to_vec(), expected);
    }

    #[test]
    fn an_attribute_of_zero_is_written_and_read_back() {
        let node = NodeProto::new("Concat", &["a", "b"], &["c"]).with_int("axis", 0);
        let read = NodeProto::decode(node.encode_to_vec().as_slice()).unwrap();
        assert_eq!(read.attribute[0].i, Some(0));
        assert_eq!(read.attribute[0].kind(), AttributeKind::Int);
    }

    #[test]
    fn fields_that_are_not_declared_are_skipped() {
        let mut bytes = ModelProto { ir_version: 8, ..ModelProto::default() }.encode_to_vec();
        bytes.extend(b"\x28\x07\xa2\x01\x00"); // model_version (5) = 7 and an empty training_info (20)
        assert_eq!(ModelProto::decode(bytes.as_slice()).unwrap().ir_version, 8);
    }

    #[test]
    fn external_files_are_found_in_initializers_subgraphs_and_functions() {
        let subgraph = GraphProto { initializer: vec![external_tensor("branch.bin")], ..GraphProto::default() };
        let sparse = SparseTensorProto { values: None, indices: Some(external_tensor("places.bin")) };
        let graph = GraphProto {
            node: vec![
                node_with(AttributeProto { t: Some(external_tensor("constant.bin")), ..AttributeProto::default() }),
                node_with(AttributeProto { graphs: vec![subgraph], ..AttributeProto::default() }),
            ],
            initializer: vec![external_tensor("weights.bin"), external_tensor("weights.bin")],
            sparse_initializer: vec![sparse],
            ..GraphProto::default()
        };
        let function_node =
            node_with(AttributeProto { tensors: vec![external_tensor("function.bin")], ..AttributeProto::default() });
        let function = FunctionProto { node: vec![function_node], ..FunctionProto::default() };
        let model = ModelProto { graph: Some(graph), functions: vec![function], ..ModelProto::default() };

        let read = ModelProto::decode(Bytes::from(model.encode_to_vec())).unwrap();
        let expected = ["branch.bin", "constant.bin", "function.bin", "places.bin", "weights.bin"];
        assert_eq!(external_data_locations(&read), expected);
    }

    #[test]
    fn a_location_left_over_on_a_tensor_inside_the_file_is_not_a_file_to_open() {
        let tensor = TensorProto { data_location: DataLocation::Default.into(), ..external_tensor("stale.bin") };
        let graph = GraphProto { initializer: vec![tensor], ..GraphProto::default() };
        let model = ModelProto { graph: Some(graph), ..ModelProto::default() };
        assert!(external_data_locations(&model).is_empty());
    }

    /// A model of one graph with one node.
    fn model(domain: &str, opset: Option<i64>) -> ModelProto {
        let node = NodeProto { domain: domain.to_owned(), ..NodeProto::new("Gemm", &["x"], &["y"]) };
        ModelProto {
            graph: Some(GraphProto { node: vec![node], ..GraphProto::default() }),
            opset_import: opset
                .map(|version| OperatorSetIdProto { domain: String::new(), version })
                .into_iter()
                .collect(),
            ..ModelProto::default()
        }
    }

    #[test]
    fn a_network_is_refused_for_its_opset_or_for_operators_of_ones_own() {
        assert_eq!(check(&ModelProto::default()), Err(GraphFault::NoGraph));
        assert_eq!(check(&model("", None)), Err(GraphFault::NoOpset));
        assert_eq!(check(&model("", Some(6))), Err(GraphFault::OldOpset { version: 6 }));
        for domain in KNOWN_DOMAINS {
            assert_eq!(check(&model(domain, Some(17))), Ok(()));
        }
        let foreign = GraphFault::ForeignOperator { op_type: "Gemm".to_owned(), domain: "acme.ops".to_owned() };
        assert_eq!(check(&model("acme.ops", Some(17))), Err(foreign.clone()));
        // Also within a subgraph, and within a function; but a function of the model itself is known.
        let inner = model("acme.ops", Some(17));
        let mut outer = model("", Some(17));
        let attribute = AttributeProto { g: inner.graph.clone(), ..AttributeProto::default() };
        outer.graph.as_mut().unwrap().node.push(node_with(attribute));
        assert_eq!(check(&outer), Err(foreign.clone()));
        let function = FunctionProto {
            name: "Gemm".to_owned(),
            domain: "acme.ops".to_owned(),
            node: inner.graph.unwrap().node,
            ..FunctionProto::default()
        };
        let with_function = |name: &str| ModelProto {
            functions: vec![FunctionProto { name: name.to_owned(), ..function.clone() }],
            ..model("", Some(17))
        };
        assert_eq!(check(&with_function("Other")), Err(foreign));
        assert_eq!(check(&with_function("Gemm")), Ok(()));
    }

    #[test]
    fn weights_in_the_defaults_of_a_function_are_found() {
        let attribute = AttributeProto { t: Some(external_tensor("default.bin")), ..AttributeProto::default() };
        let function = FunctionProto { attribute_proto: vec![attribute], ..FunctionProto::default() };
        let model = ModelProto { functions: vec![function], ..ModelProto::default() };
        assert_eq!(external_data_locations(&model), ["default.bin"]);
    }
}
