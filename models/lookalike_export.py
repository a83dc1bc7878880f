"""Makes a model package of a network: model.toml with the contract, the ONNX files, and golden images that prove every copy of it.

    from lookalike_export import Preprocessing, export, export_torch

`export` takes a network in ONNX, from whatever framework; it needs numpy, onnx, onnxruntime, pyarrow and Pillow. `export_torch` takes a
network of PyTorch and makes the ONNX file itself. What both do beside writing files:

- The golden images go through Pillow and the network, and their tensors and outputs are kept. The program decodes, resizes and computes
  them again whenever it loads the package, and refuses a package for which something else comes out.
- With PyTorch, the golden outputs are those of PyTorch; ONNX Runtime must agree with them.
- What would go wrong later is refused here: outputs that are no numbers, that depend on the other images of a batch (as in a network
  that still is in training mode), or that have a shape which does not fit their role; a decoder that does not make the reconstruction
  of mu.

The contract is written last: a folder without model.toml is no package.
"""

import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

# Pillow's name for each filter of the contract.
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}
FITS = ("stretch", "crop", "pad")
CHANNELS = {"gray": 1, "rgb": 3}

# What a network's output can be, in the order in which the contract has them.
ROLES = ("embedding", "mu", "logvar", "reconstruction", "pred_score", "anomaly_map")

# The program's default: largest difference of an output, relative to 1 + its absolute value.
OUTPUT_TOLERANCE = 1e-3

# Opset 17 is old enough for every ONNX Runtime in use.
OPSET = 17

