"""Adapters for other programs: the same function, or a refusal."""

import json
from pathlib import Path

import pytest
import small
import torch
import transformers
from command import reconfigure
from lelora_training import moved

from lowrank_cli import methods
from lowrank_cli.adapter.files.engines import for_sglang
from lowrank_cli.adapter.files.export import as_lora, loaded_error, lora_error, save_lora, save_merged, truncate
from lowrank_cli.adapter.files.save_load import canary
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run
from lowrank_cli.runs.vllm_command import vllm_refusal, vllm_serve

MOVED = "lelora, moved"  #: with updates in the stored weights
MERGEABLE = [*(name for name in small.TRAINABLE if not methods.refusal(name, "export")), MOVED]


def adapted(name, family):
    adapter = moved(family)[1] if name == MOVED else small.adapted(name, family, trained=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.model.eval()
    return adapter


def test_truncation_is_the_best_approximation_and_knows_its_error():
    b, a = torch.randn(9, 5), torch.randn(5, 7)
    u, s, v = torch.linalg.svd(b @ a)
    low, high, error = truncate(b, a, 2)
    torch.testing.assert_close(low @ high, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5, rtol=1e-4)
    assert error == pytest.approx((s[2:].norm() / s.norm()).item(), rel=1e-4)
    low, high, error = truncate(torch.cat((b, b), dim=1), torch.cat((a, a)), None)
    assert low.shape == (9, 5) and error < 1e-5
    torch.testing.assert_close(low @ high, 2 * b @ a, atol=1e-5, rtol=1e-4)
    low, high, error = truncate(b[:, :0], a[:0], None)
    assert (low @ high == 0).all() and error == 0


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_all_ranks_are_the_same_function_and_fewer_say_how_far_they_are(name, family):
    adapter = adapted(name, family)
    if not adapter.linears:
        with pytest.raises(UserError, match=r"export\.format: lora holds low-rank updates.*\(allowed: merged\)"):
            as_lora(adapter, None)
        return
    before = {path: linear.weight.clone() for path, linear in adapter.linears.items()}
    loras, error = as_lora(adapter, None)
    assert error < 1e-5 and lora_error(adapter, loras) < 1e-4
    one, worse = as_lora(adapter, 1)
    assert worse > 0.1 and lora_error(adapter, one) > 1e-3
    assert all(torch.equal(linear.weight, before[path]) for path, linear in adapter.linears.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_peft_library_loads_the_export_with_equal_logits(name, family, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = adapted(name, family)
    if not adapter.linears:
        pytest.skip(f"{name} has no low-rank modules")
    loras, _ = as_lora(adapter, None)
    save_lora(adapter, loras, tmp_path)
    model = peft.PeftModel.from_pretrained(small.model(family), tmp_path).eval()
    expected = adapter.model(input_ids=small.ids()).logits
    torch.testing.assert_close(model(input_ids=small.ids()).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merged_weights_load_without_us(name, family, tmp_path):
    adapter = adapted(name, family)
    expected = adapter.model(input_ids=small.ids()).logits
    kind = type(adapter.model)
    ids, logits = canary(adapter)
    save_merged(adapter, tmp_path)
    assert loaded_error(kind.from_pretrained(tmp_path).eval(), ids, logits) < 1e-5
    found = kind.from_pretrained(tmp_path).eval()(input_ids=small.ids()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_no_single_weight_equals_is_refused_before_anything_is_loaded(lrk, fake_stages):
    with pytest.raises(UserError, match="prompt by prompt"):
        as_lora(small.adapted("milora"), None)
    for name, how in (("milora", "modules are chosen prompt by prompt"), ("moelora", "experts are chosen token by")):
        assert lrk("train", f"method={name}").code == 0
        for form in ("lora", "merged"):
            ended = lrk("check", "export", f"export.format={form}")
            assert ended.code == 2 and ended.err.startswith(f"error: method: '{name}' has no export: its {how}")
            assert "(allowed: " in ended.err and "lora" in ended.err
    assert lrk("check", "export", "method=idaicl", "run=outputs/latest").code == 0  # that is the statistics' export


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_bf16_model_is_exported_within_its_rounding(lrk):
    quick = ["task=tiny_entailment", "task.limit=8", "hardware.threads=1", "train.max_steps=4", "train.batch_size=4"]
    assert lrk("train", "method=lora", "hardware.precision=bf16", "train.learning_rate=0.02", *quick).code == 0
    trained = Path("outputs/latest").resolve()
    assert lrk("export", f"run={trained}", "export.format=merged").code == 0
    refused = lrk("export", f"run={trained}", "export.format=merged", "export.max_error=1e-6")
    assert refused.code == 2 and "(allowed: 1e-06); set export.format=lora, or hardware.precision=fp32" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lelora", "dora"])
@pytest.mark.filterwarnings("ignore")
def test_the_verb_writes_what_it_proved_and_refuses_the_rest(lrk, name):
    peft = pytest.importorskip("peft")
    quick = ["task=tiny_entailment", "task.limit=8", "hardware.threads=1", "train.max_steps=4", "train.batch_size=4"]
    assert lrk("train", f"method={name}", *quick, "train.eval_every=4").code == 0
    trained = Path("outputs/latest").resolve()
    refused = lrk("export", f"run={trained}", "export.rank=1", "export.max_error=1e-6")
    assert refused.code == 2
    assert "error: export.max_error: the exported logits differ by" in refused.err
    assert lrk("export", f"run={trained}", "export.format=merged", "export.rank=2").code == 2
    refused = lrk("export", f"run={trained}", "export.format=merged", "export.target=vllm")
    assert (
        refused.code == 2
        and "export.target: vllm loads a LoRA of PEFT, and export.format=merged is not one; leave it out" in refused.err
    )
    refused = lrk("export", f"run={trained}", "hardware.processes=2")
    assert refused.code == 2 and "hardware.processes: 2, but one process exports; set it to 1" in refused.err
    run = Run.open(trained)
    reconfigure(run, hardware={**run.config()["hardware"], "processes": 2, "shard": "node"})  # as if two had trained
    assert lrk("export", f"run={trained}", "--dry-run").code == 0
    commands = {"vllm": "vllm serve ", "sglang": "python -m sglang.launch_server --model-path "}
    for target, command in commands.items() if name == "lelora" else ():
        ended = lrk("export", f"run={trained}", f"export.target={target}")
        assert ended.code == 0 and f"  serve: {command}" in ended.out
    if name == "dora":
        pytest.importorskip("gguf")
        ended = lrk("export", f"run={trained}", "export.format=gguf")
        assert ended.code == 0 and "  serve: llama-server -m BASE.gguf --lora " in ended.out
        refused = lrk("export", f"run={trained}", "export.format=gguf_merged")
        assert refused.code == 2 and "this model has another one; set export.format=merged" in refused.err
    logits = []
    for form, file in (("lora", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        ended = lrk("export", f"run={trained}", f"export.format={form}")
        assert ended.code == 0 and "  serve: vllm serve " in ended.out
        said = "what dora changes in a weight is not a LoRA of its largest rank, 8" in ended.err
        assert said == (name == "dora" and form == "lora")
        (load,) = [line for line in ended.out.splitlines() if line.startswith("  load: ")]
        loaded = eval(load.removeprefix("  load: "), {"peft": peft, "transformers": transformers})
        logits.append(loaded.eval()(input_ids=small.ids()).logits)
        run = Run.open("outputs/latest")
        assert run.metrics["export/logit_error"] < 1e-3
        assert (run.path / "export" / file).is_file() and (run.path / "export" / "tokenizer.json").is_file()
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def mixed(family="llama"):
    """A LoRA whose ranks differ, and that leaves out K and G of the second layer."""
    adapter = adapted("lora", family)
    left_out = [site for site in adapter.sites.values() if site.layer == 1 and site.role in "KG"]
    for site in left_out:
        adapter.detach(site)
    loras, _ = as_lora(adapter, None)
    first = next(iter(loras))
    loras[first] = tuple(factor.contiguous() for factor in (loras[first][0][:, :3], loras[first][1][:3]))
    return adapter, loras


@pytest.mark.filterwarnings("ignore")
def test_sglang_gets_one_rank_and_whole_groups_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    adapter, loras = mixed()
    fitted = for_sglang(adapter, loras)
    rank = max(len(a) for _, a in loras.values())
    assert {a.shape[0] for _, a in fitted.values()} == {b.shape[1] for b, _ in fitted.values()} == {rank}
    added = {"model.layers.1.self_attn.k_proj", "model.layers.1.mlp.gate_proj"}
    assert fitted.keys() - loras.keys() == added
    logits = []
    for name, form in (("mixed", loras), ("fitted", fitted)):
        (tmp_path / name).mkdir()
        save_lora(adapter, form, tmp_path / name)
        model = peft.PeftModel.from_pretrained(small.model("llama"), tmp_path / name).eval()
        logits.append(model(input_ids=small.ids()).logits)
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / "fitted" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == config["lora_alpha"] == rank
    assert json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())["rank_pattern"]


def test_what_an_engine_cannot_serve_is_refused():
    for family, reason in (("gpt2", "one for 'transformer.h.0.attn.c_attn'"), ("bert", "'classifier' of this class")):
        adapter = adapted("lora", family)
        with pytest.raises(UserError, match=rf"export\.target: sglang .*{reason}.*\(allowed: peft; or export"):
            for_sglang(adapter, as_lora(adapter, None)[0])
    assert "no LoRAs for models of type gpt2" in vllm_refusal("gpt2", 8)
    assert "at most, and this one has 513; set export.rank=512" in vllm_refusal("llama", 513)
    assert not vllm_refusal("llama", 512)
    line = vllm_serve("base", "llama", 9, {"tuned": "folder"})
    assert line == "vllm serve base --enable-lora --max-lora-rank 16 --lora-modules tuned=folder"
