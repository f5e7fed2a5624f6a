"""Qwen2-7B-Instruct.

    python -m steptool_jax.main --config=configs/qwen2_7b.py --workdir=/data/run \
      --config.model.path=/models/Qwen2-7B-Instruct

Hyper-parameters: the authors' release (TRL 0.10.1 PPO with LoRA); departures have a comment.
"""

from steptool_jax.config import base_config


def get_config(arg=""):
  config = base_config()
  config.algorithm = arg or "steptool"
  config.model.path = "Qwen2-7B-Instruct"
  config.model.chat_format = "chatml_react"
  config.model.dtype, config.model.param_dtype = "bfloat16", "bfloat16"
  config.model.remat = "full"
  # For --mode=compile, which needs no weights; training reads config.json.
  a = config.model.architecture
  a.family, a.vocab_size, a.hidden_size, a.intermediate_size = "qwen2", 152064, 3584, 18944
  a.num_layers, a.num_heads, a.num_kv_heads, a.head_dim = 28, 28, 4, 128
  a.rope_theta, a.tie_embeddings = 1000000.0, False
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, 1
  config.lora.rank, config.lora.alpha = 16, 16.0
  r = config.rollout
  # The release trains on 8 annotated trajectories a batch, offline; online rollouts need more
  # conversations for a stable whitening.
  r.tasks, r.samples, r.slots = 32, 4, 64
  r.max_tokens = 8192  # the release cuts at 4,096 from the left, which removes the query first
  r.max_steps, r.max_step_tokens, r.decode_chunk = 12, 1024, 128
  config.train.row_tokens, config.train.micro_rows = r.max_tokens, 16
  config.advantage.gamma, config.advantage.lam = 0.99, 0.95
  # The release sums alpha = 1 rewards; 'mean' keeps a retry from outscoring a first-try success.
  config.rewards.alpha, config.rewards.normalization = 1.0, "mean"
  loss = config.loss
  loss.clip_low = loss.clip_high = loss.value_clip = 0.2
  loss.value_coef = 0.1
  loss.logprob_chunk = 1024  # a block of the output matrix is read once for so many positions
  loss.kl_coef, loss.kl_adaptive, loss.kl_target, loss.kl_horizon = 0.3, True, 6.0, 10000.0
  s = config.sft
  # Released SFT: 5 epochs at 2e-5, cosine, 4 % warm-up. Set sft.steps for your data; 0 starts RL
  # from the model as it is.
  s.steps, s.batch, s.micro_rows = 0, 16, 16
  s.optimizer.learning_rate, s.optimizer.schedule, s.optimizer.warmup = 2e-5, "cosine", 0.04
  t = config.train
  t.iterations, t.epochs, t.minibatches = 200, 4, 4
  t.optimizer.learning_rate = 1e-5
  # The release does not clip gradients; at scale one bad batch must not ruin a run.
  t.optimizer.max_grad_norm = 1.0
  return config
