"""The vLLM generator against a stand-in for the server: what it sends, what it refuses, and how a server ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.post import ServerFault
from llmtrain.model.hf import disk_shapes
from llmtrain.rollout import vllm, vllm_answers
from llmtrain.rollout.vllm import VllmGenerator, seed_of
from llmtrain.types import Prompt, Sampling
from tests.rollout.native_test import random_decoder
from tests.rollout.vllm_stand_in import asked, interpreter

MODEL = resolve_model(
    ModelConfig(num_layers=2, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1, vocab_size=97, max_positions=64)
)
PROMPTS = [Prompt([5, 7], seed=3), Prompt([1], seed=4), Prompt([2, 2, 2], seed=5)]
Start = Callable[..., VllmGenerator]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(how=..., **rollout)` gives a generator whose server behaves so; it has weights of version 1."""
    made: list[VllmGenerator] = []

    def started(loaded: bool = True, device: str = "cpu", decode: Any = None, **settings: Any) -> VllmGenerator:
        how = settings.pop("how", {})
        own = {"python": interpreter(tmp_path / "server", **how), "answer_s": 20, "start_s": 20}
        rollout = RolloutConfig(generator="vllm", vllm={**own, **settings.pop("vllm", {})}, **settings)
        made.append(VllmGenerator(MODEL, rollout, torch.float32, device, 32, decode))
        if loaded:
            made[-1].load_weights(random_decoder(MODEL).state_dict().items(), 1)
        return made[-1]

    yield started
    for each in made:
        each.close()


def requests(tmp_path: Path, route: str) -> list[dict[str, Any]]:
    return [each for each in asked(tmp_path / "server") if each.get("route") == route]


def expected(prompt: Prompt, number: int, most: int, stop: tuple[int, ...] = ()) -> list[int]:
    """What the stand-in's model says."""
    seen, seed = list(prompt.ids), seed_of(prompt) + number
    while len(seen) - len(prompt.ids) < most:
        seen.append((sum(seen) + seed) % 97)
        if seen[-1] in stop:
            break
    return seen[len(prompt.ids) :]


def test_groups_come_in_order_each_sample_from_its_own_seed(start: Start, tmp_path: Path) -> None:
    generator = start(max_batch_seqs=2)
    groups = generator.generate(PROMPTS, Sampling(4, num_samples=3, temperature=0.5))
    assert [[s.ids for s in group] for group in groups] == [[expected(p, i, 4) for i in range(3)] for p in PROMPTS]
    first = groups[0][0]
    assert first.logprobs == [-(t + 1) / 100 for t in first.ids] and first.versions == [1] * 4 and not first.finished
    sent = [each["sampling_params"] for each in requests(tmp_path, vllm.GENERATE)]
    assert sorted(p["n"] for p in sent) == [1, 1, 1, 2, 2, 2]  # at most max_batch_seqs in a request
    assert {p["temperature"] for p in sent} == {0.5} and {p["ignore_eos"] for p in sent} == {True}
    assert generator.generate([], Sampling(4)) == []
    generator.generate(PROMPTS[:1], Sampling(4, num_samples=2, temperature=0))
    assert [each["sampling_params"]["n"] for each in requests(tmp_path, vllm.GENERATE)[-2:]] == [1, 1]


def test_a_sequence_ends_at_a_stop_token_or_at_its_limit(start: Start) -> None:
    generator, prompt = start(), Prompt([1] * 28, seed=9)
    whole = expected(prompt, 0, 4)  # max_seq_tokens is 32
    (group,) = generator.generate([prompt], Sampling(100, temperature=0))
    assert group[0].ids == whole and not group[0].finished
    (group,) = generator.generate([prompt], Sampling(100, temperature=0, stop_ids=(whole[1],)))
    assert group[0].ids == whole[:2] and group[0].finished
    (group,) = generator.generate([prompt], Sampling(4, temperature=0, stop_ids=(whole[3],)))
    assert group[0].ids == whole and group[0].finished  # at its very last token


