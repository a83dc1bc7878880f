#!/bin/sh
# Runs a pipeline on a Kubernetes cluster: step after step as an Indexed Job, with as many pods as the plan says have work.
#
#     PLANS=s3://lake/plans/cells IMAGE=registry.example.com/lookalike:0.1.0 GPUS=1 run.sh [OPTION OF lookalike plan]...
#
# Wants kubectl, with the right to create Jobs and to read Jobs, pods and logs in the namespace of its context, and there the config map and the secret
# of which cronjob.yaml tells. The first argument may say which days: --from 2026-11-28 --to 2026-11-28. Prints the program's closing summary, a line of
# JSON. Where a step fails this ends, and says why; run again, it goes on behind what was finished. Let a lifecycle rule of the bucket remove
# plans after some days; the Jobs remove themselves after a week.
#
#   PLANS        prefix below which the plan of this run is written; required
#   IMAGE        with the program, ONNX Runtime and nothing else needed; required
#   MAX_TASKS    pods of a step at most; default: 16
#   GPUS         of each pod that embeds; default: 0
#   EMBED_CPU, EMBED_MEMORY    of each pod that embeds; default: 4, 8Gi
#   CPU, MEMORY                of all others; default: 2, 6Gi
#   SERVICE_ACCOUNT            default: default
#   POLL_SECS                  between looks at a Job; default: 5
set -eu

: "${PLANS:?is to be the prefix of plans}" "${IMAGE:?is to be the image of the program}"
here=$(dirname "$0")
run=$(date -u +%Y%m%d-%H%M%S)-$$
plan=${PLANS%/}/$run/
max_tasks=${MAX_TASKS:-16}

say() {
    printf '%s %s\n' "$(date -u +%H:%M:%S)" "$1" >&2
}

# The arguments as a list of JSON strings.
json() {
    list=
    for argument in "$@"; do
        list="$list${list:+, }\"$(printf '%s' "$argument" | sed 's/[\\"]/\\&/g')\""
    done
    printf '[%s]' "$list"
}

# A command of sed that fills in a value, in which anything but a line break may stand.
fill() {
    # shellcheck disable=SC2016 # the dollar sign is that of the manifest
    printf 's|${%s}|%s|g\n' "$1" "$(printf '%s' "$2" | sed 's/[\\&|]/\\&/g')"
}

# Starts the Job of a step, and waits for its end: STEP TASKS ARGUMENT...
job() {
    step=$1 pods=$2 name=lookalike-$run-$1
    shift 2
    if [ "$step" = embed ]; then
        of_step=$(fill CPU "${EMBED_CPU:-4}" && fill MEMORY "${EMBED_MEMORY:-8Gi}" && fill GPUS "${GPUS:-0}")
    else
        of_step=$(fill CPU "${CPU:-2}" && fill MEMORY "${MEMORY:-6Gi}" && fill GPUS 0)
    fi
    say "$step: $pods pods"
    sed -e '/^#/d' -e "$(fill NAME "$name" && fill RUN "$run" && fill STEP "$step" && fill TASKS "$pods")" \
        -e "$of_step" -e "$(fill IMAGE "$IMAGE" && fill SERVICE_ACCOUNT "${SERVICE_ACCOUNT:-default}")" \
        -e "$(fill ARGUMENTS "$(json "$@")")" "$here/step.yaml" | kubectl create --filename - >&2
    while sleep "${POLL_SECS:-5}"; do
        if ! conditions=$(kubectl get job "$name" --output 'jsonpath={.status.conditions[?(@.status=="True")].type}'); then
            say "$step: kubectl does not know; asking again"
            continue
        fi
        case " $conditions " in
        *" Complete "*) break ;;
        *" Failed "*)
            say "$step failed: $(kubectl get job "$name" --output 'jsonpath={.status.conditions[?(@.type=="Failed")].message}')"
            kubectl logs --selector "job-name=$name" --tail 20 --prefix >&2 || true
            exit 1
            ;;
        esac
    done
}

# The same for one pod that prints a summary, which is kept.
summarized() {
    once=$1
    shift
    job "$once" 1 "$@"
    # Not of a pod that was tried before it.
    pod=$(kubectl get pods --selector "job-name=$name" --field-selector status.phase=Succeeded --output name)
    summary=$(kubectl logs "$pod" --tail 1)
}

# The tasks of a step, if there are any: STEP ARGUMENT...
tasks() {
    many=$1
    shift
    count=$(printf '%s' "$summary" | sed -n "s/.*\"tasks\":{[^}]*\"$many\":\([0-9]*\).*/\1/p")
    if [ "${count:?is missing in $summary}" -gt "$max_tasks" ]; then count=$max_tasks; fi
    if [ "$count" -gt 0 ]; then job "$many" "$count" "$@" --plan "$plan" --task-count "$count"; fi
}

commit() {
    summarized "commit-$1" commit --plan "$plan" --stage "$1"
}

summarized plan plan /etc/lookalike/pipeline.toml "$@" --plan "$plan"
case $summary in
*'"status":"nothing_to_do"'*) ;;
*)
    tasks embed embed
    commit embed
    tasks sort neighbors --step sort
    commit sort
    tasks probe neighbors --step probe
    tasks join neighbors --step join
    tasks merge neighbors --step merge
    commit neighbors
    tasks flag flag
    commit flag
    ;;
esac
printf '%s\n' "$summary"
