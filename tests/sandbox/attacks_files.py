"""Programs that read, write or change files outside their scratch folder."""

# ruff: noqa: E501  a program in a table is one line

from __future__ import annotations

from tests.sandbox.attack import attacks

READ = attacks(
    "read",
    {
        **{
            path: f"open({path!r}, 'rb').read(64)"
            for path in (
                *("/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/resolv.conf", "/etc/ssl/openssl.cnf", "/etc/fstab"),
                *("/proc/self/environ", "/proc/self/maps", "/proc/self/mem", "/proc/self/status", "/proc/self/cmdline"),
                *("/proc/1/environ", "/proc/1/cmdline", "/proc/$pid/environ", "/proc/$us/environ", "/proc/$us/maps"),
                *("/proc/$us/mem", "/proc/cpuinfo", "/proc/kcore", "/proc/kallsyms", "/proc/kmsg", "/proc/keys"),
                *("/proc/net/tcp", "/proc/sys/kernel/hostname", "/proc/self/root$secret", "/proc/1/root$secret"),
                *("/proc/self/cwd/../..$secret", "/proc/self/fd/0", "/proc/self/fd/3", "/proc/thread-self/environ"),
                *("/sys/kernel/notes", "/sys/class/net/lo/address", "/sys/fs/cgroup/cgroup.procs", "/dev/mem"),
                *("/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/tty", "/dev/ptmx", "/dev/fd/0", "/dev/stdin", "/dev/fuse"),
                *("/dev/kvm", "/dev/nvidia0", "/dev/random", "/root/.bashrc", "/root/.ssh/id_rsa", "/bin/sh"),
                *("/usr/bin/env", "/boot/vmlinuz", "/run/docker.sock", "/var/log/syslog", "$secret", "$outside/own.py"),
                *("../../../../../../../..$secret", "//$secret", "/./$secret", "$package/__init__.py/../..$secret"),
            )
        },
        "the secret through a symbolic link": "os.symlink('$secret', 'a'); open('a').read()",
        "the secret through a relative link": "os.symlink('../' * 20 + '$secret', 'a'); open('a').read()",
        "the secret through a linked folder": "os.symlink('$outside', 'a'); open('a/secret.txt').read()",
        "the secret through a chain of links": (
            "os.symlink('/', 'a')\nfor i in range(30): os.symlink(f'a' if not i else f'b{i-1}', f'b{i}')\n"
            "open('b29$secret').read()"
        ),
        "the secret through a link of Python's folder": "os.symlink('$secret', '$site/pwned'); open('$site/pwned').read()",
        "the secret through a hard link": "os.link('$secret', 'a'); open('a').read()",
        "the secret through a link by descriptor": (
            "f = os.open('$secret', os.O_PATH); libc.linkat(f, b'', -100, b'a', 0x1000) and 1/1; open('a').read()"
        ),
        "the secret through O_PATH": "f = os.open('$secret', os.O_PATH); open(f'/proc/self/fd/{f}').read()",
        "the secret by mmap": "import mmap; f = os.open('$secret', os.O_RDONLY); mmap.mmap(f, 4, prot=1)",
        "the secret by dir_fd": "os.open('secret.txt', os.O_RDONLY, dir_fd=os.open('$outside', os.O_PATH))",
        "the secret by moving there": "os.chdir('$outside'); open('secret.txt').read()",
        "the secret by fchdir": "os.fchdir(os.open('$outside', os.O_PATH)); open('secret.txt').read()",
        "the secret by rename": "os.rename('$secret', 'a'); open('a').read()",
        "the secret by exchange": "open('a', 'w').close()\nif libc.renameat2(-100, b'$secret', -100, b'a', 2): raise OSError('no')",
        "the secret by copying": "import shutil; shutil.copyfile('$secret', 'a')",
        "the secret by copying the tree": "import shutil; shutil.copytree('$outside', 'a')",
        "the secret by sqlite": "import sqlite3; sqlite3.connect('file:$secret?mode=ro', uri=True).execute('pragma schema_version')",
        "the secret by linecache": "import linecache\nif not linecache.getline('$secret', 1): raise OSError('nothing')",
        "the secret by fileinput": "import fileinput; list(fileinput.input('$secret'))",
        "the secret by codecs": "import codecs; codecs.open('$secret').read()",
        "the secret by urllib": "import urllib.request; urllib.request.urlopen('file://$secret').read()",
        "the secret by open_code": "import io; io.open_code('$secret').read()",
        "the secret by libc's fopen": "libc.fopen.restype = ctypes.c_void_p\nif not libc.fopen(b'$secret', b'r'): raise OSError('no')",
        "the secret by sendfile": "f = os.open('$secret', os.O_RDONLY); os.sendfile(3, f, 0, 64)",
        "the secret by a tar archive": "import tarfile; tarfile.open('a', 'w').add('$secret')",
        "the secret by a zip archive": "import zipfile; zipfile.ZipFile('a', 'w').write('$secret')",
        "the secret by an import": "sys.path.insert(0, '$outside'); import own; print(own.VALUE)",
        "the secret by runpy": "import runpy; runpy.run_path('$outside/own.py')",
        "the secret by exec of its file": "exec(open('$outside/own.py').read())",
        "names in the root": "os.listdir('/proc') or os.listdir('/sys')",
        "names outside": "os.listdir('$outside')",
        "names by scandir": "list(os.scandir('$outside'))",
        "names by walking": "import itertools\nif not any('secret.txt' in w[2] for w in os.walk('$outside')): raise OSError('no')",
        "names by glob": "import glob\nif not glob.glob('$outside/*'): raise OSError('no')",
        "names by pathlib": "import pathlib; list(pathlib.Path('$outside').iterdir())",
        "names of the temporary folder": "os.listdir('/tmp')",
        "names of home": "os.listdir('$home')",
        "users": "import pwd; pwd.getpwall() or open('/etc/passwd')",
        "a library from outside": "ctypes.CDLL('$secret')",
        "a library of the system": "ctypes.CDLL('/usr/lib/x86_64-linux-gnu/libcrypt.so.1')",
    },
)
WHOLE = attacks(
    "look",
    {
        "at the size of a file": "os.stat('$secret')",
        "whether a file exists": "if not os.path.exists('$secret'): raise OSError('no')",
        "at a link": "os.lstat('$path')",
        "at rights": "if not os.access('$secret', os.R_OK): raise OSError('no')",
        "at attributes": "os.listxattr('$secret')",
        "at processes": "os.stat('/proc/self')",
        "at devices": "os.stat('/dev/null')",
        "at the disk": "os.statvfs('$outside')",
    },
    whole=True,
)
WRITE = attacks(
    "write",
    {
        **{
            path: f"open({path!r}, 'w').write('x')"
            for path in (
                *(
                    "$outside/pwned",
                    "$home/pwned",
                    "/tmp/pwned",
                    "/var/tmp/pwned",
                    "/dev/shm/pwned",
                    "/pwned",
                    "../pwned",
                ),
                *("/etc/pwned", "/root/pwned", "/usr/lib/pwned", "/usr/local/pwned", "$secret", "$package/pwned.py"),
                *("$package/__init__.py", "$package/rewards/math.py", "$package/sandbox/lock.py", "$site/pwned.pth"),
                *("$site/sitecustomize_pwned.py", "$site/torch/pwned.py", "$site/math_verify/__init__.py"),
                *("$stdlib/pwned.py", "$stdlib/os.py", "$stdlib/__pycache__/pwned.pyc", "/proc/self/oom_score_adj"),
                *("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/self/uid_map", "/proc/$pid/mem"),
                *("/sys/kernel/uevent_helper", "/dev/kmsg", "/dev/vda", "/dev/tty", "/dev/pts/0", "/dev/ptmx"),
                "/proc/$pid/fd/1",
            )
        },
        "by appending": "open('$secret', 'a').write('x')",
        "in place": "open('$secret', 'r+').write('x')",
        "by truncating": "os.truncate('$secret', 0)",
        "by O_TRUNC while reading": "os.open('$secret', os.O_RDONLY | os.O_TRUNC)",
        "a file without a name": "os.open('$outside', os.O_TMPFILE | os.O_RDWR)",
        "by removing": "os.remove('$secret')",
        "by removing a folder": "os.rmdir('$outside/empty')",
        "by removing the tree": "import shutil; shutil.rmtree('$outside')",
        "by making a folder": "os.mkdir('$outside/pwned')",
        "by renaming": "os.rename('$secret', '$outside/pwned')",
        "by moving in": "open('a', 'w').close(); os.rename('a', '$outside/pwned')",
        "by replacing": "open('a', 'w').close(); os.replace('a', '$secret')",
        "by linking out": "open('a', 'w').close(); os.link('a', '$outside/pwned')",
        "by a symbolic link outside": "os.symlink('/etc', '$outside/pwned')",
        "through a symbolic link": "os.symlink('$outside', 'a'); open('a/pwned', 'w')",
        "through a link to a module": "os.symlink('$package/__init__.py', 'a'); open('a', 'a').write('#')",
        "a named pipe": "os.mkfifo('$outside/pwned')",
        "a named pipe inside": "os.mkfifo('pwned')",
        "a device": "os.mknod('pwned', 0o60600, os.makedev(8, 0))",
        "rights": "os.chmod('$secret', 0o777)",
        "rights inside": "open('a', 'w').close(); os.chmod('a', 0o4777)",
        "rights by descriptor": "f = os.open('$secret', os.O_RDONLY); os.fchmod(f, 0o777)",
        "the owner": "os.chown('$secret', 1, 1)",
        "times": "os.utime('$secret', (0, 0))",
        "attributes": "os.setxattr('$secret', 'user.pwned', b'x')",
        "by sqlite": "import sqlite3; sqlite3.connect('$outside/pwned').execute('create table t(x)')",
        "by sqlite's attach": (
            "import sqlite3; c = sqlite3.connect(':memory:'); c.execute(\"attach '$outside/pwned' as b\"); "
            "c.execute('create table b.t(x)')"
        ),
        "by sqlite's vacuum": "import sqlite3; sqlite3.connect(':memory:').execute(\"vacuum into '$outside/pwned'\")",
        "by dbm": "import dbm.dumb; dbm.dumb.open('$outside/pwned', 'n')['a'] = 'b'",
        "by shelve": "import shelve; shelve.open('$outside/pwned')['a'] = 1",
        "by a log": "import logging; logging.FileHandler('$outside/pwned').emit",
        "by a tar archive": (
            "import tarfile, io; t = tarfile.TarFile(fileobj=io.BytesIO(), mode='w'); m = tarfile.TarInfo('/tmp/pwned')\n"
            "b = io.BytesIO(); t = tarfile.open(fileobj=b, mode='w'); t.addfile(m); t.close(); b.seek(0)\n"
            "tarfile.open(fileobj=b).extractall('/')"
        ),
        "by a temporary file": "import tempfile; tempfile.NamedTemporaryFile(dir='$outside', prefix='pwned')",
        "by a compiled module": "import py_compile; py_compile.compile('$package/types.py', cfile='$outside/pwned')",
        "by a module's own file": "import json; open(json.__file__, 'a').write('#')",
        "by pathlib": "import pathlib; pathlib.Path('$outside/pwned').touch()",
        "by libc's fopen": "libc.fopen.restype = ctypes.c_void_p\nif not libc.fopen(b'$outside/pwned', b'w'): raise OSError('no')",
        "by faulthandler": "import faulthandler; faulthandler.enable(open('$outside/pwned', 'w'))",
        "by a profile": "import cProfile; cProfile.Profile().dump_stats('$outside/pwned')",
        "by a trace of memory": "import tracemalloc; tracemalloc.start(); tracemalloc.take_snapshot().dump('$outside/pwned')",
        "by the history of readline": "import shutil; shutil.copyfileobj(__import__('io').BytesIO(b'x'), open('$home/pwned', 'wb'))",
        "by the folder of Python's cache": "sys.pycache_prefix = '$outside/pwned'; sys.dont_write_bytecode = False; import this; os.listdir('$outside/pwned')",
    },
)
FILES = READ + WHOLE + WRITE
