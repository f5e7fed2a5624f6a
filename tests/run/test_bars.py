"""Progress bars of a run: of a log file, lines that can be read."""

import io
import sys
import time

from steptool_jax.run.hosts import hosts


class Terminal(io.StringIO):
  def isatty(self):
    return True


def drawn(monkeypatch, stream):
  monkeypatch.setattr(sys, "stderr", stream)
  with hosts.bar(total=2, desc="SFT") as outer:
    for _ in range(2):
      with hosts.bar(total=3, desc="rollout", leave=False) as inner:
        inner.update(3)
      outer.update()
  return stream.getvalue()


def test_a_log_has_lines_and_no_short_inner_bars(monkeypatch):
  """All of a run was one line of a hundred kilobytes, in which its results were lost."""
  text = drawn(monkeypatch, io.StringIO())
  assert "rollout" not in text
  lines = [line for line in text.split("\n") if line.strip()]
  assert "0/2" in lines[0]
  assert "2/2" in lines[-1]
  assert 2 <= len(lines) <= 3


def test_a_log_has_the_end_of_an_inner_bar_that_took_long(monkeypatch):
  monkeypatch.setattr(hosts, "_LOG_S", 0.01)
  monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
  with hosts.bar(total=3, desc="rollout", leave=False) as bar:
    for _ in range(3):
      time.sleep(0.02)
      bar.update()
  assert "3/3" in stream.getvalue().rstrip().split("\n")[-1]


def test_a_terminal_has_them(monkeypatch):
  text = drawn(monkeypatch, Terminal())
  assert "rollout" in text
  assert "2/2" in text
