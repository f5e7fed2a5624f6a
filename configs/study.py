"""Do step rewards make a tool user learn faster, or better? Methods x environments x seeds.

    python -m steptool_jax.main --config=configs/study.py:pipeline_base --workdir=/tmp/pipeline_base
    python -m steptool_jax.main --config=configs/study.py:archive_base --workdir=/tmp/archive_base
    python -m steptool_jax.main --config=configs/study.py --mode=study --workdir=runs/study
    python -m steptool_jax.main --config=configs/study.py --mode=report --workdir=runs/study

The first two make the start checkpoints of data_pipeline and archive (nested_api's is in the
package). The third is the study: the same command goes on after a stop, `--config.study.hours=2`
stops it in time, `--config.study.only="('core/*/0',)"` chooses cells. runs/study/results is what to
keep.

One cell alone, with the bits that it has in the study (which gives every cell one core):

    CELL=core/nested_api/steptool/0
    taskset -c 0 python -m steptool_jax.main --config=configs/study.py:$CELL --workdir=runs/cell

configs/study.py:algorithms is a smaller one: every row of the algorithm table on the quickstart's
tasks, SFT warm-up included, 16 x 3 cells with the study's budget, over an hour:

    python -m steptool_jax.main --config=configs/study.py:algorithms --mode=study --workdir=runs/all

Groups (results/study has what was run of them so far):

    core         outcome-only PPO, its twin with GAE over steps, StepTool, each with the old critic
                 (value) and the new one (ridge), and StepTool as it was in 0.1.0, 8 seeds; the
                 paper's sum with credit in hindsight, GRPO, grpo_step, ToolOrchestra's scheme
                 without and with step rewards, 4 seeds; four environments
    depth        the three main methods at 2, 3, 4 and 5 dependent calls, 8 seeds
    granularity  the same rewards of 4-call tasks paid at the end, for every two steps, and token
                 by token with GAE over tokens (at each step is depth's), 8 seeds
    sources      information gain in the place of rules, 4 seeds
    plateau      the three main methods with four times the budget, 4 seeds
    delayed      the three main methods on archive, where a call is of use three and more calls
                 later and effects show only after another call, 4 to 6 calls, 8 seeds
    new          64 tries a task before and after: is what is solved new, or only sharper? 4 seeds

Equal budgets: all methods of one environment of a group have the same start checkpoint, training
tasks in the same order, 24 iterations (plateau: 96) of 12 tasks x 4 samples = 1,152 conversations
of at most 8 LLM calls, and 48 optimizer steps; they differ in what config.study.cells says and in
nothing else (a study with unequal budgets is refused).
"""

import pathlib
import runpy

from steptool_jax.learning import algorithms
from steptool_jax.run.studies import grid
from steptool_jax.validation import validate

_QUICKSTART = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]
_FAULTS = "rate_limit timeout transient not_found"
_BASE = "/tmp/{}_base/export"

# Name in the study -> algorithm and what makes it this method.
_MAIN = {
  "outcome": "steptool_no_step_rewards",  # first: what all others are compared with
  "steptool": "steptool",
  "ppo": "ppo critic.kind=ridge",
}
_HINDSIGHT = "rewards.source=hindsight rewards.unsafe=True"
_BEFORE = {  # the old critic, and all of 0.1.0
  "ppo_value": "ppo",
  "outcome_value": "steptool_no_step_rewards critic.kind=value",
  "steptool_value": "steptool critic.kind=value",
  "steptool_0_1": f"steptool rewards.shaping=episode_mean {_HINDSIGHT} critic.kind=value "
  "advantage.bootstrap=step_budget,token_budget",
}
_OTHERS = {
  "paper_sum": f"steptool rewards.shaping=sum {_HINDSIGHT}",
  "grpo": "grpo",
  "grpo_step": "grpo_step",
  "orchestra": "steptool_no_step_rewards rewards.scheme=orchestra",
  "orchestra_steps": "steptool rewards.scheme=orchestra_steps",
}
_GRANULARITY = {
  "once": "steptool rewards.every=0",
  "every_two": "steptool rewards.every=2",
  "tokens": "steptool rewards.spread=True advantage.level=token",
}
_NESTED = "environment.min_calls=2 environment.max_calls=3"
_PIPELINE = (
  f"model.path={_BASE.format('pipeline')} environment.name=data_pipeline environment.min_calls=3 "
  "environment.max_calls=4"
)
_ARCHIVE = (
  f"model.path={_BASE.format('archive')} environment.name=archive environment.min_calls=4 "
  "environment.max_calls=6"
)


def _with_faults(rate: float) -> str:
  return " ".join(f"environment.faults.{kind}={rate}" for kind in _FAULTS.split())


