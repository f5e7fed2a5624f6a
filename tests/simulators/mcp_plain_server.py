"""A bare MCP server of an older protocol version, without the package: quick to start, and able
to misbehave. On stdin and stdout as a program; `HttpServer` speaks streamable HTTP.
"""

import contextlib
import http.server
import itertools
import json
import os
import socket
import sys
import threading
import time

EMPTY = {"type": "object"}
TOOLS = [
  # Every page has one tool, so that a client must follow the cursor.
  {"name": "double", "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
  {"name": "environment", "inputSchema": EMPTY},
  {"name": "picture", "inputSchema": EMPTY},
  {"name": "refuse", "inputSchema": EMPTY},
  {"name": "break", "inputSchema": EMPTY},
  {"name": "hang", "inputSchema": EMPTY},
  {"name": "die", "inputSchema": EMPTY},
  {"name": "count", "inputSchema": EMPTY},
]
counts = itertools.count(1)  # the state


class Fault(Exception):
  def __init__(self, code, message):
    self.error = {"code": code, "message": message}


def answer(method, params):
  if method == "initialize":
    return {
      "protocolVersion": "2025-03-26",
      "capabilities": {"tools": {}},
      "serverInfo": {"name": "plain", "version": "1"},
    }
  if method == "tools/list":
    page = int(params.get("cursor") or 0)
    more = {"nextCursor": str(page + 1)} if page + 1 < len(TOOLS) else {}
    return {"tools": [TOOLS[page]], **more}
  if method != "tools/call":
    raise Fault(-32601, "Method not found")
  name, arguments = params["name"], params.get("arguments") or {}
  if name == "double":
    return {"content": [{"type": "text", "text": str(2 * arguments["a"])}]}
  if name == "environment":
    found = {"pid": os.getpid(), "given": os.environ.get("STEPTOOL_TEST")}
    return {"content": [{"type": "text", "text": json.dumps(found)}]}
  if name == "picture":
    text = {"type": "text", "text": "a map"}
    return {"content": [text, {"type": "image", "data": "AAAA", "mimeType": "image/png"}]}
  if name == "refuse":
    raise Fault(-32602, "a must be even")
  if name == "break":
    raise Fault(-32603, "out of order")
  if name == "count":
    return {"content": [{"type": "text", "text": str(next(counts))}]}
  if name == "hang":
    time.sleep(60)
  os._exit(1)


def reply_to(message):
  reply = {"jsonrpc": "2.0", "id": message["id"]}
  try:
    return {**reply, "result": answer(message["method"], message.get("params") or {})}
  except Fault as fault:
    return {**reply, "error": fault.error}


class HttpServer:
  """elsewhere: a port of a server of bytes, which answers calls from now on; 0 = none."""

  def __init__(self):
    self.elsewhere = 0
    owner = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if owner.elsewhere and message["method"] == "tools/call":
          with socket.create_connection(("127.0.0.1", owner.elsewhere)) as other:
            other.sendall(b"x")
            while piece := other.recv(4096):
              self.wfile.write(piece)
        asked = "id" in message
        body = json.dumps(reply_to(message)).encode() if asked else b""
        self.send_response(200 if asked else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def do_GET(self):
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

      do_DELETE = do_GET

      def log_message(self, *_):
        pass

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.http.server_address[1]}/mcp"
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.http.shutdown()
    self.http.server_close()


def note_start(path):
  """Keeps a tally of starts in a file; its text "no more" forbids them."""
  with open(path, "a+") as file:
    file.seek(0)
    if file.read() == "no more":
      sys.exit(1)
    file.write("x")


def main():
  lock = threading.Lock()
  if "STEPTOOL_STARTS" in os.environ:
    note_start(os.environ["STEPTOOL_STARTS"])

  def handle(message):
    line = json.dumps(reply_to(message))
    with lock, contextlib.suppress(BrokenPipeError):
      print(line, flush=True)

  for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
      threading.Thread(target=handle, args=(message,), daemon=True).start()


if __name__ == "__main__":
  main()
