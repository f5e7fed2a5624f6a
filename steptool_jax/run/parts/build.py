"""The one place that turns a Config into policy, environment, engine and learner."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

import steptool_jax
from steptool_jax.config import Config
from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import ChatFormat, get_format
from steptool_jax.environments.base import Environment
from steptool_jax.environments.custom import Custom
from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.environments.market import Market, MarketEnvironment
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.policy import attention, families, hfconfig, hub, lora, model, sharding
from steptool_jax.policy import engine as engine_lib
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.strategy import Search
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.services import NO_SERVICES, Services, secret
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.toolbench.environment import ToolBench
from steptool_jax.toolbench.names import Prompts
from steptool_jax.types import Task

ASSETS = pathlib.Path(steptool_jax.__file__).parent / "assets"
_A_DAY_S = 86_400.0
TOKENIZER_TASKS = 2000  # training tasks whose texts train a compact tokenizer


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything static about the model, and where it came from."""

  model: model.ModelConfig  # with lora_scale where adapters are on
  lora: lora.LoraConfig | None
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
  return get_format(m.chat_format, Codec.load(directory))


def build_environment(config: Config, services: Services = NO_SERVICES) -> Environment:
  """The environment; 'toolbench' and 'custom' with environment.mcp need their services."""
  c = config.environment
  if c.name == "toolbench":
    environment = _toolbench(config, services)
  elif c.name == "custom":
    environment = Custom(
      functions=services.mcp.tools if services.mcp is not None else c.functions,
      tasks_path=c.tasks,
      heldout_share=c.heldout_share,
      max_observation_chars=config.rollout.max_observation_chars,
    )
  else:
    generator = {"nested_api": NestedApi, "data_pipeline": DataPipeline}[c.name]
    environment = generator(
      num_train=c.num_train,
      num_heldout=c.num_heldout,
      seed=c.seed,
      depths=(c.min_calls, c.max_calls),
      tools_per_task=c.tools_per_task or None,
      max_observation_chars=config.rollout.max_observation_chars,
    )
  m = c.market
  if m.prices:
    market = Market(m.seed, m.spread, m.specialists, m.preferences, m.asked)
    environment = MarketEnvironment(environment, market)
  faults = Faults(**dataclasses.asdict(c.faults))
  if faults.rate_limit + faults.timeout + faults.transient + faults.not_found > 0:
    environment = FaultyEnvironment(environment, faults)
  return environment


def _toolbench(config: Config, services: Services) -> ToolBench:
  c = config.environment.toolbench
  prompts = None
  if c.prompt:
    try:
      prompts = Prompts(system=pathlib.Path(c.prompt).read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"config.environment.toolbench.prompt: {c.prompt}: {error}") from None
  # Sessions grade by their default: services.judging gives the verdicts, all at once.
  return ToolBench(
    c.folder,
    services.answering.simulator,
    c.subsets,
    train_subsets=c.train_subsets,
    ids=c.ids or None,
    tools_folder=c.tools or None,
    prompts=prompts,
    max_observation_chars=config.rollout.max_observation_chars,
    toolbench_key=secret(
      config.simulator.toolbench_key_variable, "simulator.toolbench_key_variable"
    ),
  )


def build_search(config: Config) -> Search | None:
  """How to search; None for chains."""
  r = config.rollout
  if r.strategy != "dfsdt":
    return None
  return Search(
    max_calls=build_budget(config),
    width=r.search.width,
    answer_back=r.search.answer_back,
    give_up_back=r.search.give_up_back,
  )


def build_budget(config: Config) -> int:
  """LLM calls that an evaluation may spend on one task, whatever the strategy."""
  return config.rollout.budget or config.rollout.max_steps


def slot_tokens(config: Config) -> int:
  """Positions of an engine's slot."""
  r = config.rollout
  return r.max_tokens + (r.search.room if r.strategy == "dfsdt" else 0)


def build_limits(config: Config) -> Limits:
  r = config.rollout
  return Limits(
    max_steps=r.max_steps,
    max_step_tokens=r.max_step_tokens,
    max_tokens=r.max_tokens,
    max_invalid=r.max_invalid,
    max_observation_chars=r.max_observation_chars,
  )


