"""A program of a user that talks to the policy, for tests of `rollout.agent`."""

from __future__ import annotations

from openai import OpenAI


def twice(example: dict, base_url: str, api_key: str) -> float:
    """Asks, and asks again; worth a tenth of the characters of the second answer."""
    client, messages = OpenAI(base_url=base_url, api_key=api_key), [{"role": "user", "content": example["question"]}]
    for _ in range(2):
        said = client.chat.completions.create(model="any", messages=messages, temperature=0.1).choices[0].message
        messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": "And é?"}]
    return len(said.content) / 10
