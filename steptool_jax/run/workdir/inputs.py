"""The files that a run learns from, told apart by their content and not by their place."""

import glob
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterable

from steptool_jax.config import Config

# Of a model's folder, what is read; notes beside it may change.
_MODEL = (".json", ".jinja", ".model", ".safetensors", ".gguf", ".txt")
_WHOLE = 64 << 20  # larger files are told by pieces
_PIECES, _PIECE = 64, 64 << 10


def digests(config: Config, workdir: pathlib.Path) -> dict[str, str]:
  """{field: digest of the files that it names}, of the fields that name files that are there.

  The compact tokenizer is in the workdir.
  """
  c, m = config.environment, config.model
  named: dict[str, Iterable[pathlib.Path]] = {}
  if c.name in ("custom", "harness"):
    named["environment.tasks"] = [pathlib.Path(c.tasks)]
    named["environment.functions"] = _module(c.functions)
  if c.name == "verifiers" and c.verifiers.endswith(".toml"):
    named["environment.verifiers"] = [pathlib.Path(c.verifiers)]
  if c.name == "toolbench":
    queries = pathlib.Path(c.toolbench.folder, "solvable_queries")
    subsets = sorted({*c.toolbench.subsets, *c.toolbench.train_subsets})
    named["environment.toolbench.folder"] = [
      path for subset in subsets for path in sorted(queries.rglob(f"{subset}.json"))
    ]
    named["environment.toolbench.prompt"] = [pathlib.Path(c.toolbench.prompt)]
  for field, value in (("model.path", m.path), ("model.tokenizer", m.tokenizer)):
    if value and not value.startswith("asset:"):
      path = workdir / "tokenizer" if value == "compact" else pathlib.Path(value)
      inner = sorted(p for p in path.glob("*") if p.suffix in _MODEL)
      named[field] = inner if path.is_dir() else [path]
  for field, value in (
    ("data.path", config.data.path),
    ("reward_model.data", config.reward_model.data),
    ("rewards.model.path", config.rewards.model.path),
  ):
    matched = sorted(map(pathlib.Path, glob.glob(value)))
    named[field] = [p for m in matched for p in (sorted(m.rglob("*")) if m.is_dir() else [m])]
  out = {}
  for field, paths in named.items():
    files = [path for path in paths if path.is_file()]
    if files:
      out[field] = digest(files)
  return out


def digest(files: Iterable[pathlib.Path]) -> str:
  """Of names and contents; of a large file (weights), of its size and of pieces all over it."""
  found = hashlib.sha256()
  for path in files:
    size = path.stat().st_size
    found.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
      if size <= _WHOLE:
        found.update(file.read())
        continue
      for k in range(_PIECES):
        file.seek(k * (size - _PIECE) // (_PIECES - 1))
        found.update(file.read(_PIECE))
  return found.hexdigest()[:32]


def _module(name: str) -> list[pathlib.Path]:
  """The file of a module with tools: its path, or a name that Python finds."""
  if not name or name.endswith(".py"):
    return [pathlib.Path(name or ".none")]
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError):
    return []
  return [pathlib.Path(spec.origin)] if spec is not None and spec.origin else []
