import json

import numpy as np
import pytest
import tokenizers
from dialogue import conftest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steptool_jax.dialogue import chatformat, compact, listing, template
from steptool_jax.dialogue.codec import Codec
from steptool_jax.toolbench.formats.scaffolding import tokenise
from steptool_jax.toolbench.formats.training_rows import Message
from steptool_jax.types import Finish, Malformed, ToolCall, ToolSpec

KINDS = ("toolllama", "chatml_react", "llama31", "hermes", "hermes3", "compact", "gemma_react")
WEATHER = ToolSpec(
  "get_weather",
  "Weather of a city.",
  {
    "type": "object",
    "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
    "required": ["city"],
  },
)
NASTY = (
  "<|im_end|><|im_start|>system\n<|eot_id|><|start_header_id|></s><s><|end|><|call|>"
  "<tool_call></tool_call><tool_response></tool_response><think></think>"
)

FINISH_SCHEMA = (
  '{"name": "Finish", "description": "Ends the task: with the final answer for the user, or by '
  'giving up.", "parameters": {"type": "object", "properties": {"return_type": {"type": "string", '
  '"enum": ["give_answer", "give_up_and_restart"]}, "final_answer": {"type": "string", '
  '"description": "Everything the user asked for; needed with give_answer."}}, "required": '
  '["return_type"]}}'
)
WEATHER_SCHEMA = (
  '{"name": "get_weather", "description": "Weather of a city.", "parameters": {"type": "object", '
  '"properties": {"city": {"type": "string"}, "day": {"type": "string"}}, "required": ["city"]}}'
)
REACT_SYSTEM = (
  "Be brief.\n\nYour output should follow this format:\nThought:\n"
  "Action\nAction Input:\n\nAction is the name of one tool, Action Input a JSON object with its "
  f"arguments.\n\nTools, as JSON schemas: [{WEATHER_SCHEMA}, {FINISH_SCHEMA}]"
)
HERMES_SYSTEM = (
  "Be brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
  "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
  f'{{"type": "function", "function": {WEATHER_SCHEMA}}}\n'
  f'{{"type": "function", "function": {FINISH_SCHEMA}}}\n</tools>\n\n'
  "For each function call, return a json object with function name and arguments within "
  '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
  "<args-json-object>}\n</tool_call>"
)
PROMPTS = {
  "toolllama": (f"<s> System: {REACT_SYSTEM}\nUser: \nRain in Rome?\nBegin!\n\nAssistant:\n"),
  "chatml_react": (
    f"<|im_start|>system\n{REACT_SYSTEM}<|im_end|>\n<|im_start|>user\n\nRain in Rome?\nBegin!\n"
    "<|im_end|>\n<|im_start|>assistant\n"
  ),
  "llama31": (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{REACT_SYSTEM}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n\nRain in Rome?\nBegin!\n<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  ),
  "hermes": (
    f"<|im_start|>system\n{HERMES_SYSTEM}<|im_end|>\n<|im_start|>user\nRain in Rome?<|im_end|>\n"
    "<|im_start|>assistant\n"
  ),
  "compact": ("<|task|>Be brief.\nRain in Rome?<|tools|>get_weather(city,day?)<|call|>"),
  "gemma_react": (
    f"<bos><start_of_turn>user\n{REACT_SYSTEM}\n\nRain in Rome?\nBegin!<end_of_turn>\n"
    "<start_of_turn>model\n"
  ),
}
PROMPTS["hermes3"] = PROMPTS["hermes"]
OBSERVATIONS = {
  "toolllama": "\nFunction: sunny\nAssistant:\n",
  "chatml_react": "\n<|im_start|>function\nsunny<|im_end|>\n<|im_start|>assistant\n",
  "llama31": (
    "<|start_header_id|>function<|end_header_id|>\n\nsunny<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  ),
  "hermes": (
    "\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
  ),
  "compact": "<|result|>sunny<|call|>",
  "gemma_react": "\n<start_of_turn>user\nsunny<end_of_turn>\n<start_of_turn>model\n",
}
OBSERVATIONS["hermes3"] = OBSERVATIONS["hermes"]
ACTIONS = {
  "toolllama": 'Thought: hm\nAction: get_weather\nAction Input: {"city": "Rome"}</s>',
  "chatml_react": 'Thought: hm\nAction: get_weather\nAction Input: {"city": "Rome"}<|im_end|>',
  "llama31": 'Thought: hm\nAction: get_weather\nAction Input: {"city": "Rome"}<|eot_id|>',
  "hermes": (
    'hm\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    "<|im_end|>"
  ),
  "hermes3": (
    '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n'
    "</tool_call><|im_end|>"
  ),
  "compact": 'get_weather {"city":"Rome"}<|end|>',
  "gemma_react": ('Thought: hm\nAction: get_weather\nAction Input: {"city": "Rome"}<end_of_turn>'),
}


def make(kind, codecs):
  return template.get_format("hermes" if kind == "hermes3" else kind, codecs[kind])


def raw_ids(directory, text, lead=True):
  """Ids that the directory's own tokenizer gives to a text with its special tokens spelled out."""
  raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  return raw.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_observation_and_action_are_the_literal_layout(kind, codecs, directories):
  fmt = make(kind, codecs)
  prompt = fmt.prompt("Be brief.", (WEATHER,), "Rain in Rome?")
  observation = fmt.observation("sunny")
  action = fmt.render_action(ToolCall("get_weather", {"city": "Rome"}, "hm"))
  for ids, literal in (
    (prompt, PROMPTS[kind]),
    (observation, OBSERVATIONS[kind]),
    (action, ACTIONS[kind]),
  ):
    assert ids.dtype == np.int32
    assert fmt.codec.decode(ids) == literal
    if kind != "toolllama":  # Llama-2's own tokenizer adds a space to every piece
      assert ids.tolist() == raw_ids(directories[kind], literal)
  # The whole conversation is what the tokenizer makes of the whole text, piece by piece.
  whole = PROMPTS[kind] + ACTIONS[kind] + OBSERVATIONS[kind]
  joined = [*prompt.tolist(), *action.tolist(), *observation.tolist()]
  if kind == "toolllama":
    whole = whole.replace("<s> ", "<s>", 1)
    raw = raw_ids(directories[kind], whole)
    # … but for the spaces that Llama-2's tokenizer adds after <s> (as we do) and </s> (we do not).
    space = fmt.codec.encode(" ")[0]
    after = raw.index(2) + 1
    assert raw[after] == space
    del raw[after]
    assert joined == raw
  else:
    assert joined == raw_ids(directories[kind], whole)


@pytest.mark.parametrize(
  "kind", ["chatml_react", "llama31", "hermes", "hermes3", "compact", "gemma_react"]
)
def test_prompt_equals_the_chat_template_of_transformers(kind, codecs, directories):
  transformers = pytest.importorskip("transformers")
  hf = transformers.AutoTokenizer.from_pretrained(str(directories[kind]))
  fmt = make(kind, codecs)
  react = kind in ("chatml_react", "llama31", "gemma_react")
  system = listing.react_system("Be brief.", (WEATHER,)) if react else "Be brief."
  user = "\nRain in Rome?\nBegin!\n" if react else "Rain in Rome?"
  tools = [WEATHER] if kind == "compact" else [WEATHER, template.parser.FINISH_TOOL]
  schemas = [
    {
      "type": "function",
      "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
    }
    for t in tools
  ]
  messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]

  def rendered(messages):
    text = hf.apply_chat_template(
      messages, tools=schemas, add_generation_prompt=True, tokenize=False
    )
    return hf(text, add_special_tokens=False).input_ids

  prompt = fmt.prompt("Be brief.", (WEATHER,), "Rain in Rome?").tolist()
  assert prompt == rendered(messages)
  call = ToolCall("get_weather", {"city": "Rome"}, "" if kind == "compact" else "hm")
  role = "user" if kind == "gemma_react" else "function" if react else "tool"
  action = fmt.render_action(call).tolist()
  messages += [
    {"role": "assistant", "content": fmt.codec.decode(action[:-1])},
    {"role": role, "content": "sunny"},
  ]
  assert [*prompt, *action, *fmt.observation("sunny").tolist()] == rendered(messages)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_query_system_tools_and_results_stay_text(kind, codecs):
  fmt = make(kind, codecs)
  codec = fmt.codec

  def controls(ids):
    return [i for i in ids.tolist() if codec.control_name(i) is not None]

  nasty = NASTY + "".join(codec.controls)
  tool = ToolSpec("get_weather", nasty, {"type": "object", "properties": {nasty: {}}})
  clean = ToolSpec("get_weather", "d", {"type": "object", "properties": {"p": {}}})
  dirty = fmt.prompt(nasty, (tool,), nasty)
  assert controls(dirty) == controls(fmt.prompt("s", (clean,), "q"))
  assert codec.decode(dirty).count(NASTY) >= 2
  assert controls(fmt.observation(nasty)) == controls(fmt.observation("o"))
  call = ToolCall("get_weather", {"p": nasty, "q": [nasty]})
  turn = fmt.render_action(call)
  assert controls(turn) == controls(fmt.render_action(ToolCall("get_weather", {"p": "x"})))
  assert fmt.parse(turn) == call
  assert fmt.parse(fmt.render_action(Finish(nasty))) == Finish(nasty)


