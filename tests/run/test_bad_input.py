"""Mistakes of input through the command line: exit code 1, a sentence that names the culprit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from steptool_jax import main
from steptool_jax.run.workdir import lock

# One process imports everything once and forks for each case: JAX starts no thread before.
DRIVER = """
import json, os, sys
from steptool_jax import main
from steptool_jax.run import train
cases = json.load(sys.stdin)
for name, (arguments, out) in cases.items():
  child = os.fork()
  if child == 0:
    handle = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["main", *arguments]
    main.run()
    os._exit(0)
  status = os.waitpid(child, 0)[1]
  print(json.dumps([name, os.waitstatus_to_exitcode(status)]))
"""

TOOLS = '''
def add(a: int, b: int) -> int:
  """Adds.

  Args:
    a: one
    b: another
  """
  return a + b

TOOLS = [add]
'''


def make_cases(folder: pathlib.Path) -> dict[str, tuple[list[str], str]]:
  """name -> (flags, what the message must say)."""
  import jax

  from steptool_jax.dialogue import compact
  from steptool_jax.policy import model
  from steptool_jax.policy.formats import hub

  bare = compact.build_tokenizer(["a b c"] * 3, 300, folder / "bare")
  settings = json.loads((bare / "tokenizer_config.json").read_text())
  del settings["chat_template"]
  (bare / "tokenizer_config.json").write_text(json.dumps(settings))

  shape = model.ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
  )
  tokenizer = compact.build_tokenizer(["a b c"] * 3, 300, folder / "tokenizer")
  for name in ("cut", "other"):
    hub.save_params(
      folder / name, shape, model.init_params(shape, jax.random.key(0)), source=tokenizer
    )
  weights = folder / "cut/model.safetensors"
  os.truncate(weights, weights.stat().st_size // 2)
  described = json.loads((folder / "other/config.json").read_text())
  (folder / "other/config.json").write_text(json.dumps(described | {"intermediate_size": 64}))
  no_weights = folder / "no_weights"
  no_weights.mkdir()

  (folder / "tools.py").write_text(TOOLS)
  (folder / "broken.py").write_text("def get_config(:\n")
  (folder / "untyped.py").write_text(TOOLS.replace("a: int, b: int", "a, b: int"))
  task = {"id": "t", "query": "1+1?", "checker": {"type": "number", "value": 2}}
  (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n" + '{"id": "u", "query": \n')

  def custom(tools):
    return [
      "--config.environment.name=custom",
      f"--config.environment.functions={folder / tools}",
      f"--config.environment.tasks={folder / 'tasks.jsonl'}",
    ]

  auto = "--config.model.chat_format=auto"
  own = "--config.model.tokenizer="  # the model's own
  return {
    "no model": ([f"--config.model.path={folder}/none", own], f"{folder}/none"),
    "no weights": ([f"--config.model.path={no_weights}", own], f"{no_weights}"),
    "truncated": ([f"--config.model.path={folder}/cut", own], "truncated or no safetensors file"),
    "other shape": ([f"--config.model.path={folder}/other", own], "config.json expects (64, 32)"),
    "no template": ([f"--config.model.tokenizer={bare}", auto], "has no chat template"),
    "unknown field": (["--config.rollout.taks=3"], "did you mean config.rollout.tasks?"),
    "unknown flag": (["--confg=3"], "Unknown command line flag 'confg'"),
    "wrong type": (
      ["--config.rollout.tasks=many"],
      "config.rollout.tasks: int is needed, found 'many'",
    ),
    "bad value": (["--config.rollout.tasks=0"], "config.rollout.tasks: must be above 0, found 0"),
    "unknown mode": (["--mode=trian"], "trian"),
    "stray word": (["training"], "unknown argument 'training'"),
    "broken line": (custom("tools.py"), "tasks.jsonl:2: "),
    "no schema": (custom("untyped.py"), "has no type hint; add one"),
    "no config": ([f"--config={folder}/none.py"], f"--config: there is no file '{folder}/none.py'"),
    "broken config": ([f"--config={folder}/broken.py"], "--config: it cannot be loaded (SyntaxErr"),
    "in use": ([f"--workdir={folder}/busy"], "busy is in use by --mode=train, process "),
    "no workdir": (["--workdir=/proc/nope"], "--workdir: /proc/nope cannot be made"),
  }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("input")
  cases = make_cases(folder)
  workdir = folder / "run"
  common = [f"--config={tiny.ROOT}/tests/run/tiny.py", f"--workdir={workdir}"]
  todo = {name: ([*common, *flags], str(folder / name)) for name, (flags, _) in cases.items()}
  (folder / "busy").mkdir()
  with lock.held(folder / "busy", "train"):
    done = subprocess.run(
      [sys.executable, "-c", DRIVER],
      input=json.dumps(todo),
      env=tiny.environment(),
      capture_output=True,
      text=True,
      timeout=200,
      check=False,
    )
  assert not (folder / "busy/error.txt").exists(), "the run there has had no error"
  assert done.returncode == 0, done.stderr
  codes = dict(json.loads(line) for line in done.stdout.splitlines())
  assert codes.keys() == cases.keys()
  assert not (workdir / "config.json").exists(), "a failed start does not bind the folder"
  assert "Traceback" in (workdir / "error.txt").read_text()
  return {name: (codes[name], (folder / name).read_text(), cases[name][1]) for name in cases}


NAMES = [
  "no model",
  "no weights",
  "truncated",
  "other shape",
  "no template",
  "unknown field",
  "unknown flag",
  "wrong type",
  "bad value",
  "unknown mode",
  "stray word",
  "broken line",
  "no schema",
  "no config",
  "broken config",
  "in use",
  "no workdir",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_sentence_and_an_exit_code(outcomes, name):
  assert outcomes.keys() == set(NAMES)
  code, text, words = outcomes[name]
  assert code == 1, text
  assert words in text, text
  assert "Traceback" not in text, text


def test_the_help_explains_every_mode():
  for mode in main.MODES:
    assert f"\n  {mode:8}  " in main.__doc__, mode
  assert "steptool_jax/config.py" in main.__doc__


@pytest.mark.parametrize(
  ("words", "code", "said"),
  [
    (["--help"], 0, "reward_model  a model of these"),
    (["train", "--help"], 0, "--topology: --mode=compile"),
    ([], 1, "--config is needed: a file, or the name of a config of the package"),
  ],
)
def test_the_console_script_helps(words, code, said):
  """It showed its own empty text and failed, and asked for --help where a config was missing."""
  start = "import sys; from steptool_jax.main import run; sys.argv[0] = 'steptool'; run()"
  done = subprocess.run(
    [sys.executable, "-c", start, *words], capture_output=True, text=True, cwd=tiny.ROOT
  )
  assert done.returncode == code
  assert said in done.stdout + done.stderr
