"""Makes one update on groups, laid out by tokens, on each layout; compares loss, norm and every gradient with a plain
process in which each sample has a row of its own. Runs on several ranks with a JSON list of layouts."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist

from llmtrain.config.schema import EngineConfig, ParallelConfig, TrainConfig
from llmtrain.data.groups import piece_batch
from llmtrain.data.tree import Tree
from llmtrain.losses.policy import grpo_loss
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.trainer.batches import group_microbatches
from llmtrain.types import Group, Sample
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

COLUMNS = ("advantages",)
LOSS = partial(grpo_loss, clip_low=0.2, clip_high=0.28, kl_coef=0.0)


def drawn_groups() -> list[Group]:
    """Seven groups of samples that share their prompt, and four of samples that share turns too: what they write first,
    and what a tool answers; some were only told the first turn of the others."""
    rng = random.Random(1)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(64) for _ in range(rng.randint(least, most))]

    def sample(prompt: list[int], ids: list[int], told: int = 0, until: int = 0) -> Sample:
        n, old = len(ids), [rng.gauss(-4.2, 0.3) for _ in ids]
        trained, columns = [not told <= i < until for i in range(n)], {"advantages": [rng.gauss(1, 1)] * n}
        return Sample(prompt, ids, trained, old, [0] * n, finished=True, columns=columns)

    def turns(prompt: list[int]) -> Group:
        first, tool = tokens(1, 4), tokens(3, 8)
        told = [0 if i == 2 else len(first) for i in range(4)]
        return [sample(prompt, [*first, *tool, *tokens(1, 5)], k, len(first) + len(tool)) for k in told]

    prompts = [tokens(1, 5) for _ in range(11)]
    plain = [[sample(prompt, tokens(1, 9)) for _ in range(rng.randint(2, 5))] for prompt in prompts[:7]]
    return plain + [turns(prompt) for prompt in prompts[7:]]


def plain(layout: dict, groups: list[Group], denominator: float) -> dict:
    """Returns loss, norm and gradients of one process."""
    config = parity.model_config(layout)
    model = Decoder(config)
    for name, p in model.named_parameters():
        p.data.copy_(parity.initial(name, tuple(p.shape), config))
    alone = [Tree([sample]) for group in groups for sample in group]
    batch = piece_batch(alone, [[number] for number in range(len(alone))], 64, 0, COLUMNS)
    loss = LOSS(parity.scores_of(model, batch), batch)[0] / denominator
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.item(), "norm": torch.stack([g.norm() for g in grads.values()]).norm().item(), "grads": grads}


def case(layout: dict, mesh: Mesh) -> dict:
    groups = drawn_groups()
    denominator = sum(sample.written_tokens for group in groups for sample in group)
    want, engine = plain(layout, groups, denominator), parity.build({**layout, "grad_clip": 0}, mesh)
    errors = {"grad": 0.0, "worst": ""}
    parity.watch_updates(engine, lambda: parity.grads_seen(engine, want["grads"], want["norm"], 1.0, errors))
    sections = {"train": TrainConfig(seq_len=64, **layout["train"]), "rollout": SimpleNamespace(temperature=1.0)}
    tokenizer, config = SimpleNamespace(pad_id=0), SimpleNamespace(**sections)
    job = SimpleNamespace(config=config, mesh=mesh, tokenizer=tokenizer, model=parity.model_config(layout))
    batches = group_microbatches(job, groups, COLUMNS)
    stats = engine.train_step(batches, LOSS, torch.tensor(float(denominator)))
    return {
        **errors,
        "loss": abs(stats.loss - want["loss"]) / abs(want["loss"]),
        "norm": abs(stats.grad_norm - want["norm"]) / want["norm"],
        "shapes": [tuple(batch.input_ids.shape) for batch in batches],
    }


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        with mesh_of(parity.settings_of(layout)[0], EngineConfig(backend="fsdp")) as own:
            ranks = mesh.all_gather_json(case(layout, own))
        if mesh.rank == 0:
            print_json({"layout": layout, "ranks": ranks})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
