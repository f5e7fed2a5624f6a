"""README and docs say nothing that is refused: their commands, examples, files and lengths.

Every shell line is checked by the rule of its program (RULES); a line without a rule fails. A call
of steptool has its config, overrides and mode parsed and validated as the program does it, also
where it needs a pod, a GPU, weights or the network. RUN are run for real with short budgets; what
the other modes then do is tested in the files of ELSEWHERE. The example of own tools is run, too.
"""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest
from absl import flags
from ml_collections import config_flags

from steptool_jax import main, validation
from steptool_jax.run import check, train
from steptool_jax.run.training import restore
from steptool_jax.simulators import functions  # noqa: F401, what the example imports

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
STARTS = (
  r"(?:\.venv/bin/\S+|python3?|steptool|launch/\S+|results/\S+|pip|export|curl|git|[A-Z_]+=\S+) "
)
SYNOPSIS = re.compile(r"\b(FILE|MODE)\b|\[--|…")  # no command
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Lines that are run, from the wheel and in an empty folder, with what makes them short.
SHORT = """
  environment.num_train=40 environment.num_heldout=4 rollout.tasks=2 rollout.samples=2
  rollout.slots=4 sft.steps=0 train.iterations=1 evaluation.tasks=4 evaluation.every=0
"""
RUN = {
  "steptool train --config=quickstart": SHORT,
  "steptool report --config=quickstart": "",
  "steptool check --config=own_tools": "",
  "steptool train --config=own_tools": SHORT.replace("sft.steps=0", "sft.steps=1"),
}

# Mode -> the test that runs it.
ELSEWHERE = {
  "annotate": "tests/run/test_annotate.py",
  "bench": "tests/run/test_bench.py",
  "chat": "tests/run/test_chat.py",
  "check": "tests/run/test_check.py",
  "compile": "tests/run/test_compile.py",
  "evaluate": "tests/run/test_toolbench_modes.py",
  "export": "tests/run/test_export.py",
  "report": "tests/evaluation/test_report.py",
  "reward_model": "tests/run/test_reward_model.py",
  "serve": "tests/run/test_serve_policy.py",
  "study": "tests/run/test_study.py",
  "train": "tests/run/test_train.py",
}


# Modes that read the newest checkpoint of a folder.
READERS = ("bench", "chat", "evaluate", "export", "serve")


def text_of(page):
  """Its text, commands that go on in a next line in one."""
  return page.read_text().replace("\\\n", " ")


def shell_lines():
  """(page, line) of every shell line: indented, or in backquotes within a sentence."""
  for page in PAGES:
    for line in re.sub(r"`([^`]*)`", "\n    \\1\n", text_of(page)).split("\n"):
      if re.match(rf" {{4,}}{STARTS}", line) and not SYNOPSIS.search(line):
        yield page, re.split(r"   #|;$", line.strip())[0]


LINES = list(shell_lines())
COMMANDS = list(dict.fromkeys(c.strip() for _, line in LINES for c in line.split(" && ")))


