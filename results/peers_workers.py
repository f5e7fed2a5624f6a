"""What results/peers.py starts, a process for each library and benchmark: serves timed repetitions.

    python results/peers_workers.py {ours,trl,hf,tunix} {update,rollout} FOLDER

FOLDER holds workload.json and model/ (Hugging Face). A line on stdin asks for one repetition, a
JSON line on stdout answers: seconds, what was compiled, and what proves that the work is the same.
Everything is imported late: no interpreter has all libraries.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PIPE = os.fdopen(os.dup(1), "w")  # before the libraries print
EPOCHS, MICRO = 4, 2  # the release: batches of 8 in micro-batches of 2, one optimizer step an epoch
GAMMA, LAM, CLIP, VALUE_COEF, KL, RATE = 0.99, 0.95, 0.2, 0.1, 0.3, 1e-5


def commands() -> Iterator[str]:
  PIPE.write("{}\n")  # ready
  PIPE.flush()
  for line in sys.stdin:
    yield line.strip()


def reply(**figures: Any) -> None:
  PIPE.write(json.dumps(figures) + "\n")
  PIPE.flush()


def serve(action: Callable[[int], dict[str, Any]], compiled: Callable[[], dict]) -> None:
  """action(repetition) -> what it reports besides its seconds."""
  for repetition, _ in enumerate(commands()):
    started = time.perf_counter()
    report = action(repetition)
    reply(seconds=time.perf_counter() - started, **report, **compiled())


def xla_compilations() -> Callable[[], dict]:
  """Number and seconds of XLA compilations since the last call."""
  import jax

  seconds: list[float] = []

  def listen(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      seconds.append(duration)

  def since() -> dict:
    report = {"compilations": len(seconds), "compile_seconds": sum(seconds)}
    seconds.clear()
    return report

  jax.monitoring.register_event_duration_secs_listener(listen)
  return since


def responses(trajectory: dict) -> tuple[np.ndarray, np.ndarray]:
  """(ids after the prompt, mask of the sampled ones)."""
  steps = trajectory["steps"]
  ids = [part for s in steps for part in (s["sampled"], s["observed"])]
  mask = [np.full(len(part), k % 2 == 0) for k, part in enumerate(ids)]
  return np.concatenate(ids).astype(np.int64), np.concatenate(mask).astype(np.int64)


# --- ours ---


def ours_update(work: dict, folder: pathlib.Path) -> None:
  import jax

  from configs import steptool_offline
  from steptool_jax import types
  from steptool_jax.learning import batching, update
  from steptool_jax.policy import hfconfig, hub, lora
  from steptool_jax.run.training import setup
  from steptool_jax.validation import validate

  def trajectory(number: int, t: dict) -> types.Trajectory:
    steps = tuple(
      types.Step(
        np.array(s["sampled"], np.int32),
        np.zeros(len(s["sampled"]), np.float32),
        types.Finish(""),
        None,
        np.array(s["observed"], np.int32),
        reward=s["reward"],
      )
      for s in t["steps"]
    )
    prompt = np.array(t["prompt"], np.int32)
    return types.Trajectory(str(number), 0, prompt, steps, types.Status.ANSWERED)

  batches = [[trajectory(n, t) for n, t in enumerate(batch)] for batch in work["batches"]]
  longest = max(batching.packed_length(t) for batch in batches for t in batch)
  config = steptool_offline.get_config()
  config.model.dtype = config.model.param_dtype = "float32"
  config.model.remat, config.lora.rank, config.data.behaviour = "none", 0, "current"
  config.train.row_tokens, config.train.micro_rows = 1 << (longest - 1).bit_length(), 1
  config.rollout.max_tokens = config.train.row_tokens
  config = validate(config)
  t, c = config.train, config.loss
  settings = (t.epochs, config.advantage.gamma, config.advantage.lam, c.clip_low, c.value_coef)
  assert settings == (EPOCHS, GAMMA, LAM, CLIP, VALUE_COEF), settings
  assert (c.kl_coef, t.optimizer.learning_rate) == (KL, RATE)
  architecture, _ = hfconfig.load_config(folder / "model")
  variables = {"params": hub.load_params(folder / "model", architecture)}
  learner = setup.build_learner(config, architecture, "steptool", 1)
  state = update.init_state(learner, *lora.split_variables(variables))
  prepare, step = update.compile_programs(learner)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1, 1), ("data", "fsdp", "tensor"))

  def action(repetition: int) -> dict[str, Any]:
    nonlocal state
    report = {}
    for n, batch in enumerate(batches):
      packed = batching.pack(batch, t.row_tokens).batch
      rows = packed.tokens.shape[0]
      prepared, _ = prepare(state, setup.to_device(packed, 1, len(batch), mesh), np.int32(rows))
      if n == 0:
        report["logprob"] = float(prepared.ref_logprobs.sum() / packed.action_mask.sum())
      for epoch in range(EPOCHS):
        for minibatch, count in setup.minibatches(prepared, rows, 1, 1, (0, epoch)):
          state, metrics = step(state, minibatch, np.int32(count))
          jax.device_get(metrics)
    return report | {"row_tokens": t.row_tokens, "padding": batching.padding_share(packed)}

  with jax.set_mesh(mesh):
    serve(action, xla_compilations())


def ours_rollout(work: dict, folder: pathlib.Path) -> None:
  from steptool_jax.policy import engine as engine_lib
  from steptool_jax.policy import hfconfig, hub

  config, _ = hfconfig.load_config(folder / "model")
  variables = {"params": hub.load_params(folder / "model", config)}
  slots = len(work["prompts"])
  engine = engine_lib.make_engine(config, slots, work["size"], max(work["answers"]))

  def action(repetition: int) -> dict[str, Any]:
    state, tokens = engine.init(), 0
    seeds = {slot: np.array([repetition, slot], np.uint32) for slot in range(slots)}
    for news, answer in zip(work["turns"], work["answers"], strict=True):
      pieces = {slot: np.array(new, np.int32) for slot, new in enumerate(news)}
      state = engine.append(variables, state, pieces)
      limits = dict.fromkeys(range(slots), answer)
      state, decoded = engine.decode(variables, state, limits, seeds, (), 1.0)
      tokens += int(decoded.count.sum())
    return {"tokens": tokens}

  serve(action, xla_compilations())


# --- TRL and transformers ---


def trl_update(work: dict, folder: pathlib.Path) -> None:
  import tokenizers
  import torch
  import transformers
  import trl

  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, "<unk>"))
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
  config = trl.PPOConfig(
    batch_size=len(work["batches"][0]),
    mini_batch_size=MICRO,
    gradient_accumulation_steps=len(work["batches"][0]) // MICRO,
    ppo_epochs=EPOCHS,
    learning_rate=RATE,
    init_kl_coef=KL,
    gamma=GAMMA,
    lam=LAM,
    vf_coef=VALUE_COEF,
  )
  model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "model"))
  trainer = trl.PPOTrainer(config, model, tokenizer=tokenizer)
  batches = []
  for batch in work["batches"]:
    parts = [responses(t) for t in batch]
    queries = [torch.tensor(t["prompt"]) for t in batch]
    scores = [torch.tensor(t["steps"][-1]["reward"]) for t in batch]
    answers, masks = ([torch.from_numpy(p[k]) for p in parts] for k in range(2))
    batches.append((queries, answers, scores, masks))

  def action(repetition: int) -> dict[str, Any]:
    for batch in batches:
      trainer.step(*batch)
    return {}

  total = count = 0.0
  for query, answer, mask in zip(*(batches[0][k] for k in (0, 1, 3)), strict=True):
    with torch.no_grad():
      ids = torch.cat([query, answer])[None]
      logprobs = model(ids)[0].log_softmax(-1)[0, len(query) - 1 : -1]
    total += float((logprobs.gather(1, answer[:, None])[:, 0] * mask).sum())
    count += float(mask.sum())
  serve(action, lambda: {"logprob": total / count})


def hf_rollout(work: dict, folder: pathlib.Path) -> None:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "model")).eval()

  def action(repetition: int) -> dict[str, Any]:
    torch.manual_seed(repetition)
    history: list[list[int]] = [[] for _ in work["prompts"]]
    tokens = 0
    for news, answer in zip(work["turns"], work["answers"], strict=True):
      history = [old + new for old, new in zip(history, news, strict=True)]
      longest = max(map(len, history))
      ids = torch.tensor([[0] * (longest - len(h)) + h for h in history])
      mask = torch.tensor([[0] * (longest - len(h)) + [1] * len(h) for h in history])
      settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
      limits = {"min_new_tokens": answer, "max_new_tokens": answer, "pad_token_id": 0}
      out = model.generate(ids, attention_mask=mask, **settings, **limits)[:, longest:]
      history = [h + sampled for h, sampled in zip(history, out.tolist(), strict=True)]
      tokens += out.numel()
    return {"tokens": tokens}

  serve(action, lambda: {"transformers": transformers.__version__})


# --- tunix ---


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


def tunix_update(work: dict, folder: pathlib.Path) -> None:
  """PPOLearner.train on a data set that waits for our commands, rollouts from a rollout engine of
  our own (a documented extension point) that hands out the given trajectories.
  """
  import jax
  import optax
  from flax import nnx
  from tunix.rl import rl_cluster, utils
  from tunix.rl.ppo import ppo_learner
  from tunix.rl.rollout import base_rollout, vanilla_rollout

  given = [t for batch in work["batches"] for t in batch]
  answers = [responses(t)[0].astype(np.int32) for t in given]
  prompt_size, answer_size = max(len(t["prompt"]) for t in given), max(map(len, answers))

  class Given(vanilla_rollout.VanillaRollout):
    def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
      a = rollout_actor.config
      cache = (rollout_config.kv_cache_size, a.num_layers, a.num_kv_heads, a.head_dim)
      super().__init__(rollout_actor, tokenizer, base_rollout.CacheConfig(*cache))

    def generate(self, prompts, rollout_config, **kwargs):
      chosen = [int(p) for p in prompts]
      padded = np.zeros((len(chosen), prompt_size), np.int32)
      for row, n in enumerate(chosen):
        padded[row, prompt_size - len(given[n]["prompt"]) :] = given[n]["prompt"]
      tokens = [answers[n] for n in chosen]
      return base_rollout.RolloutOutput([str(n) for n in chosen], [], tokens, padded, None)

  roles = rl_cluster.Role
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  actor, size = _model(folder), len(work["batches"][0])
  cluster = rl_cluster.RLCluster(
    actor=actor,
    critic=utils.create_critic_model(actor),
    reference=_model(folder),
    tokenizer=Ids(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys((roles.ACTOR, roles.CRITIC, roles.REFERENCE, roles.ROLLOUT), mesh),
      rollout_engine=Given,
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adam(RATE),
        critic_optimizer=optax.adam(RATE),
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=size,
        train_micro_batch_size=MICRO,
        rollout_micro_batch_size=size,
        compute_logps_micro_batch_size=size,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=answer_size,
        max_prompt_length=prompt_size,
        temperature=1.0,
        kv_cache_size=prompt_size + answer_size,
      ),
    ),
  )
  learner = ppo_learner.PPOLearner(
    cluster,
    ppo_learner.PPOConfig(
      num_iterations=EPOCHS, gamma=GAMMA, gae_lambda=LAM, beta=KL, epsilon=CLIP, kl_method="kl"
    ),
    reward_fns=lambda prompts, completions, **_: [
      given[int(n)]["steps"][-1]["reward"] for n in completions
    ],
  )
  rollout = cluster.rollout.generate([str(n) for n in range(size)], None)
  padded = np.stack([np.pad(a, (0, answer_size - len(a))) for a in rollout.tokens])
  logprobs = cluster.get_ref_per_token_logps(
    rollout.left_padded_prompt_tokens, padded, pad_id=0, eos_id=1 << 30
  )
  masks = [responses(t)[1] for t in given[:size]]
  total = sum(float((logprobs[n, : len(m)] * m).sum()) for n, m in enumerate(masks))
  logprob = total / sum(m.sum() for m in masks)
  shape = [prompt_size, answer_size]

  def dataset() -> Iterator[dict[str, list[str]]]:
    compiled = xla_compilations()
    for _ in commands():
      started = time.perf_counter()
      for start in range(0, len(given), size):
        yield {"prompts": [str(n) for n in range(start, start + size)]}
      trainers = (cluster.actor_trainer, cluster.critic_trainer)
      jax.block_until_ready([nnx.state(t.model) for t in trainers])
      steps = [t.train_steps for t in trainers]
      seconds = time.perf_counter() - started
      reply(seconds=seconds, logprob=logprob, shape=shape, steps=steps, **compiled())

  learner.train(dataset())


def tunix_rollout(work: dict, folder: pathlib.Path) -> None:
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


if __name__ == "__main__":
  os.dup2(2, 1)
  library, benchmark, path = sys.argv[1:]
  workload = json.loads((pathlib.Path(path) / "workload.json").read_text())
  globals()[f"{library}_{benchmark}"](workload, pathlib.Path(path))
