#!/usr/bin/env bash
# One node with GPUs, one process for all of them:
#   launch/gpu_node.sh --config=configs/qwen2_7b.py --workdir=/data/run --config.model.path=…
# Several nodes under Slurm, one process for each GPU, found by themselves:
#   srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@120 \
#     launch/gpu_node.sh --coordinator=auto --config=… --workdir=/shared/run
# Elsewhere: the same command on every node, with --coordinator=HOST:PORT --processes=N --process=I.
# Needs `pip install -e '.[cuda]'`. Status 75: stopped by SIGTERM and saved, start it again.
set -euo pipefail

if ! command -v nvidia-smi > /dev/null; then
  echo "$0: no NVIDIA driver here (nvidia-smi is missing); CPU runs: launch/local_pod.sh" >&2
  exit 1
fi
export JAX_PLATFORMS=cuda
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "$(dirname "$0")/worker.sh" "$@"
