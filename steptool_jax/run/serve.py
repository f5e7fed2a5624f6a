"""--mode=serve, until SIGTERM or Ctrl-C.

  serve.what=simulator  POST /virtual over config.simulator, so that other tools use a cache offline
  serve.what=policy     POST /v1/chat/completions over WORKDIR's newest checkpoint, or the model

summary.json is there from the start (with the address; "running" true), and again at the end with
what was answered.
"""

import pathlib
import time
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.run.parts import opening, services
from steptool_jax.run.parts.opening import Stop
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import outputs
from steptool_jax.serving.decoding import Decoder
from steptool_jax.serving.server import PolicyServer
from steptool_jax.toolbench.server import Server

_LOOK_S = 0.1  # between looks at whether to stop


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """ValueError or OSError, before it serves, for what the config lacks."""
  key = services.secret(config.serve.key_variable, "serve.key_variable")
  serve = _policy if config.serve.what == "policy" else _simulator
  with Stop().listening() as stop:
    return outputs.write_summary(workdir, "serve", serve(config, workdir, key, stop))


def _simulator(config: Config, workdir: pathlib.Path, key: str, stop: Stop) -> dict[str, Any]:
  c = config.serve
  with (
    services.open_answering(config) as answering,
    Server(answering.simulator, c.host, c.port, key) as server,
  ):
    summary = _started(config, workdir, f"{server.root}/virtual", key)
    while not stop():
      time.sleep(_LOOK_S)
    if not server.close():
      logging.warning("closed with requests still under way")
    return summary | {"running": False, "requests": server.requests} | answering.report()


def _policy(config: Config, workdir: pathlib.Path, key: str, stop: Stop) -> dict[str, Any]:
  c = config.serve
  if config.rollout.long_slots:
    raise ValueError(
      f"config.rollout.long_slots: {config.rollout.long_slots}, but slots of a server are all "
      "alike; set it and rollout.slot_tokens to 0"
    )
  with opening.open_parts(config, workdir, stop) as parts:
    variables, source = restore.policy_variables(parts)
    chat_format = parts.policy.chat_format
    variables = parts.engine.lay_out(variables)
    decoder = Decoder(parts.engine, variables, chat_format.stop_ids)
    with PolicyServer(
      *(decoder, chat_format, c.host, c.port),
      name=workdir.name,
      system=config.model.system or None,
      key=key,
      everyone=True,
      temperature=config.rollout.temperature,
      top_p=config.rollout.top_p,
    ) as server:
      summary = _started(config, workdir, server.url, key) | {"source": source}
      while not stop():
        decoder.step(_LOOK_S)
      done = {"requests": server.requests, "sampled_tokens": decoder.stats.sampled_tokens}
      return summary | {"running": False} | done


def _started(config: Config, workdir: pathlib.Path, url: str, key: str) -> dict[str, Any]:
  """Says so, and where; returns the beginning of the summary."""
  host = config.serve.host
  if not key and host not in ("127.0.0.1", "::1", "localhost"):
    logging.warning("%s can be asked by everyone; serve.key_variable gives it a key", host)
  summary = {"what": config.serve.what, "url": url}
  outputs.write_summary(workdir, "serve", summary | {"running": True})
  logging.info("serving %s", url)
  return summary
