#!/usr/bin/env bash
# The demo, step by step. `make demo` builds the program, fetches the pictures, and calls this.
#
# Sound cells are split in three: the model learns from one part, the threshold comes from a second, and the third, a half, is new to both.
# A threshold from cells that the model has learned would be far too low: it reconstructs those better than any other. What they look like
# to the encoder, which has never seen any, is of use all the same: they are the bank.
# Running it again changes nothing; `rm -r .cache/demo` starts afresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${LOOKALIKE:-target/release/lookalike}
demo=pipelines/demo
# What the program prints for schedulers, a line of JSON each, is kept here.
summaries=.cache/demo/summaries.jsonl

heading() {
    printf '\n=== %s\n' "$1"
}

# Shows the command and runs it.
lookalike() {
    local argument shown='$ lookalike'
    for argument in "$@"; do
        if [[ $argument == *" "* ]]; then argument="\"$argument\""; fi
        shown+=" $argument"
    done
    printf '%s\n' "$shown" >&2
    "$program" "$@"
}

declare -A kinds=([mono]="monocrystalline" [poly]="polycrystalline")
for module in mono poly; do
    heading "Learn a linear VAE from three eighths of the sound ${kinds[$module]} cells"
    lookalike fit $demo/$module.toml --color gray --latent-dim 128 --where "module = '$module' AND split = 'fit'" >>$summaries

    heading "What is normal? Score an eighth of the sound ones, new to the model"
    lookalike calibrate $demo/$module.toml --where "module = '$module' AND split = 'calibrate'" \
        --bank "module = '$module' AND split = 'fit'" >>$summaries

    heading "Embed all ${kinds[$module]} cells, find their neighbors, flag the strange ones, publish the tables"
    lookalike run $demo/$module.toml >>$summaries
done

heading "Do the scores tell defective cells from sound ones? (AUROC: 0.5 is chance, 1 is perfect)"
for module in mono poly; do
    lookalike evaluate $demo/$module.toml --positive "defect > 0.99" --negative "defect = 0 AND split = 'rest'"
done

heading "All about one cell, with its nearest neighbors"
lookalike explain $demo/mono.toml cell0002

heading "Which cells look the same? Embed all of them with a network trained on photographs, and group near-duplicates (a minute at most)"
lookalike run $demo/similar.toml >>$summaries

heading "Next: ask the tables yourself"
cat <<END
They are Delta tables, which Spark, DuckDB, Polars, Trino and others read. How many cells are flagged, by how sure the experts
were of a defect? With DuckDB (https://duckdb.org/install; it fetches its extension for Delta by itself):

duckdb -c "
  SELECT module, defect, count(*) AS cells, count_if(is_anomaly) AS flagged
  FROM delta_scan('$PWD/.cache/demo/tables/latents')
  JOIN delta_scan('$PWD/.cache/demo/tables/anomalies') USING (module, image_id)
  WHERE split = 'rest' GROUP BY ALL ORDER BY ALL"

The pipelines are $demo/mono.toml, poly.toml and similar.toml, the tables' columns are described in schemas/, and \`$program --help\` lists the verbs.
END
