"""Reads a published table with the library for Delta tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs
from deltalake import DeltaTable


def read_delta(table: Path | str, files: fs.FileSystem | None = None, columns: list[str] | None = None) -> pa.Table:
    """All rows of a Delta table, with its partition keys, or some of its columns: of one in a local folder, or of one whose files `files` has.

    Arrow reads the files by itself. By default it calls back into Python from threads of its own, of which one that is not done when the
    interpreter ends aborts the process.
    """
    files = files or fs.SubTreeFileSystem(str(table), fs.LocalFileSystem())
    return pa.table(DeltaTable(str(table)).to_pyarrow_table(columns=columns, filesystem=files))
