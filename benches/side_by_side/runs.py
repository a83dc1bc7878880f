"""What is measured and how it is told: a run of a process, pairs of runs in turn, medians with their spread."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# As many cores as there are for this process.
NUM_CORES = len(os.sched_getaffinity(0))


class Failed(Exception):
    """A side did not do its work, so that there is nothing to compare with."""


@dataclass
class Run:
    """One run of one side: images (or rows) a second, and what it took."""

    rate: float  # of the work itself: our stage, their loop
    wall_rate: float  # of the whole process, from its start to its end
    wall_secs: float
    cpu_secs: float
    peak_bytes: int
    more: dict = field(default_factory=dict)  # what else the side says of itself


@dataclass
class Side:
    """Somebody who does the work, and how."""

    name: str
    run: Callable[[], Run]
    unit: str = "images/s"


def execute(command: list, env: dict[str, str] | None = None) -> tuple[list[str], dict]:
    """Runs a process to its end; returns the lines of its standard output, and what it took. Raises `Failed` with what it said."""
    command = [str(part) for part in command]
    measured = [sys.executable, "-I", "-S", str(HERE / "measured.py"), *command]
    with tempfile.TemporaryFile("w+") as errors:
        ran = subprocess.run(measured, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
        errors.seek(0)
        said = errors.read()
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    if not lines or json.loads(lines[-1])["code"] != 0:
        last = "\n".join((said + ran.stdout).splitlines()[-15:])
        raise Failed(f"{' '.join(command)} failed:\n{last}")
    return lines[:-1], json.loads(lines[-1])


def run_of(num_images: int, secs: float, taken: dict, more: dict | None = None) -> Run:
    """The run of a process that needed `secs` for its work on so many images."""
    wall_secs = taken["wall_secs"]
    return Run(num_images / secs, num_images / wall_secs, wall_secs, taken["cpu_secs"], taken["peak_bytes"], more or {})


class Report:
    """Prints what is measured as it comes, and keeps all of it."""

    def __init__(self, about: dict):
        self.kept: dict = {**about, "cases": {}}

    def case(self, name: str, title: str) -> None:
        self.now: dict = {"title": title, "runs": {}, "results": {}, "figures": {}}
        self.kept["cases"][name] = self.now
        print(f"\n{name}: {title} (load {os.getloadavg()[0]:.1f})", flush=True)

    def failed(self, error: Exception) -> None:
        # Half of a comparison is none.
        self.now |= {"failed": f"{type(error).__name__}: {error}", "results": {}}
        print(f"  failed: {error}", flush=True)

    def warm_up(self, *sides: Side) -> list[Run]:
        """A run of each side that does not count: it finds what it reads in memory afterwards, and has shown that it works."""
        return [side.run() for side in sides]

    def run(self, side: Side) -> Run:
        """A run that counts."""
        run = side.run()
        self.keep(side.name, asdict(run))
        return run

    def keep(self, name: str, run: dict) -> None:
        self.now["runs"].setdefault(name, []).append(run)

    def pairs(self, ours: Side, theirs: Side, repeats: int, *, wanted: float | None = None) -> None:
        """Runs both in turn, and tells how many times as fast ours is in each pair."""
        pairs = [(self.run(ours), self.run(theirs)) for _ in range(repeats)]
        for side, number in ((ours, 0), (theirs, 1)):
            self.tell(side, [pair[number] for pair in pairs])
        self.result(f"{ours.name} / {theirs.name}", [a.rate / b.rate for a, b in pairs], at_least=wanted)
        self.result(f"{ours.name} / {theirs.name}, whole process", [a.wall_rate / b.wall_rate for a, b in pairs])

    def between(self, ours: Side, bound: Side, repeats: int, *, wanted: float) -> None:
        """Runs ours between two runs of what bounds it, and tells how near it comes to the mean of these: a machine becomes slower and
        faster by the minute, by more than there is to see."""
        bounds, runs = [self.run(bound)], []
        for _ in range(repeats):
            runs.append(self.run(ours))
            bounds.append(self.run(bound))
        self.tell(ours, runs)
        self.tell(bound, bounds)
        means = [(before.rate + after.rate) / 2 for before, after in itertools.pairwise(bounds)]
        self.result(f"{ours.name} / {bound.name}", [run.rate / mean for run, mean in zip(runs, means, strict=True)], at_least=wanted)

    def tell(self, side: Side, runs: list[Run]) -> None:
        rate, wall_rate = (spread([value(run) for run in runs], ".1f") for value in (lambda run: run.rate, lambda run: run.wall_rate))
        cpu_secs = statistics.median(run.cpu_secs for run in runs)
        peak_mib = max(run.peak_bytes for run in runs) / 2**20
        more = f"whole process {wall_rate}; processor {cpu_secs:.1f} s; at most {peak_mib:.0f} MiB"
        print(f"  {side.name:<32} {rate} {side.unit}; {more}", flush=True)

    def result(self, name: str, values: list[float], *, at_least: float | None = None, at_most: float | None = None) -> None:
        """A figure that was measured several times, a ratio for the most part, and what it should be."""
        wanted = f" (wanted: at least {at_least})" if at_least is not None else f" (wanted: at most {at_most})" if at_most is not None else ""
        self.now["results"][name] = {"values": values, "median": statistics.median(values), "at_least": at_least, "at_most": at_most}
        shown = " ".join(f"{value:.3f}" for value in values)
        print(f"  = {name}: {shown}; median {statistics.median(values):.3f}{wanted}", flush=True)

    def figure(self, name: str, value: object) -> None:
        """Anything else that is worth knowing."""
        self.now["figures"][name] = value
        print(f"  {name}: {value:.6f}" if isinstance(value, float) else f"  {name}: {value}", flush=True)

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.kept, indent=1) + "\n")


def spread(values: list[float], form: str) -> str:
    """The median, and from where to where the values go."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
