"""tunix: its PPO and GRPO learners, and its sampler."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import (
  CLIP,
  GAMMA,
  KL,
  LAM,
  RATE,
  Clock,
  advantages,
  commands,
  reply,
  responses,
  serve,
  versions,
  xla_compilations,
)


class Ids:
  """A tokenizer whose text is numbers. Nothing ever ends an answer: its length is given."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    return 0  # tunix: none

  def eos_id(self) -> int:
    return 1 << 30

  def pad_id(self) -> int:
    return 0


def _model(folder: pathlib.Path) -> Any:
  import jax.numpy as jnp
  from tunix.models.qwen2 import model, params

  raw = json.loads((folder / "model" / "config.json").read_text())
  config = model.ModelConfig(
    num_layers=raw["num_hidden_layers"],
    vocab_size=raw["vocab_size"],
    embed_dim=raw["hidden_size"],
    hidden_dim=raw["intermediate_size"],
    num_heads=raw["num_attention_heads"],
    head_dim=raw["head_dim"],
    num_kv_heads=raw["num_key_value_heads"],
    rope_theta=raw["rope_theta"],
    norm_eps=raw["rms_norm_eps"],
  )
  return params.create_model_from_safe_tensors(str(folder / "model"), config, dtype=jnp.float32)


def _cluster(work: dict, folder: pathlib.Path, batch: int, micro: int, critic: bool) -> Any:
  """(cluster, its mean log-prob of the sampled tokens, the size of prompts and answers).

  Rollouts come from an engine of our own (a documented extension point), which hands out the given
  trajectories: prompt n is task n, and the k-th time in a call its k-th sample.
  batch, micro: prompts in an optimizer step and in a forward pass.
  """
  import jax
  import optax
  from tunix.rl import rl_cluster, utils
  from tunix.rl.rollout import base_rollout, vanilla_rollout

  given = work["trajectories"]
  of_task: dict[int, list[int]] = {}
  for n, t in enumerate(given):
    of_task.setdefault(t["task"], []).append(n)
  answers = [responses(t)[0].astype(np.int32) for t in given]
  prompt_size, answer_size = max(len(t["prompt"]) for t in given), max(map(len, answers))

  class Given(vanilla_rollout.VanillaRollout):
    def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
      a = rollout_actor.config
      cache = (rollout_config.kv_cache_size, a.num_layers, a.num_kv_heads, a.head_dim)
      super().__init__(rollout_actor, tokenizer, base_rollout.CacheConfig(*cache))

    def generate(self, prompts, rollout_config, **kwargs):
      samples = {task: iter(numbers) for task, numbers in of_task.items()}
      chosen = [next(samples[int(p)]) for p in prompts]
      padded = np.zeros((len(chosen), prompt_size), np.int32)
      for row, n in enumerate(chosen):
        padded[row, prompt_size - len(given[n]["prompt"]) :] = given[n]["prompt"]
      tokens = [answers[n] for n in chosen]
      return base_rollout.RolloutOutput([str(n) for n in chosen], [], tokens, padded, None)

  roles = rl_cluster.Role
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  actor = _model(folder)
  clip = [] if critic else [optax.clip_by_global_norm(1.0)]
  cluster = rl_cluster.RLCluster(
    actor=actor,
    critic=utils.create_critic_model(actor) if critic else None,
    reference=_model(folder),
    tokenizer=Ids(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys((roles.ACTOR, roles.CRITIC, roles.REFERENCE, roles.ROLLOUT), mesh),
      rollout_engine=Given,
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(*clip, optax.adam(RATE)),
        critic_optimizer=optax.adam(RATE) if critic else None,
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=batch,
        train_micro_batch_size=micro,
        rollout_micro_batch_size=batch,
        compute_logps_micro_batch_size=batch,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=answer_size,
        max_prompt_length=prompt_size,
        temperature=1.0,
        kv_cache_size=prompt_size + answer_size,
      ),
    ),
  )
  rows = [np.pad(t["prompt"], (prompt_size - len(t["prompt"]), 0)) for t in given]
  padded = [np.pad(a, (0, answer_size - len(a))) for a in answers]
  logprobs = cluster.get_ref_per_token_logps(
    np.array(rows, np.int32), np.array(padded), pad_id=0, eos_id=1 << 30, micro_batch_size=8
  )
  masks = [responses(t)[1] for t in given]
  total = sum(float((logprobs[n, : len(m)] * m).sum()) for n, m in enumerate(masks))
  return cluster, total / sum(m.sum() for m in masks), [prompt_size, answer_size]