_ENVIRONMENTS = {
  "nested_api": _NESTED,
  "nested_api_faults": f"{_NESTED} {_with_faults(0.04)}",
  "data_pipeline": _PIPELINE,
  "data_pipeline_faults": f"{_PIPELINE} {_with_faults(0.04)}",
}


def _cells() -> tuple[str, ...]:
  def lines(group, environment, methods, fields, seeds):
    return [_line(group, environment, m, how, fields, seeds) for m, how in methods.items()]

  found = []
  for environment, fields in _ENVIRONMENTS.items():
    found += lines("core", environment, _MAIN | _BEFORE, fields, 8)
    found += lines("core", environment, _OTHERS, fields, 4)
  for depth in (2, 3, 4, 5):
    fields = f"environment.min_calls={depth} environment.max_calls={depth}"
    found += lines("depth", f"{depth}_calls", _MAIN, fields, 8)
    if depth == 4:
      found += lines("granularity", f"{depth}_calls", _GRANULARITY, fields, 8)
  found += lines(
    "sources", "nested_api", {"info_gain": "steptool rewards.source=info_gain"}, _NESTED, 4
  )
  for environment in ("nested_api", "data_pipeline"):
    longer = f"{_ENVIRONMENTS[environment]} train.iterations=96"
    found += lines("plateau", f"{environment}_long", _MAIN, longer, 4)
  found += lines("delayed", "archive", _MAIN, _ARCHIVE, 8)
  tries = f"{_NESTED} evaluation.samples=64 evaluation.sampled_tasks=60"
  found += lines("new", "nested_api_tries", _MAIN, tries, 4)
  return tuple(found)


def _line(group, environment, method, how, fields, seeds) -> str:
  algorithm, _, rest = how.partition(" ")
  parts = (f"seeds={seeds}", f"algorithm={algorithm}", rest, _settings(algorithm), fields)
  return f"{group}/{environment}/{method}: {' '.join(part for part in parts if part)}"


def _settings(algorithm: str) -> str:
  """What the quickstart sets for this algorithm, other than for steptool."""
  usual, own = (_flat(_QUICKSTART(name).to_dict()) for name in ("steptool", algorithm))
  return " ".join(f"{k}={v}" for k, v in own.items() if v != usual[k] and k != "algorithm")


def _flat(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def get_config(arg=""):
  """The study; ':algorithms' the smaller one; ':pipeline_base' and ':archive_base' the start
  checkpoints of data_pipeline and archive; ':NAME' one cell of the study."""
  if arg == "pipeline_base":
    return _base("data_pipeline", 3, 4)
  if arg == "archive_base":
    return _base("archive", 2, 6)
  config = _study()
  if arg == "algorithms":
    return _all_algorithms(config)
  if not arg:
    return config
  checked = validate(config)
  cells = {cell.name: cell for cell in grid.plan(checked.study)}
  if arg not in cells:
    raise ValueError(f"study.py:{arg}: no such cell; they are named as {next(iter(cells))}")
  config.update(grid.cell_fields(checked, cells[arg]))
  return config


def _study():
  config = _QUICKSTART()
  config.compilation_cache = "/tmp/steptool_jax_compiled"  # cells share their programs
  e = config.environment
  e.num_train, e.num_heldout = 5000, 120
  e.market.prices = True  # cost and latency of every method; Eq. 2 is paid for them
  config.rollout.tasks, config.rollout.samples, config.rollout.slots = 12, 4, 48
  config.sft.steps = 0
  config.train.iterations, config.train.export = 24, False
  config.loss.kl_coef = 0.01  # the quickstart's when results/study was begun
  v = config.evaluation
  # Held-out tasks at the start and the end; the curve between them is of training rollouts.
  v.every, v.tasks, v.temperature, v.greedy = 0, 120, 1.0, True
  config.record.heldout, config.record.train, config.record.every = 120, 8, 12
  config.checkpoint.every, config.checkpoint.keep = 8, 1
  config.report.trajectories = 1700
  s = config.study
  s.cells = _cells()
  s.parallel, s.cores = 2, 1
  return config


def _all_algorithms(config):
  config.sft, config.loss = _QUICKSTART().sft, _QUICKSTART().loss
  v = config.evaluation
  v.tasks, v.every, v.greedy, config.environment.num_heldout = 200, 0, False, 200
  config.environment.min_calls, config.environment.max_calls = 2, 3
  config.record.heldout = config.record.train = 0
  config.study.cells = tuple(
    _line("all", "quickstart", name, name, "", 3) for name in algorithms.ALGORITHMS
  )
  return config


def _base(environment: str, fewest: int, most: int):
  """The quickstart's base, made on another environment: clean demonstrations, then bad habits."""
  base = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart_base.py")))
  config = base["get_config"]()
  e = config.environment
  e.name, e.min_calls, e.max_calls = environment, fewest, most
  return config
