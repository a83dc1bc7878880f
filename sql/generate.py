"""Writes all that repeats the columns of the tables: schemas/README.md, the statements that make the tables known to a warehouse, and
the view `images`. What a column is called, holds and means is said once, in schemas/*.toml.

    generate.py                 writes the files of the repository
    generate.py --check         fails where one of them is not what would be written
    generate.py --to FOLDER --location s3://lake/cells --partition ds --partition camera --kept uri:string --without groups
                                writes the SQL for tables of your own

Needs Python 3.11 and nothing else.
"""

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TABLES = ("latents", "neighbors", "groups", "anomalies", "runs")

# How each dialect writes our types; sources are in README.md. `{}` takes the elements of an array, the fields of a struct.
TYPES = {
    "duckdb": {
        "string": "VARCHAR", "boolean": "BOOLEAN", "integer": "INTEGER", "long": "BIGINT", "float": "FLOAT", "double": "DOUBLE",
        "timestamp": "TIMESTAMP WITH TIME ZONE", "array": "{}[]", "struct": "STRUCT({})", "field": "{} {}",
    },
    "bigquery": {
        "string": "STRING", "boolean": "BOOL", "integer": "INT64", "long": "INT64", "float": "FLOAT64", "double": "FLOAT64",
        "timestamp": "TIMESTAMP", "array": "ARRAY<{}>", "struct": "STRUCT<{}>", "field": "`{}` {}",
    },
    "snowflake": {
        "string": "VARCHAR", "boolean": "BOOLEAN", "integer": "INTEGER", "long": "BIGINT", "float": "FLOAT", "double": "FLOAT",
        "timestamp": "TIMESTAMP_LTZ", "array": "ARRAY", "struct": "OBJECT", "field": "{} {}",
    },
    "trino": {
        "string": "varchar", "boolean": "boolean", "integer": "integer", "long": "bigint", "float": "real", "double": "double",
        "timestamp": "timestamp(3) with time zone", "array": "array({})", "struct": "row({})", "field": "{} {}",
    },
    "spark": {
        "string": "STRING", "boolean": "BOOLEAN", "integer": "INT", "long": "BIGINT", "float": "FLOAT", "double": "DOUBLE",
        "timestamp": "TIMESTAMP", "array": "ARRAY<{}>", "struct": "STRUCT<{}>", "field": "{}: {}",
    },
}  # fmt: skip

# BigQuery takes no longer description of a column.
MAX_COMMENT = 1024

# What Hive calls the folder of a partition without a value.
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


# How a dialect reads a Delta table, to be called by its name and `_delta`, after a note on what to put in. DuckDB reads it by a function.
DELTA_TABLES = {
    "duckdb": (
        "The tables as views, in DuckDB. They lie below {location}: put your own place there.",
        "",
    ),
    "bigquery": (
        "The tables as BigLake tables, and a documented view of each, in BigQuery. They lie below {location}: put your own place there,\n"
        "and the name of a connection that may read it. Choose a default dataset first: names are not qualified.",
        "CREATE OR REPLACE EXTERNAL TABLE {name}_delta\nWITH CONNECTION `project.region.connection`\n"
        "OPTIONS (format = 'DELTA_LAKE', uris = ['{location}/{name}']);",
    ),
    "snowflake": (
        "The tables as Iceberg tables, and a documented view of each, in Snowflake. Before: an external volume `lake` of the folder above\n"
        "{location}, and\n"
        "CREATE CATALOG INTEGRATION delta_files CATALOG_SOURCE = OBJECT_STORE TABLE_FORMAT = DELTA ENABLED = TRUE.",
        "CREATE OR REPLACE ICEBERG TABLE {name}_delta\n  EXTERNAL_VOLUME = 'lake'\n  CATALOG = 'delta_files'\n"
        "  BASE_LOCATION = '{folder}/{name}'\n  AUTO_REFRESH = TRUE;",
    ),
    "trino": (
        "The tables, and a documented view of each, in Trino. They lie below {location}: put your own place there. The catalog is\n"
        "called `delta` here, with delta.register-table-procedure.enabled = true, and the schema `lookalike`. Athena: tables_athena.sql.",
        "CALL delta.system.register_table(\n  schema_name => 'lookalike',\n  table_name => '{name}_delta',\n"
        "  table_location => '{location}/{name}'\n);",
    ),
    "spark": (
        "The tables, and a documented view of each, in Spark with Delta Lake and in Databricks. They lie below {location}: put your\n"
        "own place there.",
        "CREATE TABLE IF NOT EXISTS {name}_delta USING DELTA LOCATION '{location}/{name}';",
    ),
}


