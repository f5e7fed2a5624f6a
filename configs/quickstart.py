"""Learn to use tools from step rewards, on a laptop, in minutes.

    python -m steptool_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

':arg' picks an algorithm: configs/quickstart.py:ppo, :steptool_no_step_rewards, … The start is a
small checkpoint that comes with the package (made by configs/quickstart_base.py).
"""

from steptool_jax.config import base_config

# What an algorithm needs to be taught otherwise than the others.
_OF_ALGORITHM = {
  # 60 steps are too few for a critic that bootstraps: with the double critic it unlearns to call.
  "archer": {"critic.kind": "ridge"},
}


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "asset:quickstart"
  e = config.environment
  e.num_train, e.num_heldout, e.tools_per_task = 5000, 300, 8
  e.min_calls, e.max_calls = 2, 3
  r = config.rollout
  r.tasks, r.samples, r.slots = 24, 4, 48
  r.max_tokens, r.max_steps, r.max_step_tokens = 320, 8, 24
  s = config.sft
  s.steps, s.tasks, s.batch, s.micro_rows = 5, 100, 32, 4
  s.optimizer.learning_rate = 5e-5
  t = config.train
  t.iterations, t.epochs, t.minibatches = 30, 1, 2
  t.row_tokens, t.micro_rows = 416, 4
  t.optimizer.learning_rate, t.optimizer.b2 = 3e-4, 0.98
  t.export = True
  # The start's habits are bad: little holds the policy to it.
  config.loss.kl_coef, config.loss.value_coef, config.loss.value_clip = 0.002, 0.5, 1.0
  # Evaluated as it is trained: sampled.
  v = config.evaluation
  v.every, v.tasks, v.curve_tasks, v.temperature = 10, 300, 100, 1.0
  config.checkpoint.every = 10
  config.update_from_flattened_dict(_OF_ALGORITHM.get(config.algorithm, {}))
  return config
