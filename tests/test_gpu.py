"""What only a CUDA device can show; skipped where there is none."""

from pathlib import Path

import pytest
import small
import torch

from lowrank_cli.dispatch import single
from lowrank_cli.runs import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["lora", "dora", "milora", "moelora", "adalora", "pissa", "alora", "lelora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_gpu_computes_what_the_cpu_does(name, family):
    adapter = small.adapted(name, family)
    expected = adapter.model(input_ids=small.ids()).logits
    found = adapter.model.to("cuda")(input_ids=small.ids().to("cuda")).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_bf16_run_on_the_gpu_trains_and_is_evaluated():
    quick = ["hardware=gpu", "task=tiny_sentiment", "task.limit=32", "train.max_steps=4", "train.batch_size=8"]
    single.start("train", ["method=milora", *quick], None, "lrk train")
    run = Run.open(Path("outputs/latest").resolve())
    single.start("evaluate", [f"run={run.path}"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == run.metrics["test/accuracy"]
    assert run.info["device_memory_bytes"] > 0
    assert run.info["device"] == torch.cuda.get_device_name()
