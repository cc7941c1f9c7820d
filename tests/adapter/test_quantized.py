"""hardware.quantization: adapters on weights in 4 bits are those on the values that these stand for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import small
import torch
import transformers
from safetensors.torch import load_file

from lowrank_cli.adapter.adapted_model import fingerprint
from lowrank_cli.adapter.files.export import as_lora, lora_error
from lowrank_cli.adapter.files.save_load import CANARY
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.quantized import dense, quantized
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.adapter.tenants.update_class import require_grouped
from lowrank_cli.errors import UserError
from lowrank_cli.models import quantize
from lowrank_cli.runs import Run
from lowrank_cli.schema import HardwareConfig

SETTINGS = {"name": "gpu_4bit", "device": "cuda", "precision": "bf16", "processes": 1, "threads": 1}
BLOCK = 64  # weights that share a scale
NEAR = {"atol": 3e-2, "rtol": 3e-2}  # bf16, with sums in another order

#: Our methods that leave the model's weights as they are. LeLoRA does with the fixed windows that :func:`adapted` sets.
KEEP_WEIGHTS = [name for name in small.TRAINABLE if name != "peft" and not small.method(name).rewrites()]

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def on_cpu(monkeypatch):
    """The library's code for CPUs, without AVX512-BF16: with it a bare forward pass would pack weights anew."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def models(tmp_path, on_cpu):
    """A family's random model in 4 bits, on the CPU, and in bf16 with the values that the 4 bits stand for."""

    def make(family):
        original = small.model(family)
        original.save_pretrained(tmp_path / family)
        settings = quantize.quantizing(HardwareConfig(**{**SETTINGS, "device": "cpu"}, quantization="nf4"))
        kind = type(original)
        packed = kind.from_pretrained(tmp_path / family, dtype=torch.bfloat16, **settings).eval()
        plain = kind.from_pretrained(tmp_path / family, dtype=torch.bfloat16).eval()
        for path, module in packed.named_modules():
            if quantized(getattr(module, "weight", None)):
                into, values = plain.get_submodule(path), dense(module.weight)
                values = values if isinstance(into, torch.nn.Linear) else values.t().contiguous()
                if module.in_features >= BLOCK:  # shorter rows come out coarser on a CPU, by the library's code for it
                    assert (into.weight - values).norm() < 0.1 * values.norm()  # 0.092 for normal numbers
                into.weight.data = values
        return packed, plain

    return make


def adapted(name, model):
    torch.manual_seed(3)
    adapter = small.method(name, **({"policy": "fixed"} if name == "lelora" else {})).adapt(model)
    for part in adapter.modules.values():
        part.lora_b.data.add_(torch.randn_like(part.lora_b) * 0.1)
    return adapter


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", [*KEEP_WEIGHTS, "lelora"]), ("gpt2", ["dora"]), ("bert", ["lora"])],
)
def test_outputs_and_gradients_are_those_of_the_dense_values(family, names, models):
    ids = small.ids()
    for name in names:
        found, expected = (adapted(name, model) for model in models(family))
        linears = found.linears.values()
        assert linears and all(quantized(linear.weight) for linear in linears)
        assert found.model.num_parameters() == expected.model.num_parameters()
        assert fingerprint(found.model) != fingerprint(expected.model)
        logits = [adapter.model(input_ids=ids).logits for adapter in (found, expected)]
        torch.testing.assert_close(*logits, **NEAR)
        for one in logits:
            one.float().square().mean().backward()
        for key, parameter in found.trained.items():
            assert parameter.dtype == torch.float32
            scale = expected.trained[key].grad.abs().max() + 1e-6
            assert (parameter.grad - expected.trained[key].grad).abs().max() < 0.1 * scale, key


@needs_bitsandbytes
def test_one_of_many_exported_and_never_merged(models):
    packed, _ = models("llama")
    bank, ids = Bank(packed), small.ids(2)
    adapter = adapted("lora", copied(packed))
    for path, linear in adapter.linears.items():
        own, shared = linear.base, packed.get_submodule(path)
        assert own is not shared and own.weight is shared.weight and own.quant_state is shared.quant_state
    bank.add("lora", adapter)
    with torch.no_grad():
        bare = packed(input_ids=ids).logits[1]
        with bank.batch(["lora", None]):
            together = packed(input_ids=ids).logits
        torch.testing.assert_close(together[0], adapter.model(input_ids=ids).logits[0], **NEAR)
        torch.testing.assert_close(together[1], bare, **NEAR)
    assert lora_error(adapter, as_lora(adapter, None)[0]) < 3e-2
    with pytest.raises(UserError, match="merge: the weights are quantised"):
        adapter.merge()


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_a_run_is_exported_and_loads_without_us(lrk, monkeypatch, on_cpu):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(HardwareConfig, "validate", lambda self: None)  # which allows 4 bits on CUDA only
    quick = ["hardware.device=cpu", "task=tiny_entailment", "task.limit=8", "train.max_steps=4", "train.batch_size=4"]
    assert lrk("train", "hardware=gpu_4bit", "method=dora", *quick).code == 0
    trained = Run.open(Path("outputs/latest").resolve())
    assert lrk("evaluate", f"run={trained.path}").code == 0
    assert Run.open("outputs/latest").metrics["test/accuracy"] == trained.metrics["test/accuracy"]
    assert lrk("evaluate", f"run={trained.path}", "hardware=cpu").code == 2
    ended = lrk("export", f"run={trained.path}", "export.max_error=0")
    assert ended.code == 2 and "set a larger export.max_error" in ended.err
    ended = lrk("export", f"run={trained.path}")
    (load,) = [line for line in ended.out.splitlines() if line.startswith("  load: ")]
    loaded = eval(load.removeprefix("  load: "), {"peft": peft, "transformers": transformers}).eval()
    canary = load_file(trained.path / "adapter" / CANARY)
    with torch.no_grad():
        logits = loaded(input_ids=canary["input_ids"]).logits[0, -1].float()
    assert (logits - canary["logits"]).abs().max() < 3e-2 * canary["logits"].abs().max()


def test_what_cannot_be_is_one_line(lrk, monkeypatch):
    for override, why in {
        "method=full": "method=full trains them; set hardware=gpu",
        "method=lelora": "method=lelora folds updates into them with method.policy=learned (allowed: fixed)",
        "hardware.compile=true": "hardware.compile: true is for hardware.quantization=null",
        "hardware.precision=fp32": "hardware.quantization: nf4 is for hardware.device=cuda and hardware.precision=bf16",
    }.items():
        ended = lrk("check", "train", "hardware=gpu_4bit", override)
        assert ended.code == 2 and why in ended.err and ended.err.count("\n") == 1
    ended = lrk("bench", "decode", "hardware=gpu_4bit", "bench.methods=[base,full]")
    assert ended.code == 2 and "method=full trains them" in ended.err and ended.err.count("\n") == 1
    ended = lrk("check", "train", "hardware=gpu_4bit", "method=dora")
    assert ended.code == 0 and "frozen linears nf4" in ended.out
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes, 0\.\S+ or newer; install it, or set"):
        quantize.require_quantization("nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hardware\.grouped: triton needs the package triton"):
        require_grouped("triton")
