"""Computes what a report says anew from the published tables, with pyarrow, NumPy and Pillow.

    report_agrees.py REPORT.json TABLES [PARTITION ...]

PARTITIONs (key=value) are those that the report must be about; none: those of the newest row of `runs`. Pictures must decode, and be those
of the images: no two strange images have the same.
"""

import base64
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from deltalake import DeltaTable
from PIL import Image

from published import read_delta

report = json.loads(Path(sys.argv[1]).read_text())
tables, wanted = Path(sys.argv[2]), sys.argv[3:]


def rows(name: str) -> list[dict]:
    keys = DeltaTable(str(tables / name)).metadata().partition_columns
    found = read_delta(tables / name).to_pylist()
    for row in found:
        row["_partition"] = "/".join(f"{key}={row[key]}" for key in keys)
    return found


runs = [run for run in rows("runs") if run["pipeline"] == report["pipeline"]]
newest = max(run["finished_at"] for run in runs)
last = {}
for run in sorted(runs, key=lambda run: run["finished_at"]):
    last[run["partition"] or ""] = run
scope = set(wanted) or {name for name, run in last.items() if run["finished_at"] == newest}
assert {row["partition"] for row in report["partitions"]} == scope, (report["partitions"], scope)
of = lambda name: [row for row in rows(name) if row["_partition"] in scope]  # noqa: E731
answer = report["answer"]
for column in ("rows_in", "rows_ok", "rows_rejected", "rows_flagged"):
    assert answer[column] == sum(last[name][column] for name in scope), column

latents, anomalies, groups = of("latents"), of("anomalies"), of("groups")
name_of = lambda row: (row["_partition"], row["image_id"])  # noqa: E731
shown = lambda row: (row["partition"], row["image_id"])  # noqa: E731
by_name = {name_of(row): row for row in latents}

# The strangest.
scored = [row for row in anomalies if row["anomaly_score"] is not None]
strangest = sorted(scored, key=lambda row: (-row["anomaly_score"], row["image_id"], row["_partition"]))[:24]
assert [shown(row) for row in report["strangest"]] == [name_of(row) for row in strangest]
for found, expected in zip(report["strangest"], strangest, strict=True):
    assert found["score"] == expected["anomaly_score"] and found["p_value"] == expected["p_value"]
    assert found["is_anomaly"] == expected["is_anomaly"] and found["reasons"] == expected["reasons"]

# The distribution.
scores = report["scores"]
values = np.array([row["anomaly_score"] for row in scored])
flags = np.array([row["is_anomaly"] for row in scored])
edges = np.array(scores["edges"])
assert np.isclose(edges[0], values.min()) and np.isclose(edges[-1], values.max()) and np.all(np.diff(edges) > 0)
place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
assert scores["counts"] == np.bincount(place, minlength=len(edges) - 1).tolist()
assert scores["flagged"] == np.bincount(place[flags], minlength=len(edges) - 1).tolist()
assert scores["missing"] == len(anomalies) - len(scored)
thresholds = {(row["segment"], row["anomaly_threshold"]) for row in scored}
assert {(line["segment"], line["value"]) for line in scores["thresholds"]} == thresholds
rows_of_reference = report["anomaly"]["reference"]["rows"]
assert (scores["reference"] is None) == (rows_of_reference is None)
assert scores["reference"] is None or sum(scores["reference"]) == rows_of_reference

# Rejects.
rejected = Counter(row["status"] for row in latents if row["status"] != "ok")
assert {cause["status"]: cause["rows"] for cause in report["rejects"]} == rejected
for cause in report["rejects"]:
    assert 0 < len(cause["examples"]) <= cause["rows"]
    for example in cause["examples"]:
        assert by_name[shown(example)]["error_message"] == example["message"]

