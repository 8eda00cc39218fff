"""A generator that follows a script, over tokens that are characters."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.types import Group, Prompt, Sample, Sampling

STOP = 0  # the stop token, shown as $


def encode(text: str) -> list[int]:
    return [STOP if c == "$" else ord(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    return "".join("$" if i == STOP else chr(i) for i in ids)


class Scripted:
    """Continues texts: `script` maps the text so far to what its samples write next. A sample ends as a generator's:
    behind the stop token or the first stop string, or at the limit."""

    def __init__(self, script: dict[str, list[str]]) -> None:
        self.script = script
        self.calls: list[list[tuple[str, int, int]]] = []  # of each call (text, samples, most tokens)
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.calls.append([(decode(p.ids), sampling.num_samples, sampling.max_new_tokens) for p in prompts])
        self.seeds += [prompt.seed for prompt in prompts]
        served: dict[str, int] = {}
        return [self.group(p, served, sampling) for p in prompts]

    def group(self, prompt: Prompt, served: dict[str, int], sampling: Sampling) -> Group:
        text = decode(prompt.ids)
        first = served.get(text, 0)
        served[text] = first + sampling.num_samples
        return [self.sample(prompt, text, i, sampling) for i in range(first, first + sampling.num_samples)]

    def sample(self, prompt: Prompt, text: str, number: int, sampling: Sampling) -> Sample:
        written, finished = "", False
        for c in self.script[text][number]:
            if finished or len(written) == sampling.max_new_tokens:
                break
            written += c
            finished = c == "$" or any(string in written for string in sampling.stop_strings)
        n = len(written)
        return Sample(prompt.ids, encode(written), [True] * n, [-0.5] * n, [0] * n, finished)
