"""A Delta table of pictures, and what others do to it.

    delta_table.py create TABLE     two commits; partitioned by `ds`, which some rows have not
    delta_table.py touch TABLE      a commit that changes no row
    delta_table.py append TABLE     a further file in the partition 2026-11-02, with a further column `note`
    delta_table.py delete TABLE     rows deleted by rewriting a file, and others by a deletion vector
    delta_table.py rename TABLE     turns column mapping on
"""

import io
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from PIL import Image

from delta_log import commit, delete_rows, read_log


def rows(numbers: range, ds: date | None) -> pa.Table:
    images = []
    for number in numbers:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, size=(12, 16), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return pa.table(
        {
            "image_id": [f"id{number:02}" for number in numbers],
            "label": pa.array(numbers, pa.int32()),
            "ds": pa.array([ds] * len(numbers), pa.date32()),
            "image": pa.array(images, pa.binary()),
        }
    )


def main(action: str, table: Path) -> None:
    if action == "create":
        for numbers, ds in ((range(8), date(2026, 11, 1)), (range(10, 16), date(2026, 11, 2)), (range(20, 25), None)):
            write_deltalake(table, rows(numbers, ds), mode="append", partition_by="ds")
    elif action == "touch":
        DeltaTable(table).alter.set_table_properties({"delta.logRetentionDuration": "interval 60 days"})
    elif action == "append":
        noted = rows(range(30, 33), date(2026, 11, 2)).append_column("note", pa.array(["new"] * 3))
        write_deltalake(table, noted, mode="append", partition_by="ds", schema_mode="merge")
    elif action == "delete":
        DeltaTable(table).delete("label = 3")
        delete_rows(table, "label", {20, 24})
    elif action == "rename":
        metadata = [action["metaData"] for action in read_log(table) if "metaData" in action][-1]
        metadata["configuration"] |= {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "5"}
        schema = metadata["schemaString"]
        for number, name in enumerate(("image_id", "label", "ds", "image", "note"), start=1):
            keys = f'"delta.columnMapping.id":{number},"delta.columnMapping.physicalName":"{name}"'
            head, tail = schema.split(f'"name":"{name}"', 1)
            schema = head + f'"name":"{name}"' + tail.replace('"metadata":{', '"metadata":{' + keys, 1)
        features = ["columnMapping", "deletionVectors"]
        protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
        commit(table, [{"protocol": protocol}, {"metaData": metadata | {"schemaString": schema}}])
    else:
        sys.exit(f"unknown action {action}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
