"""Makes the start checkpoint of configs/own_tools.py (steptool_jax/assets/own_tools).

    python -m steptool_jax.main --config=configs/own_tools_base.py --workdir=/tmp/own_tools_base

/tmp/own_tools_base/export is the asset; 81 minutes on one core. Flawless demonstrations on the
environment "invented", where every task has tools, names and values of its own. What is learnt well
is to copy words never seen and to stop with the answer; the choice among tools never seen is begun
(the loss still fell at the end), and demonstrations of a user's own tools have to teach it.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  if arg:
    raise ValueError(f"own_tools_base.py:{arg}: it takes no argument")
  config = base_config()
  config.algorithm = "sft"
  config.model.tokenizer = config.model.chat_format = "compact"
  a = config.model.architecture
  a.vocab_size = 768
  a.hidden_size, a.intermediate_size, a.num_layers = 160, 432, 5
  a.num_heads, a.num_kv_heads, a.head_dim = 5, 5, 32
  e = config.environment
  e.name, e.num_train, e.num_heldout, e.tools_per_task = "invented", 30000, 400, 8
  e.min_calls, e.max_calls = 1, 4
  config.rollout.max_tokens = config.train.row_tokens = 512
  s = config.sft
  s.steps, s.checkpoint_every = 1600, 100
  s.batch, s.micro_rows = 32, 2
  o = s.optimizer
  o.learning_rate, o.muon_rate, o.b2 = 3e-3, 0.02, 0.98
  o.schedule, o.floor, o.warmup = "cosine", 0.1, 0.03
  config.evaluation.tasks = 200
  config.train.export = True
  return config
