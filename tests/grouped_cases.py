"""The Triton update against the plain one, on any device; as a program, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from lowrank_cli.adapter.spans import Span
from lowrank_cli.adapter.tenants.grouped_update import GroupedUpdate, group
from lowrank_cli.adapter.tenants.operands import Factors, Operands

INPUTS, OUTPUTS = 150, 140  # no multiples of a tile


RANKS = 64  # of one product of the kernels


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Both updates on many shapes: rows in and out of order, prompts, unlike ranks, gates, a span of the output."""
    from lowrank_cli.adapter.tenants.grouped_triton import TritonUpdate

    torch.manual_seed(1)
    for owners, tokens, span, gated, ranks in (
        ([1, 2, 3], 1, None, False, (4, 3)),  # a decoding step, in order
        ([None, 2, 1, None, 2, 2], 7, Span(20, 20 + OUTPUTS), True, (20, 5)),
        ([1, 1, 1, 2], 1, None, True, (RANKS + 6, 1)),
    ):
        grouping = group(tuple(owners))
        sizes = [ranks[owner % 2] for owner in grouping.owners]
        # A of variance 1 / I, as initialised: values of order 1 throughout
        a, b, _ = Operands().of(
            [
                Factors(
                    torch.randn(rank, INPUTS, device=device).to(dtype) / INPUTS**0.5,
                    torch.randn(rank, OUTPUTS, device=device).to(dtype) / rank**0.5,
                )
                for rank in sizes
            ]
        )
        gates = torch.rand(len(owners), device=device) if gated else None
        x = torch.randn(INPUTS, len(owners) * tokens, device=device).to(dtype).t()  # not laid out row by row
        x = x.unflatten(0, (len(owners), tokens))  # (B * T, I) -> (B, T, I)
        y = torch.randn(len(owners), tokens, OUTPUTS + (40 if span else 0), device=device).to(dtype)  # (B, T, O)
        plain, found = y.clone(), y.clone()
        GroupedUpdate(a, b, grouping, gates, span, len(owners)).add_to(plain, x)
        TritonUpdate(a, b, grouping, gates, span, len(owners)).add_to(found, x)
        assert not torch.equal(found, y), "something was added"
        with pytest.raises(AssertionError, match="autograd does not see"):
            TritonUpdate(a, b, grouping, gates, span, len(owners)).add_to(found, x.clone().requires_grad_())
        torch.testing.assert_close(found, plain, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":  # the interpreter is chosen before triton is imported, so it gets a process of its own
    compare("cpu", torch.float32, 1e-5)
