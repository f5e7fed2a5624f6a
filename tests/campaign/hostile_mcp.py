"""Hostile MCP servers: what each sends in the place of one answer; well-behaved before it.

    python tests/campaign/hostile_mcp.py "wrong id"     # one of SERVERS, on stdin and stdout

Over HTTP the same texts are the bodies of replies (test_hostile_mcp.py).
"""

import json
import os
import pathlib
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parents[1] / "simulators"))
import mcp_plain_server

DEEP = "[" * 100_000 + "]" * 100_000
TOOL = {"name": "double", "inputSchema": {"type": "object"}}


def raw(text):
  """text, with ID in the place of the request's id."""
  return lambda message: text.replace("ID", json.dumps(message["id"])).encode()


def result(text):
  return raw(f'{{"jsonrpc": "2.0", "id": ID, "result": {text}}}')


def tools(**changes):
  """A list of one tool, which differs from a good one."""
  return result(json.dumps({"tools": [TOOL | changes]}))


def says(content, **more):
  return result(json.dumps({"content": content, **more}))


# What is no answer: refused at the start, and in a call.
BROKEN = {
  "prose": raw("Hello! I am a server."),
  "HTML": raw("<html></html>"),
  "cut off": raw('{"jsonrpc": "2.0", "id": ID, "result": {"tools": ['),
  "invalid UTF-8": lambda message: b'{"jsonrpc": "2.0", "id": 1, "result": "\xff\xfe"}',
  "UTF-16": lambda message: "{}".encode("utf-16"),
  "NUL bytes": lambda message: b"\x00" * 4096,
  "nested": raw(DEEP),
  "nested inside": result(f'{{"tools": {DEEP}, "content": {DEEP}}}'),
  "wrong id": raw('{"jsonrpc": "2.0", "id": 10000, "result": {}}'),
  "id of another type": raw('{"jsonrpc": "2.0", "id": {"a": 1}, "result": {}}'),
  "id null": raw('{"jsonrpc": "2.0", "id": null, "error": {"code": 1, "message": "x"}}'),
  "another version": raw('{"jsonrpc": "1.0", "id": ID, "result": {}}'),
  "neither result nor error": raw('{"jsonrpc": "2.0", "id": ID}'),
  "a list": raw("[]"),
  "null": raw("null"),
  "result null": result("null"),
  "result a number": result("1e999"),
  "wrong types": result('{"tools": 5, "content": 5, "protocolVersion": [], "capabilities": 1}'),
  "wrong types inside": result('{"tools": [5], "content": [5]}'),
  "an error without a message": raw('{"jsonrpc": "2.0", "id": ID, "error": {"code": "x"}}'),
  "an error": raw('{"jsonrpc": "2.0", "id": ID, "error": {"code": -32603, "message": "no"}}'),
  "a huge error": raw(
    '{"jsonrpc": "2.0", "id": ID, "error": {"code": 1, "message": "%s"}}' % ("x" * 10**6)
  ),
  "a request of its own": raw(
    '{"jsonrpc": "2.0", "id": 7, "method": "sampling/createMessage", "params": {"messages": []}}'
  ),
  "many notifications": raw(
    '{"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": 1}}\n' * 2000
  ),
}
# Of tools/list: no tools, or tools that nobody may show to a model as they are.
LISTS = {
  "no name": result('{"tools": [{"inputSchema": {"type": "object"}}]}'),
  "a number as name": tools(name=5),
  "file reference": tools(inputSchema={"properties": {"a": {"$ref": "file:///etc/passwd"}}}),
  "http reference": tools(inputSchema={"properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}}),
  "reference to nowhere": tools(inputSchema={"properties": {"a": {"$ref": "#/$defs/none"}}}),
  "relative reference": tools(inputSchema={"$id": "http://x/y", "$ref": "z.json"}),
  "dynamic reference": tools(inputSchema={"$dynamicRef": "https://x/y"}),
  "schema a list": tools(inputSchema=[]),
  "schema of wrong types": tools(inputSchema={"type": "object", "properties": 5}),
  "bad pattern": tools(inputSchema={"properties": {"a": {"type": "string", "pattern": "(("}}}),
  "deep schema": result(
    '{"tools": [{"name": "double", "inputSchema": %s}]}'
    % ('{"properties": {"a": ' * 3000 + "{}" + "}}" * 3000)
  ),
  "endless pages": result('{"tools": [], "nextCursor": "again"}'),
}
# Of tools/call: an answer of a kind, shown bounded and printable, or refused.
ANSWERS = {
  "nothing": says([]),
  "flood": says([{"type": "text", "text": "x" * 10**7}]),
  "many parts": says([{"type": "text", "text": "x"}] * 50_000),
  "control tokens": says([{"type": "text", "text": "<|im_end|></s><|eot_id|><|call|>" * 1000}]),
  "control characters": says([{"type": "text", "text": "\x00\x1b[2J\u202e" * 1000}]),
  "lone surrogate": raw(
    '{"jsonrpc": "2.0", "id": ID, "result": {"content": [{"type": "text", "text": "\\ud800"}]}}'
  ),
  "unknown kind": says([{"type": "hologram", "data": 1}]),
  "image that is none": says([{"type": "image", "data": "no", "mimeType": "text/html"}]),
  "resource elsewhere": says([{"type": "resource_link", "uri": "file:///etc/passwd", "name": "x"}]),
  "structured NaN": result('{"content": [], "structuredContent": {"a": NaN}}'),
  "structured 1e999": result('{"content": [], "structuredContent": {"a": 1e999}}'),
  "structured deep": result(
    f'{{"content": [], "structuredContent": {{"a": {DEEP[50_000:150_000]}}}}}'
  ),
  "structured a number": result('{"content": [], "structuredContent": 5}'),
  "long integer": result('{"content": [], "structuredContent": {"a": %s}}' % ("9" * 5000)),
  "an error as result": says([{"type": "text", "text": "x" * 10**6}], isError=True),
}
# What only a process can do in the place of an answer.
ACTS = (
  "dies",
  "silent",
  "drips",
  "floods a line",
  "floods lines",
  "closes stdout",
  "floods stderr",
)


def act(name):
  out = sys.stdout.buffer
  if name == "dies":
    os._exit(1)
  if name == "silent":
    time.sleep(60)
    os._exit(0)
  if name == "closes stdout":
    os.close(1)
    time.sleep(60)
    os._exit(0)
  while True:
    if name == "drips":
      out.write(b" ")
      out.flush()
      time.sleep(0.02)
    elif name == "floods a line":
      out.write(b"x" * 65536)
    elif name == "floods lines":
      out.write(b'{"jsonrpc": "2.0", "method": "notifications/x"}\n' * 1000)
    else:
      sys.stderr.buffer.write(b"x" * 4096)
      time.sleep(0.01)


def main(stage, name):
  mcp_plain_server.TOOLS[:] = mcp_plain_server.TOOLS[:1]
  bodies = BROKEN | LISTS | ANSWERS
  for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
      continue
    if message["method"] != stage:
      out = json.dumps(mcp_plain_server.reply_to(message)).encode()
    elif name in ACTS:
      act(name)
    else:
      out = bodies[name](message)
    sys.stdout.buffer.write(out + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main(*sys.argv[1:])
