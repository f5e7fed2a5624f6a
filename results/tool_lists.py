"""Prompt tokens by chat format, with tools as JSON schemas and as signatures.

    python results/tool_lists.py --model=SmolLM2-135M-Instruct.Q4_1.gguf

Counted with the model's tokenizer, to which the control tokens of the other formats are added: so a
row differs from the next by its layout alone. Means over 50 held-out tasks, 6 tools each.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np

from steptool_jax.config import base_config
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.policy.formats import gguf
from steptool_jax.run.parts import build
from steptool_jax.validation import validate

TASKS, TOOLS = 50, 6
FORMATS = {
  "chatml_react": (),
  "llama31": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  "hermes": ("<tool_call>", "</tool_call>"),
  "toolllama": (),
  "gemma_react": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}


def tokenizer(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """The model's tokenizer with every format's control tokens."""
  if source.suffix == ".gguf":
    gguf.gguf_tokenizer(source, out)
    source = out
  document = json.loads((source / "tokenizer.json").read_text())
  size = 1 + max(document["model"]["vocab"].values())
  for name in sorted({name for names in FORMATS.values() for name in names}):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": size, "content": name, "special": True, **flags})
    size += 1
  out.mkdir(exist_ok=True)
  (out / "tokenizer.json").write_text(json.dumps(document))
  config = json.loads((source / "tokenizer_config.json").read_text())
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return out


def main() -> None:
  arguments = argparse.ArgumentParser(description=__doc__)
  arguments.add_argument("--model", type=pathlib.Path, required=True)
  source = arguments.parse_args().model
  print("| environment | chat format | JSON schemas | signatures |\n|---|---|---|---|")
  with tempfile.TemporaryDirectory() as folder:
    codec = Codec.load(tokenizer(source, pathlib.Path(folder) / "tokenizer"))
    for name in ("nested_api", "data_pipeline"):
      config = base_config()
      config.environment.name, config.environment.tools_per_task = name, TOOLS
      tasks = build.build_environment(validate(config)).tasks("heldout")[:TASKS]
      for chat_format in FORMATS:
        cells = []
        for tool_list in ("json", "signature"):
          made = get_format(chat_format, codec, tool_list)
          counts = [len(made.prompt(None, task.tools, task.query)) for task in tasks]
          cells.append(f"{np.mean(counts):.0f}, at most {max(counts)}")
        print(f"| {name} | {chat_format} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
  main()
