"""Proves that a fitted package is the PCA that scikit-learn finds, and the probabilistic PCA of Tipping and Bishop.

    pca_agrees.py IMAGES MODEL SPLIT

IMAGES is the table that MODEL was fitted to; rows whose column `split` is SPLIT are those that it was fitted to. scikit-learn
decomposes the same images in float64 by a complete SVD. Compared are the subspaces, the variances along the components,
the noise, the reconstruction errors, and mu, logvar and the decoder with their closed form (Journal of the Royal
Statistical Society B 61(3), 1999, sections 3.2 and 3.3). Both networks must pass ONNX's own checker.
"""

import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from check import check
from image_table import read_rows, to_tensor


def main(images: Path, package: Path, split: str) -> str:
    rows = [row for row in read_rows(images) if row.values["split"] == split]
    contract = tomllib.loads((package / "model.toml").read_text())
    tensors = np.stack([to_tensor(row.image, contract) for row in rows])
    x = tensors.reshape(len(rows), -1).astype(np.float64)

    network = onnx.load(package / contract["graph"]["main"])
    onnx.checker.check_model(network, full_check=True)
    decoder_file = package / contract["graph"]["decoder"]
    onnx.checker.check_model(onnx.load(decoder_file), full_check=True)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in network.graph.initializer}
    components = weights["components"]
    latent_dim, dim = components.shape
    check(dim == x.shape[1], f"the package has {dim} values an image, not {x.shape[1]}")

    pca = PCA(latent_dim, svd_solver="full").fit(x)
    variance = pca.explained_variance_
    # scikit-learn's noise_variance_ divides by the number of its singular values; the maximum likelihood by all the rest.
    noise = (x.var(axis=0, ddof=1).sum() - variance.sum()) / (dim - latent_dim)
    # A component is as good as its negative: take the package's signs.
    basis = pca.components_ * np.sign(np.sum(pca.components_ * components, axis=1, keepdims=True))
    gain = np.sqrt(variance - noise)

    session = onnxruntime.InferenceSession(package / contract["graph"]["main"], providers=["CPUExecutionProvider"])
    outputs = session.run(["mu", "logvar", "reconstruction"], {contract["input"]["tensor"]: tensors})
    mu, logvar, reconstruction = (output.astype(np.float64).reshape(len(rows), -1) for output in outputs)
    decoder = onnxruntime.InferenceSession(decoder_file, providers=["CPUExecutionProvider"])
    z = np.random.default_rng(0).standard_normal((16, latent_dim)).astype(np.float32)
    decoded = decoder.run(["reconstruction"], {"z": z})[0].reshape(len(z), -1)

    sigma = contract["likelihood"]["sigma"]
    centered = x - x.mean(axis=0)
    squared_error = np.mean((x - reconstruction) ** 2, axis=1)
    expected_error = np.mean((centered - centered @ basis.T @ basis) ** 2, axis=1)
    report = {
        "largest principal angle": (subspace_angles(components.T, basis.T).max(), 1e-3),
        "mean": (np.abs(weights["mean"] - x.mean(axis=0)).max(), 1e-6),
        "noise variance": (relative(sigma**2, noise), 1e-6),
        "explained variance": (relative(sigma**2 / np.exp(logvar[0]), variance), 1e-4),
        "reconstruction error": (relative(squared_error, expected_error), 1e-4),
        "mu": (np.abs(mu - centered @ basis.T * gain / variance).max(), 1e-3),
        "logvar": (np.abs(logvar - np.log(noise / variance)).max(), 1e-4),
        "decoder": (np.abs(decoded - (z * gain @ basis + x.mean(axis=0))).max(), 1e-4),
    }
    for name, (difference, limit) in report.items():
        check(difference < limit, f"{name} differs by {difference:.2e} (limit {limit:.0e})")
    found = ", ".join(f"{name} {difference:.1e}" for name, (difference, _) in report.items())
    return f"{latent_dim} components of {len(rows)} images x {dim} values agree; differences: {found}"


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative difference."""
    return np.max(np.abs(found - expected) / np.abs(expected))


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
