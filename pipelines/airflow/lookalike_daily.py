"""A lookalike pipeline day by day, on Airflow's workers. Copy this file and lookalike_graph.py to your DAGs, and put your own places below.

Each run takes the partitions of its data interval: that of the 28th starts when the day is over, and takes `ds=2026-11-28`. Days gone by, one after the
other, and a day whose files have changed since:

    airflow backfill create --dag-id lookalike_daily --from-date 2026-11-01 --to-date 2026-11-21 --max-active-runs 1
    airflow backfill create --dag-id lookalike_daily --from-date 2026-11-22 --to-date 2026-11-22 --reprocess-behavior completed

Where a nightly run meets a backfill, one of them may find that the tables have changed since its plan was made, and fail; clear it, and it plans anew. A DAG
that reads the tables is scheduled on the asset of `runs`, which comes last: `schedule=Asset("s3://lake/lookalike/runs")`.

Workers need the program and `pip install onnxruntime`, and the credentials of the store in their environment (AWS_..., GOOGLE_..., AZURE_...) or by their role.
Where workers share GPUs, make a pool with a slot for each (`airflow pools set gpus 4 "GPUs"`) and name it below; with `queue` beside it, these
tasks go to the workers that have them. Wants Airflow 3.3 or later.
"""

from datetime import timedelta

import pendulum
from lookalike_graph import LookalikeOperator, lookalike_dag

PROGRAM = "lookalike"
PIPELINE = "/opt/airflow/pipelines/cells.toml"  # on each worker
PLANS = "s3://lake/plans/cells"
TABLES = "s3://lake/lookalike"
TIMEZONE = "UTC"  # whose days the partitions are
EMBED = {"pool": "default_pool"}
RETRY_DELAY = timedelta(minutes=1)

dag = lookalike_dag(
    "lookalike_daily",
    LookalikeOperator,
    pipeline=PIPELINE,
    plans=PLANS,
    tables=TABLES,
    start_date=pendulum.datetime(2026, 11, 1, tz=TIMEZONE),
    retry_delay=RETRY_DELAY,
    settings={"program": PROGRAM},
    settings_of={"embed": EMBED},
    doc_md=__doc__,
)
