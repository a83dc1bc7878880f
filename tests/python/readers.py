"""Proves that the published tables are what schemas/ says, and that every reader sees the same rows in them.

    readers.py TABLES EXPECTED

TABLES is the folder of `latents`, `neighbors`, `anomalies` and `runs`. EXPECTED is a JSON file with the rows of each table, the
length of the embedding, and the number of neighbors of each image:

    {"latents": 1074, "neighbors": 10740, "anomalies": 1074, "runs": 1, "embedding_dim": 128, "k": 10}

Readers: delta-rs (DataFusion), pyarrow, Polars and DuckDB. DuckDB reads by its delta extension where
that is installed, and else the live Parquet files that the log names: its wheel comes without the extension, and a test
does not fetch it.
"""

import json
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder

from check import check

SCHEMAS = Path(__file__).parents[2] / "schemas"

# What rows are sorted by, beside the partition keys.
KEYS = {
    "latents": ["image_id"],
    "neighbors": ["image_id", "rank"],
    "anomalies": ["image_id"],
    "runs": ["partition", "started_at"],
}

# Columns of `anomalies` that derive from the score, and are null where it is.
DERIVED = ("severity_percentile", "p_value", "anomaly_threshold", "is_anomaly")

ARROW_TYPES = {
    "string": pa.string(),
    "boolean": pa.bool_(),
    "integer": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "array<float>": pa.list_(pa.field("element", pa.float32(), nullable=False)),
    "array<string>": pa.list_(pa.field("element", pa.string(), nullable=False)),
}
DRIFT = {
    "input": "string",
    "metric": "string",
    "threshold": "double",
    "value": "double",
    "p_value": "double",
    "rows": "long",
    "is_anomaly": "boolean",
}
DRIFT_STRUCT = pa.struct([(name, ARROW_TYPES[type_]) for name, type_ in DRIFT.items()])
DRIFT_TYPE = f"array<struct<{', '.join(f'{name}: {type_}' for name, type_ in DRIFT.items())}>>"
ARROW_TYPES[DRIFT_TYPE] = pa.list_(pa.field("element", DRIFT_STRUCT, nullable=False))


def read_columns(name: str, table: DeltaTable, partition_keys: list[str]) -> list[dict]:
    """The columns of a table in its log and in its data files, which must be those of the contract, in its order.

    Kept source columns stand behind `image_id` of `latents`, and the partition keys at the end, outside of the data files.
    """

    def type_name(type_) -> str:
        if isinstance(type_, str):
            return type_
        if type_["type"] == "struct":
            fields = [f"{field['name']}: {type_name(field['type'])}" for field in type_["fields"]]
            return f"struct<{', '.join(fields)}>"
        check(not type_["containsNull"], f"{name} has a list whose elements may be null")
        return f"{type_['type']}<{type_name(type_['elementType'])}>"

    fields = json.loads(table.schema().to_json())["fields"]
    found = [{"name": field["name"], "type": type_name(field["type"]), "nullable": field["nullable"]} for field in fields]
    contract = tomllib.loads((SCHEMAS / f"{name}.v1.toml").read_text())["column"]
    wanted = [{key: column[key] for key in ("name", "type", "nullable")} for column in contract]
    if name == "latents":
        kept = found[1 : [column["name"] for column in found].index("status")]
        check(all(column["nullable"] for column in kept), f"a kept column is not nullable: {kept}")
        wanted[1:1] = kept
    in_files = arrow_schema(wanted)
    wanted += [{"name": key, "type": "string", "nullable": True} for key in partition_keys]
    check(found == wanted, f"columns of {name} are {found}, not {wanted}")
    for file in table.file_uris():
        schema = pq.read_schema(file.removeprefix("file://")).remove_metadata()
        check(schema.equals(in_files), f"{file} has the columns {schema}, not {in_files}")
    return wanted


def arrow_schema(columns: list[dict]) -> pa.Schema:
    return pa.schema([pa.field(column["name"], ARROW_TYPES[column["type"]], column["nullable"]) for column in columns])


def read_all(table: DeltaTable, connection: duckdb.DuckDBPyConnection, has_delta: bool) -> dict[str, pa.Table]:
    """The whole table by each of the readers."""
    files = [file.removeprefix("file://") for file in table.file_uris()]
    keys = pa.schema([(key, pa.string()) for key in table.metadata().partition_columns])
    if has_delta:
        duckdb_rows = connection.sql("SELECT * FROM delta_scan(?)", params=[table.table_uri])
    else:
        query = "SELECT * FROM read_parquet(?, hive_partitioning = true, hive_types_autocast = false)"
        duckdb_rows = connection.sql(query, params=[files])
    return {
        "delta-rs": pa.table(QueryBuilder().register("t", table).execute("SELECT * FROM t").read_all()),
        "pyarrow": ds.dataset(files, partitioning=ds.partitioning(keys, flavor="hive")).to_table(),
        "Polars": pl.read_delta(table.table_uri).to_arrow(),
        "DuckDB": duckdb_rows.to_arrow_table(),
    }