@dataclass
class Column:
    name: str
    type: str
    nullable: bool
    description: str
    unit: str = ""
    null_rule: str = ""

    def comment(self) -> str:
        """Meaning, unit and null rule in one line; of a long meaning, the sentences that fit."""
        rest = f" Unit: {self.unit}." * bool(self.unit) + f" {self.null_rule}" * bool(self.null_rule)
        sentences = re.split(r"(?<=\.) ", " ".join(self.description.split()))
        while len(" ".join(sentences) + rest) > MAX_COMMENT:
            sentences.pop()
        return " ".join(sentences) + rest


@dataclass
class Table:
    name: str
    description: str
    columns: list[Column]

    def comment(self) -> str:
        """The first paragraph of the description."""
        return " ".join(self.description.split("\n\n")[0].split())


@dataclass
class Settings:
    """What differs from pipeline to pipeline."""

    location: str  # [output] table
    partition: list[str]  # the partition keys
    kept: list[Column]  # [source] columns
    without: list[str]  # tables that the pipeline does not write


def read_table(name: str) -> Table:
    """A table as schemas/ has it, without the columns that a pipeline adds."""
    contract = tomllib.loads((REPOSITORY / f"schemas/{name}.v1.toml").read_text())
    return Table(name, contract["description"], [Column(**column) for column in contract["column"]])


def read_tables(settings: Settings) -> list[Table]:
    """The tables of a pipeline: kept columns stand behind the image's id, partition keys at the end."""
    tables = [read_table(name) for name in TABLES if name not in settings.without]
    for table in tables:
        if table.name == "latents":
            table.columns[1:1] = settings.kept
        if table.name != "runs":
            table.columns += [Column(key, "string", True, "Partition key of the source.") for key in settings.partition]
    return tables


def type_in(dialect: str, type_: str) -> str:
    """A type of ours, as `array<float>`, in a dialect."""
    words = TYPES[dialect]
    if inner := re.fullmatch(r"array<(.*)>", type_):
        return words["array"].format(type_in(dialect, inner[1]))
    if inner := re.fullmatch(r"struct<(.*)>", type_):
        fields = [field.split(": ") for field in inner[1].split(", ")]
        return words["struct"].format(", ".join(words["field"].format(name, type_in(dialect, of)) for name, of in fields))
    return words[type_]


def quoted(dialect: str, text: str) -> str:
    """A string literal."""
    if dialect in ("bigquery", "spark"):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "'" + text.replace("'", "''") + "'"


def identifier(dialect: str, name: str) -> str:
    """A name; `groups`, `partition` and `rows` are reserved words of BigQuery, and `partition` is one of Athena's."""
    return f"`{name}`" if dialect == "bigquery" and name in ("groups", "partition", "rows") else name


def view(dialect: str, table: Table, query: str) -> str:
    """A view with a comment on each of its columns."""
    name = identifier(dialect, table.name)
    columns = [(identifier(dialect, column.name), quoted(dialect, column.comment())) for column in table.columns]
    comment = quoted(dialect, table.comment())
    match dialect:
        case "bigquery":
            list_ = ",\n".join(f"  {column} OPTIONS (description = {text})" for column, text in columns)
            return f"CREATE OR REPLACE VIEW {name} (\n{list_}\n)\nOPTIONS (description = {comment})\nAS {query};"
        case "snowflake" | "spark":
            list_ = ",\n".join(f"  {column} COMMENT {text}" for column, text in columns)
            equals = "= " if dialect == "snowflake" else ""
            return f"CREATE OR REPLACE VIEW {name} (\n{list_}\n)\nCOMMENT {equals}{comment}\nAS {query};"
        case _:
            list_ = "\n".join(f"COMMENT ON COLUMN {name}.{column} IS {text};" for column, text in columns)
            return f"CREATE OR REPLACE VIEW {name} AS\n{query};\nCOMMENT ON VIEW {name} IS {comment};\n{list_}"


def select(dialect: str, table: Table, source: str) -> str:
    columns = ",\n".join(f"  {identifier(dialect, column.name)}" for column in table.columns)
    return f"SELECT\n{columns}\nFROM {source}"


def file(note: str, parts: list[str]) -> str:
    """A file of statements, with a comment at its top."""
    lines = ["Written by sql/generate.py from schemas/.", "", *note.splitlines()]
    head = "\n".join(f"-- {line}".rstrip() for line in lines)
    return "\n\n".join([head, *(part for part in parts if part)]) + "\n"


