from __future__ import annotations

from collections.abc import Sequence

from llmtrain.eval.testtime.problems import Written
from llmtrain.eval.testtime.search import Steps, search
from llmtrain.types import Prompt, Sampling
from tests.eval.testtime.scripted import STOP, Scripted, decode, encode

SAMPLING = Sampling(12, stop_ids=(STOP,))
HOW = Steps(4, 2, "\n", 5, decode)


def by_digits(written: Sequence[Written]) -> list[float | None]:
    """The last digit that was written is the score; None without one."""
    digits = [[c for c in decode(each.ids) if c.isdigit()] for each in written]
    return [float(own[-1]) if own else None for own in digits]


def test_the_best_go_on_and_dropped_ones_are_counted() -> None:
    script = {"q": ["1\n", "9\n", "5\n", "7\n"], "q9\n": ["a2$", "b3\n"], "q7\n": ["c4$", "d1\n"]}
    script |= {"q9\nb3\n": ["e$", "f$"]}
    generator = Scripted(script)
    (found,) = search(generator, [Prompt(encode("q"), 5)], SAMPLING, HOW, by_digits)
    # four first steps; 9 and 7 go on twice each; two have ended and keep their places; of the others 3 goes on
    assert generator.calls == [
        [("q", 4, 5)],
        [("q9\n", 2, 5), ("q7\n", 2, 5)],
        [("q9\nb3\n", 2, 5)],
    ]
    assert [decode(beam.ids) for beam in found.done] == ["9\na2$", "7\nc4$", "9\nb3\ne$", "9\nb3\nf$"]
    assert [beam.score for beam in found.done] == [2, 4, 3, 3]
    assert found.tokens == 4 * 2 + (3 + 3 + 3 + 3) + (2 + 2) and found.steps == 3
    assert found.done[2].logprobs == [-0.5] * 7
    assert len(set(generator.seeds)) == 4


def test_the_last_beam_fills_the_places_that_are_left() -> None:
    script = {"q": ["1$", "9\n", "5\n", "7\n"], "q9\n": ["x$", "y$"], "q7\n": ["z$"]}
    generator = Scripted(script)
    (found,) = search(generator, [Prompt(encode("q"), 5)], SAMPLING, HOW, by_digits)
    assert sorted(generator.calls[1:]) == [[("q7\n", 1, 5)], [("q9\n", 2, 5)]]
    assert [decode(beam.ids) for beam in found.done] == ["1$", "9\nx$", "9\ny$", "7\nz$"]


def test_a_step_that_never_ends_is_cut_and_so_is_a_beam() -> None:
    how = Steps(1, 1, "\n", 5, decode)
    script = {"q": ["aaaaaaaa"], "qaaaaa": ["bbbbbbbb"], "qaaaaabbbbb": ["cccccccc"]}
    generator = Scripted(script)
    (found,) = search(generator, [Prompt(encode("q"), 5)], SAMPLING, how, by_digits)
    assert [calls[0][2] for calls in generator.calls] == [5, 5, 2]  # 12 tokens in all
    assert decode(found.done[0].ids) == "aaaaabbbbbcc" and found.done[0].score is None and found.tokens == 12


def test_empty_steps_end_a_beam() -> None:
    (found,) = search(Scripted({"q": ["", "", "", ""]}), [Prompt(encode("q"), 5)], SAMPLING, HOW, by_digits)
    assert len(found.done) == 4 and found.tokens == 0 and found.steps == 1


def test_a_generator_at_its_last_position_ends_a_beam() -> None:
    how = Steps(2, 2, "\n", 5, decode)
    (found,) = search(Scripted({"q": ["abc", "x$"]}), [Prompt(encode("q"), 5)], SAMPLING, how, by_digits)
    assert [decode(beam.ids) for beam in found.done] == ["abc", "x$"] and found.steps == 1


def test_problems_search_apart() -> None:
    script = {"p": ["1$"] * 4, "q": ["1\n", "2\n", "3\n", "4\n"], "q4\n": ["8$", "8$"], "q3\n": ["8$", "8$"]}
    found = search(Scripted(script), [Prompt(encode("p"), 1), Prompt(encode("q"), 2)], SAMPLING, HOW, by_digits)
    assert [(each.tokens, each.steps, len(each.done)) for each in found] == [(8, 1, 4), (16, 2, 4)]


def test_equal_beams_have_streams_of_their_own() -> None:
    script = {"q": ["1\n"] * 4, "q1\n": ["a$", "b$", "c$", "d$"]}
    generator = Scripted(script)
    (found,) = search(generator, [Prompt(encode("q"), 5)], SAMPLING, HOW, by_digits)
    assert generator.seeds[1] != generator.seeds[2]
    assert sorted(decode(beam.ids)[-2:] for beam in found.done) == ["a$", "b$", "c$", "d$"]
