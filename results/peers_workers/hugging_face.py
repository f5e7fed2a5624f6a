"""TRL's two trainers (0.10.1: PPO; the newest: GRPO), and generation with transformers."""

import pathlib
from typing import Any

from common import (
  CLIP,
  GAMMA,
  KL,
  LAM,
  RATE,
  VALUE_COEF,
  Clock,
  advantages,
  commands,
  reply,
  responses,
  serve,
  versions,
)

MICRO = 2  # of PPO: the release's
GROUP = 8  # of GRPO: TRL's default, and a task's samples


def _tokenizer() -> Any:
  """One that knows padding and an end that never comes: all texts are given as ids."""
  import tokenizers
  import transformers

  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<end>": 1}, "<end>"))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
  )


def _mean_logprob(logits_of: Any, trajectories: list[dict]) -> float:
  """Of the sampled tokens, one trajectory at a time."""
  import torch

  total = count = 0.0
  for t in trajectories:
    answer, mask = map(torch.from_numpy, responses(t))
    with torch.no_grad():
      ids = torch.cat([torch.tensor(t["prompt"]), answer])[None]
      logprobs = logits_of(ids).log_softmax(-1)[0, len(t["prompt"]) - 1 : -1]
    total += float((logprobs.gather(1, answer[:, None])[:, 0] * mask).sum())
    count += float(mask.sum())
  return total / count


def ppo(work: dict, folder: pathlib.Path) -> None:
  """PPOTrainer.step of TRL 0.10.1."""
  import torch
  import trl

  given = work["trajectories"]
  config = trl.PPOConfig(
    batch_size=len(given),
    mini_batch_size=MICRO,
    gradient_accumulation_steps=len(given) // MICRO,
    ppo_epochs=work["epochs"],
    learning_rate=RATE,
    init_kl_coef=KL,
    gamma=GAMMA,
    lam=LAM,
    cliprange=CLIP,
    vf_coef=VALUE_COEF,
  )
  model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "model"))
  trainer = trl.PPOTrainer(config, model, tokenizer=_tokenizer())
  parts = [responses(t) for t in given]
  queries = [torch.tensor(t["prompt"]) for t in given]
  scores = [torch.tensor(t["steps"][-1]["reward"]) for t in given]
  answers, masks = ([torch.from_numpy(p[k]) for p in parts] for k in range(2))

  def action(repetition: int) -> dict[str, Any]:
    trainer.step(queries, answers, scores, masks)
    return {}

  fixed = {
    "logprob": _mean_logprob(lambda ids: model(ids)[0], given),
    "versions": versions("trl", "transformers", "torch"),
  }
  serve(action, lambda: fixed)


def grpo(work: dict, folder: pathlib.Path) -> None:
  """GRPOTrainer.train on a data set of the tasks' numbers. A rollout function (TRL's way to bring
  one's own) waits for our commands and hands out the given ids, their mask and their advantages.
  The clock runs from there to the next time that it is called.
  """
  import datasets
  import transformers
  import trl

  given, epochs = work["trajectories"], work["epochs"]
  parts, samples = [responses(t) for t in given], len(given) // len({t["task"] for t in given})
  tasks = len(given) // samples
  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "model"))
  asked, clock, repetition, logprob = commands(), None, -1, []

  def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
    nonlocal clock, repetition
    if clock:
      times = clock.read()
      logs = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
      more = {"versions": versions("trl", "transformers", "torch"), "logprob": logprob[-1]}
      reply(**times, grad_norm=logs[-epochs:], steps=trainer.state.global_step, **more)
    if next(asked, None) is None:
      raise SystemExit
    repetition += 1
    if repetition < 2:  # before the first update and after it, beside the clock
      logprob.append(_mean_logprob(lambda ids: trainer.model(ids).logits, given))
    clock = Clock()
    assert [int(p) for p in prompts] == [t["task"] for t in given]
    ids = [p[0].tolist() for p in parts]
    return {
      "prompt_ids": [t["prompt"] for t in given],
      "completion_ids": ids,
      "logprobs": [[0.0] * len(row) for row in ids],  # of the sampler: nothing reads them
      "env_mask": [p[1].tolist() for p in parts],
      "score": advantages(given),
    }

  trainer = trl.GRPOTrainer(
    model=model,
    processing_class=_tokenizer(),
    reward_funcs=lambda completions, score, **_: score,
    rollout_func=rollout,
    train_dataset=datasets.Dataset.from_dict({"prompt": [str(n) for n in range(tasks)] * 1000}),
    args=trl.GRPOConfig(
      output_dir=str(folder / "grpo"),
      per_device_train_batch_size=GROUP,
      gradient_accumulation_steps=len(given) // GROUP,
      num_generations=samples,
      num_iterations=epochs,
      shuffle_dataset=False,
      max_completion_length=max(len(p[0]) for p in parts),
      learning_rate=RATE,
      lr_scheduler_type="constant",
      epsilon=CLIP,
      loss_type="grpo",  # every trajectory weighs the same, as in ours
      scale_rewards="none",  # what is given are the advantages
      gradient_checkpointing=False,
      bf16=False,
      use_cpu=True,
      logging_steps=1,
      max_steps=10**6,
      save_strategy="no",
      report_to="none",
      disable_tqdm=True,
    ),
  )
  trainer.train()


def rollout(work: dict, folder: pathlib.Path) -> None:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "model")).eval()

  def action(repetition: int) -> dict[str, Any]:
    torch.manual_seed(repetition)
    history: list[list[int]] = [[] for _ in work["prompts"]]
    tokens = 0
    for news, answer in zip(work["turns"], work["answers"], strict=True):
      history = [old + new for old, new in zip(history, news, strict=True)]
      longest = max(map(len, history))
      ids = torch.tensor([[0] * (longest - len(h)) + h for h in history])
      mask = torch.tensor([[0] * (longest - len(h)) + [1] * len(h) for h in history])
      settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
      limits = {"min_new_tokens": answer, "max_new_tokens": answer, "pad_token_id": 0}
      out = model.generate(ids, attention_mask=mask, **settings, **limits)[:, longest:]
      history = [h + sampled for h, sampled in zip(history, out.tolist(), strict=True)]
      tokens += out.numel()
    return {"tokens": tokens}

  serve(action, lambda: {"versions": versions("transformers", "torch")})
