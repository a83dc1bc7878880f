"""Runs the queries of sql/ in DuckDB, and finds the same rows without SQL: by loops over what pyarrow reads, and by NumPy.

    warehouse_duckdb.py FOLDER

FOLDER holds the Delta tables `tables`, and `other`, which another model has made of the same images, as plain Parquet.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from scipy.stats import rankdata

from check import check
from warehouse import (
    LIKE_DAY,
    QUERIES,
    adapted,
    check_rows,
    duckdb_rows,
    duckdb_with_tables,
    generate,
    image_to_compare,
    live_files,
    settings,
    time_of_query,
)

# An image is (day, id): ids alone need not be unique.
Key = tuple[str, str]


class Tables:
    """The tables of a pipeline as dictionaries."""

    def __init__(self, folder: Path) -> None:
        keys = pa.schema([("ds", pa.string())])

        def read(name: str) -> list[dict]:
            partitioning = ds.partitioning(keys, flavor="hive") if name != "runs" else None
            return ds.dataset(live_files(folder / name), partitioning=partitioning).to_table().to_pylist()

        def by_key(rows: list[dict]) -> dict[Key, dict]:
            return {(row["ds"], row["image_id"]): row for row in rows}

        self.latents, self.anomalies, self.groups = (by_key(read(name)) for name in ("latents", "anomalies", "groups"))
        self.neighbors: dict[Key, list[dict]] = defaultdict(list)
        for row in sorted(read("neighbors"), key=lambda row: row["rank"]):
            self.neighbors[row["ds"], row["image_id"]].append(row)
        self.runs = sorted(read("runs"), key=lambda row: row["finished_at"])

    def nearest(self, key: Key) -> dict:
        return self.neighbors[key][0] if self.neighbors[key] else {}


def image_of(partition: str, image_id: str) -> Key:
    return partition.removeprefix("ds="), image_id


def images(tables: Tables) -> list[dict]:
    """The view `images`."""
    rows = []
    for key, latent in sorted(tables.latents.items()):
        flag, group, nearest = tables.anomalies.get(key, {}), tables.groups.get(key, {}), tables.nearest(key)
        row = {("latents_run_id" if name == "run_id" else name): value for name, value in latent.items()}
        row["image_partition"] = f"ds={key[0]}"
        for table, found in (("anomalies", flag), ("groups", group)):
            for column in generate.read_table(table).columns[1:]:
                row[f"{table}_run_id" if column.name == "run_id" else column.name] = found.get(column.name)
        row["nearest_id"], row["nearest_partition"] = nearest.get("neighbor_id"), nearest.get("neighbor_partition")
        row["nearest_distance"], row["neighbors_run_id"] = nearest.get("distance"), nearest.get("run_id")
        rows.append(row)
    return rows


def anomalies_of_yesterday(tables: Tables) -> list[dict]:
    flags = [flag for (day, _), flag in tables.anomalies.items() if day == "2026-11-05" and flag["is_anomaly"]]
    flags.sort(key=lambda flag: (-flag["anomaly_score"], flag["image_id"]))
    names = ("anomaly_score", "severity_percentile", "p_value", "rule", "reasons")
    return [
        {"image_id": flag["image_id"], "uri": tables.latents[flag["ds"], flag["image_id"]]["uri"]}
        | {name: flag[name] for name in names}
        | {
            "nearest_id": tables.nearest((flag["ds"], flag["image_id"]))["neighbor_id"],
            "nearest_distance": tables.nearest((flag["ds"], flag["image_id"]))["distance"],
        }
        for flag in flags
    ]


def top_strange(tables: Tables) -> list[dict]:
    by_segment = defaultdict(list)
    for (day, _), flag in tables.anomalies.items():
        if flag["anomaly_score"] is not None and "2026-11-02" <= day <= "2026-11-05":
            by_segment[flag["segment"]].append(flag)
    rows = []
    for segment, flags in sorted(by_segment.items()):
        flags.sort(key=lambda flag: (-flag["anomaly_score"], flag["ds"], flag["image_id"]))
        for place, flag in enumerate(flags[:3], 1):
            uri = tables.latents[flag["ds"], flag["image_id"]]["uri"]
            rows.append({"segment": segment, "place": place, "image_id": flag["image_id"], "ds": flag["ds"], "uri": uri})
            names = ("rule", "anomaly_score", "severity_percentile", "p_value", "is_anomaly")
            rows[-1] |= {name: flag[name] for name in names}
    return rows


def near_duplicates(tables: Tables) -> list[dict]:
    rows = []
    for key, group in tables.groups.items():
        kept = image_of(group["representative_partition"], group["representative_id"])
        if kept != key and group["distance_to_representative"] <= 0.001:
            row = {"group_id": group["group_id"], "image_id": key[1], "ds": key[0], "uri": tables.latents[key]["uri"]}
            row["distance_to_representative"] = group["distance_to_representative"]
            row["bytes_saved"] = tables.latents[key]["image_bytes"]
            row["bytes_saved_by_all"] = None
            rows.append(row | {"kept_id": kept[1], "kept_ds": kept[0], "kept_uri": tables.latents[kept]["uri"]})
    for row in rows:
        row["bytes_saved_by_all"] = sum(row["bytes_saved"] for row in rows)
    check(any(row["image_id"].endswith("-small") for row in rows), "no smaller copy is a near-duplicate")
    return sorted(rows, key=lambda row: (row["group_id"], row["distance_to_representative"], row["ds"], row["image_id"]))


def anomaly_rate(tables: Tables) -> list[dict]:
    judged, flagged = defaultdict(int), defaultdict(int)
    for (day, _), flag in tables.anomalies.items():
        judged[day] += flag["is_anomaly"] is not None
        flagged[day] += flag["is_anomaly"] is True
    quiet = [day for day in judged if day <= "2026-11-04"]
    center = sum(flagged[day] for day in quiet) / sum(judged[day] for day in quiet)
    rows = []
    for day in sorted(day for day in judged if day <= "2026-11-05"):
        rate, width = flagged[day] / judged[day], 3 * np.sqrt(center * (1 - center) / judged[day])
        lower, upper = max(0.0, center - width), min(1.0, center + width)
        row = {"ds": day, "judged": judged[day], "flagged": flagged[day], "rate": rate, "center": center}
        rows.append(row | {"lower_limit": lower, "upper_limit": upper, "is_out_of_control": not lower <= rate <= upper})
    is_out = [row["is_out_of_control"] for row in rows]
    check(is_out[-1] and not all(is_out), f"the day of broken cells is not the odd one: {rows}")
    return rows


def coverage(tables: Tables) -> list[dict]:
    recorded = {run["partition"]: run for run in tables.runs}
    rows = []
    for day in sorted({day for day, _ in tables.latents if day >= "2026-11-02"}):
        of_day = {key: latent for key, latent in tables.latents.items() if key[0] == day}
        usable = sum(latent["status"] == "ok" for latent in of_day.values())
        run = recorded[f"ds={day}"]
        ids = {
            "latents_run_id": {latent["run_id"] for latent in of_day.values()},
            "neighbors_run_id": {row["run_id"] for key in of_day for row in tables.neighbors[key]},
            "groups_run_id": {tables.groups[key]["run_id"] for key in of_day if key in tables.groups},
            "run_id": {tables.anomalies[key]["run_id"] for key in of_day},
        }
        row = {"ds": day, "images": len(of_day), "usable": usable}
        row["scored"] = sum(tables.anomalies[key]["anomaly_score"] is not None for key in of_day)
        row["with_neighbors"] = sum(bool(tables.neighbors[key]) for key in of_day)
        row["grouped"] = sum(key in tables.groups for key in of_day)
        row["usable_share"], row["settled_at"] = usable / len(of_day), run["finished_at"]
        row["is_settled"] = len(of_day) == run["rows_in"] and all(found == {run[name]} for name, found in ids.items())
        rows.append(row)
    unsettled = [row["ds"] for row in rows if not row["is_settled"]]
    check(unsettled == ["2026-11-04"], f"not settled are {unsettled}")
    return rows


def reject_causes(tables: Tables) -> list[dict]:
    by_status = defaultdict(list)
    for (day, _), latent in tables.latents.items():
        if day <= "2026-11-05":
            by_status[latent["status"]].append(latent)
    num_images = sum(map(len, by_status.values()))
    rows = []
    for status, latents in sorted(by_status.items(), key=lambda item: (-len(item[1]), item[0])):
        if status != "ok":
            row = {"status": status, "images": len(latents), "share_of_all": len(latents) / num_images}
            row["first_seen"], row["last_seen"] = min(row["ds"] for row in latents), max(row["ds"] for row in latents)
            row["example_id"] = min(row["image_id"] for row in latents)
            rows.append(row | {"example_message": min(row["error_message"] for row in latents)})
    return rows


def model_comparison(tables: Tables, other: Tables) -> list[dict]:
    both = [
        (tables.anomalies[key], other.anomalies[key], key)
        for key, latent in tables.latents.items()
        if tables.anomalies[key]["is_anomaly"] is not None and latent["content_sha256"] == other.latents[key]["content_sha256"]
    ]
    flags = [(a["is_anomaly"], b["is_anomaly"]) for a, b, _ in both]
    ranks = [rankdata([pair[side]["anomaly_score"] for pair in both], "min") for side in (0, 1)]
    names = ("neighbor_id", "neighbor_partition")
    same_nearest = sum(all(tables.nearest(key)[name] == other.nearest(key)[name] for name in names) for _, _, key in both)
    row = {f"model_{letter}": next(iter(of.latents.values()))["model_sha256"] for letter, of in (("a", tables), ("b", other))}
    row |= {"images": len(both), "flagged_by_both": flags.count((True, True)), "flagged_by_a_only": flags.count((True, False))}
    row |= {"flagged_by_b_only": flags.count((False, True)), "flagged_by_neither": flags.count((False, False))}
    return [row | {"rank_correlation": float(np.corrcoef(*ranks)[0, 1]), "same_nearest": same_nearest / len(both)}]


def leakage(tables: Tables) -> list[dict]:
    pairs: dict[tuple[Key, Key], float] = {}
    for key, neighbors in tables.neighbors.items():
        for neighbor in neighbors:
            pair = (key, image_of(neighbor["neighbor_partition"], neighbor["neighbor_id"]))
            for test, train in (pair, pair[::-1]):
                splits = tables.latents[test]["split"], tables.latents[train]["split"]
                if neighbor["distance"] <= 0.002 and splits == ("test", "train"):
                    pairs[test, train] = min(neighbor["distance"], pairs.get((test, train), 2))
    rows = []
    for (test, train), distance in sorted(pairs.items(), key=lambda pair: (pair[1], pair[0])):
        row = {}
        for name, key in (("test", test), ("train", train)):
            row |= {f"{name}_id": key[1], f"{name}_ds": key[0], f"{name}_uri": tables.latents[key]["uri"]}
        is_same = tables.latents[test]["content_sha256"] == tables.latents[train]["content_sha256"]
        rows.append(row | {"distance": distance, "is_same_file": is_same})
    check({row["is_same_file"] for row in rows} == {True, False}, "planted are equal files and smaller copies in both splits")
    return rows


def drift(tables: Tables) -> list[dict]:
    newest = {run["partition"]: run for run in tables.runs if run["drift"] is not None}
    rows = [
        {"image_partition": partition, "finished_at": run["finished_at"]}
        | {name: checked[name] for name in ("input", "metric", "value", "threshold", "p_value")}
        | {"rows_compared": checked["rows"]}
        for partition, run in newest.items()
        for checked in run["drift"]
        if checked["is_anomaly"]
    ]
    check("brightness" in {row["input"] for row in rows if row["image_partition"] == "ds=2026-11-06"}, "the lamp is not found")
    return sorted(rows, key=lambda row: (row["image_partition"], -row["value"] / row["threshold"], row["input"], row["metric"]))


def images_like_this(tables: Tables, image_id: str) -> list[dict]:
    query = np.float64(tables.latents[LIKE_DAY, image_id]["embedding"])
    rows = []
    for (day, other), latent in tables.latents.items():
        if latent["embedding"] is not None and (day, other) != (LIKE_DAY, image_id):
            vector = np.float64(latent["embedding"])
            distance = 1 - query @ vector / np.sqrt((query @ query) * (vector @ vector))
            rows.append({"image_id": other, "ds": day, "uri": latent["uri"], "distance": float(distance)})
    rows.sort(key=lambda row: (row["distance"], row["ds"], row["image_id"]))
    check(rows[0]["image_id"] == f"{image_id}-small", f"the smaller copy is not the nearest: {rows[:2]}")
    return rows[:10]


def check_columns(connection: duckdb.DuckDBPyConnection, tables: list) -> None:
    """Every column of every view has the type and the comment that schemas/ says."""
    columns = "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() WHERE schema_name = 'main' AND NOT internal"
    found = {(row["table_name"], row["column_name"]): (row["data_type"], row["comment"]) for row in duckdb_rows(connection, columns)}
    for table in tables:
        for column in table.columns:
            [type_] = duckdb_rows(connection, f"SELECT typeof(CAST(NULL AS {generate.type_in('duckdb', column.type)})) AS name")
            wanted = (type_["name"], column.comment())
            check(found[table.name, column.name] == wanted, f"{table.name}.{column.name} is {found[table.name, column.name]}, not {wanted}")


def main(folder: Path) -> str:
    connection = duckdb_with_tables(folder)
    tables, other = Tables(folder / "tables"), Tables(folder / "other")
    image_id, now = image_to_compare(connection), time_of_query(connection)
    run = tables.runs[-1]
    last = max(run["finished_at"] for run in tables.runs)
    hours = (now - last.replace(tzinfo=None)) / timedelta(hours=1)
    partition = max(run["partition"] for run in tables.runs)
    fresh = {"pipeline": json.loads(run["settings"])["pipeline"]["name"], "newest_partition": partition, "last_change": last}
    expected: dict[str, Callable[[], list[dict]]] = {
        "anomalies_of_yesterday": lambda: anomalies_of_yesterday(tables),
        "anomaly_rate": lambda: anomaly_rate(tables),
        "coverage": lambda: coverage(tables),
        "drift": lambda: drift(tables),
        "freshness": lambda: [fresh | {"hours_ago": hours, "is_stale": True}],
        "images_like_this": lambda: images_like_this(tables, image_id),
        "leakage": lambda: leakage(tables),
        "model_comparison": lambda: model_comparison(tables, other),
        "near_duplicates": lambda: near_duplicates(tables),
        "reject_causes": lambda: reject_causes(tables),
        "top_strange": lambda: top_strange(tables),
    }
    check(expected.keys() == set(QUERIES), f"the queries are {QUERIES}")
    described = generate.read_tables(settings(str(folder)))
    check_columns(connection, described + [generate.images_view("duckdb", described, settings(str(folder)))[0]])
    for schema, of in (("main", tables), ("other", other)):
        check_rows(f"{schema}.images", duckdb_rows(connection, f"SELECT * FROM {schema}.images ORDER BY ds, image_id"), images(of))
    counts = {}
    for name, rows in expected.items():
        found = duckdb_rows(connection, adapted("duckdb", name, image_id, now))
        check_rows(name, found, rows())
        counts[name] = len(found)
    return f"rows by query: {counts}"


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1])))
