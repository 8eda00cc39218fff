"""Compares a decoder with its class in transformers, on random weights, for the tests of all families.

A test of a family is a hypothesis strategy of small transformers configs and one call of each `check_...`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedConfig as HfConfig

from llmtrain.arch.parameters import layer_shapes, outer_shapes
from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_write import INDEX, save_hf
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling

EXAMPLES = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
"""Draws the configs of each family; they are the same in every run."""

TOLERANCE = 1e-5  # of logits, fp32
EOS = 1
NOT_THE_MODEL = {  # keys of a config.json that say nothing about what is computed
    *("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"),  # `layer_types` says it
    "rope_parameters",  # ours have the defaults too; their sense is compared with that of all others
}


@dataclass(frozen=True)
class Pair:
    """Holds a model of transformers, its directory, and our decoder with the weights of that directory."""

    theirs: PreTrainedModel
    directory: Path
    config: ModelConfig
    ours: Decoder

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def logits(self, ids: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Returns our logits."""
        return self.ours(ids, torch.arange(ids.size(1)).expand_as(ids) if positions is None else positions, segment_ids)


def random_reference(model: type[PreTrainedModel], config: HfConfig, seed: int = 0) -> PreTrainedModel:
    """Returns a model with weights of a size that lets logits spread, and norms, biases and buffers that show when they
    are mistaken."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"  # the formula; it alone has soft caps
    reference = model(config).eval()
    with torch.no_grad():
        for tensor in reference.state_dict(keep_vars=True).values():
            if tensor.dim() == 1:
                tensor.add_(torch.rand(tensor.shape) - 0.5)  # around 1, or 0 where the factor is 1 + weight
            else:
                tensor.normal_(0, 0.2)
    if reference.can_generate():
        reference.generation_config.eos_token_id = EOS
    return reference


def read_decoder(directory: Path, config: ModelConfig) -> Decoder:
    """Returns our decoder with the weights in a directory."""
    read, model = hf_weight_source(str(directory), config), Decoder(config).eval()
    model.load_state_dict({name: read(name) for name in model.state_dict()})
    return model


@contextmanager
def pair(model: type[PreTrainedModel], config: HfConfig, shard: str = "5GB") -> Iterator[Pair]:
    """Yields a model saved by transformers and read by us."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, directory = random_reference(model, config), Path(folder) / "theirs"
        theirs.save_pretrained(directory, max_shard_size=shard)
        read = resolve_model(ModelConfig(init_from=str(directory)))
        yield Pair(theirs, directory, read, read_decoder(directory, read))


