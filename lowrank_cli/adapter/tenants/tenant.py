"""One adapter of a bank: its low-rank factors by site, and its routers, if any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import peft_lora, save_load
from lowrank_cli.adapter.files.peft_lora import NotLowRank
from lowrank_cli.adapter.routing.router import Router, scaled_gates
from lowrank_cli.adapter.spans import Span


class SiteKey(NamedTuple):
    """A site: the path of a linear, and the span of its output (None: all of it)."""

    path: str
    span: Span | None


@dataclass
class Routes:
    """The routers of a prompt-routed adapter."""

    routers: list[Router]  #: one for each layer
    sites: list[list[SiteKey]]  #: for each layer, the N sites that its router chooses from
    k: int  #: sites chosen
    choose: Callable[[Tensor, int], Tensor]  #: probabilities (B, N) and k -> gates (B, N)

    def gates(self, layer: int, hidden: Tensor, mask: Tensor, soft: bool) -> Tensor:
        """The input (B, T, D) of ``layer`` and the prompt mask (B, T) -> gates (B, N)."""
        probabilities = self.routers[layer](hidden, mask)
        return scaled_gates(probabilities, probabilities.shape[1]) if soft else self.choose(probabilities, self.k)


class Canary(NamedTuple):
    """A fixed input (1, T), its logits (V,) when the adapter was saved, and the model's dtype at that time."""

    ids: Tensor
    logits: Tensor
    dtype: str


@dataclass
class Tenant:
    """An adapter: A (R, I) and s · Bᵀ (R, O) of each site, in the model's dtype."""

    updates: dict[SiteKey, tuple[Tensor, Tensor]]
    routes: Routes | None = None
    canary: Canary | None = None

    @property
    def bytes(self) -> int:
        tensors = [tensor for pair in self.updates.values() for tensor in pair]
        if self.routes is not None:
            tensors += [tensor for router in self.routes.routers for tensor in router.state_dict().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> None:
        """Move to ``device``. Routers move in place; factors are replaced, so others who hold them keep theirs."""
        self.updates = {site: (a.to(device), b.to(device)) for site, (a, b) in self.updates.items()}
        if self.routes is not None:
            for router in self.routes.routers:
                router.to(device)


@torch.no_grad()
def from_adapter(adapter: Adapter, name: str, dtype: torch.dtype) -> Tenant:
    """A copy of the current state of ``adapter``, for a model in ``dtype``; ``name`` is for error messages.

    Raises NotLowRank for an adapter that is more than low-rank products and routers of prompts.
    """
    if adapter.trained.keys() - _low_rank_names(adapter):
        raise NotLowRank(f"bank: '{name}' trains a part of the model in full, so it cannot share it with others")
    routing = adapter.routing
    if routing is not None:
        routing.open_all()
    sites = {key: SiteKey(site.path, site.span) for key, site in adapter.sites.items()}
    updates = {}
    for key, module in adapter.modules.items():
        b, a = (None, None) if module.unmergeable else module.delta_factors()  # (O, R), (R, I)
        if b is None or a is None or len(a) >= min(len(b), a.shape[1]):
            why = (
                module.unmergeable
                or "its change of a weight is no product of small factors (lrk export may cut it to a LoRA)"
            )
            raise NotLowRank(f"bank: '{name}' cannot be one of many: {why}")
        updates[sites[key]] = _operands(a, b, dtype)
    routes = None
    if routing is not None:
        keys = {id(module): key for key, module in adapter.modules.items()}
        columns = [[sites[keys[id(module)]] for module in layer] for layer in routing.modules]
        routes = Routes(copy.deepcopy(routing.routers), columns, routing.k, routing.choose)
    return Tenant(updates, routes)


def _low_rank_names(adapter: Adapter) -> set[str]:
    """Names of the trained tensors that belong to modules and routers."""
    names = {f"{key}.{name}" for key, module in adapter.modules.items() for name in module.tensors()}
    if adapter.routing is not None:
        routers = {id(parameter) for router in adapter.routing.routers for parameter in router.parameters()}
        names |= {name for name, parameter in adapter.trained.items() if id(parameter) in routers}
    return names


def _operands(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of A (R, I) and of B (O, R) with its scale, as contiguous (R, I) and (R, O)."""
    return a.detach().to(dtype, copy=True), b.detach().t().to(dtype, copy=True, memory_format=torch.contiguous_format)


def readable(folder: Path) -> bool:
    """Whether :func:`read` can load the adapter in ``folder`` from its files alone."""
    return (folder / save_load.CONFIG).is_file()


@torch.no_grad()
def read(model: PreTrainedModel, fingerprint: str, folder: Path) -> Tenant:
    """Read a LoRA in the format of the PEFT library, from a run of ours or from elsewhere.

    Raises UserError if files are missing, damaged or belong to another model, and NotLowRank for options of the library
    beyond a plain LoRA of linears.
    """
    canary = None
    if (folder / save_load.PROOF).is_file():
        proof = save_load.read_proof(folder)
        save_load.check_fingerprint(proof, fingerprint, str(folder), model.config.model_type)
        canary = saved_canary(folder, proof, model.config.vocab_size)
    factors = peft_lora.read(model, folder, "a bank")
    updates = {SiteKey(path, None): _operands(one.a, one.b * one.scale, model.dtype) for path, one in factors.items()}
    return Tenant(updates, canary=canary)


def saved_canary(folder: Path, proof: dict[str, Any], vocabulary: int) -> Canary:
    """The canary of an adapter folder with ``proof`` (its ``lrk.json``), for a model of ``vocabulary`` tokens."""
    ids, logits = save_load.read_canary(folder, vocabulary)
    return Canary(ids, logits, proof["dtype"])
