"""Proves that generated rows of features are what their latents say, in the units of the source.

    generated_features.py MADE TABLES MODEL

MADE is what `generate` wrote with the package MODEL, a linear one, and TABLES are what a run on it published. With `W z + mean` as row, the
posterior mean is `z` times the factor by which the prior pulls it, `1 - e^logvar`.
"""

import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq

from check import check
from published import read_delta


def main(made: Path, tables: Path, model: Path) -> str:
    rows = pq.read_table(made / "images.parquet").to_pydict()
    z, features = np.array(rows["z"], np.float32), np.array(rows["features"], np.float32)
    given = tomllib.loads((model / "model.toml").read_text())["input"]
    mean, std = (np.array(given[name], np.float32) for name in ("mean", "std"))
    decoder = onnxruntime.InferenceSession(model / "decoder.onnx", providers=["CPUExecutionProvider"])
    decoded = decoder.run(None, {"z": z})[0] * std + mean
    difference = np.max(np.abs(features - decoded) / (np.abs(mean) + std))
    check(difference < 1e-5, f"rows differ from what the decoder makes by {difference:.1e}")
    check(abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.2, "latents are not drawn from the prior")
    latents = {row["image_id"]: row for row in read_delta(tables / "latents").to_pylist()}
    found = [latents[image_id] for image_id in rows["image_id"]]
    mu, logvar = (np.array([row[name] for row in found]) for name in ("embedding", "logvar"))
    difference = np.abs(mu - z * -np.expm1(logvar)).max()
    check(difference < 1e-3, f"mu differs from the latents that the rows were made of by {difference:.1e}")
    return f"{len(found)} rows are what their latents say"


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
