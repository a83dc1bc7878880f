"""Fails unless the tables below two s3:// URLs say the same: all rows of all tables, and of `runs` the newest of each partition.

    same_tables.py EXPECTED FOUND

What belongs to one run alone is left out: its id, its times, and its settings, which name the place of the tables. Prints the rows of each table as JSON.
"""

import json
import sys

import pyarrow as pa

from bucket import read_delta
from check import check

TABLES = ["latents", "neighbors", "groups", "anomalies", "runs"]
OF_ONE_RUN = ("run_id", "started_at", "finished_at", "_secs", "settings")


def rows(prefix: str, name: str) -> list[str]:
    """The rows as text, sorted; floats are written so that no bit is lost."""
    table = read_delta(f"{prefix}/{name}")
    if name == "runs":
        newest = {row["partition"]: row for row in table.sort_by("finished_at").to_pylist()}
        table = pa.Table.from_pylist(list(newest.values()), table.schema)
    kept = [column for column in table.column_names if not column.endswith(OF_ONE_RUN)]
    return sorted(json.dumps(row, sort_keys=True, default=str) for row in table.select(sorted(kept)).to_pylist())


def main(expected_prefix: str, found_prefix: str) -> None:
    counts = {}
    for name in TABLES:
        expected, found = rows(expected_prefix, name), rows(found_prefix, name)
        check(len(expected) > 0, f"{name}: nothing is expected")
        check(len(found) == len(expected), f"{name} has {len(found)} rows, not {len(expected)}")
        for number, (row, wanted) in enumerate(zip(found, expected, strict=True)):
            check(row == wanted, f"{name}, row {number}:\n{row}\nis not\n{wanted}")
        counts[name] = len(found)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
