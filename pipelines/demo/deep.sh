#!/usr/bin/env bash
# A deep model of the sound monocrystalline cells, step by step. `make model` prepares what it needs and calls this.
#
# As in run.sh, the model learns from three eighths of the sound cells, of which it holds out an eighth to know when to stop; the threshold
# comes from another eighth, and the half that is left is new to everything. No defective cell is seen before the last step.
# Running it again changes nothing; `rm -r .cache/demo/*deep*` starts afresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${LOOKALIKE:-target/release/lookalike}
pipeline=pipelines/demo/deep.toml
summaries=.cache/demo/summaries.jsonl
model=.cache/demo/model-deep
fit="module = 'mono' AND split = 'fit'"

heading() {
    printf '\n=== %s\n' "$1"
}

# Shows the command as it is typed, and runs it.
run() {
    local argument shown='$' command=$1
    shift
    for argument in "$command" "$@"; do
        case $argument in
            *" "*) shown+=" \"$argument\"" ;;
            "$program") shown+=" lookalike" ;;
            *) shown+=" $argument" ;;
        esac
    done
    printf '%s\n' "$shown" >&2
    "$command" "$@"
}

heading "Train a convolutional VAE on three eighths of the sound monocrystalline cells (a minute or two)"
if [[ -e $model/model.toml ]]; then
    echo "$model is there"
else
    run .cache/model-venv/bin/python models/train.py $pipeline --where "$fit" --to $model --color gray --latent-dim 128 --flip both --threads 1
fi

heading "What is normal? Score an eighth of the sound ones, new to the model"
run "$program" calibrate $pipeline --where "module = 'mono' AND split = 'calibrate'" --bank "$fit" >>$summaries

heading "Embed all monocrystalline cells, find their neighbors, flag the strange ones, publish the tables"
run "$program" run $pipeline >>$summaries

heading "Do the scores tell defective cells from sound ones? Beside PCA, fitted to the same cells (AUROC: 0.5 is chance, 1 is perfect)"
run "$program" evaluate $pipeline --positive "defect > 0.99" --negative "defect = 0 AND split = 'rest'" --baseline "$fit"
