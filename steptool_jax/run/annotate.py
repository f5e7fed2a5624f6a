"""--mode=annotate: stored trajectories -> the same with a reward on every step.

They go to WORKDIR/annotated.jsonl, or with annotate.output = "tfds" to the array_record folder
WORKDIR/annotated_trajectories (train on it with data.path=WORKDIR and data.format=tfds), or with
"atif" to WORKDIR/atif, one file each, for other tools.

SC, Con and IsSolved come from one of SOURCES: rules, an LLM judge (the mean over its runs), a table
of existing annotations, or rollouts that go on from the states between steps (Monte Carlo). A new
source is a function and its row there; the choices of annotate.source name it. rewards/shaping.py
makes rewards of the scores, with rewards.alpha, rewards.shaping and rewards.weight. Con is told in
hindsight: was the step of use later? Train on the file with
--config.data.path=WORKDIR/annotated.jsonl, or a reward model with --mode=reward_model.

What the judge failed on is counted and left out, never scored. Its replies are kept on disk, so the
same command goes on after a stop and asks again only for what is missing.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.config import Config
from steptool_jax.data import annotated_trajectories, atif, trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.environments import checkers
from steptool_jax.environments.base import SPLITS, Environment
from steptool_jax.rewards import monte_carlo, responses, rules, shaping
from steptool_jax.rewards.judge import StepJudge
from steptool_jax.rewards.scores import apply
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.run.data.offline import files
from steptool_jax.run.evaluating.state_values import Kept
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import build, opening, services
from steptool_jax.run.parts.opening import Stop
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import inputs, outputs
from steptool_jax.toolbench import rule_judge
from steptool_jax.toolbench.formats import conversations, converted, judged
from steptool_jax.types import Status, Task, Trajectory, by_call

_NAMED = 20  # failures that summary.json names of each kind
ROUND = 256  # trajectories judged between two looks at the stop signal


@dataclasses.dataclass
class Work:
  """What a source works on: `records` to put scores on, and what was left out so far, by reason."""

  records: list[AnnotatedTrajectory]
  total: int
  left_out: dict[str, list[str]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )

  def mark(self, annotate: Callable[[AnnotatedTrajectory], Trajectory]) -> None:
    """Replaces every record's trajectory by what `annotate` makes of the record."""
    self.records = [dataclasses.replace(r, trajectory=annotate(r)) for r in self.records]


