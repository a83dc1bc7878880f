"""Parses all SQL of sql/ by the grammar of its dialect, and looks up every column in the tables as schemas/ has them.

    warehouse_dialects.py

A name that does not exist, a type that the dialect does not have, or a view that leaves out a column fails. What no grammar of sqlglot
has is named in BEYOND_SQLGLOT.
"""

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.annotate_types import annotate_types
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import traverse_scope
from sqlglot.schema import MappingSchema

from check import check
from warehouse import QUERIES, SQL, generate, query, statements

# Statements that sqlglot knows in part, with what is taken from them before they are parsed.
BEYOND_SQLGLOT = {
    "bigquery": [
        # A BigLake table without columns, and keys that are read from paths.
        (r"^CREATE OR REPLACE EXTERNAL TABLE \w+\nWITH CONNECTION `project\.region\.connection`\nOPTIONS \([^()]*\)$", "SELECT 1"),
        (r"\nWITH PARTITION COLUMNS \([^()]+\)$", ""),
    ],
    "trino": [(r"^CALL delta\.system\.register_table\((\s+\w+ => '[^']+',?){3}\s+\)$", "SELECT 1")],
}


def parse(dialect: str, statement: str) -> exp.Expression:
    for pattern, replacement in BEYOND_SQLGLOT.get(dialect, []):
        statement = re.sub(pattern, replacement, statement)
    [parsed] = sqlglot.parse(statement, dialect=dialect)
    check(not isinstance(parsed, exp.Command), f"{dialect} has no statement such as {statement[:200]}")
    return parsed


def schema(dialect: str, tables: list) -> MappingSchema:
    """The tables and the view `images`, with types of the dialect; and the tables as views are made over them."""
    columns = {table.name: {column.name: generate.type_in(dialect, column.type) for column in table.columns} for table in tables}
    names = {name: of for table, of in columns.items() for name in (table, f"{table}_delta")}
    # All names have as many parts as `other.images`, and a query without the first part means `main`.
    return MappingSchema({"main": names, "other": {"images": columns["images"]}}, dialect=dialect)


def resolve(dialect: str, statement: exp.Expression, tables: MappingSchema) -> exp.Expression:
    """Finds every column of a query in the tables."""
    resolved = qualify(statement.copy(), schema=tables, dialect=dialect, db="main", quote_identifiers=False)
    # Of a table that it does not know, sqlglot takes any column. What a table function gives, it cannot know.
    sources = [source for scope in traverse_scope(resolved) for source in scope.sources.values()]
    for table in sources:
        if isinstance(table, exp.Table) and isinstance(table.this, exp.Identifier) and not tables.column_names(table):
            raise SqlglotError(f"there is no table {table.sql(dialect)}")
    return annotate_types(resolved, schema=tables, dialect=dialect)


def column_names(dialect: str, statement: exp.Expression) -> list[str]:
    return [column.output_name.lower() for column in statement.selects]


def check_view(dialect: str, statement: exp.Expression, table, tables: MappingSchema) -> None:
    """A view has the table's columns, by the names in its head and by its query."""
    wanted = [column.name for column in table.columns]
    found = column_names(dialect, statement.expression)
    check(found == wanted, f"{dialect}: the view {table.name} selects {found}, not {wanted}")
    if isinstance(statement.this, exp.Schema):
        named = [column.name.lower() for column in statement.this.expressions]
        check(named == wanted, f"{dialect}: the view {table.name} has the columns {named}, not {wanted}")
    resolve(dialect, statement.expression, tables)


def check_definitions(dialect: str, file: Path, described: dict, tables: MappingSchema) -> int:
    """The statements that make the tables known, or the view `images`; returns how many there are."""
    grammar = "athena" if file.name == "tables_athena.sql" else dialect
    made, commented = set(), set()
    parsed = [parse(grammar, statement) for statement in statements(file.read_text())]
    for statement in parsed:
        if isinstance(statement, exp.Create) and statement.kind == "VIEW":
            name = statement.find(exp.Table).name.lower()
            # DuckDB's read functions, whose columns only the files know.
            if dialect != "duckdb":
                check_view(dialect, statement, described[name], tables)
            made.add(name)
        elif isinstance(statement, exp.Create):
            made.add(statement.find(exp.Table).name.lower().removesuffix("_delta"))
            if isinstance(statement.this, exp.Schema):
                table = described[statement.find(exp.Table).name.lower()]
                found = [(column.name.lower(), column.kind) for column in statement.this.expressions]
                wanted = [(c.name, exp.DataType.build(generate.type_in(dialect, c.type), dialect=dialect)) for c in table.columns]
                check(found == wanted, f"{file} declares {found}, not {wanted}")
        elif isinstance(statement, exp.Comment) and statement.args["kind"] == "COLUMN":
            commented.add((statement.this.table.lower(), statement.this.name.lower()))
    wanted = {"images"} if file.name == "images.sql" else described.keys() - {"images"}
    check(made == wanted, f"{file} makes {made}, not {wanted}")
    if commented:
        columns = {(name, column.name) for name in wanted for column in described[name].columns}
        check(commented == columns, f"{file} describes {commented ^ columns} differently")
    return len(parsed)


