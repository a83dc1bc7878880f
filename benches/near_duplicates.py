"""How well are near-duplicates found? Plants changed copies of real pictures and asks the tables for them.

    near_duplicates.py PROGRAM CELLS ENCODER WORK [--pictures N]

CELLS is the image table of solar cells that the demo makes, ENCODER a model package with an embedding. Of N pictures, copies are made
that are the same picture to a person: JPEG at quality 80 and 50, resized to 75 % and 50 %, 2 % cut off at each side, 10 % darker and
brighter. PROGRAM embeds and compares all of them, once with ENCODER and once with the PCA model that it fits to the originals.

Printed are, for each model, pairwise precision and recall by threshold (a pair is found when it is in `neighbors` within the threshold,
and right when both are copies of one picture), the threshold of the best F1, the same for the pairs that share a group of `groups` at
this threshold, and by kind of change the share of copies that are in the group of their original. Cells that are as alike as copies
count as wrong, though some of them may well be the same cell. The last line is all of it as JSON. What lies in WORK is removed.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/python"))
from published import read_delta  # noqa: E402

# More than there are copies of a picture, so that lists have room for all of them.
K = 20

# Thresholds that are printed: each is where so much of the right pairs is found, and around the best.
RECALLS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def encode(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def resized(picture: Image.Image, factor: float) -> bytes:
    size = tuple(round(side * factor) for side in picture.size)
    return encode(picture.resize(size, Image.Resampling.LANCZOS))


def cropped(picture: Image.Image, share: float) -> bytes:
    (width, height), (x, y) = picture.size, (round(side * share) for side in picture.size)
    return encode(picture.crop((x, y, width - x, height - y)))


CHANGES = {
    "original": encode,
    "jpeg 80": lambda picture: encode(picture, "JPEG", quality=80),
    "jpeg 50": lambda picture: encode(picture, "JPEG", quality=50),
    "resize 75 %": lambda picture: resized(picture, 0.75),
    "resize 50 %": lambda picture: resized(picture, 0.5),
    "crop 2 %": lambda picture: cropped(picture, 0.02),
    "darker 10 %": lambda picture: encode(ImageEnhance.Brightness(picture).enhance(0.9)),
    "brighter 10 %": lambda picture: encode(ImageEnhance.Brightness(picture).enhance(1.1)),
}


def plant(cells: Path, out: Path, num_pictures: int) -> None:
    """Writes the pictures, evenly taken from all there are, with all their copies."""
    rows = [row for file in sorted(cells.rglob("*.parquet")) for row in pq.read_table(file, partitioning=None).to_pylist()]
    chosen = [rows[number] for number in np.linspace(0, len(rows) - 1, num_pictures).astype(int)]
    table = {"image_id": [], "image": [], "picture": [], "change": []}
    for row in chosen:
        picture = Image.open(io.BytesIO(row["image"]))
        for change, apply in CHANGES.items():
            table["image_id"].append(f"{row['image_id']} {change}")
            table["image"].append(apply(picture))
            table["picture"].append(row["image_id"])
            table["change"].append(change)
    out.mkdir(parents=True)
    pq.write_table(pa.table(table), out / "pictures.parquet", row_group_size=256, compression="none")


def run(program: Path, work: Path, verb: str, pipeline: str, *options: str) -> None:
    ran = subprocess.run([program, verb, work / pipeline, *options], capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"lookalike {verb} {pipeline} failed:\n{ran.stderr}")


def write_pipeline(work: Path, name: str, package: str, threshold: float) -> None:
    (work / f"{name}.toml").write_text(
        f"""[pipeline]
