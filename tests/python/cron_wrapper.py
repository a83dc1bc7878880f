"""Runs pipelines/cron/lookalike_cron.sh as cron does: alone, twice at once, told to stop, and where the program fails.

cron_wrapper.py PROGRAM SHELLCHECK FOLDER
"""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client.parser import text_string_to_metric_families

from check import check
from processes import ancestors, has_pending, running, stop, wait_for
from published import read_delta
from three_days import pictures

SCRIPT = Path(__file__).parents[2] / "pipelines/cron/lookalike_cron.sh"
ROWS, BROKEN = 8, 4

PIPELINE = """[pipeline]
name = "cron"
[source]
table = "images"
[model]
package = "model"
[output]
table = "tables"
[limits]
max_rejected_fraction = {fraction}
"""

# Stands before the program and fails the first time, as where a store is in the way.
FAILS_ONCE = """#!/bin/sh
if [ ! -e failed ]; then touch failed; exit 5; fi
exec {program} "$@"
"""


class Cron:
    """A machine with cron: a pipeline, and the environment of its jobs, in which there is next to nothing."""

    def __init__(self, program: str, folder: Path) -> None:
        self.folder, self.program = folder, program
        self.log = folder / "log/cells.log"
        self.metrics = folder / "metrics/cells.prom"
        for name in ("log", "metrics", "images"):
            (folder / name).mkdir()
        settings = {"PROGRAM": program, "LOG_DIR": folder / "log", "METRICS_DIR": folder / "metrics", "PAUSE_SECS": 1}
        lines = [f"LOOKALIKE_{name}='{value}'\n" for name, value in settings.items()]
        lines.append(f"ORT_DYLIB_PATH='{os.environ['ORT_DYLIB_PATH']}'\n")
        (folder / "environment").write_text("".join(lines))

    def images(self, number: int, broken: int) -> None:
        """Adds a file to the source."""
        images = pictures(ROWS, number)
        images[:broken] = [b"no picture"] * broken
        ids = [f"image-{number}-{row}" for row in range(ROWS)]
        pq.write_table(pa.table({"image_id": ids, "image": images}), self.folder / f"images/{number}.parquet")

    def pipeline(self, fraction: float) -> None:
        (self.folder / "cells.toml").write_text(PIPELINE.format(fraction=fraction))

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SCRIPT, *(arguments or ["cells.toml"])],
            cwd=self.folder,
            env={"PATH": "/usr/bin:/bin", "LOOKALIKE_ENVIRONMENT": str(self.folder / "environment")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, code: int, *arguments: str) -> str:
        """Runs the script, which must end with this code; returns what cron would mail."""
        job = self.start(*arguments)
        said, _ = job.communicate(timeout=120)
        check(job.returncode == code, f"exit code {job.returncode}, not {code}: {said}\n{self.log.read_text()}")
        return said

    def hold(self, job: subprocess.Popen) -> int:
        """Waits for the program that a job started, and stops it in the middle."""
        [pid] = wait_for("the program", lambda: [pid for pid in running(self.program, "run") if job.pid in ancestors(pid)])
        stop(pid)
        return pid

    def rows(self) -> int:
        return read_delta(self.folder / "tables/latents").num_rows

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.metrics.read_text())
        [value] = [sample.value for family in families for sample in family.samples if sample.name == name]
        return value


def main(program: str, shellcheck: str, folder: Path) -> None:
    subprocess.run([shellcheck, SCRIPT], check=True)
    cron = Cron(program, folder)
    cron.images(0, 0)
    cron.pipeline(0.1)
    fit = ["fit", "cells.toml", "--latent-dim", "3", "--height", "8", "--width", "8"]
    subprocess.run([program, *fit], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    # Two at once: the second gives way, and says so in the log alone.
    first = cron.start()
    held = cron.hold(first)
    check(cron.run(0) == "", "what gives way is to be silent")
    check(cron.log.read_text().count("another run is under way") == 1, cron.log.read_text())
    # The lock is the program's too: it outlasts a script that was killed.
    first.kill()
    first.wait()
    cron.run(0)
    check(cron.log.read_text().count("another run is under way") == 2, cron.log.read_text())
    os.kill(held, signal.SIGCONT)
    wait_for("the end of the program", lambda: not Path(f"/proc/{held}").exists())
    check(cron.rows() == ROWS and cron.metric("lookalike_exit_code") == 0, cron.metrics.read_text())

    # Nothing to do, and a store in the way at first: nobody is mailed.
    check(cron.run(0) == "" and cron.run(99, "cells.toml", "--skip-exit-code") == "", "a run with nothing to do is to be silent")
    cron.images(1, 0)
    fails_once = folder / "fails-once"
    fails_once.write_text(FAILS_ONCE.format(program=program))
    fails_once.chmod(fails_once.stat().st_mode | stat.S_IXUSR)
    (folder / "environment").open("a").write(f"LOOKALIKE_PROGRAM='{fails_once}'\n")
    check(cron.run(0) == "", "a run that succeeds at last is to be silent")
    check(cron.log.read_text().count("exit code 5") == 1 and cron.rows() == 2 * ROWS, cron.log.read_text())

    # Told to stop: so is the program, and nothing is tried again.
    cron.images(2, 0)
    job = cron.start()
    held = cron.hold(job)
    job.send_signal(signal.SIGTERM)
    wait_for("the signal to reach the program", lambda: has_pending(held, signal.SIGTERM))
    os.kill(held, signal.SIGCONT)
    said, _ = job.communicate(timeout=60)
    check(job.returncode == 143 and "told to stop" in said, f"{job.returncode}: {said}")
    check(cron.run(0) == "" and cron.rows() == 3 * ROWS, "the next run goes on")

    # What a person should look at is mailed.
    cron.images(3, BROKEN)
    cron.pipeline(0.01)
    said = cron.run(3)
    check("rejected" in said and str(cron.log) in said and cron.rows() == 4 * ROWS, said)
    check(cron.metric("lookalike_exit_code") == 3, cron.metrics.read_text())
    check("none.toml" in cron.run(2, "none.toml"), "the end of the log is to say what is wrong")
    check("usage" in subprocess.run([SCRIPT], capture_output=True, text=True).stderr, "usage")
    print("ran twice at once, to be stopped, and with exit codes 0, 2, 3, 5 and 143")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
