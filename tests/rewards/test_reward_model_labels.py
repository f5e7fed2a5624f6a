"""What the reward model is taught, what its scores become, and Monte-Carlo labels."""

import dataclasses

import numpy as np
import pytest

from steptool_jax.rewards import model, monte_carlo
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)


def step(action, tokens, observed=(), sc=0.0, con=0.0):
  observation = None if isinstance(action, Finish) else Observation("x", Code.OK)
  made = np.array(tokens, np.int32)
  return Step(
    made,
    np.zeros(len(made), np.float32),
    action,
    observation,
    np.array(observed, np.int32),
    sc,
    con,
  )


def made(status=Status.ANSWERED, last=None):
  """Prompt 1 2; call 3 4 answered by 5; malformed 6 answered by 7 8; Finish 9."""
  steps = (
    step(ToolCall("f", {}), [3, 4], [5], 1.0, 0.25),
    step(Malformed("no"), [6], [7, 8]),
    last or step(Finish("x"), [9]),
  )
  return Trajectory("t", 0, np.array([1, 2], np.int32), steps, status, 0.75)


def test_a_step_ends_with_what_was_observed():
  """One token earlier SC would have to be guessed: the answer to the call is not seen yet."""
  t = made()
  assert model.ids(t).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
  assert model.ids(t)[model.ends(t)].tolist() == [5, 8, 9]


def test_labels_by_hand():
  """Finish has no SC and no Con; only the last step has the outcome."""
  values, there = model.labels(made())
  assert there.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
  assert values[there].tolist() == [1.0, 0.25, 0.0, 0.0, 0.75]
  assert values.dtype == np.float32
  cut = made(Status.STEP_BUDGET, step(ToolCall("f", {}), [9], [10], 1.0, 1.0))
  assert model.labels(cut)[1][-1].tolist() == [True, True, True]


def test_scores_take_the_place_of_rules():
  """Those that have no label are not paid: an SC of Finish would be."""
  scores = np.array([[0.5, 0.25, 0.9], [0.125, 0.75, 0.9], [0.9, 0.9, 0.625]], np.float32)
  t = model.apply(made(), scores)
  assert [(s.success_calling, s.contribution) for s in t.steps] == [
    (0.5, 0.25),
    (0.125, 0.75),
    (0.0, 0.0),
  ]
  assert t.solved == 0.625


def test_an_answer_to_which_the_user_replied_is_no_failed_call():
  """Each cost as much as one, where failed calls cost."""
  whole = made()
  replied = dataclasses.replace(
    whole.steps[1], action=Finish("x"), observation=Observation("and twice that?", Code.OK)
  )
  t = dataclasses.replace(whole, steps=(whole.steps[0], replied, whole.steps[2]))
  marked = model.apply(t, np.full((3, 3), 0.5, np.float32))
  assert [(s.success_calling, s.contribution) for s in marked.steps] == [(0.5, 0.5), (1, 0), (0, 0)]


def test_an_infrastructure_error_stays_as_it_is():
  t = made(Status.INFRASTRUCTURE_ERROR)
  assert model.apply(t, np.ones((3, 3), np.float32)) is t


def test_monte_carlo_by_hand():
  """V = .5, .25, .75 in front of the steps; the outcome .75 is the value behind the last one."""
  values = [0.5, 0.25, 0.75]
  found = monte_carlo.contributions(made(), values, gain=False)
  assert [s.contribution for s in found.steps] == [0.25, 0.75, 0.75]
  found = monte_carlo.contributions(made(), values, gain=True)
  assert [s.contribution for s in found.steps] == [0.0, 0.5, 0.0]
  with pytest.raises(ValueError, match="argument"):
    monte_carlo.contributions(made(), values[:2], gain=False)
