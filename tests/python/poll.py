"""Reads a partition of a table that is being replaced, over and over: it must always be whole.

    poll.py TABLE READS ROWS

TABLE is the URL of a `latents` table with one partition of ROWS rows. Every tenth read opens the table anew, as a query does; the
others go on from the version before, as a dashboard does.
"""

import os
import sys
from collections import Counter

from deltalake import DeltaTable

from check import check


def main(url: str, reads: int, rows: int) -> str:
    seen: Counter[str] = Counter()
    versions = set()
    table = DeltaTable(url)
    for number in range(reads):
        if number % 10:
            table.update_incremental()
        else:
            table = DeltaTable(url)
        columns = table.to_pyarrow_dataset().to_table(columns=["image_id", "run_id"]).to_pydict()
        run_ids, image_ids = set(columns["run_id"]), set(columns["image_id"])
        check(len(run_ids) == 1, f"read {number} of version {table.version()} is a mixture of the runs {run_ids}")
        found = len(columns["image_id"])
        check(found == len(image_ids) == rows, f"read {number} of version {table.version()} has {found} rows")
        seen[run_ids.pop()] += 1
        versions.add(table.version())
    return f"{reads} reads of {len(versions)} versions: {dict(seen)}"


if __name__ == "__main__":
    print("ok:", main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), flush=True)
    # Not by the usual end: Arrow's threads may still be closing files through Python, and a process whose interpreter goes away under
    # them is aborted ("terminate called without an active exception").
    os._exit(0)
