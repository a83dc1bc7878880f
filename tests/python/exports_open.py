"""Proves that exports hold what the tables hold, row for row, as the tools they are for will read them.

    exports_open.py TABLES EXPORTS IMAGES

TABLES is the folder of the published tables, of a pipeline by cosine that keeps the column `label`. EXPORTS holds one folder for each
form, named as the command line names it. IMAGES is the source: Parquet files with the columns `image_id` and `image`.

numpy is read by NumPy and DuckDB. What autofaiss does with img_emb, all arrays one after the other in a flat index for inner products,
is done with FAISS, whose neighbors must be those of the table. fiftyone is parsed as JSON, and its pictures compared with the
source's bytes.
"""

import json
import sys
from pathlib import Path

import duckdb
import faiss
import numpy as np
import pyarrow.parquet as pq
from deltalake import DeltaTable

from check import check
from published import read_delta

# Distances nearer to each other than that are a tie, whose order FAISS leaves open.
TIE = 1e-6

FIELDS = "fiftyone.core.fields."


def partition_of(row: dict, keys: list[str]) -> str:
    return "/".join(f"{key}={row[key]}" for key in keys)


def published(tables: Path, name: str) -> dict[tuple[str, str], list[dict]]:
    """The rows of a table by partition and image."""
    keys = DeltaTable(str(tables / name)).metadata().partition_columns
    found: dict[tuple[str, str], list[dict]] = {}
    for row in read_delta(tables / name).to_pylist():
        found.setdefault((partition_of(row, keys), row["image_id"]), []).append(row)
    return found


