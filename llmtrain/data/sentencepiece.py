"""Reads SentencePiece models as fast tokenizers that give the same ids as SentencePiece's own encoder.

The text normalisation is rebuilt from the model's `normalizer_spec`; vocabulary, scores and merges are read with the
converter of transformers. A model that cannot be rebuilt exactly is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

FILES = ("tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model")  # as published models name it
SPACE = "▁"  # stands for a space, so a text that contains this character decodes to another text
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # type of a piece


def read_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns (tokenizer, entries of tokenizer_config.json) of a `.model` file.

    Raises ValueError when it is not a SentencePiece model, or one that would not give the same ids.
    """
    proto = parse(path)
    if fault := next(faults(proto), None):
        raise ValueError(f"{path}: {fault}; give a tokenizer.json made with the library that trained it")
    built = Tokenizer(unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else bpe(proto))
    built.normalizer, built.decoder = normalizer(proto.normalizer_spec), decoder(proto)
    if proto.trainer_spec.model_type == UNIGRAM:
        built.pre_tokenizer = pre_tokenizers.Split(Regex(hidden_pieces(proto)), "merged_with_previous")
    built.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == USER_DEFINED])
    special = [
        AddedToken(p.piece, normalized=False, special=True) for p in proto.pieces if p.type in (UNKNOWN, CONTROL)
    ]
    built.add_special_tokens(special)
    return built, entries(proto)


def parse(path: Path) -> Any:
    """Returns the model's protocol buffer. Raises ValueError when the file is not a SentencePiece model."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ValueError(f"{path}: not a SentencePiece model, or cut short") from None
    if not proto.pieces:
        raise ValueError(f"{path}: not a SentencePiece model: it has no pieces")
    return proto


def faults(proto: Any) -> Iterator[str]:
    """Yields the features of the model that cannot be rebuilt."""
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    if trained.model_type not in (UNIGRAM, BPE):
        yield "a SentencePiece model of words or characters, only unigram and bpe are read"
    if trained.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        yield "a SentencePiece model that writes spaces in another way than before a word, which is not read"
    if UNUSED in kinds:
        yield "a SentencePiece model with unused pieces, which are not read"
    if USER_DEFINED in kinds and rules.add_dummy_prefix:
        yield "a SentencePiece model with user-defined symbols and a dummy prefix, which are not read together"


def unigram(proto: Any) -> models.Unigram:
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(vocabulary, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def bpe(proto: Any) -> models.BPE:
    """Returns the BPE model, with a merge for each way to build a piece of two, in order of score.

    Only normal pieces are merged.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = generate_merges(ids, plain, skip_tokens=ids.keys() - plain.keys())
    trained = proto.trainer_spec
    return models.BPE(ids, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback)


def normalizer(rules: Any) -> normalizers.Normalizer:
    """Returns the normalizer: Unicode normalization if the model has one, then spaces."""
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def decoder(proto: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1, right=0))
    return decoders.Sequence(steps)


def hidden_pieces(proto: Any) -> str:
    """Returns a pattern that splits the spelling of control, unknown and byte pieces after its first character.

    Without it the library's Unigram would read `<s>` or `<0x41>` in a text as the piece, which SentencePiece never
    does.
    """
    names = [p.piece for p in proto.pieces if p.type in (UNKNOWN, CONTROL, BYTE) and len(p.piece) > 1]
    return "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)


def entries(proto: Any) -> dict[str, Any]:
    """Returns the entries of tokenizer_config.json: bos, eos, unk and pad tokens as far as the model has them (id -1:
    none)."""
    trained, written = proto.trainer_spec, {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "unk", "pad"):
        if 0 <= getattr(trained, f"{name}_id") < len(proto.pieces):
            written[f"{name}_token"] = proto.pieces[getattr(trained, f"{name}_id")].piece
    return written | {"clean_up_tokenization_spaces": False}
