"""The optimizers of ``train.optimizer``, and the schedules of ``train.schedule``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.target_sites import head_names
from lowrank_cli.schema.train import TrainConfig


def create(config: TrainConfig, adapter: Adapter, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """The optimizer of the adapter's trained tensors, except deferred ones.

    Each parameter group has a key ``peak``, its peak learning rate; ``lr`` starts at 0.

    Args:
        rates: peak learning rates by name in ``adapter.trained``; the others have ``config.learning_rate``.
    """
    assert config.learning_rate is not None, "composition fills it in"
    tensors: dict[float, list[Tensor]] = {}
    for name, parameter in adapter.trained.items():
        if name not in adapter.deferred:
            tensors.setdefault(rates.get(name, config.learning_rate), []).append(parameter)
    groups = [{"params": parameters, "peak": peak} for peak, parameters in tensors.items()]
    settings: dict[str, Any] = {"lr": 0.0, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, _layer_matrices(adapter), config.weight_decay)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # without the scale by each tensor's own size, in which a B of zeros would hardly move
        return Adafactor(groups, scale_parameter=False, relative_step=False, **settings)
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)
    assert config.optimizer == "schedule_free"
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, **settings)
    optimizer.train()
    return optimizer


#: Root mean square of the entries of Muon's step, in learning rates (Liu et al. 2025, arXiv 2502.16982, section 2.2)
MUON_STEP = 0.2


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for the rest, as one optimizer.

    Both take the same learning rate and weight decay: the entries of Muon's steps are as large as those of Adam while
    gradients agree, as in the short trainings of adapters, one learning rate. In a long pretraining Adam's are a fifth.

    Args:
        groups: parameter groups; those that mix matrices with others are split.
        matrices: ``id`` of each parameter that Muon steps.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: set[int], weight_decay: float):
        def chosen(muon: bool) -> list[dict[str, Any]]:
            parts = [
                {**group, "params": [p for p in group["params"] if (id(p) in matrices) == muon]} for group in groups
            ]
            return [part for part in parts if part["params"]]

        self.parts: list[torch.optim.Optimizer] = []
        if ours := chosen(muon=True):
            for group in ours:
                group["peak"] /= MUON_STEP
            decay = weight_decay * MUON_STEP  # it is multiplied by the learning rate
            self.parts.append(torch.optim.Muon(ours, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        if others := chosen(muon=False):
            self.parts.append(torch.optim.AdamW(others, lr=0.0, weight_decay=weight_decay, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state."""
        at = 0
        for part in self.parts:
            part.param_groups = self.param_groups[at : at + len(part.param_groups)]
            part.state = self.state
            at += len(part.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both parts; ``closure`` is not supported."""
        assert closure is None
        for part in self.parts:
            part.step()


def _layer_matrices(adapter: Adapter) -> set[int]:
    """``id`` of each trained matrix inside the model's layers: no embedding, and nothing of a head."""
    model = adapter.model
    outside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    outside |= {id(p) for name in head_names(model) for p in model.get_submodule(name).parameters()}
    head = model.get_output_embeddings()
    outside |= {id(p) for p in head.parameters(recurse=False)} if head is not None else set()
    return {id(p) for p in adapter.trained.values() if p.dim() == 2} - outside


@contextmanager
def evaluated_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are those to evaluate and save; afterwards those of training, bit for bit.

    Only schedule-free optimizers keep two: the average, and where gradients are taken.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for tensor, kept in zip(tensors, before):
                tensor.copy_(kept)


def share_of_peak(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of ``step``, from 1 to ``total``, as a share of the peak.

    It rises linearly during ``train.warmup``; ``train.schedule`` says what follows.
    """
    warmup = math.ceil(config.warmup * total)
    if step <= warmup:
        return step / warmup
    left = (total + 1 - step) / (total + 1 - warmup)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - left))) / 2
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4)
        return min(1.0, (total + 1 - step) / (math.ceil(config.decay * total) + 1))
    return left
