"""The kernels of ``kernels.c`` for torch's tensors, compiled for the processor at hand.

They compute in fp32, without gradients, what a decoding step does slowly in torch: products of a few rows, low-rank
updates that differ from row to row, attention of one token. Results equal torch's up to rounding.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Bytes of a model's matrices from which on compiling, which takes 0.4 to 0.6 s on a quiet EPYC, is worth it.
LEAST_BYTES = 5e7
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 60
OUTPUTS = 32  #: outputs of a packed block, as in kernels.c
LANES = 16  #: numbers in a register, as in kernels.c


class RowUpdate(NamedTuple):
    """A low-rank update of one row of a batch."""

    a: Tensor  #: A (R, I)
    b: Tensor  #: s · Bᵀ (R, O)
    row: int
    gate: float = 1.0


class _Update(ctypes.Structure):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("rank", c_int64), ("row", c_int64), ("gate", c_float))


class Updates:
    """Updates of different rows, as the kernel reads them: where their factors are, which are kept alive."""

    def __init__(self, updates: Sequence[RowUpdate]):
        self.factors = [(one.a.contiguous(), one.b.contiguous()) for one in updates]
        self.count = len(updates)
        self.array = (_Update * self.count)(
            *(
                _Update(a.data_ptr(), b.data_ptr(), len(a), one.row, one.gate)
                for one, (a, b) in zip(updates, self.factors, strict=True)
            )
        )


class Kernels:
    """The compiled functions of a shared library."""

    def __init__(self, library: ctypes.CDLL):
        self._linear, self._add_updates, self._attend = library.linear, library.add_updates, library.attend
        self._linear.argtypes = (*(c_void_p,) * 4, *(c_int64,) * 3, c_int)
        self._add_updates.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, *(c_int64,) * 4, c_int)
        self._attend.argtypes = (*(c_void_p,) * 6, *(c_int64,) * 8, c_float, c_int)
        for function in (self._linear, self._add_updates, self._attend):
            function.restype = None

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x (..., I) Wᵀ + bias: (..., O), with what :func:`pack` made of W and of the bias."""
        x = x.contiguous()
        y, inputs = x.new_empty(*x.shape[:-1], outputs), x.shape[-1]
        self._linear(
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            x.numel() // inputs,
            inputs,
            outputs,
            torch.get_num_threads(),
        )
        return y

    def add_updates(self, updates: Updates, x: Tensor, y: Tensor, tokens: int) -> None:
        """Add to the rows of ``y`` their updates, in place.

        Args:
            x: (B * T, I) or (B, T, I).
            y: (B * T, O) or (B, T, O); its tokens are equally far apart, its outputs next to each other.
            tokens: T.
        """
        x, y = x.contiguous(), y.view(-1, y.shape[-1])  # y: (B * T, O)
        assert y.stride(1) == 1
        self._add_updates(
            updates.array,
            updates.count,
            x.data_ptr(),
            y.data_ptr(),
            tokens,
            x.shape[-1],
            y.shape[1],
            y.stride(0),
            torch.get_num_threads(),
        )

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
        """Attention of one new token in each row, (B, 1, H, D).

        Args:
            q: (B, H, 1, D).
            keys, values: (B, K, T, D) with equal strides, each head contiguous.
            seen: (B, 1, 1, T) or (1, 1, 1, T), False for tokens that are hidden from a row; None if none is.
        """
        rows, heads, _, width = q.shape
        q, (kv_heads, tokens) = q.contiguous(), keys.shape[1:3]
        out, scores = q.new_empty(rows, 1, heads, width), q.new_empty(rows, heads, tokens)
        self._attend(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if seen is None else seen.data_ptr(),
            out.data_ptr(),
            scores.data_ptr(),
            rows,
            heads,
            kv_heads,
            tokens,
            width,
            keys.stride(0),
            keys.stride(1),
            0 if seen is None or len(seen) == 1 else seen.stride(0),
            scale,
            torch.get_num_threads(),
        )
        return out


def pack(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight (O, I) as blocks (O / 32, I, 32), O rounded up, and its bias (O,) of as many outputs."""
    missing = -len(weight) % OUTPUTS
    padded = nn.functional.pad(weight, (0, 0, 0, missing))  # (O, I) -> (N * 32, I)
    blocks = padded.view(-1, OUTPUTS, weight.shape[1]).transpose(1, 2).contiguous()  # (N * 32, I) -> (N, I, 32)
    return blocks, None if bias is None else nn.functional.pad(bias, (0, missing))  # (O,) -> (N * 32,)


def kernels_for(model: nn.Module) -> Kernels | None:
    """The kernels, if ``model`` is on a CPU that they are made for, in fp32, and large enough."""
    weights = {weight.data_ptr(): weight for weight in model.parameters() if weight.dim() == 2}.values()
    if sum(weight.nbytes for weight in weights) < LEAST_BYTES:
        return None
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return None
    return kernels()


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled; None without AVX-512 (where they were not measured) or a C compiler that works."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux" or not torch.cpu.get_capabilities().get("avx512_f"):
        return None
    try:
        with TemporaryDirectory(prefix="lrk-native-") as folder:
            path = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, "-o", str(path), str(Path(__file__).with_suffix(".c"))]
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=COMPILE_SECONDS)
            return Kernels(ctypes.CDLL(str(path)))  # stays loaded when the file is gone
    except (OSError, subprocess.SubprocessError):  # also where there is no folder for it, or none to run code from
        return None
