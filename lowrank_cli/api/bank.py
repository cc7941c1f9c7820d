"""Many adapters on one model, each with rows of the same batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.api.adapted import Adapter
from lowrank_cli.errors import UserError
from lowrank_cli.inference.tenants import Tenants


class Bank:
    """Adapters by name on one bare model, which computes batches with rows of different adapters.

    Args:
        model: a causal language model without an adapter; it is put into evaluation mode.
        max_bytes: bound on the adapters' memory on the model's device. Unused adapters move to host memory, least
            recently used first, and come back when needed. None: no bound.

    Raises:
        UserError: the model is adapted already.

    Example:
        >>> bank = lrk.Bank(model)
        >>> bank.add("a", "folder")
        >>> with bank.rows(["a", "b", None]):
        ...     model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
    """

    def __init__(self, model: PreTrainedModel, *, max_bytes: int | None = None):
        if any(isinstance(module, AdaptedLinear) for module in model.modules()):
            raise UserError("model: it is adapted already; a bank needs the bare model, so load it anew")
        self.model = model
        model.train(False)
        self._tenants = Tenants(model, max_bytes, "torch")

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order they were added."""
        return self._tenants.bank.names

    def add(self, name: str, adapter: str | os.PathLike[str] | Adapter) -> None:
        """Add an adapter.

        Args:
            name: its name for :meth:`rows`.
            adapter: a folder of :meth:`lowrank_cli.Adapter.save`, a run of ``lrk``, or a LoRA of the PEFT library,
                which does not record its model, so only shapes are checked; or an adapter on another copy of the model,
                whose current values are copied.

        Raises:
            UserError: the name is taken, or the adapter belongs to another model, does not compute what it did when it
                was saved, or is more than low-rank products (it trains a head, or all weights). The bank is unchanged
                then.
        """
        if isinstance(adapter, Adapter):
            self._tenants.bank.add(name, adapter._adapter)
        else:
            self._tenants.add(name, os.fspath(adapter))

    def remove(self, name: str) -> None:
        """Remove an adapter. Raises UserError for an unknown name."""
        self._tenants.bank.remove(name)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of each batch uses the adapter ``names[i]``; None is the bare model.

        If a prompt has several rows (beams, ``num_return_sequences``), give one name for each prompt.

        Raises:
            UserError: an unknown name, no names, adapters that do not fit ``max_bytes``, or another such block is
                active.
        """
        with self._tenants.bank.batch(names):
            yield
