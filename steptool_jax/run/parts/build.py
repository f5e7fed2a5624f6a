"""The one place that turns a Config into policy, environment, engine and learner."""

import contextlib
import dataclasses
import functools
import json
import pathlib

import jax
from jax.sharding import Mesh

from steptool_jax.config import Config, Lora
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.environments.base import SPLITS, TURNS, Environment, Problem, make
from steptool_jax.environments.faults import FaultyEnvironment, total
from steptool_jax.environments.markets.market import MarketEnvironment
from steptool_jax.files import write_text
from steptool_jax.learning import algorithms
from steptool_jax.policy import engine as engine_lib
from steptool_jax.policy import families, length_classes, lora, model, sharding
from steptool_jax.policy.formats import hfconfig, hub
from steptool_jax.rollout.strategy import Search
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import tokenizers
from steptool_jax.run.parts.services import NO_SERVICES, Services
from steptool_jax.run.workdir import inputs
from steptool_jax.simulators.runner import Announce, ToolRunner

_A_DAY_S = 86_400.0
_REPLY = 20  # time-outs of one attempt that a user's reply may take


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything static about the model, and where it came from."""

  model: model.ModelConfig  # with lora_scale where adapters are on
  lora: Lora | None
  chat_format: ChatFormat
  source: pathlib.Path | None  # Hugging Face directory of the weights; None = random
  tokenizer: pathlib.Path
  raw_config: dict  # config.json of the source, or one that describes the random model


def build_chat_format(config: Config, workdir: pathlib.Path) -> ChatFormat:
  """Chat format and tokenizer without a model, for work on stored texts.

  ValueError where neither model.tokenizer nor model.path names a tokenizer.
  """
  m = config.model
  if m.tokenizer == "compact" or not (m.tokenizer or m.path):
    raise ValueError(
      "model.tokenizer: name a tokenizer directory here, or in model.path: texts become tokens"
    )
  directory = pathlib.Path(m.tokenizer) if m.tokenizer else _source(m.path, workdir)
  return get_format(m.chat_format, Codec.load(directory), m.tool_list, m.thinking, m.parallel_calls)


def build_environment(
  config: Config, services: Services = NO_SERVICES, problems: list[Problem] | None = None
) -> Environment:
  """The environment; 'toolbench' and 'custom' with environment.mcp need their services.

  problems: takes what is wrong with single tools and tasks of 'custom', in the place of an error.
  """
  c = config.environment
  collected = problems is not None and c.name == "custom"
  environment = make(config, services, **({"problems": problems} if collected else {}))
  if config.rollout.strategy != "chain":
    talking = (t.id for s in SPLITS for t in environment.tasks(s) if t.metadata.get(TURNS))
    if (first := next(talking, None)) is not None:
      raise ValueError(
        f"config.rollout.strategy: {config.rollout.strategy!r} grades every answer, but the user "
        f"of task {first} goes on after one; use 'chain'"
      )
  if c.market.prices:
    environment = MarketEnvironment(environment, c.market)
  return FaultyEnvironment(environment, c.faults) if total(c.faults) > 0 else environment


def build_search(config: Config) -> Search | None:
  """How to search; None for chains."""
  r = config.rollout
  if r.strategy != "dfsdt":
    return None
  return Search(**dataclasses.asdict(r.search), max_calls=build_budget(config))


def build_budget(config: Config) -> int:
  """LLM calls that an evaluation may spend on one task, whatever the strategy."""
  return config.rollout.budget or config.rollout.max_steps


def slot_tokens(config: Config) -> int:
  """Positions of an engine's slot."""
  r = config.rollout
  return r.max_tokens + (r.search.room if r.strategy == "dfsdt" else 0)


def build_runner(config: Config, announce: Announce = contextlib.nullcontext) -> ToolRunner:
  r = config.rollout
  # A simulator waits for servers and tries again by itself. Cutting that short would show the
  # model a time-out, and count against it what was infrastructure.
  simulated = config.environment.name == "toolbench"
  return ToolRunner(
    timeout_s=_A_DAY_S if simulated else r.tool_timeout,
    workers=r.tool_workers,
    retries=r.tool_retries,
    announce=announce,
    # So does the endpoint that a user speaks through, in some requests a reply.
    reply_s=_REPLY * config.environment.user.timeout if config.environment.user.base_url else None,
  )


