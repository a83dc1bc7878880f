"""What the cases work on: image tables and model packages, made once below .cache/bench and always the same.

Photographs are cut from the pictures of two Debian packages, which are fetched with their hashes; the solar cells and the encoder are
those of `make demo`.
"""

import io
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from runs import ROOT

sys.path.insert(0, str(ROOT / "models"))
from debian_pictures import Package, fetch  # noqa: E402
from lookalike_export import OPSET, Preprocessing, export  # noqa: E402

BENCH = ROOT / ".cache/bench"
CELLS = ROOT / ".cache/demo/images"
ENCODER = ROOT / ".cache/demo/encoder"

# Photographs, and pictures that were rendered.
PICTURES = [
    Package(
        "m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "usr/share/backgrounds/mate/",
    ),
    Package(
        "g/gnome-backgrounds/gnome-backgrounds_43.1-1_all.deb",
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
        "usr/share/backgrounds/gnome/",
    ),
]
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
# A picture of fewer pixels along a side would be enlarged.
LEAST_SIDE = 1000

SIDE, QUALITY = 512, 90
ROW_GROUP_ROWS = 256
# Rows of a file, of tables with many.
FILE_ROWS, FEATURE_FILE_ROWS = 10_000, 500_000

# Version of the format that goes with the opset.
IR_VERSION = 8


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which `make` fills if it is not there; what was interrupted is made again."""
    if not folder.exists():
        print(f"making {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        make(temporary)
        temporary.rename(folder)
    return folder


def write_table(file: Path, ids: list[str], images: list[bytes]) -> None:
    """A Parquet file of images as they come: uncompressed, and in row groups that are read one at a time."""
    table = pa.table({"image_id": ids, "image": pa.array(images, pa.binary())})
    pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False)


def photographs(count: int) -> Path:
    """A folder with `jpeg`, files of square pieces of pictures, and `table`, the same in one Parquet file."""

    def make(folder: Path) -> None:
        (folder / "jpeg").mkdir()
        (folder / "table").mkdir()
        sources = []
        for package in PICTURES:
            pictures = BENCH / "pictures" / Path(package.path).stem
            pictures.parent.mkdir(parents=True, exist_ok=True)
            fetch(package, pictures)
            sources += sorted(file for file in pictures.iterdir() if file.suffix.lower() in ENDINGS)
        sizes = {file: Image.open(file).size for file in sources}
        sources = [file for file in sources if min(sizes[file]) >= LEAST_SIDE]
        # A picture is decoded once, for all of its pieces.
        random, pieces = np.random.default_rng(7), defaultdict(list)
        for number in range(count):
            file = sources[number % len(sources)]
            side = int(random.integers(SIDE, min(sizes[file])))
            left, top = (int(random.integers(0, length - side + 1)) for length in sizes[file])
            pieces[file].append((number, (left, top, left + side, top + side)))
        for file, boxes in pieces.items():
            picture = Image.open(file).convert("RGB")
            for number, box in boxes:
                piece = picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                piece.save(folder / "jpeg" / f"photograph{number:05}.jpg", quality=QUALITY)
        files = sorted((folder / "jpeg").iterdir())
        write_table(folder / "table/photographs.parquet", [file.name for file in files], [file.read_bytes() for file in files])

    return once(BENCH / f"photographs-{count}", make)


def many_files(num_files: int) -> Path:
    """A table of so many files, each with one small image."""

    def make(folder: Path) -> None:
        image = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(image, "PNG")
        for number in range(num_files):
            write_table(folder / f"part{number:05}.parquet", [f"image{number:05}"], [image.getvalue()])

    return once(BENCH / f"files-{num_files}", make)


def small_cells(count: int) -> Path:
    """A table of so many gray PNG images of 64 x 64: pieces of the solar cells, by chance and always the same ones."""

    def make(folder: Path) -> None:
        tables = [pq.read_table(file, columns=["image"], partitioning=None) for file in sorted(CELLS.rglob("*.parquet"))]
        cells = [Image.open(io.BytesIO(image)).convert("L") for table in tables for image in table["image"].to_pylist()]
        random = np.random.default_rng(11)
        for start in range(0, count, FILE_ROWS):
            ids, images = [], []
            for number in range(start, min(start + FILE_ROWS, count)):
                cell = cells[int(random.integers(len(cells)))]
                side = int(random.integers(128, min(cell.size) + 1))
                left, top = (int(random.integers(0, length - side + 1)) for length in cell.size)
                piece = cell.resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
                image = io.BytesIO()
                # The fastest compression: these files are many.
                piece.save(image, "PNG", compress_level=1)
                ids.append(f"piece{number:07}")
                images.append(image.getvalue())
            write_table(folder / f"part{start // FILE_ROWS:04}.parquet", ids, images)

    return once(BENCH / f"small-cells-{count}", make)


def features(num_rows: int, dim: int) -> Path:
    """A table of rows of so many numbers, which are mixtures of a quarter as many and of noise."""

    def make(folder: Path) -> None:
        random = np.random.default_rng(13)
        mixture = random.standard_normal((dim // 4, dim)).astype(np.float32)
        for start in range(0, num_rows, FEATURE_FILE_ROWS):
            rows = min(FEATURE_FILE_ROWS, num_rows - start)
            values = random.standard_normal((rows, dim // 4), np.float32) @ mixture + random.standard_normal((rows, dim), np.float32) / 4
            table = {"image_id": [f"row{number:09}" for number in range(start, start + rows)]}
            table["features"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)
            pq.write_table(pa.table(table), folder / f"part{start // FEATURE_FILE_ROWS:04}.parquet", use_dictionary=False)

    return once(BENCH / f"features-{num_rows}", make)


def tiled(table: Path, number: int, file: Path) -> None:
    """Writes the table's images once more under other ids: those of copy `number`."""
    rows = pq.read_table(table, partitioning=None)
    ids = [f"copy{number:04}-{image_id}" for image_id in rows["image_id"].to_pylist()]
    rows = rows.set_column(0, "image_id", pa.array(ids))
    pq.write_table(rows, file, row_group_size=ROW_GROUP_ROWS, compression="none", use_dictionary=False)


