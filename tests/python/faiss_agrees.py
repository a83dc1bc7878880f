"""Proves that neighbor lists are those that FAISS finds by brute force.

    faiss_agrees.py METRIC DIM K VECTORS ROWS DISTANCES

METRIC is `cosine` or `l2`. The files are little-endian without a header: VECTORS f32, a row of DIM values each; ROWS u32 and
DISTANCES f32, K for each row of VECTORS, nearest first. Cosine is IndexFlatIP on normalized rows, l2 is IndexFlatL2.

Where the lists name different rows at a rank, the two rows must be as far from the query: within 1e-6 of the squared norms,
which is what is left of an inner product in f32. FAISS leaves the order of such ties open. Distances are compared with
float64's.
"""

import sys
from pathlib import Path

import faiss
import numpy as np

from check import check

TIE = 1e-6


def main(metric: str, dim: int, k: int, files: list[Path]) -> str:
    x = np.fromfile(files[0], "<f4").reshape(-1, dim)
    rows = np.fromfile(files[1], "<u4").reshape(-1, k).astype(np.int64)
    distances = np.fromfile(files[2], "<f4").reshape(-1, k)
    check(len(rows) == len(x), f"{len(rows)} lists of {len(x)} rows")
    exact = x.astype(np.float64)
    if metric == "cosine":
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(dim) if metric == "cosine" else faiss.IndexFlatL2(dim)
    prepared = exact.astype(np.float32)
    index.add(prepared)
    theirs = without_self(index.search(prepared, k + 1)[1], k)

    own = np.arange(len(x))[:, None]
    check(not (rows == own).any(), "a row is its own neighbor")
    check(all(len(set(found)) == k for found in rows), "a row is twice in a list")
    check((np.diff(distances, axis=1) >= 0).all(), "a list is not ascending")
    squared, scale = squared_distances(exact, rows)
    expected = squared / 2 if metric == "cosine" else np.sqrt(squared)
    off = np.abs(distances - expected).max()
    check(np.allclose(distances, expected, rtol=1e-6, atol=1e-7), f"distances are off by up to {off:.1e}")

    theirs_squared, _ = squared_distances(exact, theirs)
    differ = rows != theirs
    apart = np.abs(squared - theirs_squared)[differ] / scale[differ]
    check((apart <= TIE).all(), f"{np.sum(apart > TIE)} neighbors differ beyond ties, by up to {apart.max(initial=0):.1e}")
    return f"{len(x)} x {dim}, {metric}: {rows.size} neighbors, {differ.sum()} of them ties in another order"


def without_self(found: np.ndarray, k: int) -> np.ndarray:
    """Each list without its own row, or without its last where more than k rows are as near as that."""
    return np.array([[row for row in near if row != query][:k] for query, near in enumerate(found)])


def squared_distances(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row to those of its list, and the squared norms of the two, added."""
    squared = np.stack([np.sum((x - x[near]) ** 2, axis=1) for near in rows.T], axis=1)
    norms = np.sum(x**2, axis=1)
    return squared, norms[:, None] + norms[rows]


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[4:]]
    print("ok:", main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), arguments))
