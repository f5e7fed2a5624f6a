"""What both clients of servers share: limits of time, and texts that show no key."""

import time

import pytest
from raw_server import DRIPS, RawServer

from steptool_jax.simulators import posting
from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.http import HttpSimulator
from steptool_jax.toolbench.simulators.virtual import VirtualRequest

MESSAGES = [{"role": "user", "content": "hi"}]
REQUEST = VirtualRequest("Data", "tool", "api", {}, toolbench_key="secret-of-toolbench")


@pytest.mark.parametrize("drip", DRIPS)
def test_no_drip_of_bytes_outlives_the_time_limit_of_a_call(drip):
  """A limit for each piece of a reply was none for all of them: head, chunks, 100 Continue."""
  with RawServer(DRIPS[drip]) as server:
    for call in (
      lambda: Endpoint(server.url, "m", timeout_s=0.3, retries=0).chat(MESSAGES),
      lambda: HttpSimulator(server.url, timeout_s=0.3, retries=0).answer(REQUEST),
    ):
      started = time.monotonic()
      with pytest.raises(InfrastructureError, match=r"no complete reply after 0.3 s"):
        call()
      assert 0.25 < time.monotonic() - started < 3


def test_a_key_with_the_line_end_of_a_mounted_secret_is_sent_without_it():
  """It was an illegal header, whose error text showed the key to the clients of --mode=serve."""
  assert posting.clean_key("sk-1\r\n", "x") == "sk-1"
  for bad in ("sk 1", "sk-1\nHost: x", "sk-ü", "sk\0"):
    with pytest.raises(ValueError, match="JUDGE_KEY holds a blank") as caught:
      posting.clean_key(bad, "JUDGE_KEY")
    assert bad not in str(caught.value)
    with pytest.raises(ValueError, match="the key holds a blank"):
      Endpoint("http://x", "m", api_key=bad)


def test_no_error_text_shows_a_key_that_the_server_repeats():
  key = "sk-0123456789"

  def play(send, stop):
    body = f"wrong key {key} or secret-of-toolbench or " + "x" * 140 + key
    send(f"HTTP/1.1 401 No\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

  with RawServer(play) as server:
    model = Endpoint(f"{server.url}?k={key}", "m", api_key=key + "\n")
    simulator = HttpSimulator(server.url)
    for call, hidden in (
      (lambda: model.chat(MESSAGES), "sk-0"),
      (lambda: simulator.answer(REQUEST), "secret-of"),
    ):
      with pytest.raises(InfrastructureError, match=r"status 401.*\[key\]") as caught:
        call()
      assert hidden not in str(caught.value)


@pytest.mark.parametrize(
  "url", ["http://me:hidden@host/v1", "me:hidden@host", "https://hidden@host:1", "//hidden@host"]
)
def test_an_address_with_a_password_is_refused_and_not_shown(url):
  for make in (lambda: Endpoint(url, "m"), lambda: HttpSimulator(url)):
    with pytest.raises(ValueError, match="user name or a password") as caught:
      make()
    assert "hidden" not in str(caught.value)


def test_other_bad_addresses_are_named():
  for url in ("localhost:1", "http://host:port/v1", "ftp://x"):
    with pytest.raises(ValueError, match="base_url is"):
      Endpoint(url, "m")
  posting.check_address("https://host/v1/@x?y=a@b", "url", "…")
