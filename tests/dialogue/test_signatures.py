"""Signatures say what the JSON schema says: a reader written for the test gets it back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.dialogue import template
from steptool_jax.dialogue.signatures import TYPES, signature
from steptool_jax.types import Finish, ToolCall, ToolSpec

PLAIN = {short: name for name, short in TYPES.items()}
DECODER = json.JSONDecoder()


class Reader:
  """A slow reader of one signature; every character has to have a meaning."""

  def __init__(self, text):
    self.text, self.at = text, 0

  def sees(self, *words):
    word = next((w for w in words if self.text.startswith(w, self.at)), None)
    self.at += len(word or "")
    return word

  def value(self):
    value, self.at = DECODER.raw_decode(self.text, self.at)
    return value

  def name(self):
    if self.text[self.at] == '"':
      return self.value()
    start = self.at
    while self.text[self.at] not in "(?:}, ":
      self.at += 1
    return self.text[start : self.at]

  def parameters(self, end):
    schema = {"properties": {}, "required": []}
    while not self.sees(end):
      self.sees(", ")
      if self.sees("...: "):
        schema["additionalProperties"] = self.part()
      elif self.sees("..."):
        schema["additionalProperties"] = True
      else:
        name = self.name()
        if not self.sees("?"):
          schema["required"].append(name)
        assert self.sees(": ")
        schema["properties"][name] = self.part()
    return schema

  def part(self):
    if self.sees("json "):
      return self.value()
    members = [self.type()]
    while self.sees(" | "):
      members.append(self.type())
    if all("const" in m for m in members):
      schema = {"enum": [m["const"] for m in members]}
    else:
      schema = members[0] if len(members) == 1 else {"anyOf": members}
    if self.sees(" ="):
      self.at -= 2
    elif self.text[self.at : self.at + 2] == ' "':
      self.at += 1
      schema["description"] = self.value()
    if self.sees(" = "):
      schema["default"] = self.value()
    return schema

  def type(self):
    if self.sees("list["):
      schema = {"type": "array", "items": self.part()}
      assert self.sees("]")
    elif self.sees("list"):
      schema = {"type": "array"}
    elif self.sees("{"):
      schema = {"type": "object", **self.parameters("}")}
    elif self.sees("object"):
      schema = {"type": "object"}
    elif self.sees("any"):
      schema = {}
    elif (word := self.sees(*PLAIN)) and self.text[self.at] != '"':
      schema = {"type": PLAIN[word]}
    else:
      return {"const": self.value()}
    if self.sees("("):
      while not self.sees(")"):
        self.sees(", ")
        key = self.name_of_keyword()
        schema[key] = self.value()
    return schema

  def name_of_keyword(self):
    start = self.at
    self.at = self.text.index("=", start) + 1
    return self.text[start : self.at - 1]


def read(text):
  """(name, schema, description) of a signature."""
  reader = Reader(text)
  name = reader.name()
  assert reader.sees("(")
  schema = reader.parameters(")")
  described = reader.text[reader.at :]
  assert not described or described.startswith(" -> ")
  return name, schema, described.removeprefix(" -> ")


NAMES = st.text(st.sampled_from("ab_1-. é\"'?:,"), min_size=1, max_size=5)
TEXTS = st.text(st.sampled_from('ab ,|)]}="?:'), min_size=1, max_size=8).map(
  lambda text: " ".join(text.split())
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=5))


def with_texts(schemas):
  """A description, a default, both or none beside each."""
  extra = st.fixed_dictionaries({}, optional={"description": TEXTS.filter(bool), "default": VALUES})
  return st.builds(lambda schema, more: schema | more, schemas, extra)


def objects(children):
  def made(properties, flags, more):
    required = [name for name, flag in zip(properties, flags, strict=False) if flag]
    schema = {"type": "object", "properties": properties, "required": required}
    return schema if more is False else schema | {"additionalProperties": more}

  return st.builds(
    made,
    st.dictionaries(NAMES, with_texts(children), max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.one_of(st.just(False), st.just(True), children.filter(bool)),
  )


LEAVES = st.one_of(
  st.sampled_from([{"type": name} for name in TYPES]),
  st.just({}),
  st.just({"type": "integer", "minimum": 1, "maximum": 5}),
  st.just({"type": "string", "pattern": "^[a-z, )]+$"}),
  # [null] alone is the type null, and reads so.
  st.lists(VALUES.filter(lambda x: x is not None), min_size=1, max_size=3, unique_by=repr).map(
    lambda x: {"enum": x}
  ),
)
SCHEMAS = st.recursive(
  LEAVES,
  lambda children: st.one_of(
    with_texts(children).map(lambda x: {"type": "array", "items": x}),
    objects(children),
    st.lists(
      children.filter(lambda x: "enum" not in x and "anyOf" not in x), min_size=2, max_size=2
    ).map(lambda x: {"anyOf": x}),
  ),
  max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(objects(SCHEMAS), NAMES, TEXTS)
def test_every_field_of_a_schema_survives(schema, name, description):
  """A name, type, choice, default or a field that is required was lost on the way."""
  line = signature(ToolSpec(name, description, schema))
  assert "\n" not in line
  expected = {key: value for key, value in schema.items() if key != "type"}
  assert read(line) == (name, expected, description)


@pytest.mark.parametrize(
  ("schema", "expected"),
  [
    ({"properties": {"id": {"type": "string"}}, "required": ["id"]}, "(id: str)"),
    (
      {
        "properties": {
          "sort": {"enum": ["up", "down"], "type": "string", "default": "up"},
          "most": {"type": ["integer", "null"], "description": "how\nmany"},
        },
        "additionalProperties": False,
      },
      '(sort?: "up" | "down" = "up", most?: int | null "how many")',
    ),
    # As Pydantic writes them: titles, and a reference into the definitions.
    (
      {
        "title": "Booking",
        "type": "object",
        "$defs": {"Guest": {"type": "object", "properties": {"age": {"type": "integer"}}}},
        "properties": {"guest": {"$ref": "#/$defs/Guest"}},
        "required": ["guest"],
      },
      "(guest: {age?: int})",
    ),
    # What has no short form stays JSON, whole: an own keyword at the top, a recursion, no type.
    ({"anyOf": [{}], "minProperties": 1}, '({"anyOf": [{}], "minProperties": 1})'),
    ({"properties": {"a": {"allOf": [{"type": "string"}]}}}, '(a?: json {"allOf": [{"type": "st'),
    ({"properties": {"a": {"type": "date"}}}, '(a?: json {"type": "date"})'),
    ({"required": ["b"]}, '({"required": ["b"]})'),
    ({"properties": {"a": {"$ref": "#/$defs/A"}}}, '(a?: json {"$ref": "#/$defs/A"})'),
    ({"properties": {"a": {"enum": ["up", None]}}}, '(a?: "up" | null)'),
    ({}, "()"),
  ],
)
def test_literals(schema, expected):
  assert signature(ToolSpec("f", "Does\n it.", schema)).startswith(f"f{expected}")
  assert signature(ToolSpec("f", "Does\n it.", schema)).endswith(" -> Does it.")


def test_a_recursive_schema_keeps_its_definitions():
  """Written out it never ends; without its definitions the reference means nothing."""
  tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}}
  schema = {"$defs": {"Tree": tree}, "properties": {"root": {"$ref": "#/$defs/Tree"}}}
  line = signature(ToolSpec("f", "", schema))
  found = json.loads(line.removeprefix("f(root?: json ").removesuffix(")"))
  assert found == {"$ref": "#/$defs/Tree", "$defs": {"Tree": tree}}


WEATHER = ToolSpec(
  "get_weather",
  "Weather of a city.",
  {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
LINE = "get_weather(city: str) -> Weather of a city.\nFinish(return_type: "


@pytest.mark.parametrize("kind", ["toolllama", "chatml_react", "llama31", "hermes"])
def test_formats_list_signatures_and_speak_as_before(kind, codecs):
  """Calls are written and read as with JSON lists; a benchmark's own JSON list is left out."""
  plain = template.get_format(kind, codecs[kind])
  short = template.get_format(kind, codecs[kind], "signature")
  prompts = [f.prompt("Be brief.", (WEATHER,), "Rain?", whole="[{}]") for f in (plain, short)]
  text = short.codec.decode(prompts[1])
  assert LINE in text
  assert "[{}]" not in text
  assert text.count("get_weather") == 1
  assert '"properties"' not in text
  for action in (ToolCall("get_weather", {"city": "Rome"}, "hm"), Finish("wet")):
    ids = short.render_action(action)
    assert ids.tolist() == plain.render_action(action).tolist()
    assert short.parse(ids) == plain.parse(ids) == action
  with pytest.raises(ValueError, match="'Finish' is reserved"):
    short.prompt(None, (ToolSpec("Finish", "", {}),), "q")


def test_what_is_refused(codecs):
  with pytest.raises(ValueError, match="tool_list 'short': choose one of json, signature"):
    template.get_format("hermes", codecs["hermes"], "short")
  with pytest.raises(ValueError, match="'compact' has a list of its own"):
    template.get_format("compact", codecs["compact"], "signature")


@pytest.mark.parametrize(
  "schema",
  [
    {
      "type": "object",
      "properties": {"email": {"type": "string"}, "phone": {"type": "string"}},
      "anyOf": [{"required": ["email"]}, {"required": ["phone"]}],
    },
    {"type": "object", "properties": {"x": {"type": "string", "const": "usd", "pattern": "u"}}},
    {"type": "object", "properties": {"x": {"const": 1, "minimum": 0}}},
  ],
)
def test_what_a_short_form_would_lose_stays_json(schema):
  line = signature(ToolSpec("f", "", schema))
  assert any(word in line for word in ('"anyOf"', '"const"'))
