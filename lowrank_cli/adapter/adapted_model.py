"""The handle of an adapted model: what was added, what trains, and how to switch it off, merge it or undo that."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import AdaptedLinear, LowRank
from lowrank_cli.adapter.quantized import quantized
from lowrank_cli.adapter.routing.prompt_routing import PromptRouting
from lowrank_cli.adapter.shared_input import Siblings
from lowrank_cli.adapter.target_sites import SIBLINGS, Site, head_names
from lowrank_cli.errors import UserError


class Adapter:
    """A model adapted in place.

    ``modules`` maps a site's key to its low-rank module; ``trained`` maps the name under which a tensor is saved to
    the parameter, and holds every parameter that may change; ``deferred`` are those of ``trained`` that the method
    steps itself (the main optimizer leaves them alone). ``initial_ranks`` are those of the injected modules;
    ``emptied`` are modules that have lost all ranks since and left the model (:mod:`lowrank_cli.adapter.ranks`).
    """

    def __init__(self, model: PreTrainedModel, sites: dict[str, Site]):
        self.model = model
        self.sites = sites
        self.modules: dict[str, LowRank] = {}
        self.linears: dict[str, AdaptedLinear] = {}
        self.emptied: dict[str, LowRank] = {}
        self.initial_ranks: dict[str, int] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self.deferred: set[str] = set()
        self._buffered: dict[str, nn.Module] = {}  # by the name that their buffers are saved under
        self._groups: dict[tuple[int | None, str], Siblings] = {}  # by layer and roles
        self.routing: PromptRouting | None = None
        self.fingerprint = fingerprint(model)
        model.requires_grad_(False)

    def train_also(self, module: nn.Module, name: str) -> None:
        """Declare all parameters of ``module`` trained, in fp32, saved as ``name.<parameter>``."""
        module.float()
        for key, parameter in module.named_parameters(prefix=name):
            parameter.requires_grad_(True)
            self.trained[key] = parameter

    def keep_buffers(self, module: nn.Module, name: str) -> None:
        """Save the buffers of ``module`` with the adapter, as ``name.<buffer>``."""
        self._buffered[name] = module

    @property
    def constants(self) -> dict[str, Tensor]:
        """Buffers by the names that they are saved under, as they are now: moving a model makes new ones."""
        return {key: tensor for name, module in self._buffered.items() for key, tensor in module.named_buffers(name)}

    def count(self) -> int:
        """How many trained numbers there are."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def require_declared(self) -> None:
        """Assert that the modules' tensors that take a gradient are those in ``trained``: no other would be saved."""
        for name, parameter in self.trained.items():
            assert parameter.requires_grad, (
                f"'{name}' is to be trained and takes no gradient; to leave a tensor of a module out of training, name "
                f"it in the kind's setting ``fixed`` (such as partial(LowRank, fixed=['lora_A.weight']))"
            )
        declared = {id(parameter) for parameter in self.trained.values()}
        for key, part in self.modules.items():
            for name, parameter in part.named_parameters():
                assert id(parameter) in declared or not parameter.requires_grad, (
                    f"'{key}': {type(part).__name__}.{name} takes a gradient and is not to be trained; name it in "
                    f"tensors(), and in the kind's setting ``fixed`` too if it keeps its first value"
                )

    def ranks(self) -> dict[str, int]:
        """The rank of every module in the model that may be resized, by its key."""
        return {key: part.rank for key, part in self.modules.items() if part.rank_axes}

    def attach(self, site: Site, part: LowRank) -> None:
        """Put ``part`` at ``site``, to be trained, but for its fixed tensors."""
        tensors = part.tensors()
        unknown = sorted(set(part.fixed) - tensors.keys())
        assert not unknown, f"{type(part).__name__}: fixed names {unknown}, not in tensors() ({', '.join(tensors)})"
        for name in part.fixed:
            tensors[name].requires_grad_(False)
        linear = self.linears.get(site.path)
        if linear is None:
            linear = self.linears[site.path] = AdaptedLinear(self.model.get_submodule(site.path))
            replace_module(self.model, site.path, linear)
            self._siblings(site).add(linear)
        linear.add(site.label, part, site.span)
        self.modules[site.key] = part
        self.trained |= {f"{site.key}.{name}": parameter for name, parameter in part.trained().items()}

    def detach(self, site: Site) -> LowRank:
        """Take the module at ``site`` out of the model; a linear without any is the bare one again."""
        part, linear = self.modules.pop(site.key), self.linears[site.path]
        for name in part.trained():
            del self.trained[f"{site.key}.{name}"]
        linear.remove(site.label)
        if not linear.parts:
            linear.siblings.remove(linear)
            replace_module(self.model, site.path, self.linears.pop(site.path).base)
        return part

    def _siblings(self, site: Site) -> Siblings:
        """Those of the linear at ``site``, who read the same input."""
        roles = next((roles for roles in SIBLINGS if site.role is not None and site.role in roles), None)
        if roles is None:
            return Siblings()
        return self._groups.setdefault((site.layer, roles), Siblings())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model inside; the previous state afterwards, whatever it was."""
        before = {path: linear.enabled for path, linear in self.linears.items()}
        routing = self.routing.enabled if self.routing else False
        try:
            self._enable(dict.fromkeys(before, False), False)
            yield
        finally:
            self._enable(before, routing)

    def _enable(self, linears: dict[str, bool], routing: bool) -> None:
        for path, enabled in linears.items():
            self.linears[path].enable(enabled)
        if self.routing:
            self.routing.enabled = routing

    @contextmanager
    def continuous(self) -> Iterator[None]:
        """Every module and expert on, weighted by its router: no hard choice that rounding could turn over."""
        try:
            self._soften(True)
            yield
        finally:
            self._soften(False)

    def _soften(self, soft: bool) -> None:
        for part in self.modules.values():
            part.soft = soft
        if self.routing:
            self.routing.soft = soft

    def merge(self) -> None:
        """Fold all updates into the base weights. Raises UserError where that would not be the same function."""
        if self.routing:
            raise UserError("merge: the modules are chosen prompt by prompt, so no single weight equals them")
        for part in self.modules.values():
            if part.unmergeable:
                raise UserError(f"merge: {part.unmergeable}, so no single weight equals them")
        if any(quantized(linear.weight) for linear in self.linears.values()):
            raise UserError("merge: the weights are quantised, and an update put into them would be rounded away")
        embedding = self.model.get_input_embeddings().weight
        for path, linear in self.linears.items():
            if linear.weight is embedding:
                raise UserError(f"merge: '{path}' shares its weight with the input embedding, which must not change")
        for linear in self.linears.values():
            linear.merge()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit."""
        for linear in self.linears.values():
            linear.unmerge()