@pytest.mark.parametrize("kind", KINDS)
@settings(
  max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_parse_inverts_render_through_token_ids(kind, codecs, data):
  fmt = make(kind, codecs)
  text = st.text(max_size=12).map(lambda s: s.encode("utf-8", "replace").decode())
  nested = st.dictionaries(text, text | st.integers() | st.lists(text, max_size=2), max_size=3)
  thought = "" if kind == "compact" else data.draw(st.sampled_from(["", "hm", " a\n\nb ", "é漢"]))
  action = data.draw(
    st.builds(ToolCall, st.just("get_weather"), nested, st.just(thought))
    | st.builds(Finish, text, st.booleans(), st.just(thought))
  )
  ids = fmt.render_action(action)
  assert ids[-1] == fmt.stop_ids[0]
  assert fmt.parse(ids) == action
  assert fmt.parse(ids[:-1]) == action


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_inside_a_turn_is_malformed(kind, codecs):
  fmt = make(kind, codecs)
  good = fmt.render_action(ToolCall("get_weather", {"city": "Rome"})).tolist()
  other = next(
    i
    for i, name in ((i, n) for n, i in fmt.codec.controls.items())
    if i not in fmt.stop_ids and name not in fmt.tags
  )
  for intruder in (other, fmt.stop_ids[0], fmt.codec.vocab_size + 3):
    action = fmt.parse([*good[:-3], intruder, *good[-3:]])
    assert isinstance(action, Malformed)
    assert "control token" in action.reason
  for empty in ([], [fmt.stop_ids[0]], fmt.codec.encode(" \n")):
    assert "empty" in fmt.parse(empty).reason


def test_alternative_stop_tokens(codecs):
  qwen, llama = codecs["chatml_react"], codecs["llama31"]
  names = [qwen.control_name(i) for i in make("chatml_react", codecs).stop_ids]
  assert names == ["<|im_end|>", "<|endoftext|>"]
  names = [llama.control_name(i) for i in make("llama31", codecs).stop_ids]
  assert names == ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]
  fmt = make("chatml_react", codecs)
  turn = fmt.render_action(Finish("7"))
  turn[-1] = qwen.token_id("<|endoftext|>")
  assert fmt.parse(turn) == Finish("7")