class Truth:
    def __init__(self, tables: Path) -> None:
        rows = published(tables, "latents")
        self.latents = {key: row for key, [row] in rows.items() if row["status"] == "ok"}
        check(len(self.latents) < len(rows), "the source has no image that was rejected")
        check(len({partition for partition, _ in self.latents}) > 1, "the table has one partition only")
        self.dim = len(next(iter(self.latents.values()))["embedding"])
        self.anomalies = {key: row for key, [row] in published(tables, "anomalies").items()}
        self.groups = {key: row for key, [row] in published(tables, "groups").items()}
        self.neighbors = {
            key: [
                ((row["neighbor_partition"], row["neighbor_id"]), row["distance"])
                for row in sorted(rows, key=lambda row: row["rank"])
            ]
            for key, rows in published(tables, "neighbors").items()
        }

    def check_rows(self, name: str, rows: list[dict]) -> list[tuple[str, str]]:
        """Checks all columns of an export but vectors and neighbors; returns the rows' keys."""
        keys = [(row["partition"], row["image_id"]) for row in rows]
        check(sorted(keys) == sorted(self.latents), f"{name} has {len(keys)} rows, latents has {len(self.latents)}")
        partitions = [partition for partition, _ in keys]
        check(partitions == sorted(partitions), f"the partitions of {name} do not stand together")
        for key, row in zip(keys, rows):
            flags, group = self.anomalies[key], self.groups[key]
            representative = (group["representative_partition"], group["representative_id"])
            expected = {
                "label": self.latents[key]["label"],
                "anomaly_score": flags["anomaly_score"],
                "is_anomaly": flags["is_anomaly"],
                "reasons": flags["reasons"],
                "group_id": group["group_id"],
                "group_size": group["group_size"],
                "is_representative": representative == key,
            }
            found = {column: row[column] for column in expected}
            check(found == expected, f"{name}, {key}: {found}, not {expected}")
        return keys

    def check_vectors(self, name: str, keys: list[tuple[str, str]], vectors: np.ndarray, unit: bool) -> None:
        check(vectors.dtype == np.dtype("<f4") and vectors.flags.c_contiguous, f"{name}: {vectors.dtype}")
        check(vectors.shape == (len(keys), self.dim), f"{name} has the shape {vectors.shape}")
        exact = np.array([self.latents[key]["embedding"] for key in keys], np.float32)
        if unit:
            exact = (exact / np.linalg.norm(exact.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
            check(np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6, f"vectors of {name} are not of length 1")
        check(np.array_equal(vectors, exact), f"vectors of {name} differ by up to {np.abs(vectors - exact).max()}")


def numpy(truth: Truth, folder: Path) -> None:
    rows = duckdb.sql(f"SELECT * FROM read_parquet('{folder / 'rows.parquet'}')").to_arrow_table().to_pylist()
    keys = truth.check_rows("rows.parquet", rows)
    truth.check_vectors("embeddings.npy", keys, np.load(folder / "embeddings.npy", mmap_mode="r"), unit=False)


def clip_retrieval(truth: Truth, folder: Path) -> None:
    arrays, tables = sorted(folder.glob("img_emb/*")), sorted(folder.glob("metadata/*"))
    check([path.name for path in arrays] == ["img_emb_0.npy"], f"{arrays}")
    check([path.name for path in tables] == ["metadata_0.parquet"], f"{tables}")
    vectors = np.concatenate([np.load(path) for path in arrays])
    rows = [row for path in tables for row in pq.read_table(path).to_pylist()]
    keys = truth.check_rows("metadata", rows)
    truth.check_vectors("img_emb", keys, vectors, unit=True)
    check([row["image_path"] for row in rows] == [image_id for _, image_id in keys], "image_path is not the id")
    index = faiss.IndexFlatIP(truth.dim)
    index.add(vectors)
    products, found = index.search(vectors, len(keys))
    for own, key in enumerate(keys):
        near = [(keys[row], 1 - product) for row, product in zip(found[own], products[own]) if row != own]
        listed = truth.neighbors[key]
        check(len(listed) > 1, f"{key} has {len(listed)} neighbors")
        distances = dict(near)
        for (other, distance), (theirs, their_distance) in zip(listed, near):
            check(abs(distance - distances[other]) < TIE, f"{key}: {other} at {distance}, in FAISS {distances[other]}")
            check(other == theirs or abs(distance - their_distance) < TIE, f"{key}: {other}, in FAISS {theirs}")


def embedding_atlas(truth: Truth, folder: Path) -> None:
    rows = pq.read_table(folder / "atlas.parquet").to_pylist()
    keys = truth.check_rows("atlas.parquet", rows)
    truth.check_vectors("atlas.parquet", keys, np.array([row["embedding"] for row in rows], np.float32), unit=False)
    across = 0
    for key, row in zip(keys, rows):
        near = row["neighbors"]
        check(list(near) == ["ids", "distances"], f"{near}")
        found = [(keys[number], distance) for number, distance in zip(near["ids"], near["distances"], strict=True)]
        check(found == truth.neighbors[key], f"{key}: {found}, not {truth.neighbors[key]}")
        across += sum(other[0] != key[0] for other, _ in found)
    check(across > 0, "no neighbor lies in another partition")


def fiftyone(truth: Truth, folder: Path, images: Path) -> None:
    dataset = json.loads((folder / "samples.json").read_text())
    check(dataset["media_type"] == "image" and dataset["name"], f"{dataset['name']}")
    fields, samples = dataset["sample_fields"], dataset["samples"]
    expected = {
        "image_id": "StringField",
        "label": "IntField",
        "anomaly_score": "FloatField",
        "is_anomaly": "BooleanField",
        "reasons": f"ListField({FIELDS}StringField)",
        "embedding": "VectorField",
    }
    for name, kind in expected.items():
        check(fields[name] == FIELDS + kind, f"{name} is {fields[name]}")
    keys = truth.check_rows("samples.json", samples)
    vectors = np.array([sample["embedding"] for sample in samples], np.float32)
    truth.check_vectors("samples.json", keys, vectors, unit=False)
    bytes_of = {}
    for path in images.glob("*/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            bytes_of[path.parent.name, row["image_id"]] = row["image"]
    tagged = {"anomaly": 0, "duplicate": 0}
    for key, sample in zip(keys, samples):
        check(set(sample) == {*fields, "filepath", "tags"}, f"{sorted(sample)}")
        check((folder / sample["filepath"]).read_bytes() == bytes_of[key], f"{sample['filepath']} is not {key}")
        check(sample["filepath"].endswith(".png"), sample["filepath"])
        tags = ["anomaly"] * (sample["is_anomaly"] is True) + ["duplicate"] * (sample["is_representative"] is False)
        check(sample["tags"] == tags, f"{sample['tags']}, not {tags}")
        for tag in tags:
            tagged[tag] += 1
    check(all(tagged.values()), f"tags that no sample has: {tagged}")
    check(len(list(folder.glob("data/*"))) == len(samples), "there are other pictures")


def main(tables: Path, exports: Path, images: Path) -> str:
    truth = Truth(tables)
    numpy(truth, exports / "numpy")
    clip_retrieval(truth, exports / "clip-retrieval")
    embedding_atlas(truth, exports / "embedding-atlas")
    fiftyone(truth, exports / "fiftyone", images)
    return f"{len(truth.latents)} rows of {truth.dim} values in four forms"


if __name__ == "__main__":
    print("ok:", main(*(Path(argument) for argument in sys.argv[1:4])))
