"""Frozen linears on a CPU with their weights packed for oneDNN: the same outputs, to rounding, in less time.

Torch multiplies with the weight as it lies, and packs it anew for every batch of a few rows; while one token after the
other is written, that takes longer than the product. Here a packed copy is made once, when it is first needed: it takes
as much memory again as the weights. Training multiplies with the plain weights.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_cli.errors import UserError
from lowrank_cli.schema import HardwareConfig

#: Rows that weights are packed for. Any number may be multiplied; the layout for 64 is the fastest for 1 and 8, too.
PACKED_FOR = 64
#: Share of the memory that is free which packed weights may take where nobody asks for them.
SHARE = 0.5
TELLING = 5e7  #: bytes of packed weights from which on a run mentions them


@cache
def fewest_rows() -> int:
    """Rows from which on the packed weight is faster.

    Plain weights are multiplied by MKL, whose fast paths are for Intel's processors. Time of a packed product against a
    plain one, with AVX-512: on Intel's 1.1 at one row and 0.6 at 8, on AMD's (EPYC) 0.6 and 0.4.
    """
    return 1 if "AMD" in str(torch.cpu.get_capabilities().get("cpu_name")) else 4


class Packed:
    """The packed form of one weight. Copies of a model that share the weight share it too."""

    def __init__(self) -> None:
        self._made_of: tuple[int, int] | None = None
        self._tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def of(self, weight: Tensor) -> Tensor:
        """``weight`` (O, I) packed, again where it has changed since."""
        now = weight.data_ptr(), weight._version
        if self._tensor is None or self._made_of != now:
            self._tensor, self._made_of = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR), now
        return self._tensor


class PrepackedLinear(nn.Linear):
    """A linear over the same weight and bias; with gradients, or few rows, it is computed as ever.

    So is one whose weight trains: a fused optimizer changes weights without a trace.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = Packed()

    def forward(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() or self.weight.requires_grad
        if recorded or x.numel() < fewest_rows() * self.in_features or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        packed = self.packed.of(self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")


def prepack_for(model: nn.Module, hardware: HardwareConfig, generates: bool) -> str:
    """Pack the weights of ``model`` as ``hardware.prepack`` says; null does for generation where there is memory.

    Returns what was decided for null and why, or "" where there was nothing to decide.

    Raises UserError where packing is asked for and torch was built without oneDNN.
    """
    if hardware.prepack is not None:
        if hardware.prepack:
            prepack(model)
        return ""
    if not generates or (hardware.device, hardware.precision) != ("cpu", "fp32") or not available():
        return ""
    weights = {child.weight.data_ptr(): child.weight.nbytes for child in model.modules() if type(child) is nn.Linear}
    size, room = sum(weights.values()), SHARE * free_memory()
    if not size:
        return ""
    if size > room:
        return f"weights are not packed: {size / 1e9:.1f} GB more is over {SHARE:.0%} of free memory (hardware.prepack)"
    prepack(model)
    return f"weights packed for speed: {size / 1e9:.1f} GB more memory (hardware.prepack)" if size > TELLING else ""


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process can still take: the machine's, or fewer where its control group has a limit.

    Zero where the system does not say.
    """
    found: list[float] = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        found.append(int(limit) - int(used))
    return max(0, min(found, default=0))


def available() -> bool:
    """Whether this build of torch can pack."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prepack(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of ``model``; faster are those whose weight is frozen.

    Raises UserError where torch was built without oneDNN.
    """
    if not available():
        raise UserError("hardware.prepack: true, but this build of torch has no oneDNN; set hardware.prepack=false")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PrepackedLinear(child))
