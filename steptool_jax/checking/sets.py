"""What is seen of tools and tasks without a call: schemas, descriptions, ids, shared queries."""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steptool_jax.checking.findings import ERROR, WARNING, Finding
from steptool_jax.environments.checkers import normal
from steptool_jax.types import Task, ToolSpec, calls_of

# Any of them says something about a parameter's values.
_SAYS = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "not"})
_NAMED = 5  # ids in one text

Splits = Mapping[str, Sequence[Task]]


def check_tools(splits: Splits) -> list[Finding]:
  """Of every tool that some task offers, once: no schema, no description."""
  tools: dict[str, ToolSpec] = {}
  called: collections.defaultdict[str, set[str]] = collections.defaultdict(set)
  for tasks in splits.values():
    for task in tasks:
      tools |= {spec.name: spec for spec in task.tools if spec.name not in tools}
      for action in task.demonstration:
        for call in calls_of(action):
          called[call.name] |= set(call.arguments)
  return [f for spec in tools.values() for f in _check_tool(spec, called[spec.name])]


def _check_tool(spec: ToolSpec, given: set[str]) -> Iterator[Finding]:
  described = spec.parameters.get("properties") or {}
  if given and not described:
    yield Finding(
      *(WARNING, "schema", ""),
      f"tool {spec.name} has no schema: it is called with {', '.join(sorted(given))}, of which the "
      "model is told nothing",
      "give its parameters type hints (MCP: an input schema with properties)",
    )
  untyped = [name for name, schema in described.items() if not _says(schema)]
  if untyped:
    yield Finding(
      *(WARNING, "schema", ""),
      f"tool {spec.name} has no schema for {', '.join(untyped)}: every value passes",
      "give the parameter a type hint (MCP: a type in the input schema)",
    )
  if not spec.description.strip():
    yield Finding(
      *(WARNING, "description", ""),
      f"tool {spec.name} has no description",
      "write a docstring of one sentence; models choose tools by it",
    )


def _says(schema: Any) -> bool:
  return isinstance(schema, Mapping) and bool(_SAYS & schema.keys())


def check_tasks(splits: Splits) -> list[Finding]:
  """Empty splits, ids that come twice, held-out tasks that are trained on."""
  findings = [
    Finding(
      *(ERROR, "split", ""),
      f"there is no task in split {split!r}",
      "give some tasks this split, or set environment.heldout_share",
    )
    for split, tasks in splits.items()
    if not tasks
  ]
  ids = collections.Counter(task.id for tasks in splits.values() for task in tasks)
  findings += [
    Finding(*(ERROR, "id", name), f"{n} tasks have this id", "give each an id of its own")
    for name, n in ids.items()
    if n > 1
  ]
  return findings + _leaks(splits)


def _leaks(splits: Splits) -> list[Finding]:
  """The same query from the same start in both splits: the held-out figure would be a memory."""
  seen: collections.defaultdict[tuple[str, str], list[str]] = collections.defaultdict(list)
  for task in splits.get("train", ()):
    seen[_asked(task)].append(task.id)
  findings = []
  for task in splits.get("heldout", ()):
    twins = seen.get(_asked(task), [])
    if twins:
      named = ", ".join(twins[:_NAMED]) + (", …" if len(twins) > _NAMED else "")
      findings.append(
        Finding(
          *(ERROR, "leak", task.id),
          f"held out, but training has the same query: {named}",
          "put both into one split, or ask something else",
        )
      )
  return findings


def _asked(task: Task) -> tuple[str, str]:
  start = [task.metadata.get(name) for name in ("state", "world")]
  return normal(task.query), json.dumps(start, sort_keys=True, default=str)