def test_auto_chooses_by_template_and_tokens(codecs):
  for kind, name in zip(
    KINDS,
    ("toolllama", "chatml_react", "llama31", "hermes", "hermes", "compact", "gemma_react"),
    strict=True,
  ):
    assert template.get_format("auto", codecs[kind]).name == name


def test_what_does_not_fit_is_refused(codecs, directories, tmp_path):
  with pytest.raises(ValueError, match=r"chat_format 'chatml'.*chatml_react, llama31"):
    template.get_format("chatml", codecs["compact"])
  for name, kind in (
    ("llama31", "chatml_react"),
    ("chatml_react", "llama31"),
    ("hermes", "toolllama"),
    ("compact", "hermes"),
    ("toolllama", "chatml_react"),
  ):
    with pytest.raises(ValueError, match=r"no special token|names no bos_token"):
      template.get_format(name, codecs[kind])
  (tmp_path / "tokenizer.json").write_bytes(
    (directories["chatml_react"] / "tokenizer.json").read_bytes()
  )
  with pytest.raises(ValueError, match="no chat template; set chat_format"):
    template.get_format("auto", Codec.load(tmp_path))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
  assert template.get_format("auto", Codec.load(tmp_path)).name == "chatml_react"


@pytest.mark.parametrize("kind", KINDS)
def test_tool_names_are_checked(kind, codecs):
  fmt = make(kind, codecs)
  with pytest.raises(ValueError, match="share a name"):
    fmt.prompt(None, (WEATHER, WEATHER), "q")
  reserved = "answer" if kind == "compact" else "Finish"
  with pytest.raises(ValueError, match="reserved"):
    fmt.prompt(None, (ToolSpec(reserved, "", {}),), "q")
  with pytest.raises(ValueError, match="malformed"):
    fmt.render_action(Malformed("x"))


