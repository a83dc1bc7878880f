"""What a Delta table can have and `deltalake` does not write: deletion vectors and other features, as Spark leaves them.

Written by the Delta protocol alone (https://github.com/delta-io/delta/blob/master/PROTOCOL.md), so nothing is shared with the
program that reads it.
"""

import json
import struct
import uuid
import zlib
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def z85(data: bytes) -> str:
    """Base85 as ZeroMQ has it."""
    data += bytes(-len(data) % 4)
    text = ""
    for (value,) in struct.iter_unpack(">I", data):
        text += "".join(Z85[value // 85**place % 85] for place in (4, 3, 2, 1, 0))
    return text


def roaring_bitmap_array(rows: list[int]) -> bytes:
    """Numbers below 65,536 in the portable format: one bitmap of one array container."""
    assert rows == sorted(set(rows)) and rows[-1] < 1 << 16
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    return struct.pack("<IqI", 1681511377, 1, 0) + bitmap


def read_log(table: Path) -> list[dict]:
    """All actions of a table, in order."""
    logs = sorted((table / "_delta_log").glob("*.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def commit(table: Path, actions: list[dict]) -> None:
    """Writes the next version of a table."""
    version = len(list((table / "_delta_log").glob("*.json")))
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (table / "_delta_log" / f"{version:020}.json").write_text(text)


def live_files(table: Path) -> list[dict]:
    """The `add` actions of the files of the newest version."""
    live = {}
    for action in read_log(table):
        if "add" in action:
            live[action["add"]["path"]] = action["add"]
        if "remove" in action:
            live.pop(action["remove"]["path"], None)
    return list(live.values())


def delete_rows(table: Path, column: str, values: set[str]) -> None:
    """Deletes the rows with these values by deletion vectors: inline in the log and in a file by turns."""
    metadata = [action["metaData"] for action in read_log(table) if "metaData" in action][-1]
    metadata["configuration"]["delta.enableDeletionVectors"] = "true"
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    actions = [{"protocol": {"minReaderVersion": 3, "minWriterVersion": 7} | features}, {"metaData": metadata}]
    for number, add in enumerate(live_files(table)):
        cells = pq.read_table(table / unquote(add["path"]), columns=[column])[column].to_pylist()
        rows = [row for row, value in enumerate(cells) if value in values]
        if not rows:
            continue
        data = roaring_bitmap_array(rows)
        vector = {"sizeInBytes": len(data), "cardinality": len(rows)}
        if number % 2 == 0:
            vector |= {"storageType": "i", "pathOrInlineDv": z85(data)}
        else:
            name = uuid.uuid4()
            content = b"\x01" + struct.pack(">I", len(data)) + data + struct.pack(">I", zlib.crc32(data))
            (table / f"deletion_vector_{name}.bin").write_bytes(content)
            vector |= {"storageType": "u", "pathOrInlineDv": z85(name.bytes), "offset": 1}
        remove = {"path": add["path"], "dataChange": True, "deletionTimestamp": 0}
        actions += [{"remove": remove}, {"add": add | {"deletionVector": vector}}]
    commit(table, actions)
