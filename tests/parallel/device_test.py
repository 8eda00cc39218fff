"""The device of a rank, on machines that this one is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmtrain.parallel import device


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int = 1) -> list[torch.device]:
    """A GPU with a torch that was built for a few; returns the devices that are set."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = gpu(monkeypatch, (8, 6), count=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device.rank_device()] == chosen == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2: this machine has 2 GPU\(s\), .*; start fewer ranks, or set"):
        device.rank_device()


def test_a_gpu_that_the_build_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert gpu(monkeypatch, (3, 7)) == []
    with pytest.raises(
        ValueError, match=r"Tesla K80 \(compute capability 3.7\): torch .* was built for sm_75, "
    ) as told:
        device.rank_device()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("capability", "fits"), [((7, 5), True), ((8, 9), True), ((7, 0), False), ((9, 0), True), ((12, 0), True)]
)
def test_builds(capability: tuple[int, int], fits: bool) -> None:
    assert device.runs(capability, ["sm_75", "sm_80", "sm_90a", "compute_90"]) == fits
    assert device.runs(capability, []) and device.runs(capability, ["gfx90a"])
    assert not device.runs((12, 0), ["sm_90"])


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "was built without CUDA"), ("13.0", "needs a driver for CUDA 13.0")]
)
def test_a_gpu_without_a_torch_for_it_is_not_left_idle(
    cuda: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert device.rank_device() == torch.device("cpu")
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    with pytest.raises(
        ValueError, match=f"{reason}.*; install the torch that fits it .*, or set CUDA_VISIBLE_DEVICES="
    ):
        device.rank_device()
