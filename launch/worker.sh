#!/usr/bin/env bash
# The command of every worker, under whatever starts it:
#   launch/worker.sh --config=FILE --workdir=DIR [flags of steptool_jax.main]
# SIGTERM goes to the run, which saves. A run that was stopped so ends well for itself but is not
# done: this script then exits with 75, for schedulers that start again what has failed.
set -euo pipefail

workdir='' mode=train
for flag in "$@"; do
  [[ $flag == --workdir=* ]] && workdir=${flag#--workdir=}
  [[ $flag == --mode=* ]] && mode=${flag#--mode=}
done
: "${workdir:?--workdir=DIR is needed, a folder that all hosts share}"

"${PYTHON:-python}" -m steptool_jax.main "$@" &
run=$!
trap 'kill -TERM "$run" 2> /dev/null || true' TERM INT

code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # a signal has ended `wait`, the run is saving
  code=0
  wait "$run" || code=$?
done
if ((code == 0)) && grep -qs '"interrupted": true' "$workdir/summary_$mode.json"; then
  exit 75
fi
exit "$code"
