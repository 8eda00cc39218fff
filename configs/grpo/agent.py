"""A program as it was written for a hosted model: `llmtrain grpo configs/grpo/agent.yaml` trains what it talks to."""

import re

from openai import OpenAI


def run(example: dict, base_url: str, api_key: str) -> float:
    """Returns 1 for a right answer at once, 0.5 for one on second thoughts, else 0."""
    client, reward = OpenAI(base_url=base_url, api_key=api_key), 1.0
    messages = list(example["messages"])
    for _ in range(2):
        answer = client.chat.completions.create(model="gpt-4o-mini", messages=messages, max_tokens=12)
        said = answer.choices[0].message.content or ""
        number = re.search(r"\d+", said)
        if number and number[0] == example["answer"]:
            return reward
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": "That is wrong. Which one is it?"})
        reward = 0.5
    return 0.0
