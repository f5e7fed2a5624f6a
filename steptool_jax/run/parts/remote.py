"""What samples in rollouts: the run's own engine, or vLLM servers (rollout.engine)."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from steptool_jax.config import Config
from steptool_jax.files import replacing_folder
from steptool_jax.policy.engine import Engine
from steptool_jax.policy.formats import peftfile
from steptool_jax.policy.length_classes import LengthClasses
from steptool_jax.rollout.remote import HttpEngine, Sampling, Server
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import build
from steptool_jax.run.parts.services import secret


@contextlib.contextmanager
def opened(
  config: Config, policy: build.Policy, mesh: Mesh, workdir: pathlib.Path
) -> Iterator[Engine | LengthClasses | HttpEngine]:
  """The engine; closed in the end. ValueError for a config that servers cannot serve."""
  if config.rollout.engine == "own":
    yield build.build_engine(config, policy, mesh)
    return
  if hosts.peers().count > 1:
    raise ValueError(
      "config.rollout.engine: 'http' samples from one process, which learns too; start it alone, "
      "with its mesh over this host's chips"
    )
  h = config.rollout.http
  if policy.model.tie_embeddings and policy.lora is None:
    # The weights of the head are the embedding's, and vLLM 0.32 does not find them under its name.
    raise ValueError(
      "config.rollout.engine: 'http' with full fine-tuning of a model whose head is its embedding: "
      "vLLM's reload leaves such a head as it was, and samples from a policy between two versions. "
      "Train adapters, which leave the embedding alone (lora.rank=16), or set rollout.engine to "
      "'own'"
    )
  key = secret(h.key_variable, "rollout.http.key_variable")
  servers = [
    Server(address, key=key, timeout_s=h.timeout, in_flight=config.rollout.slots)
    for address in h.servers
  ]
  folder = pathlib.Path(h.folder or workdir / "served").absolute()

  def publish(variables: Any) -> str:
    with replacing_folder(folder) as new:
      if h.weights == "adapter":
        peftfile.save_adapter(new, policy.model, variables["lora"], policy.lora)
      else:
        build.save_policy(new, policy, variables)
    return str(folder)

  engine = HttpEngine(
    servers,
    publish,
    Sampling(policy.model.vocab_size, config.rollout.top_k, config.rollout.top_p),
    slots=config.rollout.slots,
    size=build.slot_tokens(config),
    adapter=h.weights == "adapter",
  )
  try:
    yield engine
  finally:
    engine.close()
