"""Computes names and shapes of low-rank adapters (`model.lora`), and which weights may have one. No torch here.

`model` is a resolved ModelConfig (see `arch.resolve`) everywhere.
"""

from __future__ import annotations

from llmtrain.arch.parameters import Shape, layer_shapes
from llmtrain.config.schema import ModelConfig


def without_adapters(model: ModelConfig) -> ModelConfig:
    """Returns the model that adapters are added to, which is also the model after they are merged."""
    return model if model.lora is None else model.model_copy(update={"lora": None})


def projections(model: ModelConfig) -> dict[str, Shape]:
    """Returns the modules of blocks that can have an adapter, with the shape [out, in] of their weight, in module
    order.

    The experts' weights, stacked in one 3-dimensional tensor, and the router cannot have one.
    """
    found = {}
    for layer in range(model.num_layers):
        for name, shape in layer_shapes(model, layer).items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and len(shape) == 2 and not module.endswith("router"):
                found[f"layers.{layer}.{module}"] = shape
    return found


def target_names(model: ModelConfig) -> list[str]:
    """Returns the names that `model.lora.targets` may hold: the last parts of `projections`, each once.

    A name that routed experts have too (`gate` in a model with some dense layers) is left out: the experts' projections
    of that name would silently get no adapter.
    """
    fused = {
        name.rpartition(".")[2]
        for layer in range(model.num_layers)
        for name, shape in layer_shapes(model, layer).items()
        if len(shape) == 3
    }
    names = dict.fromkeys(module.rpartition(".")[2] for module in projections(model))
    return [name for name in names if name not in fused]


def adapter_of(model: ModelConfig, name: str) -> str | None:
    """Returns the module name of the adapter of a canonical parameter, None where it has none.

    Example: `layers.0.attention.q.lora` for `layers.0.attention.q.weight`.
    """
    module, _, leaf = name.rpartition(".")
    targeted = model.lora is not None and module.rpartition(".")[2] in model.lora.targets
    return f"{module}.lora" if targeted and leaf == "weight" and name.startswith("layers.") else None


def adapter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Returns canonical names and global shapes of all adapters: `a` [rank, in] and `b` [out, rank]."""
    if model.lora is None:
        return {}
    rank, shapes = model.lora.rank, {}
    for module, (rows, columns) in projections(model).items():
        adapter = adapter_of(model, f"{module}.weight")
        if adapter is not None:
            shapes |= {f"{adapter}.a": (rank, columns), f"{adapter}.b": (rows, rank)}
    return shapes