def build_policy(
  config: Config,
  environment: Environment,
  workdir: pathlib.Path,
  runner: ToolRunner | None = None,
) -> Policy:
  """Reads or makes configuration and tokenizer; weights come later (`initial_variables`).

  runner: calls the tools whose answers a compact tokenizer is trained on.

  Raises:
    FileNotFoundError, ValueError: as hub, gguf and codec say, before any work is done.
  """
  m = config.model
  run_fields = {"dtype": m.dtype, "param_dtype": m.param_dtype, "remat": m.remat}
  if m.path:
    source = _source(m.path, workdir)
    model_config, raw = hfconfig.load_config(source, **run_fields)
    tokenizer = pathlib.Path(m.tokenizer) if m.tokenizer else source
  else:
    source = None
    tokenizer = _tokenizer(config, environment, workdir, runner)
    model_config = random_model(config, **run_fields)
    raw = {}
  codec = Codec.load(tokenizer).within(model_config.vocab_size)
  if codec.vocab_size > model_config.vocab_size:
    raise ValueError(
      f"model.tokenizer: {tokenizer} has {codec.vocab_size} tokens, the model only "
      f"{model_config.vocab_size}; it belongs to another model"
    )
  chat_format = get_format(m.chat_format, codec, m.tool_list, m.thinking, m.parallel_calls)
  if slot_tokens(config) > model_config.max_position_embeddings:
    room = slot_tokens(config) - config.rollout.max_tokens
    raise ValueError(
      f"rollout.max_tokens: {config.rollout.max_tokens}"
      f"{f' and rollout.search.room = {room}' if room else ''} is more than the model's "
      f"max_position_embeddings = {model_config.max_position_embeddings}"
    )
  if not raw:
    raw = hfconfig.raw_config_of(
      model_config,
      bos_token_id=codec.bos_id,
      eos_token_id=chat_format.stop_ids[0],
      pad_token_id=codec.pad_id,
    )
  return Policy(*with_adapters(config, model_config), chat_format, source, tokenizer, raw)


def random_model(config: Config, **run_fields: str) -> model.ModelConfig:
  """model.architecture as its family builds it, with room for a conversation."""
  a = config.model.architecture
  family = families.FAMILIES[a.family]
  return model.ModelConfig(
    **dataclasses.asdict(a) | ({} if family.full_every else {"sliding_window": None}),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    max_position_embeddings=slot_tokens(config),
    sliding_layers=family.sliding_layers(a.num_layers),
    rope_local_theta=family.local_theta,
    query_scalar=float(a.head_dim) if family.full_every else None,
    **run_fields,
  )


def with_adapters(
  config: Config, model_config: model.ModelConfig
) -> tuple[model.ModelConfig, Lora | None]:
  """The model with the configured adapters, and which they are."""
  if not config.lora.rank:
    return model_config, None
  return lora.with_lora(model_config, config.lora), config.lora


def refuse_missing_model(config: Config) -> None:
  """FileNotFoundError with the remedy, before any work, where model.path names nothing."""
  path = config.model.path
  if not path or path.startswith("asset:") or pathlib.Path(path).exists():
    return
  raise FileNotFoundError(
    f"config.model.path: there is no {path!r} here, and nothing is downloaded: get the model "
    "(`hf download NAME --local-dir=DIR`, or as the top of its config file says), then give its "
    "Hugging Face directory or .gguf file with --config.model.path=PATH"
  )


def _source(path: str, workdir: pathlib.Path) -> pathlib.Path:
  source = tokenizers.located(path)
  if source.suffix != ".gguf":
    return source
  from steptool_jax.policy.formats import gguf  # needs the extra `gguf`

  def write() -> str:
    imported = workdir / "imported" / inputs.digest([source])  # another file has another folder
    if not (imported / "config.json").exists():
      gguf.gguf_to_hub(source, imported)
    return str(imported)

  return pathlib.Path(hosts.lead(write))


