"""What one would write in Python for the same work: images in Parquet, through an ONNX model, to vectors and scores in Parquet.

    python_embed.py VARIANT BATCH PACKAGE OUT TABLE...

PACKAGE is a model package, for its network and the size, filter, mean and deviation of its input. VARIANT is how images are decoded: in a
`loop`; on `threads`, one a core; by `draft`, on threads too, where libjpeg gives a JPEG image at half, a quarter or an eighth of its size,
as far as the model's input is no larger. ONNX Runtime gets BATCH images at a time and computes on all cores, which is its default. The
last line is JSON: images, and seconds from the first read to the end of the last write, with packages imported and the model loaded
before.
"""

import io
import json
import os
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def main(variant: str, batch_size: int, package: Path, out: Path, tables: list[Path]) -> None:
    num_cores = len(os.sched_getaffinity(0))
    contract = tomllib.loads((package / "model.toml").read_text())
    wanted, roles = contract["input"], [role for role in contract["outputs"] if role != "regions"]
    mode, size, resample = "L" if wanted["color"] == "gray" else "RGB", (wanted["width"], wanted["height"]), FILTERS[wanted["filter"]]
    mean, std = (np.array(wanted[name], np.float32) for name in ("mean", "std"))
    is_normalized = mean.any() or (std != 1).any()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_cores
    session = onnxruntime.InferenceSession(package / contract["graph"]["main"], options, providers=["CPUExecutionProvider"])
    pool = ThreadPoolExecutor(num_cores)

    def prepared(image: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(image))
        if variant == "draft":
            picture.draft(mode, size)
        values = np.asarray(picture.convert(mode).resize(size, resample), np.float32) / 255
        if is_normalized:
            values = (values - mean) / std
        return values[None] if mode == "L" else values.transpose(2, 0, 1)

    started, num_images = time.perf_counter(), 0
    columns: dict[str, list] = {"image_id": [], **({"mean_squared_error": []} if "reconstruction" in roles else {})}
    columns |= {role: [] for role in roles if role != "reconstruction"}
    for table in tables:
        for batch in pq.ParquetFile(table).iter_batches(batch_size, columns=["image_id", "image"]):
            images = batch["image"].to_pylist()
            tensors = np.stack(list(map(prepared, images) if variant == "loop" else pool.map(prepared, images)))
            found = dict(zip(roles, session.run([contract["outputs"][role] for role in roles], {wanted["tensor"]: tensors}), strict=True))
            if (reconstruction := found.pop("reconstruction", None)) is not None:
                columns["mean_squared_error"].append(((reconstruction - tensors) ** 2).mean((1, 2, 3)))
            for role, values in found.items():
                columns[role].append(values)
            columns["image_id"] += batch["image_id"].to_pylist()
            num_images += len(images)
    arrays = {"image_id": pa.array(columns.pop("image_id"))}
    for name, parts in columns.items():
        values = np.concatenate(parts)
        arrays[name] = pa.array(values) if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(pa.table(arrays), out)
    print(json.dumps({"images": num_images, "secs": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), [Path(table) for table in sys.argv[5:]])
