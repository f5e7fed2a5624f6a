#!/usr/bin/env bash
# A Cloud TPU pod slice through queued resources; every host runs launch/worker.sh:
#   export NAME=steptool ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   export SHARE=10.0.0.2:/vol1                 # an NFS share (Filestore), mounted at /data
#   launch/tpu_pod.sh create [--spot]           # asks for the slice and waits until it is there
#   launch/tpu_pod.sh setup                     # copies this checkout and installs it on all hosts
#   launch/tpu_pod.sh run --config=configs/llama3_1_8b.py --workdir=/data/run …
#   launch/tpu_pod.sh log                       # what the first host says; `run` ends in this
#   launch/tpu_pod.sh stop                      # SIGTERM to all: saves and ends
#   launch/tpu_pod.sh delete
# The hosts find each other by themselves. A run does not need the connection that began it: Ctrl-C
# ends the log, `stop` the run. After a preemption: delete, create, setup, and the same `run` goes on
# from the newest checkpoint.
set -euo pipefail

: "${NAME:?}" "${ZONE:?}"
here=$(cd "$(dirname "$0")/.." && pwd)

all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

action=${1:-}
shift || true
case $action in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="${TYPE:?}" --runtime-version="${VERSION:?}" "$@"
    until state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
      --format='value(state.state)') && [[ $state == ACTIVE ]]; do
      echo "$NAME: $state"
      [[ $state == FAILED || $state == SUSPENDED ]] && exit 1
      sleep 30
    done
    ;;
  setup)
    (cd "$here" && git archive --format=tar.gz HEAD) > /tmp/steptool_jax.tar.gz
    gcloud compute tpus tpu-vm scp /tmp/steptool_jax.tar.gz "$NAME":/tmp/ \
      --zone="$ZONE" --worker=all
    all_hosts "set -e
      mkdir -p ~/steptool_jax && tar -xzf /tmp/steptool_jax.tar.gz -C ~/steptool_jax
      apt='sudo apt-get -qq -o DPkg::Lock::Timeout=300'  # a young machine updates itself
      \$apt update || true
      \$apt install -y nfs-common python3-venv > /dev/null
      sudo mkdir -p /data && (mountpoint -q /data || sudo mount -t nfs '${SHARE:?}' /data)
      test -w /data || sudo chmod a+rwx /data  # a new share is root's
      cd ~/steptool_jax
      if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python3 -m venv .venv
      else  # images of Ubuntu 22.04 have 3.10
        python3 -m venv ~/.uv && ~/.uv/bin/pip install -q uv
        ~/.uv/bin/uv venv -q --seed --python 3.12 .venv
      fi
      .venv/bin/pip install -q -e '.[tpu]'"
    ;;
  run)
    all_hosts "cd ~/steptool_jax || exit 1
      PYTHON=.venv/bin/python setsid nohup launch/worker.sh $(printf '%q ' "$@") \
        >> ~/steptool_jax.log 2>&1 < /dev/null &"
    exec "$0" log
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
      --command="tail -n 100 -F ~/steptool_jax.log"
    ;;
  stop)
    all_hosts "pkill -TERM -f 'steptool_jax[.]main' || true"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    ;;
  *)
    echo "usage: $0 create|setup|run|log|stop|delete (see the top of this file)" >&2
    exit 2
    ;;
esac
