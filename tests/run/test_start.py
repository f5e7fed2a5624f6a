"""What a start costs: programs that are kept, and programs that are compiled while rollouts run."""

import types
from concurrent.futures import Executor, ThreadPoolExecutor

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from steptool_jax.policy import sharding
from steptool_jax.run.parts import build, compiled, opening
from steptool_jax.run.training import ahead
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import Progress


@pytest.fixture
def settings():
  """JAX's settings as they were."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_by_default_and_where_jax_is_told_to(settings, tmp_path, monkeypatch):
  """Every start compiled for a quarter of a minute what the last one had compiled."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  folder = compiled.keep("auto", tmp_path)
  assert folder.parent == tmp_path / "steptool_jax" / "compiled"
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert jax.config.jax_compilation_cache_max_size == 4 * 2**30
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  assert compiled.keep("auto", tmp_path) is None
  assert jax.config.jax_compilation_cache_dir == "/elsewhere"
  assert compiled.keep(str(tmp_path / "mine"), tmp_path) == tmp_path / "mine"
  assert jax.config.jax_compilation_cache_max_size == -1
  # Of several processes one writes for all, which only those on its machine could read at home.
  monkeypatch.setattr(compiled.hosts, "peers", lambda: types.SimpleNamespace(count=2))
  jax.config.update("jax_compilation_cache_dir", None)
  assert compiled.keep("auto", tmp_path).parent == tmp_path / "compiled"
  assert jax.config.jax_compilation_cache_max_size == -1
  assert compiled.keep("none", tmp_path) is None
  assert jax.config.jax_compilation_cache_dir is None


def test_another_processor_has_a_folder_of_its_own(monkeypatch):
  """Homes are shared, and programs for instructions that a processor lacks end the process."""
  here = compiled.default_folder()
  monkeypatch.setattr(compiled, "_processor", lambda: "another one")
  assert compiled.default_folder() != here


def test_a_folder_that_cannot_be_made(settings, tmp_path, monkeypatch):
  """By default it costs a warning; one that was asked for is an error that names the field."""
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  jax.config.update("jax_compilation_cache_dir", None)
  assert compiled.keep("auto", tmp_path) is None
  with pytest.raises(ValueError, match=r"config\.compilation_cache: .*/file/x cannot be made"):
    compiled.keep(str(tmp_path / "file" / "x"), tmp_path)


def mesh():
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def test_a_program_that_was_compiled_ahead_is_the_one_that_runs():
  jitted = jax.jit(lambda x: 2 * x)
  program = ahead.Program(jitted)
  abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
  with ThreadPoolExecutor(1) as executor:
    ahead.compile_ahead(executor, mesh(), [program], lambda: [(abstract,)])
    assert program(np.ones(3, np.float32)).tolist() == [2.0] * 3
  assert jitted._cache_size() == 0, "compiled twice"
  assert program(np.ones(4, np.float32)).tolist() == [2.0] * 4  # other shapes than were told
  assert jitted._cache_size() == 1


def test_an_error_of_the_thread_comes_to_its_caller():
  """A program that does not fit would be compiled again, or the error be lost in the thread."""

  def broken(x):
    raise ValueError("does not fit")

  good, bad, never = (ahead.Program(jax.jit(f)) for f in (lambda x: x, broken, lambda x: x))
  one = (jax.ShapeDtypeStruct((3,), jnp.float32),)
  with ThreadPoolExecutor(1) as executor:
    ahead.compile_ahead(executor, mesh(), [good, bad, never], lambda: [one] * 3)
    assert good(np.ones(3, np.float32)).tolist() == [1.0] * 3
    for program in (bad, never):
      with pytest.raises(ValueError, match="does not fit"):
        program(np.ones(3, np.float32))


class Now(Executor):
  def submit(self, work):
    work()


class Told(ahead.Program):
  """Notes whether a call fits what was compiled ahead, and computes nothing but shapes."""

  fits = None

  def __call__(self, *args):
    shapes, _ = self.ahead.result()
    self.fits = shapes == ahead._shapes(args)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(self.jitted, *args))


@pytest.mark.parametrize(
  ("phase", "algorithm"), [("sft", "steptool"), ("rl", "steptool"), ("rl", "archer")]
)
def test_what_is_compiled_ahead_is_what_a_phase_calls(phase, algorithm, tmp_path, monkeypatch):
  """With a shape or type that is told wrong, all would be compiled for nothing, and once more."""
  config = tiny.make("calls", algorithm=algorithm, train__minibatches=2)
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    variables = build.initial_variables(config, parts.policy, parts.mesh)
    one = Phase(config, parts.policy, parts.mesh, Progress(phase=phase), 3, 8)
    one.programs = tuple(Told(program.jitted) for program in one.programs)
    one.start(variables)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: None)  # shapes are enough
    one.compile_ahead(Now())
    rng = np.random.default_rng(0)
    trajectories = [fakes.random_trajectory(rng) for _ in range(8)]
    if phase == "sft":
      one.imitate(trajectories, -(-config.sft.batch // config.sft.micro_rows))
      assert one.programs[1].fits
      return
    packed = one.pack(trajectories)
    prepared, _ = one.prepare(packed)
    for minibatch, count in one.minibatches(prepared, len(packed.batch.tokens), 0):
      one.update(minibatch, count)
      assert [program.fits for program in one.programs] == [True, True]


def test_a_run_that_goes_on_has_the_table_of_before(tmp_path):
  """A narrower one rounds its sums in another way, and compiles once more."""
  config = tiny.make("calls", algorithm="steptool")
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    progress = Progress(phase="rl", table_width=48)
    one = Phase(config, parts.policy, parts.mesh, progress, 3, 8)
    one.start(build.initial_variables(config, parts.policy, parts.mesh))
    widths = []
    one.programs = (lambda state, batch, count, table, recorded: widths.append(table), None)
    rng = np.random.default_rng(0)
    one.prepare(one.pack([fakes.random_trajectory(rng) for _ in range(8)]))
    assert (widths[0].position.shape[-1], progress.table_width) == (48, 48)
