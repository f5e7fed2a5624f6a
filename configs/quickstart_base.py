"""Makes the quickstart's start checkpoint (steptool_jax/assets/quickstart), in two runs.

    python -m steptool_jax.main --config=configs/quickstart_base.py --workdir=/tmp/base
    python -m steptool_jax.main --config=configs/quickstart_base.py:more --workdir=/tmp/more

A model with random weights imitates a demonstrator who gets many calls wrong, on training tasks
only. It learns the tools' grammar and how to copy values, and it learns the mistakes too. The
second run goes on from /tmp/base/export; its WORKDIR/export is the asset.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = "sft"
  config.model.tokenizer = "compact"
  config.model.chat_format = "compact"
  a = config.model.architecture
  a.vocab_size = 512
  a.hidden_size, a.intermediate_size, a.num_layers = 128, 352, 4
  a.num_heads, a.num_kv_heads, a.head_dim = 4, 4, 32
  config.environment.num_train, config.environment.num_heldout = 20000, 400
  config.environment.tools_per_task = 8
  config.rollout.max_tokens = config.train.row_tokens = 320
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 800, 32, 8
  config.sft.mistakes = 0.3
  config.sft.checkpoint_every = 200
  o = config.sft.optimizer
  o.learning_rate, o.muon_rate = 3e-3, 0.02
  o.schedule, o.warmup, o.b2 = "cosine", 0.03, 0.98
  config.evaluation.tasks = 200
  config.train.export = True
  if arg == "more":
    config.model.path, config.model.tokenizer = "/tmp/base/export", ""
    config.sft.steps, config.sft.mistakes, config.seed = 1100, 0.2, 1
  return config
