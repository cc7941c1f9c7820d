"""The processes of a run and what they exchange: Accelerate's, with adapter gradients in one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.sharded import InStep, shard
from lowrank_cli.schema import HardwareConfig

Item = TypeVar("Item")


class Processes(Accelerator):
    """The device of this process, and exchanges with the others, which all processes must make in the same order.

    While a model is divided among the processes (:meth:`divide`), an exchange waits until every process has made its
    forward passes.
    """

    _in_step: InStep | None = None

    def divide(self, model: PreTrainedModel, adapter: Adapter | None, hardware: HardwareConfig) -> None:
        """Divide the frozen weights of ``model`` as ``hardware.shard`` says, and move it to the device."""
        shard(model, self._mesh(hardware))
        layers = [site.layer or 0 for site in adapter.sites.values()] if adapter else [0]
        announcements = distributed.new_group(backend="gloo")  # not the device's, which would have to wait

        def largest(values: Tensor) -> Tensor:
            distributed.all_reduce(values, distributed.ReduceOp.MAX, announcements)
            return values

        self._in_step = InStep(model, largest, min(layers, default=0))

    def _mesh(self, hardware: HardwareConfig) -> DeviceMesh:
        """The processes that hold one copy of the model: those of a node, or all."""
        if hardware.shard == "all":
            return init_device_mesh(hardware.device, (self.num_processes,))
        shape = (hardware.nodes, hardware.processes)
        return init_device_mesh(hardware.device, shape, mesh_dim_names=("node", "process"))["process"]

    def _meet(self) -> None:
        if self._in_step is not None:
            self._in_step.wait()

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum or ``mean`` of ``tensor`` over all processes."""
        self._meet()
        return super().reduce(tensor, reduction, scale)

    def wait_for_everyone(self) -> None:
        """Wait until every process has called this."""
        self._meet()
        super().wait_for_everyone()

    def gather_object(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, by process."""
        self._meet()
        gathered: list[Item] = gather_object(list(items))
        return gathered

    @torch.no_grad()
    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of ``parameters`` over all processes, in one exchange.

        A parameter without a gradient in any process keeps none.
        """
        if self.num_processes == 1:
            return
        trained = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        known = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
        sums = self.reduce(torch.cat([*(gradient.flatten() for gradient in gradients), known]))
        *parts, counts = sums.split([*(p.numel() for p in trained), len(trained)])
        for parameter, part, count in zip(trained, parts, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    @torch.no_grad()
    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` in every process by those of the first."""
        if self.num_processes > 1:
            self._meet()
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)
                torch.autograd.graph.increment_version(tensor)
