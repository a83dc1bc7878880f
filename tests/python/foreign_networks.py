"""Makes small networks as other programs export them, and computes independently what the program should have made of them.

    foreign_networks.py make WORK
    foreign_networks.py check WORK NAME LATENTS

`make` writes pictures of several shapes to WORK/images, and to WORK/networks for each NAME an ONNX file with seeded weights:

    anomalib   3 x 32 x 32 from 0 to 1, normalized within; pred_score, anomaly_map, and two masks that nobody asked for
    keras      channels last, a name with a slash, an open batch; a dense layer
    pair       an encoder with z_mean and z_log_var, and a decoder beside it
    half       half precision throughout, in and out
    int8       quantized weights and activations (QDQ), 32-bit floats in and out
    pixels     8-bit pixels in, channels last, batches of exactly 4
    double     64-bit floats out

and for the tests of what is refused: `nan` (the logarithm of a negative number) and `two_inputs`.

`check` prepares the pictures with Pillow, runs the ONNX file itself, and compares each row of LATENTS (a Delta table).
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from PIL import Image

from check import check
from published import read_delta

OPSET, IR_VERSION = 17, 8
FLOAT, HALF, DOUBLE, UINT8, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.UINT8,
    TensorProto.BOOL,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Seven pictures make a batch of four and a rest.
SHAPES = [(32, 32), (40, 24), (24, 40), (61, 33), (96, 96), (17, 50), (200, 120)]

# How far vectors may be apart, relative to 1 + their own size: other batches add up in another order, in whatever precision.
TOLERANCE = {"half": 2e-3, "int8": 5e-3}


class Graph:
    """A network under construction, with weights by seed."""

    def __init__(self, seed: int):
        self.rng, self.nodes, self.constants, self.number = np.random.default_rng(seed), [], [], 0

    def constant(self, values: np.ndarray) -> str:
        self.number += 1
        self.constants.append(numpy_helper.from_array(values, f"c{self.number}"))
        return f"c{self.number}"

    def weights(self, *shape: int, dtype=np.float32) -> str:
        return self.constant((self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(dtype))

    def node(self, operator: str, inputs: list[str], output: str | None = None, **attributes) -> str:
        self.number += 1
        output = output or f"/{operator.lower()}_{self.number}/output_0"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def save(self, path: Path, inputs: list[tuple], outputs: list[tuple], **metadata: str) -> None:
        info = lambda values: [helper.make_tensor_value_info(*value) for value in values]  # noqa: E731
        graph = helper.make_graph(self.nodes, path.stem, info(inputs), info(outputs), self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name, model.producer_version = "pytorch", "2.9.1"
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)


def anomalib(path: Path) -> None:
    g = Graph(1)
    centered = g.node("Sub", ["input", g.constant(np.array(MEAN, np.float32).reshape(1, 3, 1, 1))])
    x = g.node("Div", [centered, g.constant(np.array(STD, np.float32).reshape(1, 3, 1, 1))])
    features = g.node("Relu", [g.node("Conv", [x, g.weights(12, 3, 3, 3)], pads=[1, 1, 1, 1])])
    distance = g.node("Conv", [g.node("Mul", [features, features]), g.constant(np.full((1, 12, 1, 1), 0.1, np.float32))])
    g.node("Sqrt", [distance], "anomaly_map")
    largest = g.node("ReduceMax", ["anomaly_map"], axes=[1, 2, 3], keepdims=0)
    g.node("Identity", [largest], "pred_score")
    half = g.constant(np.array(0.5, np.float32))
    g.node("Greater", ["pred_score", half], "pred_label")
    g.node("Greater", ["anomaly_map", half], "pred_mask")
    g.node("Flatten", [g.node("GlobalAveragePool", [features])], "/pool/Flatten_output_0")
    # What is made of the pooled features keeps them in the graph.
    outputs = [("pred_score", FLOAT, ["batch"]), ("pred_label", BOOL, ["batch"])]
    outputs += [(name, kind, ["batch", 1, 32, 32]) for name, kind in [("anomaly_map", FLOAT), ("pred_mask", BOOL)]]
    g.save(path, [("input", FLOAT, ["batch", 3, 32, 32])], outputs, task="segmentation")


def keras(path: Path) -> None:
    g = Graph(2)
    x = g.node("Transpose", ["serving/input"], perm=[0, 3, 1, 2])
    x = g.node("Relu", [g.node("Conv", [x, g.weights(8, 3, 3, 3)], strides=[2, 2])])
    g.node("MatMul", [g.node("ReduceMean", [x], axes=[2, 3], keepdims=0), g.weights(8, 10)], "dense/BiasAdd:0")
    g.save(path, [("serving/input", FLOAT, ["unk__1", 24, 40, 3])], [("dense/BiasAdd:0", FLOAT, ["unk__2", 10])])


def pair(path: Path) -> None:
    g = Graph(3)
    x = g.node("Flatten", ["x"])
    g.node("Gemm", [x, g.weights(6, 256)], "z_mean", transB=1)
    g.node("Gemm", [x, g.weights(6, 256)], "z_log_var", transB=1)
    g.save(path, [("x", FLOAT, ["n", 1, 16, 16])], [(name, FLOAT, ["n", 6]) for name in ("z_mean", "z_log_var")])
    g = Graph(4)
    x = g.node("Sigmoid", [g.node("Gemm", ["z", g.weights(256, 6)], transB=1)])
    g.node("Reshape", [x, g.constant(np.array([0, 1, 16, 16]))], "decoded")
    g.save(path.with_name("decoder.onnx"), [("z", FLOAT, ["n", 6])], [("decoded", FLOAT, ["n", 1, 16, 16])])


def half(path: Path) -> None:
    g = Graph(5)
    x = g.node("Relu", [g.node("Conv", ["pixel_values", g.weights(16, 3, 3, 3, dtype=np.float16)], strides=[2, 2])])
    g.node("Flatten", [g.node("GlobalAveragePool", [x])], "image_embeds")
    g.save(path, [("pixel_values", HALF, ["batch", 3, "height", "width"])], [("image_embeds", HALF, ["batch", 16])])


def int8(path: Path) -> None:
    g = Graph(6)
    x = g.node("Relu", [g.node("Conv", ["image", g.weights(16, 3, 3, 3)])])
    x = g.node("Relu", [g.node("Conv", [x, g.weights(16, 16, 3, 3)], strides=[2, 2])])
    g.node("MatMul", [g.node("Flatten", [g.node("GlobalAveragePool", [x])]), g.weights(16, 12)], "embedding")
    floats = path.with_name("floats.onnx")
    g.save(floats, [("image", FLOAT, ["batch", 3, 32, 32])], [("embedding", FLOAT, ["batch", 12])])

    class Noise(CalibrationDataReader):
        batches = iter([{"image": np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)}])

        def get_next(self):
            return next(self.batches, None)

    quantize_static(floats, path, Noise(), quant_format=QuantFormat.QDQ)
    floats.unlink()


def pixels(path: Path) -> None:
    g = Graph(7)
    x = g.node("Mul", [g.node("Cast", ["bytes"], to=FLOAT), g.constant(np.array(1 / 255, np.float32))])
    x = g.node("Conv", [g.node("Transpose", [x], perm=[0, 3, 1, 2]), g.weights(9, 3, 5, 5)], strides=[3, 3])
    g.node("ReduceMean", [g.node("Relu", [x])], "features", axes=[2, 3], keepdims=0)
    g.save(path, [("bytes", UINT8, [4, 20, 28, 3])], [("features", FLOAT, [4, 9])])


def double(path: Path) -> None:
    g = Graph(8)
    x = g.node("Cast", [g.node("Flatten", ["image"])], to=DOUBLE)
    g.node("MatMul", [x, g.constant(g.rng.normal(size=(64, 5)) / 8)], "embedding")
    g.save(path, [("image", FLOAT, ["batch", 1, 8, 8])], [("embedding", DOUBLE, ["batch", 5])])


def nan(path: Path) -> None:
    g = Graph(9)
    # The mean of a picture less 2 is below 0.
    x = g.node("ReduceMean", ["image"], axes=[2, 3], keepdims=0)
    g.node("Log", [g.node("Sub", [x, g.constant(np.array(2, np.float32))])], "embedding")
    g.save(path, [("image", FLOAT, ["batch", 3, 8, 8])], [("embedding", FLOAT, ["batch", 3])])


def two_inputs(path: Path) -> None:
    g = Graph(10)
    g.node("Mul", [g.node("ReduceMean", ["image"], axes=[2, 3], keepdims=0), "temperature"], "embedding")
    inputs = [("image", FLOAT, ["batch", 3, 8, 8]), ("temperature", FLOAT, [1])]
    g.save(path, inputs, [("embedding", FLOAT, ["batch", 3])])


NETWORKS = [anomalib, keras, pair, half, int8, pixels, double, nan, two_inputs]


def make(work: Path) -> str:
    images = work / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / (3 + channel + number)) + np.cos(y / (4 + channel)) for channel in range(3)]
        picture = 110 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 10, (height, width, 3))
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(images / f"{number}.png")
    for network in NETWORKS:
        network(work / "networks" / network.__name__ / f"{network.__name__}.onnx")
    return f"{len(SHAPES)} pictures, {len(NETWORKS)} networks"


def stretched(image: Image.Image, width: int, height: int, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode).resize((width, height), Image.Resampling.BILINEAR))


def centered(image: Image.Image, resize: int, side: int, mean: list[float], std: list[float]) -> np.ndarray:
    """Bicubic, the shorter side to `resize`, cut to `side` in the center, channels first: torchvision's `Resize` and `CenterCrop`."""
    shorter = min(image.size)
    width, height = (resize * length // shorter for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    cut = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((cut - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def unit(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) / 255).astype(np.float32)


PREPARE = {
    "anomalib": lambda image: unit(stretched(image, 32, 32)).transpose(2, 0, 1),
    "keras": lambda image: unit(stretched(image, 40, 24)),
    "pair": lambda image: unit(stretched(image, 16, 16, "L"))[None],
    "half": lambda image: centered(image, 224, 224, CLIP_MEAN, CLIP_STD).astype(np.float16),
    # 256 to 224, as it was with ImageNet.
    "int8": lambda image: centered(image, 37, 32, MEAN, STD).astype(np.float32),
    "pixels": lambda image: stretched(image, 28, 20),
    "double": lambda image: unit(stretched(image, 8, 8, "L"))[None],
}


def expected(name: str, session: onnxruntime.InferenceSession, tensor: np.ndarray, networks: Path) -> dict:
    """The columns of a picture's row that the network's outputs become."""
    fixed = session.get_inputs()[0].shape[0]
    batch = np.repeat(tensor[None], fixed if isinstance(fixed, int) else 1, axis=0)
    outputs = session.run(None, {session.get_inputs()[0].name: batch})
    values = {output.name: value[0] for output, value in zip(session.get_outputs(), outputs, strict=True)}
    if name == "anomalib":
        return {"pred_score": values["pred_score"], "embedding": values["/pool/Flatten_output_0"]}
    if name == "pair":
        decoder = onnxruntime.InferenceSession(networks / "decoder.onnx", providers=["CPUExecutionProvider"])
        decoded = decoder.run(None, {"z": values["z_mean"][None]})[0][0]
        squared = (tensor.astype(np.float64) - decoded) ** 2
        kl = -0.5 * np.sum(1 + values["z_log_var"] - values["z_mean"] ** 2 - np.exp(values["z_log_var"]))
        rows = {"embedding": values["z_mean"], "logvar": values["z_log_var"]}
        return rows | {"mean_squared_error": squared.mean(), "kl_divergence": kl}
    return {"embedding": next(iter(values.values()))}


def compare(work: Path, name: str, latents: Path) -> str:
    networks = work / "networks" / name
    model = onnx.load(networks / f"{name}.onnx")
    if name == "anomalib":
        model.graph.output.append(helper.make_tensor_value_info("/pool/Flatten_output_0", FLOAT, ["batch", 12]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = {row["image_id"]: row for row in read_delta(latents).to_pylist()}
    check(len(rows) == len(SHAPES), f"{len(rows)} rows for {len(SHAPES)} pictures")
    tolerance, largest = TOLERANCE.get(name, 1e-4), 0.0
    for number in range(len(SHAPES)):
        row = rows[f"{number}.png"]
        check(row["status"] == "ok", f"{number}.png is {row['status']}: {row['error_message']}")
        with Image.open(work / "images" / f"{number}.png") as image:
            tensor = PREPARE[name](image)
        for column, values in expected(name, session, tensor, networks).items():
            found, wanted = np.array(row[column], np.float64), np.asarray(values, np.float64)
            check(found.shape == wanted.shape, f"{column} of {number}.png has shape {found.shape}, not {wanted.shape}")
            difference = float(np.max(np.abs(found - wanted) / (1 + np.abs(wanted))))
            check(difference <= tolerance, f"{column} of {number}.png differs by {difference}")
            largest = max(largest, difference)
    vectors = np.array([row["embedding"] for row in rows.values()])
    check(float(np.ptp(vectors, axis=0).max()) > 10 * tolerance, "all vectors are alike, so nothing was compared")
    return f"{name}: {len(rows)} rows, largest difference {largest:.1e}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", work]:
            print(make(Path(work)))
        case ["check", work, name, latents]:
            print(compare(Path(work), name, Path(latents)))
        case _:
            sys.exit(__doc__)
