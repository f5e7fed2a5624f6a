"""A loopback /virtual server that misbehaves by script, for tests of its clients."""

import contextlib
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"error": "", "response": "fine"}


class FaultServer:
  """Plays one fault a request, in order, the last one for ever.

  Faults: ("ok", body), ("status", code, headers, text), ("prose",), ("hang", seconds),
  ("drip", seconds between bytes), ("close",), ("reset",), ("flood", bytes), ("slow", seconds).
  """

  def __init__(self, *faults):
    self.faults = faults or (("ok", GOOD),)
    self.requests, self.times, self.sent_bytes = [], [], 0
    self.in_flight = self.most_in_flight = 0
    self.lock, self.stop = threading.Lock(), threading.Event()
    owner = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"
      disable_nagle_algorithm = True

      def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        with owner.lock:
          fault = owner.faults[min(len(owner.requests), len(owner.faults) - 1)]
          owner.requests.append((json.loads(body), dict(self.headers)))
          owner.times.append(time.monotonic())
          owner.in_flight += 1
          owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        try:
          with contextlib.suppress(OSError):
            getattr(self, f"play_{fault[0]}")(*fault[1:])
        finally:
          with owner.lock:
            owner.in_flight -= 1

      def send(self, status, text, headers=()):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

      def play_ok(self, body):
        self.send(200, json.dumps(body))

      def play_slow(self, seconds):
        owner.stop.wait(seconds)
        self.send(200, json.dumps(GOOD))

      def play_status(self, status, headers=(), text="oops"):
        self.send(status, text, headers)

      def play_prose(self):
        self.send(200, "Here is the answer you asked for: it is sunny.")

      def play_hang(self, seconds):
        owner.stop.wait(seconds)
        self.close_connection = True

      def play_drip(self, seconds):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
          if owner.stop.wait(seconds):
            break
          self.wfile.write(b" ")

      def play_close(self):
        self.close_connection = True

      def play_reset(self):
        linger = struct.pack("ii", 1, 0)  # close with RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

      def play_flood(self, size):
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        piece = b'"' + b"x" * 65535
        while owner.sent_bytes < size:
          self.wfile.write(piece)
          owner.sent_bytes += len(piece)

      def log_message(self, *_):
        pass

    class Http(ThreadingHTTPServer):
      daemon_threads = True
      block_on_close = False
      request_queue_size = 256

      def handle_error(self, *_):
        pass

    self.http = Http(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.http.server_address[1]}/virtual"
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.stop.set()
    self.http.shutdown()
    self.http.server_close()