def build_runner(config: Config) -> ToolRunner:
  r = config.rollout
  # A simulator waits for servers and tries again by itself. Cutting that short would show the
  # model a time-out, and count against it what was infrastructure.
  simulated = config.environment.name == "toolbench"
  return ToolRunner(
    timeout_s=_A_DAY_S if simulated else r.tool_timeout,
    workers=r.tool_workers,
    max_stuck=r.max_stuck_tools,
    retries=r.tool_retries,
  )


def build_policy(config: Config, environment: Environment, workdir: pathlib.Path) -> Policy:
  """Reads or makes configuration and tokenizer; weights come later (`initial_variables`).

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
    tokenizer = _tokenizer(config, environment, workdir)
    model_config = random_model(config, **run_fields)
    raw = {}
  codec = Codec.load(tokenizer)
  chat_format = get_format(m.chat_format, codec)
  if codec.vocab_size > model_config.vocab_size:
    raise ValueError(
      f"model.tokenizer: {tokenizer} has {codec.vocab_size} tokens, the model only "
      f"{model_config.vocab_size}; it belongs to another model"
    )
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
  model_config, lora_config = with_adapters(config, model_config)
  return Policy(model_config, lora_config, chat_format, source, tokenizer, raw)


def random_model(config: Config, **run_fields: str) -> model.ModelConfig:
  """model.architecture as its family builds it, with room for a conversation."""
  a = config.model.architecture
  family = families.FAMILIES[a.family]
  return model.ModelConfig(
    **dataclasses.asdict(a),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    max_position_embeddings=slot_tokens(config),
    **run_fields,
  )


def with_adapters(
  config: Config, model_config: model.ModelConfig
) -> tuple[model.ModelConfig, lora.LoraConfig | None]:
  """The model with the configured adapters, and which they are."""
  if not config.lora.rank:
    return model_config, None
  lora_config = lora.LoraConfig(config.lora.rank, config.lora.alpha, config.lora.targets)
  return lora.with_lora(model_config, lora_config), lora_config


def _source(path: str, workdir: pathlib.Path) -> pathlib.Path:
  if path.startswith("asset:"):
    return ASSETS / path.removeprefix("asset:")
  source = pathlib.Path(path)
  if source.suffix != ".gguf":
    return source
  from steptool_jax.policy import gguf  # needs the extra `gguf`

  imported = workdir / "imported"

  def write() -> None:
    if not (imported / "config.json").exists():
      gguf.gguf_to_hub(source, imported)

  hosts.lead(write)
  return imported


def _tokenizer(config: Config, environment: Environment, workdir: pathlib.Path) -> pathlib.Path:
  if not config.model.tokenizer:
    raise ValueError(
      "model.tokenizer: empty, but a model with random weights (model.path is empty) has none; "
      "name a directory, or 'compact' to train one on the training tasks"
    )
  if config.model.tokenizer != "compact":
    return pathlib.Path(config.model.tokenizer)
  out = workdir / "tokenizer"

  def write() -> None:
    if not (out / "tokenizer_config.json").exists():
      tasks = environment.tasks("train")[:TOKENIZER_TASKS]
      texts = (text for task in tasks for text in _texts(environment, task))
      compact.build_tokenizer(
        texts, config.model.architecture.vocab_size, out, digits=config.model.number_digits
      )

  hosts.lead(write)
  return out


def _texts(environment: Environment, task: Task) -> Iterator[str]:
  """A task's own texts and what its tools answer to the demonstration."""
  yield from compact.task_texts(task)
  session = environment.open(task, 0)
  for action in task.demonstration[:-1]:
    yield session.call(action).text
  session.close()


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


def build_engine(config: Config, policy: Policy, mesh: Mesh) -> engine_lib.Engine:
  r = config.rollout
  where = slot_shardings(policy.model, r.slots, mesh)
  return engine_lib.make_engine(
    policy.model, r.slots, slot_tokens(config), r.decode_chunk, r.top_k, r.top_p, where
  )


def slot_shardings(config: model.ModelConfig, slots: int, mesh: Mesh) -> engine_lib.EngineState:
  """How the engine's slots lie on the mesh."""
  row = attention.cache_row(config.num_kv_heads, config.head_dim)
  cache = sharding.cache_sharding(row, slots, mesh)
  rows = sharding.batch_sharding(mesh)
  return engine_lib.EngineState(model.KVCache(cache, cache), rows, rows)


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
