"""The program: pipeline files for it, its runs, and the vectors it publishes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds

from data import BENCH
from runs import Failed, Run, Side, execute, run_of

WORK = BENCH / "work"

# What in a pipeline file asks for decoding at a part of the size where that is enough.
FAST_DECODE = {"execution": {"decode": "fast"}}

EMBED_ONLY = {"neighbors": {"enabled": False}, "anomaly": {"enabled": False}}


@dataclass
class Pipeline:
    """A pipeline file, and how many images its source has."""

    name: str
    source: str | Path  # a path or a URL
    package: Path
    num_images: int
    tables: dict[str, dict] = field(default_factory=lambda: EMBED_ONLY)  # further tables of the file
    outputs: Iterator[str] | None = None  # a new URL for each run; by default it is a folder in WORK, which is emptied
    env: dict[str, str] = field(default_factory=dict)
    image: str = "image"  # the column

    @property
    def folder(self) -> Path:
        """The output, where it is no URL."""
        return WORK / f"{self.name}-out"

    def write(self) -> Path:
        output = next(self.outputs) if self.outputs else str(self.folder)
        tables = {
            "pipeline": {"name": self.name},
            "source": {"table": str(self.source), "image": self.image},
            "model": {"package": str(self.package)},
            **self.tables,
            "output": {"table": output},
        }
        WORK.mkdir(parents=True, exist_ok=True)
        file = WORK / f"{self.name}.toml"
        file.write_text("\n".join(f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in of.items()) for name, of in tables.items()))
        return file

    def vectors(self, column: str) -> dict[str, np.ndarray]:
        """What was published in `latents`, by image id. There is one version, since every run begins with an empty folder."""
        return vectors(sorted((self.folder / "latents").rglob("*.parquet")), column)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(part)}" for key, part in value.items()) + " }"
    return json.dumps(value)


def vectors(files: list[Path], column: str) -> dict[str, np.ndarray]:
    rows = ds.dataset([str(file) for file in files]).to_table(columns=["image_id", column])
    return dict(zip(rows["image_id"].to_pylist(), map(np.array, rows[column].to_pylist()), strict=True))


class Program:
    """The program under test."""

    def __init__(self, file: Path):
        self.file = file

    def version(self) -> list[str]:
        return execute([self.file, "--version"])[0]

    def call(self, verb: str, pipeline: Pipeline, *options: str) -> tuple[dict, dict]:
        """Runs a verb; returns the JSON of the last line, and what the process took."""
        lines, taken = execute([self.file, verb, pipeline.write(), "--quiet", *options], pipeline.env)
        return json.loads(lines[-1]), taken

    def embed(self, name: str, pipeline: Pipeline) -> Side:
        """The embed stage alone, from an empty output on."""

        def run() -> Run:
            shutil.rmtree(pipeline.folder, ignore_errors=True)
            summary, taken = self.call("embed", pipeline)
            num_ok = sum(counts.get("ok", 0) for counts in summary["counts"])
            if num_ok != pipeline.num_images:
                raise Failed(f"{num_ok} of {pipeline.num_images} images of {pipeline.source} were embedded")
            return run_of(num_ok, summary["secs"], taken)

        return Side(name, run)

    def whole(self, name: str, pipeline: Pipeline) -> Side:
        """A whole run, from an empty output on; its work is all stages."""

        def run() -> Run:
            shutil.rmtree(pipeline.folder, ignore_errors=True)
            summary, taken = self.call("run", pipeline)
            if summary["rows_ok"] != pipeline.num_images:
                raise Failed(f"{summary['rows_ok']} of {pipeline.num_images} images of {pipeline.source} were embedded")
            return run_of(summary["rows_ok"], sum(summary["secs"].values()), taken, {"stage_secs": summary["secs"]})

        return Side(name, run)

    def fit(self, name: str, pipeline: Pipeline, *options: str) -> Side:
        """Learning a model of the source, into a package that is new each time; its work is the whole process."""

        def run() -> Run:
            shutil.rmtree(pipeline.package, ignore_errors=True)
            summary, taken = self.call("fit", pipeline, *options)
            if summary["images"] != pipeline.num_images:
                raise Failed(f"{summary['images']} of {pipeline.num_images} rows of {pipeline.source} were learned from")
            return run_of(summary["images"], taken["wall_secs"], taken, {"explained_variance": summary["explained_variance"]})

        return Side(name, run)

    def flag(self, name: str, pipeline: Pipeline) -> Side:
        """The flag stage alone, on `latents` that are there, into an empty table."""

        def run() -> Run:
            shutil.rmtree(pipeline.folder / "anomalies", ignore_errors=True)
            summary, taken = self.call("flag", pipeline)
            if summary["rows"] != pipeline.num_images:
                raise Failed(f"{summary['rows']} of {pipeline.num_images} rows were judged")
            return run_of(summary["rows"], summary["secs"], taken)

        return Side(name, run, "rows/s")

    def report(self, pipeline: Pipeline) -> dict:
        """Writes the page about the last run anew; says what the process took."""
        return execute([self.file, "report", pipeline.write(), "--quiet"], pipeline.env)[1]

    def floor(self, pipeline: Pipeline) -> Side:
        """Decoding alone and inference alone on all cores, added up: what no pipeline of the two can be faster than. The fastest
        setting is found by the first run, and measured by the others."""
        setting: list[str] = []

        def run() -> Run:
            found, taken = self.call("bench", pipeline, "--json", *setting)
            fastest = found["fastest"]
            setting[:] = ["--workers", str(fastest["workers"]), "--batch-size", str(fastest["batch_size"])]
            rate = found["floor_images_per_sec"]
            return Run(rate, rate, taken["wall_secs"], taken["cpu_secs"], taken["peak_bytes"], found)

        return Side("floor", run)
