"""Runs the coordinate check of muP (arXiv 2203.03466, D.1): how far updates move the activations at each width.

With muP a step of one learning rate moves every activation equally far at every width; without it, wider models move
farther. A decoder of each width is trained for some steps; the measure is the mean absolute difference of each block's
output, and of the logits, from those before the first step, on the same rows.

    python -m benchmarks.coordinates [--out benchmarks/results/coordinates.json]    # and coordinates.png beside it
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.common import environment
from llmtrain.arch.mup import lr_factor
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig, MupConfig, OptimConfig
from llmtrain.engine.optim import build_optimizer, set_learning_rate
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.parallel.placement import Placement

VOCAB, ROWS, TOKENS = 256, 4, 32
FLAT, GROWN = 0.25, 0.4  # exponents of the width: at most FLAT with muP, at least GROWN without (for logits, the worst)


def model_of(width: int, base: int | None, layers: int, **fields: object) -> ModelConfig:
    """Returns a model whose heads, of width 16 at the base, grow in size and not in number."""
    mup = None if base is None else MupConfig(base_hidden=base, base_head_dim=base // 4)
    shape = {"hidden_size": width, "ffn_size": 3 * width, "num_layers": layers, "num_heads": 4, "num_kv_heads": 4}
    return resolve_model(ModelConfig(**shape, vocab_size=VOCAB, max_positions=TOKENS, mup=mup, **fields))


def decoder_of(config: ModelConfig, seed: int) -> Decoder:
    """Returns an initialised decoder, with the attributes that the optimizer reads."""
    model = Decoder(config)
    initialize(model, config, seed)
    for name, p in model.named_parameters():
        p.placement = Placement(name, tuple(p.shape), lr_factor=lr_factor(name, p.shape, config))
    return model


def moved(config: ModelConfig, steps: int, lr: float, seed: int) -> list[dict[str, float]]:
    """Returns after each step, by place, the mean absolute change of `states`."""
    model, rows = decoder_of(config, seed), _rows(seed)
    optim = OptimConfig(lr=lr, weight_decay=0.0)
    optimizer, start, found = build_optimizer(model, optim), states(model, rows[:, :-1]), []
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    for _ in range(steps):
        logits = model(rows[:, :-1], positions)
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        set_learning_rate(optimizer.param_groups, lr)
        optimizer.step()
        optimizer.zero_grad()
        now = states(model, rows[:, :-1])
        found.append({place: (now[place] - start[place]).abs().mean().item() for place in start})
    return found


@torch.no_grad()
def states(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """Returns the output of every block's attention and feed-forward layer, and the logits."""
    found: dict[str, Tensor] = {}
    places = {
        f"{part} {i}": getattr(block, part)
        for i, block in model.layers.items()
        for part in ("attention", "feedforward")
    }
    handles = [
        module.register_forward_hook(lambda _m, _i, y, place=place: found.__setitem__(place, y.clone()))
        for place, module in places.items()
    ]
    found["logits"] = model(ids, torch.arange(ids.size(1)).expand_as(ids))
    for handle in handles:
        handle.remove()
    return found


def _rows(seed: int) -> Tensor:
    """Returns random ids with word frequencies as in text."""
    frequencies = 1.0 / torch.arange(5, VOCAB + 5)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(frequencies, ROWS * (TOKENS + 1), True, generator=generator).view(ROWS, -1)


def by_width(
    widths: Sequence[int], mup: bool, steps: int, lr: float, seeds: int, layers: int, **fields: object
) -> dict[str, list[float]]:
    """Returns for each place the change after the last step at each width, averaged over seeds."""
    base = widths[0] if mup else None
    runs = [[moved(model_of(w, base, layers, **fields), steps, lr, s)[-1] for s in range(seeds)] for w in widths]
    return {place: [fmean(run[place] for run in group) for group in runs] for place in runs[0][0]}


def exponent(widths: Sequence[int], values: Sequence[float]) -> float:
    """Returns p of the best fit of value = c width^p."""
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    return sum((a - fmean(x)) * (b - fmean(y)) for a, b in zip(x, y, strict=True)) / sum((a - fmean(x)) ** 2 for a in x)


def plot(widths: Sequence[int], found: dict[str, dict[str, list[float]]], path: str) -> None:
    """Draws two panels on logarithmic axes, a line for each place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=144, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, places) in zip(panels, found.items(), strict=True):
        for place, values in places.items():
            axes.plot(widths, values, marker="o", markersize=3, linewidth=2.5 if place == "logits" else 1, label=place)
        axes.set(xscale="log", yscale="log", xlabel="hidden_size", title=title)
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.minorticks_off()
    panels[0].set_ylabel("mean absolute change of the activations")
    panels[1].legend(fontsize=7, frameon=False, ncols=2)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Runs the check. Returns 1 when a change is not as flat, or as steep, as it has to be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coordinates", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="the first is the base")
    for name, default in {"steps": 4, "seeds": 3, "layers": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--lr", type=float, default=0.003, help="default: 0.003")
    parser.add_argument("--out", default="benchmarks/results/coordinates.json", help="JSON; the plot lies beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    before = os.getloadavg()[0]
    found, slopes = {}, {}
    for title, mup in (("without muP", False), ("with muP", True)):
        found[title] = by_width(args.widths, mup, args.steps, args.lr, args.seeds, args.layers)
        slopes[title] = {place: exponent(args.widths, values) for place, values in found[title].items()}
        for place, values in found[title].items():
            print(f"{title:12} {place:14} {slopes[title][place]:+.2f}  " + " ".join(f"{v:.4f}" for v in values))
    worst = max(abs(slope) for slope in slopes["with muP"].values())
    met = worst <= FLAT and slopes["without muP"]["logits"] >= GROWN
    print(
        f"{'met' if met else 'MISSED'}: exponents of the width with muP within {FLAT}: {worst:.2f}; without, of logits"
    )
    print(f"at least {GROWN}: {slopes['without muP']['logits']:.2f}")
    plot(args.widths, found, str(Path(args.out).with_suffix(".png")))
    described = environment("benchmarks.coordinates", ("torch",), args.threads)
    record = {**described, "load_average_before": before, "arguments": vars(args), "met": met}
    Path(args.out).write_text(json.dumps({**record, "exponents": slopes, "changes": found}, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
