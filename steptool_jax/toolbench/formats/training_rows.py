"""Readers of what StepTool's authors trained on: step-grained rows and dialogues.

As in judged.py, every reader names the file and the row of what is wrong, Python literals are
data, and `.xz` is read as well.
"""

import csv
import dataclasses
import io
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence

from steptool_jax.data.reading import Path, check, field, literal, objects, typed
from steptool_jax.files import read_text


@dataclasses.dataclass(frozen=True)
class StepRow:
  """One annotated trajectory: prompts[0] opens it, prompts[k] is observation k and the assistant
  header; rewards[k] belongs to responses[k]. All three have one entry a step.
  """

  prompts: tuple[str, ...]
  responses: tuple[str, ...]
  rewards: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Message:
  role: str  # system, user, assistant or function ("tool" in some files)
  text: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """One SFT or RFT instance: a prefix of a conversation; the loss is on its last message."""

  query_id: str
  number: int  # of the instance under its query id
  title: str
  messages: tuple[Message, ...]


# --- tables ----------------------------------------------------------------------------------


def read_step_rows(path: Path) -> list[StepRow]:
  """Step-grained annotations (tab-separated; prompt, response, reward are list literals).

  ValueError that names the row for a broken literal, lists of different lengths, an entry that is
  no text, or a reward that is no finite number. OSError for a missing file.
  """
  rows = []
  for where, fields in _table(path, ("prompt", "response", "reward")):
    prompts, responses, rewards = (
      literal(text, list, f"{where}, column {name!r}") for name, text in fields.items()
    )
    if not prompts or not len(prompts) == len(responses) == len(rewards):
      raise ValueError(
        f"{where}: prompt, response and reward hold {len(prompts)}, {len(responses)} and "
        f"{len(rewards)} entries: there must be one of each for every step"
      )
    for name, values in (("prompt", prompts), ("response", responses)):
      for k, value in enumerate(values):
        check(isinstance(value, str), f"{where}, column {name!r}, step {k}", "text", value)
    for k, value in enumerate(rewards):
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      good = number and math.isfinite(value)
      check(good, f"{where}, column 'reward', step {k}", "a finite number", value)
    rows.append(StepRow(tuple(prompts), tuple(responses), tuple(map(float, rewards))))
  return rows


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
  """(place, {column: text}) of every row of a tab-separated file with a header."""
  path = pathlib.Path(path)
  before = csv.field_size_limit(sys.maxsize)  # a prompt is longer than csv's own limit
  try:
    rows = list(csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True))
  except csv.Error as error:
    raise ValueError(f"{path}: not a tab-separated table ({error}): fetch it again") from error
  finally:
    csv.field_size_limit(before)
  if not rows or sorted(rows[0]) != sorted(columns):
    found = rows[0] if rows else "an empty file"
    raise ValueError(f"{path}: the header must be {', '.join(columns)} (tabs), found {found}")
  for number, row in enumerate(rows[1:], start=1):
    where = f"{path}, row {number}"
    if len(row) != len(columns):
      raise ValueError(f"{where}: {len(row)} columns, must be {len(columns)}: a tab is missing")
    named = dict(zip(rows[0], row, strict=True))
    yield where, {column: named[column] for column in columns}


# --- conversations ---------------------------------------------------------------------------

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"function": "function", "tool": "function"}


def read_dialogues(path: Path) -> list[Dialogue]:
  """SFT and RFT instances: {id: {cnt, instances: [{id, conversations: [{from, value}]}]}}."""
  out = []
  for where, query_id, entry in objects(path, ("cnt", "instances")):
    instances = typed(entry["instances"], list, f"{where}, field 'instances'")
    if entry["cnt"] != len(instances):
      raise ValueError(
        f"{where}: cnt is {entry['cnt']}, but there are {len(instances)} instances: the file was "
        "cut or edited; fetch it again"
      )
    for number, instance in enumerate(instances):
      place = f"{where}, instance {number}"
      turns = typed(field(instance, "conversations", place), list, f"{place}, 'conversations'")
      messages = []
      for k, turn in enumerate(turns):
        at = f"{place}, message {k}"
        role, text = field(turn, "from", at), field(turn, "value", at)
        check(role in list(_ROLES), f"{at}, field 'from'", f"one of {', '.join(_ROLES)}", role)
        messages.append(Message(_ROLES[role], typed(text, str, f"{at}, field 'value'")))
      if [m.role for m in messages[:2]] != ["system", "user"]:
        raise ValueError(f"{place}: must start with a system and a user message")
      if messages[-1].role != "assistant":
        raise ValueError(f"{place}: the last message must be the assistant's, it is trained on")
      out.append(Dialogue(query_id, number, str(instance.get("id", "")), tuple(messages)))
  return out
