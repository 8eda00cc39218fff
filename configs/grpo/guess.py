"""An environment of the library verifiers: the policy guesses a number in a few turns. guess.yaml trains on it."""

import random
import re

import verifiers as vf
from datasets import Dataset

START = "I think of a number from 1 to {most}. Guess it, with one number."


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages: list, state: dict, **kwargs: object) -> list:
        guess, number = number_in(messages[-1].content), int(state["answer"])
        if guess == number:
            state["final_env_response"] = [vf.UserMessage(content="Yes.")]
            return state["final_env_response"]
        hint = "Write a number." if guess is None else "It is higher." if guess < number else "It is lower."
        return [vf.UserMessage(content=f"{hint} Guess again.")]


def number_in(text: str | None) -> int | None:
    found = re.search(r"\d+", text or "")
    return int(found[0][:9]) if found else None


def found(completion: list, answer: str, **kwargs: object) -> float:
    """Rewards the number: 1 for the first guess, less for each that it took."""
    guesses = [number_in(message.content) for message in completion if message.role == "assistant"]
    return 1 / len(guesses) if guesses[-1] == int(answer) else 0.0


def load_environment(most: int = 9, rows: int = 400, turns: int = 3) -> vf.Environment:
    rng = random.Random(0)
    data = [{"question": START.format(most=most), "answer": str(rng.randint(1, most))} for _ in range(rows)]
    return Guess(dataset=Dataset.from_list(data), rubric=vf.Rubric(funcs=[found]), max_turns=turns)
