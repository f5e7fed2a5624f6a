"""The page: in Chromium (clicked, typed at, attacked), and its parts without a browser."""

import json
import re
import time

import browser
import numpy as np
import pytest
from handmade import annotated, call, finish, give_up, malformed, trajectory, workdir

from steptool_jax.config import Config
from steptool_jax.evaluation import records, viewer
from steptool_jax.run import report
from steptool_jax.run.studies import pages
from steptool_jax.types import Code

ATTACK = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'
MOST = Config().report.trajectories


def node(parent, name, status="", code="ok"):
  return {
    "parent": parent,
    "status": status,
    "action": {"call": name, "arguments": {"x": 1}, "thought": ATTACK},
    "observation": {"text": ATTACK, "code": code, "injected": False, "changed": False},
  }


def moments():
  """Before and after training, with an attack at every place that a tool or a model can reach."""
  evil = call("evil" + ATTACK, text=ATTACK, q=ATTACK)
  wrong = call("search", Code.NOT_FOUND, q="x")
  before = [
    annotated(trajectory(call("find"), wrong, wrong, give_up(), task="b"), "where is b?"),
    annotated(trajectory(evil, finish(ATTACK), task=ATTACK), ATTACK),
    annotated(trajectory(malformed(), give_up(), task="m"), "malformed?"),
  ]
  after = [
    annotated(
      trajectory(call("find"), call("look", id=3), finish("9"), task="b", solved=1.0), "where is b?"
    ),
    annotated(trajectory(evil, finish(ATTACK), task=ATTACK), ATTACK),
  ]
  fault = call("find", Code.RATE_LIMIT, injected=True)
  training = [
    annotated(
      trajectory(fault, call("find"), finish("4"), task="t", sample=k, solved=float(k)),
      "in training",
      advantages=[[0.5, 0.5], [-1.0, 0.25], [2.0, 2.0]],
    )
    for k in range(2)
  ]
  nodes = [node(-1, "find"), node(0, "wrong", "give_up", "not_found"), node(0, "look", "answered")]
  searched = annotated(
    trajectory(call("find"), finish("1"), task="s"), "a tree", search={"leaf": 2, "nodes": nodes}
  )
  return {
    "heldout_base": before,
    "heldout_rl": after,
    "train_000010": training,
    "other": [searched],
  }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  folder = workdir(tmp_path_factory.mktemp("report") / "run", moments())
  found = report.run(Config(), folder)
  assert found["trajectories"] == 8
  return folder / "report.html"


@pytest.fixture(scope="module")
def chromium():
  with browser.started() as running:
    yield running


@pytest.fixture
def opened(chromium, page):
  chromium.size(1200, 900)
  chromium.open(page)
  yield chromium
  assert chromium.log() == []
  assert chromium.run("return window.hacked") is None


def detail(b):
  return b.run("return byId('detail').innerText")


def choose(b, name, text):
  b.run(
    "const s = byId(arguments[0]); s.value = [...s.options].find((o) => o.text === arguments[1])"
    ".value; s.dispatchEvent(new Event('change'))",
    name,
    text,
  )


def listed(b):
  return b.run("return matches.length")


# --- in the browser --------------------------------------------------------------------------


def test_it_opens_and_filters(opened):
  assert opened.run("return document.title") == "run: steptool on shop seed 0"
  assert listed(opened) == 8
  choose(opened, "f-moment", "held-out, before training")
  assert listed(opened) == 3
  choose(opened, "f-status", "gave up")
  assert listed(opened) == 2
  choose(opened, "f-status", "all")
  choose(opened, "f-moment", "all")
  choose(opened, "f-errors", "injected")
  assert listed(opened) == 2
  choose(opened, "f-errors", "all")
  choose(opened, "f-tool", "look")
  assert listed(opened) == 1
  choose(opened, "f-tool", "all")
  choose(opened, "f-solved", "solved")
  assert listed(opened) == 2
  choose(opened, "f-solved", "all")
  opened.run("byId('f-text').focus()")
  opened.keys("where IS")
  assert listed(opened) == 2
  assert "2 of 8" in opened.run("return byId('count').textContent")


