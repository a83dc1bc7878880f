"""Puts a small source of three days into a bucket, with a model and a reference, and publishes its tables by a single run.

    three_days.py PROGRAM PREFIX FOLDER [LINE...]

Below PREFIX, an s3:// URL, lie then images, model, reference.parquet and the tables `expected`. FOLDER gets `expected.toml` and `pipeline.toml`, which
publishes `tables` from the same source; each LINE is added to both, in `[neighbors]`. The store's address and credentials come from the environment.

A day has twelve files of eight rows, each a unit. Of every day one image is broken, and from the second on some are images of the day before.
"""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bucket import s3_filesystem

DAYS = ["2026-11-01", "2026-11-02", "2026-11-03"]
FILES, FILE_ROWS, COPIES = 12, 8, 5
HEIGHT, WIDTH = 16, 24
BROKEN = 17

PIPELINE = """[pipeline]
name = "three-days"
[source]
table = "{prefix}/images"
columns = ["label"]
[model]
package = "{prefix}/model"
[execution]
workers = 1
unit_rows = 8
[neighbors]
k = 4
duplicate_distance = 0.001
{lines}
[anomaly]
reference = "{prefix}/reference.parquet"
threshold = {{ contamination = 0.1 }}
[output]
table = "{prefix}/{out}"
"""


def pictures(count: int, seed: int) -> list[bytes]:
    """PNGs of a few waves each, of which no two are alike."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    files = []
    for _ in range(count):
        waves = sum(np.sin(random.uniform(0.1, 0.9) * x + random.uniform(0.1, 0.9) * y + random.uniform(0, 6)) for _ in range(3))
        pixels = np.clip(128 + waves[..., None] * random.uniform(20, 40, 3), 0, 255).astype(np.uint8)
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], "PNG")
    return [file.getvalue() for file in files]


def main(program: str, prefix: str, folder: Path, lines: list[str]) -> None:
    store = s3_filesystem()
    images: list[bytes] = []
    for day, name in enumerate(DAYS):
        before = images
        images = pictures(FILES * FILE_ROWS, day)
        images[:COPIES] = before[:COPIES] or images[:COPIES]
        images[BROKEN] = images[BROKEN][:60]
        for number in range(FILES):
            rows = range(number * FILE_ROWS, (number + 1) * FILE_ROWS)
            table = pa.table(
                {
                    "image_id": [f"image-{day}{row:03}" for row in rows],
                    "image": [images[row] for row in rows],
                    "label": [f"day {day}" for _ in rows],
                }
            )
            pq.write_table(table, f"{prefix.removeprefix('s3://')}/images/ds={name}/{number:02}.parquet", filesystem=store)
    for name, out in [("expected", "expected"), ("pipeline", "tables")]:
        (folder / f"{name}.toml").write_text(PIPELINE.format(prefix=prefix, out=out, lines="\n".join(lines)))
    fit = ["fit", "expected.toml", "--latent-dim", "6", "--height", str(HEIGHT), "--width", str(WIDTH), "--where", "label = 'day 0'"]
    for arguments in (fit, ["calibrate", "expected.toml", "--where", "label = 'day 0'"], ["run", "expected.toml"]):
        subprocess.run([program, *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
