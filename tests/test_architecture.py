"""The layout: imports run downwards, host rooms are free of jax, every config field is read."""

import ast
import collections
import dataclasses
import importlib
import pathlib
import re

import steptool_jax
from steptool_jax import config as config_lib
from steptool_jax.policy import model

ROOT = pathlib.Path(steptool_jax.__file__).parent
# From the ground up: a room imports from itself and from rooms before it, never from one after it.
ROOMS = [
  "types",
  "files",
  "config",
  "policy.kernels",
  "policy",
  "policy.formats",
  "dialogue",
  "simulators",
  "environments",
  "environments.invented",
  "environments.markets",
  "environments.benchmarks",
  "learning",
  "learning.programs",
  "data",
  "rollout",
  "serving",
  "rewards",
  "evaluation",
  "checking",
  "toolbench.simulators",
  "toolbench.formats",
  "toolbench",
  "combinations",
  "validation",
  "run.hosts",
  "run.workdir",
  "run.cost",
  "run.parts",
  "run.checks",
  "run.data",
  "run.training",
  "run.evaluating",
  "run.studies",
  "run",
  "main",
]
MOST_FILES = 15  # of a room
HOST = [
  "types",
  "dialogue",
  "simulators",
  "environments",
  "environments.invented",
  "environments.markets",
  "environments.benchmarks",
  "rewards",
  "rollout",
  "serving",
  "evaluation",
  "checking",
  "data",
  "toolbench",
  "toolbench.formats",
  "toolbench.simulators",
]


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
  """The innermost of ROOMS that holds it; a module outside of all rooms fails here."""
  while module not in ROOMS:
    assert "." in module, f"{module}: not in ROOMS"
    module = module.rpartition(".")[0]
  return module


def test_every_folder_with_code_is_a_room():
  """A file in a new folder would fall to the room above it; TFDS asks for a folder of its own."""
  folders = {name.rpartition(".")[0] for name, _ in modules() if "." in name}
  assert folders - {"data.annotated_trajectories"} <= set(ROOMS)


def test_no_room_is_crowded():
  files = collections.Counter(room(name) for name, _ in modules())
  assert {r: n for r, n in files.items() if n > MOST_FILES} == {}


def test_imports_run_downwards():
  upward = [
    f"{a} -> {b}"
    for a, targets in graph().items()
    for b in targets
    if ROOMS.index(room(a)) < ROOMS.index(room(b))
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


def groups(cls=config_lib.Config):
  """Config and all groups of fields in it."""
  yield cls
  for field in dataclasses.fields(cls):
    default = getattr(cls(), field.name)
    if dataclasses.is_dataclass(default):
      yield from groups(type(default))


# A group that is handed on whole, by dataclasses.asdict: its fields are read from the other class.
WHOLE = {config_lib.Architecture: model.ModelConfig}
FOLLOWED = (*groups(), config_lib.Limits, *WHOLE.values())


def owner_of(cls, name):
  """(class, field), where a class in the bases of `cls` defines the field."""
  bases = [base for base in cls.__mro__ if name in vars(base).get("__annotations__", {})]
  return (bases or [cls])[-1], name


class _Reads(ast.NodeVisitor):
  """(class, field) of every config field that a module reads, by following names to their group.

  A field counts only where it is read from its own group, or from a class that takes its place: the
  same name on something else, or the same word in a text, does not.
  """

  def __init__(self, module, tree):
    self.found: set[tuple[type, str]] = set()
    self.known: dict[str, type] = {}  # source of a name or attribute -> its config dataclass
    self.names: dict[str, tuple[str, str]] = {}  # imported or defined here -> (module, name)
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom):
        self.names |= {a.asname or a.name: (node.module, a.name) for a in node.names}
      elif isinstance(node, ast.ClassDef):
        self.names[node.name] = (f"steptool_jax.{module}", node.name)
    self.visit(tree)

  def annotated(self, node) -> type | None:
    """The followed class that an annotation names."""
    if isinstance(node, ast.BinOp):  # Lora | None
      return self.annotated(node.left)
    module, name = "", ""
    if isinstance(node, ast.Name):
      module, name = self.names.get(node.id, ("", ""))
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in self.names:
      module, name = ".".join(self.names[ast.unparse(node.value)]), node.attr
    if name not in {cls.__name__ for cls in FOLLOWED}:
      return None
    found = getattr(importlib.import_module(module), name)
    return found if isinstance(found, type) and issubclass(found, FOLLOWED) else None

  def group(self, node) -> type | None:
    if isinstance(node, ast.IfExp):
      return self.group(node.body) or self.group(node.orelse)
    if ast.unparse(node) in self.known:
      return self.known[ast.unparse(node)]
    if isinstance(node, ast.Attribute):
      if node.attr == "config":
        return config_lib.Config
      owner = self.group(node.value)
      default = getattr(owner(), node.attr, None) if owner in FOLLOWED[: -len(WHOLE)] else None
      return type(default) if dataclasses.is_dataclass(default) else None
    return None

  def visit_ClassDef(self, node):
    before = dict(self.known)
    for statement in node.body:
      if isinstance(statement, ast.AnnAssign):
        self.known.pop(f"self.{statement.target.id}", None)
        if found := self.annotated(statement.annotation):
          self.known[f"self.{statement.target.id}"] = found
    self.generic_visit(node)
    self.known = before

  def visit_FunctionDef(self, node):
    before = dict(self.known)
    for arg in (*node.args.args, *node.args.kwonlyargs):
      self.known.pop(arg.arg, None)
      if found := self.annotated(arg.annotation):
        self.known[arg.arg] = found
    self.generic_visit(node)
    # What __init__ puts on self holds in the methods after it.
    kept = {k: v for k, v in self.known.items() if k.startswith("self.")}
    self.known = before | kept

  def visit_Assign(self, node):
    self.generic_visit(node)
    for target in node.targets:
      pairs = [(target, node.value)]
      if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        pairs = list(zip(target.elts, node.value.elts, strict=True))
      for name, value in pairs:
        group = self.group(value)
        if group is not None:
          self.known[ast.unparse(name)] = group

  def visit_Attribute(self, node):
    owner = self.group(node.value)
    if owner is not None:
      self.found.add(owner_of(owner, node.attr))
    self.generic_visit(node)


def test_every_config_field_is_read_outside_config():
  """A field that nothing reads, or only a check of its value, is an option without an effect."""
  read = set()
  for name, tree in modules():
    if name not in ("config", "validation"):
      read |= _Reads(name, tree).found
  unread = [
    f"{cls.__name__}.{field.name}"
    for cls in groups()
    for field in dataclasses.fields(cls)
    if not {owner_of(c, field.name) for c in (cls, WHOLE.get(cls, cls))} & read
  ]
  assert not unread


def test_nothing_unsafe():
  source = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
  for word in (r"\beval\(", r"\bexec\(", r"pickle", r"trust_remote_code=True", r"shell=True"):
    assert not re.search(word, source), word
