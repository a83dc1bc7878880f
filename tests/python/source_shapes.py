"""Stores the same pictures in every form that a source table can have.

    source_shapes.py OUT [CELLS]

Each folder of OUT is a source table of the same 40 pictures (and 20 photographs of the table CELLS) in the same order, so `latents`
must be equal for all of them. `folder` is a folder of image files. Those that begin with `tar` are WebDataset shards, with the
file's name up to the dot as the key; those that begin with `delta` are Delta tables; all others are Parquet. Tables have the
columns `image_id` (the file's name) and `image`. In `int64_ids` the column of the id is `number`, from 100. `hive`, `tar_hive` and
`delta_partitioned` are partitioned by `batch`.
"""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake
from PIL import Image

from delta_log import commit, delete_rows, live_files, read_log

NUM_PICTURES = 40


def pictures() -> dict[str, bytes]:
    """PNG pictures by name, of different sizes and colors."""
    random = np.random.default_rng(2026)
    made = {}
    for number in range(NUM_PICTURES):
        height, width = random.integers(20, 90, size=2)
        coarse = Image.fromarray(random.integers(0, 256, size=(6, 8, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        (picture.convert("L") if number % 5 == 0 else picture).save(file, "PNG")
        made[f"picture{number:03}.png"] = file.getvalue()
    return made


def photographs(cells: Path) -> dict[str, bytes]:
    """The first solar cells of each file of the table."""
    found = {}
    for file in sorted(cells.rglob("*.parquet")):
        for row in next(pq.ParquetFile(file).iter_batches(batch_size=10, columns=["image_id", "image"])).to_pylist():
            found[f"{row['image_id']}.png"] = row["image"]
    return found


def write_shard(file: Path, images: dict[str, bytes], compression: str | None = None, form: int = tarfile.GNU_FORMAT) -> None:
    """A shard as `webdataset.TarWriter` lays it out: the members of a sample one after the other."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=form) as shard:
        for name, image in images.items():
            stem = name.split(".")[0]
            for extension, content in (("cls", b"3"), ("png", image), ("txt", f"a picture of {stem}".encode())):
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.CompressedOutputStream(str(file), compression) if compression else file.open("wb") as stream:
        stream.write(archive.getvalue())


def main(out: Path, cells: Path | None = None) -> str:
    images = pictures() | (photographs(cells) if cells else {})
    names, contents = pa.array(list(images)), list(images.values())
    binary = pa.array(contents, pa.binary())

    def store(shape: str, images: pa.Array, ids: dict[str, pa.Array] | None = None, **options) -> None:
        file = out / shape / "pictures.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table((ids or {"image_id": names}) | {"image": images}), file, **options)

    files = out / "folder"
    for folder in (files, out / "uri_relative" / "pictures", out / "struct_path_alone" / "pictures"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            (folder / name).write_bytes(image)

    store("binary", binary)
    store("large_binary", pa.array(contents, pa.large_binary()))
    store("binary_view", pa.array(contents, pa.binary_view()))

    # URIs: relative to the table, absolute, and as plain paths.
    relative = pa.array([f"pictures/{name}" for name in images])
    absolute = pa.array([(files / name).resolve().as_uri() for name in images])
    store("uri_relative", relative)
    store("uri_absolute", absolute)
    store("uri_large_string", absolute.cast(pa.large_string()))
    store("uri_string_view", absolute.cast(pa.string_view()))
    store("path_absolute", pa.array([str((files / name).resolve()) for name in images]))

    # The image type of Hugging Face datasets, in both orders of its fields, with bytes, or with a path alone. Where there are
    # bytes, the path only says where they came from, and need not lead anywhere.
    no_bytes, nowhere = pa.nulls(len(images), pa.binary()), pa.array(["gone.png"] * len(images))
    store("struct_bytes_path", pa.StructArray.from_arrays([binary, pa.nulls(len(images), pa.string())], ["bytes", "path"]))
    store("struct_path_bytes", pa.StructArray.from_arrays([nowhere, binary], ["path", "bytes"]))
    store("struct_path_alone", pa.StructArray.from_arrays([relative, no_bytes], ["path", "bytes"]))

    store("int64_ids", binary, ids={"number": pa.array(range(100, 100 + len(images)), pa.int64())})
    store("large_string_ids", binary, ids={"image_id": names.cast(pa.large_string())})
    store("dictionary_ids", binary, ids={"image_id": names.dictionary_encode()})
    store("small_row_groups", binary, row_group_size=3)
    # Categories of pandas, as a column of URIs.
    store("dictionary_uris", absolute.dictionary_encode())
    # Further fields in the struct, of which some are null, some are nested; a path that some rows have instead of bytes.
    some = [None if number % 3 == 0 else content for number, content in enumerate(contents)]
    others = [f"pictures/{name}" if number % 3 == 0 else None for number, name in enumerate(images)]
    detail = pa.StructArray.from_arrays([names, pa.nulls(len(images), pa.list_(pa.int64()))], ["bytes", "sizes"])
    fields = [pa.array(range(len(images))), pa.array(others), detail, pa.array(some, pa.large_binary())]
    store("struct_mixed", pa.StructArray.from_arrays(fields, ["height", "path", "detail", "bytes"]))
    for name, image in images.items():
        copy = out / "struct_mixed" / "pictures" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(image)
    # One row group whose dictionary of ids and images is given up on half way, and further ones with none.
    store("dictionary_given_up", binary, use_dictionary=True, dictionary_pagesize_limit=2000, data_page_size=1000, row_group_size=25)
    for compression in ("none", "snappy", "gzip", "brotli", "lz4", "zstd"):
        store(f"compression_{compression}", binary, compression=compression)

    table = pa.table({"image_id": names, "image": binary})
    for part, start in enumerate(range(0, len(images), 15)):
        for folder in (out / "several_files", out / "hive" / f"batch={part}"):
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(start, 15), folder / f"part-{part}.parquet")

    parts = [dict(list(images.items())[start : start + 25]) for start in range(0, len(images), 25)]
    write_shard(out / "tar" / "pictures.tar", images)
    write_shard(out / "tar_pax_gz" / "pictures.tar.gz", images, "gzip", tarfile.PAX_FORMAT)
    write_shard(out / "tar_ustar_zst" / "pictures.tar.zst", images, "zstd", tarfile.USTAR_FORMAT)
    for number, part in enumerate(parts):
        write_shard(out / "tar_several" / f"shard-{number:06}.TGZ", part, "gzip")
        write_shard(out / "tar_hive" / f"batch={number}" / "shard.tzst", part, "zstd")

    # Delta tables: of several commits; with files that were removed, and whose rows must not come back; with a partition that is
    # null; with a column that older files do not have; and with deletion vectors, which deltalake does not write.
    def slices(table: pa.Table):
        return (table.slice(start, 25) for start in range(0, len(table), 25))

    junk = pa.table({"image_id": ["junk0", "junk1"], "image": pa.array([b"junk", contents[0]], pa.binary())})
    for part in slices(table):
        write_deltalake(out / "delta", part, mode="append")
    write_deltalake(out / "delta_removed", junk)
    write_deltalake(out / "delta_removed", pa.concat_tables([table, junk]), mode="append")
    DeltaTable(out / "delta_removed").delete("image_id like 'junk%'")
    batches = pa.array([None if number % 3 == 0 else f"b {number % 3}/x" for number in range(len(images))], pa.string())
    for part in slices(table.append_column("batch", batches)):
        write_deltalake(out / "delta_partitioned", part, mode="append", partition_by="batch")
    for number, part in enumerate(slices(table)):
        labelled = part.append_column("label", pa.array([number] * len(part)))
        write_deltalake(out / "delta_evolved", labelled if number else part, mode="append", schema_mode="merge")
    for number, part in enumerate(slices(table)):
        # Deleted rows at the beginning, within, and at the end of a file of several row groups.
        mixed = pa.concat_tables([junk, part.slice(0, 7), junk, part.slice(7), junk])
        write_deltalake(out / "delta_vectors", mixed, mode="append")
    # A shallow clone: its files are those of another table.
    log = [action for action in read_log(out / "delta") if "protocol" in action or "metaData" in action]
    elsewhere = [add | {"path": f"{(out / 'delta').resolve().as_uri()}/{add['path']}"} for add in live_files(out / "delta")]
    (out / "delta_clone" / "_delta_log").mkdir(parents=True)
    commit(out / "delta_clone", log + [{"add": add} for add in elsewhere])
    delete_rows(out / "delta_vectors", "image_id", {"junk0", "junk1"})

    return f"{len(images)} pictures in {len(list(out.iterdir()))} shapes in {out}"


if __name__ == "__main__":
    print("ok:", main(*map(Path, sys.argv[1:])))
