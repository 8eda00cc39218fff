"""A judge behind a server: what it is asked, which score is read, what fails, and what is kept."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.schema import RewardConfig
from llmtrain.rewards import check_rows
from llmtrain.rewards.judge import JudgeScorer, read_cache, task_of
from llmtrain.rewards.rubric import RUBRIC, filled, read_rubric, rubric_score
from llmtrain.rewards.scorer import scorer_of
from tests.servers import Server, reply, serving

ROW = {"prompt": "What is 6 * 7?", "answer": "42"}


def choices(*texts: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]}


def by_answer(handler: Any, body: dict[str, Any]) -> None:
    """Scores 5 and 4 where 42 is in what is judged, else 1 and 0."""
    right = "42" in body["messages"][0]["content"]
    reply(handler, 200, choices(*(["Score: 5", "Score: 4"] if right else ["Score: 1", "Score: 0"])))


@pytest.fixture
def judge() -> Iterator[Callable[..., tuple[JudgeScorer, Server]]]:
    """judge(answer, **settings) -> (scorer, server)"""
    open_servers = []

    def make(answer: Callable = by_answer, **settings: Any) -> tuple[JudgeScorer, Server]:
        context = serving(answer)
        server = context.__enter__()
        open_servers.append(context)
        rubric = {"url": server.url, "model": "big", "votes": 2, "deadline_s": 20.0, **settings}
        scorer = scorer_of(RewardConfig(rubric=rubric))
        assert isinstance(scorer, JudgeScorer) and scorer.name == "rubric"
        return scorer, server

    yield make
    for context in open_servers:
        context.__exit__(None, None, None)


def test_the_mean_of_the_votes(judge: Callable) -> None:
    scorer, server = judge()
    scores = scorer.score([("42", ROW), ("41", ROW), ("42", ROW)])
    assert [(s.value, s.error) for s in scores] == [(4.5, None), (0.5, None), (4.5, None)]
    assert len(server.asked) == 1 + 2  # the probe, and each question once
    path, headers, body = server.asked[-1]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert (body["model"], body["n"], body["temperature"], body["max_tokens"]) == ("big", 2, 1.0, 256)
    asked = {each["messages"][0]["content"] for _, _, each in server.asked[1:]}
    assert asked == {filled(RUBRIC, "What is 6 * 7?", text) for text in ("42", "41")}


def test_votes_without_a_score_count_nothing(judge: Callable) -> None:
    scorer, _ = judge(lambda handler, body: reply(handler, 200, choices("Score: 3", "It is fine.")))
    assert scorer.score([("42", ROW)])[0].value == 3.0
    scorer, _ = judge(lambda handler, body: reply(handler, 200, choices("Fine.", "Score: 9")))
    (score,) = scorer.score([("42", ROW)])
    assert score.value == 0.0 and "no judgement holds a score: 'Fine.'" in score.error


def test_a_token_is_sent_and_never_shown(judge: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    scorer, server = judge(token_env="JUDGE_TOKEN")
    scorer.start()
    assert server.asked[0][1]["Authorization"] == "Bearer s3cret"
    scorer, _ = judge(lambda handler, body: reply(handler, 401, b"no: s3cret"), token_env="JUDGE_TOKEN")
    with pytest.raises(OSError, match="status 401") as caught:
        scorer.start()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": []}, "answers with 0 judgements, 2 were asked for"),
        (choices("Score: 1"), "answers with 1 judgements"),
        (choices("Score: 1", None), "answers with 2 judgements"),
        ({"error": "x"}, "answers with 0 judgements"),
        ([1], "answers with 0 judgements"),
        (b"<html>", "no JSON"),
        (choices("Score: 1" * 100_000, "Score: 2"), "more than"),
    ],
)
def test_a_judge_that_answers_otherwise_is_refused_at_the_start(judge: Callable, answer: Any, said: str) -> None:
    scorer, _ = judge(lambda handler, body: reply(handler, 200, answer))
    with pytest.raises(OSError, match=said):
        check_rows([RewardConfig(rubric=scorer.settings)], [ROW], ["rows.jsonl:1"])


def test_a_judge_that_is_not_there_is_refused_at_the_start(judge: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    scorer, start = scorer_of(RewardConfig(rubric={"url": url, "model": "big", "deadline_s": 60})), time.monotonic()
    with pytest.raises(OSError, match=f"{url}/chat/completions: nothing listens there; start the server first"):
        scorer.start()
    assert time.monotonic() - start < 5


def test_one_that_is_gone_for_a_while_is_asked_again(judge: Callable) -> None:
    """Only at the start must it be there."""
    scorer, server = judge()
    scorer.start()
    server.shutdown()
    server.server_close()
    scorer.settings = scorer.settings.model_copy(update={"deadline_s": 0.5})
    (score,) = scorer.score([("42", ROW)])
    assert "no answer until the deadline" in score.error


def test_one_that_fails_later_is_an_error_of_each(judge: Callable) -> None:
    def answer(handler: Any, body: dict[str, Any]) -> None:
        if "hang" in body["messages"][0]["content"]:
            time.sleep(1.5)
        by_answer(handler, body)

    scorer, _ = judge(answer, deadline_s=1.0)
    scores = scorer.score([("42", ROW), ("hang", ROW)])
    assert scores[0] == (4.5, None) and "no answer until the deadline" in scores[1].error


def test_judgements_are_kept(judge: Callable, tmp_path: Path) -> None:
    cache = str(tmp_path / "new" / "judgements.jsonl")
    scorer, _ = judge(cache=cache)
    scorer.score([("42", ROW), ("41", ROW)])
    with open(cache, "ab") as file:
        file.write(b'{"key": "ab", "sco')  # as a kill leaves it
    again, server = judge(cache=cache)
    assert [s.value for s in again.score([("42", ROW), ("41", ROW), ("40", ROW)])] == [4.5, 0.5, 0.5]
    assert len(server.asked) == 1 + 1
    other, server = judge(cache=cache, temperature=0.5)  # another judge
    other.score([("42", ROW)])
    assert len(server.asked) == 1 + 1


def test_failed_judgements_are_not_kept(judge: Callable, tmp_path: Path) -> None:
    cache = str(tmp_path / "judgements.jsonl")
    scorer, _ = judge(lambda handler, body: reply(handler, 200, choices("Fine.", "Good.")), cache=cache)
    assert scorer.score([("42", ROW)])[0].error
    assert not Path(cache).exists() and read_cache(cache) == {}


def test_a_rubric_of_your_own(judge: Callable, tmp_path: Path) -> None:
    path = tmp_path / "rubric.txt"
    path.write_text("Q {prompt} A {completion}. Score: 0 to 5?")
    scorer, server = judge(rubric=str(path))
    scorer.score([("{prompt}", ROW)])  # what a completion holds is not filled in again
    assert server.asked[-1][2]["messages"][0]["content"] == "Q What is 6 * 7? A {prompt}. Score: 0 to 5?"
    path.write_text("Q {prompt}")
    with pytest.raises(ValueError, match=r"rewards.rubric.rubric.rubric=.*has no \{completion\}"):
        read_rubric("rewards.rubric.rubric.rubric", str(path))


def test_what_a_row_asks() -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "?"},
    ]
    assert task_of({"messages": turns}) == "User: hi\n\nAssistant: yo\n\nUser: ?"
    scorer = JudgeScorer(RewardConfig(rubric={"url": "http://h/v1", "model": "m"}))
    assert scorer.fault({"answer": "42"}) is not None and scorer.fault(ROW) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "ftp://h/v1"}, "must be http"),
        ({"url": "http://user:pw@h/v1"}, "rubric.url=http://h/v1: must be http"),
        ({"model": ""}, "model: must be set"),
        ({"token_env": "NOT_SET_ANYWHERE"}, "token_env=NOT_SET_ANYWHERE: is not set"),
        ({"lowest": 5.0}, "lowest=5: must be less than highest=5"),
        ({"temperature": 0.0}, "votes=3: must be 1 with temperature=0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str) -> None:
    reward = RewardConfig(rubric={"url": "http://h:1/v1", "model": "m", **settings})
    (line,) = reward.rubric.faults(f"rewards.{reward.name}")
    assert said in line and "pw" not in line


def test_scores_in_judgements() -> None:
    for judgement, score in {
        "Two of 3 hold. Score: 4": 4.0,
        "**Score:** 3.5/5": 3.5,
        "score 2, no: Score = 1": 1.0,
        "4": 4.0,
        "Score: 9": None,
        "Score: -1": None,
        "none": None,
        "I would give it a score of 2 out of 5.": 2.0,
        "Score (0-5): 4": 4.0,
        "Score: 1 + 1 + 1 = 3": 3.0,
        "Score: 4. (A perfect score: 5)": 4.0,
        "Score: 4/5": 4.0,
        "Score: 4 out of 5": 4.0,
        "(The (highest (5) score) is 5.) 3": 3.0,
        "Score: 1 for the task + 0 for the rest = 1, and 5 is the most": 1.0,
        "The score is 1+1 = 2. Mind that x = 5": 2.0,
        "Score: 1 + 1 = 1 + 1 + 0 = 2": 2.0,
        "Score: 4, since 1 + 1 = 2 is right": 4.0,
        "Score = 4": 4.0,
        "Score: 3\nThat is my score.": 3.0,
        "Score: 3\n5": 3.0,
        "Score: 1 + 1\n= 2": 1.0,
        "Score:\n3": 3.0,
        "_Score_: __2__": 2.0,
        "It scores well, 1 of 5 is wrong: 4": 4.0,
        "Score of step1: 2": 2.0,
        "3 (of 5)": 3.0,
        "Score (0-5): 1 + 1 = 2 out of 5": 2.0,
        "(" * 3000 + ")" * 3000 + "Score: 1": 1.0,
        "Score: " + "1 + " * 3000 + "1": 1.0,
        "score " * 100000: None,  # in a time that grows with the length
    }.items():
        assert rubric_score(judgement, 0.0, 5.0) == score, judgement