def inject(
    model: PreTrainedModel,
    sites: list[Site],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    kind: Callable[..., LowRank] = LowRank,
    rank_key: str = "rank",
) -> Adapter:
    """Freeze a loaded ``model`` and put a fresh module of ``kind`` at each site; a classification head trains in full.

    Exactly the same function as before, until it is trained. Raises UserError where ``rank``, which the method's key
    ``rank_key`` set, exceeds a matrix.
    """
    for site in sites:
        if rank > min(site.in_features, site.out_features):
            raise UserError(
                f"method.{rank_key}: {rank} is above the matrix '{site.key}' of {site.out_features} × "
                f"{site.in_features} (allowed: 1 to {min(site.in_features, site.out_features)})"
            )
    adapter = Adapter(model, {site.key: site for site in sites})
    for site in sites:
        device = next(model.get_submodule(site.path).parameters()).device
        adapter.attach(site, kind(site.in_features, site.out_features, rank, alpha, dropout, device))
    adapter.initial_ranks = adapter.ranks()
    for name in head_names(model):
        head = model.get_submodule(name)
        adapter.train_also(head, name)
        head.register_forward_pre_hook(_inputs_in_fp32)
    return adapter


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` of ``model``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _inputs_in_fp32(module: nn.Module, args: tuple) -> tuple:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Names the pretrained weights: a hash over each tensor's name, shape and first 64 values, in bf16.

    Independent of dtype and device of loading, of sharding, and of a freshly initialised classification head.
    """
    digest = hashlib.sha256()
    heads = tuple(f"{name}." for name in head_names(model))
    for name, tensor in sorted(model.named_parameters()):
        if not name.startswith(heads):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(_bits(tensor.flatten()[:64]))
    return digest.hexdigest()


def _bits(values: Tensor) -> bytes:
    return values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
