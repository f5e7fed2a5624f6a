import pytest

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.virtual import (
  NOT_WORKING,
  FirstAnswer,
  VirtualRequest,
  VirtualResponse,
  change_name,
  locate,
  parse_arguments,
  response_of,
  standardize,
  standardize_category,
)

REQUEST = VirtualRequest("Data", "tool", "api", {})


class Says:
  def __init__(self, answer):
    self.given, self.asked = answer, 0

  def answer(self, request):
    self.asked += 1
    if isinstance(self.given, Exception):
      raise self.given
    return self.given


A, B = VirtualResponse("", "a"), VirtualResponse("an error is an answer", "")


def test_the_first_answer_counts_and_ends_the_search():
  nobody, first, second = Says(None), Says(B), Says(A)
  assert FirstAnswer([nobody, first, second]).answer(REQUEST) == B
  assert (nobody.asked, first.asked, second.asked) == (1, 1, 0)


def test_no_answer_is_the_official_error():
  assert FirstAnswer([Says(None), Says(None)]).answer(REQUEST) == NOT_WORKING
  assert NOT_WORKING.text == '{"error": "API not working error...", "response": ""}'


def test_a_failed_simulator_is_passed_over_but_never_forgotten():
  down = Says(InfrastructureError("server down"))
  assert FirstAnswer([down, Says(A)]).answer(REQUEST) == A
  with pytest.raises(InfrastructureError, match="^server down$"):
    FirstAnswer([Says(None), down, Says(None)]).answer(REQUEST)
  with pytest.raises(InfrastructureError, match="2 simulators failed: server down; no money"):
    FirstAnswer([down, Says(InfrastructureError("no money"))]).answer(REQUEST)


def test_no_simulators():
  with pytest.raises(ValueError, match="simulators is empty"):
    FirstAnswer([])


def test_the_official_observation_keeps_data_as_data():
  response = VirtualResponse("", {"city": "Zürich", "codes": [1, None]})
  assert response.text == (
    '{"error": "", "response": {"city": "Z\\u00fcrich", "codes": [1, null]}}'
  )


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("TheClique", "theclique"),
    ("Songkick concert", "songkick_concert"),
    ("/v1/get--user (beta)!", "v1_get_user_beta"),
    ("__a___b__", "a_b"),
    ("2-day forecast", "get_2_day_forecast"),
    ("_2x", "get_2x"),
    ("x^2", "x^2"),
    ("天气 API", "天气_api"),
    ("¿¡", ""),
    ("", ""),
  ],
)
def test_official_name_rule(name, expected):
  assert standardize(name) == expected


def test_reserved_names_and_categories():
  assert [change_name(n) for n in ("from", "id", "true", "none")] == [
    "is_from",
    "is_id",
    "is_true",
    "none",
  ]
  assert standardize_category("News, Media") == "News_Media"
  assert standardize_category("Artificial%20Intelligence%2FMachine%20Learning") == (
    "Artificial_Intelligence_Machine_Learning"
  )


def test_all_names_of_one_api_lead_to_one_place():
  place = ("Video_Images", "bing_video", "search")
  for tool in ("Bing Video", "bing_video", "bing_video_for_Video_Images"):
    for api in ("Search", "search", "search_for_bing_video"):
      assert locate("Video, Images", tool, api) == place


@pytest.mark.parametrize("text", ["[1]", "3", '"a"', "{'a': 1}", "{", "prose", '{"a": ' * 9999])
def test_input_that_is_no_object_is_refused(text):
  with pytest.raises(ValueError, match="tool_input"):
    parse_arguments(text)


def test_input_forms():
  assert parse_arguments("") == {}
  assert parse_arguments('{"a": [1, 2.0]}') == {"a": [1, 2.0]}
  assert parse_arguments({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
  ("data", "wrong"),
  [
    ("text", "is a str"),
    ({"error": ""}, "no field response"),
    ({}, "no field error and no field response"),
    ({"error": 404, "response": ""}, "field error is a int"),
  ],
)
def test_what_is_no_response(data, wrong):
  with pytest.raises(ValueError, match=wrong):
    response_of(data)


def test_a_null_error_is_no_error():
  assert response_of({"error": None, "response": None}) == VirtualResponse("", None)