def test_a_stop_string_ends_a_completion_and_the_server_is_left(start: Start, tmp_path: Path) -> None:
    generator = start(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    whole = [expected(p, 0, 29) for p in PROMPTS]
    groups = generator.generate(PROMPTS, Sampling(29, stop_strings=(f"{whole[0][1]}><{whole[0][2]}>",)))
    assert groups[0][0].ids == whole[0][:3] and groups[0][0].finished and len(groups[0][0].logprobs) == 3
    assert groups[1][0].ids == whole[1] and not groups[1][0].finished
    until = time.monotonic() + 5
    while not any(each.get("hung_up") for each in asked(tmp_path / "server")) and time.monotonic() < until:
        time.sleep(0.02)
    assert any(each.get("hung_up") for each in asked(tmp_path / "server"))


def test_weights_go_through_files_that_do_not_stay(start: Start, tmp_path: Path) -> None:
    generator = start(vllm={"bucket_mib": 1})
    sent = [each for each in asked(tmp_path / "server") if "loaded" in each]
    assert sorted(name for each in sent for name in each["loaded"]) == sorted(disk_shapes(MODEL))
    assert {each["mode"] for each in sent} == {"0o700"}
    assert sorted(p.name for p in generator.server.folder.iterdir()) == ["model", "server.log"]
    calls = [each["method"] for each in requests(tmp_path, "/collective_rpc")]
    assert calls == ["llmtrain_begin", "llmtrain_load", "llmtrain_finish"]
    routes = [each["route"] for each in asked(tmp_path / "server") if "route" in each]
    assert routes[-2:] == ["/reset_prefix_cache", "/update_weight_version"]
    generator.close()
    assert not generator.server.folder.exists()


def test_a_bucket_holds_no_more_than_it_may(start: Start) -> None:
    generator = start(loaded=False, vllm={"bucket_mib": 1})
    half, large = torch.zeros(2**17), torch.zeros(2**19)
    named = [("a", half), ("b", half), ("c", half), ("d", large), ("e", half)]
    assert [list(bucket) for bucket in generator._buckets(named)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_shared_memory_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm.shutil, "disk_usage", lambda folder: type("U", (), {"free": 3 * 2**20}))
    vllm.check_room(tmp_path, 2 * 2**20)
    with pytest.raises(OSError, match=r"has 3 MiB free.*files of 3 MiB.*lower rollout.vllm.bucket_mib"):
        vllm.check_room(tmp_path, 2 * 2**20 + 1)


def test_weights_that_do_not_fit_leave_nothing_to_sample_from(start: Start) -> None:
    generator, weights = start(), random_decoder(MODEL).state_dict()
    for wrong, fault in [
        ({"embed.weight": torch.zeros(3, 3)}, r"embed.weight \[3, 3\]"),
        ({"no.such": torch.zeros(1)}, "no.such"),
    ]:
        with pytest.raises(ValueError, match=fault):
            generator.load_weights({**weights, **wrong}.items(), 2)
    with pytest.raises(ValueError, match=r"missing"):
        generator.load_weights(list(weights.items())[:-3], 2)
    with pytest.raises(RuntimeError, match="no weights"):
        generator.generate(PROMPTS, Sampling(4))
    generator.load_weights(weights.items(), 2)
    assert generator.generate(PROMPTS, Sampling(4))[0][0].versions == [2] * 4


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"missing": ["lm_head.weight"]}, "weights are missing there: lm_head.weight"),
        ({"answers": {"/reset_prefix_cache": [{"success": False}]}}, "keeps what it computed with old weights"),
        ({"answers": {"/collective_rpc": [{}, 500]}}, "status 500"),
    ],
)
def test_an_update_that_fails_there_is_an_error(start: Start, tmp_path: Path, how: Any, fault: str) -> None:
    generator = start(loaded=False)
    (tmp_path / "server" / "how.json").write_text(json.dumps(how))
    with pytest.raises(ServerFault, match=fault):
        generator.load_weights(random_decoder(MODEL).state_dict().items(), 1)
    with pytest.raises(RuntimeError, match="no weights"):
        generator.generate(PROMPTS, Sampling(4))


def test_a_stale_version_is_caught(start: Start, tmp_path: Path) -> None:
    generator = start(decode=str)
    (tmp_path / "server" / "how.json").write_text(json.dumps({"label": "0", "version": "0"}))
    with pytest.raises(ServerFault, match=r"weights of version .*'0'.*, not 1"):
        generator.generate(PROMPTS, Sampling(4))
    generator = start(decode=str)
    (tmp_path / "server" / "how.json").write_text(json.dumps({"version": "0"}))
    with pytest.raises(ServerFault, match=r"weights of version .*'0'.*, not 1"):
        generator.generate(PROMPTS, Sampling(4, stop_strings=("x",)))
    plain = start()
    (tmp_path / "server" / "how.json").write_text(json.dumps({"unnamed": True, "version": "0"}))
    with pytest.raises(ServerFault, match=r"weights of version .*'0'.*, not 1"):  # answers that name none
        plain.generate(PROMPTS, Sampling(4))