def test_it_steps_through_a_trajectory_by_keys(opened):
  opened.run("byId('list').focus()")
  assert "1. calls find" in detail(opened)
  for wanted in ("find", "search", "search"):
    opened.keys("n")
    assert opened.run("return document.querySelector('.step.now h4').innerText").endswith(wanted)
  opened.keys("p")
  assert opened.run("return document.activeElement.getAttribute('aria-label')") == "Step 2"
  opened.keys("jj")
  assert "malformed?" in detail(opened)
  opened.keys("k/b?")
  assert opened.run("return document.activeElement.id") == "f-text"
  assert listed(opened) == 2
  opened.keys("jk")  # letters of the search, while one types
  assert opened.run("return byId('f-text').value") == "b?jk"


def test_tokens_wear_their_advantage(opened):
  choose(opened, "f-colour", "advantage")
  choose(opened, "f-moment", "training, iteration 10")
  opened.run("byId('list').focus()")
  opened.keys("j")
  colours = opened.run(
    "return [...document.querySelectorAll('.step .words span')].map((s) => [s.textContent,"
    " s.title, s.style.backgroundColor])"
  )
  assert [c[:2] for c in colours[2:4]] == [["find ", "advantage -1"], ["<|end|>", "advantage 0.25"]]
  assert "--minus), 0.31" in colours[2][2]
  assert "--plus), 0.077" in colours[3][2]
  choose(opened, "f-colour", "SuccCalling")
  words = "return [...document.querySelectorAll('.step .words span')].map((s) => s.title)"
  assert opened.run(words)[:3] == [
    *["SuccCalling of the step 0"] * 2,
    "SuccCalling of the step 1",
  ]


def test_a_turned_task_side_by_side(opened):
  said = opened.run("return document.querySelector('.cases .meta').innerText")
  assert said == "step 2: look instead of search search called again and again before"
  opened.run("document.querySelector('.cases button').click()")
  assert opened.run("return [...document.querySelectorAll('.step.changed h4')].length") == 2
  heads = opened.run(
    "return [...document.querySelectorAll('.step.changed h4')].map((e) => e.innerText)"
  )
  assert heads[0].startswith("2. calls search")
  assert heads[1].startswith("2. calls look")
  opened.run("byId('list').focus()")
  opened.keys("c")
  assert opened.run("return document.querySelectorAll('.column').length") == 1


def test_a_search_tree(opened):
  choose(opened, "f-moment", "other")
  opened.run("byId('list').focus()")
  opened.keys("j")
  assert opened.run("return document.querySelectorAll('.node').length") == 3
  assert opened.run("return document.querySelectorAll('.node.chosen').length") == 2
  opened.run("document.querySelectorAll('.node')[1].focus()")
  opened.keys("\ue007")
  assert "call 2: calls wrong (give up) – not_found" in detail(opened)
  assert ATTACK in detail(opened)


def test_what_a_tool_says_is_never_markup(opened):
  opened.run("byId('f-text').value = 'script'; applyFilters()")
  assert listed(opened) == 2
  opened.run("byId('list').focus()")
  opened.keys("j")
  assert detail(opened).count(ATTACK) >= 3
  assert opened.run("return document.querySelectorAll('#detail script, #detail img').length") == 0
  # And what would get into the markup all the same is not run.
  opened.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", ATTACK)
  time.sleep(0.2)
  assert opened.run("return window.hacked") is None
  assert all("Content Security Policy" in line or "net::ERR" in line for line in opened.log())


def test_the_chart_has_its_numbers_and_words(opened):
  label = opened.run("return document.querySelector('.chart svg').getAttribute('aria-label')")
  assert "pass rate over LLM calls" in label
  assert "from 10 to 40" in label
  choose(opened, "chart-axis", "seconds of RL (wall-clock)")
  opened.run("document.querySelector('.chart svg').focus()")
  opened.keys("\ue012")  # one to the left of the last
  assert opened.run("return document.querySelector('.readout').textContent").startswith("1: ")


def test_a_phone_scrolls_in_one_direction(opened):
  opened.size(390, 844, phone=True)
  opened.run("drawDetail(-1); window.dispatchEvent(new Event('resize'))")
  assert opened.run("return document.documentElement.scrollWidth") <= 390
  opened.run("document.querySelector('.cases button').click()")
  assert opened.run("return document.documentElement.scrollWidth") <= 390