def _tokenizer(
  config: Config, environment: Environment, workdir: pathlib.Path, runner: ToolRunner | None
) -> pathlib.Path:
  if not config.model.tokenizer:
    raise ValueError(
      "model.tokenizer: empty, but a model with random weights (model.path is empty) has none; "
      "name a directory, or 'compact' to train one on the training tasks"
    )
  if config.model.tokenizer != "compact":
    return pathlib.Path(config.model.tokenizer)
  out = workdir / "tokenizer"
  files = {k: v for k, v in inputs.digests(config, workdir).items() if k.startswith("environment.")}
  size = config.model.architecture.vocab_size
  made_of = json.dumps([dataclasses.asdict(config.environment), files, size])

  def write() -> None:
    note = out / "made_of.json"
    there = (out / "tokenizer_config.json").exists()
    bound = (workdir / "config.json").exists()  # a run has learnt its tokens
    same = note.exists() and note.read_bytes() == made_of.encode()
    if not there or not (bound or same):
      tokenizers.train_compact(config, environment, out, runner)
      write_text(note, made_of)

  hosts.lead(write)
  return out


def initial_variables(config: Config, policy: Policy, mesh: Mesh) -> dict:
  """Weights on the mesh: loaded tensor by tensor, or random; adapters where they are on."""
  key = jax.random.key(config.seed)
  if policy.source is not None:
    params = hub.load_params(policy.source, policy.model, mesh)
  else:
    params = jax.jit(
      lambda: model.init_params(policy.model, key),
      out_shardings=sharding.shardings(model.abstract_params(policy.model), mesh),
    )()
  if policy.lora is None:
    return {"params": params}
  return {"params": params, "lora": fresh_adapters(policy, mesh, config.seed)}


def fresh_adapters(policy: Policy, mesh: Mesh, seed: int) -> dict:
  key = jax.random.fold_in(jax.random.key(seed), 1)
  make = functools.partial(lora.init_lora, policy.model, policy.lora, key)
  return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh))()


def build_mesh(config: Config) -> Mesh:
  return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def build_engine(
  config: Config, policy: Policy, mesh: Mesh
) -> engine_lib.Engine | length_classes.LengthClasses:
  """The engine on its own mesh, or with rollout.long_slots one of two sizes of slots.

  ValueError where mesh.tensor, rollout.tensor, rollout.slots or long_slots split badly.
  """
  r, m = config.rollout, policy.model
  sharding.check_heads(m.num_kv_heads, mesh)
  sizes = {
    "key-value heads": m.num_kv_heads,
    "of vocab_size": m.vocab_size,
    "of intermediate_size": m.intermediate_size,
  }
  where = sharding.rollout_mesh(mesh, r.tensor, sizes)
  sharding.check_rows("rollout.slots", r.slots, where)

  def make(slots: int, size: int) -> engine_lib.Engine:
    engine = engine_lib.make_engine(
      m,
      slots,
      size,
      r.decode_chunk,
      r.top_k,
      r.top_p,
      where,
      leave=r.leave,
      copied=where is not mesh,
      kv_cache=r.kv_cache,
      record=algorithms.recorded(config),
    )
    # Trained on, the sampler's log-probs must not depend on how soon tools answer (Engine.decode).
    return dataclasses.replace(engine, buckets=()) if r.corrected else engine

  if not r.long_slots:
    return make(r.slots, slot_tokens(config))
  sharding.check_rows("rollout.long_slots", r.long_slots, where)
  if r.long_slots < (processes := jax.process_count()):
    raise ValueError(
      f"rollout.long_slots: {r.long_slots} for {processes} processes, but a conversation stays in "
      f"the process that runs its tools; set it to {processes} or more"
    )
  return length_classes.of_sizes(make, ((r.slots, r.slot_tokens), (r.long_slots, r.max_tokens)))


def save_policy(folder: pathlib.Path, policy: Policy, variables: dict) -> None:
  """The policy as a Hugging Face folder, adapters merged into its weights."""
  hub.save_params(
    folder,
    policy.model,
    variables["params"],
    policy.raw_config,
    source=policy.tokenizer,
    model=policy.source,
    stop_id=policy.chat_format.stop_ids[0],
    adapters=variables.get("lora"),
  )


def fold_adapters(config: Config, policy: Policy, mesh: Mesh, variables: dict) -> dict:
  """Variables with today's adapters merged into the base, and fresh adapters on top.

  So "adapters off", the reference of a LoRA run, is the policy that RL starts from and not the one
  before SFT.
  """
  if policy.lora is None:
    return variables
  params = lora.merge_lora(variables["params"], variables["lora"], policy.lora)
  return {
    "params": jax.device_put(params, sharding.shardings(params, mesh)),
    "lora": fresh_adapters(policy, mesh, config.seed + 1),
  }