# Puts SC, Con and IsSolved on work.records (or leaves them out); returns what the summary says.
Source = Callable[[Config, pathlib.Path, Work, Stop], dict[str, Any]]


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Annotates and returns the summary that it has written.

  Raises:
    OSError, ValueError: input, table or settings that are wrong, named.
    RuntimeError: the judge failed on all trajectories of a round, so it is down.
  """
  a = config.annotate
  if not a.input:
    raise ValueError("config.annotate.input: empty; name the trajectories to annotate")
  r = config.rewards
  if shaping.SHAPINGS[r.shaping].by_goal:
    raise ValueError(
      f"config.rewards.shaping: {r.shaping!r} counts what the goal needs, which stored "
      "trajectories do not tell; use 'sum', as the release, or 'prefix_mean'"
    )
  if a.output == "tfds":
    annotated_trajectories.refuse_existing(workdir)
  origin = {
    "source": a.source,
    "alpha": r.alpha,
    "shaping": r.shaping,
    "weight": r.weight,
  }
  with Stop().listening() as stop:
    work = _read(config, workdir)
    more = SOURCES[a.source](config, workdir, work, stop)
    summary = origin | {"trajectories": work.total}
    if stop():
      summary |= {"interrupted": True} | more
      logging.warning("stopped on request; the same command goes on from what was found so far")
    else:
      shaped = [_shaped(config, record, origin) for record in work.records]
      if a.output == "tfds":
        annotated_trajectories.build({"train": shaped}, workdir)
      elif a.output == "atif":
        atif.write_folder(workdir / "atif", shaped)
      else:
        trajectories.write_trajectories(workdir / "annotated.jsonl", shaped)
      summary |= {
        "annotated": len(shaped),
        "left_out": {kind: len(names) for kind, names in work.left_out.items()},
        "left_out_names": {kind: names[:_NAMED] for kind, names in work.left_out.items()},
        "interrupted": False,
      }
      summary |= _means([record.trajectory for record in shaped]) | more
  return outputs.write_summary(workdir, "annotate", summary)


# --- input and output ------------------------------------------------------------------------


def _read(config: Config, workdir: pathlib.Path) -> Work:
  """Trajectories that can be annotated; what ended in an infrastructure error never is."""
  a = config.annotate
  work = Work([], 0)
  for path in files(a.input, "annotate.input"):
    if a.format == "jsonl":
      for record in trajectories.read_trajectories(path):
        work.total += 1
        t = record.trajectory
        if t.status is Status.INFRASTRUCTURE_ERROR or not t.steps:
          work.left_out["infrastructure_error" if t.steps else "no_steps"].append(_name(t))
        else:
          work.records.append(record)
      continue
    entries = _stored_calls(a.format, path)
    chat_format = build.build_chat_format(config, workdir)
    result = conversations.from_calls(entries, chat_format, config.train.row_tokens)
    logging.info("%s: %s", path, result.report())
    work.total += result.total
    work.records += result.records
    long = [(row, f"{tokens} tokens") for row, tokens in result.too_long]
    for kind, rows in (("too_long", long), ("unusable", result.unusable)):
      work.left_out[kind] += [f"{entries[row - 1].query_id} ({why})" for row, why in rows]
  if not work.records:
    left_out = {kind: names[:_NAMED] for kind, names in work.left_out.items() if names}
    raise ValueError(
      f"config.annotate.input: none of {work.total} trajectories of {a.input} can be annotated; "
      f"left out: {left_out}"
    )
  return work


def _stored_calls(kind: str, path: pathlib.Path) -> list[conversations.Calls]:
  if kind == "converted":
    return [conversations.calls_of_converted(e) for e in converted.read_converted(path).values()]
  return [conversations.calls_of_annotation(e) for e in judged.read_annotations(path).values()]


def _shaped(config: Config, record: AnnotatedTrajectory, origin: dict) -> AnnotatedTrajectory:
  shaped = shaping.shape(record.trajectory, config.rewards)
  metadata = {**record.metadata, "annotation": origin}
  return dataclasses.replace(record, trajectory=shaped, metadata=metadata)


def _means(annotated: Sequence[Trajectory]) -> dict[str, float]:
  """Figures over calls (SC, Con), steps (reward) and trajectories (IsSolved, summed rewards)."""
  marked = [by_call(t.steps)[: len(responses.transcript("", t).steps)] for t in annotated]
  calls = [step for steps in marked for step in steps]

  def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0

  return {
    "calls": len(calls),
    "mean_success_calling": mean([step.success_calling for step in calls]),
    "mean_contribution": mean([step.contribution for step in calls]),
    "mean_is_solved": mean([t.solved for t in annotated]),
    "mean_step_reward": mean([step.reward for t in annotated for step in t.steps]),
    "mean_reward": mean([sum(step.reward for step in t.steps) for t in annotated]),
  }


def _name(trajectory: Trajectory) -> str:
  return f"{trajectory.task_id}, sample {trajectory.sample}"


def _needs_query(record: AnnotatedTrajectory) -> str:
  if not record.query.strip():
    raise ValueError(
      f"config.annotate.input: {_name(record.trajectory)} has no 'query', which this source reads; "
      "use annotate.rule=environment, or write the query into the file"
    )
  return record.query


# --- sources ---------------------------------------------------------------------------------


def by_rules(config: Config, workdir: pathlib.Path, work: Work, stop: Stop) -> dict[str, Any]:
  """IsSolved stays what the file says; official files say nothing, there a rule judge decides."""
  del workdir, stop
  rule = config.annotate.rule
  if rule == "environment":
    if config.annotate.format != "jsonl":
      raise ValueError(
        "config.annotate.rule: 'environment' needs tasks, and official files hold none; use "
        "evidence or lcs"
      )
    if config.environment.name == "toolbench":
      raise ValueError(
        "config.annotate.rule: 'environment' knows what a goal needs; StableToolBench's tasks do "
        "not say it; use evidence, or annotate.source judge"
      )
    with services.open_services(config) as opened:  # tools may be a server's
      environment = build.build_environment(config, opened)
      tasks = _tasks(environment, work, "annotate.rule")
      work.mark(lambda r: rules.annotate(tasks[r.trajectory.task_id], r.trajectory))
    return {"rule": rule}

  def by_text(record: AnnotatedTrajectory) -> Trajectory:
    query, trajectory = _needs_query(record), record.trajectory
    if config.annotate.format != "jsonl":
      texts = responses.transcript(query, trajectory)
      trajectory = dataclasses.replace(trajectory, solved=rule_judge.coverage(texts))
    return responses.score(query, trajectory, rule)

  work.mark(by_text)
  if config.annotate.format == "jsonl":
    return {"rule": rule, "is_solved_by": "the file"}
  return {"rule": rule, "is_solved_by": rule_judge.beside("IsSolved")}


def _tasks(environment: Environment, work: Work, field: str) -> dict[str, Task]:
  """Tasks by id; ValueError where a trajectory is of none."""
  tasks = {task.id: task for split in SPLITS for task in environment.tasks(split)}
  unknown = [r.trajectory.task_id for r in work.records if r.trajectory.task_id not in tasks]
  if unknown:
    raise ValueError(
      f"config.{field}: {len(unknown)} trajectories are of no task of environment "
      f"{environment.name!r}, e.g. {unknown[0]!r}; set environment.* as in the run that made them, "
      "or use source rules with the rule evidence"
    )
  return tasks


def by_table(config: Config, workdir: pathlib.Path, work: Work, stop: Stop) -> dict[str, Any]:
  """Scores by task id. A trajectory without an entry, or with another one's, is an error."""
  del workdir, stop
  a = config.annotate
  if not a.table and a.format != "annotations":
    raise ValueError("config.annotate.table: empty; name the file of official annotations")
  found: dict[str, judged.Annotation] = {}
  field = "annotate.table" if a.table else "annotate.input"
  for path in files(a.table or a.input, field):
    found |= judged.read_annotations(path)
  missing = [_name(r.trajectory) for r in work.records if r.trajectory.task_id not in found]
  if missing:
    raise ValueError(
      f"config.{field}: no annotation for {len(missing)} trajectories, e.g. {missing[0]}; annotate "
      "them with another source, or take them out of the input"
    )

  def scored(record: AnnotatedTrajectory) -> Trajectory:
    entry = found[record.trajectory.task_id]
    mine = responses.transcript(record.query, record.trajectory)
    theirs = entry.transcript
    if [_tool(call) for call, _ in mine.steps] != [_tool(call) for call, _ in theirs.steps]:
      raise ValueError(
        f"config.{field}: the entry {record.trajectory.task_id!r} annotates other calls than those "
        "of the trajectory; name the annotations of these trajectories"
      )
    return apply(entry.scores, record.trajectory)

  work.mark(scored)
  return {"runs": max(len(entry.verdicts) for entry in found.values())}


