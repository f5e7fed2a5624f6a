import pytest

from steptool_jax.checking import findings
from steptool_jax.checking.findings import ERROR, WARNING, Finding


def some(level, kind, count, task="t"):
  return [
    Finding(level, kind, f"{task}{n}" if task else "", f"{kind} {n}", "do") for n in range(count)
  ]


def test_errors_come_first_and_what_concerns_all_before_tasks():
  found = [*some(WARNING, "w", 1), *some(ERROR, "e", 1), *some(ERROR, "all", 1, task="")]
  assert [f.kind for f in findings.worst_first(found)] == ["all", "e", "w"]


def test_the_table_is_bounded_and_counts_what_it_leaves_out():
  found = [*some(WARNING, "fit", 300), *some(ERROR, "verdict", 20), *some(ERROR, "call", 1)]
  lines = findings.table(found, most=12, width=100).splitlines()
  assert len(lines) == 2 + 12 + 1
  assert max(map(len, lines)) <= 100
  assert lines[0].split() == ["level", "task", "what", "remedy"]
  assert sum(line.startswith("error") for line in lines) == 9  # 8 alike, and the other kind
  assert any("call 0" in line for line in lines)
  assert lines[-1] == "and 297 warnings of fit, 12 errors of verdict"


def test_a_long_text_goes_on_in_the_next_line_and_moves_no_cursor():
  found = [Finding(ERROR, "k", "id\x1b[2J", "word " * 40 + "\r\nend", "x")]
  text = findings.table(found, width=80)
  assert max(map(len, text.splitlines())) <= 80
  assert text.count("word") == 40
  assert "\x1b" not in text
  assert "\r" not in text


def test_nothing_found():
  assert findings.table([]) == "nothing is wrong"


def test_the_first_errors_as_a_sentence():
  found = [*some(WARNING, "w", 2), *some(ERROR, "a", 3), *some(ERROR, "b", 1, task="u")]
  assert findings.first_words(found, 2) == "t0: a 0; u0: b 0; and 2 more"


def test_an_unknown_level_is_refused():
  with pytest.raises(ValueError, match="level 'eror'"):
    Finding("eror", "k", "", "", "")
