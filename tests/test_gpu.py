"""What only a CUDA device can show; skipped where there is none."""

from pathlib import Path

import pytest
import small
import torch
from grouped_cases import compare

from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_gpu_computes_what_the_cpu_does(name, family):
    adapter = small.adapted(name, family)
    expected = adapter.model(input_ids=small.ids()).logits
    found = adapter.model.to("cuda")(input_ids=small.ids().to("cuda")).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_kernels_of_the_grouped_update_compute_what_torch_does(dtype, tolerance):
    compare("cuda", dtype, tolerance)


@pytest.mark.parametrize("grouped", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_each_row_of_a_bank_has_the_logits_of_its_adapter_alone(dtype, tolerance, grouped):
    def on_gpu(model):
        return model.to("cuda", dtype)

    adapters = {"lora": small.adapted("lora"), "few": small.adapted("lora", rank=7, target_modules=["V", "D"])}
    bank = Bank(on_gpu(small.model()), grouped=grouped)
    for adapter in adapters.values():
        on_gpu(adapter.model)
        for part in adapter.modules.values():
            part.float()  # trained ones stay in fp32
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    names, ids = ["few", "lora", None, "lora", "few"], small.ids(5).to("cuda")
    with torch.no_grad(), bank.batch(names):
        together = bank.model(input_ids=ids).logits
        for row, name in enumerate(names):
            if name:
                alone = adapters[name].model(input_ids=ids[row : row + 1]).logits[0]
                torch.testing.assert_close(together[row], alone, atol=tolerance, rtol=tolerance)


def test_a_4bit_run_trains_and_is_evaluated():
    pytest.importorskip("bitsandbytes")
    quick = ["hardware=gpu_4bit", "task=tiny_sentiment", "task.limit=32", "train.max_steps=4", "train.batch_size=8"]
    single_run.start("train", ["method=dora", *quick], None, "lrk train")
    run = Run.open(Path("outputs/latest").resolve())
    single_run.start("evaluate", [f"run={run.path}"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == run.metrics["test/accuracy"]


@pytest.mark.parametrize(
    "method",
    [["method=milora"], ["method=lelora", "method.phase=1", "method.explore=0.8"]],
    ids=lambda method: method[0],
)
def test_a_bf16_run_on_the_gpu_trains_and_is_evaluated(method):
    quick = ["hardware=gpu", "task=tiny_sentiment", "task.limit=32", "train.max_steps=4", "train.batch_size=8"]
    single_run.start("train", [*method, *quick], None, "lrk train")
    run = Run.open(Path("outputs/latest").resolve())
    single_run.start("evaluate", [f"run={run.path}"], None, "lrk evaluate")
    assert Run.open("outputs/latest").metrics["test/accuracy"] == run.metrics["test/accuracy"]
    assert run.info["device_memory_bytes"] > 0
    assert run.info["device"] == torch.cuda.get_device_name()
