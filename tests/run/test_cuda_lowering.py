"""Every program of a run is lowered for CUDA, without a GPU: a CPU's or a TPU's own path shows."""

import jax
import pytest
import tiny

from steptool_jax.policy import attention, sharding
from steptool_jax.run import compile as compile_mode

NAMES = ["prepare", "update", "append", "decode", "fork", "rewind"]


@pytest.fixture(scope="module")
def programs():
  """Traced as on one GPU: blocks of a GPU, and no kernel of a TPU."""
  config = tiny.make(
    model__path="/not/here", algorithm="steptool", model__dtype="bfloat16", train__row_tokens=384
  )
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
  where = jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, abstract_device=device)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    found = compile_mode.programs(config, compile_mode.abstract_policy(config), mesh)
  lowered = {}
  with jax.sharding.use_abstract_mesh(where):
    assert sharding.platform() == "gpu"
    for program in found:
      traced = program.function.trace(*program.arguments, **program.options)
      lowered[program.name] = traced.lower(lowering_platforms=("cuda",)).as_text()
  return lowered


def test_all_programs_are_lowered(programs):
  assert list(programs) == NAMES
  for text in programs.values():
    assert "tpu_custom_call" not in text


def test_blocks_are_those_of_a_gpu(programs):
  """A row of 384 is one block of at most 512; a CPU would take three of 128."""
  assert attention.BLOCK >= 384 > attention.CPU_BLOCK
  assert "x2x768x384xf32" in programs["update"]  # scores of 2 key-value heads, 2 queries each
