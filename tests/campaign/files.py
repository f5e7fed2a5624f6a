"""The kinds of file that a user can bring, each with a valid one and its reader."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import exact_records
import numpy as np
import official_rows
import tiny
from mutations import damage_bytes, damage_json, damage_lines, damage_text

from steptool_jax.data import annotated_trajectories, trajectories
from steptool_jax.dialogue import template
from steptool_jax.dialogue.codec import Codec
from steptool_jax.environments.custom import Custom
from steptool_jax.evaluation import records
from steptool_jax.policy.formats import gguf, hfconfig, hub, tensorfile
from steptool_jax.run.data import offline
from steptool_jax.run.training import behaviour, restore
from steptool_jax.run.workdir import checkpoint
from steptool_jax.toolbench.environment import ToolBench
from steptool_jax.toolbench.formats import conversations, judged, training_rows
from steptool_jax.toolbench.formats.converted import read_converted
from steptool_jax.types import ToolCall
from steptool_jax.validation import to_json


@dataclasses.dataclass(frozen=True)
class Kind:
  """path: of the file that is damaged. damage: (content, random.Random) -> content, of its type.
  read: reads it, and everything that belongs to it. names: what a refusal has to name. whole: how
  the file as it was is taken."""

  path: pathlib.Path
  damage: Callable[[Any, Any], Any]
  read: Callable[[], Any]
  names: str = ""
  whole: str = "accepted"

  @property
  def binary(self) -> bool:
    return self.damage is damage_bytes


MODULE = '''
def add(a: int, b: int = 3) -> int:
  """Adds.

  Args:
    a: one
  """
  return a + b


def even(answer, tools, least=0):
  return float(answer) % 2 == 0


TOOLS = [add]
'''


def tasks() -> str:
  demonstration = [{"tool": "add", "arguments": {"a": 5, "b": 7}}, {"answer": "12"}]
  common = {"query": "5 + 7?", "tools": ["add"], "split": "train"}
  checkers = (
    {"type": "number", "value": 12, "tolerance": 0.5},
    {"type": "exact", "value": "12"},
    {"type": "regex", "pattern": r"\d+"},
    {"type": "contains_all", "values": ["12", 5]},
    {"type": "even", "least": 1},
  )
  return "".join(
    json.dumps({"id": f"t{n}", **common, "checker": c, "demonstration": demonstration}) + "\n"
    for n, c in enumerate(checkers)
  )


def make(folder: pathlib.Path) -> dict[str, Kind]:
  """name -> Kind, each in a folder of its own."""
  return {**_models(folder), **_own(folder), **_trajectories(folder), **_official(folder)}


def _models(folder: pathlib.Path) -> dict[str, Kind]:
  import jax
  from fakes import tiny_config
  from policy import test_gguf

  from steptool_jax.policy import model

  config = tiny_config(vocab_size=512, tie_embeddings=False)
  params = model.init_params(config, jax.random.key(0))
  tokenizer = tiny.ROOT / "steptool_jax/assets/quickstart"

  def place(name: str, shard: int = 10**9) -> pathlib.Path:
    out = folder / name
    hub.save_params(out, config, params, source=tokenizer, max_shard_bytes=shard)
    return out

  def weights(directory):
    return lambda: [
      np.array(files.read(name))
      for files in [tensorfile.TensorFiles(directory)]
      for name in files.shapes
    ]

  def whole(directory):
    def read():
      found, raw = hfconfig.load_config(directory)
      hub.check_tensors(directory, tensorfile.TensorFiles(directory).shapes, found)
      hfconfig.check_same_model(found, raw)
      return found

    return read

  def spoken(directory):
    def read():
      codec = Codec.load(directory)
      chat = template.get_format("auto", codec)
      ids = codec.join(["hello 12", *chat.start])
      return codec.vocab_size, codec.eos_id, codec.decode(ids), chat.stop_ids

    return read

  def opened(path):
    def read():
      out = path.parent / "out"
      shutil.rmtree(out, ignore_errors=True)
      return gguf.gguf_to_hub(path, out)

    return read

  described, held, indexed = place("config"), place("weights"), place("index", 20_000)
  words, settings = place("tokenizer"), place("settings")
  (folder / "gguf").mkdir()
  other = model.init_params(test_gguf.CONFIG, jax.random.key(0))
  path = test_gguf.write(folder / "gguf/model.gguf", other)
  index = indexed / "model.safetensors.index.json"
  return {
    "config.json of a model": Kind(
      described / "config.json", damage_json, whole(described), str(described)
    ),
    "safetensors": Kind(held / "model.safetensors", damage_bytes, weights(held)),
    "index of shards": Kind(index, damage_json, whole(indexed), str(indexed)),
    "tokenizer.json": Kind(words / "tokenizer.json", damage_json, spoken(words), str(words)),
    "tokenizer_config.json": Kind(
      settings / "tokenizer_config.json", damage_json, spoken(settings), str(settings)
    ),
    "gguf": Kind(path, damage_bytes, opened(path)),
  }


def _own(folder: pathlib.Path) -> dict[str, Kind]:
  """A user's tasks and tools, and a workdir."""
  out = folder / "own"
  out.mkdir()
  (out / "tools.py").write_text(MODULE)
  (out / "tasks.jsonl").write_text(tasks())

  def use(directory, kinds=frozenset()):
    """kinds: checkers that are left out."""

    def read():
      custom = Custom(str(directory / "tools.py"), directory / "tasks.jsonl")
      graded = []
      for task in custom.tasks("train"):
        session = custom.open(task, 0)
        shown = [session.call(a).text for a in task.demonstration if isinstance(a, ToolCall)]
        graded += [shown, task.checker]
        graded += [] if task.checker["type"] in kinds else [session.grade("12")]
      return graded

    return read

  modules = folder / "modules"
  shutil.copytree(out, modules)
  workdir = folder / "workdir"
  (workdir / "moments").mkdir(parents=True)
  config = tiny.make()
  (workdir / "config.json").write_text(to_json(config))
  (workdir / "summary.json").write_text(json.dumps({"iterations": 3, "heldout": {"rl": 0.5}}))
  lines = [json.dumps({"step": n, "train/reward": 0.5, "train/tokens": 9 * n}) for n in range(4)]
  (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  (workdir / "scores.json").write_text(json.dumps({"3": 0.5, "6": 0.25}))

  def report():
    run = records.read_run(workdir)  # never raises: a report shows what there is
    return [records.curve(run, axis, "train/reward") for axis in records.AXES]

  return {
    "tasks.jsonl": Kind(out / "tasks.jsonl", damage_lines, use(out)),
    # A checker that raises is the user's own, and found when it grades.
    "tools module": Kind(modules / "tools.py", damage_text, use(modules, {"even"}), str(modules)),
    "config.json of a workdir": Kind(
      workdir / "config.json",
      damage_json,
      lambda: restore.refuse_other_config(config, workdir),
      str(workdir),
    ),
    "metrics.jsonl": Kind(workdir / "metrics.jsonl", damage_lines, report),
    "scores.json": Kind(
      workdir / "scores.json", damage_json, lambda: checkpoint.read_scores(workdir)
    ),
  }


def _trajectories(folder: pathlib.Path) -> dict[str, Kind]:
  out = folder / "offline"
  out.mkdir()
  path = out / "annotated.jsonl"
  unknown = exact_records.unknown(exact_records.RECORD)
  trajectories.write_trajectories(path, [exact_records.RECORD, unknown])
  built = annotated_trajectories.build({"train": path}, folder / "tfds")
  array = next(built.glob("*array_record*"))
  info = folder / "info"
  shutil.copytree(folder / "tfds", info)
  described = info / built.relative_to(folder / "tfds") / "dataset_info.json"

  def checked(found):
    """Every record says again what it said, and only unknown log-probs are NaN."""
    return [json.loads(trajectories.dump(record)) for record in found]

  index = offline.Index(lambda t: t, by_task=False)
  index.add(0, exact_records.RECORD)
  data = index.data([exact_records.RECORD], 1, 0, {})
  kept = folder / "behaviour"
  kept.mkdir()
  behaviour.fill(data, 64, 1, lambda batch: None, kept)

  return {
    "offline jsonl": Kind(
      path, damage_lines, lambda: checked(trajectories.read_trajectories(path))
    ),
    "tfds records": Kind(
      array,
      damage_bytes,
      lambda: checked(annotated_trajectories.open_source(folder / "tfds", "train")),
      str(built),
    ),
    "tfds description": Kind(
      described,
      damage_json,
      lambda: checked(annotated_trajectories.open_source(info, "train")),
      str(described.parent),
    ),
    "behaviour.npz": Kind(
      kept / "behaviour.npz",
      damage_bytes,
      lambda: np.array(behaviour.restore(data, kept).logprobs),
      str(kept),
    ),
  }


def _official(folder: pathlib.Path) -> dict[str, Kind]:
  from toolbench import test_judged

  out = folder / "official"
  (out / "test_instruction").mkdir(parents=True)
  chat = template.get_format(
    "chatml_react", Codec.load(_chatml(folder / "chatml", official_rows.SYSTEM))
  )
  row = official_rows.row("chatml_react")
  cells = [list(row.prompts), list(row.responses), list(row.rewards)]
  turns = [("system", "s"), ("user", "u"), ("assistant", official_rows.CALL)]
  talk = {"id": "1_0", "conversations": [{"from": r, "value": v} for r, v in turns]}
  chain = test_judged.chain(("user", "u"), ("tool", test_judged.STEP))
  converted = test_judged.converted(chain)
  converted["12"]["available_tools"] = [{"type": "function", "function": {"name": "f"}}]
  api = {
    **{"category_name": "Weather", "tool_name": "Sky", "api_name": "Rain"},
    "required_parameters": [{"name": "place", "type": "STRING", "description": "d", "default": ""}],
    "optional_parameters": [],
    "api_description": "rain",
  }
  query = {"query": "Rain?", "query_id": 7, "api_list": [api], "relevant APIs": [["Sky", "Rain"]]}
  contents = {
    "rows.tsv": test_judged.table(cells),
    "dialogues.json": json.dumps({"1": {"cnt": 1, "instances": [talk]}}),
    "annotations.json": json.dumps({"3": test_judged.annotation()}),
    "results.json": json.dumps({"3": test_judged.result()}),
    "converted.json": json.dumps(converted),
    "test_instruction/G1_instruction.json": json.dumps([query]),
  }
  for name, text in contents.items():
    (out / name).write_text(text)

  def rows():
    found = training_rows.read_step_rows(out / "rows.tsv")
    return found, conversations.from_step_rows(found, chat, 10_000, "rows.tsv").report()

  def dialogues():
    found = training_rows.read_dialogues(out / "dialogues.json")
    return found, conversations.from_dialogues(found, chat, 10_000).report()

  def annotations():
    found = judged.read_annotations(out / "annotations.json")
    calls = [conversations.calls_of_annotation(entry) for entry in found.values()]
    return found, [entry.transcript for entry in found.values()], _converted(calls)

  def _converted(calls):
    return conversations.from_calls(calls, chat, 10_000).report()

  def chains():
    found = read_converted(out / "converted.json")
    return found, _converted([conversations.calls_of_converted(e) for e in found.values()])

  def queries(tools=None):
    bench = ToolBench(out, None, ("G1_instruction",), tools_folder=tools)
    return [dataclasses.astuple(task) for task in bench.tasks("heldout")]

  described = folder / "tools/Weather/sky.json"
  described.parent.mkdir(parents=True)
  entry = {
    "name": "Rain",
    "description": "rain",
    "required_parameters": [],
    "optional_parameters": [],
  }
  entry["required_parameters"] = api["required_parameters"]
  described.write_text(
    json.dumps({"tool_name": "Sky", "tool_description": "s", "api_list": [entry]})
  )

  return {
    "official rows": Kind(out / "rows.tsv", damage_text, rows),
    "official dialogues": Kind(out / "dialogues.json", damage_json, dialogues),
    "official annotations": Kind(out / "annotations.json", damage_json, annotations),
    "official results": Kind(
      out / "results.json", damage_json, lambda: judged.read_results(out / "results.json")
    ),
    "converted answers": Kind(out / "converted.json", damage_json, chains),
    "official queries": Kind(out / "test_instruction/G1_instruction.json", damage_json, queries),
    "tool descriptions": Kind(
      described, damage_json, lambda: queries(described.parents[1]), str(folder)
    ),
  }


def _chatml(out: pathlib.Path, text: str) -> pathlib.Path:
  import stored

  return stored.tokenizer(out, [text] * 3, 400)
