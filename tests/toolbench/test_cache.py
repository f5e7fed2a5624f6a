import ast
import concurrent.futures
import json
import multiprocessing
import sqlite3
import time

import official_data
import pytest

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.cache import Cache, Recorded, canonical_key
from steptool_jax.toolbench.simulators.virtual import NOT_PARSED, VirtualRequest, VirtualResponse

DATA = official_data.DATA / "stabletoolbench/tool_response_cache"


def entry(response, error=""):
  return {"error": error, "response": response}


def request(arguments, api="find", tool="IP Lookup", category="News, Media"):
  return VirtualRequest(category, tool, api, arguments)


@pytest.fixture
def folder(tmp_path):
  """Writes API files: folder({"find": {key: entry} or text})."""
  root = tmp_path / "tool_response_cache"

  def write(files):
    place = root / "News_Media" / "ip_lookup_for_News_Media"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      if isinstance(content, bytes):
        (place / f"{name}.json").write_bytes(content)
      else:
        (place / f"{name}.json").write_text(json.dumps(content))
    return root

  return write


def test_exact_key_then_canonical_key(folder):
  cache = Cache(folder({"find": {"{'a': 1, 'b': 'x'}": entry("one"), "{'b': 'x'}": entry("b")}}))
  assert cache.answer(request({"a": 1, "b": "x"})) == VirtualResponse("", "one")
  for same in (
    {"b": "x", "a": 1},
    {"a": "1", "b": "x"},
    {"a": 1.0, "b": "x"},
    {"b": "x", "a": "1.0"},
  ):
    assert cache.answer(request(same)).response == "one"
    assert cache.answer(request(json.dumps(same))).response == "one"
  assert cache.answer(request({"a": 2, "b": "x"})) is None
  assert cache.answer(request({"a": 1, "b": "x"}, api="other")) is None
  stats = cache.stats()
  assert (stats.exact_hits, stats.canonical_hits, stats.misses) == (1, 8, 2)


def test_an_exact_key_goes_before_a_rival_of_the_same_canonical_key(folder):
  cache = Cache(folder({"find": {"{'a': 1}": entry("int"), "{'a': '1'}": entry("text")}}))
  assert cache.answer(request({"a": 1})).response == "int"
  assert cache.answer(request({"a": "1"})).response == "text"
  assert cache.answer(request({"a": 1.0})).response == "int"  # the first one
  assert cache.stats().conflicts == 1


def test_a_conflict_resolves_to_the_first_answer_that_says_something(folder):
  keys = ["{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", "{'a': '1', 'b': 2}", "{'b': '2', 'a': 1}"]
  answers = [entry("", "no such thing"), entry(""), entry("yes"), entry("late")]
  cache = Cache(folder({"find": dict(zip(keys, answers, strict=True))}))
  assert cache.answer(request({"b": "2", "a": "1"})).response == "yes"
  assert cache.answer(request({"a": 1, "b": 2})).error == "no such thing"
  assert cache.stats().conflicts == 3


def test_equal_answers_are_no_conflict(folder):
  cache = Cache(folder({"find": {"{'a': 1}": entry("x"), "{'a': '1'}": entry("x")}}))
  assert cache.answer(request({"a": 1})).response == "x"
  assert cache.stats().conflicts == 0


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
    ({"x": 1}, {"x": "1"}),
    ({"x": 1}, {"x": "1.0"}),
    ({"x": -0.5}, {"x": "-0.5"}),
    ({"x": 39.5501}, {"x": "39.5501"}),
    ({"x": [{"b": 1, "a": "2"}]}, {"x": [{"a": 2, "b": 1.0}]}),
    ({"x": 12345678901234567890}, {"x": "12345678901234567890"}),
  ],
)
def test_one_canonical_key(a, b):
  assert canonical_key(a) == canonical_key(b)


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ({"zip": "01001"}, {"zip": 1001}),
    ({"version": "1.10"}, {"version": "1.1"}),
    ({"x": True}, {"x": 1}),
    ({"x": True}, {"x": "True"}),
    ({"x": None}, {"x": "None"}),
    ({"x": [1, 2]}, {"x": [2, 1]}),
    ({"x": [1]}, {"x": "[1]"}),
    ({"x": "a"}, {"x": "A"}),
    ({"x": ""}, {}),
    ({"x": "+1"}, {"x": 1}),
    ({"x": "1e3"}, {"x": 1000}),
    ({"a": "b', 'c': 'd"}, {"a": "b", "c": "d"}),
  ],
)
def test_different_canonical_keys(a, b):
  assert canonical_key(a) != canonical_key(b)


