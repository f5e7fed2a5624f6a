"""The programs of learning, compiled in a thread while the first rollouts run."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax
from jax.sharding import Mesh


class Program:
  """A jitted function; called like it, and compiled ahead where `compile_ahead` was asked to."""

  def __init__(self, jitted: Callable):
    self.jitted = jitted
    self.ahead: Future | None = None  # of (shapes of the arguments, compiled)

  def __call__(self, *args: Any) -> Any:
    """What the function returns; the error of compiling it, where that failed."""
    if self.ahead is not None:
      shapes, compiled = self.ahead.result()
      if shapes == _shapes(args):
        return compiled(*args)
    return self.jitted(*args)


def compile_ahead(
  executor: Executor,
  mesh: Mesh,
  programs: Sequence[Program],
  arguments: Callable[[], Sequence[tuple]],
) -> None:
  """Compiles the programs in turn for the abstract arguments of each, which `arguments` returns.

  For one device: on several the compiler lays out what passes between programs.
  """
  for program in programs:
    program.ahead = Future()

  def work() -> None:
    left = list(programs)
    try:
      with jax.set_mesh(mesh):
        for abstract in arguments():
          compiled = left[0].jitted.lower(*abstract).compile()
          left.pop(0).ahead.set_result((_shapes(abstract), compiled))
    except BaseException as error:
      for program in left:
        program.ahead.set_exception(error)

  executor.submit(work)


def _shapes(args: Any) -> Any:
  leaves, structure = jax.tree.flatten(args)
  return structure, [(x.shape, x.dtype) for x in leaves]
