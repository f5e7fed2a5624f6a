"""Trajectories as the JSON data that the report's viewer reads: a small index, and chunks.

The index has what lists and filters show and is parsed when the page opens; a chunk holds the whole
trajectories of some rows and is parsed when one of them is looked at. Texts that come again and
again (tokens, queries, tools) stand in the index once and are referred to by number.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.evaluation import behaviour
from steptool_jax.types import Code, Finish, Malformed, Step, ToolCall, ToolCalls, by_call

CHUNK = 40  # trajectories
_ANSWER_CHARS = 80  # of an answer in the index


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """A trajectory and the moment (of a cell) that it belongs to."""

  cell: str
  moment: str
  record: AnnotatedTrajectory


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two entries by number, the same task before and after, and what changed."""

  before: int
  after: int
  case: behaviour.Case


class _Table:
  """Texts by number, each once."""

  def __init__(self):
    self.texts: dict[str, int] = {}

  def __call__(self, text: str) -> int:
    return self.texts.setdefault(text, len(self.texts))


def payload(entries: Sequence[Entry], pairs: Sequence[Pair]) -> tuple[str, list[str]]:
  """(index, chunks), each as JSON that may stand inside a <script> element."""
  moments, queries, tools, pieces = _Table(), _Table(), _Table(), _Table()
  index, chunks = [], []
  for start in range(0, len(entries), CHUNK):
    chunk = []
    for entry in entries[start : start + CHUNK]:
      trajectory = entry.record.trajectory
      steps = by_call(trajectory.steps)
      codes = [s.observation.code for s in steps if s.observation is not None]
      calls = [s.action for s in steps if isinstance(s.action, ToolCall)]
      index.append(
        [
          moments(f"{entry.cell} · {entry.moment}" if entry.cell else entry.moment),
          trajectory.task_id,
          trajectory.sample,
          str(trajectory.status),
          trajectory.solved,
          len(trajectory.steps),
          sum(code is not Code.OK for code in codes),
          int(any(s.observation.injected for s in trajectory.steps if s.observation is not None)),
          queries(entry.record.query),
          sorted({tools(call.name) for call in calls}),
          _answer(trajectory.steps)[:_ANSWER_CHARS],
        ]
      )
      chunk.append(_document(entry.record, pieces))
    chunks.append(script_json(chunk))
  document = {
    "chunk": CHUNK,
    "moments": list(moments.texts),
    "queries": list(queries.texts),
    "tools": list(tools.texts),
    "pieces": list(pieces.texts),
    "rows": index,
    "pairs": [[p.before, p.after, p.case.step, p.case.change] for p in pairs],
  }
  return script_json(document), chunks


def script_json(value: Any) -> str:
  """JSON in ASCII without <, > and &: no text in it can end a <script> element."""
  text = json.dumps(value, separators=(",", ":"), default=str)
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _answer(steps: Sequence[Step]) -> str:
  last = steps[-1].action if steps else None
  return last.answer if isinstance(last, Finish) else ""


def _document(record: AnnotatedTrajectory, pieces: _Table) -> dict[str, Any]:
  steps = record.trajectory.steps
  texts = _per_step(record.metadata.get("texts"), steps)
  advantages = _per_step(record.metadata.get("advantages"), steps)
  out: dict[str, Any] = {
    "prompt": len(record.trajectory.prompt_tokens),
    "steps": [
      _step(step, words, values, record.logprobs_known, pieces)
      for step, words, values in zip(steps, texts, advantages, strict=True)
    ],
  }
  search = record.metadata.get("search")
  if isinstance(search, Mapping):
    out["search"] = {
      "leaf": search.get("leaf"),
      "nodes": [
        {
          "parent": node.get("parent"),
          "status": node.get("status"),
          **_action_document(node.get("action") or {}),
          "seen": _seen_document(node.get("observation")),
        }
        for node in search.get("nodes", [])
      ],
    }
  return out


def _per_step(values: Any, steps: Sequence[Step]) -> list[list[Any] | None]:
  """Metadata lists of one entry a token; None for each step where they do not fit."""
  fits = isinstance(values, list) and [len(v) for v in values] == [len(s.tokens) for s in steps]
  return values if fits else [None] * len(steps)


def _step(step: Step, words, values, with_logprobs: bool, pieces: _Table) -> dict[str, Any]:
  out = _action(step)
  out["marks"] = [
    _rounded(step.success_calling),
    _rounded(step.contribution),
    _rounded(step.reward),
  ]
  if step.prompt_tokens is not None:
    out["own"] = len(step.prompt_tokens)
  observation = step.observation
  if observation is not None:
    out["seen"] = {
      "text": observation.text,
      "code": str(observation.code),
      "injected": int(observation.injected),
      "changed": int(observation.changed),
      "cost": _rounded(observation.cost),
      "latency": _rounded(observation.latency),
    }
  if words is not None:
    out["words"] = [pieces(str(word)) for word in words]
  if values is not None:
    out["advantages"] = [_rounded(value) for value in values]
  if with_logprobs:
    out["logprobs"] = np.round(step.logprobs.astype(float), 3).tolist()
  return out


def _action(step: Step) -> dict[str, Any]:
  action = step.action
  if isinstance(action, ToolCall):
    return {
      "call": action.name,
      "arguments": json.dumps(action.arguments, ensure_ascii=False, default=str),
      "thought": action.thought,
    }
  if isinstance(action, ToolCalls):
    calls = [_action(part) for part in by_call([step])]
    return {
      "call": ", ".join(call["call"] for call in calls),
      "arguments": "\n".join(call["arguments"] for call in calls),
      "thought": action.thought,
    }
  if isinstance(action, Malformed):
    return {"malformed": action.reason}
  return {"finish": action.answer, "gave_up": int(action.gave_up), "thought": action.thought}


def _action_document(action: Mapping[str, Any]) -> dict[str, Any]:
  """The same of an action that is JSON already (data/trajectories' form)."""
  out = {k: action[k] for k in ("call", "thought", "malformed", "finish", "gave_up") if k in action}
  if "call" in action:
    out["arguments"] = json.dumps(action.get("arguments"), ensure_ascii=False, default=str)
  return out


def _seen_document(observation: Mapping[str, Any] | None) -> dict[str, Any] | None:
  if not observation:
    return None
  return {k: observation.get(k) for k in ("text", "code", "injected", "changed")}


def _rounded(value: float) -> float:
  return round(float(value), 4)
