"""One batch of a bank: rows of different tenants, with their operands and routes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.kv_cache import continued_cache, returned_cache
from lowrank_cli.adapter.routing.prompt_routing import batch_shape, prompts
from lowrank_cli.adapter.target_sites import layers
from lowrank_cli.adapter.tenants.grouped_update import GroupedLinear, GroupedUpdate, group
from lowrank_cli.adapter.tenants.operands import Factors, Operands
from lowrank_cli.adapter.tenants.row_updates import RowUpdates
from lowrank_cli.adapter.tenants.tenant import SiteKey, Tenant
from lowrank_cli.native.kernels import Kernels, RowUpdate

PromptGates = dict[SiteKey, float]  #: the gates of one prompt's routed modules; empty without a router


@dataclass(frozen=True)
class Workspace:
    """What a batch leaves for the next one on the same model, so that it need not be made anew."""

    linears: dict[str, tuple[nn.Module, str, GroupedLinear]] = field(default_factory=dict)  #: by path, see below
    operands: dict[SiteKey, Operands] = field(default_factory=dict)

    def linear(self, model: PreTrainedModel, path: str) -> tuple[nn.Module, str, GroupedLinear]:
        """The linear at ``path`` with updates, and where it goes: the parent module and its name there."""
        if path not in self.linears:
            parent, _, name = path.rpartition(".")
            module = model.get_submodule(parent)
            self.linears[path] = module, name, GroupedLinear(module.get_submodule(name))
        return self.linears[path]


class Batch:
    """The tenants of one batch: operands are gathered once, and each prompt is routed once.

    A forward pass with an empty KV cache starts the prompts; with routers, a pass that continues a cache must continue
    theirs. Only linears with updates are wrapped. Routed operands are gathered once the routers have seen the prompts,
    for the rows that use them.

    Args:
        update: what computes the updates. The kernels read the factors of the adapters; the classes need operands.
        gates: for each prompt, what :meth:`gates` returned for it in an earlier batch. The batch then continues one KV
            cache, that of all prompts, and routes nothing.
        workspace: that of an earlier batch, which this one changes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tenants: Sequence[Tenant | None],
        update: type[GroupedUpdate] | Kernels,
        gates: Sequence[PromptGates] | None = None,
        workspace: Workspace | None = None,
    ):
        self.model, self._update = model, update
        self._workspace = workspace or Workspace()
        self.soft = False  #: use every routed module, weighted by its probability
        self.tenants = {id(tenant): tenant for tenant in tenants if tenant is not None}
        self._prompts = [None if tenant is None else id(tenant) for tenant in tenants]  # (P,)
        self._copies = 1  # rows of each prompt
        self._mask: Tensor | None = None  # (B, T), prompt mask of a pass that starts new sequences
        self._gates: dict[SiteKey, list[float]] = {}  # for each prompt
        self._cache: weakref.ref[Any] | None = None  # the KV cache of the prompts
        self._sites = list(dict.fromkeys(site for tenant in self.tenants.values() for site in tenant.updates))
        routes = [tenant.routes for tenant in self.tenants.values() if tenant.routes is not None]
        self._routed = {site for route in routes for layer in route.sites for site in layer}
        #: For each site, the tenant of each prompt (P,), None if it has no update there.
        self._tenants_at = {
            site: tuple(
                owner if owner is not None and site in self.tenants[owner].updates else None for owner in self._prompts
            )
            for site in self._sites
        }
        #: Groups at each site with one row for each prompt and every module on; beams and gates never use more.
        self._most = {site: len(group(owners).owners) for site, owners in self._tenants_at.items()}
        self.bytes = sum(self._bytes(site) for site in self._sites)  #: largest memory of the operands
        self._continues = gates is not None
        if gates is not None:
            for site in self._routed:
                self._gates[site] = [of_prompt.get(site, 1.0) for of_prompt in gates]

    def gates(self) -> list[PromptGates]:
        """The gates of each prompt at the sites that its tenant's routers choose from, after the prompts' pass."""
        routes = [None if owner is None else self.tenants[owner].routes for owner in self._prompts]
        return [
            {site: self._gates[site][row] for layer in routes_of_row.sites for site in layer} if routes_of_row else {}
            for row, routes_of_row in enumerate(routes)
        ]

    def _bytes(self, site: SiteKey) -> int:
        if isinstance(self._update, Kernels):
            return 0
        pairs = [tenant.updates[site] for tenant in self.tenants.values() if site in tenant.updates]
        rank = max(len(a) for a, _ in pairs)
        a, b = (rank * matrix.shape[1] * matrix.element_size() for matrix in pairs[0])
        if self._most[site] > 1:
            return self._most[site] * (a + b)
        return b if site in self._routed else 0  # a single group is a view, except for a gate folded into B

    def _owners(self, site: SiteKey) -> tuple[int | None, ...]:
        """The tenant of each row (B,), None if it has no update at ``site`` or does not use it."""
        owners = self._tenants_at[site]
        if site in self._gates:
            owners = tuple(owner if gate > 0 else None for owner, gate in zip(owners, self._gates[site], strict=True))
        return owners if self._copies == 1 else tuple(owner for owner in owners for _ in range(self._copies))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model has the updates."""
        with ExitStack() as undo:
            for path in dict.fromkeys(site.path for site in self._sites):
                parent, name, linear = self._workspace.linear(self.model, path)
                linear.updates.clear()
                setattr(parent, name, linear)
                undo.callback(setattr, parent, name, linear.base)
            undo.callback(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            undo.callback(self.model.register_forward_hook(self._after_model).remove)
            for index, layer in enumerate(layers(self.model) if self._routed and not self._continues else ()):
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
            if self._continues and self._cache is None:
                self._cache = weakref.ref(cache)
            known = not self._routed or (self._cache is not None and cache is self._cache())
            assert known, "the gates of this batch's prompts belong to another KV cache"
            self._mask = None
        else:
            assert not self._continues, "a batch with given gates continues a KV cache"
            self._mask, self._cache = prompts(args, kwargs, mask), None
        return args, kwargs

    def _after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Remember the KV cache of the prompts, without keeping it alive."""
        cache = returned_cache(output)
        if self._mask is not None and cache is not None:
            self._cache = weakref.ref(cache)

    def _before_layer(self, index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def route(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._mask is None:
                return
            hidden = (args[0] if args else kwargs["hidden_states"])[:: self._copies]  # (B, T, D) -> (P, T, D)
            mask, sites = self._mask[:: self._copies], dict[SiteKey, list[float]]()
            for owner, tenant in self.tenants.items():
                if tenant.routes is None:
                    continue
                rows = [row for row, at in enumerate(self._prompts) if at == owner]
                gates = tenant.routes.gates(index, hidden[rows], mask[rows], self.soft)  # (n, N)
                for site, column in zip(tenant.routes.sites[index], gates.t().tolist(), strict=True):
                    of_site = sites.setdefault(site, [1.0] * len(self._prompts))
                    for row, gate in zip(rows, column, strict=True):
                        of_site[row] = gate
            self._gates |= sites
            for site in sites:
                self._set(site)

        return route

    def _gather(self) -> None:
        """Gather the operands at all sites that need no routing or are routed already."""
        for site in self._sites:
            if site in self._gates or site not in self._routed:
                self._set(site)

    def _set(self, site: SiteKey) -> None:
        """Gather the operands at ``site`` for the rows that use it."""
        updates, batch = self._workspace.linear(self.model, site.path)[2].updates, len(self._prompts) * self._copies
        owners = self._owners(site)
        of_rows = [gate for gate in self._gates.get(site, [1.0] * len(self._prompts)) for _ in range(self._copies)]
        if isinstance(self._update, Kernels):
            used = [
                RowUpdate(*self.tenants[owner].updates[site], row, gate)
                for row, (owner, gate) in enumerate(zip(owners, of_rows, strict=True))
                if owner is not None
            ]
            updates.pop(site.span, None)
            if used:
                updates[site.span] = RowUpdates(self._update, used, site.span, batch)
            return
        if len(only := set(owners) - {None}) == 1 and 2 * sum(owner is not None for owner in owners) >= batch:
            # One tenant's rows: products of all rows take less time than gathering those that use the module.
            of_rows = [0.0 if owner is None else gate for owner, gate in zip(owners, of_rows, strict=True)]
            owners = (*only,) * batch
        grouping = group(owners, self._most[site])
        if not grouping.owners:
            updates.pop(site.span, None)
            return
        factors = [Factors(*self.tenants[owner].updates[site]) for owner in grouping.owners]
        gates = None
        if any(gate != 1 for gate in of_rows):
            if len(factors) == len(grouping.rows):  # groups of one row
                factors = [Factors(a, b, of_rows[row]) for (a, b, _), row in zip(factors, grouping.rows, strict=True)]
            else:
                gates = torch.tensor(of_rows, device=self.model.device)  # (B,)
        operands = self._workspace.operands.setdefault(site, Operands())
        a, b, order = operands.of(factors, grouping.in_order)
        updates[site.span] = self._update(a, b, grouping.reordered(order), gates, site.span, batch)
