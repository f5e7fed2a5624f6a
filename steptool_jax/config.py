"""The configuration: every field with its meaning, unit and default.

The dataclasses below are the only source. `base_config` turns them into a ConfigDict for
configs/*.py and the command line (`--config.a.b=value`), `validate` turns it back, once, into
frozen dataclasses. Below main, config and run nobody sees a ConfigDict.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from steptool_jax.learning.advantages import LEVELS
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.learning.losses import AGGREGATIONS


def _is(default: Any, meaning: str) -> Any:
  metadata = {"meaning": meaning}
  if dataclasses.is_dataclass(default):
    return dataclasses.field(default_factory=type(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Shape of a model with random weights; read only where model.path is empty."""

  family: str = _is("llama", "llama, qwen2 or qwen3")
  vocab_size: int = _is(1024, "tokens; the compact tokenizer is trained to this size")
  hidden_size: int = _is(128, "width")
  intermediate_size: int = _is(384, "width of the MLP")
  num_layers: int = _is(4, "layers")
  num_heads: int = _is(4, "query heads")
  num_kv_heads: int = _is(2, "key-value heads")
  head_dim: int = _is(32, "width of a head")
  rope_theta: float = _is(10000.0, "base of the rotary frequencies")
  tie_embeddings: bool = _is(True, "the output projection is the embedding")


@dataclasses.dataclass(frozen=True)
class Model:
  path: str = _is(
    "",
    "Hugging Face directory, .gguf file, or 'asset:quickstart'; empty = random weights of "
    "`architecture`",
  )
  tokenizer: str = _is(
    "", "tokenizer directory; empty = model.path; 'compact' trains one on the training tasks"
  )
  number_digits: int = _is(
    1, "tokenizer 'compact': longest run of digits that is one token, 1 to 3"
  )
  chat_format: str = _is("auto", "auto, toolllama, chatml_react, llama31, hermes or compact")
  system: str = _is("", "task description in the system turn; empty = the chat format's own")
  dtype: str = _is("float32", "compute: float32 or bfloat16 (norms, log-probs stay float32)")
  param_dtype: str = _is("float32", "storage of parameters and optimizer moments")
  remat: str = _is("none", "what the backward pass recomputes: none, dots or full")
  architecture: Architecture = _is(Architecture(), "shape of a model with random weights")


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int = _is(0, "rank of the adapters; 0 = full fine-tuning")
  alpha: float = _is(16.0, "adapters are scaled by alpha / rank")
  targets: tuple[str, ...] = _is(
    ("q", "k", "v", "o", "gate", "up", "down"), "projections with an adapter"
  )


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  data: int = _is(-1, "copies of the parameters; -1 = all devices that are left")
  fsdp: int = _is(1, "ways that parameters and rows are sharded")
  tensor: int = _is(1, "ways that heads, MLP and vocabulary are sharded")


@dataclasses.dataclass(frozen=True)
class Faults:
  """Probability per call of each injected fault."""

  rate_limit: float = _is(0.0, "too many requests")
  timeout: float = _is(0.0, "time-out, without the wait")
  transient: float = _is(0.0, "unavailable, a retry works")
  not_found: float = _is(0.0, "not found, with a hint at the way out")
  max_consecutive: int = _is(2, "faults in a row, so that retrying gets through")
  seed: int = _is(0, "seed of the injector, apart from all others")


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """An OpenAI-compatible chat endpoint."""

  base_url: str = _is("", "http://host:port/v1; empty = none")
  model: str = _is("", "model that the endpoint serves")
  api_key_variable: str = _is("", "NAME of the environment variable with the key; empty = no key")
  timeout: float = _is(60.0, "seconds for one attempt")
  retries: int = _is(3, "further attempts, with growing pauses")
  in_flight: int = _is(64, "requests at the same time")
  cache: str = _is("", "folder that keeps replies by their content; empty = none")
  prompt_price: float = _is(0.0, "USD per million prompt tokens")
  completion_price: float = _is(0.0, "USD per million completion tokens")