def tables_sql(dialect: str, tables: list[Table], settings: Settings) -> str:
    """Makes the Delta tables known, and documents them: a comment on a Delta table itself would be a new version of it in its log,
    so each is read through a view that has the comments."""
    note, statement = DELTA_TABLES[dialect]
    names = {"location": settings.location, "folder": settings.location.split("/")[-1]}
    parts = []
    for table in tables:
        source = f"delta_scan('{settings.location}/{table.name}')" if dialect == "duckdb" else f"{table.name}_delta"
        parts += [statement.format(name=table.name, **names), view(dialect, table, select(dialect, table, source))]
    return file(note.format(**names), parts)


def athena_tables_sql(tables: list[Table], settings: Settings) -> str:
    """Athena takes columns from the Delta log, and nothing else beside the location: there is no place for comments."""
    note = f"The tables in Athena. They lie below {settings.location}: put your own place there. Columns come from the Delta log."
    statement = "CREATE EXTERNAL TABLE `{name}`\nLOCATION '{location}/{name}/'\nTBLPROPERTIES ('table_type' = 'DELTA');"
    return file(note, [statement.format(name=table.name, location=settings.location) for table in tables])


def duckdb_parquet_sql(tables: list[Table], settings: Settings) -> str:
    note = (
        f'The tables as views, in DuckDB, where the pipeline says publish = "parquet". They lie below {settings.location}: put your own\n'
        "place there. The newest manifest of a table names its files. The views read variables of the session: run this file in each session,\n"
        "and again for the rows of later runs."
    )
    parts = []
    for table in tables:
        place = f"{settings.location}/{table.name}"
        # Named after the place, so that the tables of two pipelines can be there at once.
        name = re.sub(r"\W", "_", place.split("/")[-2]) + f"_{table.name}"
        # `runs` has no partitions, but folders above it may look like some.
        is_partitioned = table.name != "runs" and settings.partition
        hive = "hive_partitioning = true, hive_types_autocast = false" if is_partitioned else "hive_partitioning = false"
        query = select("duckdb", table, f"read_parquet(getvariable('{name}_files'), {hive})")
        parts.append(
            f"SET VARIABLE {name}_manifest = (SELECT max(file) FROM glob('{place}/_manifests/*.json'));\n"
            f"SET VARIABLE {name}_files = (\n  SELECT list('{place}/' || url_decode(file.path))\n"
            f"  FROM (SELECT unnest(files) AS file FROM read_json(getvariable('{name}_manifest')))\n);\n{view('duckdb', table, query)}"
        )
    return file(note, parts)


def declared(dialect: str, table: Table) -> str:
    """A table with types and comments."""
    lines = []
    for column in table.columns:
        type_, comment = type_in(dialect, column.type), quoted(dialect, column.comment())
        # An array is never null in BigQuery: what is null elsewhere is empty there.
        required = "" if column.nullable or dialect == "bigquery" and column.type.startswith("array") else " NOT NULL"
        comment = f"OPTIONS (description = {comment})" if dialect == "bigquery" else f"COMMENT {comment}"
        lines.append(f"  {identifier(dialect, column.name)} {type_}{required} {comment}")
    comment = quoted(dialect, table.comment())
    comment = f"OPTIONS (description = {comment})" if dialect == "bigquery" else f"COMMENT = {comment}"
    return f"CREATE OR REPLACE TABLE {identifier(dialect, table.name)} (\n" + ",\n".join(lines) + f"\n)\n{comment};"


def bigquery_parquet_sql(tables: list[Table], settings: Settings) -> str:
    note = (
        f'Copies of the tables in BigQuery, loaded from the files below {settings.location} where the pipeline says publish = "parquet".\n'
        "The newest file in _manifests of a table names its files, with the run in their path: load the files of each run by a statement of\n"
        "its own, for the partition keys are read from what follows the prefix. Without enable_list_inference an array would come as\n"
        "embedding.list.element."
    )
    parts = []
    for table in tables:
        prefix = f"{settings.location}/{table.name}/runs/RUN"
        keys = [column for column in table.columns if column.name in settings.partition]
        hive = f",\n  hive_partition_uri_prefix = '{prefix}'" if keys else ""
        columns = f"\nWITH PARTITION COLUMNS ({', '.join(f'{key.name} STRING' for key in keys)})" if keys else ""
        parts.append(
            f"{declared('bigquery', table)}\n\nLOAD DATA INTO {identifier('bigquery', table.name)}\nFROM FILES (\n  format = 'PARQUET',\n"
            f"  enable_list_inference = true,\n  uris = ['{prefix}/*.parquet']{hive}\n){columns};"
        )
    return file(note, parts)


