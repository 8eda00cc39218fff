"""Extends a vLLM server by the loading of weights and by a guard of its routes.

vLLM imports this file by its name, in the interpreter that it is installed in: nothing of llmtrain is imported here.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from typing import Any

import torch
from llmtrain_experts import Recorder
from safetensors.torch import load_file
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.kv_cache_interface import FullAttentionSpec

TOKEN, FOLDER = "VLLM_API_KEY", "LLMTRAIN_VLLM_FOLDER"  # environment: of the server alone, and where weights come from
BUCKET = re.compile(r"\d+\.safetensors")
RPC = "/collective_rpc"
ROUTES = {"/health", "/inference/v1/generate", "/reset_prefix_cache", "/update_weight_version", "/sleep", "/wake_up"}
METHODS = {f"llmtrain_{name}" for name in ("begin", "load", "finish", "version", "record", "experts")}
MAX_RPC_BYTES = 4096


class Loader:
    """Extends vLLM's worker: replaces its weights, some at a time, by tensors with Hugging Face names.

    Weights come in safetensors files in the private folder of this server, nothing else is read.
    """

    _llmtrain_missing: set[str] | None = None  # parameters that an update under way has not brought yet
    _llmtrain_version = ""  # of the weights, "" before there are any and while they change
    _llmtrain_recorder: Recorder | None = None  # of the first process that shares a model: all choose alike

    def llmtrain_begin(self) -> None:
        """Begins an update; nothing may be sampled until it is finished. One that broke off is left."""
        model = self.model_runner.get_model()
        if self._llmtrain_missing is not None:
            finalize_layerwise_reload(model, self.model_runner.model_config)
        self._llmtrain_missing, self._llmtrain_version = {name for name, _ in model.named_parameters()}, ""
        initialize_layerwise_reload(model)
        if self.device.type == "cpu":
            forget_packed_experts(model)
        if self._llmtrain_recorder is not None:
            self._llmtrain_recorder.renew()

    @torch.inference_mode()
    def llmtrain_load(self, name: str) -> None:
        """Loads a file of the folder."""
        if not BUCKET.fullmatch(name):
            raise ValueError(f"{name[:80]!r}: is not the name of a file with weights")
        tensors = load_file(os.path.join(os.environ[FOLDER], name))
        self._llmtrain_missing -= set(self.model_runner.get_model().load_weights(tensors.items()))

    @torch.inference_mode()
    def llmtrain_finish(self, version: str) -> dict[str, list[str]]:
        """Makes the update count, and returns the parameters that it lacked."""
        model, missing = self.model_runner.get_model(), self._llmtrain_missing
        finalize_layerwise_reload(model, self.model_runner.model_config)
        for module in model.modules():
            if isinstance(module, ParallelLMHead):  # a CPU keeps a packed copy of a tied head, which no reload renews
                module.quant_method.process_weights_after_loading(module)
        self._llmtrain_missing, self._llmtrain_version = None, version
        return {"missing": sorted(missing)}

    def llmtrain_version(self) -> dict[str, str]:
        """Returns which weights these are."""
        return {"version": self._llmtrain_version}

    def llmtrain_record(self) -> None:
        """Begins to record the experts that are chosen. Raises ValueError where a layer forgets tokens (a sliding
        window), as their blocks do not stay, and on a GPU, which has another model runner."""
        kinds = [type(group.kv_cache_spec) for group in self.model_runner.kv_cache_config.kv_cache_groups]
        if self.device.type != "cpu" or kinds != [FullAttentionSpec]:
            raise ValueError(f"experts are recorded on a CPU, with full attention, not on {self.device} with {kinds}")
        if get_tp_group().is_first_rank:
            self._llmtrain_recorder = Recorder(self.model_runner, bind_routed_experts_capturer)

    def llmtrain_experts(self, name: str) -> None:
        """Writes the experts of a request to the folder."""
        if self._llmtrain_recorder is not None:
            self._llmtrain_recorder.give(name, os.environ[FOLDER])


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Makes a CPU pack experts when they are loaded: it does so for the first weights alone, and would compute with
    later ones as if they were packed."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class Guard:
    """Wraps the server: answers only who has the token, on the routes that are needed alone.

    vLLM itself asks for a token under /v1 and /inference only, and runs any method of its workers by name for anybody.
    """

    def __init__(self, app: Any) -> None:
        self.app, self.token = app, os.environ[TOKEN].encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not self._known(scope):
            await refuse(send, 401)
        elif scope["path"] == RPC:
            await self._call(scope, receive, send)
        elif scope["path"] in ROUTES:
            await self.app(scope, receive, send)
        else:
            await refuse(send, 404)

    def _known(self, scope: dict[str, Any]) -> bool:
        said = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(said, b"Bearer " + self.token)

    async def _call(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Lets a call of a worker's method through, if it is one of ours and all its arguments are texts."""
        data, more = b"", True
        while more and len(data) <= MAX_RPC_BYTES:
            message = await receive()
            data, more = data + message.get("body", b""), message.get("more_body", False)
        if len(data) > MAX_RPC_BYTES or not permitted(data):
            await refuse(send, 403)
            return
        messages = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def replay() -> Any:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


def permitted(data: bytes) -> bool:
    """Tells whether a body asks for one of our methods, with texts."""
    try:
        body = json.loads(data)
    except ValueError:
        return False
    if not isinstance(body, dict) or body.keys() - {"method", "args"} or body.get("method") not in METHODS:
        return False
    arguments = body.get("args", [])
    return isinstance(arguments, list) and all(isinstance(a, str) for a in arguments)


async def refuse(send: Any, status: int) -> None:
    """Answers with a status alone."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