def normalize(rows: pa.Table, columns: list[dict], keys: list[str]) -> pa.Table:
    """Rows in one order of rows and columns, with the contract's types: readers have large and view types of their own."""
    schema = arrow_schema([column | {"nullable": True} for column in columns])
    return rows.select(schema.names).cast(schema).sort_by([(key, "ascending") for key in keys]).combine_chunks()


def check_latents(rows: list[dict], embedding_dim: int) -> set:
    """Null rules of `latents`; returns the images that have a vector."""
    for row in rows:
        dim = len(row["embedding"] or [])
        check(dim in (0, embedding_dim), f"the embedding of {row['image_id']} has {dim} values")
        is_ok = row["status"] == "ok"
        check((row["embedding"] is not None) == is_ok, f"{row['image_id']} is {row['status']}: embedding does not fit")
        check((row["error_message"] is None) == is_ok, f"{row['image_id']} is {row['status']}: error_message does not fit")
    return {row["image_id"] for row in rows if row["status"] == "ok"}


def check_neighbors(rows: list[dict], embedded: set, k: int) -> None:
    """Every embedded image has k neighbors, nearest first, and is not among them. `rows` are sorted by image and rank."""
    lists: dict[str, list[dict]] = {}
    for row in rows:
        lists.setdefault(row["image_id"], []).append(row)
    check(lists.keys() == embedded, "images with neighbors are not those with an embedding")
    for image_id, neighbors in lists.items():
        check([row["rank"] for row in neighbors] == list(range(1, k + 1)), f"ranks of {image_id} are not 1 to {k}")
        found = [row["neighbor_id"] for row in neighbors]
        check(image_id not in found, f"{image_id} is its own neighbor")
        check(len(set(found)) == k and embedded.issuperset(found), f"neighbors of {image_id} are {found}")
        for nearer, farther in pairwise(neighbors):
            is_ordered = (nearer["distance"], nearer["neighbor_id"]) < (farther["distance"], farther["neighbor_id"])
            check(is_ordered, f"neighbors of {image_id} are not in order at rank {nearer['rank']}")


def check_anomalies(rows: list[dict], embedded: set) -> None:
    """Flags follow from scores and thresholds, and are null exactly where there is no score."""
    scored = {row["image_id"] for row in rows if row["anomaly_score"] is not None}
    check(scored == embedded, "scored images are not those with an embedding")
    for row in rows:
        score, threshold, flag = row["anomaly_score"], row["anomaly_threshold"], row["is_anomaly"]
        if score is None:
            has_none = all(row[name] is None for name in DERIVED) and row["reasons"] == []
            check(has_none, f"{row['image_id']} has no score, and yet {row}")
            continue
        check(flag == (score > threshold), f"{row['image_id']}: score {score}, threshold {threshold}, flag {flag}")
        # The rule that decides is the first of those that fired.
        check(row["reasons"][:1] == ([row["rule"]] if flag else []), f"{row['image_id']}: reasons {row['reasons']}")
        check(0 <= row["severity_percentile"] <= 100, f"{row['image_id']}: percentile {row['severity_percentile']}")
        check(0 < row["p_value"] <= 1, f"{row['image_id']}: p-value {row['p_value']}")


def load_delta(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether DuckDB's delta extension is installed."""
    try:
        connection.execute("LOAD delta")
    except duckdb.Error:
        return False
    return True


def main(tables: Path, expected_file: Path) -> str:
    expected = json.loads(expected_file.read_text())
    connection = duckdb.connect()
    has_delta = load_delta(connection)
    all_keys = DeltaTable(str(tables / "latents")).metadata().partition_columns
    published = {}
    for name, keys in KEYS.items():
        table = DeltaTable(str(tables / name))
        partition_keys = all_keys if name != "runs" else []
        found_keys = table.metadata().partition_columns
        check(found_keys == partition_keys, f"partition keys of {name} are {found_keys}, not {partition_keys}")
        columns = read_columns(name, table, partition_keys)
        seen = {
            reader: normalize(rows, columns, partition_keys + keys)
            for reader, rows in read_all(table, connection, has_delta).items()
        }
        published[name] = seen["delta-rs"]
        for reader, rows in seen.items():
            check(rows.num_rows == expected[name], f"{reader} sees {rows.num_rows} rows in {name}")
            differing = [column for column in rows.column_names if not rows[column].equals(published[name][column])]
            check(not differing, f"{reader} and delta-rs read {name} differently, in {differing}")
    embedded = check_latents(published["latents"].to_pylist(), expected["embedding_dim"])
    check_neighbors(published["neighbors"].to_pylist(), embedded, expected["k"])
    check_anomalies(published["anomalies"].to_pylist(), embedded)
    for run in published["runs"].to_pylist():
        check(run["started_at"] <= run["finished_at"], f"run {run['run_id']} ends before it starts")
        check(run["rows_ok"] + run["rows_rejected"] == run["rows_in"], f"run {run['run_id']} does not add up")
    rows = ", ".join(f"{name} {rows.num_rows}" for name, rows in published.items())
    by = "delta extension" if has_delta else "live Parquet files"
    return f"delta-rs, pyarrow, Polars and DuckDB ({by}) agree on all rows: {rows}"


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1]), Path(sys.argv[2])))