def choice(**changed: Any) -> dict[str, Any]:
    content = [{"token_id": 5, "logprob": -0.5}, {"token_id": 9, "logprob": 0.0}]
    return {"index": 0, "token_ids": [5, 9], "finish_reason": "length", "logprobs": {"content": content}, **changed}


def test_a_choice_is_read() -> None:
    assert vllm_answers.read_choice(choice(), 10) == vllm_answers.Said([5, 9], [-0.5, 0.0], "length")


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": [5, 97]},
        {"token_ids": [5, True]},
        {"token_ids": None},
        {"logprobs": None},
        {"logprobs": {"content": [{"token_id": 5, "logprob": -0.5}]}},
        {"logprobs": {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 8, "logprob": -0.5}]}},
        {"logprobs": {"content": [{"token_id": 5, "logprob": 0.5}, {"token_id": 9, "logprob": -0.5}]}},
        {"logprobs": {"content": [{"token_id": 5, "logprob": None}, {"token_id": 9, "logprob": -0.5}]}},
    ],
)
def test_a_choice_that_lacks_something_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(vllm_answers.BadAnswer):
        vllm_answers.read_choice(choice(**wrong), 97)


def test_logits_that_are_not_finite_are_said_as_native_says_it() -> None:
    content = [{"token_id": 5, "logprob": -9999.0}, {"token_id": 9, "logprob": -0.5}]
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        vllm_answers.read_choice(choice(logprobs={"content": content}), 97)


@pytest.mark.parametrize(
    "answer", [{}, [], {"choices": [{"index": 1}]}, {"choices": [{"index": 0}] * 2}, {"choices": [7]}]
)
def test_an_answer_without_its_choices_is_refused(answer: Any) -> None:
    with pytest.raises(vllm_answers.BadAnswer):
        vllm_answers.in_order(answer, 1)


@pytest.mark.parametrize("lines", [[b"data: {"], [b"event: x"], [], [b'data: {"error": {}}']])
def test_a_stream_that_breaks_off_is_refused(lines: list[bytes]) -> None:
    with pytest.raises(vllm_answers.BadAnswer):
        list(vllm_answers.choices_of(lines))


def test_what_the_answer_ends_with_must_fit(start: Start, tmp_path: Path) -> None:
    generator = start()
    cut = {"choices": [choice(weight_versions=[{"version": "1"}])]}
    (tmp_path / "server" / "how.json").write_text(json.dumps({"answers": {vllm.GENERATE: [cut]}}))
    with pytest.raises(ServerFault, match="2 tokens of 4 that do not end with a stop token"):
        generator.generate(PROMPTS[:1], Sampling(4))


def test_what_vllm_cannot_do_is_refused(start: Start) -> None:
    plain = start(max_batch_seqs=8)
    for sampling, fault in [
        (Sampling(4, temperature=0.005), "at least 0.01"),
        (Sampling(4, temperature=0.5, top_p=0.9), "must be 0 or 1 with top_p or top_k"),
        (Sampling(4, top_k=5), "started without truncation"),
    ]:
        with pytest.raises(ValueError, match=fault):
            plain.generate(PROMPTS, sampling)
    with pytest.raises(ValueError, match=r"prompt 1 has 0 tokens"):
        plain.generate([PROMPTS[0], Prompt([])], Sampling(4))
    truncated = start(top_k=5)
    assert "raw_logprobs" in truncated._arguments() and "processed_logprobs" in plain._arguments()
    truncated.generate(PROMPTS, Sampling(4, top_k=5))
    truncated.generate(PROMPTS, Sampling(4, temperature=0))
    with pytest.raises(ValueError, match="started for temperature 1"):
        truncated.generate(PROMPTS, Sampling(4, temperature=0.5))


def test_checksums_are_refused(start: Start) -> None:
    with pytest.raises(ValueError, match=r"rollout.verify=checksum: not with .*; use probe"):
        start(loaded=False).checksums()


def test_sleep_on_a_cpu_keeps_the_server_as_it_is(start: Start, tmp_path: Path) -> None:
    generator = start()
    generator.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        generator.generate(PROMPTS, Sampling(4))
    generator.wake()
    generator.generate(PROMPTS, Sampling(4))
    assert requests(tmp_path, "/sleep") == []


