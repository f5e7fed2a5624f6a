"""The layout: imports run downwards, host rooms are free of jax, every config field is read."""

import ast
import dataclasses
import pathlib
import re

import steptool_jax
from steptool_jax import config as config_lib

ROOT = pathlib.Path(steptool_jax.__file__).parent
# A room may import from rooms of its own level and below.
LEVEL = {
  "types": 0,
  "policy": 1,
  "dialogue": 1,
  "simulators": 1,
  "environments": 2,
  "rewards": 2,
  "learning": 2,
  "rollout": 2,
  "evaluation": 2,
  "config": 3,
  "run": 4,
  "main": 5,
}
HOST = ("types", "dialogue", "simulators", "environments", "rewards", "rollout", "evaluation")


def modules():
  for path in sorted(ROOT.rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] != "__init__":
      yield ".".join(parts), ast.parse(path.read_text())


def imports(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph():
  names = {name for name, _ in modules()}
  edges = {}
  for name, tree in modules():
    edges[name] = set()
    for target in imports(tree):
      target = target.removeprefix("steptool_jax.")
      while target and target not in names:
        target = target.rpartition(".")[0]
      if target:
        edges[name].add(target)
  return edges


def room(module):
  return module.split(".")[0]


def test_imports_run_downwards():
  upward = [
    f"{a} -> {b}"
    for a, targets in graph().items()
    for b in targets
    if LEVEL[room(a)] < LEVEL[room(b)]
  ]
  assert not upward


def test_there_is_no_import_cycle():
  edges, done, path = graph(), set(), []

  def visit(node):
    assert node not in path, f"cycle: {' -> '.join([*path[path.index(node) :], node])}"
    if node not in done:
      path.append(node)
      for target in edges[node]:
        visit(target)
      done.add(path.pop())

  for node in edges:
    visit(node)


def test_host_rooms_do_not_import_jax():
  edges = graph()
  device = {
    n for n, tree in modules() if any(i.split(".")[0] in ("jax", "flax") for i in imports(tree))
  }
  for name in edges:
    if room(name) in HOST:
      seen, todo = set(), [name]
      while todo:
        node = todo.pop()
        if node not in seen:
          seen.add(node)
          todo.extend(edges[node])
      assert not seen & device, f"{name} reaches jax through {sorted(seen & device)}"


def test_only_the_model_imports_flax():
  users = {n for n, tree in modules() if any(i.split(".")[0] == "flax" for i in imports(tree))}
  assert users == {"policy.model"}


def test_every_config_field_is_read_outside_config():
  source = "\n".join(path.read_text() for path in ROOT.rglob("*.py") if path.name != "config.py")

  def fields(cls, path=""):
    for field in dataclasses.fields(cls):
      default = getattr(cls(), field.name)
      if dataclasses.is_dataclass(default):
        yield from fields(type(default), f"{path}{field.name}.")
      else:
        yield f"{path}{field.name}"

  # Groups that are handed on whole, by dataclasses.asdict, to a dataclass of the same fields.
  whole = ("model.architecture.", "environment.faults.")
  unread = [
    name
    for name in fields(config_lib.Config)
    if not name.startswith(whole) and not re.search(rf"\.{name.rpartition('.')[2]}\b", source)
  ]
  assert not unread


def test_nothing_unsafe():
  source = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
  for word in (r"\beval\(", r"\bexec\(", r"pickle", r"trust_remote_code=True", r"shell=True"):
    assert not re.search(word, source), word
