use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::support::{cells, folder, lookalike, python, write};

/// The pipeline file of the queries' tables. With a `prefix`, that of another model, whose tables are plain Parquet.
fn pipeline(prefix: &str, source: &str, contamination: f64) -> String {
    let (out, publish) = if prefix.is_empty() { ("tables", "delta") } else { ("other", "parquet") };
    format!(
        "[pipeline]\nname = \"{prefix}cells\"\n[source]\ntable = \"{source}\"\ncolumns = [\"uri\", \"module\", \"split\"]\n\
         [model]\npackage = \"{prefix}model\"\n[neighbors]\nk = 5\nduplicate_distance = 0.002\n\
         [anomaly]\nreference = \"{prefix}reference.parquet\"\nsegment = \"module\"\nthreshold = {{ contamination = {contamination} }}\n\
         [output]\ntable = \"{out}\"\npublish = \"{publish}\"\n[limits]\nmax_rejected_fraction = 0.5\n"
    )
}

/// Makes the tables once for all tests: `tables`, and `other` by a smaller model.
pub(crate) fn tables() -> &'static Path {
    static TABLES: OnceLock<PathBuf> = OnceLock::new();
    TABLES.get_or_init(|| {
        let folder = folder().keep();
        python("warehouse_source.py", &[&cells(), &folder]);
        for (prefix, latent_dim) in [("", "32"), ("other-", "8")] {
            let (learn, run) = (format!("{prefix}learn.toml"), format!("{prefix}cells.toml"));
            write(&folder.join(&learn), &pipeline(prefix, "learn", 0.2));
            write(&folder.join(&run), &pipeline(prefix, "images", 0.2));
            let size = ["--color", "gray", "--height", "64", "--width", "64", "--latent-dim", latent_dim];
            lookalike(&folder, &[&["fit", &learn][..], &size, &["--where", "split = 'fit'"]].concat()).expect(0);
            lookalike(&folder, &["calibrate", &learn, "--where", "split = 'calibrate'"]).expect(0);
            lookalike(&folder, &["run", &run]).expect(0);
        }
        // A second row in `runs` for each day, and a day that no run has recorded as it is now.
        write(&folder.join("cells.toml"), &pipeline("", "images", 0.05));
        lookalike(&folder, &["run", "cells.toml"]).expect(0);
        std::fs::copy(folder.join("later.parquet"), folder.join("images/ds=2026-11-04/cells.parquet")).unwrap();
        lookalike(&folder, &["embed", "cells.toml"]).expect(0);
        folder
    })
}

#[test]
fn what_is_generated_from_the_schemas_is_up_to_date() {
    python("../../sql/generate.py", &[Path::new("--check")]);
}

#[test]
fn duckdb_finds_what_a_program_without_sql_finds() {
    python("warehouse_duckdb.py", &[tables()]);
}

#[test]
fn spark_finds_what_duckdb_finds() {
    python("warehouse_spark.py", &[tables()]);
}

#[test]
fn every_statement_is_one_of_its_dialect_and_names_columns_that_exist() {
    python("warehouse_dialects.py", &[]);
}
