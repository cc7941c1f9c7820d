"""Many adapters on one model: the rows of a batch use different ones."""

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
    """Adapters by name on one bare model, which computes batches of all of them together.

    Args:
        model: a causal language model without an adapter; it is put into evaluation mode.
        max_bytes: memory that the adapters may take on the model's device. Those that no batch needs move to host
            memory, the least recently used first, and come back when asked for. None: no bound.

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
        """Of all adapters, in the order in which they were added."""
        return self._tenants.bank.names

    def add(self, name: str, adapter: str | os.PathLike[str] | Adapter) -> None:
        """Add an adapter.

        Args:
            name: what :meth:`rows` calls it.
            adapter: a folder of :meth:`lowrank_cli.Adapter.save`, a run of ``lrk``, or a folder of the PEFT library
                (a LoRA); or an adapter on another copy of the model, whose present values are copied.

        Raises:
            UserError: the name is taken; the adapter belongs to another model, does not compute what it did when it
                was saved, or is more than low-rank products (it trains a head, or all weights). The bank is then as
                it was. A folder of the PEFT library does not tell which model it was trained on: only shapes are
                checked.
        """
        if isinstance(adapter, Adapter):
            self._tenants.bank.add(name, adapter._adapter)
        else:
            self._tenants.add(name, os.fspath(adapter))

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises UserError for an unknown name."""
        self._tenants.bank.remove(name)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of each batch is computed by the adapter ``names[i]``; None is the bare model.

        With several rows a prompt (beams, ``num_return_sequences``), one name a prompt.

        Raises:
            UserError: an unknown name, no names at all, adapters that do not fit ``max_bytes``, or another such block
                is active.
        """
        with self._tenants.bank.batch(names):
            yield
