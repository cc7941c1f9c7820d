"""LoRA-FA: B trains as LoRA's does, A stays where it is and is saved, and no inputs are kept for it."""

import pytest
import small
import torch

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.bench.bench_models import BenchModel
from lowrank_cli.bench.train_step import saved_bytes

FLOAT = 4  # bytes


def backward(adapter):
    adapter.model.train()(input_ids=small.ids(), labels=small.ids()).loss.backward()


def test_b_gets_the_gradient_that_it_has_in_lora_and_a_gets_none():
    ours, lora = small.adapted("lora_fa"), small.adapted("lora")
    for adapter in (ours, lora):
        backward(adapter)
    for key, part in ours.modules.items():
        assert torch.equal(part.lora_a, lora.modules[key].lora_a)
        assert part.lora_a.grad is None
        torch.testing.assert_close(part.lora_b.grad, lora.modules[key].lora_b.grad)
    assert ours.count() == sum(part.lora_b.numel() for part in ours.modules.values())


def test_the_update_stays_in_the_row_space_of_the_first_a():
    torch.manual_seed(3)
    method = small.method("lora_fa")
    adapter = method.adapt(small.model())
    first = {key: part.lora_a.clone() for key, part in adapter.modules.items()}
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=0.1)
    for _ in range(3):
        backward(adapter)
        optimizer.step()
    for key, part in adapter.modules.items():
        assert torch.equal(part.lora_a, first[key])
        delta, basis = part.delta(), torch.linalg.qr(first[key].t()).Q  # (O, I), (I, R)
        assert delta.norm() > 0.1
        torch.testing.assert_close(delta @ basis @ basis.t(), delta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["none", "feed_forward"])
def test_only_the_ranks_are_saved_for_the_backward_pass(checkpointing):
    ids, rank = small.ids(4, 16), 4
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def saved(adapter, model):
        recompute(model, checkpointing)
        return saved_bytes(BenchModel(model.train(), adapter=adapter), batch)

    bare = small.model().requires_grad_(False)
    ours, lora = small.adapted("lora_fa"), small.adapted("lora")
    without = saved(None, bare)
    assert saved(ours, ours.model) - without == len(ours.modules) * ids.numel() * rank * FLOAT
    inputs = 32 + 32 + 48 if checkpointing == "none" else 0  # of Q K V, of G U, of D; attention keeps that of O
    assert saved(lora, lora.model) - saved(ours, ours.model) == 2 * ids.numel() * inputs * FLOAT


def test_a_travels_with_the_adapter(tmp_path):
    adapter = small.adapted("lora_fa")
    save_load.save(adapter, tmp_path, {})
    torch.manual_seed(4)
    fresh = small.method("lora_fa").adapt(small.model())
    save_load.load(fresh, tmp_path)
    assert all(torch.equal(part.lora_a, adapter.modules[key].lora_a) for key, part in fresh.modules.items())
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, adapter.model(input_ids=small.ids()).logits)


def test_ranks_move_while_it_trains():
    adapter = small.adapted("lora_fa")
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=0.1)
    backward(adapter)
    optimizer.step()
    optimizer.zero_grad()
    before = {key: part.lora_a.clone() for key, part in adapter.modules.items()}
    resize(adapter, {key: ([0, 2], 1) for key in adapter.modules}, optimizer)
    backward(adapter)
    optimizer.step()
    for key, part in adapter.modules.items():
        assert torch.equal(part.lora_a[:2], before[key][[0, 2]]) and part.lora_a.grad is None
        assert part.lora_b[:, 2].norm() > 0
