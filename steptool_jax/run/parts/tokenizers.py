"""Tokenizers without weights: a compact one trained on tasks, and the one that a config names."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import steptool_jax
from steptool_jax.config import Config
from steptool_jax.dialogue import compact
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.environments.base import Environment
from steptool_jax.rollout.replaying import answered
from steptool_jax.run.workdir import inputs
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Task

ASSETS = pathlib.Path(steptool_jax.__file__).parent / "assets"
TASKS = 2000  # training tasks whose texts train a compact tokenizer


def located(path: str) -> pathlib.Path:
  """The folder or file that config.model.path names."""
  return ASSETS / path.removeprefix("asset:") if path.startswith("asset:") else pathlib.Path(path)


def train_compact(
  config: Config, environment: Environment, out: pathlib.Path, runner: ToolRunner | None
) -> pathlib.Path:
  """Writes a compact tokenizer to `out`, trained on what the first training tasks say.

  runner: calls their tools, with its time-out; without one, a tool that hangs hangs this call.
  RuntimeError where more tools hang than it may leave behind, or no session can be opened.
  """
  tasks = environment.tasks("train")[:TASKS]
  texts = (text for task in tasks for text in _texts(environment, task, runner))
  try:
    return compact.build_tokenizer(texts, config.model.architecture.vocab_size, out)
  except InfrastructureError as error:
    raise RuntimeError(f"the tokenizer 'compact' learns from what tools answer: {error}") from error


def _texts(environment: Environment, task: Task, runner: ToolRunner | None) -> Iterator[str]:
  """A task's own texts and what its tools answer to the demonstration, but for time-outs."""
  yield from compact.task_texts(task)
  if runner is None:
    session = environment.open(task, 0)
  else:
    what = f"opening a session for task {task.id}"
    session = runner.within(lambda: environment.open(task, 0), what, lambda late: late.close())
  for action in task.demonstration[:-1]:
    found = answered(session, action, runner)
    for observation in () if found is None else found.parts or (found,):
      if observation.code is not Code.TIMEOUT or observation.injected:
        yield observation.text
  session.close()


@contextlib.contextmanager
def opened_format(
  config: Config, environment: Environment, workdir: pathlib.Path, runner: ToolRunner
) -> Iterator[tuple[ChatFormat | None, str]]:
  """(chat format, "") as training would have it; (None, why) where its tokenizer is not there.

  No weights are read and WORKDIR is left as it is: what has to be made first lies in a folder that
  goes away in the end.
  """
  with tempfile.TemporaryDirectory(prefix="steptool_check_") as folder:
    try:
      directory = _directory(config, environment, workdir, runner, pathlib.Path(folder) / "made")
      m = config.model
      found = (
        get_format(m.chat_format, Codec.load(directory), m.tool_list, m.thinking, m.parallel_calls),
        "",
      )
    except (OSError, ValueError, ImportError) as error:
      found = None, str(error)
    yield found


def _directory(
  config: Config,
  environment: Environment,
  workdir: pathlib.Path,
  runner: ToolRunner,
  made: pathlib.Path,
) -> pathlib.Path:
  m = config.model
  if m.tokenizer and (m.tokenizer != "compact" or m.path):
    return pathlib.Path(m.tokenizer)
  if m.tokenizer:
    kept = workdir / "tokenizer"
    if (kept / "tokenizer_config.json").exists():
      return kept
    return train_compact(config, environment, made, runner)
  if not m.path:
    raise ValueError("neither model.tokenizer nor model.path names a tokenizer")
  if m.path.startswith("asset:"):
    return located(m.path)
  path = pathlib.Path(m.path)
  if not path.exists():
    raise FileNotFoundError(f"config.model.path: there is no {m.path!r} here")
  if path.suffix == ".gguf":
    kept = workdir / "imported" / inputs.digest([path])
    if (kept / "tokenizer_config.json").exists():
      return kept
    from steptool_jax.policy.formats import gguf  # needs the extra `gguf`

    gguf.gguf_tokenizer(path, made)
    return made
  return path
