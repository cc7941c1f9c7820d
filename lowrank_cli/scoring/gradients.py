"""Scores of ranks from gradients or norms: the first-order ablation, and the scores it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.kinds.rank_values import Importance
from lowrank_cli.scoring.ablation import evaluating
from lowrank_cli.scoring.probe import Batch, Probe, row_losses

PIECES = 8  #: parts of the batch, for smoothing and gate training
SMOOTHING = 0.85  #: β1 = β2 of Zhang et al., ICLR 2023, arXiv 2303.10512, section 4 and appendix
GATE_PASSES = 4  #: passes over the batch in which relaxed gates are trained
GATE_RATE = 0.01  #: Adam's learning rate of relaxed gates


def taylor(adapter: Adapter, probe: Probe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """∂S/∂g_i at g = 1 and at g = 0, (R,) for each module: S(M) − S(M∖i) and S(M_i) − S(M_0) to first order.

    Cost: two forward and backward passes over the batch, whatever the number of ranks.
    """
    slopes = []
    with evaluating(adapter):
        for value in (1.0, 0.0):
            gates = {k: torch.full_like(p.lora_a[:, 0], value, requires_grad=True) for k, p in adapter.modules.items()}
            with _rank_gates(adapter, gates):
                slopes.append(_gradients(adapter, probe, probe.groups(), gates))
    return slopes[0], slopes[1]


def sensitivity(adapter: Adapter, probe: Probe) -> dict[str, Tensor]:
    """The smoothed sensitivity (:class:`Importance`), (R,) for each module.

    Reconstruction: the smoothing runs over parts of the fixed batch, where the paper's runs over training steps.
    """
    importance = Importance(adapter, SMOOTHING, SMOOTHING)
    with evaluating(adapter):
        for piece in probe.pieces(PIECES):
            importance.update(_gradients(adapter, probe, piece, importance.weights))
    return importance.scores()


def dnas(adapter: Adapter, probe: Probe) -> dict[str, Tensor]:
    """a_i, (R,) for each module, of gates relaxed to 2 · sigmoid(a), which start at a = 0 and follow the dev loss.

    Reconstruction: Liu et al. (NAACL 2024) say bi-level optimisation. Here the levels alternate: weights train on
    training batches between scorings; at a scoring, the gates train on dev batches (Adam) with weights fixed.
    """
    levels = {key: torch.zeros_like(p.lora_a[:, 0], requires_grad=True) for key, p in adapter.modules.items()}
    optimizer = torch.optim.Adam(levels.values(), lr=GATE_RATE)
    with evaluating(adapter):
        for piece in probe.pieces(PIECES) * GATE_PASSES:
            with _rank_gates(adapter, {key: 2 * level.sigmoid() for key, level in levels.items()}):
                gradients = _gradients(adapter, probe, piece, levels)
            for key, level in levels.items():
                level.grad = -gradients[key]
            optimizer.step()
    return {key: level.detach() for key, level in levels.items()}


def magnitude(adapter: Adapter) -> dict[str, Tensor]:
    """s · ‖B_i‖ · ‖A_i‖, (R,) for each module: the Frobenius norm of a rank's update. Needs no data."""
    return {
        key: (module.scale * module.lora_a.norm(dim=1) * module.gated_b().norm(dim=0)).detach()
        for key, module in adapter.modules.items()
    }


def _gradients(adapter: Adapter, probe: Probe, batches: list[Batch], wanted: dict) -> dict:
    """∂S/∂w for every tensor in ``wanted``, over the ``batches`` of all processes."""
    total = {at: torch.zeros_like(tensor, requires_grad=False) for at, tensor in wanted.items()}
    hooks = [tensor.register_hook(_handle_signals) for tensor in wanted.values()]
    try:
        with torch.enable_grad():
            for batch in batches:
                with probe.autocast():
                    loss = row_losses(adapter.model, batch).sum()
                gradients = torch.autograd.grad(-loss, list(wanted.values()))
                for at, gradient in zip(wanted, gradients, strict=True):
                    total[at] += gradient
                probe.tick(len(batch["labels"]))
    finally:
        for hook in hooks:
            hook.remove()
    weight = probe.weight()
    return {at: probe.add_up(gradient) / weight for at, gradient in total.items()}


def _handle_signals(gradient: Tensor) -> None:
    """A hook that lets Python handle signals during a backward pass, which may take many seconds on a CPU."""


@contextmanager
def _rank_gates(adapter: Adapter, gates: dict[str, Tensor]) -> Iterator[None]:
    """Set the rank gates of every module inside, and restore them afterwards."""
    before = {key: module.rank_gate for key, module in adapter.modules.items()}
    try:
        for key, gate in gates.items():
            adapter.modules[key].rank_gate = gate
        yield
    finally:
        for key, previous in before.items():
            adapter.modules[key].rank_gate = previous
