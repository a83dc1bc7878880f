"""Writes sound solar cells as they are, and as a camera would see them after something has happened to it.

    drifted_cells.py IMAGES OUT

IMAGES is the folder of the solar cells. OUT becomes an image table with the partition key `kind`: `fit` and `reference` hold cells
as they are, `same` others of them; `bright` holds those of `same` brighter by 5 %, `blurred` out of focus, and `mixed` with every
twentieth replaced by a cell of a kind that was never seen, as its negative. Which cell goes where is drawn with a fixed seed.
"""

import io
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter, ImageOps

from image_table import read_rows

FIT, REFERENCE = 308, 600


def main(images: Path, out: Path) -> str:
    sound = sorted((row for row in read_rows(images) if row.values["defect"] == 0), key=lambda row: row.image_id)
    random.Random(7).shuffle(sound)
    same = {row.image_id: Image.open(io.BytesIO(row.image)).convert("L") for row in sound[FIT + REFERENCE :]}
    kinds = {
        "fit": {row.image_id: row.image for row in sound[:FIT]},
        "reference": {row.image_id: row.image for row in sound[FIT : FIT + REFERENCE]},
        "same": {name: encoded(image) for name, image in same.items()},
        "bright": {name: encoded(image.point(lambda value: min(255, round(1.05 * value)))) for name, image in same.items()},
        "blurred": {name: encoded(image.filter(ImageFilter.GaussianBlur(2))) for name, image in same.items()},
        "mixed": {
            name: encoded(ImageOps.invert(image) if number % 20 == 0 else image)
            for number, (name, image) in enumerate(same.items())
        },
    }
    for kind, rows in kinds.items():
        folder = out / f"kind={kind}"
        folder.mkdir(parents=True)
        table = pa.table({"image_id": list(rows), "image": pa.array(rows.values(), pa.binary())})
        pq.write_table(table, folder / "cells.parquet")
    return ", ".join(f"{len(rows)} {kind}" for kind, rows in kinds.items())


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


if __name__ == "__main__":
    print("ok:", main(*map(Path, sys.argv[1:])))
