"""A lookalike pipeline as a DAG of Airflow, whatever its tasks run on: lookalike_daily.py runs them on Airflow's workers,
lookalike_daily_kubernetes.py in pods of their own.

    plan > embed[n] > commit > sort[n] > commit > probe[n] > join[n] > merge[n] > commit > flag[n] > commit

The plan says how many tasks of a step have work, and so does each commit for the steps after it. Before each step a small task makes the list that
Airflow maps over: of as many tasks, at most `max_tasks` of the run. A step without work is skipped, and what comes after it runs. Where nothing has changed
the plan is skipped, and with it the rest.

Each try of `plan` writes a plan of its own, so clearing a run plans anew, with the source as it is then, and clearing another task repeats that task.
What was done before is not done again, for tasks leave receipts beside the tables. Let a lifecycle rule of the bucket remove plans after some days.

    exit code        what Airflow does
    0                goes on
    99               skips: there is nothing to do
    5, or killed     tries again, `retries` times, after a pause that grows
    3                fails at once. The tables are published, but more images were rejected than the pipeline file allows, so consumers of
                     the table `runs` do not start. Look at `status` in `latents`; if that is as it has to be, mark the task as a success
    others           fails at once, for another try would end the same way
"""

import json
import shlex
from datetime import datetime, timedelta
from typing import Any

from airflow.configuration import conf
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Asset, BaseOperator, Param, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.timetables.interval import CronDataIntervalTimetable

# The steps of a stage with their commands, in order. A step begins when the one before it has ended, a stage when the one before it is committed.
STAGES = {
    "embed": {"embed": ["embed"]},
    "sort": {"sort": ["neighbors", "--step", "sort"]},
    "neighbors": {step: ["neighbors", "--step", step] for step in ("probe", "join", "merge")},
    "flag": {"flag": ["flag"]},
}

# Tables that a commit publishes. `runs` comes last of all: a DAG that reads several tables is scheduled on that one.
PUBLISHED = {"embed": ["latents"], "sort": [], "neighbors": ["neighbors"], "flag": ["anomalies", "runs"]}

# What is skipped because there is no work for it holds nobody up; where everything before is skipped, so is what follows.
WHEN = "none_failed_min_one_success"

# Where this run's plan is, as `plan` said.
PLAN = "{{ ti.xcom_pull(task_ids='plan')['plan'] }}"

TRANSIENT, NOTHING_TO_DO = 5, 99
MEANINGS = {
    1: "something unexpected; please report it",
    2: "the command line or the pipeline file is wrong",
    3: "the tables are published, but more images were rejected than the pipeline file allows",
    4: "the data or the model is not what the pipeline file says, or has changed since the plan was made",
    TRANSIENT: "a store or another writer stood in the way",
    6: "something is missing on the machine: ONNX Runtime, the GPU, memory, disk or credentials",
    126: "the program cannot be run",
    127: "the program was not found",
}


