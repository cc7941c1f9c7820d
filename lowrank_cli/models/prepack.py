"""Frozen linears on a CPU with their weights packed for oneDNN: the same outputs, to rounding, in less time.

Torch multiplies with the weight as it lies, and packs it anew for every batch of a few rows; while one token after the
other is written, that takes longer than the product. Here a packed copy is made once, when it is first needed: it takes
as much memory again as the weights. Training multiplies with the plain weights.

Linears that read one input, such as query, key and value, are packed as one: their first call computes the outputs of
all, and the others take theirs. Which ones do is observed in a pass of one token, so that no architecture has to be
known.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowrank_cli.errors import UserError
from lowrank_cli.schema import HardwareConfig

#: Rows that weights are packed for. Any number may be multiplied; the layout for 64 is the fastest for 1 and 8, too.
PACKED_FOR = 64
#: Share of the memory that is free which packed weights may take where nobody asks for them.
SHARE = 0.5
#: Products with a packed weight after which it moves to huge pages. Moving takes as long as it saves in about 500.
HUGE_PAGES_AFTER = 100
HUGE_PAGE = 2**21  #: bytes
MADV_COLLAPSE = 25  #: of Linux 6.1 and newer (include/uapi/asm-generic/mman-common.h)
TELLING = 5e7  #: bytes of packed weights from which on a run mentions them


@cache
def fewest_rows() -> int:
    """Rows from which on the packed weight is faster.

    Plain weights are multiplied by MKL, whose fast paths are for Intel's processors. Time of a packed product against a
    plain one, with AVX-512: on Intel's 1.1 at one row and 0.6 at 8, on AMD's (EPYC) 0.6 and 0.4.
    """
    return 1 if "AMD" in str(torch.cpu.get_capabilities().get("cpu_name")) else 4


class Packed:
    """The packed form of some weights, one below the other. Copies of a model that share the weights share it too."""

    def __init__(self) -> None:
        self._made_of: list[tuple[int, int]] | None = None
        self._weight = torch.empty(0)
        self._bias: Tensor | None = None
        self._uses = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def of(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """Weights (O, I) packed, and biases (O,), of ``linears``; again where one of them has changed since."""
        now = [
            (tensor.data_ptr(), tensor._version)
            for linear in linears
            for tensor in (linear.weight, linear.bias)
            if tensor is not None
        ]
        if now != self._made_of:
            self._weight, self._bias = packed(linears)
            self._made_of, self._uses = now, 0
        self._uses += 1
        if self._uses == HUGE_PAGES_AFTER:
            use_huge_pages(self._weight)
        return self._weight, self._bias


class Joint:
    """Linears that read one input: the first to be called with it computes the outputs of all.

    The others take theirs when they are called with the same tensor, unchanged; anything else is computed anew. Outputs
    are slices of one tensor, so adding to one in place leaves the others alone. Weights are taken not to change between
    the calls with one input, which a model makes within one forward pass.
    """

    def __init__(self, linears: Sequence[PrepackedLinear]):
        self.linears = linears
        self.packed = Packed()
        self._sizes = [linear.out_features for linear in linears]
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[nn.Linear, Tensor] = {}

    def output(self, linear: PrepackedLinear, x: Tensor) -> Tensor | None:
        """y (..., O) of ``linear`` for ``x`` (..., I); None where a weight of these trains.

        A fused optimizer changes weights without a trace.
        """
        if x is not self._x or x._version != self._version or linear not in self._waiting:
            if any(linear.weight.requires_grad for linear in self.linears):
                return None
            weight, bias = self.packed.of(self.linears)
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            if len(self.linears) == 1:
                return y
            self._waiting = dict(zip(self.linears, y.split(self._sizes, dim=-1), strict=True))
            self._x, self._version = x, x._version
        found = self._waiting.pop(linear)
        if not self._waiting:
            self._x = None
        return found


class PrepackedLinear(nn.Linear):
    """A linear over the same weight and bias. Falls back to ``F.linear`` with gradients, few rows or other dtypes."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.joint = Joint([self])

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.numel() < fewest_rows() * self.in_features or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        y = self.joint.output(self, x)
        return F.linear(x, self.weight, self.bias) if y is None else y


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
    groups = same_input(model) if isinstance(model, PreTrainedModel) else []
    replaced: dict[nn.Linear, PrepackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                replaced[child] = PrepackedLinear(child)
                setattr(parent, name, replaced[child])
    for group in groups:
        joint = Joint([replaced[linear] for linear in group])
        for linear in joint.linears:
            linear.joint = joint


@torch.no_grad()
def same_input(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Groups of linears that are called once in a forward pass, with one and the same tensor.

    Observed in a pass of one token.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []  # keeps the inputs, so that no two have one id
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    hooks = [
        linear.register_forward_pre_hook(lambda linear, args: calls.append((linear, args[0]))) for linear in linears
    ]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    counts = Counter(linear for linear, _ in calls)
    groups: dict[int, list[nn.Linear]] = {}
    for linear, x in calls:
        if counts[linear] == 1:
            groups.setdefault(id(x), []).append(linear)
    return [group for group in groups.values() if len(group) > 1]


def packed(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights of ``linears``, which have equal inputs, below each other and packed, and their biases (O,)."""
    weights, bias = [linear.weight.detach() for linear in linears], None
    if any(linear.bias is not None for linear in linears):
        biases = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
        ]
        bias = torch.cat(biases).detach()  # (O,)
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)  # (O, I)
    return torch.ops.mkldnn._reorder_linear_weight(whole, PACKED_FOR), bias


def use_huge_pages(packed: Tensor) -> None:
    """Move a packed weight to pages of 2 MiB, where the system can: fewer address translations as it streams by."""
    if sys.platform != "linux":
        return
    start = torch.ops.mkldnn.data_ptr(packed) // HUGE_PAGE * HUGE_PAGE
    end = torch.ops.mkldnn.data_ptr(packed) + torch.ops.mkldnn._nbytes(packed)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, -(-(end - start) // HUGE_PAGE) * HUGE_PAGE, MADV_COLLAPSE)  # it may refuse: nothing else changes