FULL = {f"{{'a': {i}}}": entry({"n": [i, "ü"]}) for i in range(4)}


def test_every_way_to_cut_a_file_keeps_only_whole_answers(folder):
  whole = json.dumps(FULL, indent=1, ensure_ascii=False).encode()
  seen = set()
  for end in range(0, len(whole) - 1):
    cache = Cache(folder({"find": whole[:end]}))
    answers = [cache.answer(request({"a": i})) for i in range(4)]
    found = [a is not None for a in answers]
    assert found == sorted(found, reverse=True)  # a prefix
    assert all(a.response == {"n": [i, "ü"]} for i, a in enumerate(answers) if a is not None)
    stats = cache.stats()
    assert stats.damaged_files == 1
    assert stats.entries == sum(found)
    seen.add(sum(found))
  assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"null", b"\xff\xfe{}", b"prose", b'{"a" 1}', b"{1: 2}"]
)
def test_a_damaged_file_is_counted_and_answers_nothing(folder, content):
  cache = Cache(folder({"find": content, "good": FULL}))
  assert cache.answer(request({"a": 1})) is None
  assert cache.answer(request({"a": 1}, api="good")).response == {"n": [1, "ü"]}
  stats = cache.stats()
  assert (stats.files, stats.damaged_files, stats.entries) == (2, 1, 4)


def test_strange_entries_are_skipped_and_counted(folder):
  cache = Cache(
    folder(
      {
        "find": {
          "{'a': 1}": "only text",
          "{'a': 2}": {"response": "no error field"},
          "{'a': 3}": entry("", "Failed to generate fake response"),
          "__import__('os').abort()": entry("exact only"),
          '{"a": true}': entry("JSON key"),
          "{'a': 4}": entry("good"),
          "(" * 5000: entry("deep"),
        }
      }
    )
  )
  assert [cache.answer(request({"a": i})) for i in (1, 2, 3)] == [None] * 3
  assert cache.answer(request({"a": 4})).response == "good"
  assert cache.answer(request({"a": True})).response == "JSON key"
  stats = cache.stats()
  assert stats.invalid_entries == 2
  assert stats.failed_entries == 1
  assert stats.unparsed_keys == 2


def test_a_missing_or_wrong_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give the official"):
    Cache(tmp_path / "nowhere")
  (tmp_path / "outer" / "tool_response_cache" / "Data").mkdir(parents=True)
  with pytest.raises(ValueError, match="give the tool_response_cache folder itself"):
    Cache(tmp_path / "outer")
  with pytest.raises(ValueError, match="needs a folder"):
    Cache(None)


def test_input_that_is_no_object_gets_the_official_parse_error(folder):
  cache = Cache(folder({"find": {"{}": entry("empty")}}))
  deep = '{"a": ' * 900 + "1" + "}" * 900
  for text in ("prose", "[1]", '{"a":', deep):
    assert cache.answer(request(text)) in (NOT_PARSED, None)
  assert cache.answer(request("prose")) == NOT_PARSED
  assert cache.answer(request("")).response == "empty"


def test_no_request_leaves_the_folder(folder, tmp_path):
  root = folder({"find": {"{}": entry("inside")}})
  outside = tmp_path / "x_for_.."
  outside.mkdir()
  (outside / "secret.json").write_text(json.dumps({"{}": entry("outside")}))
  cache = Cache(root)
  for category, tool, api in [
    ("..", "x", "secret"),
    ("News_Media/..", "../x", "secret"),
    ("News_Media", "..", "../../secret"),
    ("News_Media", "ip_lookup", "x" * 5000),
    ("News_Media", "ip_lookup\0", "find\0"),
  ]:
    found = cache.answer(VirtualRequest(category, tool, api, {}))
    assert found is None or found.response == "inside"


