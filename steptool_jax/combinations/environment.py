"""The environment, its services and its market."""

from steptool_jax.config import Config
from steptool_jax.environments.base import AGENTS


def check(config: Config) -> None:
  c = config.environment
  if c.min_calls > c.max_calls:
    raise ValueError(
      f"config.environment.min_calls: {c.min_calls} is more than max_calls = {c.max_calls}"
    )
  if c.name in ("custom", "harness"):
    tools = c.functions or (c.mcp if c.name == "custom" else "")
    for name, value in (("functions", tools), ("tasks", c.tasks)):
      if not value:
        raise ValueError(f"config.environment.{name}: a file is needed for environment {c.name!r}")
  for name in ("openenv", "verifiers"):
    if c.name == name and not getattr(c, name):
      raise ValueError(f"config.environment.{name}: is empty, needed for environment {name!r}")
  if c.name in AGENTS:
    _check_agent(config)
  if c.mcp and c.name != "custom":
    raise ValueError(f"config.environment.mcp: is for environment 'custom', not {c.name!r}")
  if c.mcp_shared and not c.mcp:
    raise ValueError("config.environment.mcp_shared: set, but environment.mcp names no server")
  if c.name == "toolbench":
    for name in ("folder", "subsets"):
      if not getattr(c.toolbench, name):
        raise ValueError(
          f"config.environment.toolbench.{name}: is empty, needed for environment 'toolbench'"
        )
  _check_addresses(config)
  _check_market(config)


def _check_agent(config: Config) -> None:
  """Its agents call their tools themselves: nothing here can stand between."""
  c, f = config.environment, config.environment.faults
  for name, value in (
    ("environment.market.prices", c.market.prices),
    ("environment.faults", f.rate_limit + f.timeout + f.transient + f.not_found),
    ("sft.steps", config.sft.steps and not config.data.path),
    ("model.tokenizer = 'compact'", config.model.tokenizer == "compact"),
    ("rollout.strategy = 'dfsdt'", config.rollout.strategy != "chain"),
  ):
    if value:
      raise ValueError(
        f"config.{name}: is not for environment {c.name!r}, whose agent calls its own tools; "
        "leave it at its default"
      )


def _check_addresses(config: Config) -> None:
  """Before a password in one is written to a run's folder."""
  (mcp,) = config.environment.mcp if len(config.environment.mcp) == 1 else ("",)
  for name, url, form in (
    ("simulator.http", config.simulator.http, "http://host:port/virtual"),
    ("simulator.llm.base_url", config.simulator.llm.base_url, "http://host:port/v1"),
    ("judge.endpoint.base_url", config.judge.endpoint.base_url, "http://host:port/v1"),
    ("environment.user.base_url", config.environment.user.base_url, "http://host:port/v1"),
    ("environment.openenv", config.environment.openenv, "http://host:8000"),
    ("environment.mcp", mcp if mcp.startswith("http") and "//" in mcp else "", "http://host/mcp"),
  ):
    if url:
      from steptool_jax.simulators.posting import check_address  # slow: httpx

      check_address(url, f"config.{name}", form)
  if not config.serve.host:
    raise ValueError("config.serve.host: is empty; name 0.0.0.0 to listen on every address")


def _check_market(config: Config) -> None:
  m = config.environment.market
  where = "config.environment.market"
  for name in ("specialists", "preferences", "asked"):
    if getattr(m, name) and not m.prices:
      raise ValueError(f"{where}.{name}: set, but {where}.prices is False, so there is no market")
  if m.specialists:
    from steptool_jax.environments.markets.market import SPECIALTIES  # slow: all their environments

    if config.environment.name not in SPECIALTIES:
      raise ValueError(
        f"{where}.specialists: they know {' and '.join(SPECIALTIES)}, not "
        f"{config.environment.name!r}; leave it empty"
      )
  if m.asked and not m.specialists:
    raise ValueError(f"{where}.asked: {m.asked:g}, but there are no specialists to ask")
