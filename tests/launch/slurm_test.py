"""The Slurm scripts: their directives, their ports, and what happens when the time limit comes near."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "launch/slurm.sbatch", ROOT / "launch/rl.sbatch"]
JOB_ID = str(os.getpid())  # gives the port
IN_JOB = {
    "SLURM_JOB_ID": JOB_ID,
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_GPUS_ON_NODE": "2",
}


def directives(script: Path) -> argparse.Namespace:
    """The #SBATCH lines as sbatch reads them: only those before the first command, and only options it knows."""
    parser = argparse.ArgumentParser(prog=script.name, exit_on_error=False)
    for option in ("job-name", "time", "output", "open-mode", "signal"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("nodes", "ntasks-per-node", "gpus-per-node"):
        parser.add_argument(f"--{option}", required=True, type=int)
    for option in ("exclusive", "requeue"):
        parser.add_argument(f"--{option}", action="store_true")
    words: list[str] = []
    for line in script.read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            words += shlex.split(line.removeprefix("#SBATCH "))
    return parser.parse_args(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_directives(script: Path) -> None:
    options = directives(script)
    assert options.signal == "B:USR1@120" and options.requeue and options.open_mode == "append"
    assert options.ntasks_per_node == 1  # torchrun starts the ranks
    assert script.read_text().count("\n#SBATCH ") == len(vars(options))  # none hides behind a command


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Path:
    """A folder with `srun` and `scontrol` that write down how they are called. This srun starts its command on the
    spot, as one node, and like the real one hands on the signals it gets (it becomes the command)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(
        '#!/usr/bin/env bash\necho "srun $*" >>"$CALLS"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    (folder / "scontrol").write_text(
        '#!/usr/bin/env bash\necho "scontrol $*" >>"$CALLS"\n'
        'case "$1 $2" in "show hostnames") printf "node-a\\nnode-b\\n" ;; "show job") echo "JobState=$STATE" ;; esac\n'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    (tmp_path / "job.yaml").write_text("name: job\n")
    return folder


def job_environment(fake_slurm: Path, **env: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{fake_slurm}{os.pathsep}{os.environ['PATH']}"
    return plain | IN_JOB | {"PATH": path, "CALLS": str(fake_slurm.parent / "calls"), "STATE": "RUNNING"} | env


def dry(fake_slurm: Path, script: Path, *args: str, **env: str) -> list[str]:
    command = ["bash", script, "--dry-run", *args]
    environment = job_environment(fake_slurm, **env)
    done = subprocess.run(command, cwd=fake_slurm.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_one_torchrun_a_node(fake_slurm: Path) -> None:
    command = " ".join(dry(fake_slurm, SCRIPTS[0], "pretrain", "job.yaml", "seed=1"))
    assert command.startswith("srun --kill-on-bad-exit=1")
    assert "slurm_step.sh --nnodes 2 --master-addr node-a --master-port " in command
    assert command.endswith("pretrain job.yaml seed=1")


def test_runs_from_slurms_spool_folder(fake_slurm: Path, tmp_path: Path) -> None:
    spooled = tmp_path / "slurm_script"
    spooled.write_text(SCRIPTS[0].read_text())
    command = dry(fake_slurm, spooled, "pretrain", "job.yaml", SLURM_SUBMIT_DIR=str(ROOT))
    assert str(ROOT / "launch/slurm_step.sh") in command
    lost = ["bash", spooled, "--dry-run", "pretrain", "job.yaml"]
    done = subprocess.run(lost, cwd=tmp_path, env=job_environment(fake_slurm), capture_output=True, text=True)
    assert done.returncode == 2 and "submit from the project's root" in done.stderr


def test_array_tasks_have_their_own_port_and_run(fake_slurm: Path) -> None:
    def task(job: int, number: int) -> list[str]:
        env = {"SLURM_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(number)}
        return dry(fake_slurm, SCRIPTS[0], "pretrain", "job.yaml", "name=lr", "seed={task}", **env)

    commands = [task(job, number) for job, number in ((4711, 0), (4711, 1), (4712, 0), (4712, 1), (4713, 2))]
    ports = [int(command[command.index("--master-port") + 1]) for command in commands]
    assert len(set(ports)) == len(ports) and all(12000 <= port < 32768 for port in ports)
    assert commands[1][-5:] == ["pretrain", "job.yaml", "name=lr", "seed=1", "name=lr-1"]


@pytest.mark.parametrize(
    ("document", "arguments", "expected"),
    [
        ("", ["run_dir=rd"], ["run_dir=rd", "name=job-3", "run_dir=rd-3"]),
        ("", ["run_dir=rd/"], ["run_dir=rd/", "name=job-3", "run_dir=rd-3"]),
        ("", ["run_dir=a", "run_dir=b/{task}"], ["run_dir=a", "run_dir=b/3", "name=job-3"]),
        ("run_dir: rd\n", [], ["name=job-3", "run_dir=rd-3"]),
        ("run_dir: 'r d'   # where\n", ["seed=1"], ["seed=1", "name=job-3", "run_dir=r d-3"]),
        ("run_dir: rd\n", ["run_dir=other"], ["run_dir=other", "name=job-3", "run_dir=other-3"]),
        ("run_dir: null\n", [], ["name=job-3"]),
        ("model:\n  run_dir: not at the top\n", [], ["name=job-3"]),
    ],
)
def test_array_tasks_with_a_run_dir_have_their_own(
    fake_slurm: Path, document: str, arguments: list[str], expected: list[str]
) -> None:
    (fake_slurm.parent / "job.yaml").write_text("name: job\n" + document)
    command = dry(fake_slurm, SCRIPTS[0], "pretrain", "job.yaml", *arguments, SLURM_ARRAY_TASK_ID="3")
    assert command[command.index("job.yaml") + 1 :] == expected


def test_rollout_workers_are_part_of_the_job(fake_slurm: Path) -> None:
    assert dry(fake_slurm, SCRIPTS[1], "grpo", "job.yaml")[-2:] == ["rollout.placement=separate", "rollout.workers=1"]
    assert dry(fake_slurm, SCRIPTS[1], "--workers", "3", "grpo", "job.yaml")[-1] == "rollout.workers=3"


SAVES_ON_SIGNAL = """
import os, pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1)  # a checkpoint takes time: the job must wait for it
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"rank {os.environ['RANK']} saved\\n")
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(100)
"""


def start_job(fake_slurm: Path, **env: str) -> subprocess.Popen[str]:
    folder = fake_slurm.parent
    (folder / "llmtrain").mkdir()
    (folder / "llmtrain" / "__main__.py").write_text(SAVES_ON_SIGNAL)
    env = job_environment(fake_slurm, SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="", **env)
    return subprocess.Popen(["bash", SCRIPTS[0], "pretrain", "job.yaml"], cwd=folder, env=env)


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_a_checkpoint_and_a_place_in_the_queue(fake_slurm: Path, number: signal.Signals) -> None:
    """From the batch script through srun and torchrun to the ranks of llmtrain (a stand-in), and back."""
    job = start_job(fake_slurm)
    wait_until(lambda: all((fake_slurm.parent / f"ready-{rank}").exists() for rank in range(2)), job)
    job.send_signal(number)
    assert job.wait(100) == 0
    calls = (fake_slurm.parent / "calls").read_text().splitlines()
    assert calls[0].startswith("srun ")
    assert sorted(calls[1:3]) == ["rank 0 saved", "rank 1 saved"]
    assert calls[3:] == [f"scontrol show job {JOB_ID}", f"scontrol requeue {JOB_ID}"]


SRUN_THAT_WAITS = """#!/usr/bin/env bash
trap 'exit 3' USR1
echo "srun $*" >>"$CALLS"
while true; do sleep 0.1; done
"""


def test_a_cancelled_job_is_not_queued_again(fake_slurm: Path) -> None:
    (fake_slurm / "srun").write_text(SRUN_THAT_WAITS)
    job = start_job(fake_slurm, STATE="CANCELLED")
    wait_until((fake_slurm.parent / "calls").exists, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(100) == 3
    assert "requeue" not in (fake_slurm.parent / "calls").read_text()


def test_a_failed_run_is_not_queued_again(fake_slurm: Path) -> None:
    (fake_slurm / "srun").write_text('#!/usr/bin/env bash\necho "srun $*" >>"$CALLS"\nexit 3\n')
    assert start_job(fake_slurm).wait(100) == 3
    assert "requeue" not in (fake_slurm.parent / "calls").read_text()
