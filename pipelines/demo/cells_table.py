"""Makes the demo's image table: 2,624 electroluminescence pictures of solar cells, from the package elpv-dataset.

    cells_table.py OUT

OUT becomes a Parquet table with one folder for each kind of module, OUT/module=mono and OUT/module=poly. Columns:

    image_id  string  cell0001 to cell2624
    image     binary  PNG, gray, 300 x 300
    defect    double  probability that the cell is defective, as experts saw it: 0, 1/3, 2/3 or 1
    split     string  of each module's sound cells (defect = 0), three eighths are `fit`, to learn a model from, and an eighth is
                      `calibrate`, to learn the scores of sound cells that the model has not seen; all others are `rest`

The same files come out each time: which cell goes where is decided by the hash of its id.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("defect", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)

# Rows are read a group at a time: 256 of these pictures are 9 MB.
ROW_GROUP_ROWS = 256


def read_cells() -> list[dict]:
    """All cells of the package, in the order of their ids."""
    # Found and not imported: importing it would need packages that only its own reader uses.
    data = Path(importlib.util.find_spec("elpv_dataset").submodule_search_locations[0]) / "data"
    cells = []
    for line in (data / "labels.csv").read_text().splitlines():
        file, defect, module = line.split()
        image_id, image = Path(file).stem, (data / file).read_bytes()
        cells.append({"image_id": image_id, "image": image, "defect": float(defect), "module": module, "split": "rest"})
    return sorted(cells, key=lambda cell: cell["image_id"])


def split(cells: list[dict]) -> None:
    """Chooses the sound cells to fit and to calibrate."""
    sound = [cell for cell in cells if cell["defect"] == 0]
    sound.sort(key=lambda cell: hashlib.sha256(cell["image_id"].encode()).digest())
    fit, half = 3 * len(sound) // 8, len(sound) // 2
    for cell in sound[:fit]:
        cell["split"] = "fit"
    for cell in sound[fit:half]:
        cell["split"] = "calibrate"


def main(out: Path) -> None:
    cells = read_cells()
    for module in ("mono", "poly"):
        of_module = [cell for cell in cells if cell["module"] == module]
        split(of_module)
        folder = out / f"module={module}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(of_module, schema=SCHEMA),
            folder / "cells.parquet",
            row_group_size=ROW_GROUP_ROWS,
            # A picture occurs once, and PNG does not get smaller.
            use_dictionary=["defect", "split"],
            compression="none",
        )
    print(f"image table of {len(cells)} solar cells (elpv-dataset, CC BY-NC-SA 4.0): {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
