#!/usr/bin/env bash
# The demo, step by step. `make demo` builds the program, fetches the pictures, and calls this.
#
# Sound cells are split in three: the model learns from one part, the threshold comes from a second, and the third is new to both.
# A threshold from cells that the model has learned would be far too low: it reconstructs those better than any other.
# Running it again changes nothing; `rm -r .cache/demo` starts afresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${LOOKALIKE:-target/release/lookalike}
pipeline=pipelines/demo/cells.toml

heading() {
    printf '\n=== %s\n' "$1"
}

lookalike() {
    local argument shown='$ lookalike'
    for argument in "$@"; do
        if [[ $argument == *" "* ]]; then argument="\"$argument\""; fi
        shown+=" $argument"
    done
    printf '%s\n' "$shown"
    "$program" "$@"
}

heading "Learn a linear VAE from half of the sound cells"
lookalike fit "$pipeline" --color gray --latent-dim 128 --where "module = 'mono' AND split = 'fit'"

heading "Score a quarter of the sound cells, new to the model: what is normal?"
lookalike calibrate "$pipeline" --where "module = 'mono' AND split = 'calibrate'"

heading "Embed all cells, find their neighbors, flag the strange ones, publish the tables"
lookalike run "$pipeline"

heading "Do the scores tell defective cells from sound ones? (AUROC: 0.5 is chance, 1 is perfect)"
lookalike evaluate "$pipeline" --positive "defect > 0.99" --negative "defect = 0 AND split <> 'fit'"

heading "All about the strangest cell"
lookalike explain "$pipeline" cell0454

heading "Next: ask the tables yourself"
cat <<END
They are Delta tables, which Spark, DuckDB, Polars, Trino and others read. How many cells are flagged, by how sure the experts
were of a defect? With DuckDB (https://duckdb.org/install; it fetches its extension for Delta by itself):

duckdb -c "
  SELECT defect, count(*) AS cells, count_if(is_anomaly) AS flagged
  FROM delta_scan('$PWD/.cache/demo/tables/latents')
  JOIN delta_scan('$PWD/.cache/demo/tables/anomalies') USING (module, image_id)
  WHERE split = 'rest' GROUP BY defect ORDER BY defect"

The pipeline is $pipeline, the tables' columns are described in schemas/, and \`$program --help\` lists the verbs.
END
