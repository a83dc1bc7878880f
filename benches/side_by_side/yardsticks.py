"""What would be used instead: Python with ONNX Runtime, Pillow and pyarrow, and fastdup. Each run is a process of its own."""

import json
import shutil
import sys
from pathlib import Path

from ours import WORK
from runs import HERE, ROOT, Failed, Run, Side, execute, run_of

FASTDUP_PYTHON = ROOT / ".cache/fastdup-venv/bin/python"

VARIANTS = {"loop": "Python, in a loop", "threads": "Python, on threads", "draft": "Python, JPEG draft mode"}


def python(variant: str, package: Path, tables: list[Path], num_images: int, batch_size: int = 32) -> Side:
    """One of the variants of python_embed.py. The batch size should be the fastest one: for the photographs, 32 of 16 to 128 are."""

    def run() -> Run:
        out = python_out(variant)
        out.unlink(missing_ok=True)
        lines, taken = execute([sys.executable, HERE / "python_embed.py", variant, batch_size, package, out, *tables])
        return checked(lines, taken, num_images)

    return Side(VARIANTS[variant], run)


def python_out(variant: str) -> Path:
    WORK.mkdir(parents=True, exist_ok=True)
    return WORK / f"python-{variant}.parquet"


def fastdup(network: Path, dim: int, images: Path, num_images: int) -> Side:
    def run() -> Run:
        if not FASTDUP_PYTHON.exists():
            raise Failed(f"there is no {FASTDUP_PYTHON}: `make .cache/fastdup-venv.stamp` installs fastdup (Python 3.11 or 3.12)")
        out = WORK / "fastdup"
        shutil.rmtree(out, ignore_errors=True)
        # It reports errors to its makers unless told not to.
        command = [FASTDUP_PYTHON, HERE / "fastdup_embed.py", network, dim, images, out]
        lines, taken = execute(command, {"SENTRY_OPT_OUT": "1"})
        return checked(lines, taken, num_images)

    return Side("fastdup", run)


def python_pca(side: int, latents: int, tables: list[Path], num_images: int) -> Side:
    def run() -> Run:
        lines, taken = execute([sys.executable, HERE / "python_fit.py", side, latents, *tables])
        return checked(lines, taken, num_images)

    return Side("Python, scikit-learn", run)


def checked(lines: list[str], taken: dict, num_images: int) -> Run:
    done = json.loads(lines[-1])
    if done["images"] != num_images:
        raise Failed(f"{done['images']} of {num_images} images were embedded")
    return run_of(done["images"], done["secs"], taken, done)
