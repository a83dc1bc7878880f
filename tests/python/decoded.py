"""Proves that the pictures that the program makes of latents are those that Python makes of them with the same package.

    decoded.py generated MODEL FOLDER
    decoded.py reconstructed MODEL FOLDER IMAGES LATENTS SUMMARY
    decoded.py elbo MODEL IMAGES LATENTS SAMPLES

FOLDER holds `images.parquet` as `lookalike generate` writes it, or `reconstruct` in the folder of each partition: onnxruntime
decodes `z`, or the codes times the scales of the footer, NumPy undoes the normalization, and Pillow reads the PNG. Pixels may
differ by one level where a value lies halfway between two.

Codes are compared with the vectors of the Delta table LATENTS, and PSNR and SSIM computed by SciPy's filters from the images of
IMAGES, as Pillow decodes and resizes them: with SSIM as scikit-image has it for `gaussian_weights=True, sigma=1.5,
use_sample_covariance=False`. SUMMARY is what the program printed.

The negative ELBO of LATENTS is computed again from the same SAMPLES of each row, by generators written out here; and compared
with its expectation, which a linear decoder and a Gaussian likelihood have in closed form.
"""

import hashlib
import io
import json
import math
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
from PIL import Image
from scipy.ndimage import correlate1d

from check import check
from published import read_delta
from image_table import read_rows, to_tensor


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


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    error = ((a.astype(float) - b) ** 2).mean()
    return 10 * math.log10(255**2 / error) if error else None


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, over places where the window of 11 x 11 pixels lies within the picture."""

    def mean(x: np.ndarray) -> np.ndarray:
        weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
        weights /= weights.sum()
        smooth = correlate1d(correlate1d(x, weights, axis=0, mode="reflect"), weights, axis=1, mode="reflect")
        return smooth[5:-5, 5:-5]

    a, b = a.astype(float), b.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    return (((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()


def reconstructed(package: Path, folder: Path, images: Path, latents: Path, summary: Path) -> str:
    decoder = Decoder(package)
    spec = decoder.contract["input"]
    originals = {row.key: row.image for row in read_rows(images)}
    vectors = {(f"ds={row['ds']}", row["image_id"]): row["embedding"] for row in read_delta(latents).to_pylist()}
    known = np.array([vector for vector in vectors.values() if vector is not None], dtype=np.float32)
    scales = np.abs(known).max(axis=0) / np.float32(127)
    found = {"int8": [], "float": []}
    sizes = []
    for file in sorted(folder.glob("*/images.parquet")):
        table = pq.ParquetFile(file)
        footer = json.loads(table.metadata.metadata[b"lookalike.code_scales"])
        check(np.array_equal(np.float32(footer), scales), f"scales are {footer}, not {scales}")
        for row in table.read().to_pylist():
            key = (file.parent.name, row["image_id"])
            image = originals[key]
            check(row["image_bytes"] == len(image), f"{key} has {row['image_bytes']} bytes")
            mu = np.array(vectors[key], dtype=np.float32)
            code = np.frombuffer(row["code"], dtype=np.int8)
            check(row["code_bytes"] == len(code) == len(mu), f"{key} has {row['code_bytes']} bytes of code")
            check(np.abs(code - mu / scales).max() <= 0.5001, f"{key} has code {code} for {mu / scales}")
            tensor = to_tensor(image, decoder.contract)
            pixels = np.moveaxis(tensor, 0, 2) if spec["layout"] == "nchw" else tensor
            pixels = np.rint((pixels * spec["std"] + spec["mean"]) / spec["scale"])
            picture = png(row["image"])
            expected = decoder.pixels((code * scales)[None])[0]
            check(np.abs(picture - expected).max() <= 0.501, f"{key} is another picture")
            quality = psnr(pixels, picture), np.mean([ssim(pixels[..., c], picture[..., c]) for c in range(picture.shape[2])])
            check(np.allclose((row["psnr"], row["ssim"]), quality, rtol=1e-9), f"{key} has {row['psnr']}, {row['ssim']}: {quality}")
            found["int8"].append(quality)
            of_mu = np.rint(decoder.pixels(mu[None])[0])
            found["float"].append((psnr(pixels, of_mu), np.mean([ssim(pixels[..., c], of_mu[..., c]) for c in range(of_mu.shape[2])])))
            sizes.append(len(image))
    check(len(sizes) == len(known), f"{len(sizes)} images, not {len(known)}")
    told = json.loads(summary.read_text())
    check(math.isclose(told["mean_image_bytes"], np.mean(sizes)), "the mean size differs")
    check(math.isclose(told["compression_ratio"], np.mean(sizes) / known.shape[1]), "the ratio differs")
    for name, qualities in found.items():
        means = np.mean(qualities, axis=0)
        # A value halfway between two levels may be rounded to the other one here.
        check(np.allclose((told[name]["mean_psnr"], told[name]["mean_ssim"]), means, rtol=1e-4), f"{name}: {told[name]}, not {means}")
    return f"{len(sizes)} images agree"


def normals(seed: int, count: int) -> np.ndarray:
    """SplitMix64 and the method of Box and Muller."""

    def uniforms():
        state = seed
        while True:
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            yield (mix(state) >> 11) / 2**53

    draw = uniforms()
    values = []
    while len(values) < count:
        radius = math.sqrt(-2 * math.log(1 - next(draw)))
        angle = 2 * math.pi * next(draw)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(values[:count], dtype=np.float32)


def mix(bits: int) -> int:
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def row_seed(partition: str, image_id: str) -> int:
    """The first 64 bits of the SHA-256 of the row's key, each part after its length."""
    parts = ("purpose", "elbo", "partition", partition, "image_id", image_id)
    key = b"".join(len(part.encode()).to_bytes(8, "little") + part.encode() for part in parts)
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


