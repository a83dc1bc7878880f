"""The queries of sql/ as the scripts beside this one run them: on which tables, and with which parameters."""

import json
import math
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import duckdb
from deltalake import DeltaTable

from check import check

SQL = Path(__file__).parents[2] / "sql"
sys.path.insert(0, str(SQL))
import generate  # noqa: E402

LATENT_DIM = 32

# The image that others are compared with: one that a smaller copy of was planted for.
LIKE_DAY = "2026-11-02"

# What stands in the block `params` of each query instead of the example. Queries that are not named here run as they are.
PARAMS = {
    "top_strange": {"first_day": "'2026-11-02'", "last_day": "'2026-11-05'", "num_images": "3"},
    "near_duplicates": {"max_distance": "0.001"},
    "anomaly_rate": {"last_day": "'2026-11-05'", "last_quiet_day": "'2026-11-04'"},
    "coverage": {"first_day": "'2026-11-02'"},
    "reject_causes": {"last_day": "'2026-11-05'"},
    "leakage": {"max_distance": "0.002"},
}
QUERIES = sorted(file.stem for file in (SQL / "queries").glob("*.sql")) + [
    "anomalies_of_yesterday",
    "drift",
    "freshness",
    "images_like_this",
]


def settings(location: str) -> generate.Settings:
    """What the tests' pipelines keep of the source."""
    kept = [generate.kept_column(f"{name}:string") for name in ("uri", "module", "split")]
    return generate.Settings(location, ["ds"], kept, [])


def query(dialect: str, name: str) -> str:
    """A query as it stands in the repository."""
    shared = SQL / "queries" / f"{name}.sql"
    return (shared if shared.exists() else SQL / dialect / f"{name}.sql").read_text()


def adapted(dialect: str, name: str, image_id: str, now: datetime) -> str:
    """A query with the tests' parameters, on a day whose yesterday has many broken cells, and at a given time."""
    text = query(dialect, name)
    params = dict(PARAMS.get(name, {}))
    if name.startswith("images_like_this"):
        params = {"image_id": f"'{image_id}'", "ds": f"'{LIKE_DAY}'"}
        text = text.replace("FLOAT[128]", f"FLOAT[{LATENT_DIM}]")
    for parameter, value in params.items():
        text, count = re.subn(rf"('[^']*'|[0-9.]+) AS {parameter}\b", f"{value} AS {parameter}", text, count=1)
        check(count == 1, f"{name} has no parameter {parameter}")
    text = text.replace("CURRENT_DATE", "DATE '2026-11-06'")
    return text.replace("CURRENT_TIMESTAMP", f"CAST('{now:%Y-%m-%d %H:%M:%S}+00:00' AS {generate.TYPES[dialect]['timestamp']})")


def statements(text: str) -> list[str]:
    """The statements of a file, without its comments."""
    code = re.sub(r"^ *--.*\n", "", text, flags=re.MULTILINE)
    return [statement.strip() for statement in code.split(";\n") if statement.strip()]


def live_files(table: Path) -> list[str]:
    """The files that the newest version of a table names."""
    if (table / "_delta_log").exists():
        return [file.removeprefix("file://") for file in DeltaTable(str(table)).file_uris()]
    manifest = json.loads(max((table / "_manifests").iterdir()).read_text())
    return [str(table / unquote(file["path"])) for file in manifest["files"]]


def duckdb_with_tables(folder: Path) -> duckdb.DuckDBPyConnection:
    """DuckDB with the tables and the view `images`, and with those of the other model in the schema `other`."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    files = generate.sql_files(settings(str(folder / "tables")))
    # Without its extension for Delta, which is not in its wheel, DuckDB reads the files that the log names.
    scan = re.compile(r"delta_scan\('(.*?)'\)")

    def read_files(found: re.Match) -> str:
        is_partitioned = not found[1].endswith("/runs")
        return f"read_parquet({live_files(Path(found[1]))}, hive_partitioning = {is_partitioned}, hive_types_autocast = false)"

    connection.execute(scan.sub(read_files, files["duckdb/tables.sql"]))
    connection.execute(files["duckdb/images.sql"])
    files = generate.sql_files(settings(str(folder / "other")))
    connection.execute("CREATE SCHEMA other; USE other")
    connection.execute(files["duckdb/tables_from_parquet.sql"])
    connection.execute(files["duckdb/images.sql"])
    connection.execute("USE main")
    return connection


def image_to_compare(connection: duckdb.DuckDBPyConnection) -> str:
    """The image that a smaller copy of was planted for."""
    [row] = duckdb_rows(connection, f"SELECT image_id FROM latents WHERE ds = '{LIKE_DAY}' AND image_id LIKE '%-small'")
    return row["image_id"].removesuffix("-small")


def time_of_query(connection: duckdb.DuckDBPyConnection) -> datetime:
    """30 hours after the last run: too late for whoever expects one a day."""
    [row] = duckdb_rows(connection, "SELECT CAST(date_trunc('second', max(finished_at)) AS TIMESTAMP) AS last FROM runs")
    return row["last"] + timedelta(hours=30)


def plain(value: object) -> object:
    """A value in the same type from all engines."""
    return value.replace(tzinfo=None) if isinstance(value, datetime) else value


def is_same(found: object, expected: object) -> bool:
    found, expected = plain(found), plain(expected)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, float) and found is not None:
        # Vectors are compared in single precision by some engines.
        return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6)
    return found == expected


def check_rows(name: str, found: list[dict], expected: list[dict]) -> None:
    """Fails unless both are the same rows in the same order, and some."""
    check(len(expected) > 0, f"{name}: nothing is expected")
    check(len(found) == len(expected), f"{name} has {len(found)} rows, not {len(expected)}: {found}, not {expected}")
    for number, (row, wanted) in enumerate(zip(found, expected, strict=True)):
        check(list(row) == list(wanted), f"{name} has the columns {list(row)}, not {list(wanted)}")
        differing = [column for column in wanted if not is_same(row[column], wanted[column])]
        check(not differing, f"{name}, row {number}: {differing} differ: {row}, not {wanted}")


def duckdb_rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict]:
    return connection.sql(sql).to_arrow_table().to_pylist()
