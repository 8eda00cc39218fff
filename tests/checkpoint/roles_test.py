"""One checkpoint holds every trained model of a job, and each loads on any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import verify
from llmtrain.checkpoint.roles import Roles, held_roles, joined_shapes, joined_states, read_role
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.checkpoint.source import weight_source
from llmtrain.trainer.job import GuardState, Updates

WORKER = Path(__file__).with_name("roles_worker.py")
CLOSE = 1e-6  # of losses, norms and weights on another mesh
Z1, Z2, Z3, FSDP = (*({"zero_stage": stage} for stage in (1, 2, 3)), {"backend": "fsdp"})
FIRST = {"mesh": {"pp": 2, "dp_shard": 2}, "policy": Z1, "critic": Z3, "until": 5, "save": 3}
AGAIN = {"mesh": {"pp": 2, "dp_shard": 2}, "policy": Z1, "critic": Z3, "until": 5}
ELSEWHERE = [
    {"mesh": {"dp_shard": 2}, "policy": Z3, "critic": Z2, "until": 5},
    {"mesh": {"tp": 2}, "policy": FSDP, "critic": Z1, "until": 5},
]


def results(forked: Callable, ranks: int, cases: list[dict], directory: Path) -> list[dict]:
    result = forked(ranks, WORKER, json.dumps(cases), directory, timeout_s=200)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]
    assert len(lines) == len(cases), result.stdout[-3000:]
    return lines


def test_two_models_go_on_from_one_checkpoint(forked: Callable, tmp_path: Path) -> None:
    straight, again = results(forked, 4, [FIRST, AGAIN], tmp_path)
    assert straight["from"] is None and again["from"].endswith("step-00000003")
    assert again["steps"] == straight["steps"] == [5, 4]
    assert again["seen"] == straight["seen"][3:] and again["weights"] == straight["weights"]  # bit for bit
    alone = {**ELSEWHERE[0], "roles": ["policy"]}
    *others, refused = results(forked, 2, [*ELSEWHERE, alone], tmp_path)
    for other in others:
        assert other["steps"] == [5, 4]
        pairs = zip(sum(other["seen"], other["weights"]), sum(straight["seen"][3:], straight["weights"]), strict=True)
        assert max(abs(x - y) / abs(y) for x, y in pairs) < CLOSE, other
    assert "holds the models critic, policy, and this run trains policy" in refused["error"]


def small(fake: SimpleNamespace, seed: int, layers: int = 2) -> tuple[object, dict]:
    config = fake.CONFIG.model_copy(update={"num_layers": layers})
    return config, fake.tensors(config, seed)


def save_both(fake: SimpleNamespace, directory: Path) -> tuple[CheckpointReader, dict[str, tuple[object, dict]]]:
    """A checkpoint of two models on two ranks."""
    models = {"policy": small(fake, 0), "critic": small(fake, 1, layers=1)}
    shapes = joined_shapes({role: fake.shapes(tensors) for role, (_, tensors) in models.items()})
    states = {
        role: {"optimizer_step": n, "model": model[0].model_dump(mode="json")}
        for n, (role, model) in enumerate(models.items())
    }
    state = {"step": 4, **joined_states(states)}

    def action(group: object) -> str:
        layout = fake.Layout(tp=2)
        engines = {role: fake.FakeEngine(layout, group.rank, tensors) for role, (_, tensors) in models.items()}
        return save_checkpoint(str(directory), Roles(engines), state, group, 1, shapes)

    path, _ = fake.run_ranks(2, action)
    verify(path)
    return CheckpointReader(path), models


def test_each_is_read_by_its_own_names(fake: SimpleNamespace, tmp_path: Path) -> None:
    reader, models = save_both(fake, tmp_path)
    assert held_roles(reader) == ["policy", "critic"]
    for step, (role, (config, tensors)) in enumerate(models.items()):
        own = read_role(reader, role)
        assert own.names() == list(tensors) and own.state["optimizer_step"] == step and own.state["step"] == 4
        assert own.state["model"]["num_layers"] == config.num_layers
        for name, keys in tensors.items():  # in turns: what one has read is not the other's
            assert read_role(reader, "policy").full("embed.weight").equal(models["policy"][1]["embed.weight"]["weight"])
            assert all(own.full(name, key).equal(value) for key, value in keys.items())
        engine = fake.FakeEngine(fake.Layout(dp=2), 1, tensors)
        engine.load_fragments(own.read, step)
        for loaded in engine.loaded:
            full = tensors[loaded.address.name]["exp_avg"].flatten()
            start = loaded.address.start
            assert loaded.tensors["exp_avg"].equal(full[start : start + loaded.address.numel])
    with pytest.raises(ValueError, match=r"no parameter critic/layers\.1\.attention_norm"):
        read_role(reader, "critic").full("layers.1.attention_norm.weight")


def test_whoever_asks_for_weights_gets_the_policy(fake: SimpleNamespace, tmp_path: Path) -> None:
    reader, models = save_both(fake, tmp_path)
    config, tensors = models["policy"]
    weight = weight_source(reader.path, config)
    assert all(weight(name).equal(keys["weight"]) for name, keys in tensors.items())


def test_a_checkpoint_of_one_model_without_roles(fake: SimpleNamespace, tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    tensors = fake.tensors()
    fake.save(tmp_path, tensors, fake.Layout(), 1)
    reader = CheckpointReader(str(tmp_path / "step-00000001"))
    assert held_roles(reader) == ["policy"] and read_role(reader, "policy").names() == list(tensors)
    saved = {"losses": [2.0, 1.0], "skips": 1, "rewinds": [[3, 2, 64]]}
    assert GuardState.of_checkpoint(saved) == GuardState({"policy": Updates([2.0, 1.0], 1)}, [[3, 2, 64]])
    two = {"updates": {"policy": {"losses": [], "skips": 0}, "critic": {"losses": [1.0], "skips": 2}}, "rewinds": []}
    assert GuardState.of_checkpoint(two).of("critic") == Updates([1.0], 2)


def test_one_model_is_saved_as_it_was_before(fake: SimpleNamespace, tmp_path: Path) -> None:
    tensors = fake.tensors()
    roles = Roles({"policy": fake.FakeEngine(fake.Layout(), 0, tensors)})
    assert [f.address.name for f in roles.fragments()] == list(tensors)
    assert joined_shapes({"policy": fake.shapes(tensors)}) == fake.shapes(tensors)
    assert joined_states({"policy": {"optimizer_step": 3}}) == {"optimizer_step": 3, "roles": {}}
