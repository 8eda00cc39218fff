"""Programs that talk to the policy over the OpenAI protocol: what is recorded of it, and what it is worth."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from openai import OpenAI

from llmtrain.config.agent import AgentConfig
from llmtrain.data.groups import group_length
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tree import Tree
from llmtrain.envs.agents import OTHERS, SILENT, Agents
from llmtrain.envs.dialogue import Dialogue
from llmtrain.envs.program import Program, Task, rewards_of
from llmtrain.envs.session import Session, Thread
from llmtrain.rollout.api.choices import Delta
from llmtrain.rollout.api.refused import Refused
from llmtrain.rollout.api.requests import CompletionRequest
from llmtrain.rollout.continuous import Token
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.wire import pack, unpack
from llmtrain.sandbox.pool import Reply
from llmtrain.trainer.completions import stop_text
from llmtrain.types import Group, Prompt, Sample, Sampling
from tests.byte_tokenizer import save_byte_tokenizer
from tests.rollout.api.conftest import random_model

pytest.importorskip("uvicorn")
TALKING, FAILING = (str(Path(__file__).with_name(f"agent_{name}.py")) for name in ("talking", "failing"))
Run = Callable[[dict, OpenAI], Any]
A = {"row": 1}
ASK = [{"role": "user", "content": "What é?"}]


class Here:
    """Runs a function of the test in threads of this process, in the place of a Program."""

    def __init__(self, run: Run) -> None:
        self.function = run

    def run(self, tasks: list[Task]) -> list[Reply]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(self._run, tasks))

    def _run(self, task: Task) -> Reply:
        try:
            client = OpenAI(base_url=task.base_url, api_key=task.api_key, max_retries=0, timeout=20)
            return Reply(self.function(task.example, client), None)
        except Exception as error:
            return Reply(None, f"{type(error).__name__}: {error}")

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("agents")
    save_byte_tokenizer(directory / "tokenizer")
    return load_tokenizer(str(directory / "tokenizer"))


@pytest.fixture(scope="module")
def agents(tokenizer: Tokenizer) -> Iterator[Agents]:
    generator = NativeGenerator(random_model(), 8, "cpu", 512, stop_text(tokenizer))
    generator.version = 5
    found = Agents(generator, tokenizer, Here(lambda example, client: 0), False, 4)
    yield found
    found.close()


def played(agents: Agents, run: Run, *examples: dict, **more: Any) -> list[Group]:
    """Returns the groups of the examples, two runs each."""
    agents.program = Here(run)
    eos = agents.tokenizer.eos_id
    sampling = Sampling(**{"max_new_tokens": 12, "num_samples": 2, "temperature": 1.3, "stop_ids": (eos, 3), **more})
    return agents.generate([Prompt([eos], i, each) for i, each in enumerate(examples or (A,))], sampling)


def say(client: OpenAI, messages: list[dict], **more: Any) -> dict[str, Any]:
    """Returns the next turn, as a client sends it back."""
    answer = client.chat.completions.create(model="gpt-9", messages=messages, **more)
    return {"role": "assistant", "content": answer.choices[0].message.content}


def talk(example: dict, client: OpenAI) -> float:
    first = say(client, ASK, temperature=0.01, seed=1, top_p=0.1)  # the run's settings hold
    say(client, [*ASK, first, {"role": "user", "content": "More"}])
    return 1.0


@torch.no_grad()
def test_a_conversation_is_one_row_of_the_tokens_that_were_sampled(agents: Agents) -> None:
    (group,) = played(agents, talk)
    decode, first = agents.tokenizer.decode, agents.tokenizer.encode_chat(ASK)
    assert len(group) == 2 and group[0].ids != group[1].ids and [s.attempt for s in group] == [0, 1]
    for sample in group:
        assert sample.prompt_ids == first and set(sample.versions) == {5} and sample.parts == {"agent": 1.0}
        (own, _), (other, between), (again, two) = sample.turns()
        assert (own, other, again) == (True, False, True) and sample.errors == {}
        told = decode(between, skip_special=False).removeprefix("<|im_end|>")  # where the turn was cut
        assert told == "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        assert len(two) <= 12 and sample.finished == (two[-1] in (1, 3))
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        logits = agents.generator.model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None])[0] / 1.3
        expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[len(first) - 1 :, 0]
        trained = torch.tensor(sample.trained)
        got = torch.tensor(sample.logprobs)
        assert (got - expected)[trained].abs().max() <= 1e-4  # fp32, other sums
        assert not got[~trained].any()
    texts = [decode(s.turns()[0][1]) for s in group]
    assert any("\ufffd" in text for text in texts)  # which no text encodes: it was not encoded again


def test_the_same_again_gives_the_same(agents: Agents) -> None:
    first, again = (played(agents, talk, A, A) for _ in range(2))
    assert [[s.ids for s in group] for group in first] == [[s.ids for s in group] for group in again]
    assert first[0][0].ids != first[1][0].ids


def test_a_history_that_was_rewritten_starts_a_new_row(agents: Agents) -> None:
    def rewrite(example: dict, client: OpenAI) -> dict[str, float]:
        answer = say(client, ASK)
        say(client, [*ASK, {**answer, "content": "Other words."}, *ASK])
        say(client, [{"role": "system", "content": "New"}, *ASK])
        say(client, [*ASK, {**answer, "content": f"  {answer['content']}\n"}, *ASK])  # goes on with the first
        return {"good": 2.0, "fast": 0.5}

    (group,) = played(agents, rewrite)
    assert [s.attempt for s in group] == [0, 0, 0, 1, 1, 1]
    assert [len([own for own, _ in s.turns() if own]) for s in group] == [2, 1, 1] * 2
    assert all(s.parts == {"good": 2.0, "fast": 0.5} and s.prompt_ids == group[0].prompt_ids for s in group)
    texts = [agents.tokenizer.decode(s.prompt_ids + s.ids, skip_special=False) for s in group[:3]]
    assert "assistant\nOther words.<|im_end|>" in texts[1] and texts[2].startswith("<|im_start|>system\nNew")
    assert agents.tokenizer.decode(group[0].prompt_ids, skip_special=False) == "<|im_start|>"


def test_what_the_rows_of_a_program_share_is_computed_once(agents: Agents) -> None:
    """A program that asks four times and keeps of each answer only that it was there: four rows a run, two runs. The
    numbers of docs/batches.md are these; how long the answers of a random model are, may change with torch."""

    def rewrite(example: dict, client: OpenAI) -> float:
        told = [{"role": "user", "content": "A task that every request begins with."}]
        for number in range(4):
            answer = say(client, told)
            result = {"role": "user", "content": f"{number} is a result of a tool that the next turns still see."}
            told += [{**answer, "content": "[...]"}, result]
        return 1.0

    (group,) = played(agents, rewrite)
    alone = sum(len(s.prompt_ids) - 1 + len(s.ids) for s in group)
    prompts, tree = group_length(group), Tree(group).tokens
    print(alone, prompts, tree)
    assert len(group) == 8 and tree < prompts / 2 < alone / 2


def test_rows_of_an_attempt_share_one_advantage() -> None:
    from llmtrain.config.recipes.grpo import GrpoConfig
    from llmtrain.recipes.grpo import credit

    def row(attempt: int | None, reward: float) -> Sample:
        return Sample([1], [2, 3], [True, True], [0.0, 0.0], [0, 0], True, reward, attempt=attempt)

    group = [row(0, 3.0), row(0, 3.0), row(0, 3.0), row(1, 1.0)]
    other = [row(None, 0.0), row(None, 1.0)]
    credit([group, other], GrpoConfig(normalize_std=False))
    assert [s.columns["advantages"] for s in group] == [[1.0, 1.0]] * 3 + [[-1.0, -1.0]]  # the mean is 2, not 2.5
    assert [s.columns["advantages"][0] for s in other] == [-0.5, 0.5]


def test_completions_and_what_goes_wrong_on_the_way(agents: Agents) -> None:
    keys = []

    def run(example: dict, client: OpenAI) -> float | None:
        keys.append(client)
        match example["do"]:
            case "complete":
                client.completions.create(model="m", prompt="One é", max_tokens=4)
                client.completions.create(model="m", prompt=[5, 6, 7], stop="a")
                return True
            case "nothing":
                return None
            case "silent":
                return 1.0
            case "crash":
                say(client, ASK)
                raise KeyError("lost")
            case "many":
                with pytest.raises(openai.UnprocessableEntityError, match="n=2: a session that is recorded"):
                    say(client, ASK, n=2)
                with pytest.raises(openai.BadRequestError, match="together they must be at most 512"):
                    say(client, [{"role": "user", "content": "x" * 600}])
                last = say(client, [{"role": "user", "content": "x" * 460}])
                more = [{"role": "user", "content": "x" * 460}, last, {"role": "user", "content": "x" * 40}]
                with pytest.raises(openai.BadRequestError, match="more than the 512 tokens of a row"):
                    say(client, more)
                return 0.0
        return float("inf")

    does = ("complete", "nothing", "silent", "crash", "many", "infinite")
    groups = dict(zip(does, played(agents, run, *({"do": do} for do in does), num_samples=1), strict=True))
    texts, ids = groups["complete"], agents.tokenizer.encode("One é")
    assert [s.attempt for s in texts] == [0] and texts[0].prompt_ids == ids and len(texts[0].ids) <= 4
    assert texts[0].errors == {"environment": OTHERS}
    assert groups["silent"][0].errors == {"environment": SILENT} and groups["silent"][0].trained == [False]
    assert groups["nothing"][0].errors["environment"].startswith("returned no reward")
    assert groups["crash"][0].errors == {"environment": "KeyError: 'lost'"} and any(groups["crash"][0].trained)
    assert "which is no finite number" in groups["infinite"][0].errors["environment"]
    assert groups["many"][0].errors == {} and sum(groups["many"][0].trained) > 0
    with pytest.raises(openai.AuthenticationError):
        say(keys[0], ASK)
    assert agents.server.continuous.sequences == 0 and agents.generator.cache is None
    assert [[s.attempt for s in g] for g in unpack(pack({0: groups["many"]}), [[1]]).values()] == [[0]]


def test_tools_are_called_in_a_conversation(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = agents.tokenizer.encode
    script = [[*encode('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'), 3], [*encode("It is 2"), 3]]
    monkeypatch.setattr("llmtrain.rollout.native.sample", lambda logits, u, s: scripted(script, logits))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    def run(example: dict, client: OpenAI) -> float:
        answer = client.chat.completions.create(model="m", messages=ASK, tools=tools).choices[0].message
        result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "2"}
        last = client.chat.completions.create(model="m", messages=[*ASK, answer, result], tools=tools)
        return float(last.choices[0].message.content == "It is 2")

    ((sample,),) = played(agents, run, num_samples=1, max_new_tokens=80)
    assert [ids for own, ids in sample.turns() if own] == [[*each[:-1], 3] for each in SCRIPTS]
    assert sample.parts == {"agent": 1.0} and sample.finished


SCRIPTS: list[list[int]] = []


def scripted(script: list[list[int]], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not SCRIPTS:
        SCRIPTS.extend(list(each) for each in script)
    row = next(each for each in script if each)
    return torch.tensor([row.pop(0)]), torch.zeros(1)


def test_a_function_runs_in_a_process_of_its_own(agents: Agents) -> None:
    agents.program = Program(AgentConfig(function=f"{TALKING}:twice", processes=1))
    agents.program.start()
    sampling = Sampling(12, 2, stop_ids=(1, 3))
    (group,) = agents.generate([Prompt([1], 0, {"question": "What?"})], sampling)
    agents.program.close()
    assert [len(s.turns()) for s in group] == [3, 3]
    for sample in group:
        assert sample.parts == {"agent": len(agents.tokenizer.decode(sample.last_turn)) / 10} and not sample.errors


def test_a_program_that_fails_or_hangs_is_an_error_of_its_sample() -> None:
    program = Program(AgentConfig(function=f"{FAILING}:fails", processes=2, deadline_s=1))
    replies = program.run([Task({"do": do}, "http://x", "k") for do in ("raise", "sleep", "text", "work")])
    program.close()
    errors = [rewards_of(reply, needed=True) for reply in replies]
    assert "no such thing" in errors[0][1] and errors[1] == ({}, "took longer than 1 s")
    assert "returned 'good' as the reward 'agent'" in errors[2][1] and errors[3] == ({"agent": 1.0}, None)
    for value in (math.inf, math.nan, 10**400, -(10**400)):
        assert "which is no finite number" in (rewards_of(Reply(value, None), needed=True)[1] or "")
    with pytest.raises(ValueError, match=r"rollout.agent.function=.*:none: cannot be loaded: .*none"):
        Program(AgentConfig(function=f"{FAILING}:none", processes=1)).start()


def test_nothing_is_recorded_after_the_end() -> None:
    """A program that is killed leaves requests, whose answers come while its rows are read."""
    session = Session(None, None, Sampling(4), 0)
    thread, asked = Thread(Dialogue(None, [], [], [1])), CompletionRequest(model="m", prompt=[1])
    session.pending[id(asked)] = [thread]
    answer = Delta(tokens=[Token(0, 5, -1.0, None, [], 0, "stop")], end="stop")
    session.heard(asked, 0, answer)
    session.end()
    session.heard(asked, 0, answer)
    assert thread.dialogue.ids == [5]
    with pytest.raises(Refused, match="the program has ended"):
        session.prompts(asked)


def ended(number: int) -> bool:
    """Whether no process of this number sleeps any more."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        return process.name() != "sleep" or process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_command_reads_the_example_and_prints_the_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    script = tmp_path / "agent.sh"
    script.write_text(
        "read -r example\ncase $example in\n"
        '  *good*) echo "talk"; echo "$OPENAI_BASE_URL $OPENAI_API_KEY" >&2; echo 0.25; echo ;;\n'
        "  *bad*) echo oh no >&2; exit 3 ;;\n  *words*) echo fine ;;\n  *slow*) sleep 50 & echo $! > $CHILD; wait ;;\n"
        '  *) echo "{\\"url\\": 1, \\"key\\": \\"$OPENAI_API_KEY\\"}" ;;\nesac\n'
    )
    program = Program(AgentConfig(command=["bash", str(script)], deadline_s=2))
    words = ("good", "bad", "words", "slow", "other")
    replies = program.run([Task({"word": word}, "http://x/v1", "k") for word in words])
    assert replies[:3] == [
        Reply(0.25, None),
        Reply(None, "ended with 3: oh no"),
        Reply(None, "the last line that it printed is 'fine', no JSON number or object of numbers"),
    ]
    assert replies[3:] == [Reply(None, "took longer than 2 s"), Reply({"url": 1, "key": "k"}, None)]
    child, give_up = int((tmp_path / "child").read_text()), time.monotonic() + 5
    while not ended(child) and time.monotonic() < give_up:  # it was killed, and may take a moment
        time.sleep(0.01)
    assert ended(child)  # with the program that had started it
    (missing,) = Program(AgentConfig(command=[str(tmp_path / "no")])).run([Task({}, "", "")])
    assert missing.error.startswith("cannot be started: ")
