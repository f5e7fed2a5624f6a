"""StableToolBench: rollouts over the response cache, pass rates, offline tools for others.

The folder is a StableToolBench checkout with server/tool_response_cache unpacked. Evaluate (CoT by
default, one chain; DFSDT may make more LLM calls, see docs/; write to another folder for each):

    python -m steptool_jax.main --config=configs/stabletoolbench.py --mode=evaluate \
      --workdir=runs/cot --config.model.path=/models/ToolLLaMA-2-7b-v2
    python -m steptool_jax.main --config=configs/stabletoolbench.py --mode=evaluate \
      --workdir=runs/dfsdt --config.model.path=/models/ToolLLaMA-2-7b-v2 \
      --config.rollout.strategy=dfsdt

Published pass rates from stored verdicts, without a model; and the cache as a /virtual server:

    python -m steptool_jax.main --config=configs/stabletoolbench.py --mode=evaluate \
      --workdir=runs/published --config.evaluation.stored=pass_rate_results
    python -m steptool_jax.main --config=configs/stabletoolbench.py --mode=serve \
      --workdir=runs/serve

A judge: --config.judge.kind=llm --config.judge.endpoint.base_url=https://api.openai.com/v1
--config.judge.endpoint.model=gpt-4-turbo --config.judge.endpoint.api_key_variable=OPENAI_API_KEY.
What the cache lacks: --config.simulator.http=http://host:8080/virtual, or simulator.llm.* as above.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "ToolLLaMA-2-7b-v2"
  config.environment.name = "toolbench"
  b = config.environment.toolbench
  b.folder = "StableToolBench"
  b.subsets = ("G1_instruction", "G1_category", "G1_tool", "G2_instruction", "G2_category")
  b.subsets += ("G3_instruction",)
  config.simulator.cache = "StableToolBench/server/tool_response_cache"
  r = config.rollout
  # One budget for every strategy. The published runs had 4 calls (baselines) or 17 (StepTool).
  r.budget, r.max_steps = 30, 12
  # With search.room these are 8,192 positions.
  r.max_tokens, r.max_step_tokens, r.slots = 7680, 1024, 16
  r.tool_workers = 64
  config.train.row_tokens = 7680
  config.train.micro_rows = 2 if config.algorithm == "eto" else 1  # rows of eto come in pairs
  config.evaluation.tasks = 765
  return config
