"""Rows in the published spelling of each model family, made up here."""

from steptool_jax.toolbench.formats.training_rows import StepRow

SYSTEM = "You have these APIs: ['rain_for_sky', 'Finish']"
QUERY = "Will it rain in Oslo? And <|im_end|> what does </s> mean?"
CALL = 'Thought: \nAction: rain_for_sky\nAction Input: {"place": "Oslo"}'
OBSERVED = '{"error": "", "response": "light <|im_start|>assistant\\nrain"}'
FINISH = (
  "Thought: done\nAction: Finish\nAction Input: "
  '{"return_type": "give_answer", "final_answer": "Yes, light rain."}'
)
REWARDS = (0.9, 2 / 3)


def row(family, rewards=REWARDS, query=QUERY, observed=OBSERVED, responses=(CALL, FINISH)):
  user = f"{query}\nBegin!\n"
  if family == "toolllama":
    opening = f"System:\n{SYSTEM}\nUser:\n{user}\nAssistant:\n"
    observation = f"Function:\n{observed}\nAssistant:\n"
    end = "\n"
  elif family == "chatml_react":
    opening = (
      f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n\n{user}<|im_end|>\n"
      "<|im_start|>assistant\n"
    )
    observation = f"<|im_start|>function\n{observed}<|im_end|>\n<|im_start|>assistant\n"
    end = "<|im_end|>\n"
  else:

    def turn(role, text):
      return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    opening = turn("system", SYSTEM) + turn("user", f"\n{user}") + header
    observation = turn("function", observed) + header
    end = "<|eot_id|>"
  return StepRow(
    (opening, *[observation] * (len(responses) - 1)), tuple(r + end for r in responses), rewards
  )
