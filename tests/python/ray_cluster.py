"""Runs pipelines/ray/lookalike_on_ray.py on a cluster of three nodes, one of which is lost in the middle of a task that runs there.

    ray_cluster.py PROGRAM RAY PREFIX FOLDER

RAY is the Python of an environment with Ray; PREFIX and FOLDER are as three_days.py left them, and the store's address and credentials come from the
environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from check import check
from gate import Gate
from processes import ancestors, argument, command, die_with_parent, wait_for

SCRIPT = Path(__file__).parents[2] / "pipelines/ray/lookalike_on_ray.py"

# One more than tasks of a step, so there is a place for the task whose node is lost.
NODES = 3


def node_of(pid: int, nodes: list[str]) -> str:
    """The node on which a process runs: that of the raylet that started the worker that started it."""
    words = {word.removeprefix("--raylet_socket_name=") for ancestor in ancestors(pid) for word in command(ancestor)}
    [node] = words & set(nodes)
    return node


def main(program: str, python: str, prefix: str, folder: Path) -> None:
    gate = Gate()
    environment = os.environ | {"AWS_ENDPOINT": gate.endpoint, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    cluster = subprocess.Popen(
        [python, Path(__file__).with_name("ray_nodes.py"), str(NODES)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        about = json.loads(cluster.stdout.readline())
        options = ["--plans", f"{prefix}/plans", "--address", about["address"], "--program", program, "--max-tasks", str(NODES - 1)]
        cpus = ["--num-cpus-per-task", "1", "--num-cpus-per-embed-task", "1", "--retry-pause-secs", "1"]
        with (folder / "ray.log").open("w") as log:
            driver = subprocess.Popen(
                [python, SCRIPT, "pipeline.toml", *options, *cpus],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=die_with_parent,
            )
        held = gate.held()
        index, lost = argument(held, "--task-index"), node_of(held, about["nodes"])
        print(lost, file=cluster.stdin, flush=True)
        check(cluster.stdout.readline().strip() == lost, f"{lost} was not lost")
        # The program does not outlive the worker that started it.
        wait_for("the end of what ran on the lost node", lambda: not command(held))
        again = gate.held(lambda pid: pid != held and argument(pid, "--task-index") == index)
        check(node_of(again, about["nodes"]) != lost, f"the task runs again on {lost}, which is lost")
        gate.open()
        stdout, _ = driver.communicate()
        check(driver.returncode == 0, f"exit code {driver.returncode}; see {folder}/ray.log")
        check(json.loads(stdout.splitlines()[-1])["status"] == "committed", stdout)
    finally:
        cluster.stdin.close()
        cluster.wait()
    print("a node was lost; the task that ran there was run again on another")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
