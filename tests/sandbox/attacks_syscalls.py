"""System calls that a sandboxed program may not make, by their numbers on x86_64, through ctypes."""

# ruff: noqa: RUF005  lists that continue on a second line

from __future__ import annotations

from tests.sandbox.attack import PREAMBLE, Attack

CALLS = {  # name -> (number, arguments in Python); several arguments of one call are several attempts
    # processes
    "clone": (56, ["17, 0, 0, 0, 0", "0x11200 | 17, 0, 0, 0, 0", "0x10000000 | 17, 0, 0, 0, 0"]),
    "fork": (57, [""]),
    "vfork": (58, [""]),
    "clone3": (435, ["bytes(64), 64"]),
    "execve": (59, ["b'/bin/true', 0, 0", "b'/usr/bin/python3', 0, 0"]),
    "execveat": (322, ["-100, b'/bin/true', 0, 0, 0", "0, b'', 0, 0, 0x1000"]),
    "setsid": (112, [""]),
    "setpgid": (109, ["0, 0"]),
    "personality": (135, ["0x0040000", "0xffffffff"]),
    # other processes
    "ptrace": (101, ["0, 0, 0, 0", "16, os.getppid(), 0, 0", "0x4206, os.getppid(), 0, 0", "16, $pid, 0, 0"]),
    "process_vm_readv": (310, ["os.getppid(), 0, 0, 0, 0, 0", "$pid, 0, 0, 0, 0, 0"]),
    "process_vm_writev": (311, ["os.getppid(), 0, 0, 0, 0, 0", "$pid, 0, 0, 0, 0, 0"]),
    "process_madvise": (440, ["0, 0, 0, 0, 0"]),
    "process_mrelease": (448, ["0, 0"]),
    "pidfd_open": (434, ["os.getppid(), 0", "$pid, 0", "1, 0"]),
    "pidfd_getfd": (438, ["0, 0, 0"]),
    "pidfd_send_signal": (424, ["0, 9, 0, 0"]),
    "kcmp": (312, ["os.getpid(), os.getppid(), 0, 0, 0"]),
    "get_robust_list": (274, ["$pid, 0, 0"]),
    "move_pages": (279, ["$pid, 0, 0, 0, 0, 0"]),
    "migrate_pages": (256, ["$pid, 0, 0, 0"]),
    "rt_sigqueueinfo": (129, ["$pid, 10, 0", "os.getppid(), 10, 0"]),
    "rt_tgsigqueueinfo": (297, ["$pid, $pid, 10, 0"]),
    "kill": (62, ["-1, 10", "0, 10", "1, 9", "os.getppid(), 9", "$pid, 10", "$us, 0", "-os.getppid() or -7, 15"]),
    "tkill": (200, ["os.getppid() or 1, 10", "$pid, 10"]),
    "tgkill": (234, ["os.getppid() or 1, os.getppid() or 1, 10", "$pid, $pid, 10"]),
    # sockets
    "socket": (
        41,
        ["1, 1, 0", "1, 2, 0", "2, 1, 0", "2, 2, 0", "2, 3, 1", "10, 1, 0", "10, 3, 58", "16, 3, 0", "17, 3, 3"]
        + ["38, 5, 0", "40, 1, 0", "29, 3, 1", "15, 3, 2", "21, 5, 0", "30, 1, 0", "31, 3, 1", "44, 3, 0"],
    ),
    "socketpair": (53, ["1, 1, 0, bytes(8)"]),
    "connect": (42, ["0, bytes(16), 16", "3, bytes(16), 16"]),
    "bind": (49, ["0, bytes(16), 16"]),
    "listen": (50, ["0, 1"]),
    "accept": (43, ["0, 0, 0"]),
    "accept4": (288, ["0, 0, 0, 0"]),
    "sendto": (44, ["0, b'x', 1, 0, 0, 0"]),
    "sendmsg": (46, ["0, bytes(56), 0"]),
    "sendmmsg": (307, ["0, bytes(64), 1, 0"]),
    "recvfrom": (45, ["0, bytes(8), 8, 0, 0, 0"]),
    "recvmsg": (47, ["0, bytes(56), 0"]),
    "setsockopt": (54, ["0, 1, 2, bytes(4), 4"]),
    # asynchronous and indirect work of the kernel
    "io_uring_setup": (425, ["8, bytes(120)"]),
    "io_uring_enter": (426, ["0, 1, 1, 0, 0, 0"]),
    "io_uring_register": (427, ["0, 0, 0, 0"]),
    "io_setup": (206, ["8, bytes(8)"]),
    "io_submit": (209, ["0, 0, 0"]),
    "bpf": (321, ["0, bytes(72), 72", "5, bytes(72), 72"]),
    "perf_event_open": (298, ["bytes(120), 0, -1, -1, 0", "bytes(120), -1, 0, -1, 0"]),
    "userfaultfd": (323, ["0", "1"]),
    "timerfd_create": (283, ["1, 0"]),
    "timer_create": (222, ["1, 0, bytes(8)"]),
    "signalfd4": (289, ["-1, bytes(8), 8, 0"]),
    "inotify_init1": (294, ["0"]),
    "fanotify_init": (300, ["0, 0"]),
    "splice": (275, ["0, 0, 3, 0, 1, 0"]),
    "tee": (276, ["0, 3, 1, 0"]),
    "vmsplice": (278, ["3, 0, 0, 0"]),
    # memory outside the bound
    "memfd_create": (319, ["b'pwned', 0", "b'pwned', 1"]),
    "memfd_secret": (447, ["0"]),
    "shmget": (29, ["0x70776e64, 4096, 0o1600", "0, 2**30, 0o1600"]),
    "shmat": (30, ["0, 0, 0"]),
    "semget": (64, ["0x70776e64, 1, 0o1600"]),
    "msgget": (68, ["0x70776e64, 0o1600"]),
    "mq_open": (240, ["b'pwned', 0o102, 0o600, 0"]),
    "mq_unlink": (241, ["b'pwned'"]),
    "mlock": (149, ["0, 4096"]),
    "mlockall": (151, ["1"]),
    "mbind": (237, ["0, 4096, 0, 0, 0, 0"]),
    "remap_file_pages": (216, ["0, 4096, 0, 0, 0"]),
    "pkey_alloc": (330, ["0, 0"]),
    # namespaces and mounts
    "unshare": (272, ["0x10000000", "0x20000", "0x20000000", "0x40000000", "0x8000000", "0x4000000", "0x80", "0x400"]),
    "setns": (308, ["0, 0", "0, 0x40000000"]),
    "mount": (165, ["b'none', b'/', b'tmpfs', 0, 0", "b'none', b'/', b'proc', 0, 0", "b'none', b'/', 0, 32, 0"]),
    "umount2": (166, ["b'/', 2", "b'/scratch', 2"]),
    "pivot_root": (155, ["b'.', b'.'"]),
    "chroot": (161, ["b'.'", "b'/'"]),
    "fsopen": (430, ["b'tmpfs', 0"]),
    "fsconfig": (431, ["0, 0, 0, 0, 0"]),
    "fsmount": (432, ["0, 0, 0"]),
    "fspick": (433, ["-100, b'/', 0"]),
    "open_tree": (428, ["-100, b'/', 1"]),
    "move_mount": (429, ["0, b'', -100, b'/', 4"]),
    "mount_setattr": (442, ["-100, b'/', 0x8000, bytes(32), 32"]),
    "statmount": (457, ["0, 0, 0, 0"]),
    "listmount": (458, ["0, 0, 0, 0"]),
    # files past their paths
    "open_by_handle_at": (304, ["0, bytes(16), 0"]),
    "name_to_handle_at": (303, ["-100, b'/', bytes(16), bytes(8), 0"]),
    "openat2": (437, ["-100, b'$secret', bytes(24), 24"]),
    "mknod": (133, ["b'pwned', 0o10600, 0", "b'pwned', 0o20600, 0x103", "b'pwned', 0o60600, 0x800"]),
    "mknodat": (259, ["-100, b'pwned', 0o140600, 0"]),
    "chmod": (90, ["b'$secret', 0o777"]),
    "fchmod": (91, ["0, 0o777"]),
    "fchmodat": (268, ["-100, b'$secret', 0o4777"]),
    "fchmodat2": (452, ["-100, b'$secret', 0o777, 0"]),
    "chown": (92, ["b'$secret', 1, 1"]),
    "lchown": (94, ["b'$secret', 1, 1"]),
    "fchown": (93, ["0, 1, 1"]),
    "fchownat": (260, ["-100, b'$secret', 1, 1, 0"]),
    "utime": (132, ["b'$secret', 0"]),
    "utimes": (235, ["b'$secret', 0"]),
    "futimesat": (261, ["-100, b'$secret', 0"]),
    "utimensat": (280, ["-100, b'$secret', 0, 0"]),
    "setxattr": (188, ["b'$secret', b'user.pwned', b'x', 1, 0"]),
    "lsetxattr": (189, ["b'$secret', b'user.pwned', b'x', 1, 0"]),
    "fsetxattr": (190, ["0, b'user.pwned', b'x', 1, 0"]),
    "removexattr": (197, ["b'$secret', b'user.pwned'"]),
    "flock": (73, ["0, 2"]),
    "quotactl": (179, ["0, 0, 0, 0"]),
    "swapon": (167, ["b'/swap', 0"]),
    "swapoff": (168, ["b'/swap'"]),
    "sync": (162, [""]),
    "syncfs": (306, ["0"]),
    # rights
    "setuid": (105, ["0", "65534"]),
    "setgid": (106, ["0"]),
    "setreuid": (113, ["0, 0"]),
    "setresuid": (117, ["0, 0, 0"]),
    "setresgid": (119, ["0, 0, 0"]),
    "setgroups": (116, ["0, 0"]),
    "setfsuid": (122, ["0"]),
    "capset": (126, ["(ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)"]),
    "prctl": (
        157,
        ["1, 0, 0, 0, 0", "4, 1, 0, 0, 0", "8, 1, 0, 0, 0", "22, 0, 0, 0, 0", "24, 0, 0, 0, 0", "28, 0, 0, 0, 0"]
        + ["35, 1, 0, 0, 0", "36, 1, 0, 0, 0", "47, 2, 0, 0, 0", "0x59616d61, $pid, 0, 0, 0"],
    ),
    "seccomp": (317, ["1, 0, 0", "0, 0, 0"]),
    "landlock_create_ruleset": (444, ["bytes(8), 8, 0"]),
    "landlock_restrict_self": (446, ["0, 0"]),
    "add_key": (248, ["b'user', b'pwned', b'x', 1, -3"]),
    "request_key": (249, ["b'user', b'pwned', 0, -3"]),
    "keyctl": (250, ["0, -3, 0, 0, 0", "1, b'pwned', 0, 0, 0"]),
    # limits and scheduling
    "setrlimit": (160, ["9, (ctypes.c_uint64 * 2)(2**63, 2**63)", "0, (ctypes.c_uint64 * 2)(2**63, 2**63)"]),
    "prlimit64": (
        302,
        [
            "0, 9, (ctypes.c_uint64 * 2)(2**63, 2**63), 0",
            "$pid, 7, (ctypes.c_uint64 * 2)(3, 3), 0",
            "$us, 9, 0, bytes(16)",
        ]
        + ["os.getppid() or 1, 0, (ctypes.c_uint64 * 2)(1, 1), 0"],
    ),
    "setpriority": (141, ["0, 0, -20", "0, $pid, 19"]),
    "ioprio_set": (251, ["1, 0, 0"]),
    "sched_setaffinity": (203, ["$pid, 8, bytes([1] + [0] * 7)"]),
    "sched_setscheduler": (144, ["0, 1, bytes(4)"]),
    "sched_setattr": (314, ["0, bytes(48), 0"]),
    "setitimer of another ABI": (0x40000000 | 38, ["0, 0, 0"]),
    "getpid of another ABI": (0x40000000 | 39, [""]),
    # the machine
    "reboot": (169, ["0, 0, 0, 0", "0xfee1dead, 672274793, 0, 0"]),
    "kexec_load": (246, ["0, 0, 0, 0"]),
    "init_module": (175, ["0, 0, b''"]),
    "finit_module": (313, ["0, b'', 0"]),
    "delete_module": (176, ["b'pwned', 0"]),
    "iopl": (172, ["3"]),
    "ioperm": (173, ["0, 1, 1"]),
    "modify_ldt": (154, ["0, 0, 0"]),
    "acct": (163, ["0"]),
    "syslog": (103, ["3, bytes(8), 8", "5, 0, 0"]),
    "sethostname": (170, ["b'pwned', 5"]),
    "setdomainname": (171, ["b'pwned', 5"]),
    "settimeofday": (164, ["bytes(16), 0"]),
    "clock_settime": (227, ["0, bytes(16)"]),
    "adjtimex": (159, ["bytes(208)"]),
    "clock_adjtime": (305, ["0, bytes(208)"]),
    "vhangup": (153, [""]),
    "ustat": (136, ["0, bytes(32)"]),
    "uselib": (134, ["b'$secret'"]),
    "a number that no kernel has": (999, [""]),
    "the highest number": (2**31 - 1, [""]),
}
ALLOWED_ERRORS = (1, 38)  # EPERM, ENOSYS: any other would come from the kernel's own code of the call

