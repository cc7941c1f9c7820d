"""The grouped update in Triton, for CUDA: two launches and no copy of the input.

It computes what :mod:`~lowrank_cli.adapter.tenants.grouped_update` does, which is tested in Triton's interpreter (fp32)
and on a GPU (fp32 and bf16). It is used only on request (``hardware.grouped=triton``, ``Bank(…, grouped="triton")``),
without fallback.

The plain version gathers rows, multiplies twice, applies gates and calls ``index_add_`` with a tensor of the output's
size. Here the first kernel reads the rows in place and applies the gates; the second adds in place, without atomics,
because a row belongs to at most one group. ``torch._grouped_mm`` would only avoid the padding of groups, and supports
bf16 only.

Its speed has not been measured yet, so ``torch`` is the default. To measure it, compare ``lrk bench decode --tenants
1,8,64 hardware=gpu hardware.grouped=triton`` with ``hardware.grouped=torch``.

Shapes: x (B * T, I), y (B * T, O), ``slots`` (G * n,) rows of the batch or -1, A (G, R, I), B (G, R, O),
h (G, n * T, R).
"""

# The arguments of kernels are pointers and numbers, which Triton leaves unannotated except for constexpr:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cli.adapter.spans import Span, put, take
from lowrank_cli.adapter.tenants.grouped_update import GroupedUpdate, Grouping

TOKENS = 16  #: tokens of one program: the minimum of ``tl.dot``, since decoding steps have few
WIDTH = 128  #: inputs summed at a time, and outputs of one program
RANKS = 64  #: most ranks in one product


@triton.jit
def _slots(slots, group, per_group, tokens, M: tl.constexpr):
    """For ``M`` tokens of a group: their indices in it, their rows of x and y, a mask of real rows, and their slots."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    slot = group * per_group + token // tokens
    row = tl.load(slots + slot, mask=token < per_group * tokens, other=-1).to(tl.int64)
    return token, row * tokens + token % tokens, row >= 0, slot


@triton.jit
def _down(
    x, slots, a, gates, h, per_group, tokens, inputs, rank,
    GATED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """h = w ⊙ A x of ``M`` tokens and ``R`` ranks of one group."""
    group, r = tl.program_id(0), tl.program_id(2) * R + tl.arange(0, R)
    token, at, there, slot = _slots(slots, group, per_group, tokens, M)
    total = tl.zeros((M, R), dtype=tl.float32)
    for start in range(0, inputs, K):
        i = start + tl.arange(0, K)
        some = tl.load(x + at[:, None] * inputs + i[None, :], mask=there[:, None] & (i < inputs)[None, :], other=0.0)
        rows = (group * rank + r).to(tl.int64)
        down = tl.load(
            a + rows[None, :] * inputs + i[:, None], mask=(r < rank)[None, :] & (i < inputs)[:, None], other=0.0
        )
        total += tl.dot(some, down, input_precision="ieee")  # (M, K) @ (K, R) -> (M, R)
    if GATED:
        total *= tl.load(gates + slot, mask=there, other=0.0).to(tl.float32)[:, None]
    offset = (group * per_group * tokens + token).to(tl.int64)
    tl.store(
        h + offset[:, None] * rank + r[None, :], total.to(h.dtype.element_ty), mask=there[:, None] & (r < rank)[None, :]
    )


@triton.jit
def _up(
    h, slots, b, y, per_group, tokens, outputs, rank, y_stride, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """y += B h of ``M`` tokens and ``N`` outputs of one group."""
    group, o = tl.program_id(0), tl.program_id(2) * N + tl.arange(0, N)
    token, at, there, _ = _slots(slots, group, per_group, tokens, M)
    offset = (group * per_group * tokens + token).to(tl.int64)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        some = tl.load(h + offset[:, None] * rank + r[None, :], mask=there[:, None] & (r < rank)[None, :], other=0.0)
        rows = (group * rank + r).to(tl.int64)
        up = tl.load(
            b + rows[:, None] * outputs + o[None, :], mask=(r < rank)[:, None] & (o < outputs)[None, :], other=0.0
        )
        total += tl.dot(some, up, input_precision="ieee")  # (M, R) @ (R, N) -> (M, N)
    target, inside = y + at[:, None] * y_stride + o[None, :], there[:, None] & (o < outputs)[None, :]
    before = tl.load(target, mask=inside, other=0.0)
    tl.store(target, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


class TritonUpdate(GroupedUpdate):
    """:class:`GroupedUpdate`, computed by the kernels above."""

    def __init__(self, a: Tensor, b: Tensor, grouping: Grouping, gates: Tensor | None, span: Span | None, batch: int):
        super().__init__(a, b, grouping, gates, span, batch)
        self.down, self.b = a.contiguous(), self.b.contiguous()  # (G, R, I), (G, R, O)
        self.slots = torch.tensor(grouping.rows, dtype=torch.int32, device=a.device)  # (G * n,)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        assert not recorded, "the kernels are for inference: autograd does not see what they add"
        groups, rank, inputs = self.down.shape
        x = x.reshape(-1, inputs).to(self.down.dtype).contiguous()  # (B, T, I) -> (B * T, I), usually a view
        y = y.view(-1, y.shape[-1])  # (B, T, O) -> (B * T, O)
        y_span = take(y, self.span)
        per_group, tokens, outputs = len(self.slots) // groups, len(x) // self.batch, self.b.shape[-1]
        h = x.new_empty(groups, per_group * tokens, rank, dtype=self.b.dtype)
        ranks = min(RANKS, triton.next_power_of_2(max(rank, 16)))
        size = {"M": TOKENS, "R": ranks}
        blocks = triton.cdiv(per_group * tokens, TOKENS)
        gates = self.slots if self.gate is None else self.gate
        _down[(groups, blocks, triton.cdiv(rank, ranks))](
            x, self.slots, self.down, gates, h, per_group, tokens, inputs, rank,
            GATED=self.gate is not None, K=WIDTH, **size,
        )  # fmt: skip
        _up[(groups, blocks, triton.cdiv(outputs, WIDTH))](
            h, self.slots, self.b, y_span, per_group, tokens, outputs, rank, y_span.stride(0), N=WIDTH, **size
        )
        put(y, self.span, y_span)
