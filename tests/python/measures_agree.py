"""Proves that `evaluate` measures what scikit-learn measures, on the same rows of the same tables.

    measures_agree.py IMAGES MODEL TABLES RULES MODELS

IMAGES is the folder of the solar cells of one module and MODEL their package, a linear one fitted to the split `fit`; TABLES are
the tables of a run. RULES is the Parquet file that `evaluate` wrote, and MODELS the JSON that it printed, for the positive rows
`defect > 0.99`, the negative rows `defect = 0 AND split <> 'fit'`, the label `defect`, and a baseline fitted to the split `fit`.
"""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from check import check
from published import read_delta
from image_table import read_rows, to_tensor

# Of the pipeline's threshold.
CONTAMINATION = 0.05


def main(images: Path, package: Path, tables: Path, rules: Path, models: Path) -> str:
    module = images.name.removeprefix("module=")
    flags = {row["image_id"]: row for row in rows_of(tables / "anomalies", module)}
    # Scores that compare an image with the reference are columns of `anomalies`.
    rows = [flags[row["image_id"]] | row for row in rows_of(tables / "latents", module) if is_known(row)]
    truth = np.array([row["defect"] > 0.99 for row in rows])
    everything = {row["image_id"]: flags[row["image_id"]] | row for row in rows_of(tables / "latents", module)}
    reference = pq.read_table(tables.parent / f"reference-{module}.parquet", columns=["image_id", "is_counted"])
    counted = [row["image_id"] for row in reference.to_pylist() if row["is_counted"]]

    largest = 0.0
    found = {(row["model"], row["rule"]): row for row in pq.read_table(rules).to_pylist()}
    printed = json.loads(models.read_text())
    check({(row["model"], row["rule"]): row for row in printed["rules"]} == found, "the JSON and the Parquet file differ")
    names = {rule for model, rule in found if model == "model"}
    check({"mean_squared_error", "top_1pct_squared_error", "kl_divergence"} <= names, f"no row for some of {names}")
    for rule in sorted(names):
        row = found["model", rule]
        scores = np.array([scored[rule] for scored in rows], dtype=np.float64)
        expected = {
            "positive": truth.sum(),
            "negative": (~truth).sum(),
            "auroc": roc_auc_score(truth, scores),
            "average_precision": average_precision_score(truth, scores),
        }
        # The scores of the reference's own rows, as if they were not in it, are in the tables with all others.
        frozen = sorted(everything[image_id][rule] for image_id in counted)
        cutoff = frozen[len(frozen) - 1 - int(CONTAMINATION * len(frozen))]
        measures = precision_recall_fscore_support(truth, scores > cutoff, average="binary")
        expected |= dict(zip(("precision", "recall", "f1"), measures))
        if rule == flags[rows[0]["image_id"]]["rule"]:
            flagged = [flags[scored["image_id"]]["is_anomaly"] for scored in rows]
            check((scores > cutoff).tolist() == flagged, f"{rule} flags other rows")
        for name, value in expected.items():
            largest = max(largest, relative(f"{name} of {rule}", row[name], value))
        # The baseline is fitted as the model was, to the same images.
        check(abs(found["baseline", rule]["auroc"] - row["auroc"]) < 1e-3, f"{rule} of the baseline differs")
    check(len(found) == 2 * len(names), f"the baseline has other rules: {found.keys()}")

    quality = {row["model"]: row for row in printed["models"]}["model"]
    embedding = np.array([row["embedding"] for row in rows])
    voters = KNeighborsClassifier(n_neighbors=5, metric="cosine", algorithm="brute")
    predicted = cross_val_predict(voters, embedding, truth, cv=LeaveOneOut())
    mu, logvar = embedding.astype(np.float64), np.array([row["logvar"] for row in rows], dtype=np.float64)
    contract = tomllib.loads((package / "model.toml").read_text())
    tensors = {row.image_id: (row.values["split"], to_tensor(row.image, contract).ravel()) for row in read_rows(images)}
    x = np.array([tensors[row["image_id"]][1] for row in rows], dtype=np.float64)
    fitted = np.array([tensor for split, tensor in tensors.values() if split == "fit"], dtype=np.float64)
    pca = PCA(mu.shape[1], svd_solver="full").fit(fitted)
    residual = x - pca.inverse_transform(pca.transform(x))
    check(quality["latent_dim"] == mu.shape[1], f"{quality['latent_dim']} latents")
    expected = {
        "neighbor_accuracy": (predicted == truth).mean(),
        "majority_share": max(truth.mean(), 1 - truth.mean()),
        "mean_squared_error": np.mean([row["mean_squared_error"] for row in rows]),
        "active_units": (mu.var(axis=0) > 0.01).sum(),
    }
    for name, value in expected.items():
        largest = max(largest, relative(name, quality[name], value))
    divergences = (-0.5 * (1 + logvar - mu**2 - np.exp(logvar))).mean(axis=0)
    check(np.allclose(quality["kl_divergence_per_unit"], divergences, rtol=1e-6, atol=1e-6), "the KL divergences differ")
    # The reconstruction of probabilistic PCA from its mean is a little shrunken towards the mean image.
    explained = 1 - (residual**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    check(abs(quality["explained_variance"] - explained) < 5e-3, f"{quality['explained_variance']} is not {explained}")
    squared = np.mean([row["mean_squared_error"] for row in rows]) * x.size
    expected = 1 - squared / ((x - x.mean(axis=0)) ** 2).sum()
    largest = max(largest, relative("explained_variance", quality["explained_variance"], expected))
    return f"{len(rows)} rows, {len(names)} rules; the largest relative difference {largest:.1e}"


def rows_of(table: Path, module: str) -> list[dict]:
    return [row for row in read_delta(table).to_pylist() if row["module"] == module]


def is_known(row: dict) -> bool:
    return row["defect"] > 0.99 or (row["defect"] == 0 and row["split"] != "fit")


def relative(what: str, found: float, expected: float) -> float:
    check(found is not None, f"{what} is missing")
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    check(difference <= 1e-9, f"{what} is {found}, not {expected}")
    return difference


if __name__ == "__main__":
    print("ok:", main(*map(Path, sys.argv[1:])))