def test_on_a_gpu_weights_wake_before_the_cache(start: Start, tmp_path: Path) -> None:
    generator = start(device="cuda")
    assert "--enable-sleep-mode" in generator._arguments() and "--enforce-eager" not in generator._arguments()
    weights = random_decoder(MODEL).state_dict()
    generator.sleep()
    generator.sleep()
    generator.load_weights(weights.items(), 2)
    generator.wake()
    generator.generate(PROMPTS[:1], Sampling(4))
    routes = [each["route"] for each in asked(tmp_path / "server") if "route" in each]
    memory = [r for r in routes if r.startswith(("/sleep", "/wake", "/inference")) or r == "/reset_prefix_cache"]
    assert memory[-5:] == [
        "/sleep",
        "/wake_up?tags=weights",
        "/reset_prefix_cache",
        "/wake_up?tags=kv_cache",
        vllm.GENERATE,
    ]


@pytest.mark.parametrize(
    ("ours", "device", "seen"),
    [("2,5", "cpu", "2,5"), ("2,5", "cuda:1", "5"), ("2,5", "cuda", "2"), (None, "cuda:3", "3")],
)
def test_a_server_sees_the_gpu_of_its_rank_alone(
    ours: str | None, device: str, seen: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if ours is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    start(loaded=False, device=device)
    (said,) = (each for each in asked(tmp_path / "server") if "arguments" in each)
    assert said["environment"]["CUDA_VISIBLE_DEVICES"] == seen


def test_the_server_gets_a_secret_and_nothing_of_ours(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "WANDB_API_KEY",
        "PYTHONHOME",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
    ):
        monkeypatch.setenv(name, "1")
    generator = start(loaded=False, tp=2)
    (said,) = (each for each in asked(tmp_path / "server") if "arguments" in each)
    environment, arguments = said["environment"], " ".join(said["arguments"])
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "WANDB_API_KEY", "PYTHONHOME"}
    assert environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
    token = environment["VLLM_API_KEY"]
    assert len(token) > 40 and token not in arguments and "--host 127.0.0.1" in arguments
    assert "--tensor-parallel-size 2" in arguments and "--load-format dummy" in arguments
    assert said["folder"] == str(generator.server.folder)  # nothing of the user's folder is imported there
    lines = psutil.Process(generator.server.keeper.pid).cmdline()
    assert token not in " ".join(lines)


def test_a_server_that_ends_at_its_start_is_named_with_its_log(start: Start) -> None:
    with pytest.raises(
        ServerFault, match=r"ended with exit code 3.*it ended while it started[\s\S]*this cannot work: \*\*\*"
    ):
        start(how={"exit": 3})


def test_a_server_that_never_starts_is_given_up(start: Start) -> None:
    began = time.monotonic()
    with pytest.raises(ServerFault, match=r"did not answer within rollout.vllm.start_s=1"):
        start(how={"start_s": 60}, vllm={"start_s": 1})
    assert time.monotonic() - began < 10


def server_process(generator: VllmGenerator) -> psutil.Process:
    (child,) = psutil.Process(generator.server.keeper.pid).children()
    return child


def test_a_killed_server_is_noticed_at_once(start: Start) -> None:
    generator = start(how={"wait_s": {vllm.GENERATE: 60}})
    process = server_process(generator)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    began = time.monotonic()
    with pytest.raises(ServerFault, match=r"the vLLM server at http://127.0.0.1:\d+"):
        generator.generate(PROMPTS, Sampling(4))
    assert time.monotonic() - began < 10
    killer.wait()
    with pytest.raises(ServerFault, match="has ended with exit code"):
        generator.generate(PROMPTS, Sampling(4))


def test_a_stopped_server_is_noticed_at_its_deadline(start: Start) -> None:
    generator = start(vllm={"answer_s": 1})
    process = server_process(generator)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(ServerFault, match="no answer until the deadline"):
        generator.generate(PROMPTS, Sampling(4))
    assert 0.9 < time.monotonic() - began < 15
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


OWNER = """
import sys, time
from llmtrain.config.vllm import VllmConfig
from llmtrain.rollout.vllm_server import VllmServer
server = VllmServer(VllmConfig(python=sys.argv[1]), {}, [], None)
server.ready()
print(server.keeper.pid, server.folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    python = interpreter(tmp_path / "server")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", OWNER, python], stdout=subprocess.PIPE, text=True, env=env) as owner:
        keeper, folder = owner.stdout.readline().split()
        keeper = psutil.Process(int(keeper))
        processes = [keeper, *keeper.children()]
        assert len(processes) == 2
        owner.send_signal(how)
    _, alive = psutil.wait_procs(processes, 10)
    assert not alive and not Path(folder).exists()


def test_a_killed_keeper_takes_the_server_along(start: Start) -> None:
    generator = start()
    process = server_process(generator)
    generator.server.keeper.kill()
    process.wait(10)