SYSCALLS = [
    Attack(
        f"system call {name}({arguments})",
        f"{PREAMBLE}"
        f"try:\n    syscall({', '.join(filter(None, [str(number), arguments]))})\n"
        f"except OSError as error:\n    if error.errno not in {ALLOWED_ERRORS}: print('DONE', error)\n    raise\n"
        "print('DONE')\n",
    )
    for name, (number, variants) in CALLS.items()
    for arguments in variants
]

MACHINE_CODE = """\
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex({code!r}))
run = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
result = run()
if result < 0: raise OSError(-result, os.strerror(-result))
"""
CODES = {  # mov eax, number; (arguments;) syscall; ret
    "fork": "b8390000000f05c3",
    "vfork": "b83a0000000f05c3",
    "socket(AF_INET, SOCK_STREAM, 0)": "bf02000000be0100000031d2b8290000000f05c3",
    "kill(-1, 9)": "48c7c7ffffffffbe09000000b83e0000000f05c3",
    "fork by int 0x80": "b802000000cd80c3",
    "socketcall by int 0x80": "b866000000bb01000000cd80c3",
    "unshare(CLONE_NEWUSER)": "bf00000010b8100100000f05c3",
    "setuid(0)": "31ffb8690000000f05c3",
}
SYSCALLS += [
    Attack(f"machine code: {name}", f"{PREAMBLE}{MACHINE_CODE.format(code=code)}print('DONE')\n")
    for name, code in CODES.items()
]
