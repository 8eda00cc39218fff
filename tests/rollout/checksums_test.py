"""Checksums of weights, by the bytes of a tensor worked by hand and hashed by hashlib."""

from __future__ import annotations

import hashlib

import torch

from llmtrain.rollout.checksums import checksum, differing, noted
from llmtrain.rollout.native import NativeGenerator
from tests.rollout.native_test import SMALL, random_decoder


def test_the_bytes_of_a_tensor_row_by_row() -> None:
    assert checksum(torch.tensor([1.0])) == hashlib.sha256(bytes.fromhex("0000803f")).hexdigest()[:16]
    both = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16)  # 3f80 c000 3f00 0000, little-endian
    assert checksum(both) == hashlib.sha256(bytes.fromhex("803f00c0003f0000")).hexdigest()[:16]
    assert checksum(both.T) == hashlib.sha256(bytes.fromhex("803f003f00c00000")).hexdigest()[:16]
    assert checksum(torch.nn.Parameter(torch.tensor(3.0))) == checksum(torch.tensor([3.0]))  # no dim, with a gradient
    assert checksum(torch.zeros(0)) == hashlib.sha256().hexdigest()[:16]


def test_one_bit_tells_two_tensors_apart() -> None:
    one, other = torch.zeros(1000), torch.zeros(1000)
    other[500] = -0.0
    assert one.equal(other) and checksum(one) != checksum(other)


def test_weights_are_noted_as_they_pass() -> None:
    sums: dict[str, str] = {}
    passing = noted([("a", torch.ones(1)), ("b", torch.zeros(1))], sums)
    assert next(passing)[0] == "a" and sums == {"a": checksum(torch.ones(1))}
    assert next(passing)[1].equal(torch.zeros(1)) and list(sums) == ["a", "b"]


def test_differing_in_the_order_of_sending() -> None:
    sent = {"c": "1", "a": "2", "b": "3"}
    assert differing(sent, dict(sent)) == []
    assert differing(sent, {"a": "0", "b": "3", "c": "0"}) == ["c", "a"]
    assert differing(sent, {"c": "1", "a": "2", "x": "9"}) == ["b", "x"]  # one is missing, one is new


def test_a_generator_tells_what_it_holds_without_a_tied_head() -> None:
    generator = NativeGenerator(random_decoder(SMALL), 1, "cpu")
    (held,) = generator.checksums()
    names = [name for name in generator.model.state_dict() if name != "head.weight"]
    assert SMALL.tie_embeddings and list(held) == names
    assert held["embed.weight"] == checksum(generator.model.embed.weight)
    untied = random_decoder(SMALL.model_copy(update={"tie_embeddings": False}))
    assert "head.weight" in NativeGenerator(untied, 1, "cpu").checksums()[0]
