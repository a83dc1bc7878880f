"""Reads tables that are published as plain Parquet the way their users do: by the newest manifest, with pyarrow and with DuckDB.

    manifest_readers.py TABLES

Checks that the files which the newest manifest names hold as many rows as it says, that ids are unique within a partition, and
that both readers see the same rows.
"""

import json
import sys
from pathlib import Path
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from check import check

KEYS = {
    "latents": ["image_id"],
    "neighbors": ["image_id", "rank"],
    "groups": ["image_id"],
    "anomalies": ["image_id"],
    "runs": ["run_id", "started_at"],
}

COUNT = "select count(*), count(distinct run_id) from read_parquet($paths, hive_partitioning = false)"

tables = Path(sys.argv[1])
counts = {}
for name, keys in KEYS.items():
    folder = tables / name
    newest = max((folder / "_manifests").iterdir())
    manifest = json.loads(newest.read_text())
    files = [(folder / unquote(file["path"]), file) for file in manifest["files"]]
    parts = []
    for path, file in files:
        rows = pq.read_table(path, partitioning=None)
        check(rows.num_rows == file["num_rows"], f"{path} has {rows.num_rows} rows, not {file['num_rows']}")
        for key, value in zip(manifest["partition_keys"], file["partition"], strict=True):
            rows = rows.append_column(key, pa.array([value] * rows.num_rows, pa.string()))
        parts.append(rows)
    table = pa.concat_tables(parts)
    check(table.num_rows == manifest["num_rows"], f"{name} has {table.num_rows} rows, not {manifest['num_rows']}")
    columns = [field["name"] for field in manifest["schema"]["fields"]]
    check(table.column_names == columns, f"{name} has {table.column_names}, not {columns}")
    unique = table.select(manifest["partition_keys"] + keys).group_by(manifest["partition_keys"] + keys).aggregate([])
    check(unique.num_rows == table.num_rows, f"{name} has rows twice")
    # As a warehouse does it: a list of files out of the manifest, then the files.
    paths = [str(path) for path, _ in files]
    found = duckdb.connect().execute(COUNT, {"paths": paths}).fetchone()
    run_ids = len(set(table["run_id"].to_pylist()))
    check(found == (table.num_rows, run_ids), f"DuckDB sees {found} in {name}, pyarrow {(table.num_rows, run_ids)}")
    counts[name] = table.num_rows
print(json.dumps(counts))
