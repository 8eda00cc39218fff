"""Records which experts a vLLM worker chooses: on a CPU vLLM 0.32 tells none, as its own option needs a model runner
that needs Triton.

Imported by `llmtrain_vllm`, in vLLM's interpreter: nothing of llmtrain is imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save_file

NAME = re.compile(r"routes-\d+")  # what our client calls a request whose experts it will ask for
REQUEST = re.compile(r"(?:(\d+)_)?generate-tokens-(routes-\d+)-[0-9a-f]{8}")  # what vLLM makes of it: a sample of it
NOBODY = -1  # the expert of a place that nothing was computed for


class Recorder:
    """Holds the experts of every token beside its keys and values: a row of `table` for each place of the cache, found
    by the same blocks. So a token whose keys and values come from the prefix cache, computed for another request or in
    an earlier part of the prompt, has the experts that they were computed with.

    A request's blocks are given to others once it has ended or is set back: then its rows are kept, until they are
    asked for or the weights change.
    """

    def __init__(self, runner: Any, bind: Callable[[Any, Any], None]) -> None:
        """Begins to record what a model runner computes, all of whose layers keep all tokens. `bind` makes the routers
        of a model call the `capture` of an object."""
        (group,) = runner.kv_cache_config.kv_cache_groups
        self.runner, self.block_tokens = runner, group.kv_cache_spec.block_size
        self.places = runner.kv_cache_config.num_blocks * self.block_tokens
        self.table: torch.Tensor | None = None  # int16 [places, layers with experts x top_k]
        self.chosen: dict[int, torch.Tensor] = {}  # by layer, of the tokens of this forward: [T, top_k]
        self.kept: dict[str, dict[str, torch.Tensor]] = {}  # by name and sample
        self.given: set[str] = set()  # names that were asked for
        bind(runner.get_model(), self)
        self.compute, runner.execute_model = runner.execute_model, self.execute_model

    def capture(self, layer: int, experts: torch.Tensor) -> None:
        """Notes what a router has chosen; vLLM calls this."""
        self.chosen[layer] = experts.to(torch.int16, copy=True)

    def execute_model(self, scheduled: Any, *more: Any) -> Any:
        """Computes a step as the runner does, with its experts noted."""
        if scheduled.kv_cache_block_copies:
            raise RuntimeError("blocks are copied, and their experts do not follow")
        self._keep([*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())])
        for request in scheduled.scheduled_cached_reqs.resumed_req_ids:
            self._forget(request)  # it has blocks again
        self.chosen.clear()
        done = self.compute(scheduled, *more)
        if scheduled.total_num_scheduled_tokens:
            self._write(scheduled.num_scheduled_tokens)
        return done

    @torch.inference_mode()  # as the table was made
    def renew(self) -> None:
        """Forgets all that was chosen with older weights."""
        self.kept.clear()
        self.given.clear()
        if self.table is not None:
            self.table.fill_(NOBODY)

    @torch.inference_mode()
    def give(self, name: str, folder: str) -> None:
        """Writes the experts of each sample of a request to the folder, once: `<name>.experts`, safetensors, int16
        [its tokens that were inputs and what follows them in their last block, layers with experts x top_k]."""
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r}: is not the name of a request with experts")
        found = self.kept.pop(name, {})
        for request, state in self.runner.requests.items():
            if (own := named(request)) and own[0] == name and own[1] not in found:
                found[own[1]] = self._rows(state)
        self.given.add(name)  # a sample that its client has left may end only now
        save_file(found, os.path.join(folder, f"{name}.experts"))

    def _write(self, counts: Mapping[str, int]) -> None:
        """Writes what a forward has chosen, token after token of one request after the other, to their places."""
        rows = torch.cat([self.chosen[layer] for layer in sorted(self.chosen)], -1)
        if self.table is None:
            self.table = rows.new_full((self.places, rows.size(1)), NOBODY)
        places = []
        for request in self.runner.input_batch.req_ids:
            state = self.runner.requests[request]
            first = state.num_computed_tokens
            places.append(self._places(state, first, first + counts[request]))
        at = torch.cat(places)
        self.table[at] = rows[: len(at)]

    def _places(self, state: Any, first: int, stop: int) -> torch.Tensor:
        """Returns the places of a request's tokens `first` to `stop - 1`."""
        size = self.block_tokens
        blocks = torch.tensor(state.block_ids[0][first // size : -(-stop // size)])
        tokens = torch.arange(first, stop)
        return blocks[tokens // size - first // size] * size + tokens % size

    def _rows(self, state: Any) -> torch.Tensor:
        return self.table[self._places(state, 0, len(state.block_ids[0]) * self.block_tokens)]

    def _keep(self, requests: Iterable[str]) -> None:
        """Keeps the rows of requests whose blocks others may get in this step."""
        for request in requests:
            own, state = named(request), self.runner.requests.get(request)
            if own and own[0] not in self.given and state is not None and self.table is not None:
                self.kept.setdefault(own[0], {}).setdefault(own[1], self._rows(state))

    def _forget(self, request: str) -> None:
        if own := named(request):
            self.kept.get(own[0], {}).pop(own[1], None)


def named(request: str) -> tuple[str, str] | None:
    """Returns the name that our client gave a request of vLLM, and which of its samples it is; None where it is none of
    those."""
    found = REQUEST.fullmatch(request)
    return (found[2], found[1] or "0") if found else None
