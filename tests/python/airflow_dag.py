"""Runs the DAG of pipelines/airflow in Airflow: a backfill of three days, one task of which is killed in the middle of its work.

    airflow_dag.py PROGRAM AIRFLOW PREFIX FOLDER

AIRFLOW is the Python of an environment with Airflow; PREFIX and FOLDER are as three_days.py left them, and the store's address and credentials come
from the environment. Airflow's scheduler, its server and its workers are processes of their own, as they are anywhere; FOLDER/airflow is its home.
"""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from check import check
from gate import Gate
from processes import TIMEOUT_SECS, argument, die_with_parent, showing, wait_for
from three_days import DAYS

DAGS = Path(__file__).parents[2] / "pipelines/airflow"

# How long a process of Airflow may take to end when it is told to.
SHUTDOWN_SECS = 30

# Tasks of a step at most. Those that embed have several units each, so there is a middle of their work.
MAX_TASKS = 2

DAG, WRONG_DAG, POOL = "lookalike_daily", "lookalike_wrong", "gpus"


class Airflow:
    """An Airflow with nothing in it but the DAG, once as it should be, and once with a pipeline file that is not there."""

    def __init__(self, program: str, python: str, prefix: str, folder: Path, endpoint: str) -> None:
        self.python, self.home = python, folder / "airflow"
        dags = self.home / "dags"
        dags.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        settings = {
            "CORE__DAGS_FOLDER": dags,
            "CORE__LOAD_EXAMPLES": False,
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": False,
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": 2,
            "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.port}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": True,
            "API__HOST": "127.0.0.1",
            "API__PORT": self.port,
            "API__WORKERS": 1,
            "API_AUTH__JWT_SECRET": "a secret of this test, which is as long as it has to be for a hash of 512 bits",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home}/airflow.db?timeout={TIMEOUT_SECS}",
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.2,
            "USAGE_DATA_COLLECTION__ENABLED": False,
        }
        self.environment = os.environ | {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}
        self.environment |= {"AIRFLOW_HOME": str(self.home), "NO_COLOR": "1", "AWS_ENDPOINT": endpoint}
        (dags / "lookalike_graph.py").write_text((DAGS / "lookalike_graph.py").read_text())
        own = {"PROGRAM": program, "PIPELINE": str(folder / "pipeline.toml"), "PLANS": f"{prefix}/plans", "TABLES": f"{prefix}/tables"}
        own |= {"EMBED": {"pool": POOL}, "TIMEZONE": "UTC"}
        (dags / "lookalike_daily.py").write_text(edited(own))
        wrong = edited(own | {"PIPELINE": str(folder / "none.toml")})
        (dags / "lookalike_wrong.py").write_text(wrong.replace(f'"{DAG}"', f'"{WRONG_DAG}"'))

    def run(self, *arguments: str) -> None:
        """A command of Airflow's, which must succeed."""
        with (self.home / "commands.log").open("a") as log:
            command = [self.python, "-m", "airflow", *arguments]
            check(subprocess.run(command, env=self.environment, stdout=log, stderr=log).returncode == 0, f"{arguments}: see {log.name}")

    def make_database(self) -> None:
        self.run("db", "migrate")
        # SQLite lets others read while one writes, if it is asked to.
        with closing(sqlite3.connect(self.home / "airflow.db")) as database:
            database.execute("PRAGMA journal_mode = WAL")

    @contextmanager
    def server(self, name: str, *options: str) -> Iterator[None]:
        """One of the processes of which Airflow consists."""
        with (self.home / f"{name}.log").open("w") as log:
            server = subprocess.Popen(
                [self.python, "-m", "airflow", name, *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        try:
            yield
        finally:
            server.terminate()
            try:
                server.wait(SHUTDOWN_SECS)
            except subprocess.TimeoutExpired:
                # A scheduler was seen to go on as if it had not been told, with all its work done.
                server.kill()
                server.wait()

    def answers(self) -> bool:
        with closing(socket.socket()) as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def rows(self, query: str, *values: str) -> list[dict[str, Any]]:
        """What Airflow's database says."""
        with closing(sqlite3.connect(f"file:{self.home}/airflow.db?mode=ro", uri=True, timeout=60)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(query, values)]

    def ended(self, dag: str, run_type: str, count: int) -> bool:
        """Whether so many runs of a kind have ended."""
        states = self.rows("SELECT state FROM dag_run WHERE dag_id = ? AND run_type = ?", dag, run_type)
        return sum(run["state"] in ("success", "failed") for run in states) == count

    def tasks(self, dag: str, run_type: str) -> list[dict[str, Any]]:
        query = """SELECT task_instance.*, dag_run.state AS run_state FROM task_instance JOIN dag_run USING (dag_id, run_id)
                   WHERE dag_id = ? AND run_type = ?"""
        return self.rows(query, dag, run_type)


def edited(settings: dict[str, Any]) -> str:
    """The DAG's file with settings of one's own, as its users make it, and a retry at once."""
    text = (DAGS / "lookalike_daily.py").read_text().replace("timedelta(minutes=1)", "timedelta(seconds=1)")
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        check(count == 1, f"lookalike_daily.py has no setting {name}")
    return text


def check_backfill(airflow: Airflow, killed: int) -> None:
    """All days have succeeded, with as many tasks as asked for, and nothing but the killed task was tried twice."""
    tasks = airflow.tasks(DAG, "backfill")
    log = f"see {airflow.home}/logs"
    check(all(task["run_state"] == "success" for task in tasks), f"a day has failed: {log}")
    for step, count in [("embed", MAX_TASKS), ("sort", 0), ("join", 1), ("flag", 1)]:
        done = [task for task in tasks if task["task_id"] == step and task["state"] == "success"]
        check(len(done) >= len(DAYS) * count and (count > 0 or not done), f"{len(done)} tasks of {step}; {log}")
    again = [(task["task_id"], task["map_index"]) for task in tasks if task["try_number"] > 1]
    check(again == [("embed", killed)], f"tried again were {again}; {log}")
    pools = {task["pool"] for task in tasks if task["task_id"] == "embed"}
    check(pools == {POOL}, f"tasks that embed were in the pools {pools}")


def main(program: str, python: str, prefix: str, folder: Path) -> None:
    gate = Gate()
    airflow = Airflow(program, python, prefix, folder, gate.endpoint)
    airflow.make_database()
    airflow.run("pools", "set", POOL, "1", "GPUs")
    with airflow.server("api-server"), airflow.server("dag-processor"):
        wait_for("Airflow to find the DAGs", lambda: len(airflow.rows("SELECT * FROM serialized_dag")) == 2)
        days = ["--from-date", DAYS[0], "--to-date", DAYS[-1], "--max-active-runs", "1"]
        airflow.run("backfill", "create", "--dag-id", DAG, *days, "--dag-run-conf", json.dumps({"max_tasks": MAX_TASKS}))
        # Tasks ask the server, so that is to be there before any is scheduled.
        wait_for("Airflow's server", airflow.answers)
        # The scheduler would serve logs at a port that others may have.
        with airflow.server("scheduler", "--skip-serve-logs"):
            task = gate.held()
            killed = int(argument(task, "--task-index"))
            os.kill(task, signal.SIGKILL)
            gate.open()
            wait_for("the backfill", lambda: airflow.ended(DAG, "backfill", len(DAYS)))
            wait_for("runs on schedule", lambda: airflow.ended(DAG, "scheduled", 1) and airflow.ended(WRONG_DAG, "scheduled", 1))
    check_backfill(airflow, killed)
    attempt = next((airflow.home / "logs").glob(f"dag_id={DAG}/*/task_id=embed/map_index={killed}/attempt=1.log"))
    check("ended by signal 9" in attempt.read_text(), f"{attempt} does not say that the task was killed")
    # Yesterday's partition is not there: the plan has nothing, so nothing else is done.
    states = {task["task_id"]: task["state"] for task in airflow.tasks(DAG, "scheduled")}
    check(set(states.values()) == {"skipped"}, f"without anything to do: {states}")
    # A wrong pipeline file is not tried again.
    [plan] = [task for task in airflow.tasks(WRONG_DAG, "scheduled") if task["task_id"] == "plan"]
    check((plan["state"], plan["try_number"]) == ("failed", 1), f"exit code 2: {plan}")
    events = airflow.rows("SELECT uri, asset_event.extra FROM asset_event JOIN asset ON asset_event.asset_id = asset.id")
    for table in ("latents", "neighbors", "anomalies", "runs"):
        found = [json.loads(event["extra"])["status"] for event in events if event["uri"] == f"{prefix}/tables/{table}"]
        check(found == ["committed"] * len(DAYS), f"{table} was announced with {found}")
    print(f"a backfill of three days; the task embed {killed} was killed and tried again")


if __name__ == "__main__":
    with showing(Path(sys.argv[4]), "airflow/**/*.log"):
        main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
