"""Text <-> token ids, for pieces of a conversation.

Three promises that a plain tokenizer call does not give:
- a special-token string inside text (a tool's result, a query) stays plain text: control ids come
  from `Control` pieces only;
- encoding is free of position: no prefix space is added and none is stripped, so
  decode(encode(text)) == text for byte-complete tokenizers, also in the middle of a conversation;
- nothing is added: BOS and EOS are pieces like any other.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from steptool_jax.files import read_json

_SPACE = "\u2581"
_HTML = re.compile(
  r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|sub|sup|code|[abipsu])>"
)
_SOURCES = ("tokenizer.model", "vocab.json", "spiece.model", "tokenizer.tiktoken")


@dataclasses.dataclass(frozen=True)
class Control:
  """A special token by name, e.g. Control("<|im_end|>"); never made from untrusted text."""

  name: str


Piece = str | Control


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """A tokenizer directory, opened with `Codec.load`.

  controls: name -> id of every added token, special or not, but for what is text (_is_text).
  prefix_space: the directory's own tokenizer puts a space in front of a text (Llama-2).
  """

  directory: pathlib.Path
  controls: Mapping[str, int]
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  chat_template: str | None
  prefix_space: bool
  vocab_size: int  # number of ids with a token; a model's embedding may be larger
  _names: Mapping[int, str] = dataclasses.field(repr=False)  # controls, by id
  _plain: tokenizers.Tokenizer = dataclasses.field(repr=False)
  _full: tokenizers.Tokenizer = dataclasses.field(repr=False)
  _bytes: Mapping[str, int] | None = dataclasses.field(repr=False)  # of a byte-level vocabulary

  @classmethod
  def load(cls, directory: str | pathlib.Path) -> "Codec":
    """Opens a Hugging Face tokenizer directory; no network, no remote code.

    Raises FileNotFoundError for a missing directory or one without tokenizer files, ValueError for
    a broken file.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
      raise FileNotFoundError(
        f"no tokenizer directory {directory}: give a local Hugging Face directory (download it "
        "first, e.g. `hf download <model> --local-dir <dir>`)"
      )
    document = _tokenizer_document(directory)
    paths = (directory / "special_tokens_map.json", directory / "tokenizer_config.json")
    special, config = (read_json(path) if path.is_file() else {} for path in paths)
    try:
      return cls._made(directory, document, {**special, **config})
    except (
      *(KeyError, TypeError, AttributeError, StopIteration, RecursionError, OverflowError),
      UnicodeEncodeError,
    ) as error:
      raise ValueError(
        f"{directory}: tokenizer.json or {paths[1].name} holds something of another type "
        f"({type(error).__name__}: {error}): fetch them again"
      ) from error

  @classmethod
  def _made(
    cls, directory: pathlib.Path, document: dict[str, Any], config: dict[str, Any]
  ) -> "Codec":
    added = document.get("added_tokens") or ()
    blank = [t for t in added if _is_text(t["content"], t.get("special", False))]
    controls = {t["content"]: int(t["id"]) for t in added if t not in blank}
    # Old Llama directories list added tokens in their config only.
    for key, token in (config.get("added_tokens_decoder") or {}).items():
      special = isinstance(token, str) or token.get("special", False)
      if not _is_text(_content(token), special):
        controls.setdefault(_content(token), int(key))

    decoders = _flatten(document.get("decoder"))
    prefix_space = _adds_prefix_space(document)
    neutral = _without_prefix_space({**document, "post_processor": None})
    neutral.update(truncation=None, padding=None)
    try:
      full = tokenizers.Tokenizer.from_str(json.dumps(neutral))
      plain = tokenizers.Tokenizer.from_str(json.dumps({**neutral, "added_tokens": blank}))
    except Exception as error:  # the library raises bare Exception
      raise ValueError(
        f"{directory / 'tokenizer.json'} is not a readable tokenizer ({error}): fetch it again"
      ) from error

    def id_of(role: str) -> int | None:
      token = config.get(role)
      if token is None:
        return None
      name = _content(token)
      found = controls.get(name, full.token_to_id(name))
      if found is not None:
        controls.setdefault(name, found)
      return found

    bos_id, eos_id, pad_id = (id_of(f"{role}_token") for role in ("bos", "eos", "pad"))
    return cls(
      directory=directory,
      bos_id=bos_id,
      eos_id=eos_id,
      pad_id=pad_id,
      controls=controls,
      _names={i: name for name, i in controls.items()},
      chat_template=_chat_template(directory, config),
      prefix_space=prefix_space,
      vocab_size=max([full.get_vocab_size(with_added_tokens=True) - 1, *controls.values()]) + 1,
      _plain=plain,
      _full=full,
      _bytes=_byte_letters() if any(p["type"] == "ByteLevel" for p in decoders) else None,
    )

  def within(self, rows: int) -> "Codec":
    """Without the added tokens that a model of so many rows does not have: Gemma 3's text models
    have none for images, which their tokenizer names. vocab_size stays where others are beyond."""
    if self.vocab_size <= rows:
      return self
    ordinary = max(self._full.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    controls = {name: i for name, i in self.controls.items() if i < rows}
    size = max([ordinary - 1, *controls.values()]) + 1
    return dataclasses.replace(self, controls=controls, vocab_size=size)

  def encode(self, text: str) -> list[int]:
    """Ids of `text` as plain text. A lone surrogate becomes "?"; control ids never come out."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    ids = self._plain.encode(text, add_special_tokens=False).ids
    forbidden = self._names
    if not any(i in forbidden for i in ids):
      return ids
    # A vocabulary that holds a special token as an ordinary piece, or an unknown token: spell it.
    spelled: list[int] = []
    for i in ids:
      if i not in forbidden:
        spelled.append(i)
        continue
      for character in forbidden[i]:
        one = self._plain.encode(character, add_special_tokens=False).ids
        spelled.extend(j for j in one if j not in forbidden)
    return spelled

  def join(self, pieces: Sequence[Piece]) -> np.ndarray:
    """int32[N] of pieces: neighbouring texts are encoded as one, controls give their ids."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
      if isinstance(piece, str):
        text += piece
        continue
      if text:
        ids.extend(self.encode(text))
        text = ""
      ids.append(self.token_id(piece.name))
    if text:
      ids.extend(self.encode(text))
    return np.asarray(ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; special tokens appear as their names, ids without a token are dropped."""
    return self._full.decode([int(i) for i in ids], skip_special_tokens=False)

  def token_bytes(self, token: int) -> bytes:
    """What a token adds to a text: bytes, since it may be a part of a character."""
    piece = self._full.id_to_token(token)
    if piece is None or token in self._names:
      return self.decode([token]).encode()
    if self._bytes is not None and all(c in self._bytes for c in piece):
      return bytes(self._bytes[c] for c in piece)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
      return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode() if self._bytes is None else piece.encode()

  def token_id(self, name: str) -> int:
    """Id of a special token; ValueError that names it when the tokenizer has none."""
    if name not in self.controls:
      raise ValueError(
        f"the tokenizer in {self.directory} has no special token {name!r}: choose a chat format "
        f"that fits this model (it has {sorted(self.controls)[:12]})"
      )
    return self.controls[name]

  def digest(self) -> str:
    """Of all tokens with their ids: the same for tokenizers whose ids mean the same."""
    tokens = sorted(self._full.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps([tokens, sorted(self.controls.items())]).encode()).hexdigest()

  def has(self, name: str) -> bool:
    return name in self.controls

  def control_name(self, token: int) -> str | None:
    """The special token's name, "<unused id N>" for an id without a token, None for plain text."""
    if not 0 <= token < self.vocab_size:
      return f"<unused id {token}>"
    return self._names.get(token)


def _tokenizer_document(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / "tokenizer.json"
  if path.is_file():
    document = read_json(path)
    if "model" not in document:
      raise ValueError(f"{path} has no 'model' entry: it is not a tokenizer.json; fetch it again")
    return document
  if not any((directory / name).is_file() for name in _SOURCES):
    raise FileNotFoundError(
      f"{directory} holds no tokenizer.json and no {' / '.join(_SOURCES)}: copy the model's "
      "tokenizer files there"
    )
  import transformers  # slow to import, and needed for old directories only

  try:
    converted = transformers.AutoTokenizer.from_pretrained(
      str(directory), use_fast=True, local_files_only=True
    )
    return json.loads(converted.backend_tokenizer.to_str())
  except Exception as error:
    raise ValueError(
      f"the tokenizer in {directory} could not be converted ({error}): save it once as "
      "tokenizer.json (`pip install sentencepiece protobuf` for SentencePiece models)"
    ) from error


def _is_text(name: str, special: bool) -> bool:
  """An added token that is ordinary text all the same: Gemma has runs of white space, which its
  Hugging Face directory spells with ▁, and tags of HTML."""
  blank = not name.replace(_SPACE, "").strip()
  return not special and (blank or _HTML.fullmatch(name) is not None)


def _content(token: str | Mapping[str, Any]) -> str:
  return token if isinstance(token, str) else token["content"]


def _chat_template(directory: pathlib.Path, config: Mapping[str, Any]) -> str | None:
  for name in ("additional_chat_templates/tool_use.jinja", "chat_template.jinja"):
    path = directory / name
    if path.is_file():
      return path.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # several named templates
    named = {entry["name"]: entry["template"] for entry in template}
    return named.get("tool_use", named.get("default"))
  return template


def _byte_letters() -> dict[str, int]:
  """Letter -> byte, as byte-level vocabularies write bytes (GPT-2): printable ones are themselves,
  the others follow from U+0100 on."""
  themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in themselves]
  pairs = [*zip(themselves, themselves, strict=True)]
  return {chr(c): b for c, b in [*pairs, *((0x100 + k, b) for k, b in enumerate(others))]}


def _flatten(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
  """A normalizer, pre-tokenizer or decoder as a flat list."""
  if component is None:
    return []
  if component["type"] != "Sequence":
    return [component]
  inner = next(v for k, v in component.items() if k in ("normalizers", "pretokenizers", "decoders"))
  return [part for child in inner for part in _flatten(child)]


def _adds_prefix_space(document: Mapping[str, Any]) -> bool:
  parts = _flatten(document.get("normalizer")) + _flatten(document.get("pre_tokenizer"))
  return any(
    p["type"] == "Prepend"
    or (p["type"] == "Metaspace" and p.get("prepend_scheme", "always") != "never")
    or (p["type"] == "ByteLevel" and p.get("add_prefix_space", False))
    for p in parts
  )


def _without_prefix_space(document: Mapping[str, Any]) -> dict[str, Any]:
  """The same tokenizer, neither adding nor stripping a space at a text's start."""
  out = dict(document)
  inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
  strips = _adds_prefix_space(document)
  for field, key in inner.items():
    parts = []
    for part in _flatten(document.get(field)):
      if part["type"] == "Prepend" or (strips and field == "decoder" and part["type"] == "Strip"):
        continue
      part = dict(part)
      if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
      elif part["type"] == "ByteLevel" and field == "pre_tokenizer":
        part["add_prefix_space"] = False
      parts.append(part)
    if len(parts) <= 1:
      out[field] = parts[0] if parts else None
    else:
      out[field] = {"type": "Sequence", key: parts}
  return out
