"""Image tables and the preprocessing of a model package, as Python sees them; used by the scripts beside it.

Pixels come from Pillow and numbers from NumPy, so nothing is shared with the program that the scripts check.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}


@dataclass
class Row:
    """A row of an image table."""

    partition: str  # "key=value/key=value", or empty
    image_id: str
    image: bytes | None
    values: dict  # the other columns, and the partition keys

    @property
    def key(self) -> tuple[str, str]:
        return self.partition, self.image_id


def read_rows(table: Path) -> list[Row]:
    """All rows of a folder of images, or of a Parquet table with the columns `image_id` and `image` (binary)."""
    rows = []
    is_parquet = any(table.rglob("*.parquet"))
    for file in sorted(table.rglob("*")):
        relative = file.relative_to(table)
        folders = [folder for folder in relative.parts[:-1] if "=" in folder]
        partition, keys = "/".join(folders), dict(folder.split("=", 1) for folder in folders)
        if is_parquet and file.suffix == ".parquet":
            # `partitioning=None`: the keys are taken from the path, as text.
            for values in pq.read_table(file, partitioning=None).to_pylist():
                image_id, image = str(values.pop("image_id")), values.pop("image")
                rows.append(Row(partition, image_id, image, values | keys))
        elif not is_parquet and file.suffix.lower() in IMAGE_ENDINGS and not file.name.startswith("."):
            rows.append(Row(partition, relative.as_posix(), file.read_bytes(), keys))
    return rows


def open_upright(image: bytes, exif_rotation: bool = True) -> Image.Image:
    """The image as it is looked at, in its own size."""
    opened = Image.open(io.BytesIO(image))
    return ImageOps.exif_transpose(opened) if exif_rotation else opened


def to_tensor(image: bytes, contract: dict) -> np.ndarray:
    """The input tensor of one image, float32, as `[input]` of a model.toml says."""
    spec = contract["input"]
    picture = open_upright(image, spec.get("exif_rotation", True))
    if picture.mode.startswith("I;16"):
        # The high byte. Pillow's own conversion clips at 255, which leaves nothing of most pictures.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert({"gray": "L", "rgb": "RGB"}[spec["color"]])
    pixels = np.asarray(fit(picture, spec), dtype=np.float32)
    pixels = pixels.reshape(spec["height"], spec["width"], -1)
    mean, std = (np.asarray(spec[name], dtype=np.float32) for name in ("mean", "std"))
    tensor = (pixels * np.float32(spec["scale"]) - mean) / std
    return tensor.transpose(2, 0, 1) if spec["layout"] == "nchw" else tensor


def fit(picture: Image.Image, spec: dict) -> Image.Image:
    """Brings a picture to the input's height and width."""
    width, height = spec["width"], spec["height"]
    resample = FILTERS[spec["filter"]]
    if spec["fit"] == "stretch":
        return picture.resize((width, height), resample)
    if spec["fit"] == "pad":
        # As ImageOps.pad does it, but a side keeps at least one pixel.
        if picture.width / picture.height > width / height:
            size = width, max(1, round(picture.height / picture.width * width))
        else:
            size = max(1, round(picture.width / picture.height * height)), height
        framed = Image.new(picture.mode, (width, height))
        framed.paste(picture.resize(size, resample), (round((width - size[0]) / 2), round((height - size[1]) / 2)))
        return framed
    # torchvision's Resize and CenterCrop: the side that decides takes the target's length, the other is rounded down.
    if width * picture.height >= height * picture.width:
        size = width, width * picture.height // picture.width
    else:
        size = height * picture.width // picture.height, height
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.resize(size, resample).crop((left, top, left + width, top + height))
