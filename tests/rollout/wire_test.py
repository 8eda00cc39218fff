"""Samples as bytes and back."""

from __future__ import annotations

from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Group, Sample

ONE = Sample([1, 2], [5, 6, 7], [True, False, True], [-0.5, 0.0, -1.5], [3, 3, 4], True)
CUT = Sample([1, 2], [9], [True], [-2.0], [4], False)
JUDGED = Sample([8], [4, 5], [False, True], [0.0, -0.25], [4, 4], True, parts={"won": 1.0}, errors={"b": "späte 1"})


def sent(groups: dict[int, Group], prompts: list[list[int]]) -> dict[int, Group]:
    return unpack(pack(groups, prompts), prompts)


def test_groups_come_back() -> None:
    prompts = [[0], [1, 2], [1, 2]]
    assert sent({1: [ONE, CUT], 2: [CUT]}, prompts) == {1: [ONE, CUT], 2: [CUT]}
    assert sent({}, prompts) == {}


def test_what_an_environment_said_and_another_prompt_come_too() -> None:
    assert sent({1: [CUT, ONE], 0: [JUDGED, JUDGED]}, [[8, 4], [1, 2]]) == {1: [CUT, ONE], 0: [JUDGED, JUDGED]}


def test_nothing_more_is_sent_than_before_without_an_environment() -> None:
    assert pack({0: [ONE]}, [[1, 2]]).tolist() == pack({0: [ONE]}).tolist()
