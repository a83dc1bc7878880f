"""Stores the same pictures in every form that a source table can have.

    source_shapes.py OUT

Each folder of OUT is a source table of the same 40 pictures in the same order, so `latents` must be equal for all of them.
`folder` is a folder of image files; all others are Parquet, with the columns `image_id` (the file's name) and `image`. In
`int64_ids` the column of the id is `number`, 100 to 139. `hive` is partitioned by `batch`.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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


def main(out: Path) -> str:
    images = pictures()
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
    for compression in ("none", "snappy", "gzip", "brotli", "lz4", "zstd"):
        store(f"compression_{compression}", binary, compression=compression)

    table = pa.table({"image_id": names, "image": binary})
    for part, start in enumerate(range(0, len(images), 15)):
        for folder in (out / "several_files", out / "hive" / f"batch={part}"):
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(start, 15), folder / f"part-{part}.parquet")

    return f"{NUM_PICTURES} pictures in {len(list(out.iterdir()))} shapes in {out}"


if __name__ == "__main__":
    print("ok:", main(Path(sys.argv[1])))
