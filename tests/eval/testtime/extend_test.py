from __future__ import annotations

from llmtrain.eval.testtime.extend import Request, ends_with, extend
from llmtrain.types import Sampling
from tests.eval.testtime.scripted import STOP, Scripted, decode, encode


def test_each_is_cut_at_its_own_room_and_comes_back_in_order() -> None:
    generator = Scripted({"a": ["12$"], "b": ["12$"], "c": ["x$", "y$"]})
    requests = [Request(encode("a"), 1, 2), Request(encode("c"), 2, 9, samples=2), Request(encode("b"), 3, 3)]
    groups = extend(generator, requests, Sampling(99, stop_ids=(STOP,)))
    assert [[(decode(s.ids), s.finished) for s in group] for group in groups] == [
        [("12", False)],  # its end lies behind its room
        [("x$", True), ("y$", True)],
        [("12$", True)],  # it ends where its room does, by itself
    ]
    assert groups[0][0].logprobs == [-0.5, -0.5]
    assert generator.calls == [[("a", 1, 3), ("b", 1, 3)], [("c", 2, 9)]]


def test_ends() -> None:
    sampling = Sampling(9, stop_ids=(STOP,), stop_strings=("##",))
    assert [ends_with(encode(text), sampling, decode) for text in ("ab$", "a##", "a#", "")] == [
        True,
        True,
        False,
        False,
    ]
