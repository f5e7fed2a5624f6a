"""Learn to use tools from step rewards, on a laptop, in minutes.

    python -m steptool_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

':arg' picks an algorithm: configs/quickstart.py:ppo, :steptool_no_step_rewards, … The start is a
small checkpoint that comes with the package (made by configs/quickstart_base.py).
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "asset:quickstart"
  config.environment.num_train, config.environment.num_heldout = 5000, 300
  config.environment.tools_per_task = 8
  r = config.rollout
  r.tasks, r.samples, r.slots = 24, 4, 96
  r.max_tokens = 320
  r.max_steps, r.max_step_tokens, r.decode_chunk = 8, 32, 32
  config.train.row_tokens, config.train.micro_rows = 320, 16
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 30, 32, 16
  config.sft.tasks = 100
  config.sft.optimizer.learning_rate, config.sft.optimizer.warmup = 5e-4, 0.1
  t = config.train
  t.iterations, t.epochs, t.minibatches = 30, 1, 4
  t.optimizer.learning_rate = 3e-4
  t.export = True
  config.advantage.gamma, config.advantage.lam = 0.99, 0.95
  config.loss.kl_coef, config.loss.value_coef = 0.01, 0.5
  config.evaluation.every, config.evaluation.tasks, config.evaluation.curve_tasks = 5, 300, 100
  config.checkpoint.every = 10
  return config
