"""Programs that start processes or threads, signal others, or use the network."""

# ruff: noqa: E501  a program in a table is one line

from __future__ import annotations

from tests.sandbox.attack import attacks

TOUCH = "'/tmp/pwned'"
START = attacks(
    "start",
    {
        "os.system": "if os.system('touch /tmp/pwned'): raise OSError('no')",
        "os.popen": "os.popen('touch /tmp/pwned').read()",
        "os.fork": "os.fork()",
        "os.forkpty": "os.forkpty()",
        "a fork bomb": "while True: os.fork()",
        "a fork bomb that catches": "for i in range(1000):\n  try: os.fork(); print('DONE')\n  except OSError: pass\nraise OSError('no')",
        "posix_spawn": "os.posix_spawn('/bin/touch', ['touch', '/tmp/pwned'], {})",
        "posix_spawnp": "os.posix_spawnp('touch', ['touch', '/tmp/pwned'], {})",
        **{
            name: f"os.{name}({arguments})"
            for name, arguments in {
                "execv": "'/bin/touch', ['touch', '/tmp/pwned']",
                "execve": "'/bin/touch', ['touch', '/tmp/pwned'], {}",
                "execvp": "'touch', ['touch', '/tmp/pwned']",
                "execvpe": "'touch', ['touch', '/tmp/pwned'], {'PATH': '/bin:/usr/bin'}",
                "execl": "'/bin/touch', 'touch', '/tmp/pwned'",
                "execle": "'/bin/touch', 'touch', '/tmp/pwned', {}",
                "execlp": "'touch', 'touch', '/tmp/pwned'",
            }.items()
        },
        "exec of Python": "os.execv(sys.executable, [sys.executable, '-c', 'open(\"/tmp/pwned\", \"w\")'])",
        "exec by descriptor": "os.execve(os.open('/bin/sh', os.O_PATH), ['sh'], {})",
        "exec of an own script": "open('a', 'w').write('#!/bin/sh\\ntouch /tmp/pwned'); os.execv('./a', ['a'])",
        "exec through the loader": "os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '/bin/touch', '/tmp/pwned'])",
        "exec of memory": "f = os.memfd_create('pwned'); os.write(f, b'#!/bin/sh'); os.execve(f, ['a'], {})",
        "spawnv": "if os.spawnv(os.P_WAIT, '/bin/touch', ['touch', '/tmp/pwned']): raise OSError('no')",
        "subprocess.run": "import subprocess; subprocess.run(['touch', '/tmp/pwned'], check=True)",
        "a shell": "import subprocess; subprocess.run('touch /tmp/pwned', shell=True, check=True)",
        "subprocess with a new session": "import subprocess; subprocess.Popen(['touch', '/tmp/pwned'], start_new_session=True)",
        "subprocess.getoutput": "import subprocess; subprocess.getoutput('touch /tmp/pwned')",
        "pty.spawn": "import pty; pty.spawn(['touch', '/tmp/pwned'])",
        "multiprocessing by fork": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "multiprocessing by spawn": "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
        "multiprocessing by server": "import multiprocessing as m; m.get_context('forkserver').Process(target=print).start()",
        "a pool of processes": "from concurrent.futures import *; ProcessPoolExecutor(1).submit(int).result()",
        "asyncio": "import asyncio\nasync def f(): await asyncio.create_subprocess_shell('touch /tmp/pwned')\nasyncio.run(f())",
        "libc's system": "if libc.system(b'touch /tmp/pwned'): raise OSError('no')",
        "libc's popen": "libc.popen.restype = ctypes.c_void_p\nif not libc.popen(b'touch /tmp/pwned', b'w'): raise OSError('no')",
        "libc's fork": "if libc.fork() < 0: raise OSError('no')",
        "libc's daemon": "if libc.daemon(0, 0): raise OSError('no')",
        "libc's posix_spawn": (
            "if libc.posix_spawn(None, b'/bin/touch', None, None, (ctypes.c_char_p * 3)(b't', b'/tmp/pwned', None), None): "
            "raise OSError('no')"
        ),
        "a browser": "import webbrowser\nif not webbrowser.open('file:///tmp/pwned'): raise OSError('no')",
        "os.startfile's cousin": "import pydoc; pydoc.pipepager('x', 'cat > /tmp/pwned')",
        "a thread": "import threading; threading.Thread(target=print).start()",
        "a bomb of threads": "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        "a thread of _thread": "import _thread; _thread.start_new_thread(print, ())",
        "a pool of threads": "from concurrent.futures import *; ThreadPoolExecutor(1).submit(int).result()",
        "a timer": "import threading; threading.Timer(0.1, print).start()",
        "libc's pthread_create": "if libc.pthread_create(bytes(64), None, libc.getpid, None): raise OSError('no')",
        "a thread in a destructor": (
            "import threading\nclass A:\n  def __del__(s): threading.Thread(target=open, args=('/tmp/pwned', 'w')).start()\n"
            "A(); raise OSError('no')"
        ),
    },
)
SIGNAL = attacks(
    "signal",
    {
        "everyone": "import signal; os.kill(-1, signal.SIGUSR1)",
        "everyone to death": "os.kill(-1, 9)",
        "the own group": "os.kill(0, 15)",
        "the group by killpg": "os.killpg(0, 15)",
        "the parent": "os.kill(os.getppid() or 1, 9)",
        "the first process": "os.kill(1, 9)",
        "the trainer": "os.kill($us, 10)",
        "the bystander": "os.kill($pid, 10)",
        "the bystander by its group": "os.killpg($pid, 10)",
        "a stop": "os.kill($pid, 19)",
        "by a thread's id": "import signal; signal.pthread_kill($pid, 0)",
        "by pidfd": "import signal; signal.pidfd_send_signal(os.pidfd_open($pid), 10)",
        "all ids near": "for i in range(-50, 50):\n  try: os.kill($pid + i, 10); print('DONE')\n  except OSError: pass\nraise OSError('no')",
        "all small ids": (
            "for i in range(1, 200):\n  if i == os.getpid(): continue\n"
            "  try: os.kill(i, 0); print('DONE')\n  except OSError: pass\nraise OSError('no')"
        ),
        "by the owner of a descriptor": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, 8, $pid)",
        "by the signal of a descriptor": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, 10, 9)",
        "by the owner, extended": "import fcntl, struct; r, w = os.pipe(); fcntl.fcntl(r, 15, struct.pack('ii', 1, $pid))",
        "by FIOSETOWN": "import fcntl, struct; fcntl.ioctl(0, 0x8901, struct.pack('i', $pid))",
        "by a terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
        "by a lease": "import fcntl; fcntl.fcntl(os.open('$stdlib/os.py', 0), 1024, 0)",
        "by watching a folder": "import fcntl; fcntl.fcntl(os.open('$stdlib', 0), 1026, 1)",
        "by a timer of POSIX": "syscall(222, 0, 0, bytes(8))",
        "by libc's kill": "if libc.kill($pid, 10): raise OSError('no')",
        "by libc's sigqueue": "if libc.sigqueue($pid, 10, 0): raise OSError('no')",
        "by the death of the parent": "libc.prctl(1, 10, 0, 0, 0) and 1\nif libc.prctl(1, 10, 0, 0, 0): raise OSError('no')",
    },
)
CONNECT = attacks(
    "connect",
    {
        "by TCP": "import socket; socket.create_connection(('127.0.0.1', $port), 1).send(b'x')",
        "by TCP without waiting": "import socket; s = socket.socket(); s.setblocking(False); s.connect(('127.0.0.1', $port))",
        "by UDP": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $port))",
        "by IPv6": "import socket; socket.create_connection(('::1', $port), 1)",
        "by IPv4 in IPv6": "import socket; socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', $port))",
        "by a socket file": "import socket; socket.socket(socket.AF_UNIX).connect('$path')",
        "by an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0$abstract')",
        "by datagrams to a socket file": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '$path')",
        "by raw packets": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "by frames": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "by netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "by the host of a machine": "import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "by the kernel's ciphers": "import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "by Bluetooth": "import socket; socket.socket(31, socket.SOCK_RAW, 1)",
        "by a pair": "import socket; socket.socketpair()",
        "by listening": "import socket; socket.create_server(('127.0.0.1', 0))",
        "by a server": "import socketserver; socketserver.TCPServer(('', 0), None)",
        "by a name": "import socket; socket.getaddrinfo('localhost', 80) and socket.create_connection(('localhost', $port))",
        "by urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port', timeout=1)",
        "by http": "import http.client; http.client.HTTPConnection('127.0.0.1', $port).request('GET', '/')",
        "by ftp": "import ftplib; ftplib.FTP().connect('127.0.0.1', $port, 1)",
        "by mail": "import smtplib; smtplib.SMTP('127.0.0.1', $port, timeout=1)",
        "by XML-RPC": "import xmlrpc.client; xmlrpc.client.ServerProxy('http://127.0.0.1:$port').x()",
        "by asyncio": "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', $port))",
        "by multiprocessing": "from multiprocessing.connection import Client; Client(('127.0.0.1', $port))",
        "by a manager": "from multiprocessing.managers import *; m = BaseManager(('127.0.0.1', $port)); m.connect()",
        "by a log": "import logging.handlers as h; h.SocketHandler('127.0.0.1', $port).makeSocket()",
        "by the system's log": "import logging.handlers as h; h.SysLogHandler()._connect_unixsocket('$path')",
        "by libc's socket": "if libc.socket(2, 1, 0) < 0: raise OSError('no')",
        "by libc's syslog": "libc.openlog(b'pwned', 8, 8); libc.syslog(3, b'x'); import socket; socket.socket()",
        "by requests": "import requests; requests.get('http://127.0.0.1:$port', timeout=1)",
    },
)
PROCESSES = START + SIGNAL + CONNECT
