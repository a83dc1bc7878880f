"""What one would write in Python to learn a PCA of images in Parquet: Pillow on threads, then scikit-learn.

    python_fit.py SIDE LATENTS TABLE...

Images are gray, SIDE x SIDE. The last line is JSON: images, seconds, and the share of the variance that LATENTS components explain.
"""

import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from sklearn.decomposition import PCA


def main(side: int, latents: int, tables: list[str]) -> None:
    started, pool, parts = time.perf_counter(), ThreadPoolExecutor(len(os.sched_getaffinity(0))), []

    def pixels(image: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(image)).convert("L").resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(picture, np.float32).ravel() / 255

    for table in tables:
        for batch in pq.ParquetFile(table).iter_batches(columns=["image"]):
            parts.append(np.stack(list(pool.map(pixels, batch["image"].to_pylist()))))
    images = np.concatenate(parts)
    parts.clear()
    pca = PCA(latents).fit(images)
    explained = float(pca.explained_variance_ratio_.sum())
    print(json.dumps({"images": len(images), "secs": time.perf_counter() - started, "explained_variance": explained}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
