"""Processes of one run that differ in what they must share are refused."""

import hashlib
import importlib.metadata
import json
import pathlib
import secrets
import zlib

import jax

import steptool_jax
from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.run.hosts import hosts
from steptool_jax.types import TokenBatch


def refuse_differences(config: Config, workdir: pathlib.Path) -> None:
  """ValueError where processes differ in config or code, or do not share the workdir."""
  if jax.process_count() != hosts.peers().count:
    raise ValueError(
      f"jax sees {jax.process_count()} processes, but jax.distributed was not started; leave out "
      "--processes=1, or give --coordinator, --processes and --process"
    )
  if hosts.peers().count == 1:
    return
  mark = workdir / f".shared-{hosts.lead(lambda: secrets.token_hex(8))}"
  hosts.lead(lambda: mark.touch())
  mine = {
    "config": json.loads(validation.to_json(config)),
    "code": _code(),
    "workdir": str(workdir) if mark.exists() else "",
  }
  found = hosts.gather(mine)
  if hosts.primary():
    mark.unlink()
  for index, theirs in enumerate(found):
    if theirs["config"] != found[0]["config"]:
      first = validation.validate(found[0]["config"])
      names = ", ".join(validation.differences(first, theirs["config"]))
      raise ValueError(
        f"process {index} has another config than process 0; different: {names}; start all "
        "processes with the same command"
      )
    if theirs["code"] != found[0]["code"]:
      raise ValueError(
        f"process {index} runs other code than process 0 ({theirs['code']} and "
        f"{found[0]['code']}); install the same version of steptool_jax and jax on all hosts"
      )
    if not theirs["workdir"]:
      raise ValueError(
        f"--workdir: {workdir} of process 0 is not seen by process {index}; all hosts need one "
        "shared folder (NFS, Filestore, a mounted bucket)"
      )


def refuse_different_batches(batch: TokenBatch) -> None:
  """RuntimeError where the processes are about to train on different data."""
  if hosts.peers().count == 1:
    return
  digest = 0
  for array in jax.tree.leaves(batch):
    digest = zlib.crc32(array, digest)
  found = hosts.gather(digest)
  if len(set(found)) > 1:
    raise RuntimeError(
      f"the processes have different batches (checksums {found}): their tasks, files or "
      "environments differ; every host must see the same data"
    )


def _code() -> str:
  """Versions, and a digest of this package's source."""
  root = pathlib.Path(steptool_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
  return f"{', '.join(versions)}, source {digest.hexdigest()[:12]}"
