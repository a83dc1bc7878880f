"""The same photographs through fastdup, with the same network: vectors, neighbors, groups, outliers.

    fastdup_embed.py NETWORK DIM IMAGES WORK

NETWORK is an ONNX file with vectors of DIM values, IMAGES a folder of image files; WORK is made anew. Runs in the environment of
requirements-fastdup.txt. The last line is JSON: images with a vector, and seconds of `run`.
"""

import json
import sys
import time
from pathlib import Path

import fastdup


def main(network: Path, dim: int, images: Path, work: Path) -> None:
    started = time.perf_counter()
    job = fastdup.create(work_dir=str(work), input_dir=str(images))
    job.run(model_path=str(network), d=dim, ccthreshold=0.96, threshold=0.8, nearest_neighbors_k=5, overwrite=True)
    secs = time.perf_counter() - started
    names, vectors = fastdup.load_binary_feature(str(work / "atrain_features.dat"), dim)
    if vectors.shape != (len(names), dim):
        sys.exit(f"error: {len(names)} names, and vectors of {vectors.shape}")
    print(json.dumps({"images": len(names), "secs": secs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
