"""StepTool as the paper trains it: PPO on trajectories that were annotated once.

    python -m steptool_jax.main --config=configs/steptool_offline.py --workdir=/data/run \
      --config.model.path=/models/Qwen2-7B-Instruct \
      --config.data.path=/data/annotated/annotated.jsonl

The file comes from --mode=annotate, here by a language model that judges every step three times:

    python -m steptool_jax.main --config=configs/steptool_offline.py --workdir=/data/annotated \
      --mode=annotate --config.annotate.input=trajectories.jsonl --config.annotate.source=judge \
      --config.judge.kind=llm --config.judge.endpoint.base_url=https://api.openai.com/v1 \
      --config.judge.endpoint.model=gpt-4o --config.judge.endpoint.api_key_variable=OPENAI_API_KEY

Official step-grained rows (data.format=tsv), with SmolLM2-135M on a CPU, 30 rows in 2 passes:

    python -m steptool_jax.main --config=configs/steptool_offline.py --workdir=/tmp/offline \
      --config.model.path=$(find /tmp/smollm2 -name '*.gguf') --config.model.dtype=float32 \
      --config.model.param_dtype=float32 --config.train.micro_rows=1 \
      --config.train.row_tokens=2048 --config.data.format=tsv --config.data.passes=2 \
      '--config.data.path=DATA/steptool/data_train/*/step_grained_for_ppo_example.csv'

':sft' imitates official SFT or RFT instances (data.format=dialogues) with all weights in 5 passes.
':released' computes rewards, advantages and old log-probs as the authors' code does; any other
argument is an algorithm. Hyper-parameters: configs/_release.py; departures have a comment.
"""

import pathlib
import runpy

from steptool_jax.learning import algorithms

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  released = arg == "released"
  config = _RELEASE["released"]("steptool" if released else arg or "steptool")
  config.model.path, config.model.chat_format = "Qwen2-7B-Instruct", "chatml_react"
  config.rewards.alpha, config.rewards.shaping = 1.0, "sum"
  if algorithms.get_algorithm(config.algorithm).gae:
    config.critic.kind = "value"  # as the release; 8 trajectories are too few to fit one to
  d = config.data
  d.path, d.format = "annotated.jsonl", "jsonl"
  d.passes, d.batch = 5, 8
  # The release takes old log-probs from the policy at each batch; 'start' bounds the whole drift.
  d.behaviour = "current" if released else "start"
  # The release weighs the final reward with 0 and decays through observations; the paper does not.
  config.advantage.level = "released" if released else ""
  t = config.train
  # 4 PPO epochs, each one optimizer step (minibatches of 2, accumulated 4 times).
  t.minibatches, t.micro_rows = 1, 8
  # The release cuts longer ones from the left, which removes query and rewards; here such a
  # trajectory is left out and counted.
  t.row_tokens = 4096
  # As in the release; SFT is for ':sft' alone.
  t.optimizer.max_grad_norm = config.sft.optimizer.max_grad_norm = 0.0
  config.sft.steps, config.sft.micro_rows = 0, 8
  if arg == "sft":
    config.lora.rank, d.format, t.row_tokens = 0, "dialogues", 8192
    config.model.param_dtype = "float32"  # a step of 2e-5 is lost in a bfloat16 weight
  # Trained without an environment; evaluate the export with configs/stabletoolbench.py.
  config.evaluation.tasks, config.evaluation.every = 0, 0
  return config
