"""Runs pipelines/ray/lookalike_on_ray.py on a cluster of three nodes, one of which is lost in the middle of a task that runs there; then, on those
that are left, with a task that fails for good while another has much to do.

    ray_cluster.py PROGRAM RAY PREFIX FOLDER

RAY is the Python of an environment with Ray; PREFIX and FOLDER are as three_days.py left them, and the store's address and credentials come from the
environment.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

from check import check
from gate import Gate
from processes import ancestors, argument, command, die_with_parent, running, showing, wait_for

SCRIPT = Path(__file__).parents[2] / "pipelines/ray/lookalike_on_ray.py"

# One more than tasks of a step, so there is a place for the task whose node is lost.
NODES = 3


# Stands before the program: the second task that embeds fails as soon as the first is busy, which it is for hours.
FAILS = """#!/bin/sh
if [ "$1" != embed ]; then exec {program} "$@"; fi
case " $* " in
*" --task-index 1 "*) until [ -e {folder}/busy ]; do sleep 0.1; done; exit 4 ;;
*) touch {folder}/busy; exec sleep {busy_secs} ;;
esac
"""
BUSY_SECS = "7654"


class Nodes:
    """The cluster, in front of whose store is a gate."""

    def __init__(self, python: str, prefix: str, folder: Path, gate: Gate) -> None:
        self.python, self.prefix, self.folder = python, prefix, folder
        self.environment = os.environ | {"AWS_ENDPOINT": gate.endpoint, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        self.process = self.start([Path(__file__).with_name("ray_nodes.py"), str(NODES)])
        about = json.loads(self.process.stdout.readline())
        self.address, self.nodes = about["address"], about["nodes"]

    def start(self, arguments: list[str | Path]) -> subprocess.Popen:
        with (self.folder / "ray.log").open("a") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True, "preexec_fn": die_with_parent}
            return subprocess.Popen([self.python, *arguments], cwd=self.folder, env=self.environment, **pipes)

    def drive(self, program: str, *arguments: str) -> subprocess.Popen:
        """Starts a run."""
        options = ["--plans", f"{self.prefix}/plans", "--address", self.address, "--program", program, "--max-tasks", str(NODES - 1)]
        cpus = ["--num-cpus-per-task", "1", "--num-cpus-per-embed-task", "1", "--retry-pause-secs", "1"]
        return self.start([SCRIPT, "pipeline.toml", *options, *cpus, *arguments])

    def node_of(self, pid: int) -> str:
        """The node on which a process runs: that of the raylet that started the worker that started it."""
        words = {word.removeprefix("--raylet_socket_name=") for ancestor in ancestors(pid) for word in command(ancestor)}
        [node] = words & set(self.nodes)
        return node

    def lose(self, node: str) -> None:
        print(node, file=self.process.stdin, flush=True)
        check(self.process.stdout.readline().strip() == node, f"{node} was not lost")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_lost_node(nodes: Nodes, gate: Gate, program: str) -> None:
    driver = nodes.drive(program)
    held = gate.held()
    index, lost = argument(held, "--task-index"), nodes.node_of(held)
    nodes.lose(lost)
    # The program does not outlive the worker that started it.
    wait_for("the end of what ran on the lost node", lambda: not command(held))
    again = gate.held(lambda pid: pid != held and argument(pid, "--task-index") == index)
    check(nodes.node_of(again) != lost, f"the task runs again on {lost}, which is lost")
    gate.open()
    stdout, _ = driver.communicate()
    check(driver.returncode == 0, f"exit code {driver.returncode}; see {nodes.folder}/ray.log")
    check(json.loads(stdout.splitlines()[-1])["status"] == "committed", stdout)


def check_failed_task(nodes: Nodes, program: str) -> None:
    fails = nodes.folder / "fails"
    fails.write_text(FAILS.format(program=program, folder=nodes.folder, busy_secs=BUSY_SECS))
    fails.chmod(fails.stat().st_mode | stat.S_IXUSR)
    driver = nodes.drive(str(fails), "--force")
    stdout, _ = driver.communicate()
    said = (nodes.folder / "ray.log").read_text()
    check((driver.returncode, stdout) == (4, ""), f"exit code {driver.returncode}: {stdout}\n{said}")
    check("--task-index 1" in said and "exit code 4: the data or the model" in said, said)
    wait_for("the end of the task that was called off", lambda: not running("sleep", BUSY_SECS))


def main(program: str, python: str, prefix: str, folder: Path) -> None:
    gate = Gate()
    nodes = Nodes(python, prefix, folder, gate)
    try:
        check_lost_node(nodes, gate, program)
        check_failed_task(nodes, program)
    finally:
        nodes.close()
    print("a node was lost, and its task ran again on another; a task failed, and the other was called off")


if __name__ == "__main__":
    with showing(Path(sys.argv[4]), "ray.log"):
        main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
