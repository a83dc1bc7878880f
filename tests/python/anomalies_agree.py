"""Computes scores, percentiles, p-values and flags anew from a reference and `latents`, with NumPy, SciPy and scikit-learn.

    anomalies_agree.py REFERENCE TABLES PARTITION

Relative differences may be up to 1e-5. Rows that are in the reference are scored there as if they were not, and are left out here.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.spatial.distance import mahalanobis
from scipy.stats import false_discovery_control
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import NearestNeighbors

from published import read_delta

TOLERANCE = 1e-5

reference_file, tables, partition = sys.argv[1:]
key, value = partition.split("=")
reference = pq.read_table(reference_file)
footer = json.loads(pq.read_metadata(reference_file).metadata[b"lookalike.reference"])
header = footer["header"]
counted = np.array(reference["is_counted"])
bank = np.array(reference["embedding"].to_pylist())


def table(name: str) -> pa.Table:
    found = read_delta(Path(tables) / name)
    return found.filter(pc.equal(found[key], value)).sort_by("image_id")


latents, anomalies = table("latents"), table("anomalies")
known = set(reference["image_id"].to_pylist())
new = np.array([image_id not in known for image_id in latents["image_id"].to_pylist()])
vectors = np.array(latents["embedding"].to_pylist())[new]


def column(of, name: str) -> np.ndarray:
    return np.array(of[name], np.float64)


def agree(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-9))
    print(f"{name}: largest relative difference {difference:.1e} over {len(found)} rows")
    assert difference < TOLERANCE, name


# The line through the logarithms, and beyond its ends the factor by which the complexity is outside.
logarithm = np.log(column(reference, "complexity")[counted])
line = LinearRegression().fit(logarithm[:, None], np.log(column(reference, "top_1pct_squared_error")[counted]))
complexity = np.log(column(latents, "complexity")[new])
within = np.clip(complexity, logarithm.min(), logarithm.max())
expected = np.exp(line.predict(within[:, None]) - np.abs(complexity - within))
adjusted = column(latents, "top_1pct_squared_error")[new] / expected
agree("complexity_adjusted_error", column(anomalies, "complexity_adjusted_error")[new], adjusted)

parts = np.split(np.arange(bank.shape[1]), header["regions"])
distances = []
for part in parts:
    covariance = LedoitWolf().fit(bank[:, part])
    inverse = np.linalg.inv(covariance.covariance_)
    distances.append([mahalanobis(row, covariance.location_, inverse) for row in vectors[:, part]])
agree("mahalanobis_distance", column(anomalies, "mahalanobis_distance")[new], np.max(distances, axis=0))

search = NearestNeighbors(n_neighbors=header["k"], metric=header["metric"], algorithm="brute").fit(bank)
nearest = search.kneighbors(vectors)[0][:, -1]
agree("knn_distance", column(anomalies, "knn_distance")[new], nearest)

# Counted rows have scores as if they were not in the reference; their fused ones follow from the others, as new rows' do.
views = ["complexity_adjusted_error", "mahalanobis_distance", "knn_distance"]
in_reference = np.array([latents["image_id"].to_pylist().index(name) for name in reference["image_id"].to_pylist()])[counted]
of_counted = np.stack([np.log(column(anomalies, view)[in_reference]) for view in views])
mean, deviation = of_counted.mean(axis=1, keepdims=True), of_counted.std(axis=1, keepdims=True)
of_new = np.stack([np.log(column(anomalies, view)[new]) for view in views])
fused = np.maximum((of_new - mean) / deviation, -3).mean(axis=0)
found = column(anomalies, "fused")[new]
assert np.max(np.abs(found - fused)) < TOLERANCE, np.max(np.abs(found - fused))

scores = np.sort(column(anomalies, "fused")[in_reference])
above = np.array([(scores >= score).sum() for score in found])
p_values = (1 + above) / (1 + len(scores))
agree("p_value", column(anomalies, "p_value")[new], p_values)
percentiles = np.array([100 * (scores <= score).mean() for score in found])
assert np.max(np.abs(column(anomalies, "severity_percentile")[new] - percentiles)) < TOLERANCE

settings = json.loads(read_delta(Path(tables) / "runs")["settings"].to_pylist()[-1])
flags = np.array(anomalies["is_anomaly"])
threshold = settings["anomaly"]["threshold"]
if "fdr" in threshold:
    adjusted_p = false_discovery_control(column(anomalies, "p_value"), method="bh")
    expected = adjusted_p <= threshold["fdr"] + 1e-12
    print(f"false discovery rate {threshold['fdr']}: {expected.sum()} flags")
    assert expected.sum() > 0
else:
    cutoff = scores[len(scores) - 1 - int(threshold["contamination"] * len(scores))]
    expected = column(anomalies, "fused") > cutoff
assert (flags == expected).all(), (flags != expected).sum()
for row in anomalies.select(["is_anomaly", "reasons"]).to_pylist():
    assert (row["reasons"][:1] == ["fused"]) == row["is_anomaly"]

# Not by the usual end: Arrow's threads may still be closing files through Python, and a process whose interpreter goes away under
# them is aborted ("terminate called without an active exception").
sys.stdout.flush()
os._exit(0)
