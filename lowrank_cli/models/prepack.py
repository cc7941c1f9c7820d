"""Frozen linears on a CPU with packed weights: the same outputs up to rounding, in less time.

Torch packs the plain weight again for every product with a few rows; while decoding token by token, packing takes
longer than the product. Here a packed copy is made once, on first use, which doubles the memory of the weights.
Training uses the plain weights. Packed weights are multiplied by our own kernels (:mod:`lowrank_cli.native.kernels`)
where these suit the model and the machine, else by oneDNN.

Linears that read the same input, such as query, key and value, are packed as one: the first call computes the outputs
of all, and the others return theirs. A forward pass of one token shows which ones share an input, for any architecture.
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
from lowrank_cli.models.decode_attention import use_decode_attention
from lowrank_cli.native.kernels import Kernels, kernels_for
from lowrank_cli.native.kernels import pack as pack_blocks
from lowrank_cli.schema import HardwareConfig

#: Number of rows that oneDNN packs weights for. Any number works; the layout for 64 is also the fastest for 1 and 8.
PACKED_FOR = 64
#: Largest share of the free memory for packed weights, unless ``hardware.prepack=true``.
MEMORY_SHARE = 0.5
#: Products with a packed weight before it moves to huge pages. Moving costs what about 500 products save.
HUGE_PAGES_AFTER = 100
HUGE_PAGE = 2**21  #: bytes
MADV_COLLAPSE = 25  #: of Linux 6.1 and newer (include/uapi/asm-generic/mman-common.h)
MENTIONED = 5e7  #: bytes of packed weights from which on a run mentions them


@cache
def fewest_rows() -> int:
    """Smallest number of rows for which oneDNN's packed weights are faster.

    MKL multiplies plain weights, and its fast paths are for Intel. Time of a packed product relative to a plain one,
    with AVX-512: on Intel 1.1 for one row and 0.6 for 8, on AMD (EPYC) 0.6 and 0.4.
    """
    return 1 if "AMD" in str(torch.cpu.get_capabilities().get("cpu_name")) else 4


class Packed:
    """The packed form of stacked weights. Copies of a model that share the weights share it too.

    Args:
        kernels: multiply with it; None: oneDNN does.
    """

    def __init__(self, kernels: Kernels | None) -> None:
        self.kernels = kernels
        self._versions: list[tuple[int, int]] | None = None  # of the plain tensors: address and version
        self._weight = torch.empty(0)
        self._bias: Tensor | None = None
        self._uses = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    def product(self, linears: Sequence[nn.Linear], x: Tensor) -> Tensor:
        """The outputs of ``linears`` for ``x`` (..., I), next to each other: (..., O)."""
        self._update(linears)
        if self.kernels is None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return self.kernels.linear(x, self._weight, self._bias, sum(linear.out_features for linear in linears))

    def _update(self, linears: Sequence[nn.Linear]) -> None:
        """Pack the weights (O, I) and biases (O,) of ``linears``, again if one of them has changed."""
        now = [
            (tensor.data_ptr(), tensor._version)
            for linear in linears
            for tensor in (linear.weight, linear.bias)
            if tensor is not None
        ]
        if now != self._versions:
            self._weight, self._bias = pack(linears, self.kernels)
            self._versions, self._uses = now, 0
        self._uses += 1
        if self._uses == HUGE_PAGES_AFTER:
            use_huge_pages(self._weight)


class Joint:
    """Linears that read the same input: the first call computes the outputs of all.

    The others return theirs when called with the same, unmodified tensor; any other input is computed. Outputs are
    disjoint slices of one tensor, so in-place changes of one do not affect the others. Weights must not change between
    the calls with one input, which a model makes within a forward pass.
    """

    def __init__(self, linears: Sequence[PrepackedLinear], kernels: Kernels | None):
        self.linears = linears
        self.packed = Packed(kernels)
        self._sizes = [linear.out_features for linear in linears]
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[nn.Linear, Tensor] = {}

    def output(self, linear: PrepackedLinear, x: Tensor) -> Tensor | None:
        """y (..., O) of ``linear`` for ``x`` (..., I); None if one of the weights is trainable.

        Fused optimizers change weights without a version bump.
        """
        if x is not self._x or x._version != self._version or linear not in self._waiting:
            if any(linear.weight.requires_grad for linear in self.linears):
                return None
            y = self.packed.product(self.linears, x)
            if len(self.linears) == 1:
                return y
            self._waiting = dict(zip(self.linears, y.split(self._sizes, dim=-1), strict=True))
            self._x, self._version = x, x._version
        output = self._waiting.pop(linear)
        if not self._waiting:
            self._x = None
        return output


class PrepackedLinear(nn.Linear):
    """A linear over the same weight and bias. Uses ``F.linear`` with gradients, few rows, or dtypes other than fp32."""

    def __init__(self, linear: nn.Linear, kernels: Kernels | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.joint = Joint([self], kernels)
        self._fewest = (1 if kernels else fewest_rows()) * self.in_features  #: numbers in an input

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.numel() < self._fewest or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        y = self.joint.output(self, x)
        return F.linear(x, self.weight, self.bias) if y is None else y


def prepack_for(model: nn.Module, hardware: HardwareConfig, generates: bool) -> str:
    """Pack the weights of ``model`` if ``hardware.prepack`` says so; null packs for generation if memory allows.

    Returns:
        What null decided and why; "" if there was nothing to decide.

    Raises:
        UserError: ``hardware.prepack`` is true, but torch was built without oneDNN.
    """
    if hardware.prepack is not None:
        if hardware.prepack:
            prepack(model)
        return ""
    if not generates or (hardware.device, hardware.precision) != ("cpu", "fp32") or not available():
        return ""
    weights = {child.weight.data_ptr(): child.weight.nbytes for child in model.modules() if type(child) is nn.Linear}
    size, available_bytes = sum(weights.values()), MEMORY_SHARE * free_memory()
    if not size:
        return ""
    if size > available_bytes:
        return (
            f"weights are not packed: {size / 1e9:.1f} GB more is over {MEMORY_SHARE:.0%} of free memory "
            f"(hardware.prepack)"
        )
    prepack(model)
    packing = (
        f"weights packed for speed: {size / 1e9:.1f} GB more memory, multiplied by {multiplier(model)} "
        f"(hardware.prepack)"
    )
    return packing if size > MENTIONED else ""


def multiplier(model: nn.Module) -> str | None:
    """What multiplies the packed weights of ``model``, ``our kernels`` or ``oneDNN``; None if they are not packed."""
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            return "oneDNN" if module.joint.packed.kernels is None else "our kernels"
    return None


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory available to this process: the machine's, or those left in its control group; 0 if unknown."""
    limits: list[float] = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # "max" means no limit
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        limits.append(int(limit) - int(used))
    return max(0, min(limits, default=0))


