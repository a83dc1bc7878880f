"""Proves that vectors and scores in `latents` are those that Python computes from the same images and the same package.

    reference_scores.py IMAGES MODEL LATENTS

IMAGES is a folder of images or a Parquet image table (`image_id`, `image` as binary), MODEL a model package, LATENTS the
Delta table. Rows of other models are passed over; in the partitions of this one, every image must have exactly one row. For
those with status `ok`, Pillow decodes and resizes, NumPy normalizes, onnxruntime infers, and the five scores and four pixel
statistics are written out from their formulas in float64. The hash and the size of every image are compared too.
"""

import hashlib
import math
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime
from deltalake import DeltaTable

from check import check
from published import read_delta
from image_table import open_upright, read_rows, to_tensor

BATCH = 64

# How far vectors (1 - cosine) and scores (relative) may be apart. Lossless images and JPEG have equal pixels here and there, so only
# the order of float32 sums differs. Two decoders of lossy WebP differ by a level of 255 here and there: the errors of
# such an image, as roots where they are squares, may differ by one level. Its ELBO, which multiplies that by thousands, is
# not compared.
LOSSLESS = {"vector": 1e-6, "score": 1e-4}
LOSSY = {"vector": 1e-3, "score": 2e-2, "levels": 1.0}

SCORES = ("mean_squared_error", "mean_absolute_error", "top_1pct_squared_error", "kl_divergence", "negative_elbo")
PIXEL_STATS = ("brightness", "contrast", "sharpness", "complexity")
NULL_UNLESS_OK = ("width", "height", "embedding", "mu", "logvar", *SCORES, *PIXEL_STATS)


def main(images: Path, package: Path, latents: Path) -> str:
    keys = DeltaTable(str(latents)).metadata().partition_columns
    published = {}
    model_sha256 = hashlib.sha256((package / "model.toml").read_bytes()).hexdigest()
    for row in read_delta(latents).to_pylist():
        if row["model_sha256"] != model_sha256:
            continue  # a partition of another model, in the same table
        key = "/".join(f"{name}={row[name]}" for name in keys), row["image_id"]
        check(key not in published, f"{key} has two rows")
        published[key] = row
    partitions = {partition for partition, _ in published}
    rows = {row.key: row for row in read_rows(images) if row.partition in partitions}
    check(rows.keys() == published.keys(), f"rows differ: {sorted(rows.keys() ^ published.keys())[:5]}")

    contract = tomllib.loads((package / "model.toml").read_text())
    session = onnxruntime.InferenceSession(package / contract["graph"]["main"], providers=["CPUExecutionProvider"])
    for key, row in published.items():
        if row["status"] != "ok":
            check(row["error_message"] is not None, f"{key} is {row['status']} without an error message")
            found = [name for name in NULL_UNLESS_OK if row[name] is not None]
            check(not found, f"{key} is {row['status']} and has {found}")
    ok = [key for key, row in published.items() if row["status"] == "ok"]
    check(len(ok) > 0, "no image has status ok")
    largest = defaultdict(float)
    for start in range(0, len(ok), BATCH):
        batch = ok[start : start + BATCH]
        tensors = np.stack([to_tensor(rows[key].image, contract) for key in batch])
        for place, (key, expected) in enumerate(zip(batch, infer(session, contract, tensors), strict=True)):
            compare(key, rows[key].image, published[key], tensors[place], expected, contract, largest)
    found = ", ".join(f"{name} {value:.1e}" for name, value in sorted(largest.items()))
    return f"{len(ok)} images agree, {len(published) - len(ok)} rejected; the largest {found}"


def infer(session: onnxruntime.InferenceSession, contract: dict, tensors: np.ndarray) -> list[dict]:
    """The outputs of each image, by role, in float64."""
    roles = contract["outputs"]
    outputs = session.run(list(roles.values()), {contract["input"]["tensor"]: tensors})
    outputs = [output.astype(np.float64).reshape(len(tensors), -1) for output in outputs]
    return [dict(zip(roles, values, strict=True)) for values in zip(*outputs, strict=True)]


def scores(x: np.ndarray, outputs: dict, likelihood: dict | None) -> dict:
    """The five scores of one image, as schemas/latents.v1.toml defines them."""
    scores = dict.fromkeys(SCORES)
    mu, logvar, r = (outputs.get(role) for role in ("mu", "logvar", "reconstruction"))
    if logvar is not None:
        scores["kl_divergence"] = -0.5 * np.sum(1 + logvar - mu**2 - np.exp(logvar))
    if r is not None:
        squared = (x - r) ** 2
        scores["mean_squared_error"] = squared.mean()
        scores["mean_absolute_error"] = np.abs(x - r).mean()
        scores["top_1pct_squared_error"] = np.sort(squared)[-math.ceil(squared.size / 100) :].mean()
        if likelihood and logvar is not None:
            if likelihood["kind"] == "gaussian":
                variance = likelihood["sigma"] ** 2
                loss = 0.5 * x.size * math.log(2 * math.pi * variance) + squared.sum() / (2 * variance)
            else:
                p = np.clip(r, 1e-7, 1 - 1e-7)
                loss = -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p))
            scores["negative_elbo"] = loss + scores["kl_divergence"]
    return scores


