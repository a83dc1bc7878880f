"""Runs pipelines/kubernetes/run.sh, against the stand-in of kubectl.py: a run, one where there is nothing to do, and two that fail.

    kubernetes_jobs.py PROGRAM AIRFLOW PREFIX FOLDER

AIRFLOW is the Python of the environment that has the schemas of Kubernetes' API, and ShellCheck beside it; PREFIX and FOLDER are as three_days.py left them.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

from check import check

SCRIPT = Path(__file__).parents[2] / "pipelines/kubernetes/run.sh"
TASKS = 3

# What the secret of credentials holds.
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT", "AWS_ALLOW_HTTP", "AWS_REGION")

KUBECTL = """#!/bin/sh
exec {python} {stand_in} "$@"
"""

# The program, of which one task of `embed` is killed the first time, and which says all the time that a store is in the way of `flag`, if it is told to.
PROGRAM = """#!/bin/sh
if [ "$1$JOB_COMPLETION_INDEX" = embed1 ] && [ ! -e {folder}/killed ]; then touch {folder}/killed; kill -KILL $$; fi
if [ "$1" = flag ] && [ -e {folder}/busy ]; then exit 5; fi
exec {program} "$@"
"""


class Cluster:
    """A namespace with the config map and the secret, and kubectl for it."""

    def __init__(self, program: str, python: str, prefix: str, folder: Path) -> None:
        self.prefix, self.folder = prefix, folder / "cluster"
        for name in ("bin", "configmaps/lookalike-pipeline", "secrets"):
            (self.folder / name).mkdir(parents=True)
        self.pipeline((folder / "pipeline.toml").read_text())
        lines = [f"{name}={os.environ[name]}\n" for name in CREDENTIALS]
        (self.folder / "secrets/lookalike-credentials").write_text("".join(lines))
        self.script("kubectl", KUBECTL.format(python=python, stand_in=Path(__file__).with_name("kubectl.py")))
        self.script("program", PROGRAM.format(folder=self.folder, program=program))

    def pipeline(self, text: str) -> None:
        (self.folder / "configmaps/lookalike-pipeline/pipeline.toml").write_text(text)

    def script(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(self, code: int, *arguments: str) -> tuple[str, str]:
        """Runs the script without credentials, which are the pods'; returns what it printed and what it said."""
        environment = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
        environment |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "KUBECTL_FOLDER": str(self.folder), "POLL_SECS": "0.1"}
        environment |= {"KUBECTL_PROGRAM": str(self.folder / "bin/program"), "PLANS": f"{self.prefix}/plans/", "MAX_TASKS": str(TASKS)}
        environment |= {"IMAGE": "registry.example.com/lookalike:test", "GPUS": "1"}
        ran = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)
        check(ran.returncode == code, f"exit code {ran.returncode}, not {code}: {ran.stdout}\n{ran.stderr}")
        return ran.stdout, ran.stderr

    def pods(self, step: str) -> list[str]:
        """Pods of all Jobs of a step, without the name of the Job."""
        names = [pod.name.split(f"-{step}-") for pod in (self.folder / "pods").iterdir()]
        return sorted(name[1] for name in names if len(name) == 2 and name[0].count("-") == 3)


def main(program: str, python: str, prefix: str, folder: Path) -> None:
    subprocess.run([Path(python).with_name("shellcheck"), SCRIPT], check=True)
    cluster = Cluster(program, python, prefix, folder)
    stdout, said = cluster.run(0)
    check(json.loads(stdout)["status"] == "committed", stdout)
    check(cluster.pods("embed") == ["0-0", "1-0", "1-1", "2-0"], f"pods of embed: {cluster.pods('embed')}; {said}")
    stdout, said = cluster.run(0)
    check(json.loads(stdout)["status"] == "nothing_to_do" and "embed" not in said, said)

    # A store in the way is tried as often as the manifest says, and a wrong pipeline file once.
    text = (folder / "pipeline.toml").read_text()
    cluster.pipeline(text.replace("contamination = 0.1", "contamination = 0.2"))
    (cluster.folder / "busy").touch()
    before = len(cluster.pods("flag"))
    _, said = cluster.run(1)
    tries = [pod for pod in cluster.pods("flag") if pod.startswith("0-")]
    check("maximal number of failed indexes" in said and len(tries) == 7, f"{before} and {tries}: {said}")
    cluster.pipeline(text.replace("k = 4", "q = 4"))
    _, said = cluster.run(1)
    check("plan failed" in said and "exit code 2 matching FailJob" in said and "q = 4" in said, said)
    print("a run of which a pod was killed, nothing to do, a store in the way, and a wrong pipeline file")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