@dataclasses.dataclass(frozen=True)
class Simulator:
  """How API calls are answered: cache, then http, then llm; at least one of them."""

  cache: str = _is("", "official tool_response_cache folder, only read; empty = none")
  writable_cache: str = _is("", "folder that keeps what http and llm answered; empty = none")
  http: str = _is("", "full address of a server, http://host:8080/virtual; empty = none")
  http_timeout: float = _is(60.0, "seconds for one attempt")
  http_retries: int = _is(4, "further attempts, with growing pauses")
  http_in_flight: int = _is(64, "requests at the same time")
  toolbench_key_variable: str = _is("", "NAME of the environment variable with the server's key")
  llm: Endpoint = _is(Endpoint(), "model that simulates answers")
  llm_style: str = _is("gpt", "gpt (any chat model) or mirror (a trained MirrorAPI)")


@dataclasses.dataclass(frozen=True)
class ToolBench:
  folder: str = _is("", "StableToolBench folder with solvable_queries/")
  subsets: tuple[str, ...] = _is(("G1_instruction",), "held-out subsets")
  train_subsets: tuple[str, ...] = _is((), "subsets to train on, in the same layout")
  ids: tuple[str, ...] = _is((), "held-out query ids; empty = all")
  tools: str = _is("", "folder of the tool environment; empty = the query files' descriptions")
  prompt: str = _is(
    "", "text file of the system prompt, with {tools} and {apis} or {names}; empty = our own"
  )


@dataclasses.dataclass(frozen=True)
class Judge:
  """Who says whether an answer of ToolBench solves the query; kind llm also annotates steps."""

  kind: str = _is("rule", "rule (offline; right on about four of five answers) or llm")
  runs: int = _is(3, "times that an llm judges each answer; its noise is told by them")
  endpoint: Endpoint = _is(Endpoint(), "kind llm: the judge")


@dataclasses.dataclass(frozen=True)
class Environment:
  name: str = _is("nested_api", "nested_api, data_pipeline, toolbench or custom")
  num_train: int = _is(5000, "generated training tasks")
  num_heldout: int = _is(400, "generated held-out tasks")
  seed: int = _is(0, "seed of the task generator")
  min_calls: int = _is(2, "fewest gold calls of a task")
  max_calls: int = _is(5, "most gold calls of a task")
  tools_per_task: int = _is(0, "tools offered in a task, its own among them; 0 = all")
  functions: str = _is("", "custom: module or .py file with the tools")
  mcp: tuple[str, ...] = _is(
    (), "custom: instead of functions, an MCP server: the words of its command, or its one http url"
  )
  tasks: str = _is("", "custom: JSONL file with the tasks")
  heldout_share: float = _is(0.2, "custom: share of tasks without a split field held out")
  toolbench: ToolBench = _is(ToolBench(), "toolbench: queries")
  faults: Faults = _is(Faults(), "injected faults, in training and evaluation")


@dataclasses.dataclass(frozen=True)
class Search:
  """Tree search (DFSDT)."""

  width: int = _is(2, "children of a node")
  answer_back: int = _is(2, "levels to go up behind an answer")
  give_up_back: int = _is(2, "levels to go up behind giving up")
  room: int = _is(512, "tokens of a slot beyond max_tokens, for the prompts that ask to differ")


@dataclasses.dataclass(frozen=True)
class Rollout:
  strategy: str = _is("chain", "chain, or in --mode=evaluate also dfsdt (tree search)")
  budget: int = _is(
    0, "LLM calls that --mode=evaluate spends on a task, by any strategy; 0 = max_steps"
  )
  search: Search = _is(Search(), "strategy dfsdt")
  tasks: int = _is(16, "tasks in one iteration")
  samples: int = _is(4, "conversations per task")
  slots: int = _is(64, "conversations decoded at the same time")
  max_tokens: int = _is(512, "tokens of a conversation, prompt and observations included")
  max_steps: int = _is(8, "LLM calls in a conversation")
  max_step_tokens: int = _is(64, "sampled tokens of one call")
  max_invalid: int = _is(3, "invalid calls in a row that end a conversation")
  max_observation_chars: int = _is(1024, "characters of an observation; the rest is cut")
  decode_chunk: int = _is(32, "tokens that one decode call samples at most")
  temperature: float = _is(1.0, "of sampling, and of all log-probs in the update")
  top_k: int = _is(0, "0 = off")
  top_p: float = _is(1.0, "1 = off")
  tool_timeout: float = _is(
    10.0, "seconds for one tool call (toolbench: the simulators' own time-outs count instead)"
  )
  tool_workers: int = _is(8, "tool calls at the same time")
  tool_retries: int = _is(2, "retries of a call that failed for infrastructure reasons")
  max_stuck_tools: int = _is(16, "hanging calls that are left behind before the run stops")


