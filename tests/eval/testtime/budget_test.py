from __future__ import annotations

from dataclasses import replace

import pytest

from llmtrain.eval.testtime.budget import Forcing, before_end, forced
from llmtrain.types import Prompt, Sampling
from tests.eval.testtime.scripted import STOP, Scripted, decode, encode

SAMPLING = Sampling(99, temperature=0.0, stop_ids=(STOP,))
HOW = Forcing(10, 0, "</t>", encode("W"), encode("</t>="), answer_tokens=3, decode=decode)


def run(script: dict[str, list[str]], how: Forcing) -> tuple[Scripted, list]:
    generator = Scripted(script)
    return generator, forced(generator, [Prompt(encode("q"), 5)], 1, SAMPLING, how)


def test_thinking_above_the_budget_is_cut_and_closed() -> None:
    generator, (found,) = run({"q": ["abcdefghijklmnop</t>7$"], "qabcdefghij</t>=": ["7$"]}, HOW)
    assert generator.calls == [[("q", 1, 10)], [("qabcdefghij</t>=", 1, 3)]]
    assert decode(found.ids) == "abcdefghij</t>=7$" and found.cut and not found.stopped
    assert found.tokens == 17  # 10 thought, 5 put in, 2 of the answer


def test_thinking_that_ends_early_goes_on_behind_a_wait() -> None:
    script = {"q": ["ab</t>7$"], "qabW": ["c</t>8$"], "qabWc</t>": ["8$"]}
    generator, (found,) = run(script, replace(HOW, waits=1))
    # the budget of 10 holds ab and W, so 7 are left; then the answer, from the ids that were written
    assert generator.calls == [[("q", 1, 10)], [("qabW", 1, 7)], [("qabWc</t>", 1, 3)]]
    assert decode(found.ids) == "abWc</t>8$" and found.waits == 1 and not found.cut
    assert found.tokens == 14 and found.lost_tokens == 4  # the first </t> was written too
    assert len(set(generator.seeds)) == 3  # no two calls repeat a stream


def test_waits_without_end_stop_at_the_budget() -> None:
    script = {"q": ["a</t>"], "qaW": ["b</t>"], "qaWbW": ["c</t>"], "qaWbWcW": ["d</t>"], "qaWbWcWd</t</t>=": ["1$"]}
    generator, (found,) = run(script, replace(HOW, waits=9))
    assert generator.calls[3] == [("qaWbWcW", 1, 4)]  # of which </t> is cut after 3 of its characters
    assert decode(found.ids) == "aWbWcWd</t</t>=1$" and found.cut and found.waits == 3


def test_a_model_that_stops_has_its_stop_taken_out_for_a_wait() -> None:
    generator, (found,) = run({"q": ["ab$"], "qabW": ["c$"]}, replace(HOW, waits=1))
    assert [calls[0][0] for calls in generator.calls] == ["q", "qabW"]  # no answer behind what is complete
    assert decode(found.ids) == "abWc$" and found.stopped and found.tokens == 6


def test_no_wait_where_none_fits() -> None:
    how = replace(HOW, waits=1, wait_ids=encode("WWWWWW"))
    _, (found,) = run({"q": ["abcd</t>"], "qabcd</t>": ["9$"]}, how)
    assert decode(found.ids) == "abcd</t>9$" and found.waits == 0


def test_length_limit_alone() -> None:
    how = replace(HOW, end=None, close_ids=encode("="), budget_tokens=3)
    _, (found,) = run({"q": ["ab$"]}, how)
    assert decode(found.ids) == "ab$" and found.stopped and not found.cut
    _, (found,) = run({"q": ["abcdef$"], "qabc=": ["f$"]}, how)
    assert decode(found.ids) == "abc=f$" and found.cut


def test_an_empty_completion_is_closed() -> None:
    _, (found,) = run({"q": [""], "q</t>=": [""]}, replace(HOW, waits=2))
    assert decode(found.ids) == "</t>=" and found.tokens == 5


def test_several_problems_have_their_own_room() -> None:
    script = {"p": ["abc</t>"], "q": ["abcdefgh</t>"], "pabcW": ["d</t>"], "pabcWd</t>": ["1$"]}
    generator = Scripted(script | {"qabcdefgh</</t>=": ["2$"]})
    found = forced(generator, [Prompt(encode("p"), 1), Prompt(encode("q"), 2)], 1, SAMPLING, replace(HOW, waits=1))
    assert generator.calls == [
        [("p", 1, 10), ("q", 1, 10)],
        [("pabcW", 1, 6)],  # q was cut in the middle of its end
        [("pabcWd</t>", 1, 3), ("qabcdefgh</</t>=", 1, 3)],
    ]
    assert [decode(each.ids) for each in found] == ["abcWd</t>1$", "abcdefgh</</t>=2$"]
    assert [each.problem for each in found] == [0, 1]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["ab", "c", "</t>"], 2),
        (["ab", "c</", "t>"], 1),  # a token that holds a part of the end goes too
        (["</t>x"], 0),
        (["ab", "$"], 1),
    ],
)
def test_tokens_before_the_end(words: list[str], kept: int) -> None:
    ids = [STOP if word == "$" else 100 + i for i, word in enumerate(words)]
    how = replace(HOW, decode=lambda own: "".join("$" if i == STOP else words[i - 100] for i in own))
    assert before_end(ids, SAMPLING, how) == ids[:kept]
