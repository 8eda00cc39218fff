"""Reads the arguments of `llmtrain serve`, which takes a path and options in place of a configuration."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from llmtrain.config.chat import count, text
from llmtrain.config.document import ConfigError
from llmtrain.config.hub import fetch, is_name
from llmtrain.config.vllm import MOST_CACHE_GIB, VllmConfig

SERVE_USAGE = (
    "llmtrain serve RUN|DIRECTORY [--host HOST] [--port PORT] [--token TOKEN] [--name NAME] [--max-batch-seqs N] "
    "[--max-seq-tokens N] [--generator native|vllm] [--vllm-python FILE] [--vllm-cache-gib GIB]"
)
TOKEN = "LLMTRAIN_SERVE_TOKEN"  # environment variable: unlike --token, no other user of the machine can read it
LEAST_TOKEN = 16  # characters of a token for another host


@dataclass(frozen=True)
class ServeOptions:
    """Says what is served, and to whom.

    Example: ServeOptions("runs/quickstart/sft", port=8000)
    """

    path: str  # a run or a Hugging Face directory
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    token: str | None = field(default=None, repr=False)  # None: a random one, which is printed
    name: str = ""  # what requests call the model; empty: the last part of the path
    max_batch_seqs: int = 16  # sequences decoded together
    max_seq_tokens: int = 4096  # of a prompt and its answer, and at most what the model has positions for
    generator: str = "native"  # what decodes: native or vllm
    vllm: VllmConfig = field(default_factory=VllmConfig)  # read where it is vllm


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"serve: {message}; {SERVE_USAGE}")


def serve_options(arguments: Sequence[str]) -> ServeOptions:
    """Returns what the arguments say; a name on the hub is fetched. Raises ConfigError."""
    default = ServeOptions("")
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("path", metavar="RUN|DIRECTORY")
    parser.add_argument("--host", type=text, default=default.host)
    parser.add_argument("--port", type=port, default=default.port)
    parser.add_argument("--token", type=token, default=os.environ.get(TOKEN))
    parser.add_argument("--name", type=text, default=default.name)
    parser.add_argument("--max-batch-seqs", type=count, default=default.max_batch_seqs)
    parser.add_argument("--max-seq-tokens", type=count, default=default.max_seq_tokens)
    parser.add_argument("--generator", choices=("native", "vllm"), default=default.generator)
    parser.add_argument("--vllm-python", type=text)
    parser.add_argument("--vllm-cache-gib", type=gib)
    given = vars(parser.parse_args(list(arguments)))
    own = {"python": given.pop("vllm_python"), "cache_gib": given.pop("vllm_cache_gib")}
    options = ServeOptions(**given, vllm=_vllm(given["generator"], own))
    _check_host(options)
    options = replace(options, name=options.name or os.path.basename(os.path.normpath(options.path)))
    if is_name(options.path):
        return replace(options, path=fetch(options.path, options.path))
    if not os.path.isdir(options.path):
        raise ConfigError(f"{options.path}: no such directory; give that of a run or of a Hugging Face model")
    return options


def _vllm(generator: str, given: dict[str, Any]) -> VllmConfig:
    """Returns the settings of vLLM. Raises ConfigError for some that nothing reads."""
    own = {name: value for name, value in given.items() if value is not None}
    if own and generator != "vllm":
        name = next(iter(own))
        option = f"--vllm-{name.replace('_', '-')} {own[name]}"
        raise ConfigError(f"serve: {option}: is read with --generator vllm alone; set that, or leave it out")
    return VllmConfig(**own)


def _check_host(options: ServeOptions) -> None:
    """Raises ConfigError when others than this machine could come in with a token that nobody chose."""
    if is_loopback(options.host) or (options.token and len(options.token) >= LEAST_TOKEN):
        return
    raise ConfigError(
        f"serve: --host {options.host}: other machines reach it, so it needs a token of your own of at least "
        f"{LEAST_TOKEN} characters; set {TOKEN}, or leave --host out"
    )


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def port(written: str) -> int:
    """Returns the number. Raises ArgumentTypeError when it is no port."""
    value = int(written)
    if not 0 <= value < 65_536:
        raise argparse.ArgumentTypeError(f"{written}: must be 0 (any that is free) to 65535")
    return value


def gib(written: str) -> float:
    """Returns the number. Raises ArgumentTypeError when it is no size."""
    value = float(written)
    if not 0 < value <= MOST_CACHE_GIB:
        raise argparse.ArgumentTypeError(f"{written}: must be above 0, and at most {MOST_CACHE_GIB:g}")
    return value


def token(written: str) -> str:
    """Returns the token. Raises ArgumentTypeError when a header cannot hold it."""
    if not written or not all("!" <= character <= "~" for character in written):
        raise argparse.ArgumentTypeError("must be printable ASCII without spaces")
    return written
