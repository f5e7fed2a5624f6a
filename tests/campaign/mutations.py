"""Damage to valid files, by seed: cut, flipped, other types, huge numbers, nesting, NaN, twins."""

import json
import random

DEEP = "[" * 150 + "]" * 150
ENDLESS = "[" * 100_000
# What takes the place of a value, as JSON text: the spellings matter.
VALUES = (
  *("null", "true", "false", "-1", "0", "1.5", "1000000000", "1e999", "-1e999", "1e308", "NaN"),
  *("Infinity", "9" * 30, "9" * 5000, '""', '"x"', '"\\ud800"', '"\\u0000"', "[]", "{}", "[null]"),
  *('{"a": 1}', '{"a": 1, "a": 2}', DEEP, ENDLESS, '["x", 1, null]', "-2147483649", '"../x"'),
)
_HOLE = "@hole@"


def damage_json(text: str, rng: random.Random) -> str:
  """One value replaced, doubled or taken away, or one key twice, or the bytes' kinds of damage."""
  kind = rng.choice(("replace", "replace", "replace", "remove", "double", "twin", "bytes"))
  document = json.loads(text)
  places = list(_places(document))
  if kind == "bytes" or not places:
    return damage_text(text, rng)
  holder, key = rng.choice(places)
  if kind == "remove":
    del holder[key]
  elif kind == "double" and isinstance(holder, list):
    holder.insert(key, holder[key])
  elif kind == "twin" and isinstance(holder, dict):
    holder[_HOLE] = holder[key]
    return json.dumps(document).replace(json.dumps(_HOLE), json.dumps(key))
  else:
    holder[key] = _HOLE
    return json.dumps(document).replace(json.dumps(_HOLE), rng.choice(VALUES), 1)
  return json.dumps(document)


def _places(value):
  """(container, key) of every value inside, without the many entries of a long list."""
  if isinstance(value, dict):
    items = list(value.items())
  else:
    items = list(enumerate(value[:20])) if isinstance(value, list) else []
  for key, entry in items[:60]:
    yield value, key
    yield from _places(entry)


def damage_text(text: str, rng: random.Random) -> str:
  return damage_bytes(text.encode(), rng).decode("utf-8", "surrogateescape")


def damage_lines(text: str, rng: random.Random) -> str:
  """Damage to one line of JSON lines, or a line twice."""
  lines = text.splitlines()
  number = rng.randrange(len(lines))
  if rng.random() < 0.15:
    lines.insert(number, lines[number])
  else:
    lines[number] = damage_json(lines[number], rng)
  return "\n".join(lines) + "\n"


def damage_bytes(data: bytes, rng: random.Random, first: int = 600) -> bytes:
  """Flips, cuts and foreign bytes, mostly where a file says what it holds."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    if not data:
      break
    place = rng.randrange(min(len(data), first) if rng.random() < 0.8 else len(data))
    kind = rng.randrange(4)
    if kind == 0:
      data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
      data[place : place + 8] = (2 ** rng.choice((31, 40, 60, 63))).to_bytes(8, "little")
    elif kind == 2:
      del data[place:]
    else:
      data[place:place] = rng.choice((b"\xff\xfe", b"\x00", b'"', b"}", b"\xc3\x28", b"1e999"))
  return bytes(data)
