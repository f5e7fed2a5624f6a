from steptool_jax.checking import sets
from steptool_jax.types import Finish, Task, ToolCall, ToolSpec


def spec(name, properties, description="Does it."):
  return ToolSpec(name, description, {"type": "object", "properties": properties})


def task(name, query, tools=(), actions=(), state=None):
  metadata = {} if state is None else {"state": state}
  return Task(name, "fake", query, tuple(tools), {}, (*actions, Finish("x")), metadata)


def test_schemas_and_descriptions():
  tools = [
    spec("good", {"a": {"type": "string"}, "b": {"anyOf": [{}]}, "c": {"$ref": "#/x"}}),
    spec("none", {}),
    spec("asked", {}),
    spec("loose", {"a": {"description": "anything"}, "b": {"enum": [1]}}),
    spec("mute", {}, " "),
  ]
  tasks = [task("t", "q", tools, [ToolCall("asked", {"z": 1}), ToolCall("none", {})])]
  found = sets.check_tools({"train": tasks, "heldout": tasks})
  assert [f.what for f in found] == [
    "tool asked has no schema: it is called with z, of which the model is told nothing",
    "tool loose has no schema for a: every value passes",
    "tool mute has no description",
  ]


def test_leaks_duplicates_and_empty_splits():
  splits = {
    "train": [task("a", "Who?"), task("b", "who? "), task("c", "How?", state={"n": 1})],
    "heldout": [task("d", "WHO?"), task("e", "How?", state={"n": 2}), task("a", "When?")],
  }
  found = sets.check_tasks(splits)
  assert [(f.kind, f.task) for f in found] == [("id", "a"), ("leak", "d")]
  assert "the same query: a, b" in found[1].what
  (empty,) = sets.check_tasks({"train": [], "heldout": [task("a", "q")]})
  assert empty.kind == "split"
  same = {"train": splits["train"], "heldout": [task("f", "How?", state={"n": 1})]}
  assert [f.task for f in sets.check_tasks(same)] == ["f"]
