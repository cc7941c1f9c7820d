"""Counts the memory of tensors while code runs on fake ones: shapes without values, so a 70B model takes seconds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages made inside, with torch's own kernels for shapes.

    What depends on values is decided here: a mask selects ``selected`` positions, and conditions are true.

    Attributes:
        live: bytes of storages that are in use.
        peak: the largest ``live`` since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.selected = 0
        self._bytes: dict[int, int] = {}  # by the address of a storage

    def restart(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self._assumed(function, args)
        if result is None:
            result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._bytes.pop(key)

    def _assumed(self, function: Any, args: tuple[Any, ...]) -> Any:
        """The result of an operation that needs values; None for all others."""
        if function is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        if function in (aten.is_nonzero.default, aten.equal.default):
            return True
        if function is aten.nonzero.default:
            return torch.zeros(self.selected, args[0].dim(), dtype=torch.long)
        if function is aten.bincount.default:
            return torch.zeros(args[2], dtype=torch.long)
        if function is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            indices: list[Tensor | None] = []
            for index in args[1]:
                mask = _is_mask(index)
                indices += [torch.zeros(self.selected, dtype=torch.long)] * index.dim() if mask else [index]
            return function(args[0], indices)
        return None


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@contextmanager
def counting() -> Iterator[Ledger]:
    """Inside, every new tensor is fake, and counted."""

    def assign(parameter: Tensor, converted: Tensor) -> None:
        parameter.data = converted.data

    # Module.to would swap fake parameters, which fails where something has a weak reference to them
    with (
        patch.object(torch.utils, "swap_tensors", assign),
        FakeTensorMode(allow_non_fake_inputs=True),
        Ledger() as ledger,
    ):
        yield ledger