@dataclasses.dataclass(frozen=True)
class Rewards:
  alpha: float = _is(1.0, "weight of SuccCalling against Contribution")
  normalization: str = _is(
    "mean", "'mean' divides intermediate rewards by their number; 'none' as in the paper"
  )


@dataclasses.dataclass(frozen=True)
class Advantage:
  gamma: float = _is(0.99, "discount per step (level step) or token")
  lam: float = _is(0.95, "lambda of GAE")
  level: str = _is("", "step, token or released; empty = as the algorithm says")
  broadcast: bool = _is(True, "level step: one advantage for all tokens of a step (the paper)")
  whiten: bool = _is(True, "mean 0 and deviation 1 over the global batch")


@dataclasses.dataclass(frozen=True)
class Loss:
  clip_low: float = _is(0.2, "lower clip of the ratio")
  clip_high: float = _is(0.2, "upper clip of the ratio")
  value_clip: float = _is(0.2, "clip of the value around the old one")
  value_coef: float = _is(0.1, "weight of the value loss")
  entropy_coef: float = _is(0.0, "weight of the entropy bonus")
  kl: str = _is("reward", "per-token KL to the reference: in the 'reward', the 'loss' or 'none'")
  kl_coef: float = _is(0.05, "coefficient of the KL penalty (start value if adaptive)")
  kl_adaptive: bool = _is(False, "move the coefficient towards kl_target")
  kl_target: float = _is(6.0, "nats per trajectory")
  kl_horizon: float = _is(10000.0, "trajectories")
  aggregation: str = _is("token", "what weighs the same: every token, step or trajectory")
  logprob_chunk: int = _is(128, "positions of a row projected to the vocabulary at a time")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float = _is(1e-5, "peak learning rate of AdamW")
  muon_rate: float = _is(
    0.0, "above 0: the layers' kernels by Muon with this peak rate; for training from scratch"
  )
  schedule: str = _is("constant", "behind the warm-up: constant, linear or cosine (to 0)")
  warmup: float = _is(0.0, "share of the steps that warm up")
  b1: float = _is(0.9, "decay of the first moment")
  b2: float = _is(0.999, "decay of the second moment")
  eps: float = _is(1e-8, "epsilon")
  weight_decay: float = _is(0.0, "decoupled weight decay")
  max_grad_norm: float = _is(1.0, "clip of the gradient's global norm; 0 = off")


@dataclasses.dataclass(frozen=True)
class Sft:
  """Supervised warm-up on demonstrations, before RL (or alone: algorithm sft)."""

  steps: int = _is(0, "optimizer steps; 0 = no warm-up")
  tasks: int = _is(0, "training tasks whose demonstrations are used; 0 = all")
  mistakes: float = _is(0.0, "share of actions that an imperfect demonstrator gets wrong")
  batch: int = _is(16, "demonstrations in one optimizer step")
  micro_rows: int = _is(8, "packed rows in one forward pass")
  checkpoint_every: int = _is(0, "optimizer steps between checkpoints; 0 = at the end only")
  optimizer: Optimizer = _is(Optimizer(), "optimizer of the warm-up")


@dataclasses.dataclass(frozen=True)
class Train:
  iterations: int = _is(100, "rollout and update rounds of RL (offline: see data.passes)")
  epochs: int = _is(1, "passes over each rollout batch")
  minibatches: int = _is(1, "optimizer steps in one pass")
  micro_rows: int = _is(8, "packed rows in one forward pass (gradients are accumulated)")
  row_tokens: int = _is(512, "tokens of a packed row, at least rollout.max_tokens")
  max_skipped: int = _is(5, "non-finite updates in a row that stop the run")
  export: bool = _is(False, "write WORKDIR/export (Hugging Face) at the end")
  optimizer: Optimizer = _is(Optimizer(), "optimizer of RL")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  every: int = _is(10, "RL iterations between evaluations; 0 = at start and end only")
  tasks: int = _is(200, "held-out tasks at start and end; 0 = no evaluation in training")
  curve_tasks: int = _is(100, "held-out tasks of the evaluations between")
  temperature: float = _is(0.0, "0 = greedy")
  attempts: int = _is(
    1, "--mode=evaluate: chains of a task until one answers and while budget is left (CoT@n)"
  )
  rollouts: int = _is(1, "--mode=evaluate: repetitions; their variance is told from the judge's")
  against: str = _is(
    "", "--mode=evaluate, toolbench: WORKDIR of another evaluation, for the win rate over it"
  )
  stored: str = _is("", "--mode=evaluate: only aggregate this folder of stored runs, no model")


