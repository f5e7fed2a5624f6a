"""A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import contextlib
import shutil
import socket
import subprocess
import time

import httpx
import pytest


def needed() -> tuple[str, str]:
  """(browser, driver); skips the test where one is missing."""
  names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
  browser = next((path for name in names if (path := shutil.which(name))), None)
  driver = shutil.which("chromedriver")
  if browser is None or driver is None:
    pytest.skip(
      "needs Chromium and chromedriver on the PATH (Debian: apt-get install chromium "
      "chromium-driver)"
    )
  return browser, driver


class Browser:
  def __init__(self, client: httpx.Client, session: str):
    self._client, self._session = client, session

  def _post(self, path: str, **body):
    return _value(self._client.post(f"/session/{self._session}/{path}", json=body))

  def open(self, path) -> None:
    self._post("url", url=path.as_uri())

  def run(self, script: str, *args):
    """The value that a function body returns; a promise is waited for."""
    return self._post("execute/sync", script=script, args=list(args))

  def keys(self, text: str) -> None:
    """Key presses at whatever has the focus."""
    actions = [{"type": kind, "value": c} for c in text for kind in ("keyDown", "keyUp")]
    self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

  def devtools(self, command: str, **parameters):
    return self._post("goog/cdp/execute", cmd=command, params=parameters)

  def size(self, width: int, height: int, phone: bool = False) -> None:
    self.devtools(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=phone,
    )

  def dark(self, on: bool = True) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
    self.devtools("Emulation.setEmulatedMedia", features=[scheme])

  def log(self) -> list[str]:
    """What the console has said since the last call, from warnings on."""
    found = self._post("se/log", type="browser")
    return [entry["message"] for entry in found if entry["level"] in ("WARNING", "SEVERE")]

  def screenshot(self) -> bytes:
    found = self._client.get(f"/session/{self._session}/screenshot")
    return base64.b64decode(_value(found))


@contextlib.contextmanager
def started():
  """A Browser that runs; skips where there is none."""
  browser, driver = needed()
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  process = subprocess.Popen(
    [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
      _wait(client, process)
      flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
      options = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": browser, "args": flags},
        "goog:loggingPrefs": {"browser": "ALL"},
      }
      body = {"capabilities": {"alwaysMatch": options}}
      session = _value(client.post("/session", json=body))["sessionId"]
      try:
        yield Browser(client, session)
      finally:
        client.delete(f"/session/{session}")
  finally:
    process.terminate()
    process.wait(20)


def _wait(client: httpx.Client, process: subprocess.Popen) -> None:
  limit = time.monotonic() + 60
  while time.monotonic() < limit:
    with contextlib.suppress(httpx.HTTPError):
      if _value(client.get("/status"))["ready"]:
        return
    assert process.poll() is None, "chromedriver did not start"
    time.sleep(0.1)
  raise AssertionError("chromedriver is not ready after 60 s")


def _value(response: httpx.Response):
  value = response.json()["value"]
  assert response.status_code == 200, value
  return value