# Groups.
members = [row for row in groups if row["group_size"] > 1]
is_head = lambda row: row["image_id"] == row["representative_id"] and row["_partition"] == row["representative_partition"]  # noqa: E731
doubles = [row for row in members if not is_head(row)]
assert (answer["groups"], answer["duplicates"]) == (len(members) - len(doubles), len(doubles))
assert answer["duplicate_bytes"] == sum(by_name[name_of(row)]["image_bytes"] for row in doubles)
sizes = sorted({row["group_id"]: row["group_size"] for row in members}.items(), key=lambda group: (-group[1], group[0]))
assert [(group["group_id"], group["size"]) for group in report["groups"]] == sizes[:12]
for group in report["groups"]:
    images = [row for row in rows("groups") if row["group_id"] == group["group_id"]]
    found = {shown(image): image for image in group["images"]}
    assert len(found) == len(group["images"]) and group["images"][0]["is_representative"]
    assert set(found) <= {name_of(row) for row in images} and len(found) >= min(12, sum(row["_partition"] in scope for row in images))

# The map: a sample of the images, the strangest among them, in the plane of the principal components of their vectors.
plane = report["map"]
points = list(zip(plane["partition"], plane["image_id"], strict=True))
usable = {name for name, row in by_name.items() if row["status"] == "ok"}
assert len(set(points)) == len(points) == min(3000, len(usable)) and set(points) <= usable and plane["of"] == len(usable)
assert {name_of(row) for row in strangest} <= set(points)
judged = {name_of(row): row for row in anomalies}
assert plane["score"] == [judged[point]["anomaly_score"] for point in points]
assert plane["is_anomaly"] == [judged[point]["is_anomaly"] for point in points]
vectors = np.array([by_name[point]["embedding"] for point in points], np.float64)
vectors -= vectors.mean(axis=0)
_, strengths, directions = np.linalg.svd(vectors, full_matrices=False)
explained = strengths**2 / np.sum(strengths**2)
assert np.allclose(plane["explained"], explained[:2], rtol=0.02), (plane["explained"], explained[:2])
for axis, (found, direction) in enumerate(zip((plane["x"], plane["y"]), directions, strict=False)):
    cosine = abs(np.corrcoef(found, vectors @ direction)[0, 1])
    assert cosine > 0.98, (axis, cosine)
for column in plane["columns"]:
    assert column["values"] == [by_name[point][column["name"]] for point in points], column["name"]

# Drift and history.
drift = {(name, check["input"], check["metric"]): check for name in scope for check in last[name]["drift"] or []}
assert len(report["drift"]) == len(drift)
for check in report["drift"]:
    expected = drift[check["partition"], check["input"], check["metric"]]
    assert all(check[key] == expected[key] for key in ("value", "threshold", "p_value", "rows", "is_anomaly")), check
assert len(report["history"]) == len(runs)


def picture(of: dict) -> Image.Image:
    kind, data = of["data"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert kind == f"data:image/{image.format.lower()};base64" and image.size == (of["width"], of["height"])
    return image


if report["kind"] == "images":
    looks = [picture(strange["pictures"]["image"]) for strange in report["strangest"]]
    assert all(max(look.size) <= 256 for look in looks) and len({look.tobytes() for look in looks}) > len(looks) // 2
    for strange in report["strangest"]:
        panels = strange["pictures"]
        if panels["reconstruction"]:
            assert picture(panels["input"]).size == picture(panels["reconstruction"]).size == picture(panels["error_map"]).size
            assert strange["largest_error"] > 0
    for group in report["groups"]:
        for image in group["images"]:
            assert image["picture"] is None or max(picture(image["picture"]).size) <= 112
    tiles = [tile for tile in plane["sheet_place"] if tile >= 0]
    sheet = picture(plane["sheet"])
    assert len(set(tiles)) == len(tiles) == min(400, len(points))
    assert sheet.width == 48 * plane["sheet_columns"] and sheet.height == 48 * -(-len(tiles) // plane["sheet_columns"])
print(f"{len(scope)} partitions, {len(points)} points, {len(report['groups'])} groups, {len(report['drift'])} checks")
