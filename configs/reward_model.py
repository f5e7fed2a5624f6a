"""A step reward model for nested_api, and the quickstart's RL paid by it instead of by rules.

    M="python -m steptool_jax.main --config=configs/reward_model.py"
    $M:rollouts --workdir=/tmp/rm/rollouts
    $M:annotate --workdir=/tmp/rm/annotated --mode=annotate \
      --config.annotate.input='/tmp/rm/rollouts/moments/train_*.jsonl'
    $M:train --workdir=/tmp/rm/model --mode=reward_model \
      --config.reward_model.data=/tmp/rm/annotated/annotated.jsonl
    $M:rl --workdir=/tmp/rm/rl --config.rewards.model.path=/tmp/rm/model/reward_model

The rollouts are of the quickstart's policy after SFT, which hardly moves. Their tasks are of
another seed than those of RL, so the model has seen none of these.
"""

import pathlib
import runpy

_QUICKSTART = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))


def get_config(arg=""):
  arg = arg or "train"
  config = _QUICKSTART["get_config"]()
  if arg == "rl":
    config.rewards.source = "model"
    return config
  if arg not in ("rollouts", "annotate", "train"):
    raise ValueError(f"configs/reward_model.py:{arg}: use rollouts, annotate, train or rl")
  config.environment.seed = 1
  # Every trajectory of 40 iterations, 3,840 in all, and no evaluation.
  config.train.iterations, config.train.export = 40, False
  config.train.optimizer.learning_rate = 1e-9
  config.record.train, config.record.every = config.rollout.tasks * config.rollout.samples, 1
  config.evaluation.tasks, config.evaluation.every = 0, 0
  if arg == "annotate":
    config.annotate.rule, config.rewards.shaping = "environment", "sum"
  m = config.reward_model
  m.passes, m.batch, m.micro_rows = 6, 48, 4
  m.optimizer.learning_rate, m.optimizer.schedule, m.optimizer.warmup = 5e-4, "cosine", 0.05
  return config
