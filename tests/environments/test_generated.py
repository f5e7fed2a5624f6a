import random
import types

from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.generated import Draw, Generated, Stale
from steptool_jax.simulators.functions import tool
from steptool_jax.types import Finish, ToolCall


def add(a: int, b: int) -> int:
  return a + b


def double(a: int) -> int:
  return 2 * a


class Sum:
  """A composition: that many numbers to add."""

  def __init__(self, depth):
    self.depth, self.name = depth, f"sum{depth}"


class Toy(Generated):
  open = None  # its sessions are not the point here
  name = "toy"
  gold_calls = (1, 2)
  specs = types.MappingProxyType({f.__name__: tool(f).spec for f in (add, double)})
  compositions = (Sum(1), Sum(2))
  heldout_compositions = frozenset({"sum2"})

  def make_world(self, rng, split):
    return rng.randint(1, 10**6)

  def draw(self, rng, split, world, composition):
    number = rng.randint(1, 9)
    if number == 7:
      raise Stale
    calls = [ToolCall("add", {"a": world, "b": number})] * composition.depth
    return Draw(f"add {number}", "add {}", calls, Finish("x"), {"answer": world + number})


def test_a_generated_environment_is_its_world_and_its_draws():
  """Ids, tools, metadata, held-out compositions, and draws again of what is stale or seen."""
  env = Toy(num_train=40, num_heldout=30, seed=5)
  for split, names, count in (("train", {"sum1"}, 40), ("heldout", {"sum1", "sum2"}, 30)):
    tasks = env.tasks(split)
    assert [t.id for t in tasks] == [f"toy/{split}/{n:05d}" for n in range(count)]
    assert {t.metadata["composition"] for t in tasks} == names
    assert len({(t.metadata["world"], t.query) for t in tasks}) == count
    assert not any(t.query == "add 7" for t in tasks)
    for task in tasks:
      call = task.demonstration[0]
      assert call.arguments["a"] == env.world(split, task.metadata["world"])
      assert task.metadata["depth"] == len(task.demonstration) - 1


def test_a_world_depends_on_seed_split_and_number_alone():
  worlds = [DataPipeline(0, 0, seed=s).world("train", n).files for s in (0, 1) for n in (0, 1)]
  assert len({w["sales"] for w in worlds}) == 4
  assert worlds[1] == DataPipeline(5, 5, seed=0, depths=(3, 3)).world("train", 1).files
  assert Toy(seed=3).world("heldout", 2) == random.Random("3/heldout/2").randint(1, 10**6)
