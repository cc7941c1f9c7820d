"""Several adapted models over one set of frozen weights, so that they can be measured in turn."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank_cli import methods
from lowrank_cli.adapter.adapted_model import Adapter, fingerprint
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.target_sites import find_sites
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, Method
from lowrank_cli.schema import PEFTS, VLLM, VLLM_LORA, BenchRun, MethodConfig

NOISE = 0.02  #: standard deviation of what is added to every trained tensor: no update is zero, as after training


@dataclass
class Twin:
    """The base model, or a copy of its modules (not of its weights) with one adapter or many."""

    model: Any  #: a ``PreTrainedModel``, or what the PEFT library makes of one
    method: Method | None = None
    adapter: Adapter | None = None
    parameters: int = 0  #: trained numbers of one adapter
    own_bytes: int = 0  #: memory of the adapters' tensors: what this twin does not share with the others
    modules: int = 0  #: linears, or parts of them, that an adapter updates
    adapters: int = 1  #: that the model holds
    apart: bool = False  #: it computes in a process of its own
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  #: generation runs inside it
    #: more arguments of ``generate``, or of a training pass of the PEFT library's
    arguments: dict[str, Any] = field(default_factory=dict)

    def held_bytes(self) -> int:
        """``own_bytes``, and what the modules keep between calls."""
        parts = self.adapter.modules.values() if self.adapter else ()
        return self.own_bytes + sum(part.cached_bytes() for part in parts)


def twins(base: PreTrainedModel, variants: Mapping[str, MethodConfig | None], seed: int) -> dict[str, Twin]:
    """``base`` itself for None, and for each method a twin of it, adapted and perturbed with ``seed``.

    Raises UserError for a method that would change the weights they share.
    """
    base.requires_grad_(False)

    def twin(name: str, config: MethodConfig | None) -> Twin:
        if config is None:
            return Twin(base)
        if not is_peft(name):
            return single_twin(base, name, config, seed)
        return _fused(_peft(base, config, 1, seed), PEFTS[name.split()[0]])

    return {name: twin(name, config) for name, config in variants.items()}


def crowds(
    base: PreTrainedModel,
    variants: Mapping[str, MethodConfig | None],
    counts: Sequence[int],
    rows: int,
    seed: int,
    grouped: str = "torch",
) -> dict[int, dict[str, Twin]]:
    """The same, for each of ``counts``, with so many adapters that take turns over the ``rows`` of a batch.

    Ours stand in a bank, computed as ``grouped`` says. Raises UserError for a method that cannot.
    """
    found: dict[int, dict[str, Twin]] = {count: {} for count in counts}
    for name, config in variants.items():
        if config is None:
            make: Callable[[list[str]], Twin] = lambda turns: Twin(base)  # noqa: E731
        elif is_peft(name):
            make = partial(_peft_crowd, _peft(base, config, max(counts), seed))
        else:
            make = partial(_crowd, *_bank(base, name, config, max(counts), seed, grouped))
        for count in counts:
            found[count][name] = make([str(row % count) for row in range(rows)])
    return found


def is_peft(entry: str) -> bool:
    """Whether an entry of ``bench.methods`` is the PEFT library's."""
    return entry.split()[0] in PEFTS


def is_vllm(entry: str) -> bool:
    """Whether an entry of ``bench.methods`` is vLLM's."""
    return entry.split()[0] in (VLLM, VLLM_LORA)


def lacking(entry: str, config: BenchRun) -> str | None:
    """Why an entry of ``bench.methods`` that needs another package cannot be measured, or None."""
    if is_vllm(entry) and getattr(config.bench, "vllm", None) is None:
        return "bench.vllm names no Python that has vLLM"
    package = PEFTS.get(entry.split()[0])
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return "Liger's kernels need a GPU" if package == "liger_kernel" and config.hardware.device == "cpu" else None


def _fused(twin: Twin, package: str | None) -> Twin:
    """``twin``, whose training passes take the fused loss of ``package``."""
    if package == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(twin.model.get_base_model())
        twin.arguments = {"fused_lm_head": True}
    elif package == "liger_kernel":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        others = dict.fromkeys(("rope", "rms_norm"), False)
        _apply_liger_kernel_to_instance(twin.model.get_base_model(), fused_linear_cross_entropy=True, **others)
    return twin


def single_twin(base: PreTrainedModel, name: str, config: MethodConfig, seed: int) -> Twin:
    """A copy of ``base``'s modules with one adapter; see :func:`twins`."""
    shared = {id(tensor) for tensor in base.parameters()}
    before = fingerprint(base)
    model = copied(base)
    method = methods.create(config)
    assert isinstance(method, Adapts)
    torch.manual_seed(seed)
    adapter = method.adapt(model)
    if any(id(parameter) in shared for parameter in adapter.trained.values()) or fingerprint(base) != before:
        raise UserError(f"bench.methods: '{name}' changes the weights of the model, which all methods share here")
    perturb(adapter)
    model.eval()
    size = sum(tensor.nbytes for tensor in save_load.tensors(adapter).values())
    return Twin(model, method, adapter, adapter.count(), size, len(adapter.modules))


@torch.no_grad()
def perturb(adapter: Adapter) -> None:
    """Add noise to every trained tensor."""
    for parameter in adapter.trained.values():
        parameter.add_(torch.randn_like(parameter) * NOISE)


def _bank(
    base: PreTrainedModel, name: str, config: MethodConfig, count: int, seed: int, grouped: str
) -> tuple[Twin, Bank]:
    """A bank of ``count`` adapters by number, and the twin that they were made with."""
    twin, bank = single_twin(base, name, config, seed), Bank(copied(base), grouped=grouped)
    assert twin.adapter is not None
    for number in range(count):
        perturb(twin.adapter)
        try:
            bank.add(str(number), twin.adapter)
        except UserError as error:
            why = str(error).rpartition("cannot be one of many: ")[2]
            raise UserError(f"bench.tenants: '{name}' cannot share a batch ({why})") from None
    return twin, bank


def _crowd(twin: Twin, bank: Bank, turns: list[str]) -> Twin:
    size = sum(bank.bytes(name) for name in bank.names)
    return Twin(
        bank.model,
        parameters=twin.parameters,
        adapters=len(bank.names),
        own_bytes=size,
        modules=twin.modules,
        around=partial(bank.batch, turns),
    )


def _peft(base: PreTrainedModel, config: Any, count: int, seed: int) -> Twin:
    """``count`` LoRAs of the PEFT library, by number, with the rank and the linears of ``config``."""
    try:
        import peft
    except ImportError:
        raise UserError("bench.methods: 'peft' needs the package peft, which is not installed") from None
    model = copied(base)
    targets = sorted({site.path for site in find_sites(model, list(config.target_modules))})
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own use of Transformers
        adapted = peft.get_peft_model(model, settings, adapter_name="0")
        for number in range(1, count):
            adapted.add_adapter(str(number), settings)
    adapted.eval()
    own = [parameter for name, parameter in adapted.named_parameters() if ".lora_" in name]
    return Twin(
        adapted,
        parameters=sum(parameter.numel() for parameter in own) // count,
        adapters=count,
        own_bytes=sum(parameter.numel() * parameter.element_size() for parameter in own),
        modules=len(targets),
    )


def _peft_crowd(twin: Twin, turns: list[str]) -> Twin:
    return Twin(
        twin.model,
        parameters=twin.parameters,
        adapters=twin.adapters,
        own_bytes=twin.own_bytes,
        modules=twin.modules,
        arguments={"adapter_names": turns},
    )
