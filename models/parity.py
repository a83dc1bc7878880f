"""Does the program see what PyTorch, Pillow and torchvision see? Measures it on photographs and prints tables in Markdown.

    parity.py LOOKALIKE WORK [--photographs FOLDER] [--count 500]

Pieces of photographs, of many shapes and sizes and always the same ones, are stored as PNG and as JPEG. The photographs are those of
a Debian package, which is fetched once into WORK and checked by its hash, or all that lie in FOLDER. Then:

- Embeddings: the program runs on both folders with EfficientNet-Lite0, exported by lookalike_export.py; its table `latents` is compared
  with the network in PyTorch on pictures that Pillow decoded, resized and cut. The cosine must be at least 0.9995 for both. Beside them,
  what `decode = "fast"` makes of the JPEG files, which decodes large ones at a half, a quarter or an eighth of their size.
- Pixels: the program runs with networks that do nothing, whose embedding therefore is their input, for each filter, fit and color.
  Pillow's pixels must be within one level of 255. Beside them, those of torchvision's antialiased resize of tensors, as far as it has
  the filter.

Exits with 1 where one of these does not hold. WORK may be removed afterwards; what is in it is made again but for what was fetched.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import torch
import torchvision.transforms.v2.functional as vision
from onnx import TensorProto, helper
from PIL import Image
from torchvision.transforms import InterpolationMode

from debian_pictures import NATURE, fetch
from export_torch_example import PREPROCESSING, Encoder
from lookalike_export import FILTERS, FITS, OPSET, Preprocessing, decoded, export, export_torch

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")

# Sides of the pieces, in pixels, as far as the photograph has them.
SIDES = (300, 2400)

# JPEG files are of these kinds in turn: quality, and how Pillow calls the share of the colors that is kept.
JPEG = {
    "all colors, quality 95": (95, "4:4:4"),
    "half, quality 90": (90, "4:2:2"),
    "a quarter, quality 90": (90, "4:2:0"),
    "a quarter, quality 75": (75, "4:2:0"),
}

LEAST_COSINE = 0.9995

# The files that are compared, and how they are decoded; of `fast`, the difference is only told.
COMPARED = [("png", "exact"), ("jpeg", "exact"), ("jpeg", "fast")]

# The input of the networks that do nothing: height and width, neither equal nor a multiple of the other.
HEIGHT, WIDTH = 72, 112

# Of the pieces, those that every filter and fit is tried on.
NUM_RESIZED = 100

# What torchvision calls the filters that it has for tensors. It has neither Lanczos' nor the area's.
VISION = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def jpeg_kind(number: int, num_files: int) -> str:
    """The kind of JPEG of a piece: each photograph has pieces of all."""
    return list(JPEG)[number // num_files % len(JPEG)]


def cut(photographs: Path, work: Path, count: int) -> dict[str, str]:
    """Cuts pieces out of photographs, and stores them in WORK/png and WORK/jpeg; returns their names with the kinds of the JPEG files."""
    files = sorted(file for file in photographs.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file() and not file.is_symlink())
    if not files:
        sys.exit(f"error: no photographs below {photographs}")
    for kind in ("png", "jpeg"):
        shutil.rmtree(work / kind, ignore_errors=True)
        (work / kind).mkdir(parents=True)
    random, names = np.random.default_rng(2026), [f"piece{number:04}" for number in range(count)]
    # A photograph is decoded once, for all of its pieces.
    for place, file in enumerate(files):
        picture = decoded(file.read_bytes(), "rgb")
        for number in range(place, count, len(files)):
            wanted = np.exp(random.uniform(*np.log(SIDES), 2))
            width, height = (min(round(side), most) for side, most in zip(wanted, picture.size, strict=True))
            left, top = (int(random.integers(0, most - side + 1)) for side, most in zip((width, height), picture.size, strict=True))
            piece = picture.crop((left, top, left + width, top + height))
            piece.save(work / "png" / f"{names[number]}.png")
            quality, subsampling = JPEG[jpeg_kind(number, len(files))]
            piece.save(work / "jpeg" / f"{names[number]}.jpeg", quality=quality, subsampling=subsampling)
    return {name: jpeg_kind(number, len(files)) for number, name in enumerate(names)}


def run(program: str, work: Path, images: Path, package: Path, decode: str = "exact") -> dict[str, np.ndarray]:
    """What the program makes of a folder of images: the embedding of each file."""
    out = work / "tables"
    shutil.rmtree(out, ignore_errors=True)
    pipeline = work / "parity.toml"
    pipeline.write_text(
        f"""[pipeline]
