"""The configuration: every field with its meaning, unit and default.

The dataclasses below are the only source. `base_config` turns them into a ConfigDict for
configs/*.py and the command line (`--config.a.b=value`), validation.py turns it back, once, into
frozen dataclasses. Below main, config and run nobody sees a ConfigDict.
"""

import dataclasses
from typing import Any

import ml_collections


def _is(default: Any, meaning: str) -> Any:
  metadata = {"meaning": meaning}
  if dataclasses.is_dataclass(default):
    return dataclasses.field(default_factory=type(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Shape of a model with random weights, where model.path is empty; and of the model that
  --mode=compile compiles, where model.path is not here."""

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
  remat: str = _is(
    "none",
    "what the backward pass recomputes: none, dots (all but matrix products), attention (all but "
    "attention) or full",
  )
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
class Market:
  """Prices, latencies, specialists and the user's wishes, drawn per task (ToolOrchestra)."""

  prices: bool = _is(False, "calls have a price and a simulated latency; off = no market at all")
  spread: float = _is(2.0, "a task's prices lie within this factor of the usual ones, at least 1")
  specialists: tuple[str, ...] = _is(
    (), "models offered as tools ask_…, of small, medium, large; a task has one or more"
  )
  asked: float = _is(
    0.0, "share of demonstrations that ask a specialist, where one question is the task"
  )
  preferences: bool = _is(False, "queries say what their user wants: cheap, quick, a specialist")
  seed: int = _is(0, "seed of all these draws and of the specialists' mistakes")


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
  market: Market = _is(Market(), "what calls cost")


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
    10.0,
    "seconds for one tool call, for opening and for grading a conversation (toolbench: the "
    "simulators' own time-outs count instead); what hangs is left behind, but Python cannot end it",
  )
  tool_workers: int = _is(8, "tool calls at the same time")
  tool_retries: int = _is(2, "retries of a call that failed for infrastructure reasons")
  max_stuck_tools: int = _is(16, "hanging calls that are left behind before the run stops")


@dataclasses.dataclass(frozen=True)
class Orchestra:
  """Weights P of Eq. 2, in [0, 1]; those that a task's user names stand in their place."""

  outcome: float = _is(1.0, "solved")
  cost: float = _is(0.25, "few USD")
  latency: float = _is(0.25, "few seconds")


@dataclasses.dataclass(frozen=True)
class Filters:
  """What a rollout's groups (the samples of a task) are trained without. ToolOrchestra has all on;
  but a policy that never sees its malformed calls punished has little reason to stop making them.
  """

  min_deviation: float = _is(
    0.0, "groups whose returns have a smaller standard deviation; 0 = off (ToolOrchestra: 0.1)"
  )
  malformed: bool = _is(False, "trajectories with a malformed call")
  unfinished: bool = _is(False, "trajectories that a budget of steps or tokens cut")


@dataclasses.dataclass(frozen=True)
class Rewards:
  alpha: float = _is(1.0, "weight of SuccCalling against Contribution")
  normalization: str = _is(
    "mean", "'mean' divides intermediate rewards by their number; 'none' as in the paper"
  )
  scheme: str = _is(
    "steptool",
    "what the last step earns in training: IsSolved ('steptool') or ToolOrchestra's Eq. 2, alone "
    "('orchestra') or behind step rewards ('orchestra_steps')",
  )
  orchestra: Orchestra = _is(Orchestra(), "schemes 'orchestra' and 'orchestra_steps'")
  filters: Filters = _is(Filters(), "groups and trajectories to leave out")


@dataclasses.dataclass(frozen=True)
class Advantage:
  gamma: float = _is(0.99, "discount per step (level step) or token")
  lam: float = _is(0.95, "lambda of GAE")
  level: str = _is("", "step, token or released; empty = as the algorithm says")
  broadcast: bool = _is(True, "level step: one advantage for all tokens of a step (the paper)")
  whiten: bool = _is(True, "mean 0 and deviation 1 over the global batch; for critics' advantages")
  omega: float = _is(1.0, "gigpo: weight of the step-relative part (Feng et al. 2025: 1)")


@dataclasses.dataclass(frozen=True)
class Loss:
  clip_low: float = _is(0.2, "lower clip of the ratio")
  clip_high: float = _is(0.2, "upper clip of the ratio")
  value_clip: float = _is(0.2, "clip of the value around the old one")
  value_coef: float = _is(0.1, "weight of the value loss (archer: of its critic's losses)")
  entropy_coef: float = _is(0.0, "weight of the entropy bonus")
  kl: str = _is(
    "",
    "per-token KL to the reference: in the 'reward', the 'loss' or 'none'; empty = as the "
    "algorithm says",
  )
  kl_coef: float = _is(0.05, "coefficient of the KL penalty (start value if adaptive)")
  kl_adaptive: bool = _is(False, "move the coefficient towards kl_target")
  kl_target: float = _is(6.0, "nats per trajectory")
  kl_horizon: float = _is(10000.0, "trajectories")
  aggregation: str = _is(
    "", "what weighs the same: every token, step or trajectory; empty = as the algorithm says"
  )
  logprob_chunk: int = _is(128, "positions of a row projected to the vocabulary at a time")


@dataclasses.dataclass(frozen=True)
class Dpo:
  beta: float = _is(0.1, "eto: scale of log(pi / reference) (Song et al. 2024: 0.1)")


@dataclasses.dataclass(frozen=True)
class Archer:
  """ArCHer's critic; the discount is advantage.gamma."""

  tau: float = _is(0.1, "step of the target towards the critic, each update (the authors': 0.1)")
  replay: int = _is(512, "newest past trajectories that are kept")
  batch: int = _is(96, "of them in one iteration, for the Q functions")
  warmup: int = _is(0, "iterations that train the critic alone")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float = _is(1e-5, "peak learning rate of AdamW")
  muon_rate: float = _is(
    0.0, "above 0: the layers' kernels by Muon with this peak rate; for training from scratch"
  )
  schedule: str = _is("constant", "behind the warm-up: constant, linear or cosine")
  floor: float = _is(0.0, "share of the peak rate at which linear and cosine end")
  warmup: float = _is(0.0, "share of the steps that warm up")
  b1: float = _is(0.9, "decay of the first moment")
  b2: float = _is(0.999, "decay of the second moment")
  first_moment: str = _is(
    "", "storage of the first moment: float32 or bfloat16; empty = model.param_dtype"
  )
  eps: float = _is(1e-8, "epsilon")
  weight_decay: float = _is(0.0, "decoupled weight decay")
  max_grad_norm: float = _is(1.0, "clip of the gradient's global norm; 0 = off")


@dataclasses.dataclass(frozen=True)
class Sft:
  """Supervised warm-up on demonstrations, before RL (or alone: algorithm sft)."""

  steps: int = _is(0, "optimizer steps; 0 = no warm-up")
  tasks: int = _is(0, "training tasks whose demonstrations are used; 0 = all")
  mistakes: float = _is(0.0, "share of actions that an imperfect demonstrator gets wrong")
  clean_steps: int = _is(0, "first optimizer steps whose demonstrators make no mistakes")
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
  critic_rate: float = _is(1.0, "learning rate of a critic's heads, in multiples of the policy's")
  optimizer: Optimizer = _is(Optimizer(), "optimizer of RL")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  every: int = _is(10, "RL iterations between evaluations; 0 = at start and end only")
  tasks: int = _is(200, "held-out tasks at start and end; 0 = no evaluation in training")
  curve_tasks: int = _is(100, "held-out tasks of the evaluations between")
  temperature: float = _is(0.0, "0 = greedy")
  greedy: bool = _is(
    False, "--mode=train: evaluate the end greedily as well, where temperature is above 0"
  )
  attempts: int = _is(
    1, "--mode=evaluate: chains of a task until one answers and while budget is left (CoT@n)"
  )
  rollouts: int = _is(1, "--mode=evaluate: repetitions; their variance is told from the judge's")
  against: str = _is(
    "", "--mode=evaluate, toolbench: WORKDIR of another evaluation, for the win rate over it"
  )
  stored: str = _is("", "--mode=evaluate: only aggregate this folder of stored runs, no model")


@dataclasses.dataclass(frozen=True)
class Record:
  """Trajectories that --mode=train keeps in WORKDIR/moments for --mode=report."""

  heldout: int = _is(
    300, "of the held-out evaluations at start, after SFT and at the end; 0 = none"
  )
  train: int = _is(16, "of a training iteration; 0 = none")
  every: int = _is(10, "RL iterations between those that are kept; the last one is, too")


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
  format: str = _is(
    "jsonl",
    "jsonl (annotated.jsonl), tfds (folder of annotate.output=tfds, read by random access), tsv "
    "(official step-grained rows) or dialogues (official SFT, RFT instances; algorithm sft only)",
  )
  passes: int = _is(5, "passes over the data; with data.batch they decide the iterations")
  batch: int = _is(
    8, "trajectories of one iteration; tasks, where an algorithm compares samples of a task"
  )
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
  output: str = _is(
    "jsonl",
    "jsonl (WORKDIR/annotated.jsonl) or tfds (WORKDIR/annotated_trajectories, array_record)",
  )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = _is(10, "RL iterations between checkpoints")
  keep: int = _is(2, "newest checkpoints that are kept")
  keep_best: int = _is(
    1, "checkpoints with the best held-out pass rate, of those evaluated, that are kept besides"
  )
  use: str = _is("newest", "what --mode=evaluate and export read: 'newest' or 'best'")


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
class Report:
  """--mode=report, and the page that --mode=study writes."""

  trajectories: int = _is(5000, "trajectories in the page at most, shared out by moments and cells")


@dataclasses.dataclass(frozen=True)
class Study:
  """--mode=study: a grid of training runs. Read by the study alone, its cells have none of it."""

  cells: tuple[str, ...] = _is(
    (), "'group/environment/method: seeds=N field=value …' each; the fields change this config"
  )
  only: tuple[str, ...] = _is((), "patterns of cells to run, as 'core/*/steptool/0'; empty = all")
  parallel: int = _is(1, "cells at the same time")
  cores: int = _is(0, "cores of a cell, its own; 0 = all")
  hours: float = _is(0.0, "after which the study stops, to go on with the same command; 0 = never")
  attempts: int = _is(2, "after which a cell that fails is given up")


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
  dpo: Dpo = _is(Dpo(), "algorithm eto")
  archer: Archer = _is(Archer(), "algorithm archer")
  sft: Sft = _is(Sft(), "supervised warm-up")
  train: Train = _is(Train(), "RL")
  evaluation: Evaluation = _is(Evaluation(), "held-out evaluation")
  record: Record = _is(Record(), "trajectories that training keeps")
  data: Data = _is(Data(), "offline training")
  annotate: Annotate = _is(Annotate(), "annotation of stored trajectories")
  serve: Serve = _is(Serve(), "simulator server")
  checkpoint: Checkpoint = _is(Checkpoint(), "checkpoints")
  bench: Bench = _is(Bench(), "benchmarks")
  report: Report = _is(Report(), "report")
  study: Study = _is(Study(), "study")


def base_config() -> ml_collections.ConfigDict:
  """All fields at their defaults, for configs/*.py to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))
