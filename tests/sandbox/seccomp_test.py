"""The filter's program, run by a small interpreter of BPF, for both kinds of machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.sandbox import seccomp
from llmtrain.sandbox.seccomp import ABSENT, ALLOW, ALLOWED, ARCH, AUDIT_ARCH, KILL_PROCESS, NUMBER, REFUSE

MACHINES = ("x86_64", "aarch64")
PID = 4242
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def run(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Returns what the filter decides on a system call."""
    words = {NUMBER: number, ARCH: AUDIT_ARCH[machine] if arch is None else arch}
    for i, value in enumerate(arguments):
        words |= {16 + 8 * i: value & 0xFFFFFFFF, 20 + 8 * i: value >> 32}
    program, at, accumulator = seccomp.filter_for(machine, PID), 0, 0
    while True:
        code, true, false, value = program[at]
        at += 1
        if code == seccomp.RETURN:
            return value
        if code == seccomp.LOAD:
            accumulator = words.get(value, 0)
        else:
            holds = accumulator == value if code == seccomp.JUMP_EQUAL else accumulator >= value
            at += true if holds else false


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_the_table_pass_and_all_others_are_refused(machine: str) -> None:
    column = MACHINES.index(machine)
    passed = {numbers[column] for numbers in ALLOWED.values()} - {-1}
    conditional = {numbers[column] for numbers in (seccomp.IOCTL, seccomp.FCNTL, seccomp.PRLIMIT, seccomp.PRCTL)}
    for number in range(600):
        expected = ALLOW if number in passed else ABSENT if number == 435 else REFUSE
        if number not in conditional:
            assert run(machine, number, 1) == expected, number
    assert run(machine, 2**32 - 1) == KILL_PROCESS and run(machine, 0x40000000 | 39) == KILL_PROCESS


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_is_killed(machine: str) -> None:
    assert run(machine, 63, arch=0x40000003) == KILL_PROCESS  # i386


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide(machine: str) -> None:
    column = MACHINES.index(machine)
    ioctl, fcntl, prlimit, prctl = (
        numbers[column] for numbers in (seccomp.IOCTL, seccomp.FCNTL, seccomp.PRLIMIT, seccomp.PRCTL)
    )
    assert run(machine, ioctl, 0, 0x5401) == ALLOW and run(machine, ioctl, 0, 0x5412) == REFUSE  # TCGETS, TIOCSTI
    assert run(machine, fcntl, 0, 3) == ALLOW and run(machine, fcntl, 0, 8) == REFUSE  # F_GETFL, F_SETOWN
    assert run(machine, prctl, 15) == ALLOW and run(machine, prctl, 22) == REFUSE  # PR_SET_NAME, PR_SET_SECCOMP
    assert run(machine, prlimit, 0, 7, 0, 5) == ALLOW
    assert run(machine, prlimit, 0, 7, 5, 5) == REFUSE and run(machine, prlimit, 0, 7, 2**32, 5) == REFUSE
    assert run(machine, prlimit, 17, 7, 0, 5) == REFUSE
    for numbers in (seccomp.KILL, seccomp.TKILL, seccomp.TGKILL):
        assert run(machine, numbers[column], PID) == ALLOW
        assert run(machine, numbers[column], PID + 1) == run(machine, numbers[column], 2**32 - 1) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_system_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", HEADERS[machine].read_text())
    known = {name: int(number) for name, number in defined} | {"newfstatat": 79 if machine == "aarch64" else 262}
    column = MACHINES.index(machine)
    named = {"ioctl": seccomp.IOCTL, "fcntl": seccomp.FCNTL, "prlimit64": seccomp.PRLIMIT, "prctl": seccomp.PRCTL}
    named |= {"kill": seccomp.KILL, "tkill": seccomp.TKILL, "tgkill": seccomp.TGKILL, "clone3": seccomp.CLONE3}
    for name, numbers in {**ALLOWED, **named}.items():
        assert numbers[column] == known.get(name, -1), name
