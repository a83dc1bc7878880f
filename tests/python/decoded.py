"""Proves that the pictures that the program makes of latents are those that Python makes of them with the same package.

    decoded.py generated MODEL FOLDER

FOLDER holds `images.parquet` as `lookalike generate` writes it: onnxruntime decodes `z`, NumPy undoes the normalization, and
Pillow reads the PNG. Pixels may differ by one level where a value lies halfway between two.
"""

import io
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
from PIL import Image

from check import check


class Decoder:
    """The decoder of a package, from latents to 8-bit pixels."""

    def __init__(self, package: Path) -> None:
        self.contract = tomllib.loads((package / "model.toml").read_text())
        self.session = onnxruntime.InferenceSession(
            package / self.contract["graph"]["decoder"], providers=["CPUExecutionProvider"]
        )

    def pixels(self, z: np.ndarray) -> np.ndarray:
        """Pixels, batch x height x width x channels, before they are rounded."""
        (tensors,) = self.session.run(None, {self.session.get_inputs()[0].name: z.astype(np.float32)})
        spec = self.contract["input"]
        if spec["layout"] == "nchw":
            tensors = np.moveaxis(tensors, 1, 3)
        return np.clip((tensors * spec["std"] + spec["mean"]) / spec["scale"], 0, 255)


def png(image: bytes) -> np.ndarray:
    """Pixels of a PNG, height x width x channels."""
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    return pixels.reshape(*pixels.shape[:2], -1)


def generated(package: Path, folder: Path) -> str:
    rows = pq.read_table(folder / "images.parquet").to_pydict()
    expected = Decoder(package).pixels(np.array(rows["z"]))
    found = np.stack([png(image) for image in rows["image"]])
    check(found.shape == expected.shape, f"pictures are {found.shape}, not {expected.shape}")
    largest = np.abs(found - expected).max()
    check(largest <= 0.501, f"a pixel is {largest} levels away")
    # Those of the normal distribution, within four standard errors.
    z = np.array(rows["z"]).ravel()
    check(abs(z.mean()) < 4 / z.size**0.5, f"the mean of z is {z.mean()}")
    check(abs(z.var() - 1) < 4 * (2 / z.size) ** 0.5, f"the variance of z is {z.var()}")
    return f"{len(found)} pictures agree, the largest difference {largest:.3f} levels"


if __name__ == "__main__":
    print("ok:", {"generated": generated}[sys.argv[1]](*map(Path, sys.argv[2:])))