def _dataset(trainers: tuple, prompts: list[str], **fixed: Any) -> Iterator[dict[str, list[str]]]:
  """The prompts whenever a command asks for them; answers when all trainers are done with them."""
  import jax
  from flax import nnx

  compiled = xla_compilations()
  for _ in commands():
    clock = Clock()
    yield {"prompts": prompts}
    jax.block_until_ready([nnx.state(t.model) for t in trainers])
    times = clock.read()
    steps = [t.train_steps for t in trainers]
    own = versions("google-tunix", "jax", "flax")
    reply(**times, steps=steps, versions=own, **fixed, **compiled())


def ppo(work: dict, folder: pathlib.Path) -> None:
  """PPOLearner.train on a data set that waits for our commands."""
  from tunix.rl.ppo import ppo_learner

  given = work["trajectories"]
  cluster, logprob, shape = _cluster(work, folder, len(given), 2, critic=True)
  config = ppo_learner.PPOConfig(
    num_iterations=work["epochs"],
    gamma=GAMMA,
    gae_lambda=LAM,
    beta=KL,
    epsilon=CLIP,
    kl_method="kl",
  )
  scores = [t["steps"][-1]["reward"] for t in given]
  learner = ppo_learner.PPOLearner(
    cluster, config, lambda prompts, completions, **_: [scores[int(n)] for n in completions]
  )
  trainers = (cluster.actor_trainer, cluster.critic_trainer)
  prompts = [str(t["task"]) for t in given]
  learner.train(_dataset(trainers, prompts, logprob=logprob, shape=shape))


def grpo(work: dict, folder: pathlib.Path) -> None:
  """GRPOLearner.train on a data set that waits for our commands; a group is a micro-batch."""
  from tunix.rl.grpo import grpo_learner

  given = work["trajectories"]
  tasks = sorted({t["task"] for t in given})
  cluster, logprob, shape = _cluster(work, folder, len(tasks), 1, critic=False)
  config = grpo_learner.GRPOConfig(
    num_generations=len(given) // len(tasks),
    num_iterations=work["epochs"],
    beta=0.0,
    epsilon=CLIP,
  )
  scores = advantages(given)
  learner = grpo_learner.GRPOLearner(
    cluster, config, lambda prompts, completions, **_: [scores[int(n)] for n in completions]
  )
  trainers = (cluster.actor_trainer,)
  learner.train(_dataset(trainers, [*map(str, tasks)], logprob=logprob, shape=shape))


def rollout(work: dict, folder: pathlib.Path) -> None:
  from tunix.generate import sampler as sampler_lib

  model = _model(folder)
  a = model.config
  # Its prompts are padded to a power of two.
  size = 1 << (work["size"] - 1).bit_length()
  cache = sampler_lib.CacheConfig(
    size + max(work["answers"]), a.num_layers, a.num_kv_heads, a.head_dim
  )
  sampler = sampler_lib.Sampler(model, Ids(), cache)

  def action(repetition: int) -> dict[str, Any]:
    history: list[list[int]] = [[] for _ in work["prompts"]]
    tokens = 0
    for k, (news, answer) in enumerate(zip(work["turns"], work["answers"], strict=True)):
      history = [old + new for old, new in zip(history, news, strict=True)]
      texts = [" ".join(map(str, h)) for h in history]
      out = sampler(
        texts, max_generation_steps=answer, temperature=1.0, top_p=1.0, seed=100 * repetition + k
      )
      history = [h + ids.tolist() for h, ids in zip(history, out.tokens, strict=True)]
      tokens += sum(map(len, out.tokens))
    return {"tokens": tokens}

  serve(action, xla_compilations())
