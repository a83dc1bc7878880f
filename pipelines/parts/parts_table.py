"""Draws pictures of machined parts, as a camera above a conveyor belt sees them, in which there is something to find.

    parts_table.py FOLDER

FOLDER gets a table of three days, 400 parts each, with the columns image_id, image (PNG, 128 x 128), kind and line. Most parts are as they
should be, up to light, place and noise. From the second day on, a few have a crack, a missing hole, a stain, or are not there; some are pictures of the day
before once more, a little smaller. The last day's light is dimmer, and one of its files is cut off. Everything is drawn here, so the
pictures may be shown anywhere.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

SIDE, LARGE = 128, 3  # drawn three times as large, for smooth edges
PARTS_A_DAY, COPIES = 400, 6
DAYS = ["2026-11-01", "2026-11-02", "2026-11-03"]
KINDS = {"flange": (6, 0.40, "#a9b4bf"), "washer": (0, 0.34, "#c9b27a"), "gear": (12, 0.36, "#9aa88f")}


def part(kind: str, defect: str | None, light: float, random: np.random.Generator) -> Image.Image:
    size = SIDE * LARGE
    holes, radius, color = KINDS[kind]
    belt = np.full((size, size, 3), 58.0) + 6 * np.sin(np.arange(size) / (4 * LARGE))[:, None, None]
    picture = Image.fromarray(belt.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x, y = size / 2 + random.normal(0, 0.006 * size, 2)
    turn = random.normal(0, 0.02)

    def disc(at: tuple[float, float], r: float, fill: str) -> None:
        draw.ellipse([at[0] - r, at[1] - r, at[0] + r, at[1] + r], fill=fill)

    around = lambda r, n: [(x + r * np.cos(turn + 2 * np.pi * i / n), y + r * np.sin(turn + 2 * np.pi * i / n)) for i in range(n)]  # noqa: E731
    if defect != "absent":
        if kind == "gear":
            for at in around(radius * size, holes):
                disc(at, 0.05 * size, color)
        disc((x, y), radius * size, color)
        disc((x, y), 0.90 * radius * size, "#d7dde2" if kind == "flange" else color)
        disc((x, y), 0.36 * radius * size, "#2b2f33")
        if kind == "flange":
            for number, at in enumerate(around(0.68 * radius * size, holes)):
                if not (defect == "hole" and number == 0):
                    disc(at, 0.045 * size, "#2b2f33")
        if defect == "crack":
            angle = random.uniform(0, 2 * np.pi)
            points = [(x + r * size * np.cos(angle) + random.normal(0, 5), y + r * size * np.sin(angle) + random.normal(0, 5)) for r in np.linspace(0.13, radius, 7)]
            draw.line(points, fill="#1b1d1f", width=2 * LARGE)
        if defect == "stain":
            at = random.normal(0, 0.12, 2) * size
            disc((x + at[0], y + at[1]), random.uniform(0.06, 0.1) * size, "#6b4a2f")
    picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.4))
    shade = np.linspace(0.92, 1.08, SIDE)[None, :, None] * light
    return Image.fromarray(np.clip(np.asarray(picture) * shade + random.normal(0, 3, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def main(folder: Path) -> None:
    random = np.random.default_rng(1)
    before: list[Image.Image] = []
    for day, name in enumerate(DAYS):
        light, rows, pictures = (0.82 if day == 2 else 1.0), [], []
        # The first day is what is normal.
        kinds = [] if day == 0 else 3 * ["crack"] + 3 * ["hole"] + 5 * ["stain"] + ["absent"]
        defects = dict(zip(random.choice(PARTS_A_DAY, len(kinds), replace=False), kinds, strict=True))
        for number in range(PARTS_A_DAY):
            defect = defects.get(number)
            kind = "flange" if defect == "hole" else list(KINDS)[random.integers(len(KINDS))]
            pictures.append(part(kind, defect, light * random.normal(1, 0.02), random))
            rows.append({"image_id": f"part-{day + 1}{number:03}", "kind": kind, "line": "AB"[number % 2], "image": png(pictures[-1])})
        for number, copied in enumerate(before[:COPIES]):
            smaller = copied.resize((SIDE * 3 // 4, SIDE * 3 // 4), Image.Resampling.LANCZOS)
            rows.append({"image_id": f"again-{day + 1}{number:03}", "kind": None, "line": "A", "image": png(smaller)})
        if day == 2:
            rows[7]["image"] = rows[7]["image"][:900]
        before = pictures
        file = folder / f"ds={name}/parts.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)


main(Path(sys.argv[1]))
