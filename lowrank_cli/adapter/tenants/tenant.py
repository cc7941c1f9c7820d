"""One adapter of a bank: its low-rank factors by site, and its routers, if any."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import LINEARS, linear_shape
from lowrank_cli.adapter.routing.router import Router, scaled_gates
from lowrank_cli.adapter.spans import Span
from lowrank_cli.errors import UserError
from lowrank_cli.reader import Finite, Where, read_json

MAX_PATTERN = 256  #: characters of a pattern
MAX_PATTERNS = 4096  #: patterns of an adapter; a model of 80 layers has 560 linears
#: A regular expression that cannot be slow: only single characters are repeated, with at most two unbounded repeats.
_ATOM = r"(?:\w|\\[.\-dw]|\.|-|\[[\w-]+\])"
_PLAIN_PATTERN = re.compile(rf"\^?(?:{_ATOM}[*+?]?|[()|])*\$?")

#: Options of the PEFT library that do not change the function of a LoRA of linears, or that :func:`read` handles.
NEUTRAL = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha use_rslora "
    "rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    "lora_dropout runtime_config megatron_core eva_config corda_config lora_ga_config loftq_config "
    "qalora_group_size".split()
)
#: Accepted values of other options; for ``init_lora_weights``, those that leave the frozen weights alone.
PLAIN: dict[str, list[Any]] = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, "gaussian", "eva", "orthogonal"],
}


def _bounded(pattern: str) -> bool:
    """Whether ``pattern`` is a plain regular expression for module names."""
    if len(pattern) > MAX_PATTERN or not _PLAIN_PATTERN.fullmatch(pattern) or len(re.findall(r"[*+]", pattern)) > 2:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


Pattern = Annotated[
    str, Where(_bounded, r"a name of modules, in which \d, ., [0-9], (a|b) and up to two * or + may stand for others")
]
Rank = Annotated[int, Where(lambda rank: rank > 0, "a whole number above 0")]


_FEW = Where(lambda patterns: len(patterns) <= MAX_PATTERNS, f"up to {MAX_PATTERNS} keys with values")


class NotLowRank(UserError):
    """The adapter is more than low-rank products and routers of prompts, so it cannot be one of many in a batch."""


class PeftConfig(TypedDict):
    """The keys of PEFT's ``adapter_config.json`` that determine what an adapter computes."""

    lora_alpha: Finite
    r: NotRequired[Rank]
    use_rslora: NotRequired[bool | None]
    rank_pattern: NotRequired[Annotated[dict[Pattern, Rank], _FEW] | None]
    alpha_pattern: NotRequired[Annotated[dict[Pattern, Finite], _FEW] | None]


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
    config = _config(folder)
    ranks, alphas = _compiled(config.get("rank_pattern")), _compiled(config.get("alpha_pattern"))
    updates = {}
    tensors = save_load.read_tensors(folder / save_load.WEIGHTS)
    for name in tensors:
        path = name.removeprefix(save_load.PREFIX).removesuffix(".lora_A.weight")
        if f"{save_load.PREFIX}{path}.lora_A.weight" != name:
            if not (name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors):
                raise UserError(f"{folder}: has '{name}', which is no part of a LoRA of linears")
            continue
        a, b = tensors[name], tensors.get(f"{save_load.PREFIX}{path}.lora_B.weight")
        inputs, outputs = _shape(model, path, str(folder))
        if b is None or a.shape != (len(a), inputs) or b.shape != (outputs, len(a)):
            raise UserError(f"{folder}: the factors of '{path}' do not fit {outputs} × {inputs}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{folder}: the factors of '{path}' hold NaN or infinity")
        if len(a) != (rank := _matched(ranks, path, config.get("r", len(a)))):
            raise UserError(f"{folder}: '{path}' has rank {len(a)}, and {save_load.CONFIG} says {rank}")
        alpha = _matched(alphas, path, config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        updates[SiteKey(path, None)] = _operands(a, b * scale, model.dtype)
    if not updates:
        raise UserError(f"{folder}: {save_load.WEIGHTS} holds no LoRA")
    return Tenant(updates, canary=canary)


def saved_canary(folder: Path, proof: dict[str, Any], vocabulary: int) -> Canary:
    """The canary of an adapter folder with ``proof`` (its ``lrk.json``), for a model of ``vocabulary`` tokens."""
    ids, logits = save_load.read_canary(folder, vocabulary)
    return Canary(ids, logits, proof["dtype"])


def _config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``. Raises NotLowRank if it does not describe a plain LoRA."""
    if not (folder / save_load.CONFIG).exists():
        raise UserError(f"{folder}: not an adapter folder ({save_load.CONFIG} is missing)")
    config = read_json(folder / save_load.CONFIG, PeftConfig)
    for key, value in config.items():
        plain = PLAIN.get(key, [False if value is True else None])
        if value and key not in NEUTRAL and value not in plain:
            raise NotLowRank(f"{folder}: {save_load.CONFIG} has {key}={value}, and a bank takes {key}={plain[0]}")
    return config


def _compiled(patterns: dict[str, Any] | None) -> list[tuple[re.Pattern[str], Any]]:
    """Compile patterns as the PEFT library does: a pattern matches whole names at the end of a path."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in (patterns or {}).items()]


def _matched(patterns: list[tuple[re.Pattern[str], Any]], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``path``, or ``default``."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _shape(model: PreTrainedModel, path: str, source: str) -> tuple[int, int]:
    try:
        linear: nn.Module = model.get_submodule(path)
    except AttributeError:
        raise UserError(f"{source}: has '{path}', which this model lacks") from None
    linear = getattr(linear, "base", linear)  # inside a batch
    if not isinstance(linear, LINEARS):
        raise UserError(f"{source}: '{path}' is no linear of this model")
    return linear_shape(linear)