def lookalike_dag(
    dag_id: str,
    operator: type[BaseOperator],
    *,
    pipeline: str,
    plans: str,
    tables: str,
    start_date: datetime,
    cron: str = "0 0 * * *",
    retry_delay: timedelta = timedelta(minutes=1),
    settings: dict[str, Any] | None = None,
    settings_of: dict[str, dict[str, Any]] | None = None,
    doc_md: str | None = None,
) -> DAG:
    """The DAG of a pipeline file.

    Each run takes the days of its data interval, in the time zone of `start_date`. `tables` is what the pipeline file says under `[output]`. `settings` are
    given to the operator of all tasks, `settings_of` to that of the named ones, such as the pool of GPUs to `embed`.

    Runs come one at a time, for each changes the neighbors of the rows before it.
    """
    timezone = start_date.tzinfo.name
    first = f"{{{{ data_interval_start.in_timezone('{timezone}') | ds }}}}"
    # The interval ends where the next one begins, while `--to` is the last day that is taken.
    last = f"{{{{ data_interval_end.in_timezone('{timezone}').subtract(microseconds=1) | ds }}}}"
    retries = {"retries": 3, "retry_delay": retry_delay, "retry_exponential_backoff": True, "max_retry_delay": timedelta(minutes=15)}
    settings_of = settings_of or {}
    with DAG(
        dag_id=dag_id,
        schedule=CronDataIntervalTimetable(cron, timezone=timezone),
        start_date=start_date,
        catchup=False,
        max_active_runs=1,
        params={"max_tasks": Param(16, type="integer", minimum=1, description="tasks of a step at most")},
        default_args=retries | (settings or {}),
        tags=["lookalike"],
        doc_md=doc_md,
    ) as dag:
        # The id is another one in each try.
        out = f"{plans.rstrip('/')}/{first}/{{{{ ti.id }}}}/"
        arguments = ["plan", pipeline, "--from", first, "--to", last, "--plan", out, "--skip-exit-code"]
        plan = said = operator(task_id="plan", arguments=arguments, **settings_of.get("plan", {}))
        for stage, steps in STAGES.items():
            ended = said
            for step, command in steps.items():
                shares = share_out.override(task_id=f"{step}_tasks", trigger_rule=WHEN)(step, command, plan.output, said.output)
                tasks = operator.partial(task_id=step, trigger_rule=WHEN, do_xcom_push=False, **settings_of.get(step, {}))
                tasks = tasks.expand(arguments=shares)
                ended >> tasks
                ended = tasks
            commit = operator(
                task_id=f"commit_{stage}",
                arguments=["commit", "--plan", PLAN, "--stage", stage],
                trigger_rule=WHEN,
                outlets=[Asset(f"{tables.rstrip('/')}/{table}") for table in PUBLISHED[stage]],
                **settings_of.get(f"commit_{stage}", {}),
            )
            [said, ended] >> commit
            said = commit
    return dag


@task
def share_out(
    step: str, command: list[str], plan: dict[str, Any], said: dict[str, Any], params: dict[str, Any] | None = None
) -> list[list[str]]:
    """The arguments of each task of a step, by what was said of it last."""
    count = min(said["tasks"][step], params["max_tasks"], conf.getint("core", "max_map_length"))
    return [[*command, "--plan", plan["plan"], "--task-index", str(index), "--task-count", str(count)] for index in range(count)]


def announce(summary: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Tells those who wait for the tables what a commit said of them."""
    for table in context["task"].outlets:
        context["outlet_events"][table].extra = summary
    return summary


def failure(code: int) -> AirflowException:
    """What an exit code other than 0 is to Airflow: an error after which it tries again, or one after which it does not."""
    # Of a process that was killed the code is negative, of a shell or a container it is 128 and the number of the signal.
    if code < 0 or code > 128:
        return AirflowException(f"lookalike was ended by signal {-code if code < 0 else code - 128}")
    message = f"lookalike ended with exit code {code}: {MEANINGS.get(code, 'which is none of its own')}; the log says more"
    return AirflowException(message) if code == TRANSIENT else AirflowFailException(message)


class LookalikeOperator(BashOperator):
    """Runs the program on the worker."""

    template_fields = (*BashOperator.template_fields, "arguments")

    def __init__(self, *, arguments: list[str], program: str = "lookalike", **kwargs: Any) -> None:
        super().__init__(bash_command="", append_env=True, skip_on_exit_code=NOTHING_TO_DO, **kwargs)
        self.arguments = arguments
        self.program = program

    def execute(self, context: dict[str, Any]) -> dict[str, Any]:
        # The program takes the place of the shell, so that signals reach it, and the one that ended it is known. A space at the end, for Bash
        # commands that end in `.sh` are names of files to Airflow.
        self.bash_command = f"exec {shlex.join([self.program, *self.arguments])} "
        try:
            last_line = super().execute(context)
        except AirflowSkipException:
            raise
        except AirflowException as error:
            if not self.subprocess_hook.sub_process:
                raise
            raise failure(self.subprocess_hook.sub_process.returncode) from error
        return announce(json.loads(last_line), context)
