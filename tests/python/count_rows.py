"""Prints how many rows the files have that delta-rs finds live in each published table, as JSON.

    count_rows.py TABLES
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from deltalake import DeltaTable

tables = Path(sys.argv[1])
names = ("latents", "neighbors", "groups", "anomalies", "runs")


def count(name: str) -> int:
    files = DeltaTable(tables / name).file_uris()
    return sum(pq.read_metadata(file.removeprefix("file://")).num_rows for file in files)


print(json.dumps({name: count(name) for name in names}))