def _tool(action: str) -> str:
  """The called function; "" for a malformed call, whose spelling the files keep apart."""
  return "" if action.startswith("malformed call") else action.partition(" ")[0]


def by_judge(config: Config, workdir: pathlib.Path, work: Work, stop: Stop) -> dict[str, Any]:
  if config.judge.kind != "llm":
    raise ValueError(
      "config.judge.kind: annotate.source 'judge' asks a language model; set it to llm and name "
      "judge.endpoint.base_url and model, or use annotate.source=rules"
    )
  queries = [_needs_query(record) for record in work.records]
  asked = config.judge.endpoint
  if not asked.cache:  # what a run that goes on finds
    asked = dataclasses.replace(asked, cache=str(workdir / "judge_replies"))
  with contextlib.ExitStack() as stack:
    endpoint = services.open_endpoint(asked, "judge.endpoint", stack)
    judge = StepJudge(endpoint, runs=config.judge.runs)
    records, work.records = work.records, []
    bar = stack.enter_context(hosts.bar(total=len(records), desc="judge", unit="trajectory"))
    for start in range(0, len(records), ROUND):
      if stop():
        break
      here = slice(start, start + ROUND)
      _judge_round(judge, records[here], queries[here], work)
      bar.update(len(records[here]))
    return {"runs": config.judge.runs, "usage": dataclasses.asdict(endpoint.usage())}