def many_cells(num_copies: int) -> Path:
    """The table of solar cells with each of them so many times, under other ids."""

    def make(folder: Path) -> None:
        for table in sorted(CELLS.rglob("*.parquet")):
            partition = folder / table.parent.name
            partition.mkdir()
            for number in range(num_copies):
                tiled(table, number, partition / f"copy{number}.parquet")

    return once(BENCH / f"cells-times-{num_copies}", make)


class Network:
    """An ONNX network under construction, with weights by chance and always the same ones: how long it takes does not depend on them."""

    def __init__(self) -> None:
        self.random, self.nodes, self.weights = np.random.default_rng(0), [], []

    def node(self, operator: str, inputs: list[str], output: str | None = None, **attributes) -> str:
        output = output or f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, values: np.ndarray) -> str:
        name = f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def drawn(self, *shape: int, fan_in: int) -> str:
        """Weights that keep the size of what passes through them (He et al. 2015), so that no value becomes too small or too large."""
        return self.constant((self.random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32))

    def linear(self, x: str, of: int, to: int) -> str:
        return self.node("Gemm", [x, self.drawn(of, to, fan_in=of), self.constant(np.zeros(to, np.float32))])

    def to_bytes(self, inputs: dict[str, list], outputs: dict[str, list]) -> bytes:
        def info(shapes: dict[str, list]) -> list:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in shapes.items()]

        graph = helper.make_graph(self.nodes, "bench", info(inputs), info(outputs), self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def one_layer() -> Path:
    """The package of a network that costs next to nothing: one convolution, on the same input as the encoder has."""

    def make(folder: Path) -> None:
        network, side, kernel, channels = Network(), 224, 32, 4
        weights = network.drawn(channels, 3, kernel, kernel, fan_in=3 * kernel * kernel)
        features = network.node("Conv", ["image", weights], kernel_shape=[kernel, kernel], strides=[kernel, kernel])
        network.node("Flatten", [features], "embedding")
        num_values = channels * (side // kernel) ** 2
        preprocessing = Preprocessing(side, side, filter="bicubic", fit="crop", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        graph = network.to_bytes({"image": [3, side, side]}, {"embedding": [num_values]})
        export(folder, graph, preprocessing, {"embedding": "embedding"}, name="one-layer")

    return once(BENCH / "one-layer", make)


def vae() -> Path:
    """The package of a small convolutional VAE of 64 x 64 gray pixels, of 32 latents, as it comes from PyTorch's exporter: batch
    normalization is folded into the convolutions, and stands by itself after transposed ones. It is not trained: PyTorch would be
    5 GB, and trained weights would take as long."""

    def make(folder: Path) -> None:
        network, latents, channels = Network(), 32, [32, 64, 128, 128]
        half = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        leaky = lambda x: network.node("LeakyRelu", [x], alpha=0.1)  # noqa: E731
        x, before = "image", 1
        for after in channels:
            weights = network.drawn(after, before, 4, 4, fan_in=16 * before)
            x, before = leaky(network.node("Conv", [x, weights, network.constant(np.zeros(after, np.float32))], **half)), after
        heads = network.linear(network.node("Flatten", [x]), 16 * before, 2 * latents)
        mu, logvar = (
            network.node("Slice", [heads, *(network.constant(np.array([place])) for place in (begin, begin + latents, 1))])
            for begin in (0, latents)
        )
        network.node("Identity", [mu], "mu")
        network.node("Clip", [logvar, network.constant(np.float32(-8)), network.constant(np.float32(8))], "logvar")
        x = leaky(network.linear("mu", latents, 16 * before))
        x = network.node("Reshape", [x, network.constant(np.array([0, before, 4, 4]))])
        for after in [*reversed(channels[:-1]), 1]:
            # Of 4 x 4 places of a kernel, 2 x 2 meet each pixel.
            x = network.node("ConvTranspose", [x, network.drawn(before, after, 4, 4, fan_in=4 * before)], **half)
            if after != 1:
                ones, zeros = np.ones(after, np.float32), np.zeros(after, np.float32)
                x = leaky(network.node("BatchNormalization", [x, *map(network.constant, (ones, zeros, zeros, ones))]))
            before = after
        network.node("Sigmoid", [x], "reconstruction")
        graph = network.to_bytes({"image": [1, 64, 64]}, {"mu": [latents], "logvar": [latents], "reconstruction": [1, 64, 64]})
        outputs = {name: name for name in ("mu", "logvar", "reconstruction")}
        export(folder, graph, Preprocessing(64, 64, color="gray"), outputs, name="small-vae", likelihood={"kind": "gaussian", "sigma": 0.05})

    return once(BENCH / "vae", make)
