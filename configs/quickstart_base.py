"""Makes the quickstart's start checkpoint (steptool_jax/assets/quickstart), on training tasks only.

    python -m steptool_jax.main --config=configs/quickstart_base.py --workdir=/tmp/quickstart_base

/tmp/quickstart_base/export is the asset; about 20 minutes on 2 cores (26 beside other work).

Flawless demonstrations first: they teach the tools' grammar and the copying of values. In the last
steps the demonstrator chooses badly at three of ten actions (other tools, repeats, giving up), and
the model takes that over: these habits are what the quickstart's RL has to get rid of.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  if arg:
    raise ValueError(f"quickstart_base.py:{arg}: it takes no argument")
  config = base_config()
  config.algorithm = "sft"
  config.model.tokenizer = config.model.chat_format = "compact"
  a = config.model.architecture
  a.vocab_size = 512
  a.hidden_size, a.intermediate_size, a.num_layers = 128, 352, 4
  a.num_heads, a.num_kv_heads, a.head_dim = 4, 4, 32
  e = config.environment
  e.num_train, e.num_heldout, e.tools_per_task = 20000, 400, 8
  e.min_calls, e.max_calls = 2, 5
  config.rollout.max_tokens = config.train.row_tokens = 320
  s = config.sft
  s.steps, s.clean_steps, s.mistakes, s.checkpoint_every = 1650, 1500, 0.3, 150
  s.batch, s.micro_rows = 32, 4
  o = s.optimizer
  o.learning_rate, o.muon_rate, o.b2 = 3e-3, 0.02, 0.98
  o.schedule, o.floor, o.warmup = "cosine", 0.1, 0.03
  config.evaluation.tasks = 200
  config.train.export = True
  return config