@dataclasses.dataclass(frozen=True)
class Serve:
  """--mode=serve: the simulator as a server of POST /virtual."""

  host: str = _is("127.0.0.1", "address to listen on")
  port: int = _is(8080, "0 = any free one")


@dataclasses.dataclass(frozen=True)
class Data:
  """Offline training: stored trajectories take the place of rollouts."""

  path: str = _is(
    "", "file, or pattern such as 'data/*/rows.csv', of stored trajectories; empty = rollouts"
  )
  format: str = _is("jsonl", "jsonl (annotated.jsonl) or tsv (official step-grained rows)")
  passes: int = _is(5, "passes over the data; with data.batch they decide the iterations")
  batch: int = _is(8, "trajectories of one iteration")
  behaviour: str = _is(
    "start",
    "policy that old log-probs are of: 'start' (recorded, else of the policy before training) or "
    "'current' (of the policy at each batch, as the release)",
  )


@dataclasses.dataclass(frozen=True)
class Annotate:
  """Input and source of --mode=annotate."""

  input: str = _is("", "file, or pattern, of trajectories without rewards")
  format: str = _is("jsonl", "of the input: jsonl, converted or annotations (official files)")
  source: str = _is("rules", "of SC, Con and IsSolved: rules, judge or table")
  rule: str = _is(
    "evidence", "source rules: evidence or lcs (texts), environment (its tasks; jsonl only)"
  )
  table: str = _is("", "source table: official annotations; empty = the input's own")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = _is(10, "RL iterations between checkpoints")
  keep: int = _is(2, "newest checkpoints that are kept")


@dataclasses.dataclass(frozen=True)
class Bench:
  """Sizes of --mode=bench."""

  hidden_size: int = _is(768, "width of the update benchmark's model")
  num_layers: int = _is(4, "its layers")
  vocab_size: int = _is(2048, "its vocabulary")
  trajectories: int = _is(8, "trajectories in its batch")
  tokens: int = _is(512, "tokens of each")
  repeats: int = _is(5, "timed repetitions; the median counts")
  turns: int = _is(6, "turns of the engine benchmark")


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = _is(0, "of weights, sampling and task order")
  algorithm: str = _is("steptool", "a row of learning/algorithms.py")
  compilation_cache: str = _is("", "folder that keeps compiled programs; empty = none")
  model: Model = _is(Model(), "the policy")
  lora: Lora = _is(Lora(), "adapters")
  mesh: MeshAxes = _is(MeshAxes(), "devices")
  environment: Environment = _is(Environment(), "tasks and tools")
  simulator: Simulator = _is(Simulator(), "answers of ToolBench's APIs")
  judge: Judge = _is(Judge(), "verdicts on ToolBench answers")
  rollout: Rollout = _is(Rollout(), "conversations")
  rewards: Rewards = _is(Rewards(), "step rewards")
  advantage: Advantage = _is(Advantage(), "GAE")
  loss: Loss = _is(Loss(), "loss terms")
  sft: Sft = _is(Sft(), "supervised warm-up")
  train: Train = _is(Train(), "RL")
  evaluation: Evaluation = _is(Evaluation(), "held-out evaluation")
  data: Data = _is(Data(), "offline training")
  annotate: Annotate = _is(Annotate(), "annotation of stored trajectories")
  serve: Serve = _is(Serve(), "simulator server")
  checkpoint: Checkpoint = _is(Checkpoint(), "checkpoints")
  bench: Bench = _is(Bench(), "benchmarks")