# Names that `export_torch` gives.
INPUT_TENSOR, LATENT_TENSOR = "image", "z"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input: decoded, upright, resized by Pillow, then `(pixel * scale - mean) / std`.

    `mean` and `std` have a value for each channel; the pixels times `scale`, 1 / 255 by default, lie between 0 and 1.
    """

    height: int
    width: int
    color: str = "rgb"  # or "gray"
    layout: str = "nchw"  # or "nhwc"
    filter: str = "bilinear"  # or "nearest", "bicubic", "lanczos", "area"
    fit: str = "stretch"  # or "crop": cover and cut to the center; or "pad": contain, on black
    resize: int | None = None  # with "crop", the shorter side before the cut: 256 for Resize(256) and CenterCrop(224)
    scale: float = 1 / 255
    mean: Sequence[float] | None = None  # by default 0
    std: Sequence[float] | None = None  # by default 1

    def __post_init__(self):
        known = {"color": CHANNELS, "layout": ("nchw", "nhwc"), "filter": FILTERS, "fit": FITS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and must be one of {', '.join(values)}")
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = getattr(self, name)
            values = [default] * self.channels if values is None else [float(value) for value in values]
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, and {self.color} images have {self.channels} channels")
            object.__setattr__(self, name, values)
        if self.resize is not None and (self.fit != "crop" or self.resize < max(self.height, self.width)):
            raise ValueError(f"resize is {self.resize}, and goes with fit \"crop\" alone, where it is at least the longer side of the input")

    @property
    def channels(self) -> int:
        return CHANNELS[self.color]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image's tensor."""
        size = (self.height, self.width)
        return (self.channels, *size) if self.layout == "nchw" else (*size, self.channels)

    def pixels(self, image: bytes) -> np.ndarray:
        """The pixels of an image file, height x width x channels, 0 to 255."""
        return self.resized(decoded(image, self.color))

    def resized(self, picture: Image.Image) -> np.ndarray:
        """The pixels of a decoded picture, height x width x channels, 0 to 255."""
        size, resample = (self.width, self.height), FILTERS[self.filter]
        if self.fit == "pad":
            picture = ImageOps.pad(picture, size, resample)
        elif self.fit == "crop":
            # In whole numbers, as torchvision's Resize and CenterCrop do it for squares.
            cover = (self.resize, self.resize) if self.resize else size
            by_width = cover[0] * picture.height >= cover[1] * picture.width
            of, side = (picture.width, cover[0]) if by_width else (picture.height, cover[1])
            covering = tuple(length * side // of for length in picture.size)
            left, top = (round((longer - length) / 2) for longer, length in zip(covering, size, strict=True))
            picture = picture.resize(covering, resample).crop((left, top, left + self.width, top + self.height))
        else:
            picture = picture.resize(size, resample)
        return np.asarray(picture).reshape(self.height, self.width, self.channels)

    def tensor(self, pixels: np.ndarray) -> np.ndarray:
        """The network's input of pixels, float32 of `shape`, or of any number of such pictures."""
        values = pixels.astype(np.float32) * np.float32(self.scale)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.moveaxis(values, -1, -3) if self.layout == "nchw" else values


def decoded(image: bytes, color: str) -> Image.Image:
    """An image file as the program decodes it: upright, gray or RGB, 8 bits."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    if picture.mode.startswith("I;16"):
        # Pillow would clip such samples at 255; their high byte is taken.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(np.floor(np.clip(np.asarray(picture), 0, 1) * 255 + 0.5).astype(np.uint8))
    return picture.convert("L" if color == "gray" else "RGB")


def export(
    out: str | Path,
    network: bytes | str | Path,
    preprocessing: Preprocessing,
    outputs: dict[str, str],
    *,
    name: str,
    decoder: bytes | str | Path | None = None,
    likelihood: dict | None = None,
    regions: int | None = None,
    images: Sequence[bytes] | None = None,
    input_tolerance: float | None = None,
    output_tolerance: float | None = None,
    file: str = "model.onnx",
    reference: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None,
) -> str:
    """Writes the package of `network`, an ONNX file or its bytes, to the folder `out`; returns the package's SHA-256.

    The network has one input, float32, with an open first axis. `outputs` has the name of the network's tensor for each role: `embedding`
    (a vector to search by), or `mu`, `logvar` and `reconstruction`, as far as there are such. `decoder` takes z to a reconstruction.
    `likelihood` is p(x|z), without which there is no ELBO: {"kind": "gaussian", "sigma": 0.05} or {"kind": "bernoulli"}. An embedding of
    parts of equal length, each of another region of the image, has so many `regions`.

    `images` are image files to replay; a few are enough, and what is not PNG is kept as PNG, since decoders of JPEG differ. `reference`
    gives the outputs, by role, that the package must reproduce; by default, those of ONNX Runtime.
    """
    out, outputs = Path(out), {role: outputs[role] for role in ROLES if role in outputs} | outputs
    if unknown := set(outputs) - set(ROLES):
        raise ValueError(f"there is no role {', '.join(sorted(unknown))}; roles are {', '.join(ROLES)}")
    if not {"embedding", "mu", "pred_score", "anomaly_map"} & set(outputs):
        raise ValueError("outputs needs an `embedding` or `mu` to search by, or a `pred_score` or `anomaly_map` to judge by")
    tolerance = OUTPUT_TOLERANCE if output_tolerance is None else output_tolerance
    images = [_without_loss(image) for image in (golden_images() if images is None else images)]
    tensors = np.stack([preprocessing.tensor(preprocessing.pixels(image)) for image in images])

    onnx_file = _read(network)
    graph = _Session(onnx_file)
    graph.check_input(preprocessing)
    found = graph.run(tensors, outputs)
    alone = {role: np.concatenate(parts) for role, parts in graph.run_alone(tensors, outputs).items()}
    _check_outputs(found, len(images), preprocessing, regions)
    _check_near(alone, found, tolerance, "depends on the other images of its batch; a network must be exported in evaluation mode")
    # Of an image by itself, so that the golden outputs are the same for any selection of images.
    golden = alone
    if reference is not None:
        golden = {role: np.asarray(values, np.float32) for role, values in reference(tensors).items()}
        _check_near(found, golden, tolerance, "is not in ONNX Runtime what the framework gives")
    files = {file: onnx_file}
    if decoder is not None:
        files["decoder.onnx"] = _read(decoder)
        if "mu" not in outputs:
            raise ValueError("a decoder takes latents, and outputs names no `mu`")
        made = _Session(files["decoder.onnx"]).run_only(golden["mu"])
        wanted = golden.get("reconstruction", made)
        _check_near({"decoder": made}, {"decoder": wanted}, tolerance, "does not make the reconstruction of mu")

    floats = pa.list_(pa.field("item", pa.float32()))
    columns = {"image": pa.array(images, pa.binary()), "input": pa.array([tensor.ravel() for tensor in tensors], floats)}
    columns |= {role: pa.array([row.ravel() for row in golden[role]], floats) for role in outputs}
    golden_file = io.BytesIO()
    pq.write_table(pa.table(columns), golden_file, compression="zstd")
    files["golden.parquet"] = golden_file.getvalue()

    contract = out / "model.toml"
    out.mkdir(parents=True, exist_ok=True)
    contract.unlink(missing_ok=True)
    for file_name, content in files.items():
        (out / file_name).write_bytes(content)
    graph_table = {"main": file} | ({"decoder": "decoder.onnx"} if decoder is not None else {})
    golden_table = {"file": "golden.parquet", "input_tolerance": input_tolerance, "output_tolerance": output_tolerance}
    tables = {
        "graph": graph_table,
        "input": {"tensor": graph.input.name} | dataclasses.asdict(preprocessing),
        "outputs": outputs | {"regions": regions},
        "likelihood": likelihood,
        "golden": golden_table,
        "files": {json.dumps(file_name): hashlib.sha256(files[file_name]).hexdigest() for file_name in sorted(files)},
    }
    text = _toml({"format_version": 1, "name": name}, tables)
    temporary = contract.with_suffix(".toml.tmp")
    temporary.write_text(text)
    temporary.replace(contract)
    return hashlib.sha256(text.encode()).hexdigest()


def export_torch(
    out: str | Path,
    network,
    preprocessing: Preprocessing,
    outputs: Sequence[str] = ("embedding",),
    *,
    decoder=None,
    latent_dim: int | None = None,
    **more,
) -> str:
    """Writes the package of `network`, a torch.nn.Module, to the folder `out`; returns the package's SHA-256.

    The network takes a batch of images and gives a tensor, or a tuple of tensors, whose roles are `outputs`. `decoder` is a Module from
    `latent_dim` latents to a reconstruction. All else is as with `export`.
    """
    import torch

    # Both are put back as they were: whoever trains may go on after an export.
    modules = [module for module in (network, decoder) if module is not None]
    states = [(module, module.training) for module in modules]
    device = next((value.device for value in network.state_dict().values()), torch.device("cpu"))

    def to_onnx(module, example, inputs, results) -> bytes:
        file = io.BytesIO()
        axes = {name: {0: "batch"} for name in (*inputs, *results)}
        with warnings.catch_warnings():
            # The exporter that traces is the one without packages of its own.
            for category in (DeprecationWarning, UserWarning, torch.jit.TracerWarning):
                warnings.filterwarnings("ignore", category=category)
            torch.onnx.export(
                module, (example,), file, input_names=inputs, output_names=results, dynamic_axes=axes, opset_version=OPSET, dynamo=False
            )
        return file.getvalue()

    def reference(tensors: np.ndarray) -> dict[str, np.ndarray]:
        # One by one, as golden outputs are.
        parts = [network(torch.from_numpy(tensor[None]).to(device)) for tensor in np.ascontiguousarray(tensors)]
        parts = [part if isinstance(part, (tuple, list)) else (part,) for part in parts]
        return {role: torch.cat(values).cpu().numpy() for role, values in zip(outputs, zip(*parts, strict=True), strict=True)}

    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            example = torch.zeros(2, *preprocessing.shape, device=device)
            onnx_file = to_onnx(network, example, [INPUT_TENSOR], list(outputs))
            decoder_file = None
            if decoder is not None:
                decoder_file = to_onnx(decoder, torch.zeros(2, latent_dim, device=device), [LATENT_TENSOR], ["reconstruction"])
            names = {role: role for role in outputs}
            return export(out, onnx_file, preprocessing, names, decoder=decoder_file, reference=reference, **more)
    finally:
        for module, was_training in states:
            module.train(was_training)


def golden_images() -> list[bytes]:
    """Pictures without loss, of several shapes, with edges, slopes and grain."""
    images = []
    for number, (width, height) in enumerate([(224, 224), (300, 300), (417, 250), (180, 311)]):
        y, x = np.mgrid[0:height, 0:width]
        rng = np.random.default_rng(number)
        waves = [np.sin(x / (5 + 3 * channel + number)) + np.cos(y / (4 + channel)) for channel in range(3)]
        picture = 96 + 48 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
        picture[height // 4 : height // 2, width // 3 : width // 2] = 255 - 40 * number
        images.append(_png(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))))
    return images


class _Session:
    """A network in ONNX Runtime."""

    def __init__(self, network: bytes):
        onnx.checker.check_model(onnx.load_from_string(network), full_check=True)
        self.session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise ValueError(f"the network has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), and takes one image")
        self.input = inputs[0]

    def check_input(self, preprocessing: Preprocessing) -> None:
        batch, *shape = self.input.shape
        wanted = list(preprocessing.shape)
        fits = len(shape) == 3 and all(isinstance(side, str | None) or side == other for side, other in zip(shape, wanted, strict=True))
        if self.input.type != "tensor(float)" or isinstance(batch, int) or not fits:
            raise ValueError(
                f"the input `{self.input.name}` is {self.input.type} of {self.input.shape}, "
                f"and must be tensor(float) with an open first axis, then {wanted}"
            )

    def run(self, tensors: np.ndarray, outputs: dict[str, str]) -> dict[str, np.ndarray]:
        there = [value.name for value in self.session.get_outputs()]
        if missing := [name for name in outputs.values() if name not in there]:
            raise ValueError(f"the network has no output {', '.join(missing)}; it has {', '.join(there)}")
        values = self.session.run(list(outputs.values()), {self.input.name: tensors})
        return dict(zip(outputs, values, strict=True))

    def run_alone(self, tensors: np.ndarray, outputs: dict[str, str]) -> dict[str, list[np.ndarray]]:
        runs = [self.run(tensor[None], outputs) for tensor in tensors]
        return {role: [found[role] for found in runs] for role in outputs}

    def run_only(self, z: np.ndarray) -> np.ndarray:
        outputs = self.session.get_outputs()
        if len(outputs) != 1:
            raise ValueError(f"the decoder has {len(outputs)} outputs, and makes one picture")
        return self.session.run(None, {self.input.name: z})[0]


def _check_outputs(found: dict[str, np.ndarray], count: int, preprocessing: Preprocessing, regions: int | None) -> None:
    for role, values in found.items():
        if values.dtype != np.float32 or values.ndim < (1 if role == "pred_score" else 2) or len(values) != count:
            raise ValueError(f"the {role} of {count} images is {values.dtype} of {values.shape}, and must be float32 of a row for each")
        if not np.isfinite(values).all():
            raise ValueError(f"the {role} of the golden images has values that are no finite numbers")
        if role == "reconstruction" and values[0].size != np.prod(preprocessing.shape):
            raise ValueError(f"a reconstruction has shape {values.shape[1:]}, and an image {preprocessing.shape}")
        if role == "pred_score" and values[0].size != 1:
            raise ValueError(f"the pred_score of an image has shape {values.shape[1:]}, and must be one number")
        if role in ("embedding", "mu", "logvar") and values.ndim > 2 and values[0].size != max(values.shape[1:]):
            raise ValueError(f"the {role} of an image has shape {values.shape[1:]}, and must be one vector")
    if {"mu", "logvar"} <= set(found) and found["mu"].shape != found["logvar"].shape:
        raise ValueError(f"mu has shape {found['mu'].shape}, and logvar {found['logvar'].shape}")
    vectors = found.get("embedding", found.get("mu"))
    width = 0 if vectors is None else vectors[0].size
    if regions and (width == 0 or width % regions):
        raise ValueError(f"an embedding of {width} values has no {regions} regions of equal length")


def _check_near(found: dict[str, np.ndarray], golden: dict[str, np.ndarray], tolerance: float, otherwise: str) -> None:
    for role, values in golden.items():
        same_shape = found[role].size == values.size
        difference = np.max(np.abs(found[role].ravel() - values.ravel()) / (1 + np.abs(values.ravel()))) if same_shape else np.inf
        if not difference <= tolerance:
            raise ValueError(f"the {role} {otherwise}: it differs by {difference:.1e}, where {tolerance:.1e} is allowed")


def _read(network: bytes | str | Path) -> bytes:
    """The network in one piece, weights that lie beside it included."""
    if isinstance(network, bytes):
        return network
    content = Path(network).read_bytes()
    model = onnx.load_from_string(content)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        return onnx.load(str(network)).SerializeToString()
    return content


def _without_loss(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image)) as picture:
        if picture.format == "PNG":
            return image
        return _png(decoded(image, "gray" if picture.mode in ("1", "L", "F", "I;16") else "rgb"))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _toml(values: dict, tables: dict[str, dict | None]) -> str:
    """TOML of strings, numbers and lists of numbers; what is None is left out."""
    lines = lambda table: [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]  # noqa: E731
    parts = [lines(values)] + [[f"[{name}]", *lines(table)] for name, table in tables.items() if table]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"
