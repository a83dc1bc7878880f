#!/bin/sh
# Runs a pipeline from cron, or from a timer of systemd: one run at a time, with a log and with numbers for Prometheus.
#
#     lookalike_cron.sh PIPELINE [OPTION OF lookalike run]...
#
#     17 2 * * *  lookalike  /opt/lookalike/lookalike_cron.sh /etc/lookalike/cells.toml        (a line of /etc/cron.d/lookalike)
#
# While one run of a pipeline is under way another gives way, with exit code 0; the metrics tell when the last success is too long ago. A run that a store
# stood in the way of (exit code 5) is tried again after a pause, then after a longer one. Nothing is printed unless a person should look: cron
# mails what is printed. The exit code is that of the program.
#
# Settings, in the environment or in the file /etc/lookalike/environment, which is the place for credentials too (cron has none of your shell's):
#   LOOKALIKE_PROGRAM       the program; default: lookalike
#   LOOKALIKE_LOG_DIR       gets PIPELINE's name with .log and .lock; default: /var/log/lookalike
#   LOOKALIKE_METRICS_DIR   gets PIPELINE's name with .prom, for the textfile collector of node-exporter; default: none
#   LOOKALIKE_TRIES         how often a run is tried; default: 3
#   LOOKALIKE_PAUSE_SECS    pause after the first try, which doubles; default: 300
set -eu

environment=${LOOKALIKE_ENVIRONMENT:-/etc/lookalike/environment}
if [ -r "$environment" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$environment"
    set +a
fi

if [ $# -eq 0 ]; then
    echo "usage: $0 PIPELINE [OPTION OF lookalike run]..." >&2
    exit 2
fi
pipeline=$1
shift
name=$(basename "$pipeline" .toml)
program=${LOOKALIKE_PROGRAM:-lookalike}
logs=${LOOKALIKE_LOG_DIR:-/var/log/lookalike}
log=$logs/$name.log
if [ -n "${LOOKALIKE_METRICS_DIR:-}" ]; then
    set -- --metrics-file "$LOOKALIKE_METRICS_DIR/$name.prom" "$@"
fi

note() {
    printf '%s lookalike_cron.sh: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" >>"$log"
}

# The program inherits the lock, so it holds it even if this script is killed.
exec 9>>"$logs/$name.lock"
if ! flock --nonblock 9; then
    note "another run is under way; this one gives way"
    exit 0
fi

# What tells this script to end tells the program, which then ends within ten seconds and can go on where it was.
child=
stopped=
# shellcheck disable=SC2329 # it is the trap that calls it
stop() {
    stopped=yes
    if [ -n "$child" ]; then kill -s TERM "$child" 2>/dev/null || true; fi
}
trap stop HUP INT TERM

run() {
    "$program" run "$pipeline" "$@" >>"$log" 2>&1 &
    child=$!
    code=0
    wait "$child" || code=$?
    # A signal ends the waiting, not the program.
    while kill -s 0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=
}

tries=${LOOKALIKE_TRIES:-3}
pause=${LOOKALIKE_PAUSE_SECS:-300}
while :; do
    note "run $pipeline $*"
    run "$@"
    note "exit code $code"
    tries=$((tries - 1))
    if [ "$code" -ne 5 ] || [ "$tries" -le 0 ] || [ -n "$stopped" ]; then break; fi
    # In the background, so that a signal is not kept waiting.
    sleep "$pause" 9>&- &
    child=$!
    wait "$child" || true
    child=
    if [ -n "$stopped" ]; then break; fi
    pause=$((pause * 2))
done

case $code in
0 | 99) ;;
3) echo "lookalike run $pipeline: the tables are published, but more images were rejected than the pipeline file allows; see $log" >&2 ;;
130 | 143) echo "lookalike run $pipeline was told to stop; the next run goes on where it was" >&2 ;;
*)
    echo "lookalike run $pipeline ended with exit code $code; the end of $log:" >&2
    tail -n 20 "$log" >&2
    ;;
esac
exit "$code"
