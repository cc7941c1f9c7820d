"""How fresh MiLoRA routers treat the prompts of a task, layer by layer: by states as they are, and standardised.

    python scripts/research/routing_at_start.py model=llama model.path=FOLDER task=sst2 task.path=DATA/sst2
    python scripts/research/routing_at_start.py task=tiny_mix method.k=1

Takes the overrides of ``lrk train``. Statistics come from 48 training prompts, as in training; what is shown is of 24
others, the mean over 8 seeds of the routers: the largest gate, the sets of modules that occur, and the entropy of these
sets over the prompts in bits (at most log2 24 = 4.6).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.routing.choice_stats import Choices
from lowrank_cli.adapter.routing.router import Router
from lowrank_cli.config.composition import compose
from lowrank_cli.methods.milora import PROMPTS
from lowrank_cli.session.session import Session, start

OTHERS, SEEDS, ROWS = 24, 8, 8  #: prompts that are shown, seeds of the routers, prompts of a pass
COLUMNS = ("largest_gate", "distinct_sets", "set_entropy")


@torch.no_grad()
def pooled(session: Session, standardized: bool) -> Tensor:
    """What each layer's router pools from the prompts: (L, B, D)."""
    drawn = random.Random(session.config.seed).sample(session.task.train, PROMPTS + OTHERS)
    rows = session.encode(drawn)
    assert session.adapter is not None and session.adapter.routing is not None
    for router in session.adapter.routing.routers:
        router.standardized = standardized
    session.model.eval()
    with session.adapter.routing.pooling() as layers:
        for at in range(0, len(rows), ROWS):
            batch = session.batch(rows[at : at + ROWS])
            batch.pop("labels")
            session.model(**batch, logits_to_keep=1, use_cache=False)
    return torch.stack([torch.cat(layer) for layer in layers])


@torch.no_grad()
def shown(routers: Sequence[Router], pooled: Tensor, k: int) -> dict[str, list[float]]:
    """By layer, the mean over the seeds."""
    modules = routers[0].projection.out_features
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        choices = Choices(len(routers), modules, k)
        for layer, router in enumerate(routers):
            nn.init.normal_(router.projection.weight, std=0.02)
            choices.add(layer, router.choose(pooled[layer, PROMPTS:]))
        found.append(choices.by_layer())
    return {name: torch.tensor([one[name] for one in found]).double().mean(dim=0).tolist() for name in COLUMNS}


def main() -> None:
    session = start(compose("train", ["method=milora", "method.standardize=true", *sys.argv[1:]]).config)
    routing = session.adapter.routing
    plain = pooled(session, standardized=False)
    before = shown(routing.routers, plain, routing.k)
    states = pooled(session, standardized=True)
    for router, rows in zip(routing.routers, states[:, :PROMPTS], strict=True):
        router.standardize(rows.mean(dim=0), rows.std(dim=0, correction=0))
    after = shown(routing.routers, states, routing.k)
    print(f"{session.header}, k = {routing.k}; largest gate, sets of {OTHERS} prompts, their entropy in bits")
    print(f"{'layer':>5} {'states as they are':>24} {'standardised':>24}")
    for layer in range(len(routing.routers)):
        cells = [f"{one[name][layer]:8.2f}" for one in (before, after) for name in COLUMNS]
        print(f"{layer:>5} {' '.join(cells[:3])} {' '.join(cells[3:])}")


if __name__ == "__main__":
    main()
