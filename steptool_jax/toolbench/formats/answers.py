"""Official answer files of ToolBench / StableToolBench from our trajectories and trees.

    <folder>/<query id>_<method>.json    one answer: all chains or the tree, and the chosen chain

converted.py turns them into the form that evaluators read.
A turn becomes up to three official nodes: Thought, Action, Action Input (which holds the
observation). A malformed turn is a Thought with the error as its observation. Official fields that
nothing here has a value for (Elo, io_state) hold their official defaults.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steptool_jax.dialogue.parser import FINISH, FINISH_TOOL, GIVE_ANSWER, GIVE_UP
from steptool_jax.files import replacing
from steptool_jax.rollout.branching import ROOT
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.strategy import Node, Search, SearchResult
from steptool_jax.simulators.render import shorten
from steptool_jax.toolbench.formats.codes import official_code
from steptool_jax.types import Finish, Malformed, Status, Step, Task, Trajectory

_Json = dict[str, Any]
_FINISHED = {  # gave up -> (official code, observation)
  False: (3, '{"response":"successfully giving the final answer."}'),
  True: (4, '{"response":"chose to give up and restart"}'),
}
_FINISH_SPREAD = 2  # levels above an answer that are marked as finished


def cot_method(samples: int) -> str:
  return f"CoT@{samples}"


def dfs_method(strategy: Search) -> str:
  return f"DFS_woFilter_w{strategy.width}"


def cot_answer(
  task: Task,
  trajectories: Sequence[Trajectory],
  limits: Limits,
  decode: Callable[[np.ndarray], str] | None = None,
) -> _Json:
  """The answer file of CoT@n from n trajectories of one task; the first answer is the chosen one.

  decode: ids -> text, for the text of malformed turns (without it: the reason). ValueError for no
  trajectory, one of another task, and one that ended in an infrastructure error: written down, it
  would be scored as the model's failure; run it again.
  """
  if not trajectories:
    raise ValueError(f"answer of {task.id}: there is no trajectory")
  for trajectory in trajectories:
    _check(task, trajectory)
  writer = _Writer(task, limits, decode)
  answered = [t for t in trajectories if t.status is Status.ANSWERED]
  tries, candidates = [], []
  for trajectory in trajectories:
    chain = [n for step in trajectory.steps for n in writer.nodes(step)]
    for depth, node in enumerate(chain, start=1):
      node |= {"depth": depth, "child_count": int(depth < len(chain))}
    if chain and trajectory.status is not Status.ANSWERED:
      chain[-1]["pruned"] = True
    tries.append({"chain": chain, "win": trajectory.status is Status.ANSWERED})
    candidates += [chain] if trajectory.status is Status.ANSWERED else []
  return {
    "win": bool(answered),
    "try_count": len(tries),
    "trys": tries,
    "compare_candidates": candidates,
    "forward_args": {
      "max_llm_calls": limits.max_steps * len(trajectories),
      "max_chain_llm_calls": limits.max_steps,
      "pass_at": len(trajectories),
      "answer": 1,
    },
    "answer_generation": writer.generation(
      steps=answered[0].steps if answered else None,
      calls=sum(len(t.steps) for t in trajectories),
      tokens=sum(t.num_tokens for t in trajectories),
    ),
  }


def dfs_answer(
  task: Task,
  result: SearchResult,
  strategy: Search,
  limits: Limits,
  decode: Callable[[np.ndarray], str] | None = None,
) -> _Json:
  """The answer file of a tree search; as cot_answer. A chain that gave up counts as valid data."""
  _check(task, result.trajectory)
  writer = _Writer(task, limits, decode)
  root = writer.tree(result)
  flat = list(_walk(root))
  chosen = result.trajectory.status in (Status.ANSWERED, Status.GAVE_UP) and isinstance(
    result.trajectory.steps[-1].action, Finish
  )
  generation = writer.generation(
    steps=result.trajectory.steps if chosen else None,
    calls=result.calls,
    tokens=len(result.trajectory.prompt_tokens)
    + sum(
      len(n.step.tokens) + len(n.step.observation_tokens) + len(n.diversity_tokens)
      for n in result.nodes
    ),
  )
  gave_up = result.trajectory.status is Status.GAVE_UP
  return {
    "win": result.trajectory.status is Status.ANSWERED,
    "tree": {
      "size": len(flat),
      "max_length": 1 + max(node["depth"] for node in flat),
      "tree": root,
    },
    "forward_args": {
      "max_llm_calls": strategy.max_calls,
      "max_chain_llm_calls": limits.max_steps,
      "tree_beam_size": strategy.width,
      "answer": strategy.answers,
      "with_filter": False,
    },
    "compare_candidates": [
      [_bare(node) for n in result.path(leaf.index) for node in writer.made[n.index]]
      for leaf in result.nodes
      if leaf.status is Status.ANSWERED
    ],
    "answer_generation": generation | {"finish_type": "give_up" if gave_up else GIVE_ANSWER},
  }


def write_answer(folder: str | Path, task: Task, method: str, answer: Mapping[str, Any]) -> Path:
  """Writes `<query id>_<method>.json` whole or not at all; the query id is the task's metadata's,
  else its id with "/" as "-". Returns the path."""
  query_id = str(task.metadata.get("query_id", task.id.replace("/", "-")))
  path = Path(folder) / f"{query_id}_{method}.json"
  write_json(path, answer)
  return path


def write_json(path: str | Path, value: Any) -> None:
  """Indented JSON, written whole or not at all; makes the folder."""
  with replacing(path) as file:
    json.dump(value, file, indent=2)
    file.write("\n")


# --- writing ---------------------------------------------------------------------------------


def _check(task: Task, trajectory: Trajectory) -> None:
  if trajectory.task_id != task.id:
    raise ValueError(f"answer of {task.id}: the trajectory belongs to {trajectory.task_id}")
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    raise ValueError(
      f"answer of {task.id}: ended in an infrastructure error; it would be scored as a failure of "
      "the model: run it again"
    )


class _Writer:
  def __init__(self, task: Task, limits: Limits, decode: Callable[[np.ndarray], str] | None):
    self._task, self._limits, self._decode = task, limits, decode
    self.made: dict[int, list[_Json]] = {}  # of a tree: node -> its official nodes

  def nodes(self, step: Step) -> list[_Json]:
    """The official nodes of one turn; depth and child_count are the caller's."""
    action = step.action
    if isinstance(action, Malformed):
      return [_node("Thought", self._text(step)) | self._observed(step)]
    name, arguments = _call(step)
    out = [_node("Thought", action.thought)] if action.thought else []
    out.append(_node("Action", name))
    out.append(_node("Action Input", arguments) | self._observed(step) | {"io_state": {}})
    return out

  def tree(self, result: SearchResult) -> _Json:
    """The official nested tree; fills `made`."""
    root = _node("Action Input", "") | {"depth": 0, "io_state": {}, "children": []}
    for n in result.nodes:
      above = root if n.parent == ROOT else self.made[n.parent][-1]
      self.made[n.index] = made = self.nodes(n.step)
      for node in made:
        node |= {"depth": above["depth"] + 1, "children": []}
        above["children"].append(node)
        above["child_count"] += 1
        above = node
      made[-1]["expand_num"] = n.index + 1
      made[-1]["pruned"] = n.status not in (None, Status.ANSWERED)
    for n in result.nodes:
      if n.status is Status.ANSWERED:
        self._mark_finished(result.path(n.index))
    return root

  def _mark_finished(self, path: Sequence[Node]) -> None:
    near = path[-1 - _FINISH_SPREAD :]
    for n in near:
      # Of the topmost turn only the end: a chain that leaves it can still be another one's.
      for node in self.made[n.index][-1:] if n is near[0] else self.made[n.index]:
        node["finished"] = True

  def generation(self, steps: Sequence[Step] | None, calls: int, tokens: int) -> _Json:
    """answer_generation; `steps` of the chosen chain, None without valid data."""
    functions = [
      {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
      for t in (*self._task.tools, FINISH_TOOL)
    ]
    return {
      "valid_data": steps is not None,
      "final_answer": _call(steps[-1])[1] if steps else "",
      "function": functions,
      "query_count": calls,
      "total_tokens": tokens,
      "train_messages": self._messages(steps) if steps else [],
      "chain": [],
      "query": self._task.query,
    }

  def _messages(self, steps: Sequence[Step]) -> list[list[_Json]]:
    """Every prefix of the conversation that ends in a turn of the model."""
    messages: list[_Json] = [
      {"role": "system", "content": self._task.metadata.get("system", "")},
      {"role": "user", "content": f"\n{self._task.query}\nBegin!\n"},
    ]
    out = []
    for step in steps:
      if isinstance(step.action, Malformed):
        name = "malformed_action"
        messages.append({"role": "assistant", "content": self._text(step)})
      else:
        name, arguments = _call(step)
        turn: _Json = {
          "role": "assistant",
          "function_call": {"name": name, "arguments": arguments},
        }
        messages.append(turn | ({"content": step.action.thought} if step.action.thought else {}))
      out.append(list(messages))
      messages.append({"role": "function", "name": name, "content": self._shown(step)})
    return out

  def _observed(self, step: Step) -> _Json:
    if isinstance(step.action, Finish):
      code = _FINISHED[step.action.gave_up][0]
    else:
      code = official_code(step.observation) if step.observation is not None else 0
    return {"observation": self._shown(step), "observation_code": code}

  def _shown(self, step: Step) -> str:
    if isinstance(step.action, Finish):
      return _FINISHED[step.action.gave_up][1]
    text = step.observation.text if step.observation is not None else ""
    return shorten(text, self._limits.max_observation_chars)

  def _text(self, step: Step) -> str:
    if self._decode is not None:
      return self._decode(step.tokens)
    return step.action.reason


def _node(kind: str, description: str) -> _Json:
  return {
    "is_terminal": False,
    "pruned": False,
    "finished": False,
    "depth": 0,
    "node_type": kind,
    "description": description,
    "Elo": 1000.0,
    "child_count": 0,
    "expand_num": 0,
  }


def _call(step: Step) -> tuple[str, str]:
  """(function name, arguments as JSON text) of a turn that is not malformed."""
  action = step.action
  if isinstance(action, Finish):
    kind = GIVE_UP if action.gave_up else GIVE_ANSWER
    arguments = {"return_type": kind}
    if action.answer or not action.gave_up:
      arguments["final_answer"] = action.answer
    return FINISH, json.dumps(arguments, ensure_ascii=False)
  return action.name, json.dumps(dict(action.arguments), ensure_ascii=False)


def _bare(node: _Json) -> _Json:
  return {key: value for key, value in node.items() if key != "children"}


def _walk(root: _Json) -> Iterator[_Json]:
  todo = [root]
  while todo:
    node = todo.pop()
    yield node
    todo.extend(node["children"])
