#!/usr/bin/env bash
# N CPU processes on this machine train as one, for tests and for a look at multi-host runs:
#   launch/local_pod.sh 4 --config=configs/quickstart.py --workdir=/tmp/pod --config.mesh.data=4
# PYTHON, PORT and LOGS (a folder for stderr of each process) may be set. SIGTERM or Ctrl-C goes to
# all; the exit status is that of the first process that failed.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES --config=FILE --workdir=DIR [flags of steptool_jax.main]" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
logs=${LOGS:-$(mktemp -d)}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu

processes=()
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then
    "$python" -m steptool_jax.main "$@" \
      --coordinator="localhost:$port" --processes="$count" --process="$i" &
  else
    "$python" -m steptool_jax.main "$@" \
      --coordinator="localhost:$port" --processes="$count" --process="$i" 2> "$logs/process_$i.log" &
  fi
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2> /dev/null || true' TERM INT

status=0
for i in "${!processes[@]}"; do
  code=0
  # A signal to this script ends `wait` early, with the process still running.
  while kill -0 "${processes[i]}" 2> /dev/null; do
    wait "${processes[i]}" && code=0 || code=$?
  done
  wait "${processes[i]}" 2> /dev/null && code=0 || code=$((code ? code : $?))
  if ((code)); then
    echo "$0: process $i ended with status $code (its messages: $logs)" >&2
    status=$((status ? status : code))
  fi
done
exit "$status"
