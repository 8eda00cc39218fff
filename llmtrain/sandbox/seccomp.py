"""Filters system calls: a program in classic BPF lets through what computing needs, and refuses the rest.

Numbers are those of Linux's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import errno
import struct

from llmtrain.sandbox import kernel

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # SECCOMP_RET_*
REFUSE, ABSENT = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, |JGE|K, BPF_RET|K
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # numbers of x86_64's second ABI start here

# (x86_64, aarch64); -1 = not there. Neither processes nor threads, sockets, signals to others, changes of limits, of
# owners, modes or times of files, nor anything with which the kernel acts later or elsewhere (io_uring, timers, aio).
ALLOWED = {
    # descriptors and files; which ones can be opened is decided by Landlock and the root folder
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67)},
    **{"pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "open": (2, -1), "openat": (257, 56)},
    **{"close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "stat": (4, -1), "fstat": (5, 80)},
    **{"lstat": (6, -1), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, -1), "faccessat": (269, 48)},
    **{"faccessat2": (439, 439), "readlink": (89, -1), "readlinkat": (267, 78), "getdents": (78, -1)},
    **{"getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, -1)},
    **{"mkdirat": (258, 34), "rmdir": (84, -1), "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1)},
    **{"renameat": (264, 38), "renameat2": (316, 276), "link": (86, -1), "linkat": (265, 37), "symlink": (88, -1)},
    **{"symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46), "fsync": (74, 82)},
    **{"fdatasync": (75, 83), "fallocate": (285, 47), "fadvise64": (221, 223), "umask": (95, 166), "dup": (32, 23)},
    **{"dup2": (33, -1), "dup3": (292, 24), "pipe": (22, -1), "pipe2": (293, 59), "poll": (7, -1), "ppoll": (271, 73)},
    **{"select": (23, -1), "pselect6": (270, 72), "epoll_create": (213, -1), "epoll_create1": (291, 20)},
    **{"epoll_ctl": (233, 21), "epoll_wait": (232, -1), "epoll_pwait": (281, 22), "eventfd2": (290, 19)},
    **{"copy_file_range": (326, 285), "sendfile": (40, 71), "statfs": (137, 43), "fstatfs": (138, 44)},
    # memory
    **{"mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233)},
    **{"brk": (12, 214), "msync": (26, 227)},
    # own signals and time
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136)},
    **{"rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "alarm": (37, -1)},
    **{"setitimer": (38, 103), "getitimer": (36, 102), "pause": (34, -1), "nanosleep": (35, 101)},
    **{"clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    **{"gettimeofday": (96, 169), "time": (201, -1), "times": (100, 153)},
    # what the process is, and its end
    **{"getrusage": (98, 165), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174)},
    **{"geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158)},
    **{"getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, -1), "getpgid": (121, 155)},
    **{"getsid": (124, 156), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168)},
    **{"getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179), "getrlimit": (97, 163)},
    **{"arch_prctl": (158, -1), "set_tid_address": (218, 96), "set_robust_list": (273, 99), "futex": (202, 98)},
    **{"rseq": (334, 293), "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128)},
    **{"wait4": (61, 260), "waitid": (247, 95)},
}
IOCTL, FCNTL, PRLIMIT, PRCTL = (16, 29), (72, 25), (302, 261), (157, 167)
KILL, TKILL, TGKILL, CLONE3 = (62, 129), (200, 130), (234, 131), (435, 435)
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: not F_SETOWN
# and F_SETSIG, which send signals to others
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
PRCTLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME

Instruction = tuple[int, int, int, int]
"""(code, instructions to jump if true, if false, value) of BPF."""


def available() -> bool:
    """Says whether the kernel takes filters on this kind of machine."""
    if kernel.MACHINE not in AUDIT_ARCH:
        return False
    ctypes.set_errno(0)
    kernel.libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)  # no program: EFAULT where filters exist
    return ctypes.get_errno() == errno.EFAULT


def install(pid: int) -> None:
    """Puts this process, whose id is `pid`, under the filter for good. Raises OSError.

    It needs PR_SET_NO_NEW_PRIVS, and holds for the calling thread and what comes from it.
    """
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in filter_for(kernel.MACHINE, pid))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    kernel.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)


def filter_for(machine: str, pid: int) -> list[Instruction]:
    """Returns the program for a kind of machine, `x86_64` or `aarch64`."""
    column = ("x86_64", "aarch64").index(machine)
    program: list[Instruction] = [
        *[(LOAD, 0, 0, ARCH), (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS)],
        *[(LOAD, 0, 0, NUMBER), (JUMP_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL_PROCESS)],
    ]
    for numbers in ALLOWED.values():
        if numbers[column] >= 0:
            program += [(JUMP_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    program += _if(CLONE3[column], [(RETURN, 0, 0, ABSENT)])  # libc then uses clone, which is refused
    for numbers, argument, values in ((IOCTL, 1, IOCTLS), (FCNTL, 1, FCNTLS), (PRCTL, 0, PRCTLS)):
        program += _if(numbers[column], _one_of(argument, values))
    for numbers in (KILL, TKILL, TGKILL):
        program += _if(numbers[column], _one_of(0, (pid,)))
    program += _if(PRLIMIT[column], _reads_own_limit())
    return [*program, (RETURN, 0, 0, REFUSE)]


def _if(number: int, body: list[Instruction]) -> list[Instruction]:
    """Returns the instructions that go through `body`, which returns, for one system call."""
    return [(JUMP_EQUAL, 0, len(body), number), *body]


def _low(argument: int) -> Instruction:
    """Returns the load of the lower 32 bits of an argument (both kinds of machines are little-endian)."""
    return (LOAD, 0, 0, ARGUMENTS + 8 * argument)


def _high(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS + 8 * argument + 4)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Returns a body that allows the call if the lower half of an argument (an int in C) has one of the values."""
    tests = [each for value in values for each in ((JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [_low(argument), *tests, (RETURN, 0, 0, REFUSE)]


def _reads_own_limit() -> list[Instruction]:
    """Returns a body that allows prlimit64(0, which, NULL, old) alone."""
    zeros = [_low(0), _low(2), _high(2)]
    tests = [each for load in zeros for each in (load, (JUMP_EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE))]
    return [*tests, (RETURN, 0, 0, ALLOW)]
