"""Makes image tables for the queries of sql/: six days of solar cells in which there is something to find for each of them.

    warehouse_source.py CELLS OUT

CELLS is the folder of the solar cells. OUT/learn holds sound cells in two splits, `fit` and `calibrate`. OUT/images has the partition
key `ds` and 39 rows a day or more, half of each kind of cell:

    2026-11-01 to 04  sound cells
    2026-11-05        cells of which two in five are broken
    2026-11-06        sound cells seen by a lamp 30 % brighter

Of the cells, some come twice: as the same file on another day, and smaller within the day. On 2026-11-03 one comes six times more, which
are more copies than a list of neighbors has places. Each day has a row that is no picture. Which cell goes where is decided by the hash
of its id. OUT/later.parquet is 2026-11-04 as the source has it later: with another picture in the first row, and without the last one.
Columns: image_id, image, uri, module (the kind of cell) and split, which is `train` for two cells in three and else `test`.
"""

import hashlib
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from image_table import Row, read_rows

DAYS = [f"2026-11-0{day}" for day in range(1, 7)]
CELLS_A_DAY = 36
BROKEN = 14


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def brighter(image: bytes) -> bytes:
    return encoded(Image.open(io.BytesIO(image)).convert("L").point(lambda value: min(255, round(1.3 * value))))


def smaller(image: bytes) -> bytes:
    picture = Image.open(io.BytesIO(image))
    return encoded(picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS))


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "module", "split")] + [("image", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def record(cell: Row, split: str, image: bytes | None, image_id: str | None = None) -> dict:
    image_id = image_id or cell.image_id
    uri = f"s3://cameras/{cell.values['module']}/{image_id}.png"
    return {"image_id": image_id, "uri": uri, "module": cell.values["module"], "split": split, "image": image}


def main(cells: Path, out: Path) -> str:
    kinds: dict[tuple[str, bool], list[Row]] = {}
    for cell in sorted(read_rows(cells), key=lambda row: hashlib.sha256(row.image_id.encode()).digest()):
        if cell.values["defect"] in (0, 1):
            kinds.setdefault((cell.values["module"], cell.values["defect"] == 1), []).append(cell)

    def take(count: int, is_broken: bool = False) -> list[Row]:
        """So many cells that were not taken before, half of each kind."""
        taken = []
        for module in ("mono", "poly"):
            left = kinds[module, is_broken]
            taken += left[: count // 2]
            del left[: count // 2]
        return taken

    learn = [record(cell, "fit", cell.image) for cell in take(120)] + [record(cell, "calibrate", cell.image) for cell in take(120)]
    write(out / "learn/cells.parquet", learn)
    first_day: list[Row] = []
    for number, day in enumerate(DAYS):
        broken = take(BROKEN, is_broken=True) if number == 4 else []
        today = take(CELLS_A_DAY - len(broken)) + broken
        change = brighter if number == 5 else bytes
        rows = [record(cell, "test" if place % 3 == 0 else "train", change(cell.image)) for place, cell in enumerate(today)]
        rows.append(record(today[0], "train", smaller(today[0].image), f"{today[0].image_id}-small"))
        # One of the first day's is there again, with another id and in the other split.
        first_day = first_day or today
        twin = first_day[number]
        rows.append(record(twin, "test", twin.image, f"{twin.image_id}-again") if number else record(today[1], "train", None, "lost"))
        cell = today[2]
        no_picture = [None, b"", b"no picture", cell.image[: len(cell.image) // 2], b"no picture", None][number]
        rows.append(record(cell, "train", no_picture, f"{cell.image_id}-rejected"))
        if number == 2:
            # Their names come before that of the original, so that each has the others in its list, and not the original.
            rows += [record(today[1], "test", today[1].image, f"again{copy}-{today[1].image_id}") for copy in range(6)]
        write(out / f"images/ds={day}/cells.parquet", rows)
        if number == 3:
            write(out / "later.parquet", [rows[0] | {"image": smaller(rows[0]["image"])}, *rows[1:-1]])
    return f"{len(DAYS)} days"


if __name__ == "__main__":
    print("ok:", main(*map(Path, sys.argv[1:])))