name = "parity"
[source]
table = "{images.resolve()}"
format = "directory"
[model]
package = "{package.resolve()}"
[execution]
decode = "{decode}"
[neighbors]
enabled = false
[anomaly]
enabled = false
[output]
table = "{out.resolve()}"
"""
    )
    subprocess.run([program, "--quiet", "run", str(pipeline)], check=True, stdout=subprocess.DEVNULL)
    # Committed once, into an empty folder: all files are of the one version.
    rows = ds.dataset(sorted(map(str, (out / "latents").rglob("*.parquet")))).to_table(columns=["image_id", "embedding"])
    embeddings = rows["embedding"].combine_chunks()
    if embeddings.null_count:
        sys.exit(f"error: {embeddings.null_count} of {len(rows)} images of {images} were rejected")
    return dict(zip(rows["image_id"].to_pylist(), np.stack(embeddings.to_numpy(zero_copy_only=False)), strict=True))


def embeddings_agree(program: str, work: Path, pieces: dict[str, str]) -> bool:
    network, package = Encoder().eval(), work / "encoder"
    export_torch(package, network, PREPROCESSING, name="efficientnet-lite0")
    print("\n| EfficientNet-Lite0 | images | least cosine | median | must be |\n|---|---|---|---|---|")
    agree = True
    for suffix, decode in COMPARED:
        cosines: dict[str, list[float]] = {}
        for name, embedding in run(program, work, work / suffix, package, decode).items():
            tensor = PREPROCESSING.tensor(PREPROCESSING.pixels((work / suffix / name).read_bytes()))
            with torch.no_grad():
                theirs = network(torch.from_numpy(np.ascontiguousarray(tensor))[None])[0].double().numpy()
            ours = embedding.astype(np.float64)
            kind = "PNG" if suffix == "png" else f"JPEG, {pieces[Path(name).stem]}"
            cosines.setdefault(kind, []).append(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
        for kind, found in sorted(cosines.items()):
            must_be = str(LEAST_COSINE) if decode == "exact" else "–"
            print(f"| {kind}{', fast' if decode == 'fast' else ''} | {len(found)} | {min(found):.6f} | {np.median(found):.6f} | {must_be} |", flush=True)
            agree &= decode != "exact" or min(found) >= LEAST_COSINE
    return agree


def identity(preprocessing: Preprocessing) -> bytes:
    """A network whose embedding is its input."""
    info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])  # noqa: E731
    node = helper.make_node("Flatten", ["image"], ["embedding"], axis=1)
    graph = helper.make_graph(
        [node], "identity", [info("image", preprocessing.shape)], [info("embedding", [int(np.prod(preprocessing.shape))])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8).SerializeToString()


def by_torchvision(picture: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The pixels of a decoded picture, resized as a tensor."""
    resize = lambda size: vision.resize(vision.pil_to_tensor(picture), size, VISION[preprocessing.filter], antialias=True)  # noqa: E731
    target, source = (preprocessing.height, preprocessing.width), (picture.height, picture.width)
    if preprocessing.fit == "stretch":
        tensor = resize(list(target))
    else:
        factors = [wanted / side for wanted, side in zip(target, source, strict=True)]
        # The axis that decides gets the target's length; the other is rounded down to cover, and to the nearest to contain.
        axis = factors.index(max(factors) if preprocessing.fit == "crop" else min(factors))
        other = source[1 - axis] * target[axis] / source[axis]
        length = source[1 - axis] * target[axis] // source[axis] if preprocessing.fit == "crop" else max(1, round(other))
        size = [target[axis], length] if axis == 0 else [length, target[axis]]
        tensor = resize(size)
        if preprocessing.fit == "crop":
            tensor = vision.center_crop(tensor, list(target))
        else:
            top, left = (round((wanted - side) / 2) for wanted, side in zip(target, size, strict=True))
            tensor = vision.pad(tensor, [left, top, target[1] - size[1] - left, target[0] - size[0] - top])
    return tensor.permute(1, 2, 0).numpy()


def pixels_agree(program: str, work: Path, names: list[str]) -> bool:
    resized, package = work / "resized", work / "identity"
    shutil.rmtree(resized, ignore_errors=True)
    resized.mkdir()
    for name in names[:NUM_RESIZED]:
        (resized / f"{name}.png").write_bytes((work / "png" / f"{name}.png").read_bytes())
    print(f"\nLargest difference of a pixel, in levels of 255; {len(list(resized.iterdir()))} images to {WIDTH} x {HEIGHT}\n")
    print("| filter | fit | gray, Pillow | rgb, Pillow | gray, torchvision | rgb, torchvision |\n|---|---|---|---|---|---|")
    agree = True
    for filter_name in FILTERS:
        for fit in FITS:
            differences = {}
            for color in ("gray", "rgb"):
                preprocessing = Preprocessing(HEIGHT, WIDTH, color, "nhwc", filter_name, fit)
                export(package, identity(preprocessing), preprocessing, {"embedding": "embedding"}, name="identity")
                for name, embedding in run(program, work, resized, package).items():
                    ours = np.rint(embedding * 255).reshape(HEIGHT, WIDTH, -1)
                    picture = decoded((resized / name).read_bytes(), color)
                    theirs = {"Pillow": preprocessing.resized(picture)}
                    if filter_name in VISION:
                        theirs["torchvision"] = by_torchvision(picture, preprocessing)
                    for library, pixels in theirs.items():
                        difference = np.abs(ours - pixels.astype(np.float64)).max()
                        differences[color, library] = max(differences.get((color, library), 0), int(difference))
            cells = [str(differences.get((color, library), "–")) for library in ("Pillow", "torchvision") for color in ("gray", "rgb")]
            print(f"| {filter_name} | {fit} | {' | '.join(cells)} |", flush=True)
            agree &= max(differences[color, "Pillow"] for color in ("gray", "rgb")) <= 1
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the program")
    parser.add_argument("work", type=Path, help="folder for what is fetched and made")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="photographs to take in place of those that are fetched")
    parser.add_argument("--count", type=int, default=500, help="pieces (default: 500)")
    options = parser.parse_args()
    program = str(Path(options.program).resolve()) if "/" in options.program else options.program
    photographs = options.photographs or options.work / "photographs"
    if options.photographs is None:
        fetch(NATURE, photographs)
    pieces = cut(photographs, options.work, options.count)
    results = [embeddings_agree(program, options.work, pieces), pixels_agree(program, options.work, list(pieces))]
    sys.exit(0 if all(results) else "error: more difference than there may be")


if __name__ == "__main__":
    main()
