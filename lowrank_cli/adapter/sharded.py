"""Frozen weights divided among processes (FSDP2): each holds a share of every layer, and gathers a layer to compute it.

Only the layers are divided. Embeddings, the last norm and the head stay whole in every process, since code outside of
the model's forward pass reads them (FSDP would gather them for the length of a step). So do all trained tensors and
low-rank modules: they are small, ranks move, and a saved adapter holds all of them.

Accelerate's plugin for FSDP2 divides trained tensors too, and on a CPU it becomes plain data parallelism, so this calls
``fully_shard`` of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.errors import UserError


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide the frozen weights of each layer among the processes of ``mesh``, and move ``model`` to its device.

    Layers move one at a time, so a device never holds the whole model, and the weights of a memory-mapped checkpoint
    are read only where they are needed.

    Raises:
        UserError: the layers of the model are not known.
    """
    if structure_of(model) is None:
        raise UserError(
            f"hardware.shard: the layers of this '{model.config.model_type}' are not known; set hardware.shard=null"
        )
    for layer in layers(model):
        low_rank = {p for module in layer.modules() if isinstance(module, LowRank) for p in module.parameters()}
        fully_shard(layer, mesh=mesh, ignored_params=low_rank | {p for p in layer.parameters() if p.requires_grad})
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))  # the root: it orders the gathering
    model.to(torch.device(mesh.device_type))  # type: ignore[arg-type]  # transformers decorates it


def sharded(model: nn.Module) -> bool:
    """Whether the weights of ``model`` are divided."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module, path: str) -> Iterator[None]:
    """Inside, every process holds the whole layer of the linear at ``path``; changes to its weights are kept.

    All processes must call this, and make the same changes.
    """
    layer = _layer_of(model, path)
    shares = {name: p for name, p in layer.named_parameters() if isinstance(p, DTensor)} if layer else {}
    if layer is None or not shares:
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, share in shares.items():
                rank, count = share.device_mesh.get_local_rank(), share.device_mesh.size()
                chunks = layer.get_parameter(name).chunk(count)
                if rank < len(chunks):
                    share.to_local().copy_(chunks[rank])
        layer.reshard()


def _layer_of(model: nn.Module, path: str) -> Any:
    """The divided layer that holds the module at ``path``; None if there is none."""
    while path := path.rpartition(".")[0]:
        module = model.get_submodule(path)
        if isinstance(module, FSDPModule):
            return module
    return None


class InStep:
    """Lets processes make different numbers of forward passes through a divided model.

    A forward pass gathers every layer, which takes all processes. So each pass is announced, and a process that has
    none left (:meth:`wait`) gathers along with the others until all have reached the same point.

    Args:
        reduce: the largest value of each entry over all processes.
        first: index of the first layer with a trained tensor; backward passes end there.
    """

    IDLE, FORWARD, BACKWARD = range(3)

    def __init__(self, model: PreTrainedModel, reduce: Callable[[Tensor], Tensor], first: int):
        self._layers: list[Any] = layers(model)
        self._reduce, self._first = reduce, first
        model.register_forward_pre_hook(lambda *_: self._announce_pass(), prepend=True)

    def _announce_pass(self) -> None:
        self._announce(self.BACKWARD if torch.is_grad_enabled() else self.FORWARD)

    def _announce(self, kind: int) -> int:
        """What any process is about to do, given what this one is."""
        kinds = [float(kind == one) for one in (self.FORWARD, self.BACKWARD)]
        forward, backward = self._reduce(torch.tensor(kinds)).tolist()
        assert not (forward and backward), "passes with and without gradients at the same time"
        return self.BACKWARD if backward else self.FORWARD if forward else self.IDLE

    def wait(self) -> None:
        """Wait until every process has called this. Call it before any other exchange between processes."""
        while kind := self._announce(self.IDLE):
            self._gather(self._layers)
            if kind == self.BACKWARD:  # FSDP gathers one layer ahead
                self._gather(reversed(self._layers[max(0, self._first - 1) :]))

    def _gather(self, gathered: Any) -> None:
        for layer in gathered:
            layer.unshard()
            layer.reshard()
