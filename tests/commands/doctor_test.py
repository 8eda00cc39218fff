"""The doctor finds what is wrong and stays silent about what is not."""

from __future__ import annotations

import pytest

from llmtrain.commands import doctor

HEALTHY = {
    **dict.fromkeys(doctor.PACKAGES, "1.0"),
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "deepspeed": "0.19.8",
    "vllm": "",
    "backends": "gloo",
    "memory": "24.0 GiB",
    "free disk": "50.0 GiB",
    "host": "a 127.0.0.1",
    "sandbox": "Landlock 7, namespaces, seccomp",
}


def test_a_healthy_machine_has_no_problem() -> None:
    assert doctor.problems(HEALTHY) == []


@pytest.mark.parametrize(
    ("fact", "value", "problem"),
    [
        ("deepspeed", "", "deepspeed: is not installed; run `pip install"),
        ("deepspeed", "0.20.1", "deepspeed 0.20.1: 0.19.8 is tested; install"),
        ("torch", "2.15.0", "torch 2.15.0: 2.13. is tested"),
        ("backends", "nccl", "torch: was built without gloo"),
        ("host", "a unresolved", "host a unresolved: has no address; add it to /etc/hosts"),
        ("free disk", "1.2 GiB", "free disk 1.2 GiB: the quickstart needs 5 GiB"),
        ("sandbox", "none (no seccomp)", "sandbox none (no seccomp): rewards and code of a model do not run;"),
        ("memory", "2.0 GiB", "memory 2.0 GiB: the quickstart needs 4 GiB"),
    ],
)
def test_a_problem_has_value_and_remedy(fact: str, value: str, problem: str) -> None:
    (line,) = doctor.problems({**HEALTHY, fact: value})
    assert line.startswith(problem) and ";" in line


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    doctor.main()
    out = capsys.readouterr().out
    assert "W&B key" in out and "yes" in out and "secret" not in out
