"""Several adapted models over one set of frozen weights, so that they can be measured in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lowrank_cli.bench.entries import is_peft
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, Method
from lowrank_cli.schema import PEFTS, MethodConfig

NOISE = 0.02  #: standard deviation of the noise of :func:`perturb`


@dataclass
class BenchModel:
    """One entry of a benchmark: the base model, or a copy of its modules (not its weights) with adapters."""

    model: Any  #: a ``PreTrainedModel``, or a ``PeftModel``
    method: Method | None = None
    adapter: Adapter | None = None
    parameters: int = 0  #: trained parameters of one adapter
    adapters_bytes: int = 0  #: bytes of the adapters' tensors, which this entry does not share with the others
    modules: int = 0  #: linears, or slices of packed ones, that an adapter updates
    adapters: int = 1  #: number of adapters in the model
    separate_process: bool = False  #: whether it runs in its own process
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  #: entered around each generation
    #: more arguments of ``generate``, or of a ``PeftModel``'s forward pass
    arguments: dict[str, Any] = field(default_factory=dict)

    def held_bytes(self) -> int:
        """``adapters_bytes``, and the tensors that the low-rank modules cache between calls."""
        modules = self.adapter.modules.values() if self.adapter else ()
        return self.adapters_bytes + sum(module.cached_bytes() for module in modules)


def bench_models(
    base: PreTrainedModel, variants: Mapping[str, MethodConfig | None], seed: int
) -> dict[str, BenchModel]:
    """One model for each entry of ``bench.methods``, all on the frozen weights of ``base``.

    Args:
        variants: the method of each entry; None is ``base`` itself.
        seed: draws the adapters, and the noise that is added to them.

    Raises:
        UserError: a method changes the weights that all share.
    """
    base.requires_grad_(False)

    def make(name: str, config: MethodConfig | None) -> BenchModel:
        if config is None:
            return BenchModel(base)
        if not is_peft(name):
            return adapted_copy(base, name, config, seed)
        return _fused(_peft(base, config, 1, seed), PEFTS[name.split()[0]])

    return {name: make(name, config) for name, config in variants.items()}


def tenant_models(
    base: PreTrainedModel,
    variants: Mapping[str, MethodConfig | None],
    counts: Sequence[int],
    rows: int,
    seed: int,
    grouped: str | None = None,
) -> dict[int, dict[str, BenchModel]]:
    """Like :func:`bench_models`, with several adapters each; they alternate over the rows of a batch.

    Args:
        counts: numbers of adapters, one set of models for each.
        rows: rows of a batch.
        grouped: how a bank computes the updates of our methods (``hardware.grouped``).

    Raises:
        UserError: a method's adapters cannot share a batch.
    """
    models: dict[int, dict[str, BenchModel]] = {count: {} for count in counts}
    for name, config in variants.items():
        if config is None:
            make: Callable[[list[str]], BenchModel] = lambda adapters: BenchModel(base)  # noqa: E731
        elif is_peft(name):
            make = partial(_peft_tenants, _peft(base, config, max(counts), seed))
        else:
            make = partial(_bank_model, *_bank(base, name, config, max(counts), seed, grouped))
        for count in counts:
            models[count][name] = make([str(row % count) for row in range(rows)])
    return models


def _fused(bench_model: BenchModel, package: str | None) -> BenchModel:
    """``bench_model`` with the fused loss of ``package``, if one is named."""
    if package == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(bench_model.model.get_base_model())
        bench_model.arguments = {"fused_lm_head": True}
    elif package == "liger_kernel":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        others = dict.fromkeys(("rope", "rms_norm"), False)
        _apply_liger_kernel_to_instance(bench_model.model.get_base_model(), fused_linear_cross_entropy=True, **others)
    return bench_model


def adapted_copy(base: PreTrainedModel, name: str, config: MethodConfig, seed: int) -> BenchModel:
    """A copy of ``base``'s modules with one adapter; see :func:`bench_models`."""
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
    return BenchModel(model, method, adapter, adapter.count(), size, len(adapter.modules))


@torch.no_grad()
def perturb(adapter: Adapter) -> None:
    """Add noise to every trained tensor, so that no update is zero, as after training."""
    for parameter in adapter.trained.values():
        parameter.add_(torch.randn_like(parameter) * NOISE)


@torch.no_grad()
def different(adapter: Adapter, count: int) -> Iterator[int]:
    """Make ``adapter`` into ``count`` different ones in turn, each what it holds and as much noise; yields numbers."""
    held = [(parameter, parameter.clone()) for parameter in adapter.trained.values()]
    for number in range(count):
        for parameter, values in held:
            parameter.copy_(values)
        perturb(adapter)
        yield number


def _bank(
    base: PreTrainedModel, name: str, config: MethodConfig, count: int, seed: int, grouped: str | None
) -> tuple[BenchModel, Bank]:
    """A bank of adapters named 0 to ``count`` - 1, and the model with one adapter that made them."""
    bench_model, bank = adapted_copy(base, name, config, seed), Bank(copied(base), grouped=grouped)
    assert bench_model.adapter is not None
    for number in different(bench_model.adapter, count):
        try:
            bank.add(str(number), bench_model.adapter)
        except UserError as error:
            why = str(error).rpartition("cannot be one of many: ")[2]
            raise UserError(f"bench.tenants: '{name}' cannot share a batch ({why})") from None
    return bench_model, bank


def _bank_model(single: BenchModel, bank: Bank, adapters: list[str]) -> BenchModel:
    size = sum(bank.bytes(name) for name in bank.names)
    return BenchModel(
        bank.model,
        parameters=single.parameters,
        adapters=len(bank.names),
        adapters_bytes=size,
        modules=single.modules,
        context=partial(bank.batch, adapters),
    )


def _peft(base: PreTrainedModel, config: Any, count: int, seed: int) -> BenchModel:
    """``count`` LoRAs of the PEFT library, named 0 to ``count`` - 1, with the rank and the linears of ``config``."""
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
    trained = [parameter for name, parameter in adapted.named_parameters() if ".lora_" in name]
    return BenchModel(
        adapted,
        parameters=sum(parameter.numel() for parameter in trained) // count,
        adapters=count,
        adapters_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        modules=len(targets),
    )


def _peft_tenants(bench_model: BenchModel, adapters: list[str]) -> BenchModel:
    return BenchModel(
        bench_model.model,
        parameters=bench_model.parameters,
        adapters=bench_model.adapters,
        adapters_bytes=bench_model.adapters_bytes,
        modules=bench_model.modules,
        arguments={"adapter_names": adapters},
    )
