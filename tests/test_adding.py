"""docs/adding.md keeps to what is there: its files, its tables and its tests."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def rows():
  lines = (ROOT / "docs" / "adding.md").read_text().splitlines()
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in lines
    if line[:1] == "|" and "`" in line
  ]


def test_the_files_tables_and_tests_that_are_named_exist():
  """A file or a test that moves would leave the table pointing at nothing."""
  assert len(rows()) == 9
  for _, touched, shown in rows():
    names = re.findall(r"`([^`]+)`", touched)
    text = "".join((ROOT / name).read_text() for name in names if name.endswith(".py"))
    assert text, touched
    for table in (name for name in names if not name.endswith(".py")):
      assert re.search(rf"^{table}\b.* = \{{", text, re.MULTILINE), table
    path, _, test = shown.strip("`").partition("::")
    assert f"\ndef {test}(" in (ROOT / path).read_text(), shown
