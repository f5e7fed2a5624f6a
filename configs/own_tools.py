"""Your own tools, on a laptop, in minutes: tools.py and tasks.jsonl of the folder you are in.

    python -m steptool_jax.main --config=configs/own_tools.py --workdir=runs/own_tools

':arg' picks an algorithm: configs/own_tools.py:ppo, … Other files: --config.environment.functions,
--config.environment.tasks. Tasks without demonstrations: --config.sft.steps=0. The start is a small
checkpoint that comes with the package (made by configs/own_tools_base.py). It has seen thousands of
invented tools and copies names and numbers that it has never seen; which tool answers which
question it learns from your demonstrations and your checkers.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "asset:own_tools"
  e = config.environment
  e.name, e.functions, e.tasks = "custom", "tools.py", "tasks.jsonl"
  r = config.rollout
  r.tasks, r.samples, r.slots = 24, 4, 48
  r.max_tokens, r.max_steps, r.max_step_tokens = 512, 8, 48
  s = config.sft
  s.steps, s.batch, s.micro_rows = 60, 32, 4
  s.optimizer.learning_rate, s.optimizer.schedule = 3e-4, "cosine"
  t = config.train
  t.iterations, t.epochs, t.minibatches = 40, 1, 2
  t.row_tokens, t.micro_rows = 512, 2 if config.algorithm == "eto" else 4
  t.optimizer.learning_rate, t.optimizer.b2 = 1e-4, 0.98  # at 3e-4 the first updates undo SFT
  t.export = True
  config.loss.kl_coef, config.loss.value_coef, config.loss.value_clip = 0.002, 0.5, 1.0
  # Evaluated as it is trained: sampled.
  v = config.evaluation
  v.every, v.tasks, v.curve_tasks, v.temperature = 20, 200, 60, 1.0
  config.checkpoint.every = 10
  return config
