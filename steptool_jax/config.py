"""The configuration: every field with its meaning, unit and default.

The dataclasses below are the only source. `base_config` turns them into a ConfigDict for
configs/*.py and the command line (`--config.a.b=value`), validation.py turns it back, once, into
frozen dataclasses. Below main, config and run nobody sees a ConfigDict.
"""

import dataclasses
from typing import Any

import ml_collections

INT_MOST = 2**31 - 1
FLOAT_MOST = 1e9
_DAY_S = 86_400.0  # more overflows the clocks that wait for calls


def option(
  default: Any,
  meaning: str,
  *,
  above: float | None = None,
  least: float | None = None,
  most: float | None = None,
  below: float | None = None,
  choices: str | tuple[str, ...] = (),
) -> Any:
  """A field with all that there is to say about it; validation.py checks the bounds and choices.

  Without `most`, numbers stay where int32 and float32 can hold them.
  choices: of the value, besides its default, or of each entry of a tuple; a text is the name of one
  of validation.TABLES, whose keys they are. A group of options has a meaning only.
  """
  if most is None:
    most = {int: INT_MOST, float: FLOAT_MOST}.get(type(default))
  metadata = {"meaning": meaning, "choices": choices}
  metadata |= {"above": above, "least": least, "most": most, "below": below}
  if dataclasses.is_dataclass(default):
    return dataclasses.field(default_factory=type(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Shape of a model with random weights, where model.path is empty; and of the model that
  --mode=compile compiles, where model.path is not here."""

  family: str = option("llama", "how the layers differ", choices="model families")
  vocab_size: int = option(
    1024, "tokens; the compact tokenizer is trained to this size", least=2, most=2**24
  )
  hidden_size: int = option(128, "width", above=0, most=2**18)
  intermediate_size: int = option(384, "width of the MLP", above=0, most=2**20)
  num_layers: int = option(4, "layers", above=0, most=2048)
  num_heads: int = option(4, "query heads", above=0, most=4096)
  num_kv_heads: int = option(2, "key-value heads; a divisor of num_heads", above=0, most=4096)
  head_dim: int = option(32, "width of a head, even", least=2, most=4096)
  rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0, most=1e12)
  sliding_window: int = option(
    512, "tokens; what most layers of gemma3_text see", above=0, most=2**30
  )
  num_experts: int = option(0, "of qwen3_moe, intermediate_size wide each", least=0, most=2**16)
  experts_per_token: int = option(0, "of qwen3_moe", least=0, most=2**16)
  tie_embeddings: bool = option(True, "the output projection is the embedding")


@dataclasses.dataclass(frozen=True)
class Model:
  path: str = option(
    "",
    "Hugging Face directory, .gguf file, 'asset:quickstart' or 'asset:own_tools'; empty = random "
    "`architecture`",
  )
  tokenizer: str = option(
    "", "directory; empty = model.path; 'compact' trains one on the training tasks"
  )
  chat_format: str = option(
    "auto", "layout of a conversation; auto = by the tokenizer", choices="chat formats"
  )
  tool_list: str = option(
    "json",
    "how prompts list tools: schemas, or a line each that costs a fraction (not in 'compact')",
    choices="tool lists",
  )
  parallel_calls: bool = option(
    False, "a turn may have several calls, which are made side by side (chat format 'hermes')"
  )
  thinking: str = option(
    "kept",
    "<think> blocks of earlier turns: stay in history; go when the user speaks again ('template', "
    "as Qwen3's own); or go at once ('stripped'), so that a turn sees none but its own",
    choices="thinking",
  )
  system: str = option("", "task description in the system turn; empty = the chat format's own")
  dtype: str = option("float32", "compute; norms and log-probs stay float32", choices="dtypes")
  param_dtype: str = option(
    "float32", "parameters; adapters and heads are float32", choices="dtypes"
  )
  remat: str = option(
    "none",
    "what the backward pass recomputes; dots: all but matrix products, attention: all but it",
    choices="remat policies",
  )
  architecture: Architecture = option(Architecture(), "shape of a model with random weights")


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int = option(0, "rank of the adapters; 0 = full fine-tuning", least=0, most=2**16)
  alpha: float = option(16.0, "adapters are scaled by alpha / rank", above=0)
  targets: tuple[str, ...] = option(
    ("q", "k", "v", "o", "gate", "up", "down"), "what has an adapter", choices="adapter targets"
  )


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  data: int = option(-1, "copies of the parameters; -1 = all devices that are left", least=-1)
  fsdp: int = option(1, "ways that parameters and rows are sharded", least=-1)
  tensor: int = option(1, "ways that heads, MLP and vocabulary are sharded", least=-1)


@dataclasses.dataclass(frozen=True)
class Faults:
  """Probability per call of each injected fault."""

  rate_limit: float = option(0.0, "too many requests", least=0, most=1)
  timeout: float = option(0.0, "time-out, without the wait", least=0, most=1)
  transient: float = option(0.0, "unavailable, a retry works", least=0, most=1)
  not_found: float = option(0.0, "not found, with a hint at the way out", least=0, most=1)
  max_consecutive: int = option(2, "faults in a row, so that retrying gets through", above=0)
  seed: int = option(0, "seed of the injector, apart from all others", least=0)


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """An OpenAI-compatible chat endpoint."""

  base_url: str = option("", "http://host:port/v1; empty = none")
  model: str = option("", "model that the endpoint serves")
  api_key_variable: str = option("", "NAME of the environment variable with the key; empty = none")
  timeout: float = option(60.0, "seconds for one attempt", above=0, most=_DAY_S)
  cache: str = option("", "folder that keeps replies by their content; empty = none")
  prompt_price: float = option(0.0, "USD per million prompt tokens", least=0)
  completion_price: float = option(0.0, "USD per million completion tokens", least=0)


@dataclasses.dataclass(frozen=True)
class Simulator:
  """How API calls are answered: cache, then http, then llm; at least one of them."""

  cache: str = option("", "official tool_response_cache folder, only read; empty = none")
  writable_cache: str = option("", "folder that keeps what http and llm answered; empty = none")
  http: str = option("", "full address of a server, http://host:8080/virtual; empty = none")
  http_timeout: float = option(60.0, "seconds for one attempt", above=0, most=_DAY_S)
  toolbench_key_variable: str = option("", "NAME of the environment variable with the server's key")
  llm: Endpoint = option(Endpoint(), "model that simulates answers")
  llm_style: str = option(
    "gpt", "any chat model, or a trained MirrorAPI", choices=("gpt", "mirror")
  )


@dataclasses.dataclass(frozen=True)
class ToolBench:
  folder: str = option("", "StableToolBench folder with solvable_queries/")
  subsets: tuple[str, ...] = option(("G1_instruction",), "held-out subsets")
  train_subsets: tuple[str, ...] = option((), "subsets to train on, in the same layout")
  ids: tuple[str, ...] = option((), "held-out query ids; empty = all")
  tools: str = option("", "folder of the tool environment; empty = the query files' descriptions")
  prompt: str = option(
    "", "text file of the system prompt, with {tools} and {apis} or {names}; empty = our own"
  )


@dataclasses.dataclass(frozen=True)
class Judge:
  """Who says whether an answer of ToolBench solves the query; kind llm also annotates steps."""

  kind: str = option(
    "rule", "rule: offline, right on four of five answers, not for RL", choices=("rule", "llm")
  )
  runs: int = option(3, "times that an llm judges each answer, to tell its noise", above=0)
  endpoint: Endpoint = option(Endpoint(), "kind llm: the judge")


@dataclasses.dataclass(frozen=True)
class Market:
  """Prices, latencies, specialists and the user's wishes, drawn per task (ToolOrchestra)."""

  prices: bool = option(False, "calls have a price and a simulated latency; off = no market at all")
  spread: float = option(2.0, "a task's prices lie within this factor of the usual ones", least=1)
  specialists: tuple[str, ...] = option(
    (), "models offered as tools ask_…, one or more a task", choices="specialists"
  )
  asked: float = option(0.0, "share of one-question tasks shown with a specialist", least=0, most=1)
  preferences: bool = option(False, "queries say what their user wants: cheap, quick, a specialist")
  seed: int = option(0, "seed of all these draws and of the specialists' mistakes", least=0)


@dataclasses.dataclass(frozen=True)
class Environment:
  name: str = option("nested_api", "where tasks and tools come from", choices="environments")
  num_train: int = option(5000, "generated training tasks; openenv: at most", least=0)
  num_heldout: int = option(400, "generated held-out tasks; openenv: at most", least=0)
  seed: int = option(0, "seed of the task generator; openenv: of its resets", least=0)
  min_calls: int = option(2, "fewest gold calls of a task", above=0)
  max_calls: int = option(5, "most gold calls of a task", above=0)
  tools_per_task: int = option(0, "tools offered in a task, its own among them; 0 = all", least=0)
  functions: str = option(
    "", "custom: module or .py file with the tools; harness: with `async def run`"
  )
  mcp: tuple[str, ...] = option(
    (),
    "custom: an MCP server with the tools: the words of its command, or its one http url; "
    "`functions` is then empty or has checkers only",
  )
  mcp_shared: bool = option(
    False, "one MCP server for all conversations, not one each: only where it keeps no state"
  )
  tasks: str = option("", "custom, harness: JSONL file with the tasks")
  harness_timeout: float = option(
    600.0, "harness, verifiers: seconds for one run of the agent", above=0, most=_DAY_S
  )
  heldout_share: float = option(
    0.2,
    "custom, harness, bfcl, verifiers: share of tasks without a split held out",
    least=0,
    most=1,
  )
  user: Endpoint = option(
    Endpoint(), "custom: the model behind users of type 'model'; tau2: that of its user"
  )
  bfcl: tuple[str, ...] = option(
    ("base", "miss_func", "miss_param", "long_context"),
    "bfcl: categories of its multi-turn part",
    choices=("base", "miss_func", "miss_param", "long_context"),
  )
  tau2: tuple[str, ...] = option(
    ("telecom",), "tau2: its domains", choices=("airline", "retail", "telecom")
  )
  openenv: str = option("", "openenv: address of its server, http://host:8000")
  verifiers: str = option(
    "",
    "verifiers: an installed taskset, or a TOML file with [env] and [select] as its `eval` takes",
  )
  toolbench: ToolBench = option(ToolBench(), "toolbench: queries")
  faults: Faults = option(Faults(), "injected faults, in training and evaluation")
  market: Market = option(Market(), "what calls cost")


@dataclasses.dataclass(frozen=True)
class Search:
  """Tree search (DFSDT)."""

  width: int = option(2, "children of a node", above=0)
  answer_back: int = option(2, "levels to go up after an answer", above=0)
  give_up_back: int = option(2, "levels to go up after giving up", above=0)
  room: int = option(
    512, "tokens of a slot beyond max_tokens, for prompts that ask to differ", least=0
  )


@dataclasses.dataclass(frozen=True)
class Limits:
  """Budgets of one conversation."""

  max_tokens: int = option(512, "its tokens, prompt and observations included", above=0)
  max_steps: int = option(8, "LLM calls", above=0)
  max_step_tokens: int = option(64, "sampled tokens of one call, the stop token included", above=0)
  max_invalid: int = option(3, "invalid calls in a row that end it as GAVE_UP", above=0)
  max_observation_chars: int = option(1024, "longer observations are cut and end in ...", above=0)
  fold: int = option(
    0, "results that stay as they were, the newest; older ones become one line; 0 = all", least=0
  )


@dataclasses.dataclass(frozen=True)
class Http:
  """Rollouts on vLLM servers (engine 'http'; docs/vllm.md)."""

  servers: tuple[str, ...] = option((), "their addresses, http://host:8000")
  key_variable: str = option("", "NAME of the environment variable with their key; empty = none")
  weights: str = option(
    "reload", "sent as a whole, or as a LoRA adapter alone", choices=("reload", "adapter")
  )
  folder: str = option("", "where they are written, as the servers see it; empty = WORKDIR/served")
  timeout: float = option(600.0, "seconds for one request", above=0, most=_DAY_S)
  gap: float = option(
    1.0, "nats that a sampled token's log-prob may be off the trainer's; 0 = any", least=0
  )


@dataclasses.dataclass(frozen=True)
class Rollout(Limits):
  engine: str = option(
    "own", "what samples: the run's own engine, or vLLM", choices=("own", "http")
  )
  http: Http = option(Http(), "engine 'http'")
  strategy: str = option(
    "chain", "dfsdt (tree search): --mode=evaluate only", choices=("chain", "dfsdt")
  )
  budget: int = option(0, "LLM calls that --mode=evaluate spends on a task; 0 = max_steps", least=0)
  search: Search = option(Search(), "strategy dfsdt")
  tasks: int = option(16, "tasks in one iteration", above=0)
  samples: int = option(4, "conversations per task", above=0)
  rounds: int = option(
    1,
    "rollouts in one iteration at most: tasks whose samples are all paid the same are left out, "
    "and others drawn (DAPO's dynamic sampling); 1 = off",
    above=0,
  )
  slots: int = option(64, "conversations decoded at the same time", above=0)
  slot_tokens: int = option(
    0,
    "tokens that a slot holds; a conversation that outgrows its slot goes on in one of long_slots; "
    "0 = max_tokens",
    least=0,
  )
  long_slots: int = option(
    0,
    "slots of max_tokens beside those of slot_tokens; what outgrows its slot waits for a free one",
    least=0,
  )
  tensor: int = option(
    0,
    "ways that heads, MLP and vocabulary are split in rollouts; weights are laid out for it once a "
    "rollout (-1 = as many as devices and key-value heads allow, 0 = as in training)",
    least=-1,
  )
  kv_cache: str = option(
    "auto",
    "numbers that keys and values of past tokens are kept as: auto = model.dtype; int8 takes half "
    "of bfloat16's memory and of its reads, and samples from a policy that is slightly another one "
    "(figures sampler_gap and importance; field correction)",
    choices=("auto", "int8"),
  )
  decode_chunk: int = option(32, "tokens that one decode call samples at most", above=0)
  leave: float = option(
    0.5,
    "share of a decode call's slots whose end ends it, so that their tools run while the others go "
    "on in the next call, with the same tokens; 1 = all of them",
    above=0,
    most=1,
  )
  lag: int = option(
    0,
    "updates that the weights which sample are behind; 1: the next iteration's conversations are "
    "sampled first, and this one's updates run where their tools leave nothing to decode",
    least=0,
    most=1,
  )
  carry: int = option(
    0,
    "LLM calls of a conversation in one iteration; a longer one goes on in the next, with the "
    "weights of then, and is learnt from when all samples of its task have ended; 0 = all end in "
    "the iteration that begins them",
    least=0,
  )
  reuse: float = option(
    0.0,
    "nats by which the sampler's log-probs may be off the trainer's in an iteration's first "
    "micro-batch so that no forward pass computes them again, nor what the critic reads, which the "
    "engine records; above it all are computed, and importance weights correct; 0 = off",
    least=0,
  )
  correction: str = option(
    "token",
    "lag 1, carry, reuse, kv_cache int8, engine http: what has one importance weight, pi / pi when "
    "sampled: a token, or a trajectory ('sequence'); 'none' = no weights",
    choices="importance levels",
  )
  correction_bound: float = option(2.0, "as correction: where importance weights are cut", least=1)
  temperature: float = option(1.0, "of sampling, and of all log-probs in the update", least=1e-4)
  top_k: int = option(0, "0 = off", least=0)
  top_p: float = option(1.0, "1 = off", above=0, most=1)
  tool_timeout: float = option(
    10.0,
    "seconds for one tool call, for opening and for grading a conversation (toolbench: the "
    "simulators' own time-outs count instead); what hangs is left behind, but Python cannot end it",
    above=0,
    most=_DAY_S,
  )
  tool_workers: int = option(8, "tool calls at the same time", above=0)
  tool_retries: int = option(2, "retries of a call that its infrastructure failed", least=0)

  @property
  def stale(self) -> bool:
    """Whether what is learnt from may be of earlier weights, which importance weights correct."""
    return bool(self.lag or self.carry)

  @property
  def corrected(self) -> bool:
    """Whether the sampler's log-probs have a part in what is learnt: those of another policy than
    the one that learns, in importance weights, or those that stand for the trainer's."""
    return self.stale or self.reuse > 0 or self.kv_cache == "int8" or self.engine == "http"


@dataclasses.dataclass(frozen=True)
class Orchestra:
  """Weights P of Eq. 2, in [0, 1]; those that a task's user names stand in their place."""

  outcome: float = option(1.0, "solved", least=0, most=1)
  cost: float = option(0.25, "few USD", least=0, most=1)
  latency: float = option(0.25, "few seconds", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Filters:
  """What a rollout's groups (the samples of a task) are trained without. ToolOrchestra has all on;
  but a policy that never sees its malformed calls punished has little reason to stop making them.
  """

  min_deviation: float = option(
    0.0, "groups whose returns deviate less go; 0 = off (ToolOrchestra: 0.1)", least=0
  )
  malformed: bool = option(False, "trajectories with a malformed call")
  unfinished: bool = option(False, "trajectories that a budget of steps or tokens cut")


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A reward model in the place of the rules, frozen."""

  path: str = option("", "WORKDIR/reward_model that --mode=reward_model wrote")
  watch: int = option(
    10,
    "iterations over which its mean outcome may not rise while the true pass rate falls, where a "
    "checker knows it: that stops the run; 0 = never stops, else at least 2",
    least=0,
  )
  apart: float = option(
    0.1, "by which the two must have moved apart over them for that", least=0, most=1
  )


@dataclasses.dataclass(frozen=True)
class Rewards:
  alpha: float = option(1.0, "weight of SuccCalling against Contribution", least=0)
  source: str = option(
    "progress",
    "what SC and Con of rollouts are made of: what is known at a step ('progress'), or also what "
    "came of it later ('hindsight', which needs `unsafe`); 'model': a reward model, which gives "
    "IsSolved too; 'info_gain': progress, but Con is what a step tells about the gold answer",
    choices="reward sources",
  )
  model: ModelSource = option(ModelSource(), "source 'model'")
  shaping: str = option(
    "progress",
    "how the scores of intermediate steps become rewards; 'sum' is the paper's",
    choices="shapings",
  )
  weight: float = option(1.0, "of intermediate rewards, where a solved task earns 1", least=0)
  turns: float = option(
    1.0, "what a solved turn earns whose answer the user replies to, by its own checker", least=0
  )
  every: int = option(
    1,
    "steps that are paid together, at the last of them; 0 = a whole conversation, at its end",
    least=0,
  )
  spread: bool = option(
    False, "a step's reward in equal parts on its tokens (needs GAE over tokens, or broadcast off)"
  )
  unsafe: bool = option(
    False, "allow rollouts to be paid by what comes later (shaping 'episode_mean', 'hindsight')"
  )
  scheme: str = option(
    "steptool",
    "what the last step earns in training: IsSolved ('steptool') or ToolOrchestra's Eq. 2, alone "
    "('orchestra') or after step rewards ('orchestra_steps')",
    choices="schemes",
  )
  orchestra: Orchestra = option(Orchestra(), "schemes 'orchestra' and 'orchestra_steps'")
  filters: Filters = option(Filters(), "groups and trajectories to leave out")


@dataclasses.dataclass(frozen=True)
class Advantage:
  gamma: float = option(0.99, "discount per step (level step) or token", least=0, most=1)
  lam: float = option(0.95, "lambda of GAE", least=0, most=1)
  level: str = option("", "unit of GAE; empty = as the algorithm says", choices="advantage levels")
  broadcast: bool = option(True, "level step: one advantage for all tokens of a step (the paper)")
  bootstrap: tuple[str, ...] = option(
    (),
    "spent budgets after which a conversation is worth V of what would come next; any other end is "
    "worth 0, as the budgets belong to the graded task",
    choices=("step_budget", "token_budget"),
  )
  whiten: bool = option(
    True,
    "mean 0, deviation 1 over the global batch, under the loss's weights; for critics' advantages",
  )
  omega: float = option(1.0, "gigpo: weight of the step-relative part (the authors': 1)", least=0)


@dataclasses.dataclass(frozen=True)
class Critic:
  """What tells how good the state in front of a step is, for algorithms with GAE."""

  kind: str = option(
    "",
    "value: a head on the policy; group: the task's other samples at the same step; ridge: a "
    "closed form, fitted anew each iteration; empty = as the algorithm says",
    choices="critics",
  )
  penalty: float = option(1.0, "ridge: of the squared weights", above=0)
  folds: int = option(5, "ridge: parts of the tasks, each predicted from the others", least=2)
  normalise: bool = option(
    False, "value: the head predicts returns in deviations from the mean of the batch's"
  )
  passes: int = option(
    1, "value: passes over a batch; all but one come after train.epochs and are the head's", above=0
  )


@dataclasses.dataclass(frozen=True)
class Loss:
  surrogate: str = option(
    "",
    "what the policy's loss makes of the ratio; empty = as the algorithm says",
    choices="surrogates",
  )
  ratio: str = option(
    "",
    "unit that has one ratio to the old policy (GSPO: trajectory, with clips of about 3e-4); empty "
    "= as the algorithm says",
    choices="units",
  )
  clip_low: float = option(0.2, "lower clip of the ratio; cispo has none", least=0, most=1)
  clip_high: float = option(0.2, "upper clip of the ratio", least=0)
  dual_clip: float = option(
    3.0, "surrogate dual_clip: most that a ratio counts where the advantage is negative", above=1
  )
  sapo_positive: float = option(
    1.0, "surrogate sapo: temperature of its gate, advantage above 0", above=0
  )
  sapo_negative: float = option(1.05, "the same, advantage below 0 (the authors': 1.05)", above=0)
  value_clip: float = option(0.2, "clip of the value around the old one", least=0)
  value_coef: float = option(0.1, "weight of the value loss, or of archer's critic losses", least=0)
  entropy_coef: float = option(0.0, "weight of the entropy bonus", least=0)
  kl: str = option(
    "",
    "where the per-token KL to the reference counts; empty = as the algorithm says",
    choices=("reward", "loss", "none"),
  )
  kl_coef: float = option(0.05, "coefficient of the KL penalty (start value if adaptive)", least=0)
  kl_adaptive: bool = option(False, "move the coefficient towards kl_target, if there is a penalty")
  kl_target: float = option(6.0, "nats per trajectory", above=0)
  kl_horizon: float = option(10000.0, "trajectories", above=0)
  aggregation: str = option(
    "",
    "what weighs the same (constant: a token, whatever the length; Dr. GRPO); empty = as the "
    "algorithm says",
    choices="aggregations",
  )
  logprob_chunk: int = option(128, "positions projected to the vocabulary at a time", above=0)


@dataclasses.dataclass(frozen=True)
class Dpo:
  beta: float = option(0.1, "eto: scale of log(pi / reference) (Song et al. 2024: 0.1)", above=0)


@dataclasses.dataclass(frozen=True)
class Archer:
  """ArCHer's double critic (a critic.kind of its own takes its place); the discount is
  advantage.gamma."""

  tau: float = option(
    0.1, "step of the target critic, each update (the authors': 0.1)", above=0, most=1
  )
  replay: int = option(512, "newest past trajectories that are kept", above=0)
  batch: int = option(96, "of them in one iteration, for the Q functions", least=0)
  warmup: int = option(0, "iterations that train the critic's heads alone", least=0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float = option(1e-5, "peak learning rate of AdamW", above=0, most=10)
  muon_rate: float = option(
    0.0, "peak rate of Muon for the layers' kernels (from scratch); 0 = off", least=0, most=10
  )
  schedule: str = option("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
  floor: float = option(0.0, "share of the peak rate at the end of linear, cosine", least=0, most=1)
  warmup: float = option(0.0, "share of the steps that warm up", least=0, most=1)
  b1: float = option(0.9, "decay of the first moment", least=0, below=1)
  b2: float = option(0.999, "decay of the second moment", least=0, below=1)
  first_moment: str = option("", "its storage; empty = that of what is trained", choices="dtypes")
  eps: float = option(1e-8, "epsilon", least=1e-20, most=1)
  weight_decay: float = option(0.0, "decoupled weight decay", least=0, most=1)
  max_grad_norm: float = option(1.0, "clip of the gradient's global norm; 0 = off", least=0)


@dataclasses.dataclass(frozen=True)
class Sft:
  """Supervised warm-up on demonstrations, before RL (or alone: algorithm sft)."""

  steps: int = option(0, "optimizer steps; 0 = no warm-up", least=0)
  tasks: int = option(0, "training tasks whose demonstrations are used; 0 = all", least=0)
  mistakes: float = option(
    0.0, "share of actions that the demonstrator gets wrong", least=0, most=1
  )
  clean_steps: int = option(0, "first optimizer steps without the demonstrator's mistakes", least=0)
  batch: int = option(16, "demonstrations in one optimizer step", above=0)
  micro_rows: int = option(8, "packed rows in one forward pass", above=0)
  checkpoint_every: int = option(
    0, "optimizer steps between checkpoints; 0 = one at the end", least=0
  )
  optimizer: Optimizer = option(Optimizer(), "optimizer of the warm-up")


@dataclasses.dataclass(frozen=True)
class Train:
  iterations: int = option(100, "rounds of rollout and update (offline: see data.passes)", least=0)
  epochs: int = option(1, "passes over each rollout batch", above=0)
  minibatches: int = option(1, "optimizer steps in one pass", above=0)
  micro_rows: int = option(8, "packed rows in one forward pass; gradients are summed", above=0)
  row_tokens: int = option(512, "tokens of a packed row, at least rollout.max_tokens", above=0)
  share_prompts: bool = option(
    True,
    "the prompt of a task's samples is computed once (not by eto and archer); on TPUs this takes "
    "some 11 row_tokens^2 bytes of memory (.7 GiB at 8k, 11.6 at 32k) for each row of a chip",
  )
  max_skipped: int = option(5, "non-finite updates in a row that stop the run", above=0)
  export: bool = option(False, "write WORKDIR/export (Hugging Face) at the end")
  critic_rate: float = option(
    1.0, "learning rate of critics' heads, in multiples of the policy's", above=0
  )
  optimizer: Optimizer = option(Optimizer(), "optimizer of RL")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  every: int = option(10, "RL iterations between evaluations; 0 = at start and end only", least=0)
  tasks: int = option(200, "held-out tasks at start and end; 0 = no evaluation at all", least=0)
  curve_tasks: int = option(100, "held-out tasks of the evaluations between", above=0)
  selection: int = option(
    0,
    "last held-out tasks, which nothing else shows: --mode=train scores checkpoints on them, for "
    "checkpoint.use=best; 0 = no scores",
    least=0,
  )
  temperature: float = option(0.0, "0 = greedy", least=0)
  greedy: bool = option(
    False, "--mode=train: evaluate the end greedily as well, where temperature is above 0"
  )
  samples: int = option(
    1,
    "--mode=train: conversations a task at the start of RL and at its end, for pass@k up to 16 and "
    "tool sequences that the start never sampled; 1 = off",
    above=0,
  )
  sampled_tasks: int = option(40, "samples above 1: the first held-out tasks", above=0)
  attempts: int = option(
    1, "--mode=evaluate: chains until one answers, within the budget (CoT@n)", above=0
  )
  rollouts: int = option(1, "--mode=evaluate: repetitions, for their own variance", above=0)
  against: str = option(
    "", "--mode=evaluate, toolbench: WORKDIR of another evaluation, for the win rate over it"
  )
  stored: str = option("", "--mode=evaluate: only aggregate this folder of stored runs, no model")


@dataclasses.dataclass(frozen=True)
class Record:
  """What is kept of a training: trajectories in WORKDIR/moments for --mode=report, and figures."""

  heldout: int = option(
    300, "of the evaluations at start, after SFT and at the end; 0 = none", least=0
  )
  train: int = option(16, "of a training iteration; 0 = none", least=0)
  every: int = option(10, "RL iterations between those kept; the last one is, too", above=0)
  sinks: tuple[str, ...] = option(
    (),
    "where figures go besides metrics.jsonl and TensorBoard",
    choices=("wandb", "mlflow", "trackio"),
  )
  project: str = option("steptool_jax", "the sinks' project or experiment")


@dataclasses.dataclass(frozen=True)
class Serve:
  """--mode=serve."""

  what: str = option(
    "simulator",
    "simulator of APIs (POST /virtual), or the policy (OpenAI's POST /v1/chat/completions)",
    choices=("simulator", "policy"),
  )
  host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 = every one")
  port: int = option(8080, "0 = any free one", least=0, most=65535)
  key_variable: str = option(
    "", "NAME of the environment variable with the key that clients must send; empty = none"
  )


@dataclasses.dataclass(frozen=True)
class Data:
  """Offline training: stored trajectories take the place of rollouts."""

  path: str = option(
    "", "file, or pattern such as 'data/*/rows.csv', of stored trajectories; empty = rollouts"
  )
  format: str = option(
    "jsonl",
    "annotated.jsonl, the folder of annotate.output=tfds (read by random access), official "
    "step-grained rows (tsv), or official SFT and RFT instances (dialogues; algorithm sft only)",
    choices=("jsonl", "tfds", "tsv", "dialogues"),
  )
  passes: int = option(
    5, "passes over the data; with data.batch they decide the iterations", above=0
  )
  batch: int = option(8, "trajectories (tasks, if samples are compared) of an iteration", above=0)
  behaviour: str = option(
    "start",
    "policy of old log-probs: 'start' (recorded, else of the policy before training) or "
    "'current' (of the policy at each batch, as the release)",
    choices=("start", "current"),
  )


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
  """What rollouts that go on from a state say about the step that led there."""

  samples: int = option(8, "conversations that go on from each state", above=0)
  label: str = option(
    "value",
    "Con of a step: the mean outcome after it, or by how much that is above the one before it",
    choices=("value", "gain"),
  )


@dataclasses.dataclass(frozen=True)
class Annotate:
  """Input and source of --mode=annotate."""

  input: str = option("", "file, or pattern, of trajectories without rewards")
  format: str = option(
    "jsonl", "of the input (others: official files)", choices=("jsonl", "converted", "annotations")
  )
  source: str = option(
    "rules",
    "of SC, Con and IsSolved; monte_carlo: Con by how rollouts that go on from there end",
    choices=("rules", "judge", "table", "monte_carlo"),
  )
  rule: str = option(
    "evidence",
    "source rules: evidence or lcs (texts), environment (its tasks; jsonl only)",
    choices=("evidence", "lcs", "environment"),
  )
  table: str = option("", "source table: official annotations; empty = the input's own")
  monte_carlo: MonteCarlo = option(MonteCarlo(), "source monte_carlo")
  output: str = option(
    "jsonl",
    "WORKDIR/annotated.jsonl, or WORKDIR/annotated_trajectories as array_record (tfds), or "
    "WORKDIR/atif, for other tools (ATIF v1.4)",
    choices=("jsonl", "tfds", "atif"),
  )


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """--mode=reward_model: heads for SC, Con and IsSolved, on the trunk of model.path."""

  data: str = option("", "annotated.jsonl of --mode=annotate, or a pattern of such files")
  heldout: float = option(0.2, "share of the tasks that it is measured on", above=0, below=1)
  passes: int = option(4, "passes over the trajectories of the other tasks", above=0)
  batch: int = option(64, "trajectories of an optimizer step", above=0)
  micro_rows: int = option(8, "packed rows (train.row_tokens) in one forward pass", above=0)
  optimizer: Optimizer = option(Optimizer(), "optimizer of trunk and heads")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = option(10, "RL iterations between checkpoints", above=0)
  keep: int = option(2, "newest checkpoints that are kept", above=0)
  keep_best: int = option(
    1, "best checkpoints by evaluation.selection that are kept besides", least=0
  )
  use: str = option("newest", "what other modes than training read", choices=("newest", "best"))


@dataclasses.dataclass(frozen=True)
class Bench:
  """--mode=bench; its sizes are constants of run/bench.py."""

  repeats: int = option(5, "timed repetitions; the median counts", above=0)


@dataclasses.dataclass(frozen=True)
class Check:
  """--mode=check, and the short check before training on environment 'custom'."""

  tasks: int = option(
    200, "of each split that --mode=check replays, spread evenly over it; 0 = all", least=0
  )
  before_training: int = option(
    24,
    "custom: tasks of each split that are checked before training, which an error stops; 0 = off",
    least=0,
  )
  seconds: float = option(20.0, "after which the check before training begins no task", above=0)


@dataclasses.dataclass(frozen=True)
class Report:
  """--mode=report, and the page that --mode=study writes."""

  trajectories: int = option(5000, "in the page at most, shared out by moments and cells", above=0)


@dataclasses.dataclass(frozen=True)
class Study:
  """--mode=study: a grid of training runs. Read by the study alone, its cells have none of it."""

  cells: tuple[str, ...] = option(
    (), "'group/environment/method: seeds=N field=value …' each; the fields change this config"
  )
  only: tuple[str, ...] = option((), "patterns of cells to run, as core/*/steptool/0; empty = all")
  parallel: int = option(1, "cells at the same time", above=0)
  cores: int = option(0, "cores of a cell, its own; 0 = all", least=0)
  hours: float = option(0.0, "after which the study stops, to be continued; 0 = never", least=0)
  attempts: int = option(2, "after which a cell that fails is given up", above=0)


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = option(0, "of weights, sampling and task order", least=0)
  algorithm: str = option("steptool", "a row of learning/algorithms.py")
  compilation_cache: str = option(
    "auto",
    "folder that keeps compiled programs for the next start; auto = JAX_COMPILATION_CACHE_DIR, or "
    "one in the user's cache folder, of several processes WORKDIR/compiled; none = not kept",
  )
  hang_after: float = option(
    1800.0,
    "seconds without progress in rollout, update or evaluation after which a run ends with a "
    "sentence, to be started again; more than a compilation takes; 0 = never",
    least=0,
  )
  model: Model = option(Model(), "the policy")
  lora: Lora = option(Lora(), "adapters")
  mesh: MeshAxes = option(MeshAxes(), "devices")
  environment: Environment = option(Environment(), "tasks and tools")
  simulator: Simulator = option(Simulator(), "answers of ToolBench's APIs")
  judge: Judge = option(Judge(), "verdicts on ToolBench answers")
  rollout: Rollout = option(Rollout(), "conversations")
  rewards: Rewards = option(Rewards(), "step rewards")
  advantage: Advantage = option(Advantage(), "GAE")
  critic: Critic = option(Critic(), "baseline of GAE")
  loss: Loss = option(Loss(), "loss terms")
  dpo: Dpo = option(Dpo(), "algorithm eto")
  archer: Archer = option(Archer(), "algorithm archer")
  sft: Sft = option(Sft(), "supervised warm-up")
  train: Train = option(Train(), "RL")
  evaluation: Evaluation = option(Evaluation(), "held-out evaluation")
  record: Record = option(Record(), "trajectories that training keeps")
  data: Data = option(Data(), "offline training")
  annotate: Annotate = option(Annotate(), "annotation of stored trajectories")
  reward_model: RewardModel = option(RewardModel(), "training of a step reward model")
  serve: Serve = option(Serve(), "servers")
  checkpoint: Checkpoint = option(Checkpoint(), "checkpoints")
  bench: Bench = option(Bench(), "benchmarks")
  check: Check = option(Check(), "check of tools and tasks")
  report: Report = option(Report(), "report")
  study: Study = option(Study(), "study")


def base_config() -> ml_collections.ConfigDict:
  """All fields at their defaults, for configs/*.py to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))
