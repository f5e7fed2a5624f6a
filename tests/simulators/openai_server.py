"""A loopback OpenAI-compatible server that misbehaves on demand."""

import contextlib
import http.server
import json
import threading
import time


def completion(text="", arguments=None, name="evaluate_process_reward", tokens=(100, 20)):
  """A chat completion; `arguments` (a value, or raw text) makes it a function call."""
  message = {"role": "assistant", "content": text}
  if arguments is not None:
    raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": raw}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
  usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
  return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


class Server:
  """`behaviour(request body, number of the request) -> what`, where `what` is a completion,
  (status, headers, body text), "hang" or "close". Keeps all bodies, and the peak of concurrency.
  """

  def __init__(self, behaviour, delay_s=0.0):
    self.bodies, self.headers, self.peak = [], [], 0
    self._inside, self._lock, self._stop = 0, threading.Lock(), threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with outer._lock:
          number = len(outer.bodies)
          outer.bodies.append(body)
          outer.headers.append((self.path, dict(self.headers)))
          outer._inside += 1
          outer.peak = max(outer.peak, outer._inside)
        try:
          time.sleep(delay_s)
          self.answer(behaviour(body, number))
        finally:
          with outer._lock:
            outer._inside -= 1

      def answer(self, what):
        if what == "hang":
          outer._stop.wait(20)
        if what in ("hang", "close"):
          self.close_connection = True
          return
        status, headers, text = what if isinstance(what, tuple) else (200, {}, json.dumps(what))
        data = text.encode()
        with contextlib.suppress(OSError):
          self.send_response(status)
          for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(data)

      def log_message(self, *_):
        pass

    class Listener(http.server.ThreadingHTTPServer):
      request_queue_size = 256
      daemon_threads = True

    self._server = Listener(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._server.shutdown()
    self._server.server_close()


def script(*answers):
  """The answers in order; the last one for good."""
  return lambda body, number: answers[min(number, len(answers) - 1)]
