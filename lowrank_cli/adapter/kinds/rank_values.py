"""A value for every rank, what a rank is worth, and the ranks that a budget keeps.

The update of a module is s · B diag(v) A: a decomposition P Λ Q (P = B, Λ = diag(v), Q = A), or gates g = v.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import LowRank
from lowrank_cli.adapter.ranks import resize


class RankValues(LowRank):
    """A low-rank module with a trained value for each rank: s · w ⊙ B (v ⊙ g ⊙ (A drop(x))).

    ``values`` v (R,) is all ones until a method sets it. A rank of value 0 contributes exactly nothing.
    """

    rank_axes = LowRank.rank_axes | {"rank_values": 0}

    def build(self) -> None:
        self.values = nn.Parameter(self.lora_a.new_ones(self.rank))

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"rank_values": self.values}

    def peft_options(self) -> None:
        """Nothing: the PEFT library's LoRA computes something else."""

    def gate(self, x: Tensor) -> Tensor:
        gate = super().gate(x)
        return self.values if gate is None else self.values * gate

    def columns(self) -> Tensor:
        return super().columns() * self.values

    @torch.no_grad()
    def resize(self, keep: Tensor, fresh: int) -> None:
        super().resize(keep, fresh)
        self.values[len(keep) :] = 1


def orthogonality(rows: Tensor) -> Tensor:
    """‖M Mᵀ − 1‖² (Frobenius) of M (R, X): 0 where its R rows are orthonormal."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.t() - torch.eye(len(rows), device=rows.device)).square().sum()


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """sign(v) · max(|v| − threshold, 0): the proximal step of the l1 norm, elementwise."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def cubic_budget(step: int, first: int, last: int, start: int, end: int) -> int:
    """Ranks allowed at ``step``: ``start`` until ``first``, then falling as (1 − progress)³ to ``end`` at ``last``."""
    progress = min(max((step - first) / (last - first), 0.0), 1.0)
    return int(end + (start - end) * (1 - progress) ** 3)


def keep_largest(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Masks (R,) of the ``budget`` ranks with the largest scores (R,) of all modules; of equal ones the first."""
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:budget], True)
    sizes = [len(score) for score in scores.values()]
    return dict(zip(scores, torch.split(kept, sizes), strict=True))


class Importance:
    """What each rank is worth by the smoothed sensitivity of its parameters.

    Source: Zhang et al., ICLR 2023, arXiv 2303.10512, equations 8 to 11.

    For every trained number w of a module: I = |w · ∂L/∂w|, Ī ← β₁ Ī + (1 − β₁) I, Ū ← β₂ Ū + (1 − β₂) |I − Ī|,
    and s(w) = Ī · Ū. The score of a rank is the mean of s over its row of A, plus that over its column of B, plus s of
    its value, where the module has one. Memory: two numbers for each trained one.
    """

    def __init__(self, adapter: Adapter, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.modules = dict(adapter.modules)
        self.weights = {
            f"{key}.{name}": weight
            for key, part in self.modules.items()
            for name, weight in part.trained().items()
            if name in part.rank_axes
        }
        self.sensitivity = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}  # Ī
        self.uncertainty = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}  # Ū

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Take the weights and their gradients, by the names of ``weights``, into both averages."""
        for name, weight in self.weights.items():
            gradient = gradients[name]
            assert gradient is not None
            now = (weight * gradient).abs()
            self.sensitivity[name].lerp_(now, 1 - self.beta1)
            self.uncertainty[name].lerp_((now - self.sensitivity[name]).abs(), 1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """The score of each rank (R,) of each module."""
        return {key: torch.stack(list(self._terms(key, part))).sum(dim=0) for key, part in self.modules.items()}

    def _terms(self, key: str, part: LowRank) -> Iterator[Tensor]:
        for name, axis in part.rank_axes.items():
            if name in part.fixed:
                continue
            worth = self.sensitivity[f"{key}.{name}"] * self.uncertainty[f"{key}.{name}"]
            yield worth.movedim(axis, 0).reshape(part.rank, -1).mean(dim=1)  # (R, …) -> (R,)

    def state(self) -> dict[str, Tensor]:
        """Both averages, by name."""
        groups = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def valued(adapter: Adapter) -> dict[str, RankValues]:
    """The modules by key, of an adapter injected with ``kind=RankValues``."""
    return {key: part for key, part in adapter.modules.items() if isinstance(part, RankValues)}


@torch.no_grad()
def silence(adapter: Adapter, masks: Mapping[str, Tensor]) -> None:
    """Set the value of every rank outside ``masks`` to 0: it adds nothing, and may come back."""
    for key, part in valued(adapter).items():
        part.values.mul_(masks[key])


def remove(adapter: Adapter, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Take every rank outside ``masks`` out of the adapter, with what ``optimizer`` remembers of it."""
    resize(adapter, {key: (mask.nonzero().flatten().tolist(), 0) for key, mask in masks.items()}, optimizer)


def initial_parameters(adapter: Adapter) -> int:
    """How many trained numbers there were before any rank was removed."""
    ranks = adapter.ranks()
    removed = {key: rank - ranks.get(key, 0) for key, rank in adapter.initial_ranks.items()}
    sites = adapter.sites
    return adapter.count() + sum(
        n * (sites[key].in_features + sites[key].out_features + 1) for key, n in removed.items()
    )
