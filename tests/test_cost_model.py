"""The cost model's formulas against what torch counts in real passes, and the page's tables against the formulas."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils import flop_counter

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "research"))

import cost_model
from cost_model import Shape

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.bench.bench_models import bench_models
from lowrank_cli.bench.train_step import loss
from lowrank_cli.config.composition import compose
from lowrank_cli.models.shape import random_model

aten = torch.ops.aten
#: Operations that torch's counter does not know, and those whose formula they have.
UNKNOWN = {
    aten.addmm_: aten.addmm,
    aten.baddbmm_: aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
ROWS, TOKENS, RANK = 2, 12, 4
SMALL = Shape(3, 64, 96, 4, 4, 32000)
NAMES = tuple(cost_model.methods(SMALL))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The entries of a benchmark of :data:`SMALL`."""
    selection = tmp_path_factory.mktemp("kept") / "kept.yaml"
    selection.write_text(f"layers: {{all: [{', '.join(cost_model.KEPT)}]}}\n")
    entries = f"bench.methods=[base,lora,dora,milora,'fanlora setting={selection}']"
    shape = "x".join(map(str, (SMALL.layers, SMALL.width, SMALL.feed_forward, SMALL.heads)))
    config = compose("bench", ["bench=train", f"model.shape={shape}", f"bench.rank={RANK}", entries], None).config
    base, _ = random_model(config.model, config.hardware, "cpu")
    made = bench_models(base, config.variants, 0)
    return dict(zip(["base", *cost_model.methods(SMALL)], made.values(), strict=True))


def counted(work) -> int:
    """FLOPs of ``work``."""
    counter = flop_counter.FlopCounterMode(display=False)
    counter.flop_registry |= {ours: flop_counter.flop_registry[known] for ours, known in UNKNOWN.items()}
    with counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_a_training_step_computes_what_the_model_says(models, name):
    ids = torch.randint(0, SMALL.vocabulary, (ROWS, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss(models[name], batch)  # the first pass of a model also checks its head
    base, added = cost_model.methods(SMALL, RANK)[name if name in NAMES else "LoRA"].train_flops(ROWS, TOKENS)
    assert counted(lambda: loss(models[name], batch).backward()) == base + (added if name in NAMES else 0)


@pytest.mark.parametrize("name", ["base", *NAMES])
@torch.no_grad()
def test_a_decoded_token_computes_what_the_model_says(models, name):
    model, ids = models[name].model.eval(), torch.randint(0, SMALL.vocabulary, (1, TOKENS))
    cache = returned_cache(model(input_ids=ids, use_cache=True))
    model(input_ids=ids[:, :1], **pass_cache(model, cache))  # DoRA's norms are computed once
    found = counted(lambda: model(input_ids=ids[:, :1], **pass_cache(model, cache)))
    base, added = cost_model.methods(SMALL, RANK)[name if name in NAMES else "LoRA"].decode_flops(TOKENS + 2)
    if name == "MiLoRA":
        used = [module for module in models[name].adapter.modules.values() if not module.skip]
        assert len(used) == 3 * SMALL.layers == cost_model.methods(SMALL)[name].products
        added = 2 * sum(module.lora_a.numel() + module.lora_b.numel() for module in used)
    assert found == base + (added if name in NAMES else 0)


@pytest.mark.parametrize("name", NAMES)
def test_trained_tensors_are_counted(models, name):
    trained, method = models[name].adapter.trained, cost_model.methods(SMALL, RANK)[name]
    assert sum(tensor.numel() for tensor in trained.values()) == method.parameters
    assert len(trained) == cost_model.trained_tensors(method)


def test_each_layer_adds_the_same_memory():
    shape, words = Shape(5, 64, 96, 4, 2, 512), ["method=lora", "method.rank=4"]
    assert cost_model.memory(shape, words, 2, 16) == cost_model.layered_memory(shape, [5], words, 2, 16)[0]


def test_the_page_has_the_tables_of_the_model():
    page = cost_model.PAGE.read_text()
    assert cost_model.with_tables(page) == page
