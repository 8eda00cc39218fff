"""Runs vLLM's part of `benchmarks.rollout`, in an interpreter of its own that has vLLM and nothing of ours.

It reads one JSON object from standard input, what to build and to generate, and answers every further line by
generating once: it writes a line with the number of new tokens to the file descriptor that it was given.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose CPU time is measured
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs are compiled for
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def engine(asked: dict[str, Any]) -> Any:
    """Returns the engine for the model in `asked["directory"]`."""
    from vllm import LLM

    return LLM(
        asked["directory"], dtype=asked["dtype"], enforce_eager=True, skip_tokenizer_init=True, seed=0,
        max_model_len=asked["most_tokens"], max_num_seqs=asked["streams"], disable_log_stats=True,
    )  # fmt: skip


def settings(asked: dict[str, Any]) -> Any:
    """Returns how it samples: from the whole distribution, with the log-prob of each token that is drawn."""
    from vllm import SamplingParams

    return SamplingParams(
        n=asked["samples"], temperature=1.0, max_tokens=asked["new_tokens"], ignore_eos=True, logprobs=0,
        stop_token_ids=list(range(asked["stop_ids"])) or None, detokenize=False,
    )  # fmt: skip


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    os.environ.update(ENVIRONMENT)
    asked = json.loads(sys.stdin.readline())
    llm, sampling = engine(asked), settings(asked)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    print(json.dumps(0), file=answers)  # ready
    for _ in sys.stdin:
        llm.reset_prefix_cache()  # prompts come again in each round; within one, the samples of a group share theirs
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps(sum(len(sample.token_ids) for o in outputs for sample in o.outputs)), file=answers)


if __name__ == "__main__":
    main()
