"""Many adapters on one model, each with rows of the same batch.

    bank = Bank(model)
    bank.load("ann", folder)                       # or bank.add("ann", adapter)
    with bank.batch(["ann", "ben", None, "ann"]):  # one name for each prompt; None is the bare model
        model.generate(...)

Adapters may differ in ranks, modules, method and routers. Each row computes what its adapter computes alone. Outside a
batch the model is the bare one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter, fingerprint
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.tenants.batch import Batch, PromptGates, Workspace
from lowrank_cli.adapter.tenants.tenant import Canary, Tenant, from_adapter, read
from lowrank_cli.adapter.tenants.update_class import update_class, update_name
from lowrank_cli.errors import UserError, unknown

CANARIES = 16  #: canaries checked in one forward pass


class Bank:
    """Adapters by name, on a bare model in evaluation mode.

    Adapters may be added and removed while a batch runs; the batch keeps those it started with.

    Args:
        max_bytes: bound on the memory of adapters and of the running batch's operands on the model's device. Unused
            adapters move to host memory, least recently used first, and come back when needed. None: no bound.
        grouped: what computes the updates: ``torch``, or ``triton`` on CUDA; None: own kernels for the CPU where they
            suit the model, else ``torch``.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int | None = None, grouped: str | None = None):
        assert not any(isinstance(module, AdaptedLinear) for module in model.modules()), "the model is adapted already"
        self.model = model
        self.max_bytes = max_bytes
        self._update = update_class(grouped, model)
        self.fingerprint = fingerprint(model)
        self._tenants: dict[str, Tenant] = {}
        self._resident: OrderedDict[str, Tenant] = OrderedDict()  # on the device, least recently used first
        self._running: Batch | None = None

    @property
    def grouped(self) -> str:
        """What computes the updates; see :func:`~lowrank_cli.adapter.tenants.update_class.update_name`."""
        return update_name(self._update)

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order they were added."""
        return list(self._tenants)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters on the model's device, least recently used first."""
        return list(self._resident)

    def bytes(self, name: str) -> int:
        """Memory of an adapter."""
        return self.tenant(name).bytes

    def add(self, name: str, adapter: Adapter, canary: Canary | None = None) -> None:
        """Copy the current state of ``adapter``, whose model has the same weights.

        Args:
            canary: the one that the adapter was saved with, for :meth:`check`.

        Raises:
            UserError: the name is taken, the model differs, or the adapter is more than low-rank products.
        """
        if adapter.fingerprint != self.fingerprint:
            raise UserError(f"bank: '{name}' belongs to another model ('{adapter.model.config.model_type}')")
        tenant = from_adapter(adapter, name, self.model.dtype)
        tenant.canary = canary
        self._put(name, tenant)

    def load(self, name: str, folder: Path) -> None:
        """Read a LoRA in the PEFT library's format; see :func:`lowrank_cli.adapter.tenants.tenant.read`."""
        self._put(name, read(self.model, self.fingerprint, folder))

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        self.tenant(name)
        del self._tenants[name]
        self._resident.pop(name, None)

    @contextmanager
    def batch(
        self,
        tenants: Sequence[str | None],
        gates: Sequence[PromptGates] | None = None,
        workspace: Workspace | None = None,
    ) -> Iterator[Batch]:
        """Inside, forward passes use the adapters ``tenants``, one for each prompt.

        The B rows of a pass are B / len(tenants) copies of each prompt in turn.

        Args:
            gates: of prompts that earlier batches have routed; see :class:`Batch`.
            workspace: of an earlier batch; its memory is beyond ``max_bytes``.

        Raises:
            UserError: an unknown name, no prompts, adapters that do not fit ``max_bytes``, or another batch running.
        """
        self._require_idle()
        if not tenants:
            raise UserError("bank: a batch has no prompts; it needs one at least")
        batch = self._batch(tenants, gates, workspace)
        self._make_room({name: self._tenants[name] for name in self._tenants if name in tenants}, batch)
        self._running = batch
        try:
            with batch.running():
                yield batch
        finally:
            self._running = None

    def fits(self, tenants: Sequence[str | None]) -> bool:
        """Whether a batch of ``tenants`` fits ``max_bytes``. Raises UserError for an unknown name."""
        if self.max_bytes is None:
            return True
        batch = self._batch(tenants)
        return batch.bytes + sum(tenant.bytes for tenant in batch.tenants.values()) <= self.max_bytes

    def _batch(self, tenants: Sequence[str | None], *settings: Any) -> Batch:
        found = [None if name is None else self.tenant(name) for name in tenants]
        return Batch(self.model, found, self._update, *settings)

    def proven(self, name: str) -> bool:
        """Whether the adapter has a canary for :meth:`check`."""
        return self.tenant(name).canary is not None

    def check(self, names: Sequence[str]) -> dict[str, UserError]:
        """Compare the canaries' logits with the saved ones; returns errors by name.

        Raises UserError for an unknown name, or while a batch runs.
        """
        self._require_idle()
        known = {name: self.tenant(name).canary for name in names}
        canaries = {name: canary for name, canary in known.items() if canary is not None}
        batches = [list(canaries)[start : start + CANARIES] for start in range(0, len(canaries), CANARIES)]
        failed = {}
        while batches:
            some = batches.pop()
            try:
                logits = self._canary_logits({name: canaries[name] for name in some})
            except UserError as error:  # together they exceed max_bytes
                if len(some) == 1:
                    failed[some[0]] = error
                else:
                    batches += [[name] for name in some]
                continue
            for name, row in zip(some, logits, strict=True):
                saved = canaries[name]
                try:
                    save_load.check_logits(row, saved.logits, f"bank: '{name}'", saved.dtype, self.model.dtype)
                except UserError as error:
                    failed[name] = error
        return failed

    @torch.no_grad()
    def _canary_logits(self, canaries: dict[str, Canary]) -> Tensor:
        """The logits of each adapter's canary, (B, V)."""
        ids = torch.cat([canary.ids for canary in canaries.values()]).to(self.model.device)  # (B, T)
        with self.batch(list(canaries)) as batch:
            batch.soft = True
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        return logits.float().cpu()

    def tenant(self, name: str) -> Tenant:
        """The adapter of that name. Raises UserError if there is none."""
        if name not in self._tenants:
            raise unknown("bank", name, self._tenants)
        return self._tenants[name]

    def _require_idle(self) -> None:
        if self._running is not None:
            raise UserError("bank: a batch is running; a bank runs one at a time")

    def _put(self, name: str, tenant: Tenant) -> None:
        if name in self._tenants:
            raise UserError(f"bank: there is an adapter '{name}' already; remove it first")
        self._make_room({name: tenant}, self._running)
        self._tenants[name] = tenant

    def _make_room(self, needed: dict[str, Tenant], batch: Batch | None) -> None:
        """Move ``needed`` to the device, next to the adapters and operands of ``batch``; offload others as necessary.

        Adapters of ``batch`` that have been removed still count, because the batch holds them.
        """
        if self.max_bytes is not None:
            kept, room = {id(tenant): tenant for tenant in needed.values()}, self.max_bytes
            if batch is not None:
                kept |= batch.tenants
                room -= batch.bytes
            room -= sum(tenant.bytes for tenant in kept.values())
            if room < 0:
                named = f"'{next(iter(needed))}'" if len(kept) == 1 else f"{len(kept)} adapters"
                raise UserError(
                    f"bank: {named} and a batch's operands take {_size(self.max_bytes - room)}, and max_bytes is "
                    f"{_size(self.max_bytes)}; use smaller batches, or allow more"
                )
            others = [name for name, tenant in self._resident.items() if id(tenant) not in kept]
            taken = sum(self._resident[name].bytes for name in others)
            for name in others:
                if taken <= room:
                    break
                tenant = self._resident.pop(name)
                taken -= tenant.bytes
                tenant.to("cpu")
        for name, tenant in needed.items():
            self._resident[name] = tenant
            self._resident.move_to_end(name)
            tenant.to(self.model.device)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
