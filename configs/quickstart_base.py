"""Makes the quickstart's start checkpoint (steptool_jax/assets/quickstart).

    python -m steptool_jax.main --config=configs/quickstart_base.py --workdir=/tmp/base

A model with random weights learns the tools' grammar and how to copy values from demonstrations of
training tasks. In the last quarter of the steps the demonstrator chooses badly at three of ten
actions (other tools, repeats, giving up), and the model learns that too: the bad choices are what
the quickstart's RL has to get rid of. WORKDIR/export is the asset.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  if arg:
    raise ValueError(f"quickstart_base.py takes no argument, found {arg!r}")
  config = base_config()
  config.algorithm = "sft"
  config.model.tokenizer = "compact"
  config.model.chat_format = "compact"
  a = config.model.architecture
  a.vocab_size = 512
  a.hidden_size, a.intermediate_size, a.num_layers = 128, 352, 4
  a.num_heads, a.num_kv_heads, a.head_dim = 4, 4, 32
  e = config.environment
  e.num_train, e.num_heldout, e.tools_per_task = 20000, 400, 8
  e.min_calls, e.max_calls = 2, 3
  config.rollout.max_tokens = config.train.row_tokens = 320
  config.rollout.max_steps, config.rollout.max_step_tokens = 8, 24
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 900, 32, 4
  config.sft.mistakes, config.sft.clean_share = 0.3, 0.75
  config.sft.checkpoint_every = 200
  o = config.sft.optimizer
  o.learning_rate, o.muon_rate = 3e-3, 0.02
  o.schedule, o.warmup, o.b2 = "cosine", 0.03, 0.98
  config.evaluation.tasks = 200
  config.train.export = True
  return config