def pixel_stats(tensor: np.ndarray, spec: dict) -> dict:
    """The four statistics of one image, as schemas/latents.v1.toml defines them, all from the input tensor."""
    x = tensor.astype(np.float64)
    if spec["layout"] == "nchw":
        x = x.transpose(1, 2, 0)
    mean, std = (np.asarray(spec[name], dtype=np.float64) for name in ("mean", "std"))
    pixels = (x * std + mean) / (255 * spec["scale"])
    pairs = np.concatenate([np.diff(x, axis=axis).ravel() for axis in (0, 1)])
    inner = slice(1, -1)
    laplacian = 4 * pixels[inner, inner] - pixels[:-2, inner] - pixels[2:, inner] - pixels[inner, :-2] - pixels[inner, 2:]
    return {
        "brightness": pixels.mean(),
        "contrast": pixels.std(),
        "sharpness": (laplacian**2).mean() if laplacian.size else 0.0,
        "complexity": (pairs**2).mean() if pairs.size else 0.0,
    }


def compare(key, image: bytes, row: dict, tensor: np.ndarray, outputs: dict, contract: dict, largest: dict) -> None:
    """Compares one row with what is expected of it, and keeps the largest differences."""
    spec = contract["input"]
    upright = open_upright(image, spec.get("exif_rotation", True))
    size = row["width"], row["height"]
    check(size == upright.size, f"{key} has size {size}, not {upright.size}")
    check(row["content_sha256"] == hashlib.sha256(image).hexdigest(), f"{key} has another content_sha256")
    check(row["image_bytes"] == len(image), f"{key} has another image_bytes")
    check(row["error_message"] is None, f"{key} is ok and has an error message")
    is_lossy = b"VP8 " in image[:64]
    limits = LOSSY if is_lossy else LOSSLESS
    level = spec["scale"] / min(spec["std"])

    def differ(what: str, difference: float, limit: float) -> None:
        largest[what] = max(largest[what], difference)
        check(difference <= limit, f"{what} of {key} is {difference:.2e} (limit {limit:.0e})")

    # Without an embedding of its own, the model's mu is the embedding, and is not published twice.
    vectors = outputs if "embedding" in outputs else outputs | {"embedding": outputs["mu"], "mu": None}
    for name in ("embedding", "mu", "logvar"):
        expected = vectors.get(name)
        check((row[name] is None) == (expected is None), f"{name} of {key} is {row[name]}, not {expected}")
        if expected is not None:
            found = np.asarray(row[name], dtype=np.float64)
            check(found.shape == expected.shape, f"{name} of {key} has {found.size} values, not {expected.size}")
            cosine = found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))
            differ(f"1 - cosine of {name}" + is_lossy * " (lossy)", abs(1 - cosine), limits["vector"])
    for name, expected in scores(tensor.astype(np.float64).ravel(), outputs, contract.get("likelihood")).items():
        found = row[name]
        check((found is None) == (expected is None), f"{name} of {key} is {found}, not {expected}")
        if expected is None or (is_lossy and name == "negative_elbo"):
            continue
        if is_lossy and name.endswith("_error"):
            root = math.sqrt if "squared" in name else abs
            differ(f"difference in levels of {name} (lossy)", abs(root(found) - root(expected)) / level, limits["levels"])
        else:
            # Around zero nats lie differences of thousands of nats.
            floor = 1.0 if name in ("kl_divergence", "negative_elbo") else 1e-12
            difference = abs(found - expected) / max(abs(expected), floor)
            differ(f"difference of {name}" + is_lossy * " (lossy)", difference, limits["score"])
    for name, expected in pixel_stats(tensor, spec).items():
        found = row[name]
        check(found is not None, f"{key} is ok and has no {name}")
        if is_lossy:
            # A level on every pixel moves means by a level; differences of pixels by two, and Laplacians by up to eight.
            units, levels = {"complexity": (level, 2.0), "sharpness": (1 / 255, 8.0)}.get(name, (1 / 255, 1.0))
            root = math.sqrt if name in ("complexity", "sharpness") else abs
            differ(f"difference in levels of {name} (lossy)", abs(root(found) - root(expected)) / units, levels)
        else:
            # Float32 tensors turned back into pixels are off by their last bits.
            differ(f"difference of {name}", abs(found - expected) / max(abs(expected), 1e-6), limits["score"])


if __name__ == "__main__":
    print("ok:", main(*map(Path, sys.argv[1:])))
