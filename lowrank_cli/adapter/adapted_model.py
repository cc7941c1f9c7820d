"""The handle of an adapted model: its low-rank modules, what trains, switching off, merging and unmerging."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.image_input import token_embedding
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.quantized import quantized
from lowrank_cli.adapter.routing.prompt_routing import PromptRouting
from lowrank_cli.adapter.sharded import whole
from lowrank_cli.adapter.shared_input import InputGroup
from lowrank_cli.adapter.target_sites import SHARED_INPUTS, Site, head_names
from lowrank_cli.errors import UserError


class Adapter:
    """A model adapted in place.

    Attributes:
        modules: low-rank modules by the key of their site.
        emptied: modules that lost all their ranks and left the model (:mod:`lowrank_cli.adapter.ranks`).
        initial_ranks: ranks of the modules when they were injected.
        trained: every parameter that trains, by the name it is saved under.
        deferred: names in ``trained`` that the method steps itself, not the main optimizer.
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
        self._buffered: dict[str, nn.Module] = {}  # by the prefix that their buffers are saved under
        self._groups: dict[tuple[int | None, str], InputGroup] = {}  # by layer and roles
        self.routing: PromptRouting | None = None
        self.tuner: Any = None  # another library's, see adopt
        self.fingerprint = fingerprint(model)
        model.requires_grad_(False)

    def train_also(self, module: nn.Module, name: str) -> None:
        """Train all parameters of ``module``, in fp32, saved as ``name.<parameter>``."""
        module.float()
        for key, parameter in module.named_parameters(prefix=name):
            parameter.requires_grad_(True)
            self.trained[key] = parameter

    def adopt(self, tuner: Any) -> None:
        """Train, in fp32, what another library's tuner has added to the model.

        Args:
            tuner: has ``enable_adapter_layers()`` and ``disable_adapter_layers()``, as PEFT's do.
        """
        self.tuner = tuner
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                self.trained[name] = parameter

    def keep_buffers(self, module: nn.Module, name: str) -> None:
        """Save the buffers of ``module`` with the adapter, as ``name.<buffer>``."""
        self._buffered[name] = module

    @property
    def constants(self) -> dict[str, Tensor]:
        """Buffers saved with the adapter, by name. Read anew each time, because moving a model replaces them."""
        return {key: tensor for name, module in self._buffered.items() for key, tensor in module.named_buffers(name)}

    def count(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def require_declared(self) -> None:
        """Assert that exactly the tensors in ``trained`` take gradients, because only those are saved."""
        for name, parameter in self.trained.items():
            assert parameter.requires_grad, (
                f"'{name}' should train but takes no gradient; to exclude a module's tensor from training, name it in "
                f"the kind's setting ``fixed`` (such as partial(LowRank, fixed=['lora_A.weight']))"
            )
        declared = {id(parameter) for parameter in self.trained.values()}
        for key, module in self.modules.items():
            for name, parameter in module.named_parameters():
                assert id(parameter) in declared or not parameter.requires_grad, (
                    f"'{key}': {type(module).__name__}.{name} takes a gradient but is not declared as trained; name it "
                    f"in tensors(), and in the kind's setting ``fixed`` if it should not train"
                )

    def ranks(self) -> dict[str, int]:
        """The rank of every resizable module, by key."""
        return {key: module.rank for key, module in self.modules.items() if module.rank_axes}

    def attach(self, site: Site, module: LowRank) -> None:
        """Put ``module`` at ``site`` and train its tensors, except the fixed ones."""
        tensors = module.tensors()
        unknown = sorted(set(module.fixed) - tensors.keys())
        assert not unknown, f"{type(module).__name__}: fixed names {unknown}, not in tensors() ({', '.join(tensors)})"
        for name in module.fixed:
            tensors[name].requires_grad_(False)
        linear = self.linears.get(site.path)
        if linear is None:
            linear = self.linears[site.path] = AdaptedLinear(self.model.get_submodule(site.path))
            linear.whole = partial(whole, self.model, site.path)
            replace_module(self.model, site.path, linear)
            self._input_group(site).add(linear)
        linear.add(site.label, module, site.span)
        self.modules[site.key] = module
        self.trained |= {f"{site.key}.{name}": parameter for name, parameter in module.trained().items()}

    def detach(self, site: Site) -> LowRank:
        """Remove the module at ``site``; a linear without modules becomes the original one again."""
        module, linear = self.modules.pop(site.key), self.linears[site.path]
        for name in module.trained():
            del self.trained[f"{site.key}.{name}"]
        linear.remove(site.label)
        if not linear.low_rank:
            linear.input_group.remove(linear)
            replace_module(self.model, site.path, self.linears.pop(site.path).base)
        return module

    def _input_group(self, site: Site) -> InputGroup:
        """The group of linears that read the same input as the one at ``site``."""
        roles = next((roles for roles in SHARED_INPUTS if site.role is not None and site.role in roles), None)
        if roles is None:
            return InputGroup()
        return self._groups.setdefault((site.layer, roles), InputGroup())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare model inside, and restore the previous state afterwards."""
        before = {path: linear.enabled for path, linear in self.linears.items()}
        routing = self.routing.enabled if self.routing else False
        try:
            self._enable(dict.fromkeys(before, False), False)
            if self.tuner:
                self.tuner.disable_adapter_layers()
            yield
        finally:
            self._enable(before, routing)
            if self.tuner:
                self.tuner.enable_adapter_layers()

    def _enable(self, linears: dict[str, bool], routing: bool) -> None:
        for path, enabled in linears.items():
            self.linears[path].enable(enabled)
        if self.routing:
            self.routing.enabled = routing

    @contextmanager
    def continuous(self) -> Iterator[None]:
        """Inside, every module and expert is on, weighted by its router: no hard choice that rounding could flip."""
        try:
            self._soften(True)
            yield
        finally:
            self._soften(False)

    def _soften(self, soft: bool) -> None:
        for module in self.modules.values():
            module.soft = soft
        if self.routing:
            self.routing.soft = soft

    def merge(self) -> None:
        """Add all updates to the base weights. Raises UserError if that would not be the same function."""
        if self.tuner:
            raise UserError("merge: the updates of a PEFT tuner are kept apart, so no single weight equals them")
        if self.routing:
            raise UserError("merge: the modules are chosen prompt by prompt, so no single weight equals them")
        for module in self.modules.values():
            if module.unmergeable:
                raise UserError(f"merge: {module.unmergeable}, so no single weight equals them")
        if any(quantized(linear.weight) for linear in self.linears.values()):
            raise UserError("merge: the weights are quantised, and an update put into them would be rounded away")
        embedding = token_embedding(self.model)
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
) -> Adapter:
    """Freeze ``model`` and put a fresh module at each site; a classification head trains in full.

    A fresh adapter computes exactly the same function as the bare model.

    Args:
        alpha: updates are scaled by alpha / rank.
        dropout: probability of zeroing an input of A.
        kind: makes a module from (in features, out features, rank, alpha, dropout, device).
    """
    adapter = Adapter(model, {site.key: site for site in sites})
    for site in sites:
        device = next(model.get_submodule(site.path).parameters()).device
        adapter.attach(site, kind(site.in_features, site.out_features, rank, alpha, dropout, device))
    adapter.initial_ranks = adapter.ranks()
    train_heads(adapter)
    return adapter


def train_heads(adapter: Adapter) -> None:
    """Train the classification heads of the model in full, in fp32."""
    for name in head_names(adapter.model):
        head = adapter.model.get_submodule(name)
        adapter.train_also(head, name)
        head.register_forward_pre_hook(_inputs_in_fp32)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at ``path`` of ``model``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _inputs_in_fp32(module: nn.Module, args: tuple) -> tuple:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Identifies the pretrained weights: a hash of each tensor's name, shape and first 64 values in bf16.

    Independent of dtype, device and sharding, and of a freshly initialised classification head. Empty for fake tensors.
    """
    if isinstance(next(model.parameters()), FakeTensor):
        return ""
    digest = hashlib.sha256()
    heads = tuple(f"{name}." for name in head_names(model))
    for name, tensor in sorted(model.named_parameters()):
        if not name.startswith(heads):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(_bits(tensor.flatten()[:64]))
    return digest.hexdigest()


def _bits(values: Tensor) -> bytes:
    return values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