def test_examples_come_in_order_base_first(folder, tmp_path):
  cache = Cache(folder({"find": FULL}), tmp_path / "new")
  cache.append(request({"a": 9}), VirtualResponse("", "new"))
  found = cache.examples(request({}), 5)
  assert found == [*FULL.items(), ("{'a': 9}", entry("new"))]
  assert cache.examples(request({}), 2) == list(FULL.items())[:2]
  assert cache.examples(request({}, api="unknown")) == []


def test_new_answers_survive_and_the_base_stays_as_it_was(folder, tmp_path):
  root = folder({"find": FULL})
  before = {p: p.read_bytes() for p in root.rglob("*.json")}
  for path in [*root.rglob("*"), root]:
    path.chmod(0o555 if path.is_dir() else 0o444)
  cache = Cache(root, tmp_path / "new")
  answer = VirtualResponse("", {"list": [1, "ü", None]})
  assert cache.answer(request({"q": "1", "r": 2})) is None
  assert cache.append(request({"q": "1", "r": 2}), answer) == answer
  cache.close()
  again = Cache(root, tmp_path / "new")
  assert again.answer(request('{"r": "2", "q": 1}')) == answer
  assert again.stats().written_hits == 1
  assert {p: p.read_bytes() for p in root.rglob("*.json")} == before
  for path in [root, *root.rglob("*")]:
    path.chmod(0o755 if path.is_dir() else 0o644)


def test_an_answer_that_is_there_is_never_changed(folder, tmp_path):
  cache = Cache(folder({"find": {"{'a': 1}": entry("base")}}), tmp_path / "new")
  assert cache.append(request({"a": "1"}), VirtualResponse("", "late")).response == "base"
  first = VirtualResponse("", "first")
  other = Cache(None, tmp_path / "new")
  assert other.append(request({"b": 1}), first) == first
  assert cache.append(request({"b": "1"}), VirtualResponse("", "second")) == first
  assert cache.answer(request({"b": 1.0})) == first
  assert (cache.stats().appended, other.stats().appended) == (0, 1)


def test_a_cache_that_is_only_read_refuses_to_append(folder):
  with pytest.raises(ValueError, match="writable folder"):
    Cache(folder({"find": FULL})).append(request({}), VirtualResponse("", "x"))


