"""What configs of the paper's size share; no config by itself.

Hyper-parameters: the authors' release (TRL 0.10.1 PPO with LoRA); departures have a comment.
"""

from steptool_jax.config import base_config


def released(algorithm):
  """What online and offline training have in common."""
  config = base_config()
  config.algorithm = algorithm
  config.model.dtype, config.model.param_dtype = "bfloat16", "bfloat16"
  config.model.remat = "full"
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, -1, 1
  config.lora.rank, config.lora.alpha = 16, 16.0
  config.advantage.gamma, config.advantage.lam = 0.99, 0.95
  loss = config.loss
  loss.clip_low = loss.clip_high = loss.value_clip = 0.2
  loss.value_coef = 0.1
  loss.kl_coef, loss.kl_adaptive, loss.kl_target, loss.kl_horizon = 0.3, True, 6.0, 10000.0
  # Released SFT: 5 epochs at 2e-5, cosine, 4 % warm-up.
  s = config.sft.optimizer
  s.learning_rate, s.schedule, s.warmup = 2e-5, "cosine", 0.04
  config.train.epochs, config.train.optimizer.learning_rate = 4, 1e-5
  return config


def online(algorithm, path, chat_format, **architecture):
  """PPO on rollouts of the model in `path`.

  architecture: for --mode=compile, which needs no weights; training reads config.json.
  """
  config = released(algorithm)
  config.model.path, config.model.chat_format = path, chat_format
  config.model.architecture.update(architecture)
  r = config.rollout
  # The release trains on 8 annotated trajectories a batch, offline; online rollouts need more
  # conversations for a stable whitening.
  r.tasks, r.samples, r.slots = 32, 4, 64
  r.max_steps, r.max_step_tokens, r.decode_chunk = 12, 1024, 128
  r.tensor = -1  # decoding reads every weight for one token a slot: no chip gathers them
  # The release cuts at 4,096 from the left, which removes the query first.
  r.max_tokens = config.train.row_tokens = 8192
  # The release sums alpha = 1 rewards, offline; of a policy's own rollouts that pays for calls
  # without use (results/incentives.md).
  config.rewards.alpha, config.rewards.shaping = 1.0, "progress"
  config.loss.logprob_chunk = 1024  # the output matrix is read once for so many positions
  # Set sft.steps for your data; 0 starts RL from the model as it is.
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 0, 16, 16
  config.train.iterations, config.train.minibatches, config.train.micro_rows = 200, 4, 16
  # The release does not clip gradients; at scale one bad batch must not ruin a run.
  config.train.optimizer.max_grad_norm = 1.0
  return config
