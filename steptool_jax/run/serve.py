"""--mode=serve: POST /virtual over config.simulator, so that other tools use a cache offline."""

import pathlib
import time
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.run.parts import services
from steptool_jax.run.parts.opening import Stop
from steptool_jax.run.workdir import outputs
from steptool_jax.toolbench.server import Server


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Serves config.simulator until SIGTERM or Ctrl-C.

  summary.json is there from the start (with the address; "running" true), and again at the end
  with what was answered. ValueError or OSError, before it serves, for what the config lacks.
  """
  c = config.serve
  key = services.secret(c.key_variable, "serve.key_variable")
  with (
    services.open_answering(config) as answering,
    Server(answering.simulator, c.host, c.port, key) as server,
  ):
    host = f"[{c.host}]" if ":" in c.host else c.host
    summary = {"url": f"http://{host}:{server.port}/virtual"}
    if not key and c.host not in ("127.0.0.1", "::1", "localhost"):
      logging.warning("%s can be asked by everyone; serve.key_variable gives it a key", c.host)
    with Stop().listening() as stop:
      outputs.write_summary(workdir, "serve", summary | {"running": True})
      logging.info("serving %s", summary["url"])
      while not stop():
        time.sleep(0.1)
    if not server.close():
      logging.warning("closed with requests still under way")
    summary |= {"running": False, "requests": server.requests} | answering.report()
  return outputs.write_summary(workdir, "serve", summary)
