"""Modules with a trained value for each rank, the importance of ranks, and pruning to a budget.

The update of a module is s · B diag(v) A: a decomposition P Λ Q (P = B, Λ = diag(v), Q = A), or gates g = v.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.ranks import resize


class RankValues(LowRank):
    """A low-rank module with a trained value for each rank: s · w ⊙ B (v ⊙ g ⊙ (A drop(x))).

    ``values`` v (R,) starts as ones. A rank with value 0 contributes exactly nothing.
    """

    rank_axes = LowRank.rank_axes | {"rank_values": 0}

    def build(self) -> None:
        self.values = nn.Parameter(self.lora_a.new_ones(self.rank))

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"rank_values": self.values}

    def peft_options(self) -> None:
        """None: the PEFT library's LoRA computes a different function."""

    def gate(self, x: Tensor) -> Tensor:
        gate = super().gate(x)
        return self.values if gate is None else self.values * gate

    def gated_b(self) -> Tensor:
        return super().gated_b() * self.values

    @torch.no_grad()
    def resize(self, keep: Tensor, fresh: int) -> None:
        super().resize(keep, fresh)
        self.values[len(keep) :] = 1


def orthogonality(rows: Tensor) -> Tensor:
    """‖M Mᵀ − 1‖² (Frobenius) of M (R, X): 0 if its rows are orthonormal."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.t() - torch.eye(len(rows), device=rows.device)).square().sum()


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """sign(v) · max(|v| − threshold, 0): the proximal step of the l1 norm, elementwise."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def cubic_budget(step: int, first: int, last: int, start: int, end: int) -> int:
    """Rank budget at ``step``: ``start`` until step ``first``, then a (1 − progress)³ decay to ``end`` at ``last``."""
    progress = min(max((step - first) / (last - first), 0.0), 1.0)
    return int(end + (start - end) * (1 - progress) ** 3)


def keep_largest(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Masks (R,) by module of the ``budget`` ranks with the largest scores (R,) overall; ties keep the first."""
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:budget], True)
    sizes = [len(score) for score in scores.values()]
    return dict(zip(scores, torch.split(kept, sizes), strict=True))


class Importance:
    """The importance of each rank: the smoothed sensitivity of its parameters.

    Source: Zhang et al., ICLR 2023, arXiv 2303.10512, equations 8 to 11.

    For every trained weight w of a module: I = |w · ∂L/∂w|, Ī ← β₁ Ī + (1 − β₁) I, Ū ← β₂ Ū + (1 − β₂) |I − Ī|,
    and s(w) = Ī · Ū. The score of a rank is the mean of s over its row of A, plus the mean over its column of B, plus s
    of its value if the module has values. Memory: two numbers for each trained weight.
    """

    def __init__(self, adapter: Adapter, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.modules = dict(adapter.modules)
        self.weights = {
            f"{key}.{name}": weight
            for key, module in self.modules.items()
            for name, weight in module.trained().items()
            if name in module.rank_axes
        }
        self.sensitivity = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}  # Ī
        self.uncertainty = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}  # Ū

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Update both averages with the current weights and their ``gradients``, by the names in ``weights``."""
        for name, weight in self.weights.items():
            gradient = gradients[name]
            assert gradient is not None
            now = (weight * gradient).abs()
            self.sensitivity[name].lerp_(now, 1 - self.beta1)
            self.uncertainty[name].lerp_((now - self.sensitivity[name]).abs(), 1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """The score of each rank (R,) of each module."""
        return {key: torch.stack(list(self._terms(key, module))).sum(dim=0) for key, module in self.modules.items()}

    def _terms(self, key: str, module: LowRank) -> Iterator[Tensor]:
        for name, axis in module.rank_axes.items():
            if name in module.fixed:
                continue
            score = self.sensitivity[f"{key}.{name}"] * self.uncertainty[f"{key}.{name}"]
            yield score.movedim(axis, 0).reshape(module.rank, -1).mean(dim=1)  # (R, …) -> (R,)

    def state(self) -> dict[str, Tensor]:
        """Both averages, by name."""
        groups = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def value_modules(adapter: Adapter) -> dict[str, RankValues]:
    """The modules of an adapter injected with ``kind=RankValues``, by key."""
    return {key: module for key, module in adapter.modules.items() if isinstance(module, RankValues)}


@torch.no_grad()
def zero_values(adapter: Adapter, masks: Mapping[str, Tensor]) -> None:
    """Set the values of ranks outside ``masks`` to 0; they may grow back."""
    for key, module in value_modules(adapter).items():
        module.values.mul_(masks[key])


def remove_ranks(adapter: Adapter, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Remove ranks outside ``masks`` from the adapter and the state of ``optimizer``."""
    resize(adapter, {key: (mask.nonzero().flatten().tolist(), 0) for key, mask in masks.items()}, optimizer)


def initial_parameters(adapter: Adapter) -> int:
    """The number of trained parameters before any rank was removed."""
    ranks = adapter.ranks()
    removed = {key: rank - ranks.get(key, 0) for key, rank in adapter.initial_ranks.items()}
    sites = adapter.sites
    return adapter.count() + sum(
        n * (sites[key].in_features + sites[key].out_features + 1) for key, n in removed.items()
    )
