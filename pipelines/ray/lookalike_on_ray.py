"""Runs a lookalike pipeline on a Ray cluster.

    lookalike_on_ray.py cells.toml --plans s3://lake/plans/cells --num-gpus-per-task 1 --from 2026-11-28 --to 2026-11-28
    lookalike_on_ray.py --help

Options that are not this script's go to `lookalike plan`, which runs here; tasks and commits are Ray tasks, each a process of the program. All nodes
need the program, ONNX Runtime (`pip install onnxruntime`, on nodes with GPUs `onnxruntime-gpu[cuda,cudnn]`) and the store's credentials, in their environment
(AWS_..., GOOGLE_..., AZURE_...) or by their role. Wants Ray 2.60 or later.

Nodes may be taken away at any time: what ran on them runs again on others, and goes on behind what it had finished. So do tasks that end because a store
stood in their way. After any other error the remaining tasks are called off, and this script ends with the program's own exit code. It can then be
started again: work that was finished is not done again. Let a lifecycle rule of the bucket remove plans after some days.

Standard output is the program's summary, a line of JSON; all else goes to standard error.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

# The steps of a stage with their commands, in order. A step begins when the one before it has ended, a stage when the one before it is committed.
STAGES = {
    "embed": {"embed": ["embed"]},
    "sort": {"sort": ["neighbors", "--step", "sort"]},
    "neighbors": {step: ["neighbors", "--step", step] for step in ("probe", "join", "merge")},
    "flag": {"flag": ["flag"]},
}

TRANSIENT = 5
MEANINGS = {
    1: "something unexpected; please report it",
    2: "the command line or the pipeline file is wrong",
    3: "the tables are published, but more images were rejected than the pipeline file allows",
    4: "the data or the model is not what the pipeline file says, or has changed since the plan was made",
    TRANSIENT: "a store or another writer stood in the way",
    6: "something is missing on the machine: ONNX Runtime, the GPU, memory, disk or credentials",
    99: "nothing to do",
}


class Failed(Exception):
    """The program ended with an exit code that another try would not change."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


class Interrupted(Failed):
    """It may succeed if it is run again: a store stood in the way, or somebody ended it."""


@dataclass(frozen=True)
class Cluster:
    """What tasks ask of the cluster."""

    program: str
    max_tasks: int
    max_retries: int
    retry_pause_secs: float
    num_cpus: float
    embed_num_cpus: float
    embed_num_gpus: float

    def submit(self, name: str, arguments: list[str]) -> ray.ObjectRef:
        """Starts the program with these arguments on some node; Ray shows the name."""
        is_embed = arguments[0] == "embed"
        task = run.options(
            name=name,
            num_cpus=self.embed_num_cpus if is_embed else self.num_cpus,
            num_gpus=self.embed_num_gpus if is_embed else 0,
            max_retries=self.max_retries,
        )
        return task.remote(self.program, arguments, self.retry_pause_secs)


def call(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the program, and returns the summary that it printed last."""
    try:
        process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise Failed(6, f"{program} cannot be run on {socket.gethostname()}: {error}") from None
    try:
        stdout, _ = process.communicate()
    finally:
        # Where Ray calls the task off, the program ends within seconds, and keeps what it has finished. With a worker that is killed, Ray kills it.
        if process.poll() is None:
            process.terminate()
            process.wait()
    code = process.returncode
    if code == 0:
        return json.loads(stdout.splitlines()[-1])
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}: {MEANINGS.get(code, 'which is none of its own')}"
    message = f"lookalike {' '.join(arguments)} ended on {socket.gethostname()} {how}"
    # 130 and 143 are its own after a signal. A process that was ended says nothing of the next one.
    if code < 0 or code > 128:
        raise Interrupted(128 + -code if code < 0 else code, message)
    raise (Interrupted if code == TRANSIENT else Failed)(code, message)


@ray.remote(retry_exceptions=[Interrupted], scheduling_strategy="SPREAD")
def run(program: str, arguments: list[str], retry_pause_secs: float) -> dict[str, Any]:
    """A task: one process of the program."""
    try:
        return call(program, arguments)
    except Interrupted:
        # Ray tries again at once.
        time.sleep(retry_pause_secs)
        raise


def gather(tasks: list[ray.ObjectRef]) -> list[dict[str, Any]]:
    """Waits for all tasks; after the first error the others are called off."""
    waiting = list(tasks)
    try:
        while waiting:
            [done], waiting = ray.wait(waiting)
            ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, Failed):
            raise error.cause from None
        raise
    finally:
        for task in waiting:
            ray.cancel(task)
    return ray.get(tasks)


def say(message: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)


def run_plan(cluster: Cluster, plan: dict[str, Any]) -> dict[str, Any]:
    """Runs all steps of a plan, and returns the closing summary."""
    summary = plan
    at = ["--plan", plan["plan"]]
    for stage, steps in STAGES.items():
        counts = summary["tasks"]
        for step, command in steps.items():
            count = min(counts[step], cluster.max_tasks)
            say(f"{step}: {count} tasks")
            tasks = []
            for index in range(count):
                share = ["--task-index", str(index), "--task-count", str(count)]
                tasks.append(cluster.submit(f"{step} {index}/{count}", [*command, *at, *share]))
            gather(tasks)
        [summary] = gather([cluster.submit(f"commit {stage}", ["commit", *at, "--stage", stage])])
        say(f"{stage}: {summary['status']}")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("pipeline", help="pipeline file (TOML)")
    parser.add_argument("--plans", required=True, metavar="URL", help="prefix below which the plan of this run is written")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--program", default="lookalike", help="the program, as all nodes find it")
    parser.add_argument("--max-tasks", type=int, default=100, metavar="N", help="tasks of a step at most")
    parser.add_argument("--num-cpus-per-task", type=float, default=2, metavar="N", help="of all tasks but those that follow")
    parser.add_argument("--num-cpus-per-embed-task", type=float, default=2, metavar="N", help="as [execution] workers of the pipeline file")
    parser.add_argument("--num-gpus-per-task", type=float, default=0, metavar="N", help="of tasks that embed; no other task uses a GPU")
    parser.add_argument(
        "--max-retries", type=int, default=5, metavar="N", help="of a task whose node was lost, or that a store did not let through"
    )
    parser.add_argument(
        "--retry-pause-secs", type=float, default=10, metavar="SECS", help="before a task is tried again that a store did not let through"
    )
    known, for_plan = parser.parse_known_args()
    cluster = Cluster(
        program=known.program,
        max_tasks=known.max_tasks,
        max_retries=known.max_retries,
        retry_pause_secs=known.retry_pause_secs,
        num_cpus=known.num_cpus_per_task,
        embed_num_cpus=known.num_cpus_per_embed_task,
        embed_num_gpus=known.num_gpus_per_task,
    )
    # A plan is never changed, so each run has one of its own.
    out = f"{known.plans.rstrip('/')}/{datetime.now(UTC):%Y-%m-%dT%H%M%S}-{uuid.uuid4().hex[:8]}/"
    try:
        summary = call(cluster.program, ["plan", known.pipeline, *for_plan, "--plan", out])
        if summary["status"] != "nothing_to_do":
            ray.init(address=known.address, log_to_driver=True)
            summary = run_plan(cluster, summary)
    except Failed as error:
        say(error.message)
        return error.code
    except RayTaskError:
        raise
    except RayError as error:
        say(f"the cluster did not do its part, and trying again did not help: {error}")
        return TRANSIENT
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