def base_config() -> ml_collections.ConfigDict:
  """All fields at their defaults, for configs/*.py to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def validate(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """ConfigDict (or nested mapping) -> frozen Config.

  Raises:
    ValueError: an unknown field (names the nearest valid one), a wrong type or a value that makes
      no sense, each with the field's full name.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  checked = _build(Config, config, "config")
  _check(checked)
  return checked


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
  """Names of fields whose value is not that of a saved config (a parsed to_json)."""
  mine = _flatten(json.loads(to_json(config)))
  theirs = _flatten(saved)
  return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))


def check_name(name: str) -> None:
  """ValueError, with the nearest valid one, for a field that does not exist ("rollout.taks")."""
  names = _flatten(dataclasses.asdict(Config()))
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise ValueError(f"config.{name}: no such field; did you mean config.{near[0]}?")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
      hint = f"; did you mean {path}.{near[0]}?" if near else f"; valid: {', '.join(fields)}"
      raise ValueError(f"{path}.{name}: no such field{hint}")
  defaults = cls()
  out = {}
  for name in fields:
    default = getattr(defaults, name)
    value = values.get(name, default)
    where = f"{path}.{name}"
    if dataclasses.is_dataclass(default):
      if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
      if not isinstance(value, Mapping):
        raise ValueError(f"{where}: a group of fields is needed, found {value!r}")
      out[name] = _build(type(default), value, where)
    else:
      out[name] = _typed(default, value, where)
  return cls(**out)


def _typed(default: Any, value: Any, where: str) -> Any:
  kind = type(default)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if type(value) is not kind:
    raise ValueError(f"{where}: {kind.__name__} is needed, found {type(value).__name__} {value!r}")
  if kind is float and not math.isfinite(value):
    raise ValueError(f"{where}: must be finite, found {value!r}")
  if kind is tuple and not all(isinstance(entry, str) for entry in value):
    raise ValueError(f"{where}: a tuple of strings is needed, found {value!r}")
  return value


_POSITIVE = (
  "rollout.tasks rollout.samples rollout.slots rollout.max_tokens rollout.max_steps "
  "rollout.max_step_tokens rollout.max_invalid rollout.max_observation_chars rollout.decode_chunk "
  "rollout.tool_timeout rollout.tool_workers sft.batch sft.micro_rows train.epochs "
  "train.minibatches train.micro_rows train.row_tokens train.max_skipped loss.logprob_chunk "
  "loss.kl_target loss.kl_horizon checkpoint.every checkpoint.keep train.optimizer.learning_rate "
  "rollout.temperature sft.optimizer.learning_rate evaluation.curve_tasks "
  "bench.repeats bench.turns environment.faults.max_consecutive simulator.http_timeout "
  "simulator.http_in_flight simulator.llm.timeout simulator.llm.in_flight judge.runs "
  "judge.endpoint.timeout judge.endpoint.in_flight rollout.search.width "
  "rollout.search.answer_back rollout.search.give_up_back evaluation.attempts evaluation.rollouts "
  "data.passes data.batch"
).split()
_NOT_NEGATIVE = (
  "seed lora.rank sft.steps sft.tasks train.iterations evaluation.every evaluation.temperature "
  "rollout.top_k rewards.alpha loss.kl_coef loss.value_coef sft.checkpoint_every "
  "train.optimizer.max_grad_norm sft.optimizer.max_grad_norm train.optimizer.muon_rate "
  "sft.optimizer.muon_rate environment.tools_per_task "
  "rollout.tool_retries rollout.max_stuck_tools loss.clip_low loss.clip_high loss.value_clip "
  "simulator.http_retries simulator.llm.retries simulator.llm.prompt_price "
  "simulator.llm.completion_price judge.endpoint.retries judge.endpoint.prompt_price "
  "judge.endpoint.completion_price rollout.budget rollout.search.room serve.port "
  "evaluation.tasks"
).split()
_SHARES = (
  "sft.mistakes environment.faults.rate_limit environment.faults.timeout "
  "environment.faults.transient environment.faults.not_found environment.heldout_share "
  "advantage.gamma advantage.lam rollout.top_p train.optimizer.warmup sft.optimizer.warmup"
).split()
_CHOICES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "dots", "full"),
  "model.chat_format": ("auto", "toolllama", "chatml_react", "llama31", "hermes", "compact"),
  "environment.name": ("nested_api", "data_pipeline", "toolbench", "custom"),
  "simulator.llm_style": ("gpt", "mirror"),
  "rollout.strategy": ("chain", "dfsdt"),
  "rewards.normalization": ("mean", "none"),
  "advantage.level": ("", *LEVELS),
  "loss.kl": ("reward", "loss", "none"),
  "loss.aggregation": AGGREGATIONS,
  "data.format": ("jsonl", "tsv"),
  "data.behaviour": ("start", "current"),
  "annotate.format": ("jsonl", "converted", "annotations"),
  "annotate.source": ("rules", "judge", "table"),
  "annotate.rule": ("evidence", "lcs", "environment"),
  "judge.kind": ("rule", "llm"),
  "train.optimizer.schedule": ("constant", "linear", "cosine"),
  "sft.optimizer.schedule": ("constant", "linear", "cosine"),
}


