"""`llmtrain serve`: answers OpenAI-compatible requests with the newest checkpoint of a run, or a Hugging Face model."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from llmtrain.commands.chat import language_model, load_generator, load_model, tokenizer_of
from llmtrain.config.sampling import RolloutConfig
from llmtrain.config.serve import ServeOptions
from llmtrain.data.ends import end_ids
from llmtrain.observe.log import log
from llmtrain.parallel.device import rank_device
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.stop import Decode
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.vllm_streams import streams_of
from llmtrain.rules.vllm import lacking, unserved
from llmtrain.trainer.completions import stop_text

GRACE_S = 10  # for the answers that are under way when the server is told to end


def main(options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM: then it takes no more requests, finishes those that end within `GRACE_S`, and
    returns.

    Raises ValueError when there is no model that generates at the path, the port is taken, or the extra `serve` is not
    installed.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve: {' and '.join(missing)} not installed; pip install -e '.[serve]' -c constraints.txt")
    import uvicorn

    from llmtrain.rollout.api.app import build_app, only
    from llmtrain.rollout.api.callers import Anyone
    from llmtrain.rollout.api.model import ServedModel

    with listening(options) as sock:
        tokenizer = tokenizer_of(options.path)
        if tokenizer.has_chat:
            _ = tokenizer.chat  # what is broken is told before the first request
        generator = generator_of(options, stop_text(tokenizer))
        ends = end_ids(tokenizer, (options.path, tokenizer.directory))
        model = ServedModel(options.name, tokenizer, ends, streams_of(generator))
        token = options.token or secrets.token_urlsafe(32)
        app = build_app(model, only(token, Anyone(model)))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S)
        try:
            with told_to_end():
                announce(options, sock, generator.max_seq_tokens, token)
                uvicorn.Server(config).run(sockets=[sock])
        finally:
            model.continuous.close()
    log("serve: ended")


def generator_of(options: ServeOptions, decode: Decode) -> NativeGenerator | VllmGenerator:
    """Returns what decodes, as the options say. Raises ValueError for a model that it cannot serve."""
    sizes = options.max_batch_seqs, options.max_seq_tokens
    if options.generator == "native":
        return load_generator(options.path, *sizes, decode)
    if fault := lacking(options.vllm.python):
        raise ValueError(f"serve: --vllm-python {options.vllm.python}: {fault}")
    if fault := unserved(shape := language_model(options.path)):
        raise ValueError(f"serve: --generator vllm: {fault}; use --generator native")
    model = load_model(options.path, shape)
    settings = RolloutConfig(generator="vllm", max_batch_seqs=sizes[0], vllm=options.vllm)
    dtype = model.embed.weight.dtype
    generator = VllmGenerator(model.config, settings, dtype, rank_device(), sizes[1], decode, raw=True)
    try:
        generator.load_weights(model.state_dict().items(), 0)
    except BaseException:
        generator.close()
        raise
    return generator


@contextmanager
def listening(options: ServeOptions) -> Iterator[socket.socket]:
    """Yields a socket that listens where the options say. Raises ValueError when it cannot."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        sock = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        where = f"serve: --host {options.host} --port {options.port}"
        raise ValueError(
            f"{where}: {error.strerror or error}; give another with --port (0: any that is free)"
        ) from None
    with sock:
        yield sock


@contextmanager
def told_to_end() -> Iterator[None]:
    """Makes the signals that end the server its normal end: uvicorn raises them again when it has ended."""
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def announce(options: ServeOptions, sock: socket.socket, max_seq_tokens: int, token: str) -> None:
    """Prints where the server is, and the token where it was made here: the one time that it is told."""
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    log(f"serve: {options.path} as {options.name!r}, {max_seq_tokens} tokens a sequence; Ctrl-C ends it")
    print(f"export OPENAI_BASE_URL={url}{'' if options.token else f' OPENAI_API_KEY={token}'}", flush=True)
