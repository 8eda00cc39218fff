"""Rewards with reasoning-gym's own scorers, applied to the `answer N` at the end of a completion."""

from __future__ import annotations


def extract(completion: str) -> str | None:
    """Returns the text after the last `answer `, None without one. Example: "4+7=11; answer 131" -> "131"."""
    _, found, tail = completion.rpartition("answer ")
    return tail.strip() or None if found else None


def reward(completion: str, example: dict) -> float:
    """Returns 1.0 when the scorer of `example["source"]` gives the answer full marks, else 0.0; partial marks do not
    count.

    `example["entry"]` is the item of the data set (question, answer, metadata).
    """
    import reasoning_gym

    answer = extract(completion)
    if answer is None:
        return 0.0
    score = reasoning_gym.get_score_answer_fn(example["source"])(answer=answer, entry=example["entry"])
    return float(score == 1.0)