def _check(config: Config) -> None:
  flat = _flatten(dataclasses.asdict(config))
  for name in _POSITIVE:
    if not flat[name] > 0:
      raise ValueError(f"config.{name}: must be above 0, found {flat[name]!r}")
  for name in _NOT_NEGATIVE:
    if not flat[name] >= 0:
      raise ValueError(f"config.{name}: must not be negative, found {flat[name]!r}")
  for name in _SHARES:
    if not 0 <= flat[name] <= 1:
      raise ValueError(f"config.{name}: must be in [0, 1], found {flat[name]!r}")
  for name, valid in _CHOICES.items():
    if flat[name] not in valid:
      near = difflib.get_close_matches(str(flat[name]), valid, n=1)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      raise ValueError(
        f"config.{name}: {flat[name]!r} is not one of {', '.join(map(repr, valid))}{hint}"
      )
  algorithm = get_algorithm(config.algorithm)
  if algorithm.rewards == "none" and not config.sft.steps:
    raise ValueError(
      f"config.sft.steps: 0, but algorithm {config.algorithm!r} learns from demonstrations only; "
      "set it above 0"
    )
  if algorithm.rewards == "none" and config.data.path:
    raise ValueError(
      f"config.data.path: algorithm {config.algorithm!r} learns from demonstrations of the "
      "environment's tasks; stored trajectories are for an algorithm with rewards"
    )
  if config.rollout.max_tokens > config.train.row_tokens:
    raise ValueError(
      f"config.train.row_tokens: {config.train.row_tokens} is less than rollout.max_tokens = "
      f"{config.rollout.max_tokens}; a conversation must fit a packed row"
    )
  if config.rollout.top_p == 0:
    raise ValueError("config.rollout.top_p: must be above 0; 1 = off")
  _check_environment(config)
  _check_evaluation(config)


def _check_environment(config: Config) -> None:
  c = config.environment
  if c.name == "custom":
    for name, value in (("functions", c.functions or c.mcp), ("tasks", c.tasks)):
      if not value:
        raise ValueError(f"config.environment.{name}: a file is needed for environment 'custom'")
    if c.functions and c.mcp:
      raise ValueError("config.environment.mcp: set together with functions; give one of the two")
  elif c.mcp:
    raise ValueError(f"config.environment.mcp: is for environment 'custom', not {c.name!r}")
  if c.name == "toolbench":
    for name in ("folder", "subsets"):
      if not getattr(c.toolbench, name):
        raise ValueError(
          f"config.environment.toolbench.{name}: is empty, needed for environment 'toolbench'"
        )


def _check_evaluation(config: Config) -> None:
  e = config.evaluation
  if e.against and config.environment.name != "toolbench":
    raise ValueError(
      "config.evaluation.against: a win rate needs a judge, so environment 'toolbench'; leave it "
      "empty"
    )
  if config.rollout.strategy == "dfsdt" and e.attempts > 1:
    raise ValueError(
      f"config.evaluation.attempts: {e.attempts}, but 'dfsdt' searches a task once; set it to 1, "
      "and rollout.budget to what the search may spend"
    )
  for name, value in (("attempts", e.attempts), ("rollouts", e.rollouts)):
    if value > 1 and not e.temperature:
      raise ValueError(
        f"config.evaluation.{name}: {value}, but at temperature 0 all are the same; set "
        "evaluation.temperature above 0"
      )
