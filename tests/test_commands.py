"""README and docs say nothing that is refused: their commands, examples, files and lengths.

Each command's config is loaded and validated with its mode and overrides, as the program does it;
what every mode then does has tests of its own (tests/run). The examples of own tools are run.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from absl import flags
from ml_collections import config_flags

from steptool_jax import main, validation
from steptool_jax.config import base_config
from steptool_jax.run import check
from steptool_jax.simulators import functions  # noqa: F401, what the example imports

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAM = re.compile(r"(?:python[\d.]*|\.venv/bin/python) -m steptool_jax\.main |\bsteptool (?=\w)")
PLACEHOLDERS = ("FILE", "MODE]", "[--", "…")


def text_of(page):
  """Its text, commands that go on in a next line in one."""
  return page.read_text().replace("\\\n", " ")


def commands():
  """(page, arguments) of every call of the program, in code blocks and in running text."""
  for page in PAGES:
    for line in re.sub(r"`([^`]*)`", "\n    \\1\n", text_of(page)).split("\n"):
      if not line.startswith("    ") or not PROGRAM.search(line):
        continue
      said = PROGRAM.split(line)[1].split(" && ")[0].split("   #")[0].rstrip(";")
      if not any(mark in said for mark in PLACEHOLDERS):
        yield pytest.param(shlex.split(said), id=f"{page.name}: {said[:60]}")


COMMANDS = list(commands())


def test_there_are_commands():
  """A pattern that finds nothing would make the tests below say nothing."""
  assert len(COMMANDS) > 12
  assert any("README" in c.id for c in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_accepted(words, monkeypatch):
  monkeypatch.chdir(ROOT)
  if words[0] in main.MODES:
    words = [f"--mode={words[0]}", *words[1:]]
  holder = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=holder)
  flags.DEFINE_string("workdir", None, "", flag_values=holder)
  flags.DEFINE_string("topology", None, "", flag_values=holder)
  flags.DEFINE_list("programs", None, "", flag_values=holder)
  flags.DEFINE_enum("mode", "train", main.MODES, "", flag_values=holder)
  found = [
    f"--config={main._found(w.partition('=')[2])}" if w.startswith("--config=") else w
    for w in words
  ]
  monkeypatch.setattr(sys, "argv", ["steptool", *found])  # where overrides are looked up
  rest = holder(sys.argv)
  assert rest == ["steptool"]
  validation.validate(holder.config)
  assert (holder.mode == "compile") == (holder.topology is not None)


def test_named_files_are_there():
  """`configs/…`, `docs/…`, `results/…`, `launch/…`, and modules named by their path."""
  missing = []
  for page in PAGES:
    for path in re.findall(
      r"(?:configs|docs|results|launch|tests|steptool_jax)/[\w./-]*\w", text_of(page)
    ):
      if "…" not in path and not (ROOT / path.split(":")[0]).exists():
        missing.append((page.name, path))
  assert missing == [] or {p for _, p in missing} <= {"results/X.py"}


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def blocks(text):
  return re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)


def test_the_example_of_own_tools_is_clean(tmp_path, monkeypatch):
  """Written out literally: tools, tasks and checker pass --mode=check without an error."""
  found = [re.sub(r"^    ", "", b, flags=re.MULTILINE) for b in blocks(text_of(ROOT / "README.md"))]
  tools = next(b for b in found if "def make_tools" in b)
  lines = next(b for b in found if '"checker"' in b).strip().splitlines()
  more = [
    json.loads(line)
    for b in blocks(text_of(ROOT / "docs" / "tools.md"))
    for line in b.split("\n")
    if line.strip().startswith('{"id"') and "endpoint" not in line and '"model"' not in line
  ]
  tasks = {t["id"]: t for t in [*map(json.loads, lines), *more]}
  assert {"t1", "t2", "t3"} <= tasks.keys()
  monkeypatch.chdir(tmp_path)
  pathlib.Path("bank.py").write_text(tools)
  pathlib.Path("tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks.values()))
  config = base_config()
  config.model.path = "asset:quickstart"
  config.environment.name = "custom"
  config.environment.functions, config.environment.tasks = "bank.py", "tasks.jsonl"
  summary = check.run(validation.validate(config), tmp_path / "run")
  assert summary["exit_code"] == 0
  assert summary["checked_tasks"] == len(tasks)


def test_a_packaged_config_goes_by_its_name(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert main._found("quickstart:ppo") == f"{ROOT / 'configs' / 'quickstart'}.py:ppo"
  (tmp_path / "quickstart").write_text("")
  assert main._found("quickstart:ppo") == "quickstart:ppo", "a file stays a file"
  with pytest.raises(SystemExit, match=r"no file 'quickstrat', .*quickstart"):
    main._found("quickstrat")


def test_the_wheel_works_from_an_empty_folder(tmp_path):
  """Configs and assets are in it: `steptool check --config=quickstart`, in a workdir of its own."""
  pytest.importorskip("setuptools", minversion="77", reason="the extra test has setuptools 77")
  source = tmp_path / "source"
  source.mkdir()
  for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  for name in ("configs", "steptool_jax"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
  subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
  (wheel,) = tmp_path.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(tmp_path / "site")
  assert (tmp_path / "site/steptool_jax/configs/quickstart.py").is_file()
  empty = tmp_path / "empty"
  empty.mkdir()
  run = [sys.executable, "-m", "steptool_jax.main"]
  done = subprocess.run(
    [*run, "check", "--config=quickstart", "--config.check.tasks=4"],
    cwd=empty,
    env={"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert (empty / "runs/quickstart/summary_check.json").is_file()
