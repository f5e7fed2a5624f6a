"""Makes the quickstart's start checkpoint (steptool_jax/assets/quickstart), in four runs.

    python -m steptool_jax.main --config=configs/quickstart_base.py --workdir=/tmp/b/scratch
    python -m steptool_jax.main --config=configs/quickstart_base.py:more --workdir=/tmp/b/more
    python -m steptool_jax.main --config=configs/quickstart_base.py:clean --workdir=/tmp/b/clean
    python -m steptool_jax.main --config=configs/quickstart_base.py:habits --workdir=/tmp/b/habits

All on training tasks only. The first three teach the tools' grammar and the copying of values; in
the last one the demonstrator chooses badly at three of ten actions (other tools, repeats, giving
up), and the model takes that over: these habits are what the quickstart's RL has to get rid of.
/tmp/b/habits/export is the asset. The asset's first two runs were made at commit bb39281, where
demonstrators made other mistakes as well (wrong values); today's code gives other weights.
"""

from steptool_jax.config import base_config

# run -> (the run before it, steps, mistakes, Muon's rate, AdamW's rate, schedule, seed, most calls)
_RUNS = {
  "scratch": ("", 800, 0.3, 0.02, 3e-3, "cosine", 0, 5),
  "more": ("scratch", 1100, 0.2, 0.02, 3e-3, "cosine", 1, 5),
  "clean": ("more", 350, 0.0, 0.01, 1e-3, "cosine", 3, 3),
  "habits": ("clean", 90, 0.3, 0.0, 5e-4, "constant", 4, 3),
}


def get_config(arg=""):
  if (arg or "scratch") not in _RUNS:
    raise ValueError(f"quickstart_base.py:{arg}: the argument is one of {', '.join(_RUNS)}")
  before, steps, mistakes, muon, adam, schedule, seed, max_calls = _RUNS[arg or "scratch"]
  config = base_config()
  config.algorithm = "sft"
  config.seed = seed
  if before:
    config.model.path = f"/tmp/b/{before}/export"
  else:
    config.model.tokenizer = "compact"
  config.model.chat_format = "compact"
  a = config.model.architecture
  a.vocab_size = 512
  a.hidden_size, a.intermediate_size, a.num_layers = 128, 352, 4
  a.num_heads, a.num_kv_heads, a.head_dim = 4, 4, 32
  e = config.environment
  e.num_train, e.num_heldout, e.tools_per_task = 20000, 400, 8
  e.min_calls, e.max_calls = 2, max_calls
  config.rollout.max_tokens = config.train.row_tokens = 320
  config.sft.steps, config.sft.mistakes, config.sft.checkpoint_every = steps, mistakes, 200
  config.sft.batch, config.sft.micro_rows = 32, 4
  o = config.sft.optimizer
  o.learning_rate, o.muon_rate, o.schedule = adam, muon, schedule
  o.warmup, o.b2 = 0.03, 0.98
  config.evaluation.tasks = 200
  config.train.export = True
  return config