name = "{name}"
[source]
table = "images"
columns = ["picture", "change"]
[model]
package = {json.dumps(package)}
[neighbors]
k = {K}
duplicate_distance = {threshold!r}
[anomaly]
enabled = false
[output]
table = "tables-{name}"
"""
    )


def read(work: Path, name: str, table: str, columns: list[str]) -> pa.Table:
    return read_delta(work / f"tables-{name}" / table, columns=columns)


def scores(found: int, right: int, planted: int) -> dict:
    precision, recall = right / max(found, 1), right / planted
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}


def curve(pairs: pa.Table, picture_of: dict, planted: int) -> list[dict]:
    """Precision and recall at every distance of a pair, ascending."""
    distances: dict[tuple[str, str], float] = {}
    for a, b, distance in zip(*(pairs[name].to_pylist() for name in pairs.column_names), strict=True):
        distances[min(a, b), max(a, b)] = distance
    curve, right = [], 0
    ordered = sorted((distance, picture_of[a] == picture_of[b]) for (a, b), distance in distances.items())
    for number, (distance, is_right) in enumerate(ordered, start=1):
        right += is_right
        # Pairs of one distance are found together.
        if number == len(ordered) or ordered[number][0] > distance:
            curve.append({"threshold": distance, **scores(number, right, planted)})
    return curve


def grouped(groups: pa.Table, picture_of: dict, change_of: dict, planted: int) -> tuple[dict, dict]:
    """Pairwise scores of the groups, and by kind of change the share of copies that are with their original."""
    representative = dict(zip(groups["image_id"].to_pylist(), groups["representative_id"].to_pylist(), strict=True))
    pairs = lambda counts: sum(count * (count - 1) // 2 for count in counts.values())  # noqa: E731
    found = pairs(Counter(representative.values()))
    right = pairs(Counter((head, picture_of[image]) for image, head in representative.items()))
    with_original = Counter(
        change_of[image] for image, head in representative.items() if head == representative[f"{picture_of[image]} original"]
    )
    num_pictures = len(set(picture_of.values()))
    by_change = {change: with_original[change] / num_pictures for change in CHANGES if change != "original"}
    return scores(found, right, planted), by_change


def measure(program: Path, work: Path, name: str, package: str) -> dict:
    write_pipeline(work, name, package, 0.0)
    run(program, work, "run", f"{name}.toml")
    latents = read(work, name, "latents", ["image_id", "picture", "change"]).to_pylist()
    picture_of = {row["image_id"]: row["picture"] for row in latents}
    change_of = {row["image_id"]: row["change"] for row in latents}
    copies = Counter(picture_of.values())
    planted = sum(count * (count - 1) // 2 for count in copies.values())
    points = curve(read(work, name, "neighbors", ["image_id", "neighbor_id", "distance"]), picture_of, planted)
    best = max(points, key=lambda point: point["f1"])
    # The groups alone are made again. A little above the distance, which is a float32 in the table.
    write_pipeline(work, name, package, best["threshold"] * (1 + 1e-6))
    run(program, work, "neighbors", f"{name}.toml")
    groups, by_change = grouped(read(work, name, "groups", ["image_id", "representative_id"]), picture_of, change_of, planted)
    shown = [next((point for point in points if point["recall"] >= recall), None) for recall in RECALLS]
    print(f"\n{name}: {len(latents)} images of {len(copies)} pictures, {planted} pairs to be found")
    print(f"{'threshold':>12} {'precision':>10} {'recall':>8} {'F1':>8}")
    for point in sorted((point for point in [*shown, best] if point), key=lambda point: point["threshold"]):
        mark = "  best F1" if point is best else ""
        print(f"{point['threshold']:>12.6f} {point['precision']:>10.4f} {point['recall']:>8.4f} {point['f1']:>8.4f}{mark}")
    print(f"{'groups':>12} {groups['precision']:>10.4f} {groups['recall']:>8.4f} {groups['f1']:>8.4f}  at the best threshold")
    print("copies in the group of their original:")
    for change, share in by_change.items():
        print(f"  {change:<20} {share:7.1%}")
    return {"best": best, "groups": groups, "by_change": by_change}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("program", "cells", "encoder", "work"):
        arguments.add_argument(name, type=Path)
    arguments.add_argument("--pictures", type=int, default=300)
    given = arguments.parse_args()
    work, program = given.work.resolve(), given.program.resolve()
    shutil.rmtree(work, ignore_errors=True)
    plant(given.cells, work / "images", given.pictures)
    write_pipeline(work, "pca", "model-pca", 0.0)
    run(program, work, "fit", "pca.toml", "--color", "gray", "--where", "change = 'original'")
    packages = {"encoder": str(given.encoder.resolve()), "pca": "model-pca"}
    print(json.dumps({name: measure(program, work, name, package) for name, package in packages.items()}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Not by the usual end: Arrow's threads may still be closing files through Python, and a process whose interpreter goes away under
    # them is aborted ("terminate called without an active exception").
    os._exit(0)
