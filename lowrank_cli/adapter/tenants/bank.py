"""Many adapters on one model: a batch whose rows belong to different ones, computed together.

    bank = Bank(model)
    bank.load("ann", folder)                       # or bank.add("ann", adapter)
    with bank.batch(["ann", "ben", None, "ann"]):  # one name a prompt; None is the bare model
        model.generate(...)

Adapters may differ in ranks, modules and method: LoRA and its kin, with or without routers. Each row computes what its
adapter computes alone. Outside a batch the model is the bare one.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter, fingerprint, replace_module
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.kv_cache import continued_cache, returned_cache
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.routing.prompt_routing import batch_shape, prompts
from lowrank_cli.adapter.target_sites import layers
from lowrank_cli.adapter.tenants.grouped_update import GroupedLinear, GroupedUpdate, group, stacked, update_kind
from lowrank_cli.adapter.tenants.tenant import Canary, Place, Tenant, of_adapter, read
from lowrank_cli.errors import UserError, unknown

CANARIES = 16  #: checked in one forward pass


class Bank:
    """Adapters by name, on a bare ``model`` in evaluation mode.

    ``max_bytes`` bounds the memory that they take on the model's device, the operands of the running batch included:
    adapters that no batch needs move to host memory, the least recently used first, and come back when asked for.
    (On a CPU the host's memory is the device's.) Adapters may be added and removed while a batch runs; it goes on with
    those it started with. ``grouped`` says what computes their updates: ``torch``, or ``triton`` on CUDA.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int | None = None, grouped: str = "torch"):
        assert not any(isinstance(module, AdaptedLinear) for module in model.modules()), "the model is adapted already"
        self.model = model
        self.max_bytes = max_bytes
        self._update = update_kind(grouped)
        self.fingerprint = fingerprint(model)
        self._tenants: dict[str, Tenant] = {}
        self._resident: OrderedDict[str, Tenant] = OrderedDict()  # on the device, least recently used first
        self._running: Batch | None = None

    @property
    def names(self) -> list[str]:
        """Of all adapters, in the order in which they came."""
        return list(self._tenants)

    @property
    def resident(self) -> list[str]:
        """Those on the model's device, least recently used first."""
        return list(self._resident)

    def bytes(self, name: str) -> int:
        """Memory that an adapter takes."""
        return self._find(name).bytes

    def add(self, name: str, adapter: Adapter, canary: Canary | None = None) -> None:
        """Copy what ``adapter``, on a model of the same weights, holds now; ``canary`` is what it was saved with.

        Raises UserError for a name that is taken, another model, and an adapter that is more than low-rank products.
        """
        if adapter.fingerprint != self.fingerprint:
            raise UserError(f"bank: '{name}' belongs to another model ('{adapter.model.config.model_type}')")
        tenant = of_adapter(adapter, name, self.model.dtype)
        tenant.canary = canary
        self._put(name, tenant)

    def load(self, name: str, folder: Path) -> None:
        """Read a LoRA in the PEFT library's format; see :func:`lowrank_cli.adapter.tenants.tenant.read`."""
        self._put(name, read(self.model, self.fingerprint, folder))

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._find(name)
        del self._tenants[name]
        self._resident.pop(name, None)

    @contextmanager
    def batch(self, tenants: Sequence[str | None]) -> Iterator[Batch]:
        """Inside, forward passes serve ``tenants``, one a prompt: B rows are B / len(tenants) copies of each in turn.

        Raises UserError for an unknown name, for no prompts, where the adapters do not fit ``max_bytes``, and while
        another batch runs.
        """
        self._require_idle()
        if not tenants:
            raise UserError("bank: a batch has no prompts; it needs one at least")
        found = [None if name is None else self._find(name) for name in tenants]
        batch = Batch(self.model, found, self._update)
        self._make_room({name: self._tenants[name] for name in self._tenants if name in tenants}, batch)
        self._running = batch
        try:
            with batch.running():
                yield batch
        finally:
            self._running = None

    def proven(self, name: str) -> bool:
        """Whether the adapter came with what it computes on its model, which :meth:`check` compares."""
        return self._find(name).canary is not None

    def check(self, names: Sequence[str]) -> dict[str, UserError]:
        """Let saved adapters repeat the logits that were saved with them; the errors of those that do not.

        Raises UserError for an unknown name, and while a batch runs.
        """
        self._require_idle()
        known = {name: self._find(name).canary for name in names}
        canaries = {name: canary for name, canary in known.items() if canary is not None}
        batches = [list(canaries)[start : start + CANARIES] for start in range(0, len(canaries), CANARIES)]
        failed = {}
        while batches:
            some = batches.pop()
            try:
                logits = self._canary_logits({name: canaries[name] for name in some})
            except UserError as error:  # they do not fit together
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
        """What each adapter answers its fixed input, (B, V)."""
        ids = torch.cat([canary.ids for canary in canaries.values()]).to(self.model.device)  # (B, T)
        with self.batch(list(canaries)) as batch:
            batch.soft = True
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        return logits.float().cpu()

    def _find(self, name: str) -> Tenant:
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
        """Bring ``needed`` to the device, beside the adapters and operands of ``batch``; offload others if it takes it.

        Adapters of ``batch`` that were removed since count as well: it still holds them.
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


class Batch:
    """The tenants of one batch on ``model``: operands gathered once, routers asked once for each prompt.

    A forward pass with an empty KV cache starts the prompts; where there are routers, one that continues a cache has to
    continue theirs.
    Linears that nothing in the batch updates are the bare ones. What routers choose from is gathered when they have
    seen the prompts, for the rows that use it only.
    """

    def __init__(self, model: PreTrainedModel, tenants: Sequence[Tenant | None], update: type[GroupedUpdate]):
        self.model, self._update = model, update
        self.soft = False  #: every routed module on, in proportion to its probability
        self.tenants = {id(tenant): tenant for tenant in tenants if tenant is not None}
        self._prompts = [None if tenant is None else id(tenant) for tenant in tenants]  # (P,)
        self._copies = 1  # rows of each prompt
        self._mask: Tensor | None = None  # (B, T) of the prompts, in a pass that starts new ones
        self._linears: dict[str, GroupedLinear] = {}
        self._gates: dict[Place, Tensor] = {}  # (P,)
        self._cache: weakref.ref[Any] | None = None  # the KV cache that the prompts are in
        self._places = list(dict.fromkeys(where for tenant in self.tenants.values() for where in tenant.updates))
        routes = [tenant.routes for tenant in self.tenants.values() if tenant.routes is not None]
        self._routed = {where for route in routes for layer in route.places for where in layer}
        #: Groups at each place, as one row a prompt and every module on need them; beams and gates get no more.
        self._most = {where: len(group(self._owners(where)).owners) for where in self._places}
        self.bytes = sum(self._bytes(where) for where in self._places)  #: most memory that the operands take

    def _bytes(self, where: Place) -> int:
        pairs = [tenant.updates[where] for tenant in self.tenants.values() if where in tenant.updates]
        rank = max(len(a) for a, _ in pairs)
        a, b = (rank * matrix.shape[1] * matrix.element_size() for matrix in pairs[0])
        if self._most[where] > 1:
            return self._most[where] * (a + b)
        return b if where in self._routed else 0  # a single one is used where it lies, but for a gate in its B

    def _owners(self, where: Place) -> tuple[int | None, ...]:
        """The owner of each row (B,), None where nothing is to be added at ``where``."""
        gates = self._gates[where].tolist() if where in self._gates else [1.0] * len(self._prompts)
        own = [
            owner if owner is not None and gate > 0 and where in self.tenants[owner].updates else None
            for owner, gate in zip(self._prompts, gates, strict=True)
        ]
        return tuple(owner for owner in own for _ in range(self._copies))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The updates are in the model inside."""
        with ExitStack() as undo:
            for path in dict.fromkeys(where.path for where in self._places):
                base = self.model.get_submodule(path)
                self._linears[path] = GroupedLinear(base)
                replace_module(self.model, path, self._linears[path])
                undo.callback(replace_module, self.model, path, base)
            undo.callback(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            undo.callback(self.model.register_forward_hook(self._after_model).remove)
            for index, layer in enumerate(layers(self.model) if self._routed else ()):
                hook = layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
                undo.callback(hook.remove)
            self._gather()
            yield

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (rows, tokens), mask = batch_shape(args, kwargs), kwargs.pop("prompt_mask", None)
        copies, left = divmod(rows, len(self._prompts))
        assert copies and not left, f"{rows} rows are no copies of {len(self._prompts)} prompts"
        if copies != self._copies:
            self._copies = copies
            self._gather()
        cache = continued_cache(args, kwargs, tokens)
        if cache is not None:
            known = not self._routed or (self._cache is not None and cache is self._cache())
            assert known, "what was chosen for this batch's prompts belongs to another KV cache"
            self._mask = None
        else:
            self._mask, self._cache = prompts(args, kwargs, mask), None
        return args, kwargs

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Remember which KV cache the prompts are in, without keeping it alive."""
        cache = returned_cache(output)
        if self._mask is not None and cache is not None:
            self._cache = weakref.ref(cache)

    def _before_layer(self, index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def route(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._mask is None:
                return
            hidden = (args[0] if args else kwargs["hidden_states"])[:: self._copies]  # (B, T, D) -> (P, T, D)
            mask, found = self._mask[:: self._copies], dict[Place, Tensor]()
            for owner, tenant in self.tenants.items():
                if tenant.routes is None:
                    continue
                own = torch.tensor([row for row, at in enumerate(self._prompts) if at == owner], device=hidden.device)
                gates = tenant.routes.gates(index, hidden[own], mask[own], self.soft)  # (n, N)
                for where, column in zip(tenant.routes.places[index], gates.t(), strict=True):
                    ones = torch.ones(len(self._prompts), device=hidden.device)
                    found[where] = found.get(where, ones).index_copy(0, own, column.float())
            self._gates |= found
            for where in found:
                self._set(where)

        return route

    def _gather(self) -> None:
        """The operands of all modules that are not still to be chosen."""
        for where in self._places:
            if where in self._gates or where not in self._routed:
                self._set(where)

    def _set(self, where: Place) -> None:
        """Gather the operands of ``where`` for the rows that use it."""
        updates = self._linears[where.path].updates
        updates.pop(where.span, None)
        grouping = group(self._owners(where), self._most[where])
        if grouping.owners:
            a, b = zip(*(self.tenants[owner].updates[where] for owner in grouping.owners), strict=True)
            device = self.model.device
            gates = self._gates[where].repeat_interleave(self._copies) if where in self._gates else None
            updates[where.span] = self._update(
                stacked(a, device), stacked(b, device), grouping, gates, where.span, len(self._prompts) * self._copies
            )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
