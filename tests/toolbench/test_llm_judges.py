import json

import pytest

from steptool_jax.simulators.endpoint import Reply
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.formats.judged import Verdict
from steptool_jax.toolbench.llm_judges import llm_comparer, llm_judge
from steptool_jax.toolbench.passrate import Outcome, pass_rate


class Scripted:
  """Replies in order, accepted as an Endpoint does; the last one for ever."""

  def __init__(self, *replies):
    self.replies, self.calls = list(replies), []

  def chat(self, messages, *, function, sample, accept):
    self.calls.append((messages, function["name"], sample))
    reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
    if isinstance(reply, Exception):
      raise reply
    text, arguments = (reply, None) if isinstance(reply, str) else ("", reply)
    reply = Reply(text, arguments, 1, 1, False)
    accept(reply)
    return reply


def test_the_first_look_shows_the_answer_and_the_second_everything():
  endpoint = Scripted({"reasons": "", "verdict": "unsure"}, {"reasons": "", "verdict": "solved"})
  outcome = Outcome("t", "Rain?", "Yes", "CALLS and results")
  rate = pass_rate([outcome], llm_judge(endpoint), runs=1)
  assert rate.verdicts == ((Verdict.SOLVED,),)
  first, second = (json.loads(messages[1]["content"]) for messages, _, _ in endpoint.calls)
  assert first == {"query": "Rain?", "final_answer": "Yes"}
  assert second == {"query": "Rain?", "final_answer": "Yes", "calls": "CALLS and results"}
  systems = [messages[0]["content"] for messages, _, _ in endpoint.calls]
  assert systems[0] != systems[1]


def test_runs_are_draws_of_their_own():
  endpoint = Scripted({"reasons": "", "verdict": "unsolved"})
  pass_rate([Outcome("t", "q", "a", "")], llm_judge(endpoint), runs=3)
  assert sorted(sample for _, _, sample in endpoint.calls) == [0, 1, 2]


@pytest.mark.parametrize(
  "bad", ["It is solved!", {"verdict": "Solved"}, {"verdict": ["solved"]}, {"reasons": "x"}]
)
def test_a_reply_that_is_no_verdict_is_asked_for_again(bad):
  endpoint = Scripted(bad, {"reasons": "", "verdict": "solved"})
  assert llm_judge(endpoint)("q", "a", None, 0) is Verdict.SOLVED
  again = endpoint.calls[1][0][-1]
  assert again["role"] == "user"
  assert "one of solved, unsure, unsolved" in again["content"]


def test_no_verdict_is_made_up():
  endpoint = Scripted("prose")
  with pytest.raises(InfrastructureError, match="no verdict in 3 attempts.*found 'prose'"):
    llm_judge(endpoint)("q", "a", None, 0)
  assert len(endpoint.calls) == 3
  rate = pass_rate([Outcome("t", "q", "a", "")], llm_judge(endpoint), runs=2)
  assert (rate.task_ids, rate.unjudged) == ((), ("t",))


def test_a_failed_endpoint_is_not_asked_again_here():
  endpoint = Scripted(InfrastructureError("down"))
  with pytest.raises(InfrastructureError, match="down"):
    llm_judge(endpoint)("q", "a", None, 0)
  assert len(endpoint.calls) == 1


def test_the_comparer_shows_both_attempts_in_order():
  endpoint = Scripted({"reasons": "", "preference": "second"})
  one, two = Outcome("t", "q", "a", "calls 1"), Outcome("t", "q", "", "calls 2")
  assert llm_comparer(endpoint)("q", one, two, 4) == "second"
  ((messages, name, sample),) = endpoint.calls
  assert (name, sample) == ("report_preference", 4)
  shown = json.loads(messages[1]["content"])
  assert shown["first"] == {"calls": "calls 1", "final_answer": "a"}
  assert shown["second"] == {"calls": "calls 2", "final_answer": ""}
