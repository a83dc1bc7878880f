"""Proves that a run on features found what scikit-learn finds in them.

    features_agree.py SOURCE TABLES

SOURCE is a table of features in a Parquet file's folder, with the columns `tumor`, `diagnosis` and `split`, and TABLES are what was
published with a model that was fitted, standardized, to the rows whose split is `fit`. scikit-learn standardizes the same rows, finds the same
number of principal components, and is asked for the error of each row; latents, neighbors and flags follow from that. Prints the
AUROC of each score that `latents` has, as JSON.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from check import check
from published import read_delta

SCORES = ["mean_squared_error", "mean_absolute_error", "top_1pct_squared_error", "kl_divergence", "negative_elbo"]


def main(source: Path, tables: Path) -> dict[str, float]:
    rows = pq.read_table(source).to_pydict()
    x = np.array(rows["features"])
    latents = {row["image_id"]: row for row in read_delta(tables / "latents").to_pylist()}
    check(len(latents) == len(x), f"{len(latents)} rows of latents for {len(x)} of the source")
    found = [latents[str(row)] for row in rows["tumor"]]
    check(all(row["status"] == "ok" for row in found), "a row was rejected")

    for row, values in zip(found, x.astype("<f4")):
        check(row["content_sha256"] == hashlib.sha256(values.tobytes()).hexdigest(), "the content is another one")
        check(row["image_bytes"] == values.nbytes, "the size is another one")
        of_pixels = ["width", "height", "brightness", "contrast", "sharpness", "complexity"]
        check(all(row[name] is None for name in of_pixels), "features have no pixels")

    fitted = np.array(rows["split"]) == "fit"
    scaler = StandardScaler().fit(x[fitted])
    standardized = scaler.transform(x)
    mu = np.array([row["embedding"] for row in found])
    latent_dim = mu.shape[1]
    pca = PCA(latent_dim, svd_solver="full").fit(standardized[fitted])
    error = standardized - pca.inverse_transform(pca.transform(standardized))
    variance = pca.explained_variance_
    noise = (standardized[fitted].var(axis=0, ddof=1).sum() - variance.sum()) / (x.shape[1] - latent_dim)
    projected = pca.transform(standardized) * np.sqrt(variance - noise) / variance
    projected *= np.sign((projected * mu).sum(axis=0))
    check(np.abs(projected - mu).max() < 1e-3, f"mu differs by {np.abs(projected - mu).max():.1e}")
    expected = {
        "mean_squared_error": (error**2).mean(axis=1),
        "mean_absolute_error": np.abs(error).mean(axis=1),
        "top_1pct_squared_error": (error**2).max(axis=1),
    }
    for name, values in expected.items():
        difference = np.max(np.abs(np.array([row[name] for row in found]) - values) / values)
        check(difference < 1e-3, f"{name} differs by {difference:.1e}")

    neighbors = read_delta(tables / "neighbors").to_pylist()
    k = max(row["rank"] for row in neighbors)
    distances, _ = NearestNeighbors(n_neighbors=k + 1).fit(mu).kneighbors(mu)
    for row in neighbors:
        expected_distance = distances[rows["tumor"].index(int(row["image_id"])), row["rank"]]
        check(abs(row["distance"] - expected_distance) < 1e-3, f"neighbor {row} lies at {expected_distance}")

    new = np.array(rows["split"]) == "rest"
    is_malignant = np.array(rows["diagnosis"]) == "malignant"
    auroc = {name: roc_auc_score(is_malignant[new], np.array([row[name] for row in found])[new]) for name in SCORES}
    own = roc_auc_score(is_malignant[new], expected["mean_squared_error"][new])
    check(abs(own - auroc["mean_squared_error"]) < 1e-6, f"AUROC of the mean squared error is {own}")
    return auroc


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