def test_there_are_commands():
  """A pattern that finds nothing would make the tests below say nothing."""
  assert len(COMMANDS) > 40
  assert {page.name for page, _ in LINES} >= {"README.md", "tools.md", "tpu.md", "harness.md"}
  assert RUN.keys() <= {c.replace(".venv/bin/", "") for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = [w.removeprefix(".venv/bin/") for w in shlex.split(command)]
  while re.match("[A-Z_]+=", words[0]):  # variables of this one command
    words.pop(0)
  rules = [rule for start, rule in RULES.items() if " ".join(words).startswith(start)]
  assert rules, f"no rule for {command!r}"
  rules[0](words)


def test_what_reads_a_run_is_given_the_policy_of_its_training(monkeypatch, tmp_path):
  """A page trained with parallel calls, and served the folder without them: it was refused."""
  monkeypatch.chdir(ROOT)
  trained, readers = {}, 0
  for command in COMMANDS:
    words = [w.removeprefix(".venv/bin/") for w in shlex.split(command)]
    holder = parsed(words) if words[0] == "steptool" else None
    if holder is None:
      continue
    config = validation.validate(holder.config)
    if holder.mode == "train":
      trained[holder.workdir] = config
    elif holder.mode in READERS and holder.workdir in trained:
      (tmp_path / "config.json").write_text(validation.to_json(trained[holder.workdir]))
      restore.refuse_other_config(config, tmp_path, only=restore.POLICY)
      readers += 1
  assert readers >= 2


def of_program(words):
  """Its flags, a config, its overrides and what they mean together."""
  holder = parsed(words)
  if holder is None:
    return
  config = validation.validate(holder.config)
  assert (holder.mode == "compile") == (holder.topology is not None)
  assert holder.mode in (ROOT / ELSEWHERE[holder.mode]).read_text()
  if holder.mode == "train" and re.match("/(models|data)/", config.model.path):  # of eight chips
    train.check_rows(config, types.SimpleNamespace(shape={"data": 1, "fsdp": 8}))


def parsed(words):
  """The flags of a call, as main.py reads them; None for a program named in a sentence."""
  words = words[3:] if words[0].startswith("python") else words[1:]
  argv = main._with_mode(["steptool", *words])
  if not any(w.startswith("--config=") for w in argv):
    assert len(words) < 2
    return None
  holder = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=holder)
  for name in ("workdir", "topology"):
    flags.DEFINE_string(name, None, "", flag_values=holder)
  flags.DEFINE_list("programs", None, "", flag_values=holder)
  flags.DEFINE_enum("mode", "train", main.MODES, "", flag_values=holder)
  found = [
    f"--config={main._found(w.partition('=')[2])}" if w.startswith("--config=") else w for w in argv
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", found)  # where config_flags looks overrides up
    assert holder(found) == ["steptool"]
  return holder


def of_pip(words):
  for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
    assert set(extra.split(",")) <= PYPROJECT["project"]["optional-dependencies"].keys()


def of_pytest(words):
  paths = [w for w in words[3:] if "/" in w]
  assert all((ROOT / path).exists() for path in paths)
  markers = [m.partition(":")[0] for m in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]
  assert "-m" not in words[3:] or words[words.index("-m", 3) + 1] in markers


def of_script(words):
  """A script of results/: it is there, and knows the options."""
  source = (ROOT / words[1]).read_text()
  for option in words[2:]:
    assert f'"{option.partition("=")[0]}"' in source


def of_launch(words):
  """The action is one of the script's, and what it passes on is a command of the program."""
  source = (ROOT / words[0]).read_text()
  action, rest = words[1], words[2:]
  assert action.isdigit() or re.search(rf"^ *{action}\)", source, re.MULTILINE)
  for option in (w for w in rest if action == "create"):
    assert option in source
  if any(w.startswith("--config=") for w in rest):
    of_program(["steptool", *rest])


def of_export(words):
  scripts = "".join(path.read_text() for path in (ROOT / "launch").glob("*.sh"))
  for word in words[1:]:
    assert f"${{{word.partition('=')[0]}" in scripts


def nothing(words):
  """A tool of others, with nothing of ours in its words."""


RULES = {
  "steptool": of_program,
  "python -m steptool_jax.main": of_program,
  "python -m pytest": of_pytest,
  "python results/": of_script,
  "python3 -m venv": nothing,
  "pip install": of_pip,
  "pip download": nothing,
  "unzip": nothing,
  "launch/": of_launch,
  "export": of_export,
  "ruff ": nothing,
  "vllm serve": nothing,
}


def test_named_files_are_there():
  """`configs/…`, `docs/…`, `results/…`, `launch/…`, modules named by their path, and links."""
  missing = []
  for page in PAGES:
    text = text_of(page)
    named = re.findall(
      r"(?<![\w./])(?:configs|docs|results|launch|tests|steptool_jax)/[\w./-]*\w", text
    )
    linked = [ROOT / page.parent / to for to in re.findall(r"(?<!\")\]\(([^)#:]+)[^)]*\)", text)]
    for path in [*(ROOT / name for name in named), *linked]:
      if not path.exists():
        missing.append((page.name, str(path)))
  assert missing == []


def test_links_to_headings_lead_somewhere():
  for page in PAGES:
    for to, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text_of(page)):
      target = page.parent / to if to else page  # "(#heading)" is the page's own
      headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
      assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_version_is_one():
  """The package, its citation and its changelog named different versions."""
  version = PYPROJECT["project"]["version"]
  assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
  log = (ROOT / "CHANGELOG.md").read_text()
  assert re.findall(r"^## (.*)$", log, re.MULTILINE)[0] == version
  assert len(log[log.index(f"## {version}") : log.index("## 0.1.0")].splitlines()) <= 80


def blocks(text):
  return re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)


def example():
  """(tools.py, lines of tasks.jsonl) as the README has them."""
  found = [re.sub(r"^    ", "", b, flags=re.MULTILINE) for b in blocks(text_of(ROOT / "README.md"))]
  tools = next(b for b in found if "def make_tools" in b)
  return tools, next(b for b in found if '"checker"' in b).strip().splitlines()


def lay(folder, tools, tasks):
  (folder / "tools.py").write_text(tools)
  (folder / "tasks.jsonl").write_text("\n".join(tasks) + "\n")


def test_the_example_of_own_tools_is_clean(tmp_path, monkeypatch):
  """Written out literally: tools, tasks and checker pass --mode=check without an error."""
  tools, lines = example()
  more = [
    line.strip()
    for b in blocks(text_of(ROOT / "docs" / "tools.md"))
    for line in b.split("\n")
    if line.strip().startswith('{"id"') and "endpoint" not in line and '"model"' not in line
  ]
  tasks = {json.loads(line)["id"]: line for line in [*lines, *more]}
  assert {"t1", "t2", "t3"} <= tasks.keys()
  monkeypatch.chdir(tmp_path)
  lay(tmp_path, tools, tasks.values())
  config = runpy.run_path(str(ROOT / "configs" / "own_tools.py"))["get_config"]()
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


def test_a_mode_is_the_first_word():
  """A second mode won in silence, and a misspelt one was a 'stray word' without a remedy."""
  assert main._with_mode(["s", "report", "--config=a"]) == ["s", "--mode=report", "--config=a"]
  assert main._with_mode(["s", "--config", "train"]) == ["s", "--config", "train"]
  with pytest.raises(SystemExit, match="'trian': no mode; did you mean train"):
    main._with_mode(["s", "trian"])
  with pytest.raises(SystemExit, match="report is a mode, and --mode names one, too"):
    main._with_mode(["s", "report", "--mode=train"])


def test_the_wheel_works_from_an_empty_folder(tmp_path):
  """Configs and assets are in it: README's training and report, with short budgets."""
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
  lay(empty, *example())
  shown = {}
  for command, short in RUN.items():
    words = shlex.split(command)[1:] + [f"--config.{field}" for field in short.split()]
    done = subprocess.run(
      [sys.executable, "-m", "steptool_jax.main", *words],
      cwd=empty,
      env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown[command] = done.stdout
  assert "\nNext\n" in shown["steptool train --config=quickstart"]
  assert (empty / "runs/quickstart/export/model.safetensors").is_file()
  assert (empty / "runs/quickstart/report.html").is_file()
  assert (empty / "runs/own_tools/export/model.safetensors").is_file()
