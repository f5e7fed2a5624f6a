"""What a command prints at its end."""

from steptool_jax import main


def test_a_summary_has_a_line_for_each_figure():
  """Tables were printed as Python writes them, hundreds of characters in a line."""
  summary = {"pass_rate": 0.70833333, "work": {"calls": 3, "seconds": {"device": 1.0}}}
  summary |= {"interval": [0.58333333, 0.8333333], "left_out": [], "mode": "evaluate"}
  lines = [line for name, value in summary.items() for line in main._lines(name, value)]
  assert lines == [
    "pass_rate: 0.7083",
    "work.calls: 3",
    "work.seconds.device: 1",
    "interval: 0.5833 0.8333",
    "left_out: none",
    "mode: evaluate",
  ]