def snowflake_parquet_sql(tables: list[Table], settings: Settings) -> str:
    note = (
        'Copies of the tables in Snowflake, loaded from Parquet files where the pipeline says publish = "parquet". Before: a stage\n'
        "`lookalike` of the place of the tables. The newest file in _manifests of a table names its files: put their paths into FILES.\n"
        "A vector is an ARRAY; queries cast it, for VECTOR cannot be loaded from Parquet."
    )
    parts = []
    for table in tables:
        values = []
        for column in table.columns:
            is_key = table.name != "runs" and column.name in settings.partition
            from_path = f"REGEXP_SUBSTR(METADATA$FILENAME, '/{column.name}=([^/]+)/', 1, 1, 'e')"
            from_file = f"$1:{column.name}::{type_in('snowflake', column.type)}"
            values.append("    " + (from_path if is_key else from_file))
        parts.append(
            f"{declared('snowflake', table)}\n\nCOPY INTO {table.name}\nFROM (\n  SELECT\n" + ",\n".join(values) + "\n"
            f"  FROM @lookalike/{table.name}/\n)\nFILES = ('runs/RUN/FILE.parquet')\nFILE_FORMAT = (TYPE = PARQUET);"
        )
    return file(note, parts)


def images_view(dialect: str, tables: list[Table], settings: Settings) -> tuple[Table, list[str]]:
    """The view `images`, a row an image with all that is known about it, and the expressions of its columns."""
    of = {table.name: table for table in tables}
    columns, expressions = [], []

    def add(alias: str, column: Column, name: str | None = None) -> None:
        # All but the image's own columns come by an outer join.
        nullable = column.nullable or alias != "l"
        columns.append(Column(name or column.name, column.type, nullable, column.description, column.unit, column.null_rule))
        expressions.append(f"{alias}.{column.name}" + (f" AS {name}" if name else ""))

    for column in of["latents"].columns:
        add("l", column, "latents_run_id" if column.name == "run_id" else None)
    values = " || '/' || ".join(f"'{key}=' || COALESCE(l.{key}, '{HIVE_NULL}')" for key in settings.partition)
    meaning = "The partition keys as `key=value` pairs joined by slashes, as `neighbor_partition` and `representative_partition` have them."
    columns.append(Column("image_partition", "string", True, meaning))
    none = f"CAST(NULL AS {type_in(dialect, 'string')})"
    expressions.append(f"{values or none} AS image_partition")
    for alias, name in (("a", "anomalies"), ("g", "groups")):
        for column in of[name].columns if name in of else ():
            if column.name != "image_id" and column.name not in settings.partition:
                add(alias, column, f"{name}_run_id" if column.name == "run_id" else None)
    if "neighbors" in of:
        nearest = {column.name: replace(column) for column in of["neighbors"].columns}
        nearest["neighbor_id"].description = "The nearest neighbor; `image_id` of `latents`."
        nearest["neighbor_partition"].description = "Its partition, as `key=value` pairs joined by slashes."
        add("n", nearest["neighbor_id"], "nearest_id")
        add("n", nearest["neighbor_partition"], "nearest_partition")
        add("n", nearest["distance"], "nearest_distance")
        add("n", nearest["run_id"], "neighbors_run_id")
    description = "One row for each row of `latents`, with its flag, its group and its nearest neighbor as far as it has them."
    return Table("images", description, columns), expressions


def images_sql(dialect: str, tables: list[Table], settings: Settings) -> str:
    images, expressions = images_view(dialect, tables, settings)
    names = [table.name for table in tables]
    joins = []
    for alias, name, more in (("a", "anomalies", ""), ("g", "groups", ""), ("n", "neighbors", " AND n.rank = 1")):
        # A partition key may be null, and then equals itself.
        same = "".join(f" AND {alias}.{key} IS NOT DISTINCT FROM l.{key}" for key in settings.partition)
        if name in names:
            joins.append(f"LEFT JOIN {identifier(dialect, name)} AS {alias} ON {alias}.image_id = l.image_id{same}{more}")
    query = "SELECT\n" + ",\n".join(f"  {expression}" for expression in expressions) + "\nFROM latents AS l\n" + "\n".join(joins)
    note = (
        "One row an image: what is in `latents`, its flag, its group and its nearest neighbor. Run it after tables.sql, in the same schema."
    )
    return file(note, [view(dialect, images, query)])


