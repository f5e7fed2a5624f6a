"""--mode=serve --config.serve.what=policy: a checkpoint for anyone."""

import json
import threading
import time

import httpx
import tiny

from steptool_jax.run import serve
from steptool_jax.run.parts.opening import Stop


def test_a_model_is_served_until_the_run_is_stopped(tmp_path, compiled, monkeypatch):
  """Greedy answers are the same with and without a neighbour, and the summary counts them."""
  monkeypatch.setenv("POLICY_KEY", "secret")
  c = tiny.make(
    *("calls",),
    compilation_cache=compiled,
    serve__what="policy",
    serve__port=0,
    serve__key_variable="POLICY_KEY",
  )
  done, answers = threading.Event(), []
  monkeypatch.setattr(Stop, "__call__", lambda self: done.is_set())

  def client():
    try:
      path = tmp_path / "summary.json"
      while not path.exists():
        time.sleep(0.02)
      url = json.loads(path.read_text())["url"]
      answers.append(httpx.get(f"{url}/models").status_code)
      headers = {"Authorization": "Bearer secret"}
      answers.append(httpx.get(f"{url}/models", headers=headers).json()["data"][0]["id"])
      request = {"messages": [{"role": "user", "content": "Who is Mira Tol?"}], "temperature": 0}
      for _ in range(2):
        reply = httpx.post(
          f"{url}/chat/completions", json=request | {"max_tokens": 8}, headers=headers, timeout=120
        )
        answers.append(reply.json()["choices"][0]["message"]["content"])
    finally:
      done.set()

  thread = threading.Thread(target=client)
  thread.start()
  summary = serve.run(c, tmp_path)
  thread.join()
  assert answers[:2] == [401, tmp_path.name]
  assert answers[2] == answers[3]
  assert answers[2]
  assert (summary["running"], summary["requests"]) == (False, 2)
  assert 2 <= summary["sampled_tokens"] <= 16
  assert summary["source"] == "model: asset:quickstart"
