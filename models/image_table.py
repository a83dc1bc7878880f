"""Reads the pictures of an image table as the pipeline file of a run names it, for whoever trains on them.

    from image_table import read

The keys read are `table`, `format`, `id`, `image` and `where` of [source], and `max_rejected_fraction` of [limits]; the meaning is
the program's. Predicates are evaluated by DuckDB, which knows more than the program's language; columns of floats have nulls in place
of NaN, as the program compares them. Formats are `parquet` and `directory`; hive partitions are columns of text. Tables may lie on the
local disk or in S3, Google Cloud Storage or Azure, with the credentials of the standard environment variables.

Nothing but pixels is held: a picture of 64 x 64 in gray takes 4 KiB, so a million of them 4 GiB.
"""

import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as fs

from lookalike_export import Preprocessing

PARQUET_ENDINGS = ("parquet", "parq", "pq")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

# Rows read and decoded at a time.
BATCH_ROWS = 256

# The program's default.
MAX_REJECTED_FRACTION = 0.1


class TableError(Exception):
    """A table that cannot be read as the pipeline file says; the text is for the user."""


@dataclasses.dataclass
class Pictures:
    """Pictures in the order of the SHA-256 of their keys, which is the same however the table is cut into files."""

    pipeline: str  # name of the pipeline
    keys: list[str]
    pixels: np.ndarray  # number x height x width x channels, 0 to 255
    golden: list[bytes]  # the files of the first few
    num_rejected: int

    @property
    def sha256(self) -> str:
        """Stands for keys and pixels."""
        digest = hashlib.sha256("\0".join(self.keys).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()


def read(pipeline_file: Path, where: str | None, preprocessing: Preprocessing, num_golden: int = 4) -> Pictures:
    """The pictures of the rows that satisfy `where`, or the pipeline file's own predicate."""
    try:
        pipeline = tomllib.loads(pipeline_file.read_text())
        source = pipeline["source"]
        location = source["table"]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TableError(f"cannot read the pipeline file {pipeline_file}: {error}") from error
    except KeyError as error:
        raise TableError(f"{pipeline_file} has no {error}: it needs [source] with the key `table`") from error
    where = source.get("where") if where is None else where
    limit = pipeline.get("limits", {}).get("max_rejected_fraction", MAX_REJECTED_FRACTION)

    def pixels_of(file: bytes | None) -> np.ndarray | None:
        try:
            return preprocessing.pixels(file or b"")
        except Exception:  # noqa: BLE001 - what Pillow raises for a broken image is of many kinds
            return None

    rows, golden, num_rows = [], {}, 0
    with ThreadPoolExecutor() as threads:
        for keys, files in _rows(*open_location(location, pipeline_file.parent), source, where):
            num_rows += len(keys)
            for key, file, pixels in zip(keys, files, threads.map(pixels_of, files), strict=True):
                if pixels is None:
                    continue
                order = hashlib.sha256(key.encode()).digest()
                rows.append((order, key, pixels))
                golden[order] = file
                if len(golden) > num_golden:
                    del golden[max(golden)]
    if not num_rows:
        raise TableError(f"no row of {location} satisfies {where!r}" if where else f"{location} has no rows")
    if num_rows - len(rows) > limit * num_rows:
        raise TableError(f"{num_rows - len(rows)} of {num_rows} images cannot be decoded; is `image` the right column?")
    rows.sort(key=lambda row: row[:2])
    return Pictures(
        pipeline=pipeline.get("pipeline", {}).get("name", "images"),
        keys=[key for _, key, _ in rows],
        pixels=np.stack([pixels for _, _, pixels in rows]),
        golden=[golden[order] for order in sorted(golden)],
        num_rejected=num_rows - len(rows),
    )


def open_location(location: str, folder: Path) -> tuple[fs.FileSystem, str]:
    """The store of a path, relative to `folder`, or of a URL, and the path within it."""
    if "://" not in location:
        return fs.LocalFileSystem(), str((folder / location).resolve())
    url = urlsplit(location)
    path = (url.netloc + url.path).rstrip("/")
    environment = os.environ.get
    if url.scheme == "file":
        return fs.LocalFileSystem(), unquote(url.path)
    if url.scheme in ("s3", "s3a"):
        endpoint = environment("AWS_ENDPOINT") or environment("AWS_ENDPOINT_URL")
        region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION")
        return fs.S3FileSystem(endpoint_override=endpoint, region=region or ("us-east-1" if endpoint else None)), path
    if url.scheme == "gs":
        return fs.GcsFileSystem(), path
    if url.scheme in ("az", "abfs", "abfss"):
        # abfs://container@account.dfs.core.windows.net/path, or az://container/path with the account in the environment.
        container, _, host = url.netloc.rpartition("@") if "@" in url.netloc else (url.netloc, "", "")
        account = host.split(".")[0] or environment("AZURE_STORAGE_ACCOUNT_NAME")
        if not account:
            raise TableError(f"{location} names no account: set AZURE_STORAGE_ACCOUNT_NAME")
        return fs.AzureFileSystem(account, account_key=environment("AZURE_STORAGE_ACCOUNT_KEY")), container + url.path.rstrip("/")
    raise TableError(f"{location} has the unsupported scheme `{url.scheme}`")


def _rows(store: fs.FileSystem, path: str, source: dict, where: str | None) -> Iterator[tuple[list[str], list[bytes | None]]]:
    """Keys and image files, batch by batch."""
    kind, id_column, image_column = source.get("format", "parquet"), source.get("id", "image_id"), source.get("image", "image")
    if kind == "directory":
        files = _list(store, path, IMAGE_ENDINGS)
        names = pa.table({id_column: [name for name, _ in files], **_partitions(files)})
        for batch in _query(names, [id_column], where):
            keys = batch.column(0).to_pylist()
            yield keys, [_fetch(store, path, key) for key in keys]
    elif kind == "parquet":
        if store.get_file_info(f"{path}/_delta_log").type == fs.FileType.Directory:
            raise TableError(f"{path} is a Delta table, of which plain Parquet files would bring removed rows back")
        files = _list(store, path, PARQUET_ENDINGS)
        keys = pa.schema([(key, pa.string()) for key in _partitions(files)])
        partitioning = ds.partitioning(keys, flavor="hive")
        table = ds.dataset(
            [file for _, file in files], format="parquet", filesystem=store, partitioning=partitioning, partition_base_dir=path
        )
        for batch in _query(table, [id_column, image_column], where):
            yield pc.cast(batch.column(0), pa.string()).to_pylist(), [_cell(store, path, cell) for cell in batch.column(1).to_pylist()]
    else:
        raise TableError(f'format = "{kind}" cannot be trained on: it reads "parquet" and "directory"')


def _list(store: fs.FileSystem, path: str, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """Files with these endings, by their names below `path`, hidden ones left out."""
    info = store.get_file_info(path)
    if info.type == fs.FileType.File:
        return [(path.rsplit("/", 1)[-1], path)]
    found = [] if info.type == fs.FileType.NotFound else store.get_file_info(fs.FileSelector(path, recursive=True))
    names = ((file.path[len(path) :].lstrip("/"), file.path) for file in found if file.type == fs.FileType.File)
    hidden = lambda part: part.startswith(".") or (endings is PARQUET_ENDINGS and part.startswith("_") and "=" not in part)  # noqa: E731
    files = sorted(
        (name, file)
        for name, file in names
        if name.lower().endswith(tuple(f".{ending}" for ending in endings)) and not any(hidden(part) for part in name.split("/"))
    )
    if not files:
        raise TableError(f"no files ending in {', '.join(endings)} below {path}")
    return files


def _partitions(files: list[tuple[str, str]]) -> dict[str, list[str | None]]:
    """The hive keys of files, each with a value a file."""
    pairs = [dict(part.split("=", 1) for part in name.split("/")[:-1] if "=" in part) for name, _ in files]
    keys = dict.fromkeys(key for found in pairs for key in found)
    return {key: [unquote(found[key]) if key in found else None for found in pairs] for key in keys}


def _query(table: pa.Table | ds.Dataset, columns: list[str], where: str | None) -> Iterator[pa.RecordBatch]:
    """Columns of the rows that satisfy a predicate."""
    names = table.schema.names
    if missing := [column for column in columns if column not in names]:
        raise TableError(f"the table has no column {', '.join(missing)}; it has {', '.join(names)}")
    quoted = lambda name: '"' + name.replace('"', '""') + '"'  # noqa: E731
    floats = [quoted(field.name) for field in table.schema if pa.types.is_floating(field.type)]
    no_nan = ", ".join(f"CASE WHEN NOT isnan({name}) THEN {name} END AS {name}" for name in floats)
    query = f"SELECT {', '.join(map(quoted, columns))} FROM (SELECT * {f'REPLACE ({no_nan})' if floats else ''} FROM image_table)"
    connection = duckdb.connect()
    connection.register("image_table", table)
    try:
        yield from connection.sql(f"{query} WHERE {where}" if where else query).to_arrow_reader(BATCH_ROWS)
    except duckdb.Error as error:
        raise TableError(f"cannot evaluate {where!r} on a table with the columns {', '.join(names)}: {error}") from error


def _cell(store: fs.FileSystem, path: str, cell: bytes | str | dict | None) -> bytes | None:
    """The image file that a cell is or names."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return _fetch(store, path, cell) if isinstance(cell, str) else cell


def _fetch(store: fs.FileSystem, path: str, name: str) -> bytes | None:
    """An image file by its name below `path`, by an absolute path, or by its URL; None where it cannot be read."""
    try:
        if "://" in name or name.startswith("/"):
            store, name = open_location(name, Path())
        else:
            name = f"{path}/{name}"
        with store.open_input_file(name) as file:
            return file.read()
    except OSError:
        return None