def schemas_readme() -> str:
    """All columns of all tables, for people."""
    lines = [
        "# The columns of the tables",
        "",
        "Written by `sql/generate.py` from the files beside it. Columns that a pipeline adds, the kept ones and the partition keys, are told of",
        "in the text of each table.",
    ]

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    for name in TABLES:
        table = read_table(name)
        lines += ["", f"## {name}", "", *(" ".join(part.split()) + "\n" for part in table.description.split("\n\n"))]
        lines += ["| column | type | unit | meaning | null |", "|---|---|---|---|---|"]
        for column in table.columns:
            null = column.null_rule.removeprefix("Null ").removesuffix(".") or "never"
            row = (f"`{column.name}`", f"`{column.type}`", column.unit, column.description, null)
            lines.append(f"| {' | '.join(map(cell, row))} |")
    return "\n".join(lines) + "\n"


def type_table() -> str:
    """Our types in each dialect, in Markdown."""
    drift = next(column.type for column in read_table("runs").columns if column.name == "drift")
    rows = ["string", "boolean", "integer", "long", "float", "double", "timestamp", "array<float>", "array<string>", drift]
    lines = [f"| ours | {' | '.join(TYPES)} |", "|---" * (1 + len(TYPES)) + "|"]
    for type_ in rows:
        names = [type_, *(type_in(dialect, type_) for dialect in TYPES)]
        if type_ == drift:
            # Seven fields are too many for a cell.
            names = [re.sub(r"\binput\b.*\bis_anomaly\b[^>)]*", "…", name) for name in names]
            names = [name.replace("`…", "…") for name in names]
        lines.append("| " + " | ".join(f"`{name}`" for name in names) + " |")
    return "\n".join(lines)


def sql_files(settings: Settings) -> dict[str, str]:
    """The SQL of a pipeline's tables, by path."""
    tables = read_tables(settings)
    files = {}
    for dialect in TYPES:
        files[f"{dialect}/tables.sql"] = tables_sql(dialect, tables, settings)
        files[f"{dialect}/images.sql"] = images_sql(dialect, tables, settings)
    files["trino/tables_athena.sql"] = athena_tables_sql(tables, settings)
    files["duckdb/tables_from_parquet.sql"] = duckdb_parquet_sql(tables, settings)
    files["bigquery/tables_from_parquet.sql"] = bigquery_parquet_sql(tables, settings)
    files["snowflake/tables_from_parquet.sql"] = snowflake_parquet_sql(tables, settings)
    return files


def repository_files() -> dict[Path, str]:
    """What of the repository is generated."""
    kept = [kept_column("uri:string"), kept_column("split:string")]
    written = {}
    for store in ("s3", "gs"):
        for name, text in sql_files(Settings(f"{store}://lake/lookalike", ["ds"], kept, [])).items():
            if (store == "gs") == name.startswith("bigquery/"):
                written[REPOSITORY / "sql" / name] = text
    written[REPOSITORY / "schemas/README.md"] = schemas_readme()
    readme = REPOSITORY / "sql/README.md"
    start, end = "<!-- types -->\n", "<!-- end of types -->\n"
    before, rest = readme.read_text().split(start)
    written[readme] = before + start + type_table() + "\n" + end + rest.split(end)[1]
    return written


def kept_column(text: str) -> Column:
    name, type_ = text.split(":", 1)
    return Column(name, type_, True, "Column of the source, kept as it is.", null_rule="Null where the source is.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a file of the repository is stale")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write the SQL of tables of your own")
    parser.add_argument("--location", default="s3://lake/lookalike", metavar="URL", help="[output] table of the pipeline")
    parser.add_argument("--partition", action="append", default=[], metavar="KEY", help="a partition key of the source, outermost first")
    parser.add_argument(
        "--kept", action="append", default=[], type=kept_column, metavar="NAME:TYPE", help="a column that [source] columns keeps"
    )
    parser.add_argument("--without", action="append", default=[], choices=TABLES[1:4], help="a table that the pipeline does not write")
    options = parser.parse_args()
    if options.to:
        settings = Settings(options.location.rstrip("/"), options.partition, options.kept, options.without)
        files = {options.to / name: text for name, text in sql_files(settings).items()}
    else:
        files = repository_files()
    if options.check:
        stale = [str(path.relative_to(REPOSITORY)) for path, text in files.items() if not path.exists() or path.read_text() != text]
        if stale:
            print("stale, please run sql/generate.py:", *stale, sep="\n  ")
        return int(bool(stale))
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
