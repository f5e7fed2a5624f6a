"""Stored trajectories for tests: a tokenizer trained on their texts, and runs over them."""

import csv
import json

import numpy as np
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from steptool_jax.types import Finish, Status, Step, Trajectory

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(out, texts, vocab_size=700):
  """A ChatML tokenizer directory, byte-level BPE."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
  )
  bpe.train_from_iterator(texts, trainer)
  out.mkdir(parents=True)
  bpe.save(str(out / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return out


def write_rows(path, rows):
  """Official step-grained rows as their file."""
  with path.open("w", newline="") as file:
    writer = csv.writer(file, delimiter="\t")
    writer.writerow(["prompt", "response", "reward"])
    for row in rows:
      writer.writerow([repr(list(x)) for x in (row.prompts, row.responses, row.rewards)])
  return path


def make(tokenizer_folder, compiled, tokens, **changes):
  """A config that trains a random model of two layers offline; steps as sft__steps=0."""
  base = {
    "model__tokenizer": str(tokenizer_folder),
    "model__chat_format": "chatml_react",
    "model__architecture__vocab_size": 700,
    "rollout__max_tokens": tokens,
    "train__row_tokens": tokens,
    "train__minibatches": 1,
    "train__micro_rows": 2,
    "train__optimizer__learning_rate": 1e-2,
    "loss__entropy_coef": 0.0,
    "sft__steps": 0,
    "evaluation__tasks": 0,
    "data__format": "tsv",
    "data__passes": 2,
    "data__batch": 4,
    "compilation_cache": compiled,
  }
  return tiny.make(**(base | changes))


def recorded(environment, task, actions, chat_format, sample):
  """What a policy that takes these actions leaves behind, in the tokens of the chat format."""
  session, steps = environment.open(task, sample), []
  for action in actions:
    ids = chat_format.render_action(action)
    zeros = np.zeros(len(ids), np.float32)
    if isinstance(action, Finish):
      solved = session.grade(action.answer)
      steps.append(Step(ids, zeros, action))
    else:
      observation = session.call(action)
      steps.append(Step(ids, zeros, action, observation, chat_format.observation(observation.text)))
  session.close()
  prompt = chat_format.prompt(None, task.tools, task.query)
  return Trajectory(task.id, sample, prompt, tuple(steps), Status.ANSWERED, solved)
