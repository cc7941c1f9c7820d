"""The operands of a bank's batches: what their slots hold, and what a batch leaves for the next one."""

from __future__ import annotations

import torch

from lowrank_cli.adapter.tenants.grouped_update import group
from lowrank_cli.adapter.tenants.operands import Factors, Operands


def factors(rank: int, gate: float = 1.0) -> Factors:
    return Factors(torch.randn(rank, 6), torch.randn(rank, 5), gate)


def gated(one: Factors, gate: float) -> Factors:
    return Factors(one.a, one.b, gate)


def require_groups(operands, groups, in_order=True):
    """Each slot holds one of ``groups``, padded, with its gate."""
    a, b, order = operands.of(groups, in_order)
    assert sorted(order) == list(range(len(groups))) and (not in_order or order == sorted(order))
    for slot, group_of_slot in enumerate(order):
        one = groups[group_of_slot]
        for found, matrix in ((a[slot], one.a), (b[slot], one.b * one.gate)):
            assert torch.equal(found[: len(matrix)], matrix) and not found[len(matrix) :].any()
    return a, b, order


def test_rows_that_stay_are_not_copied_again():
    torch.manual_seed(0)
    operands, groups = Operands(), [factors(3), factors(2), factors(3, gate=0.5), factors(1)]
    a, _, _ = require_groups(operands, groups)
    a[1:] = 7  # what is not copied again keeps this
    later = [groups[0], groups[3], factors(3), groups[2]]
    found, _, order = operands.of(later, in_order=False)
    assert order == [0, 2, 3, 1] and found.data_ptr() == a.data_ptr()
    assert torch.equal(found[1], later[2].a) and (found[2:] == 7).all()


def test_another_gate_rank_or_number_of_groups_is_noticed():
    torch.manual_seed(0)
    operands, groups = Operands(), [factors(2), factors(2)]
    require_groups(operands, groups)
    require_groups(operands, [groups[0], gated(groups[1], 2.0)])
    require_groups(operands, [groups[1], factors(4)], in_order=False)
    require_groups(operands, [*groups, factors(1)], in_order=False)
    require_groups(operands, groups)
    a, _, order = require_groups(operands, [gated(groups[1], 0.5)])
    assert a.data_ptr() == groups[1].a.data_ptr() and order == [0], "a single group is not copied"


def test_operands_neither_keep_an_adapter_nor_take_another_for_it():
    torch.manual_seed(0)
    operands = Operands()
    for _ in range(8):  # a new adapter may get the address of the last one
        require_groups(operands, [factors(2), factors(2)], in_order=False)


def test_groups_follow_their_slots():
    grouping = group((1, 1, 2, None, 2))
    assert grouping.owners == (1, 2) and grouping.rows == (0, 1, 2, 4)
    assert grouping.reordered([1, 0]).rows == (2, 4, 0, 1) and grouping.reordered([0, 1]) is grouping