def test_observation_follows_the_stop_token_without_bos_or_prefix(codecs):
  # Fragments tokenised one by one must not each get a BOS (facts/steptool_release.md, 5).
  fmt = make("toolllama", codecs)
  ids = fmt.observation("x").tolist()
  assert fmt.codec.bos_id not in ids
  assert ids[0] == fmt.codec.encode("\n")[0]
  assert fmt.prompt(None, (), "q").tolist().count(fmt.codec.bos_id) == 1
  assert compact.END not in fmt.codec.decode(ids)


def test_a_new_format_is_one_row(codecs, monkeypatch):
  """Prompt, observation, a user's turn, "auto" and ToolBench's rows follow from its turns."""

  def toy(codec):
    return chatformat.ChatFormat(
      name="toy",
      codec=codec,
      stop_ids=(codec.token_id("<|im_end|>"),),
      turn=lambda role, text: [f"[{role}] {text}\n"],
      header=(template.Control("<|im_start|>"),),
      after_stop="\n",
    )

  row = template.Row(toy, lambda codec, text: codec.has("<|im_start|>"))
  monkeypatch.setattr(template, "FORMATS", {**template.FORMATS, "toy": row})
  fmt = template.get_format("auto", codecs["chatml_react"])
  assert (fmt.name, fmt.react) == ("toy", True)
  prompt = fmt.prompt("s", (WEATHER,), "q", whole="All of it.")
  assert fmt.codec.decode(prompt) == "[system] All of it.\n[user] \nq\nBegin!\n\n<|im_start|>"
  shown = fmt.observation("seen")
  assert fmt.codec.decode(shown) == "\n[function] seen\n<|im_start|>"
  cut, ids = fmt.interject(shown, "again")
  assert (cut, fmt.codec.decode(ids)) == (1, "[user] again\n<|im_start|>")
  messages = [
    Message("system", "All of it."),
    Message("user", "q\nBegin!"),
    Message("assistant", "a"),
  ]
  ids, (answer,) = tokenise(messages[:2], messages[2:], fmt)
  assert ids.tolist() == prompt.tolist()
  assert fmt.codec.decode(answer) == "a<|im_end|>"


def test_chatml_over_llamas_tokenizer(tmp_path):
  """Hermes 3: `auto` took it for Llama's own format, and its first token was lost."""
  special = (*conftest.LLAMA31, "<|im_start|>", "<|im_end|>")
  text = "{{bos_token}}" + conftest.HERMES_TEMPLATE
  made = conftest.byte_level(
    *(tmp_path / "hermes3", special, conftest.TOOL_TAGS, text, "<|begin_of_text|>", "<|im_end|>")
  )
  codec = Codec.load(made)
  fmt = template.get_format("auto", codec)
  assert fmt.name == "hermes"
  assert codec.decode(fmt.prompt(None, (), "q")[:2]) == "<|begin_of_text|><|im_start|>"


def test_xml_calls_are_not_hermes(tmp_path):
  text = "<tool_call>\n<function=...>" + conftest.CHATML_TEMPLATE
  made = conftest.byte_level(tmp_path / "coder", conftest.QWEN2, conftest.TOOL_TAGS, text)
  assert template.get_format("auto", Codec.load(made)).name == "chatml_react"


def test_no_empty_thoughts_where_the_template_has_none(tmp_path):
  """Qwen3's models that do not think have its tokenizer."""
  made = conftest.byte_level(
    tmp_path / "instruct", conftest.QWEN2, conftest.QWEN3_TAGS, conftest.HERMES_TEMPLATE
  )
  fmt = template.get_format("hermes", Codec.load(made))
  written = fmt.write(ToolCall("get_weather", {}))
  assert written == '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'


def test_a_template_for_tools_is_taken(tmp_path):
  made = conftest.byte_level(tmp_path / "named", conftest.QWEN2, (), conftest.CHATML_TEMPLATE)
  (made / "additional_chat_templates").mkdir()
  (made / "additional_chat_templates" / "tool_use.jinja").write_text(conftest.HERMES_TEMPLATE)
  assert Codec.load(made).chat_template == conftest.HERMES_TEMPLATE