def random_ids(vocab_size: int, rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(2, vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1 and theirs.isfinite().all()
    assert (ours - theirs).abs().max() <= TOLERANCE


@torch.no_grad()
def check_logits(model: type[PreTrainedModel], config: HfConfig, tokens: int = 20) -> None:
    """Checks logits of plain rows, packed documents and padding on either side, and the parameters' shapes."""
    with pair(model, config) as p:
        check_shapes(p.config)
        ids = random_ids(p.vocab_size, 2, tokens)
        agree(p.logits(ids), p.theirs(ids).logits)
        _check_packed(p, ids)
        for left in (False, True):
            _check_padded(p, ids, left)


def check_shapes(config: ModelConfig) -> None:
    """Checks that the decoder has exactly the parameters that `arch.parameters` computes."""
    front, behind = outer_shapes(config)
    layers = {
        f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in layer_shapes(config, i).items()
    }
    assert parameter_shapes(config) == {**front, **layers, **behind}


def _check_packed(p: Pair, ids: Tensor) -> None:
    """Compares two documents and some padding in a row of ours with each document alone in transformers."""
    first, second = ids.size(1) // 2 - 2, ids.size(1) // 2
    end = first + second
    positions = torch.cat([torch.arange(first), torch.arange(second), torch.zeros(ids.size(1) - end).long()])
    segments = torch.cat([torch.zeros(first), torch.ones(second), torch.full((ids.size(1) - end,), -1.0)]).long()
    packed = p.logits(ids, positions.expand_as(ids), segments.expand_as(ids))
    agree(packed[:, :first], p.theirs(ids[:, :first]).logits)
    agree(packed[:, first:end], p.theirs(ids[:, first:end]).logits)
    assert packed.isfinite().all()


def _check_padded(p: Pair, ids: Tensor, left: bool) -> None:
    """Compares rows of two lengths, as transformers pads them, and the longer one alone."""
    places, lengths = torch.arange(ids.size(1)), torch.tensor([[ids.size(1)], [ids.size(1) - 7]])
    real = places >= ids.size(1) - lengths if left else places < lengths
    positions = (real.cumsum(1) - 1).clamp(min=0)
    segments = real.long() - 1
    ours = p.logits(ids, positions, segments)
    theirs = p.theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    agree(ours[real], theirs[real])
    agree(ours[1][real[1]][None], p.theirs(ids[1][real[1]][None]).logits)


def check_gradients(model: type[PreTrainedModel], config: HfConfig, tokens: int = 20) -> None:
    """Checks the gradients of the sum of all next-token losses, for every parameter."""
    with pair(model, config) as p:
        ids = random_ids(p.vocab_size, 2, tokens)
        for logits in (p.logits(ids), p.theirs(ids).logits):
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        read = _gradients(p)
        largest = max(read(name).abs().max() for name, _ in p.ours.named_parameters())
        for name, parameter in p.ours.named_parameters():
            theirs = read(name)
            assert parameter.grad is not None, name
            # some are 0 but for rounding, such as that of GPT-2's key bias
            bound = 1e-4 * theirs.abs().max() + 1e-6 * largest
            assert (parameter.grad - theirs).abs().max() <= bound, name


def _gradients(p: Pair) -> Callable[[str], Tensor]:
    """Returns their gradients by our names: they are saved in the place of the weights and read as weights are."""
    for parameter in p.theirs.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    p.theirs.save_pretrained(p.directory.parent / "gradients")
    return hf_weight_source(str(p.directory.parent / "gradients"), p.config)


@torch.no_grad()
def check_round_trip(model: type[PreTrainedModel], config: HfConfig) -> None:
    """Checks that transformers -> ours -> transformers, in shards, gives the same bytes, an equivalent config and equal
    logits, with the tokenizer and the generation config."""
    with pair(model, config, shard="20KB") as p:
        written = p.directory.parent / "ours"
        weights = p.ours.state_dict().items()
        save_hf(str(written), p.config, weights, torch.float32, str(tiny_tokenizer()), EOS, max_shard_bytes=20e3)
        assert (written / INDEX).exists() and len(list(written.glob("*.safetensors"))) > 1
        same_bytes(tensors_of(p.directory), tensors_of(written))
        again = AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager")
        same_config(p, again)
        ids = random_ids(p.vocab_size, 2, 20)
        assert torch.equal(again(ids).logits, p.theirs(ids).logits)
        assert again.generation_config.eos_token_id == EOS
        assert AutoTokenizer.from_pretrained(written)("a b").input_ids == [0, 1]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one)


def same_config(p: Pair, again: PreTrainedModel) -> None:
    """Checks that two configs mean the same to transformers and to us."""
    assert type(again) is type(p.theirs)
    theirs, ours = (json.loads(model.config.to_json_string(use_diff=False)) for model in (p.theirs, again))
    different = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    assert different <= NOT_THE_MODEL, {key: (theirs.get(key), ours.get(key)) for key in different - NOT_THE_MODEL}
    assert fields_from_hf(ours) == fields_from_hf(theirs) == fields_from_hf(hf_config(p.config))


@cache
def tiny_tokenizer() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="llmtrain-tokenizer-"))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return directory


def check_generation(model: type[PreTrainedModel], config: HfConfig, new_tokens: int = 24) -> None:
    """Checks that greedy completions of several prompts, decoded together, are those of `generate`, one by one."""
    with pair(model, config) as p:
        generator = NativeGenerator(p.ours, max_batch_seqs=3, device="cpu")
        lengths = (5, 1, 30, 12)
        prompts = [Prompt(random_ids(p.vocab_size, 1, n, seed=n)[0].tolist()) for n in lengths]
        groups = generator.generate(prompts, Sampling(new_tokens, temperature=0, stop_ids=(EOS,)))
        for prompt, (sample,) in zip(prompts, groups, strict=True):
            ids = torch.tensor([prompt.ids])
            settings = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            expected = p.theirs.generate(ids, eos_token_id=EOS, pad_token_id=0, **settings)
            assert prompt.ids + sample.ids == expected[0].tolist()