def elbo(package: Path, images: Path, latents: Path, samples: Path) -> str:
    count = int(str(samples))
    decoder = Decoder(package)
    variance = decoder.contract["likelihood"]["sigma"] ** 2
    images = {row.key: row.image for row in read_rows(images)}
    deviations = []
    for row in read_delta(latents).to_pylist():
        if row["status"] != "ok":
            continue
        key = (f"ds={row['ds']}", row["image_id"])
        x = to_tensor(images[key], decoder.contract).astype(float).ravel()
        mu, logvar = np.array(row["embedding"]), np.array(row["logvar"])
        std = np.exp(logvar / 2)
        seed = row_seed(*key)
        eps = [normals(mix((seed + (s + 1) * 0x9E3779B97F4A7C15) % 2**64), len(mu)) for s in range(count)]

        def decode(z: np.ndarray) -> np.ndarray:
            (tensors,) = decoder.session.run(None, {"z": z.astype(np.float32)})
            return tensors.reshape(len(z), -1).astype(float)

        constant = x.size / 2 * math.log(2 * math.pi * variance) + row["kl_divergence"]
        losses = ((x - decode(mu + std * np.array(eps))) ** 2).sum(axis=1) / (2 * variance)
        expected = constant + losses.mean()
        check(math.isclose(row["negative_elbo"], expected, rel_tol=1e-5, abs_tol=1e-2), f"{key}: {row['negative_elbo']}, not {expected}")

        # Of |x - W z - mean|²: the columns of W, each times the deviation of its latent.
        zero = decode(np.zeros((1, len(mu))))
        columns = (decode(np.eye(len(mu))) - zero) * std[:, None]
        residual = x - decode(mu[None])[0]
        closed = constant + ((residual**2).sum() + (columns**2).sum()) / (2 * variance)
        spread = math.sqrt(4 * ((columns @ residual) ** 2).sum() + 2 * ((columns @ columns.T) ** 2).sum()) / (2 * variance)
        deviations.append((row["negative_elbo"] - closed) / (spread / math.sqrt(count)))
    largest = max(map(abs, deviations))
    check(largest < 5, f"an image is {largest} standard errors from its expectation")
    check(largest > 1e-3, "the samples have no spread")
    return f"{len(deviations)} images agree; the farthest is {largest:.2f} standard errors from its expectation"


if __name__ == "__main__":
    print("ok:", {"generated": generated, "reconstructed": reconstructed, "elbo": elbo}[sys.argv[1]](*map(Path, sys.argv[2:])))
