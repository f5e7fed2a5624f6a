"""Notices that Google Cloud gives a TPU host before it takes the host away.

Not every notice comes as SIGTERM: before host maintenance the metadata server says so, a minute to
an hour ahead, and nothing else happens. So on TPUs it is asked every few seconds; elsewhere only
where GCE_METADATA_HOST, the variable of Google's own libraries, names a server.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import httpx
import jax
from absl import logging

PERIOD_S = 5.0
_TIMEOUT_S = 3.0
_SIGNS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}


@contextlib.contextmanager
def watched(announce: Callable[[], None]) -> Iterator[None]:
  """Calls `announce` once, from a thread, when this host is about to go away.

  A server that does not answer at the first question is not asked again.
  """
  host = os.environ.get("GCE_METADATA_HOST", "")
  if not host and jax.default_backend() != "tpu":
    yield
    return
  over = threading.Event()
  arguments = host or "metadata.google.internal", announce, over
  thread = threading.Thread(target=_watch, args=arguments, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def _watch(host: str, announce: Callable[[], None], over: threading.Event) -> None:
  url, headers = f"http://{host}/computeMetadata/v1/instance/", {"Metadata-Flavor": "Google"}
  answered = False
  # No proxy stands between a host and its metadata server.
  with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client:
    while True:
      try:
        found = {name: client.get(name).raise_for_status().text.strip() for name in _SIGNS}
        answered = True
      except httpx.HTTPError as error:
        if not answered:
          logging.info("maintenance notices are not watched: %s gives none (%s)", host, error)
          return
        found = {}
      notices = [f"{name}: {value}" for name, value in found.items() if value == _SIGNS[name]]
      if notices:
        logging.warning("this host is about to go away (%s)", ", ".join(notices))
        announce()
        return
      if over.wait(PERIOD_S):
        return