def _append_many(folder, worker, start):
  start.wait(30)
  cache = Cache(None, folder)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    kept = list(
      pool.map(
        lambda i: cache.append(request({"a": i}), VirtualResponse("", f"{worker}")).response,
        range(100),
      )
    )
  cache.close()
  (folder / f"kept{worker}.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_many_processes_and_threads_append_to_one_cache(tmp_path, method):
  context = multiprocessing.get_context(method)
  start = context.Event()
  workers = [
    context.Process(target=_append_many, args=(tmp_path, worker, start)) for worker in range(3)
  ]
  for worker in workers:
    worker.start()
  start.set()
  for worker in workers:
    worker.join(60)
    assert worker.exitcode == 0
  cache = Cache(None, tmp_path)
  final = [cache.answer(request({"a": i})).response for i in range(100)]
  # Every process was told the same winner for every answer.
  for worker in range(3):
    assert json.loads((tmp_path / f"kept{worker}.json").read_text()) == final
  with sqlite3.connect(tmp_path / "answers.sqlite3") as database:
    assert database.execute("SELECT count(*) FROM answers").fetchone() == (100,)


def _answer_in_child(cache, queue):
  shared = cache._written._connection
  kept = cache.append(request({"child": 1}), VirtualResponse("", "from the child"))
  queue.put((kept.response, cache._written._connection is shared))


def test_a_cache_works_on_both_sides_of_a_fork(tmp_path):
  cache = Cache(None, tmp_path)
  context = multiprocessing.get_context("fork")
  queue = context.Queue()
  child = context.Process(target=_answer_in_child, args=(cache, queue))
  child.start()
  # SQLite forbids the use of one connection on both sides, and does not notice it.
  assert queue.get(timeout=30) == ("from the child", False)
  child.join(30)
  assert cache.answer(request({"child": 1})).response == "from the child"


def test_a_new_database_that_another_process_is_making_is_waited_for(tmp_path, monkeypatch):
  connect, refused = sqlite3.connect, []

  def busy_at_first(*args, **settings):
    if len(refused) < 3:
      refused.append(1)
      raise sqlite3.OperationalError("database is locked")
    return connect(*args, **settings)

  monkeypatch.setattr(sqlite3, "connect", busy_at_first)
  cache = Cache(None, tmp_path)
  assert cache.append(request({}), VirtualResponse("", "x")).response == "x"


def test_lone_surrogates_in_the_arguments_are_kept_apart(tmp_path):
  cache = Cache(None, tmp_path)
  kept = VirtualResponse("", "half a character: \ud83d")
  cache.append(request('{"q": "\\ud83d"}'), kept)
  assert Cache(None, tmp_path).answer(request('{"q": "\\ud83d"}')) == kept
  assert cache.answer(request('{"q": "\\ud83e"}')) is None


def test_an_unusable_writable_folder_is_named(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(OSError, match="cannot be made"):
    Cache(None, tmp_path / "file" / "new")
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "answers.sqlite3").write_bytes(b"not a database, certainly not" * 100)
  with pytest.raises(OSError, match="cannot be opened"):
    Cache(None, tmp_path / "bad")


def test_a_database_that_breaks_later_is_infrastructure(tmp_path):
  cache = Cache(None, tmp_path)
  with sqlite3.connect(tmp_path / "answers.sqlite3") as database:
    database.execute("DROP TABLE answers")
  with pytest.raises(InfrastructureError, match="answers.sqlite3"):
    cache.append(request({"a": 1}), VirtualResponse("", "x"))
  with pytest.raises(InfrastructureError, match="answers.sqlite3"):
    cache.answer(request({"a": 1}))


class Says:
  def __init__(self, *answers):
    self.answers, self.asked = list(answers), 0

  def answer(self, request):
    self.asked += 1
    return self.answers.pop(0)


def test_recorded_asks_once_and_keeps_answers_but_no_passing_trouble(tmp_path):
  trouble = VirtualResponse("Rate limit per minute error...", "")
  error = VirtualResponse("city is unknown", "")
  live = Says(trouble, None, error)
  recorded = Recorded(Cache(None, tmp_path), live)
  assert recorded.answer(request({"a": 1})) == trouble
  assert recorded.answer(request({"a": 1})) is None
  assert recorded.answer(request({"a": 1})) == error
  assert recorded.answer(request({"a": "1"})) == error  # from the cache now
  assert recorded.answer(request("prose")) == NOT_PARSED
  assert live.asked == 3


FAILURES = [
  VirtualResponse("Failed to generate fake response", ""),
  VirtualResponse("", "Failed to generate fake response."),
  VirtualResponse("500 Internal Server Error", ""),
  VirtualResponse("", "Internal Server Error"),
  VirtualResponse("HTTP error 502: Bad Gateway", None),
  VirtualResponse("", ""),
  VirtualResponse("", "\n"),
  VirtualResponse("", None),
  VirtualResponse("", float("nan")),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_simulators_own_failure_is_not_kept_and_is_nobodys(tmp_path, failure):
  """It was scored as the policy's call, and answered every later one from the cache."""
  live = Says(failure, VirtualResponse("", "well"))
  recorded = Recorded(Cache(None, tmp_path), live)
  with pytest.raises(InfrastructureError, match="the answer for find"):
    recorded.answer(request({"a": 1}))
  assert recorded.answer(request({"a": 1})).response == "well"


def test_a_failure_that_an_earlier_version_kept_is_asked_for_again(tmp_path):
  cache = Cache(None, tmp_path)
  cache.append(request({"a": 1}), VirtualResponse("", "x"))
  failed = json.dumps(FAILURES[0].as_dict())
  with sqlite3.connect(tmp_path / "answers.sqlite3") as database:
    database.execute("UPDATE answers SET answer = ?", (failed,))
  cache = Cache(None, tmp_path)
  assert cache.examples(request({})) == []
  assert cache.append(request({"a": 1}), VirtualResponse("", "well")).response == "well"
  assert Cache(None, tmp_path).answer(request({"a": 1})).response == "well"


@pytest.mark.parametrize(
  "answer",
  [
    VirtualResponse("no such city", ""),
    VirtualResponse("API error 500: internal server error in module x", None),
    VirtualResponse("", []),
    VirtualResponse("", 0),
    VirtualResponse("", "The log says: 500 Internal Server Error."),
  ],
)
def test_an_apis_own_answer_is_kept(tmp_path, answer):
  assert Recorded(Cache(None, tmp_path), Says(answer)).answer(request({"a": 1})) == answer


def test_lookups_are_quick_when_warm(folder, tmp_path):
  entries = {str({"city": f"c{i}", "days": i}): entry(f"answer {i}") for i in range(500)}
  cache = Cache(folder({"find": entries}), tmp_path / "new")
  exact = [request({"city": f"c{i}", "days": i}) for i in range(500)]
  turned = [request({"days": i, "city": f"c{i}"}) for i in range(500)]
  new = [request({"town": f"c{i}", "days": i}) for i in range(500)]
  for one in new:
    cache.append(one, VirtualResponse("", "new"))
  for requests in (exact, turned, new):
    seconds = []
    for _ in range(8):
      started = time.process_time()
      for one in requests:
        cache.answer(one)
      seconds.append(time.process_time() - started)
    # 50,000 a second on an idle core; on a shared one three times as long is still no failure.
    assert min(seconds) < 3 * len(requests) / 50_000
  stats = cache.stats()
  assert (stats.exact_hits, stats.canonical_hits, stats.written_hits) == (4000, 4000, 4000)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not on this machine")
def test_the_official_folder_reads_whole_and_answers_its_own_keys():
  cache = Cache(DATA)
  for path in DATA.rglob("*.json"):
    cache.examples(VirtualRequest(path.parts[-3], path.parts[-2], path.stem, {}), 1)
  stats = cache.stats()
  assert stats.files == 1198
  assert stats.entries + stats.failed_entries == 2492
  assert stats.damaged_files == stats.invalid_entries == stats.unparsed_keys == 0
  asked = 0
  for path in sorted(DATA.rglob("*.json"))[::10]:
    category, tool = path.parts[-3], path.parts[-2]
    for key, value in json.loads(path.read_text()).items():
      found = cache.answer(VirtualRequest(category, tool, path.stem, ast.literal_eval(key)))
      if value["error"] != "Failed to generate fake response":
        assert found.as_dict() == value
        asked += 1
  assert asked > 200


def _append_for_ever(folder, acknowledged):
  cache = Cache(None, folder)
  for i in range(1_000_000):
    cache.append(request({"a": i}), VirtualResponse("", f"answer {i}" * 200))
    acknowledged.value = i + 1


def test_a_writer_that_is_killed_loses_nothing_that_it_kept(tmp_path):
  context = multiprocessing.get_context("fork")
  acknowledged = context.Value("i", 0)
  writer = context.Process(target=_append_for_ever, args=(tmp_path, acknowledged))
  writer.start()
  deadline = time.monotonic() + 30
  while acknowledged.value < 20 and time.monotonic() < deadline:
    time.sleep(0.01)
  writer.kill()
  writer.join()
  cache = Cache(None, tmp_path)
  for i in range(acknowledged.value):
    assert cache.answer(request({"a": i})).response == f"answer {i}" * 200
  assert cache.append(request({"a": "next"}), VirtualResponse("", "x")).response == "x"
  assert acknowledged.value >= 20
