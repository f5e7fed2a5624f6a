#!/usr/bin/env bash
# N CPU processes on this machine train as one, for tests and for a look at multi-host runs:
#   launch/local_pod.sh 4 --config=configs/quickstart.py --workdir=/tmp/pod
# PYTHON, PORT and LOGS (folder with the messages of processes 1, 2, ...) may be set. SIGTERM and
# Ctrl-C go to all. The exit status is that of the first that failed; 75 = stopped and saved.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES --config=FILE --workdir=DIR [flags of steptool_jax.main]" >&2
  exit 2
fi
count=$1
shift
here=$(dirname "$0")
logs=${LOGS:-$(mktemp -d)}
port=${PORT:-$("${PYTHON:-python}" -c \
  'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES=$count

processes=()
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then
    JAX_PROCESS_ID=$i "$here/worker.sh" "$@" &
  else
    JAX_PROCESS_ID=$i "$here/worker.sh" "$@" > "$logs/process_$i.log" 2>&1 &
  fi
  processes+=("$!")
done
trap 'kill -TERM "${processes[@]}" 2> /dev/null || true' TERM INT

status=0
for i in "${!processes[@]}"; do
  code=0
  wait "${processes[i]}" || code=$?
  while kill -0 "${processes[i]}" 2> /dev/null; do # a signal has ended `wait`
    code=0
    wait "${processes[i]}" || code=$?
  done
  if ((code)); then
    echo "$0: process $i ended with status $code (messages: $logs)" >&2
    status=$((status ? status : code))
  fi
done
exit "$status"