def available() -> bool:
    """Whether this build of torch can pack."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prepack(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of ``model``; those with frozen weights become faster. So does attention to one token
    where our kernels are used.

    Raises UserError if torch was built without oneDNN.
    """
    if not available():
        raise UserError("hardware.prepack: true, but this build of torch has no oneDNN; set hardware.prepack=false")
    kernels = kernels_for(model)
    groups = same_input(model) if isinstance(model, PreTrainedModel) else []
    replaced: dict[nn.Linear, PrepackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                replaced[child] = PrepackedLinear(child, kernels)
                setattr(parent, name, replaced[child])
    for group in groups:
        joint = Joint([replaced[linear] for linear in group], kernels)
        for linear in joint.linears:
            linear.joint = joint
    if kernels is not None and isinstance(model, PreTrainedModel):
        use_decode_attention(model)


@torch.no_grad()
def same_input(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Groups of linears that are called once in a forward pass (of one token) with the same input tensor."""
    calls: list[tuple[nn.Linear, Tensor]] = []  # keeps the inputs alive, so that their ids are unique
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


def pack(linears: Sequence[nn.Linear], kernels: Kernels | None) -> tuple[Tensor, Tensor | None]:
    """The stacked and packed weights (O, I) of ``linears``, and their biases (O,), for our kernels or for oneDNN."""
    weights, bias = [linear.weight.detach() for linear in linears], None
    if any(linear.bias is not None for linear in linears):
        biases: list[Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
        ]
        bias = torch.cat(biases).detach()  # (O,)
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)  # (O, I)
    if kernels is not None:
        return pack_blocks(stacked, bias)
    return torch.ops.mkldnn._reorder_linear_weight(stacked, PACKED_FOR), bias


def use_huge_pages(packed: Tensor) -> None:
    """Move a packed weight to pages of 2 MiB where the system can, for fewer address translations."""
    if sys.platform != "linux":
        return
    if packed.is_mkldnn:
        start, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    else:
        start, size = packed.data_ptr(), packed.nbytes
    start, end = start // HUGE_PAGE * HUGE_PAGE, start + size
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, -(-(end - start) // HUGE_PAGE) * HUGE_PAGE, MADV_COLLAPSE)  # best effort