def test_dark_is_dark(opened):
  background = "return getComputedStyle(document.body).backgroundColor"
  light = opened.run(background)
  opened.dark()
  dark = opened.run(background)
  opened.dark(False)
  assert sum(map(int, re.findall(r"\d+", dark))) < 120 < sum(map(int, re.findall(r"\d+", light)))


def test_five_thousand_trajectories(chromium, tmp_path):
  """Written in under 20 s, and in under 2 s there is a list that answers."""
  rng = np.random.default_rng(0)
  text = "the product has a price and a supplier and an id, " * 6
  steps = [call(f"tool_{k}", text=text, id=k, title="some name") for k in range(12)]
  calls = [[steps[i] for i in row] for row in rng.integers(0, 12, (5000, 5))]
  found = [annotated(trajectory(*c, finish(), task=f"t{n}"), f"q {n}") for n, c in enumerate(calls)]
  folder = workdir(tmp_path, {"heldout_base": found})
  started = time.monotonic()
  assert report.run(Config(), folder)["trajectories"] == 5000
  assert time.monotonic() - started < 20
  chromium.open(folder / "report.html")
  loading = "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
  assert chromium.run(loading) < 2000
  assert listed(chromium) == 5000
  assert chromium.run("return document.querySelectorAll('.item').length") < 60
  selected = "show(4000); return document.querySelector('.item[aria-selected=true]') !== null"
  assert chromium.run(selected), "what is shown is not in sight in the list"
  took = chromium.run(
    "const t = performance.now(); byId('list').scrollTop = 1e9; drawRows(); move(4999);"
    "byId('f-text').value = 'q 4999'; applyFilters(); return performance.now() - t"
  )
  assert took < 1000
  assert listed(chromium) == 1
  assert chromium.log() == []


# --- without one -----------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(page):
  text = page.read_text()
  assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", text)
  assert text.count("<script") == text.count("</script>") == 4  # charts, index, one chunk, code
  assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_json_in_a_script_element_cannot_end_it():
  value = {"a": ATTACK, "b": "<!--", "c": "& \u2028 \ud800"}
  text = viewer.script_json(value)
  assert not set("<>&") & set(text)
  assert text.isascii()
  assert json.loads(text) == value


def test_a_damaged_workdir_shows_what_there_is(tmp_path):
  folder = workdir(tmp_path / "run", moments())
  (folder / "summary.json").write_text('{"pass_rate_base": 0.')
  metrics = folder / "metrics.jsonl"
  metrics.write_text(metrics.read_text()[:-20])
  path = folder / "moments" / "heldout_base.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([lines[0], "rubbish\n", lines[2][:50]]))
  (folder / "moments" / "train_000010.jsonl").write_bytes(b"\xff\xfe\x00")
  run = records.read_run(folder)
  assert len(run.metrics) == 2
  assert {name: len(found) for name, found in run.moments.items()} == {
    "heldout_base": 1,
    "heldout_rl": 2,
    "other": 1,
    "train_000010": 0,
  }
  problems = " | ".join(run.problems)
  assert "summary.json cannot be read" in problems
  assert "metrics.jsonl: 1 damaged lines are left out, the first is line 3" in problems
  assert "heldout_base.jsonl: 2 damaged lines are left out, the first is line 2" in problems
  assert "train_000010.jsonl: 1 damaged lines" in problems
  assert report.run(Config(), folder)["trajectories"] == 4
  assert "rubbish" not in (folder / "report.html").read_text()
  assert "2 damaged lines are left out" in (folder / "report.html").read_text()


def test_an_unfinished_run_says_what_is_missing(tmp_path):
  folder = workdir(tmp_path / "run", {})
  for name in ("summary.json", "metrics.jsonl"):
    (folder / name).unlink()
  report.run(Config(), folder)
  text = (folder / "report.html").read_text()
  for wanted in ("summary.json is missing", "metrics.jsonl is missing", "no trajectories"):
    assert wanted in text


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no run"):
    report.run(Config(), tmp_path)


def test_what_is_left_out_is_said(tmp_path):
  folder = workdir(tmp_path / "run", moments())
  page = pages.write_run(folder, 4)
  assert page.trajectories == 4, "one of each moment"
  assert "4 of 8 trajectories are left out" in page.path.read_text()
