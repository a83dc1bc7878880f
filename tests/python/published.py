"""Reads a published table with the library for Delta tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs
from deltalake import DeltaTable


def read_delta(folder: Path | str) -> pa.Table:
    """All rows of the Delta table in a local folder, with its partition keys.

    Arrow reads the files by itself. By default it calls back into Python from threads of its own, of which one that is not done when the
    interpreter ends aborts the process.
    """
    local = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
    return pa.table(DeltaTable(str(folder)).to_pyarrow_table(filesystem=local))