def check_drift(dialect: str, tables: list) -> None:
    """What drift.sql takes from an element of `drift` is in it, which sqlglot does not look up."""
    [runs] = [table for table in tables if table.name == "runs"]
    [type_] = [column.type for column in runs.columns if column.name == "drift"]
    fields = re.findall(r"(\w+): ", type_)
    text = query(dialect, "drift")
    taken = set(re.findall(r'\bk\.(?:c[.:])?"?(\w+)', text)) - {"image_partition", "finished_at"}
    check(taken == set(fields), f"{dialect}: drift.sql takes {taken}, and an element has {fields}")
    if dialect == "trino":
        check(f"AS c ({', '.join(fields)})" in text, f"trino: fields are named by their place, {fields}")


def check_that_wrong_names_are_found(dialect: str, tables: MappingSchema) -> None:
    text = query(dialect, "top_strange")
    for name, wrong in (("i.severity_percentile", "i.severity"), ("FROM images", "FROM pictures"), ("ROW_NUMBER()", "ROW_NUMBER(")):
        check(name in text, f"top_strange has no {name}")
        try:
            resolve(dialect, parse(dialect, text.replace(name, wrong)), tables)
        except SqlglotError:
            continue
        check(False, f"{dialect} takes {wrong} for {name}")


def check_folder(dialect: str, folder: Path, settings: generate.Settings) -> tuple[int, list, MappingSchema]:
    """All definitions of a dialect in a folder; returns how many statements there are, and the tables."""
    described = generate.read_tables(settings)
    described.append(generate.images_view(dialect, described, settings)[0])
    tables = schema(dialect, described)
    by_name = {table.name: table for table in described}
    files = [file for file in folder.glob("*.sql") if file.stem == "images" or file.stem.startswith("tables")]
    check(len(files) >= 2, f"{folder} has only {files}")
    return sum(check_definitions(dialect, file, by_name, tables) for file in files), described, tables


def generated(out: Path, settings: generate.Settings) -> None:
    """Has generate.py write the SQL of a pipeline."""
    options = ["--location", settings.location]
    options += [option for key in settings.partition for option in ("--partition", key)]
    options += [option for column in settings.kept for option in ("--kept", f"{column.name}:{column.type}")]
    options += [option for name in settings.without for option in ("--without", name)]
    subprocess.run([sys.executable, SQL / "generate.py", "--to", out, *options], check=True)


def main() -> str:
    # Statements that fall back to plain text are failures here, and need no warning besides.
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    kept = [generate.kept_column(text) for text in ("uri:string", "split:string", "defect:double")]
    others = [generate.Settings("s3://a/b", ["ds", "camera"], kept, ["groups"]), generate.Settings("/a/b", [], [], ["anomalies", "groups"])]
    counts = {}
    for dialect in generate.TYPES:
        own = {file.stem for file in (SQL / dialect).glob("*.sql")}
        num_statements, described, tables = check_folder(
            dialect, SQL / dialect, generate.Settings("s3://lake/lookalike", ["ds"], kept[:2], [])
        )
        queries = {name for name in own if name != "images" and not name.startswith("tables")} | set(QUERIES)
        for name in sorted(queries):
            [statement] = statements(query(dialect, name))
            resolve(dialect, parse(dialect, statement), tables)
        check_drift(dialect, described)
        check_that_wrong_names_are_found(dialect, tables)
        counts[dialect] = num_statements + len(queries)
    for settings in others:
        with tempfile.TemporaryDirectory() as out:
            generated(Path(out), settings)
            for dialect in generate.TYPES:
                check_folder(dialect, Path(out) / dialect, settings)
    return f"statements by dialect: {counts}"


if __name__ == "__main__":
    print("ok:", main())
