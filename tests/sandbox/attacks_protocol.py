"""Programs that forge replies, change what later calls find, search for secrets, or hide code in data."""

# ruff: noqa: E501  a program in a table is one line

from __future__ import annotations

from tests.sandbox.attack import attacks

FORGE = attacks(
    "forge",
    {
        "a frame of the worker": "os.write(3, (20).to_bytes(4, 'little') + b'{\"reply\": \"x\"}'); os._exit(0)",
        "two replies": 'os.write(3, b\'{"value": 1}{"value": 2}\'); os._exit(0)',
        "a reply with more keys": 'os.write(3, b\'{"value": 1, "fault": "x"}\'); os._exit(0)',
        "a reply that is a list": "os.write(3, b'[1, 2]'); os._exit(0)",
        "a reply that is not JSON": "os.write(3, b'import os'); os._exit(0)",
        "a reply that is not text": "os.write(3, bytes(range(256))); os._exit(0)",
        "a deep reply": "os.write(3, b'[' * 60000); os._exit(0)",
        "a number of many digits": "os.write(3, b'{\"value\": ' + b'9' * 50000 + b'}'); os._exit(0)",
        "a reply of many keys": "os.write(3, b'{' + b','.join(b'\"%d\":1' % i for i in range(5000)) + b'}'); os._exit(0)",
        "an error that is no text": "os.write(3, b'{\"error\": [1]}'); os._exit(0)",
        "an error with commands of a terminal": 'os.write(3, b\'{"error": "\\\\u001b[2J"}\'); os._exit(0)',
        "a reply that stays open": "os.write(3, b'{\"value\": 1}')\nwhile True: pass",
        "a closed pipe": "os.close(3)\nimport time; time.sleep(100)",
        "a pipe in another place": "os.dup2(3, 9); os.close(3); os.write(9, b'{\"value\": 1}')\nwhile True: pass",
        "an empty reply": "os._exit(0)",
        "a reply in pieces": "for c in b'{\"value\": 1}': os.write(3, bytes([c]))\nos._exit(0)",
        "a read of the pipe": "os.read(3, 100)",
        "a larger pipe": "import fcntl; fcntl.fcntl(3, 1031, 2**30)",
        "a pipe that does not wait": "os.set_blocking(3, False)\nwhile True:\n  try: os.write(3, bytes(10**5))\n  except BlockingIOError: pass",
    },
    harmless=True,
)
PERSIST = attacks(
    "persist",
    {
        "print": "import builtins; builtins.print = lambda *a: None",
        "all builtins": "import builtins\nfor n in list(vars(builtins)): setattr(builtins, n, None)",
        "json.dumps": 'import json; json.dumps = lambda *a: \'{"value": {"output": "pwned"}}\'',
        "json.loads": "import json; json.loads = lambda *a: ['print(\"pwned\")']",
        "the runner": "import llmtrain.sandbox.program as p; p.run = lambda *a: 'pwned'",
        "the runner's output": "import llmtrain.sandbox.program as p; p.Output.write = lambda s, t: setattr(s, 'text', 'pwned')",
        "the worker's functions": "import llmtrain.sandbox.server as s; s.run_locked = s.collect = s.write_frame = s.call = None",
        "the worker's lock": "import llmtrain.sandbox.lock as l; l.enter_lock = lambda *a: None; l.resource_limits = lambda *a: {}",
        "the worker's frames": (
            "import gc\nfor o in gc.get_objects():\n"
            "  if type(o).__name__ == 'Lock' and hasattr(o, 'limits'): object.__setattr__(o, 'limits', None)"
        ),
        "the caller's variables": "f = sys._getframe()\nwhile f: f.f_locals.clear(); f = f.f_back",
        "modules": "sys.modules.clear()",
        "a module in the way": "import types; sys.modules['json'] = types.ModuleType('json')",
        "the search path": "sys.path[:] = ['/tmp']",
        "the environment": "os.environ['PYTHONSTARTUP'] = '/tmp/pwned'; os.putenv('LD_PRELOAD', '/tmp/pwned.so')",
        "a seed": "import random; random.seed(0)",
        "the locale": "import locale; locale.setlocale(locale.LC_ALL, 'C')",
        "limits": "import resource\ntry: resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))\nexcept PermissionError: pass",
        "a file": "open('a', 'w').write('pwned')",
        "a folder": "os.makedirs('a/b/c')",
        "a file without rights": "os.umask(0o777); open('a', 'w').close(); os.mkdir('b')",
        "an exit function": "import atexit; atexit.register(print, 'pwned')",
        "a signal handler": "import signal; signal.signal(15, lambda *a: print('pwned')); signal.alarm(1)",
        "a trace": "sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)",
        "an excepthook": "sys.excepthook = sys.unraisablehook = lambda *a: print('pwned')",
        "small integers": "ctypes.memset(id(256) + 24, 1, 4)",
    },
    harmless=True,
)
SECRETS = attacks(
    "secret",
    {
        "the environment": "print(dict(os.environ))",
        "the environment of libc": "p = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ'); print([p[i] for i in range(99) if p[i]])",
        "getenv": "libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'LLMTRAIN_SECRET'))",
        "the arguments": "print(sys.argv, sys.orig_argv)",
        "all objects": "import gc; print([o for o in gc.get_objects() if isinstance(o, dict) and 'LLMTRAIN_SECRET' in o])",
        "all frames": "print([f.f_locals for f in sys._current_frames().values()])",
        "the stack of the process": (
            "p = ctypes.cast(ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')[0], ctypes.c_void_p).value\n"
            "print(ctypes.string_at(p, 2000))"
        ),
        "descriptors": "print([os.read(i, 99) for i in range(64) if i != 3 and not os.set_blocking(i, False)])",
        "descriptors by fstat": "print([i for i in range(4, 64) if os.fstat(i)])",
        "descriptors by seeking": "print([os.lseek(i, 0, 1) for i in range(4, 2000)])",
        "the names of the system": "print(open('/etc/hostname').read())",
        "earlier calls": "import gc; print([o for o in gc.get_objects() if isinstance(o, list) and 'a-secret' in repr(o)[:99]])",
    },
    harmless=True,
)
DATA = attacks(
    "data",
    {
        "a pickle": "import pickle; pickle.loads(b'cposix\\nsystem\\n(S\"touch /tmp/pwned\"\\ntR.')",
        "a pickle by reduce": (
            "import pickle\nclass A:\n  def __reduce__(s): return os.system, ('touch /tmp/pwned',)\npickle.loads(pickle.dumps(A()))"
        ),
        "a pickle that executes": "import pickle; pickle.loads(b'cbuiltins\\nexec\\n(S\"import os; os.fork()\"\\ntR.')",
        "marshalled code": "import marshal; exec(marshal.loads(marshal.dumps(compile('os.system(\"touch /tmp/pwned\")', 'a', 'exec'))))",
        "YAML": "import yaml; yaml.unsafe_load('!!python/object/apply:os.system [\"touch /tmp/pwned\"]')",
        "a call hidden in eval": 'eval(\'__import__("os").system("touch /tmp/pwned")\')',
        "a call through subclasses": (
            "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'] or 1\n"
            "import subprocess\n[c for c in object.__subclasses__() if c.__name__ == 'Popen'][0](['touch', '/tmp/pwned'])"
        ),
        "a call through a format": "print('{0.__class__.__mro__}'.format(1)); os.system('touch /tmp/pwned')",
        "sympy's parser": 'import sympy; sympy.sympify(\'__import__("os").system("touch /tmp/pwned")\')',
        "sympy's parser of expressions": "from sympy.parsing.sympy_parser import parse_expr as p; p('exec(\"import os; os.system(1)\")')",
        "a template": "import string; string.Formatter().format('{a.__init__.__globals__}', a=string.Formatter()); os.popen('touch /tmp/pwned')",
        "doctests": "import doctest; doctest.run_docstring_examples('>>> import os; os.system(\"touch /tmp/pwned\")', {})",
        "code objects": "exec((lambda: __import__('os').system('touch /tmp/pwned')).__code__)",
        "a cached module": "import importlib.util as u; open('a.py', 'w').write('import os; os.system(\"touch /tmp/pwned\")'); sys.path.insert(0, '.'); import a",
    },
    harmless=True,
)
PROTOCOL = FORGE + PERSIST + SECRETS + DATA
