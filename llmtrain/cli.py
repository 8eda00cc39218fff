"""Runs the command line: checks the configuration before anything heavy is imported or started."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from llmtrain.config.chat import CHAT_USAGE, chat_options
from llmtrain.config.hub import located
from llmtrain.config.load import ConfigError, load, load_plugins
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import RunConfig
from llmtrain.config.serve import SERVE_USAGE, serve_options
from llmtrain.rules.check import check

BEFORE: dict[str, tuple[str, str]] = {  # name -> (module:function, what it does)
    "data": ("llmtrain.commands.prepare:data", "collect and clean text, make problems, tokenize into shards"),
    "tokenizer": ("llmtrain.commands.prepare:tokenizer", "train a byte-level BPE tokenizer"),
}
BEHIND: dict[str, tuple[str, str]] = {
    "judge": ("llmtrain.commands.judge:main", "sample, judge the samples, and write preference pairs"),
    "constitutional": ("llmtrain.commands.constitutional:main", "critique, revise and compare answers by principles"),
    "eval": ("llmtrain.commands.evaluate:main", "perplexity, pass@k and majority vote, task files"),
    "export": ("llmtrain.commands.export:main", "write a Hugging Face directory"),
    "chat": ("llmtrain.commands.chat:main", "talk to a run or a Hugging Face directory"),
    "serve": ("llmtrain.commands.serve:main", "answer OpenAI-compatible requests with a run or a directory"),
    "report": ("llmtrain.commands.report:main", "plots and samples as one HTML page"),
    "index": ("llmtrain.commands.index:main", "make a store of your documents, in which passages are found"),
    "scaling": ("llmtrain.commands.scaling:main", "fit scaling laws to the results of runs"),
    "ladder": ("llmtrain.commands.ladder:main", "train sizes at budgets of compute, and fit scaling laws to them"),
    "plan": ("llmtrain.scaling.describe:main", "print what a document needs: memory, messages, time, cost"),
    "run": ("llmtrain.commands.run:main", "run a list of stages, going on where it was"),
    "doctor": ("llmtrain.commands.doctor:main", "look at this machine (takes no configuration)"),
}
HELP = ("-h", "--help")
MEASURE = "--measure"
OPTIONS = {  # what else a command can do, without the weights of models
    ("data", "--dry-run"): "llmtrain.commands.prepare:dry_run",
    ("ladder", "--dry-run"): "llmtrain.commands.ladder:dry_run",
    ("eval", "--show"): "llmtrain.commands.tasks:show",
    ("plan", "--search"): "llmtrain.scaling.layouts:main",
}
TOLD = (ValueError, FloatingPointError, RuntimeError, OSError)  # wrong input, or a run that must not go on
EXAMPLE = "llmtrain pretrain configs/pretrain/tiny.yaml train.steps=50 optim.lr=1e-3"


def _doctor_arguments(rest: Sequence[str]) -> tuple[str, ...]:
    """Returns the file that is to hold what is measured, if that is asked for."""
    if rest and (rest[0] != MEASURE or len(rest) != 2):
        raise ConfigError(f"doctor: takes no arguments but {MEASURE} FILE.yaml, got {' '.join(rest)}")
    return tuple(rest[1:])


OWN_ARGUMENTS: dict[str, Callable[[Sequence[str]], tuple]] = {  # in place of a configuration: what reads them
    "chat": lambda rest: (chat_options(rest),),
    "serve": lambda rest: (serve_options(rest),),
    "doctor": _doctor_arguments,
}


def commands() -> dict[str, tuple[str, str]]:
    """Returns every command by name, the recipes among them: (module:function, what it does)."""
    return {**BEFORE, **{r.name: (r.main, r.summary) for r in RECIPES.values()}, **BEHIND}


def usage() -> str:
    """Returns the help text."""
    lines = [f"  {name:<14} {summary}" for name, (_, summary) in commands().items()]
    options = "\n".join(f"       llmtrain {command} CONFIG.yaml {option}" for command, option in OPTIONS)
    more_usage = f"{options}\n       {CHAT_USAGE}\n       {SERVE_USAGE}\n       llmtrain doctor [{MEASURE} FILE.yaml]"
    head = f"usage: llmtrain COMMAND CONFIG.yaml [section.key=value ...]\n{more_usage}"
    more = "`llmtrain --help CONFIG.yaml` lists the recipes of the document's plugins too."
    return "\n".join([head, "", "commands:", *lines, "", "example:", f"  {EXAMPLE}", "", more])


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 after a failure, 2 for wrong input, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if not arguments or set(HELP) & set(arguments):
            load_plugins([a for a in arguments if a not in (*HELP, *commands())] if _reads_document(arguments) else [])
            print(usage())
            return 0 if arguments else 2
        action = _prepare(*arguments)
    except ValueError as error:
        if int(os.environ.get("RANK", "0")) == 0:  # every rank finds the same
            _tell(str(error))
        return 2
    return _guarded(action)


def entry() -> NoReturn:
    """Runs the console script and `python -m llmtrain`: `main`, then the end of the process.

    A process that has imported torch leaves without the teardown of the interpreter: threads of torch outlive their
    process groups and may still hold a tensor that belongs to Python. One that lets go of it during the teardown asks
    for an interpreter that is gone, and the process ends in SIGABRT ("terminate called without an active exception").
    """
    status = main()
    if "torch" not in sys.modules:
        sys.exit(status)
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        atexit._run_exitfuncs()  # not after a failure in the middle of a job, whose partners nobody can wait for
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _reads_document(arguments: Sequence[str]) -> bool:
    return not set(arguments) & OWN_ARGUMENTS.keys()


def _prepare(command: str, *rest: str) -> Callable[[], int | None]:
    """Returns the checked call that the arguments ask for. Raises ConfigError."""
    if command not in commands() and rest and os.path.isfile(rest[0]):
        load_plugins(rest)
    if command not in commands():
        near = difflib.get_close_matches(command, commands(), 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands())}"
        raise ConfigError(f"{command}: unknown command, {hint}")
    if command in OWN_ARGUMENTS:
        options = OWN_ARGUMENTS[command](rest)
        return lambda: _function(commands()[command][0])(*options)
    chosen = [word for word in rest if (command, word) in OPTIONS]
    rest = tuple(word for word in rest if word not in chosen)
    if not rest or "=" in rest[0]:
        raise ConfigError(f"{command}: needs a configuration file, as in: {EXAMPLE}")
    config = load(rest[0], list(rest[1:]))
    if not isinstance(config, RunConfig):
        config = located(config, command, weights=not chosen)
    check(config, int(os.environ.get("WORLD_SIZE", "1")), command)
    return lambda: _function(OPTIONS[command, chosen[0]] if chosen else commands()[command][0])(config)


def _function(place: str) -> Callable[..., int | None]:
    """Imports and returns the function of a command. The garbage collector is off meanwhile and never looks at what was
    imported: its passes over hundreds of thousands of objects that all stay take about a fifth of the import."""
    module, name = place.split(":")
    gc.disable()
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        gc.freeze()
        gc.enable()


def _guarded(action: Callable[[], int | None]) -> int:
    """Runs the action and returns its exit status. What llmtrain raises to tell the user something is printed as one
    line, any other error with its traceback."""
    try:
        return action() or 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as told:  # a stage that a signal stopped
        return int(told.code or 0)
    except Exception as error:
        if not isinstance(error, TOLD) or not _ours(error):
            _tell(traceback.format_exc().rstrip())
            return 1
        rank = os.environ.get("RANK", "0")
        _tell(str(error) if rank == "0" else f"rank {rank}: {error}")
        return 2 if isinstance(error, ValueError) else 1


def _tell(message: str) -> None:
    """Writes the message and its end in one piece: what other ranks write there comes before or after it."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _ours(error: Exception) -> bool:
    """Tells whether llmtrain raised the error, to tell the user something; a library's error keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("llmtrain.")