def _judge_round(
  judge: StepJudge, records: list[AnnotatedTrajectory], queries: list[str], work: Work
) -> None:
  """Adds what the judge managed to work.records, the rest to what was left out."""
  pairs = zip(queries, records, strict=True)
  found = judge.score([responses.transcript(q, record.trajectory) for q, record in pairs])
  failures = found.failures
  # A few failures cost their own trajectories; a whole round of them is a judge that is down.
  if len(failures) == len(records) and (not work.records or len(records) == ROUND):
    raise RuntimeError(
      f"the judge failed on all {len(records)} trajectories of a round, e.g. {failures[0]}; see to "
      "config.judge.endpoint, then run the same command again"
    )
  for record, scores in zip(records, found.scores, strict=True):
    if scores is not None:
      scored = apply(scores, record.trajectory)
      work.records.append(dataclasses.replace(record, trajectory=scored))
  work.left_out["judge_failed"] += [
    f"{_name(records[index].trajectory)}: {reason}" for index, reason in failures.items()
  ]


def _conditions(config: Config, workdir: pathlib.Path) -> str:
  """What else decides how conversations go on: tasks, tools and limits, by their content."""
  fields = dataclasses.asdict(config.environment), dataclasses.asdict(config.rollout)
  files = {k: v for k, v in inputs.digests(config, workdir).items() if k.startswith("environment")}
  return f"{fields} {files}"


def by_monte_carlo(config: Config, workdir: pathlib.Path, work: Work, stop: Stop) -> dict[str, Any]:
  """Con from how conversations go on that continue from the states between the steps.

  The policy is that of WORKDIR's newest checkpoint, or of model.path. SC is that of the rules, and
  IsSolved stays what the file says: it is the value after the last step. What was found is kept in
  WORKDIR/monte_carlo.jsonl, so the same command goes on after a stop.
  """
  if config.annotate.format != "jsonl":
    raise ValueError(
      "config.annotate.source: 'monte_carlo' goes on with conversations, which needs their tasks "
      "and tools, and official files hold none; use rules, judge or table"
    )
  c = config.annotate.monte_carlo
  with opening.open_parts(config, workdir, stop) as parts:
    if parts.services.judging is not None:
      raise ValueError(
        "config.annotate.source: 'monte_carlo' needs a checker for thousands of answers, and here "
        "a judge grades; use source judge"
      )
    tasks = _tasks(parts.environment, work, "annotate.source")
    unknown = [r for r in work.records if not checkers.known(tasks[r.trajectory.task_id].checker)]
    if unknown:
      raise ValueError(
        f"config.annotate.source: 'monte_carlo' needs outcomes, and nobody knows those of "
        f"{len(unknown)} trajectories, e.g. {_name(unknown[0].trajectory)} (checker none); use "
        "rules or judge"
      )
    newest = restore.newest_variables(parts)
    if newest is None:
      variables = build.initial_variables(config, parts.policy, parts.mesh)
      policy = f"{config.model.path} {inputs.digests(config, workdir).get('model.path', '')}"
    else:
      variables, meta = newest
      policy = f"checkpoint {meta['phase']} {meta['done']}"
    kept = Kept(parts, f"{policy} {_conditions(config, workdir)}")
    most, fitting = config.rollout.max_tokens, []
    for record in work.records:
      if record.trajectory.longest > most:
        work.left_out["too_long"].append(_name(record.trajectory))
      else:
        fitting.append(record)
    records, work.records = fitting, []
    size = config.rollout.slots
    with hosts.bar(total=len(records), desc="monte carlo", unit="trajectory") as bar:
      for start in range(0, len(records), size):
        here = [(tasks[r.trajectory.task_id], r) for r in records[start : start + size]]
        try:
          found = kept.values(variables, [(task, r.trajectory) for task, r in here])
        except Interrupted:
          break
        if kept.down:
          raise RuntimeError(
            f"all that went on from {len(found)} trajectories of a round failed: their tools, "
            "sessions or checkers are down; see to them, then run the same command again"
          )
        for (task, record), values in zip(here, found, strict=True):
          if values is None:
            work.left_out["no_value"].append(_name(record.trajectory))
            continue
          marked = rules.annotate(task, record.trajectory)
          marked = monte_carlo.contributions(marked, values, c.label == "gain")
          work.records.append(dataclasses.replace(record, trajectory=marked))
        bar.update(len(here))
  return {"samples": c.samples, "label": c.label, "rollouts": kept.rollouts}


SOURCES: dict[str, Source] = {
  "rules": by_rules,
  "judge": by_judge,
  "table": by_table,
  "monte_carlo": by_monte_carlo,
}
