"""--mode=export: the newest checkpoint as a Hugging Face directory, WORKDIR/export."""

import pathlib
from typing import Any

from steptool_jax.config import Config
from steptool_jax.files import replacing_folder
from steptool_jax.policy.formats import peftfile
from steptool_jax.run.hosts import hang, hosts
from steptool_jax.run.parts import build, opening
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import outputs


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes WORKDIR/export (merged weights) and, for LoRA, WORKDIR/export/adapter (PEFT)."""
  with opening.open_parts(config, workdir, opening.Stop()) as parts:
    newest = restore.newest_variables(parts)
    if newest is None:
      raise FileNotFoundError(f"{workdir}: no checkpoint; train first, or check --workdir")
    variables, meta = newest
    out = write(parts, variables, folded=meta["phase"] == "rl" and config.sft.steps > 0)
  summary = {
    "directory": str(out),
    "phase": meta["phase"],
    "iterations": meta["done"],
    "peak_rss_gib": outputs.peak_rss_gib(),
  }
  return outputs.write_summary(workdir, "export", summary)


def write(parts: Parts, variables: dict, folded: bool) -> pathlib.Path:
  """The export itself; replaces an earlier one, which is kept until the new one is whole.

  `folded`: SFT's adapters are part of the base by now, so a PEFT adapter alone would not fit the
  model that the user started from and is left out.
  """
  hang.rest()  # a large model takes its time
  policy = parts.policy
  out = parts.workdir / "export"
  with replacing_folder(out, hosts.primary()) as new:
    build.save_policy(new, policy, variables)
    if policy.lora is not None and not folded:
      base = None if policy.source is None else str(policy.source.resolve())
      peftfile.save_adapter(new / "adapter", policy.model, variables["lora"], policy.lora, base)
  return out
