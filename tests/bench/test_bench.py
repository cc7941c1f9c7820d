"""lrk bench: what it leaves behind, what it refuses, and that it changes no model. Nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from command import lrk, one_line  # noqa: F401 (a fixture)
from torch import nn

from lowrank_cli import methods
from lowrank_cli.bench import decode, train_step
from lowrank_cli.bench.base_model import BaseModel
from lowrank_cli.bench.bench_models import BenchModel, bench_models, different, tenant_models
from lowrank_cli.bench.decode_rows import Sample, speed_ratio
from lowrank_cli.bench.examples import batch_of
from lowrank_cli.bench.rounds import in_turns
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.models.load import load
from lowrank_cli.models.shape import random_model
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import PEFTS, SHAPES, DecodeBench, HardwareConfig, ModelConfig

ROOT = Path(__file__).parents[2]
SHAPE = "2x32x48x4"
TRAIN = [f"model.shape={SHAPE}", "hardware.threads=1", "bench.rank=4", "bench.prompt_length=5"]
TINY = [*TRAIN, "bench.new_tokens=3"]
ENTRIES = ["base", "lora", "milora k=3", "milora k=1"]


def measured(*overrides: str) -> Run:
    single_run.start("bench", [*TINY, *overrides], None, "lrk bench decode")
    return Run.open("outputs/latest")


def small_models(entries=("base", "lora", "milora", "dora", "moelora")):
    configs = {
        name: None if name == "base" else small.method("lora" if name == "peft" else name).config for name in entries
    }
    return bench_models(small.model(), configs, seed=1)


def settings(**changes) -> DecodeBench:
    values = {"measure": "decode", "methods": [], "rank": None, "batch_size": 2, "prompt_length": 4, "new_tokens": 3}
    return DecodeBench(**values | {"beams": [1], "tenants": [], "rounds": 2} | changes)


def measure(models, prompts, beams=1, **changes):
    with progress.bar("", 1, shown=False) as bar:
        return decode.rounds(models, list(models.values()), prompts, settings(**changes), beams, bar)


def test_a_benchmark_leaves_figures_ratios_and_where_they_come_from(pictures):
    run = measured("bench.rounds=2", "bench.batch_size=2", f"bench.methods=[{','.join(map(repr, ENTRIES))}]")
    record = run.read_json("bench.json")
    assert [(row["method"], row["beams"]) for row in record["rows"]] == [(m, b) for b in (1, 3) for m in ENTRIES]
    for row in record["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["first_token_seconds"] > 0 and row["ms_per_token"] > 0 and row["peak_memory_bytes"] > 0
    base, lora, three, one = record["rows"][:4]
    assert (base["ratio"], base["ratio_quartiles"], base["parameters"]) == (1, [1, 1], 0)
    assert lora["parameters"] == lora["activated_parameters"] > 0
    assert one["activated_parameters"] < three["activated_parameters"] < three["parameters"] == one["parameters"]
    assert record["device"] and record["packages"]["torch"] and "resident" in record["memory"]
    assert record["variants"]["milora k=1"]["k"] == 1 and record["variants"]["lora"]["rank"] == 4
    pair = next(p for p in record["pairs"] if (p["method"], p["to"], p["beams"]) == ("milora k=1", "lora", 3))
    ratios = [a / b for a, b in zip(record["rows"][5]["seconds"], record["rows"][7]["seconds"], strict=True)]
    assert pair["ratio"] == pytest.approx(sum(ratios) / 2)
    assert run.metrics["bench/lora/beams_3/ratio"] == record["rows"][5]["ratio"]
    assert (run.path / "plots" / "decode.png").stat().st_size > 1000


def test_the_command_prints_a_table_for_each_number_of_beams(lrk):  # noqa: F811
    ended = lrk("bench", "decode", *TINY, "bench.rounds=1", "bench.methods=[base,'lora rank=2']")
    assert ended.code == 0, ended
    assert ended.out.count("× base") == 2 == ended.out.count("steps only") and ended.out.count("lora rank=2") == 2
    assert "random weights of shape 2x32x48x4" in ended.err
    run = json.loads(Path("outputs/latest/run.json").read_text())
    assert run["stage"] == "bench" and run["overrides"][0] == "bench=decode"
    assert json.loads(Path("outputs/latest/bench.json").read_text())["variants"]["lora rank=2"]["rank"] == 2


def test_the_bundled_model_and_the_methods_of_the_defaults_are_measured():
    composed = compose("bench", [])
    assert composed.config.model.bundled and not composed.config.model.shape
    assert list(composed.config.variants) == ["base", "lora", "dora", "moelora", "milora k=3", "milora k=1"]
    assert {v.rank for v in composed.config.variants.values() if v is not None} == {32}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decde"], "bench: unknown value 'decde'; did you mean 'decode'?"),
        (["decode", "bench.methods=[base,mlora]"], "bench.methods: unknown value 'mlora'"),
        (["decode", "bench.methods=[base,none]"], "bench.methods: unknown value 'none'"),
        (["decode", "bench.methods=[lora]"], "bench.methods: 'base' is missing"),
        (["decode", "bench.methods=[base,lora,lora]"], "bench.methods: 'lora' is listed twice"),
        (["decode", "bench.methods=[base,lora 4]"], "bench.methods: 'lora 4' is not NAME [KEY=VALUE]"),
        (
            ["decode", "bench.methods=[base,'milora kk=1']"],
            "bench.methods: 'milora kk=1': method.kk: unknown key; did you mean 'method.k'?",
        ),
        (["decode", "bench.methods=[base,'milora k=9']"], "bench.methods: 'milora k=9': method.k: 9 is out of range"),
        (["decode", "bench.methods=[base,full]", *TINY], "bench.methods: 'full' changes the weights of the model"),
        (["decode", "model.shape=7bb"], "model.shape: unknown value '7bb'; did you mean '7b'?"),
        (["decode", "model.shape=2x30x48x4"], "model.shape: a width of 30 does not divide into 4 heads"),
        (["decode", "model=bert_base"], "model.kind: bert_base is an encoder"),
        (["decode", "hardware.processes=2"], "hardware.processes: 2, but a benchmark runs in one process"),
        (["decode", "bench.beams=[0]"], "bench.beams: 0 is out of range"),
        (["decode", "bench.beams=[1,1]"], "bench.beams: [1, 1] must name each number of beams once"),
        (
            ["decode", "bench.tenants=[4]", "bench.batch_size=2"],
            "bench.tenants: 4 adapters need as many rows; set bench.batch_size=4 or more",
        ),
        (["decode", "bench.tenants=[1,1]"], "bench.tenants: [1, 1] names a number twice"),
        (["decode", "bench.tenants=[0]"], "bench.tenants: 0 is out of range"),
        (
            ["decode", "bench.tenants=[1]", "bench.methods=[base,dora]", *TINY],
            "bench.tenants: 'dora' cannot share a batch",
        ),
        (["decode", "bench.rounds=0"], "bench.rounds: 0 is out of range"),
        (["decode", "task=sst2"], "task: lrk bench decode takes random tokens; leave it out"),
        (["train", "task=sst2", "model.shape=2x32x48x4"], "task: sst2 needs a tokenizer; set model.shape=null"),
        (["decode", "bench.methods=[base,peft+trl]"], "bench.methods: unknown value 'peft+trl'; did you mean 'peft'?"),
        (
            ["train", "bench.tenants=[1]"],
            "bench.tenants: unknown key; it is a key of lrk bench decode, lrk bench prepack and lrk bench serve ",
        ),
    ],
)
def test_mistakes_are_one_line(lrk, words, message):  # noqa: F811
    ended = lrk("bench", *words)
    ended.err = ended.err.removeprefix(f"random weights of shape {SHAPE}: 2M-parameter Llama\n")
    assert one_line(ended).startswith(message)


def test_random_weights_are_for_benchmarks_only():
    with pytest.raises(UserError, match=r"model.shape: random weights are for lrk bench"):
        compose("train", ["model.shape=7b"])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_shape_is_a_model_of_these_sizes(precision, dtype):
    hardware = HardwareConfig(name="cpu", device="cpu", precision=precision, processes=1, threads=1)
    model, _ = random_model(ModelConfig(name="llama", kind="causal", bundled=True, shape=SHAPE), hardware, "cpu")
    assert model.dtype == dtype and len(model.model.layers) == 2
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 48)
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 4


def test_the_7b_shape_is_llama_2s():
    layers, width, feed_forward, _, _, vocabulary = SHAPES["7b"]
    count = 2 * vocabulary * width + width + layers * (4 * width**2 + 3 * width * feed_forward + 2 * width)
    assert count == 6_738_415_616  # as the checkpoint's card says


def test_all_methods_share_one_set_of_weights_and_the_base_is_not_wrapped():
    models = small_models()
    frozen = {name: parameter.data_ptr() for name, parameter in models["base"].model.named_parameters()}
    assert not any(hasattr(module, "parts") for module in models["base"].model.modules())
    for name, bench_model in models.items():
        if name != "base":
            shared = {p.data_ptr() for p in bench_model.model.parameters()} & set(frozen.values())
            assert shared == set(frozen.values())
            routers = bench_model.adapter.routing.routers if bench_model.adapter.routing else []
            statistics = sum(buffer.numel() for router in routers for buffer in router.buffers())
            assert bench_model.adapters_bytes == 4 * (bench_model.adapter.count() + statistics)


def test_a_benchmark_leaves_every_model_as_it_was():
    models, prompts = small_models(), small.ids(2, 4)

    def logits():
        with torch.no_grad():
            return {name: bench_model.model(input_ids=prompts).logits for name, bench_model in models.items()}

    before = logits()
    assert torch.equal(before["base"], small.model()(input_ids=prompts).logits)
    assert all(not torch.allclose(found, before["base"]) for name, found in before.items() if name != "base")
    measure(models, prompts, beams=3)
    after = logits()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_different_adapters_hold_equal_noise():
    adapter = small.adapted("lora")
    held = {name: parameter.clone() for name, parameter in adapter.trained.items()}
    changes = []
    for number in different(adapter, 3):
        assert number == len(changes)
        changes.append({name: parameter - held[name] for name, parameter in adapter.trained.items()})
    for name in held:
        sizes = [change[name].norm().item() for change in changes]
        assert max(sizes) < 2 * min(sizes) and not torch.equal(changes[0][name], changes[1][name])


def test_rounds_run_every_method_once_in_changing_order(monkeypatch):
    order, models = [], small_models(("base", "lora", "milora"))
    by_model = {id(bench_model.model): name for name, bench_model in models.items()}

    def generate(bench_model, *arguments):
        order.append(by_model[id(bench_model.model)])
        return Sample(len(order), 0.5, [0.1], 10_000_000)

    monkeypatch.setattr(decode, "generate", generate)
    found = measure(models, small.ids(2, 4), rounds=3)
    turns = [order[at : at + 3] for at in range(0, 12, 3)]
    assert all(sorted(turn) == ["base", "lora", "milora"] for turn in turns)
    followers = {pair for turn in turns for pair in pairwise(turn)}
    assert {("lora", "milora"), ("milora", "lora"), ("base", "milora"), ("milora", "base")} <= followers
    assert {name: [sample.seconds for sample in samples] for name, samples in found.items()} == {
        "base": [6, 8, 10],
        "lora": [4, 7, 11],
        "milora": [5, 9, 12],
    }, "the first round is not counted"


def test_what_other_settings_hold_is_no_memory_of_a_method():
    bank = nn.Linear(1, 1)
    cells = [
        {"base": BenchModel(nn.Linear(1, 1)), "lora": BenchModel(nn.Linear(1, 1), adapters_bytes=10)},
        {"base": BenchModel(nn.Linear(1, 1)), "lora": BenchModel(bank, adapters_bytes=100)},
        {"base": BenchModel(nn.Linear(1, 1)), "lora": BenchModel(bank, adapters_bytes=100)},
    ]
    present = [bench_model for cell in cells for bench_model in cell.values()]
    bar = SimpleNamespace(advance=lambda: None)
    for cell, own in zip(cells, (10, 100, 100)):
        found = in_turns(cell, present, 1, lambda bench_model: SimpleNamespace(memory=1110), bar)
        assert (found["base"][0].memory, found["lora"][0].memory) == (1000, 1000 + own)


def test_ratios_are_taken_within_rounds():
    slow = [Sample(seconds, 0, [], 0) for seconds in (2.0, 40.0, 6.0, 2.2)]
    base = [Sample(seconds, 0, [], 0) for seconds in (1.0, 20.0, 3.0, 1.1)]
    assert speed_ratio(slow, base) == {"ratio": 0.5, "ratio_quartiles": [0.5, 0.5]}


def test_one_step_has_quantiles_too():
    run = measured("bench.rounds=1", "bench.new_tokens=2", "bench.beams=[1]", "bench.methods=[base]")
    (row,) = run.read_json("bench.json")["rows"]
    assert row["ms_per_token_p95"] == pytest.approx(row["ms_per_token"])


def test_a_benchmark_is_resumed_from_its_own_configuration(monkeypatch):
    generate = decode.generate
    monkeypatch.setattr(decode, "generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Exception, match=r"lrk bench --resume"):
        measured("bench.rounds=1", "bench.beams=[1]", "bench.methods=[base,'milora k=1']")
    run = Run.open(Path("outputs/latest").resolve())
    assert run.info["status"] == "interrupted"
    monkeypatch.setattr(decode, "generate", generate)
    single_run.resume("bench", str(run.path))
    assert [row["method"] for row in Run.open(run.path).read_json("bench.json")["rows"]] == ["base", "milora k=1"]


def test_every_method_that_adapts_beside_the_weights_can_be_measured():
    for name in methods.names():
        if methods.can(name, methods.protocol.Adapts) and name != "full":
            small_models(("base", name))


def test_many_adapters_in_a_batch_are_measured_beside_each_method_alone(pictures):
    methods = "bench.methods=[base,lora,'milora k=3',peft]"
    run = measured("bench.rounds=2", "bench.batch_size=3", "bench.beams=[1]", methods, "bench.tenants=[1,3]")
    record = run.read_json("bench.json")
    names = ["base", "lora", "milora k=3", "peft"]
    assert [(row["method"], row["tenants"]) for row in record["rows"]] == [(m, t) for t in (None, 1, 3) for m in names]
    rows = {(row["method"], row["tenants"]): row for row in record["rows"]}
    one = rows["lora", None]["parameters"]
    assert rows["peft", None]["parameters"] == rows["peft", 3]["parameters"] == rows["lora", 3]["parameters"] == one
    assert rows["lora", None]["adapters_bytes"] * 3 == rows["lora", 3]["adapters_bytes"] == 12 * one
    assert rows["lora", 3]["adapter_bytes"] == rows["peft", 3]["adapter_bytes"] == 4 * one
    assert rows["milora k=3", 3]["activated_parameters"] is None, "a bank does not count what prompts chose"
    for row in record["rows"]:
        assert row["ms_per_token_p95"] >= row["ms_per_token"] > 0 and row["step_ratio"] > 0
    assert run.metrics["bench/peft/beams_1/tenants_3/step_ratio"] == rows["peft", 3]["step_ratio"]
    figure = next(figure for figure in run.read_json("figures.json") if figure["file"] == "tenants.png")
    assert (figure["rows"], figure["columns"]) == (names, [1, 3])
    assert figure["values"][1] == [rows["lora", count]["ms_per_token"] for count in (1, 3)]
    assert (run.path / "plots" / "tenants.png").stat().st_size > 1000


def test_time_is_drawn_against_the_modules_that_are_kept():
    for name, roles in (("one", "[V]"), ("two", "[V, D]")):
        Path(f"{name}.yaml").write_text(f"layers: {{all: {roles}}}")
    entries = "bench.methods=[base,'fanlora setting=one.yaml','fanlora setting=two.yaml rank=2',milora]"
    run = measured("bench.rounds=1", "bench.beams=[1]", entries)
    figure = next(figure for figure in run.read_json("figures.json") if figure["file"] == "modules.png")
    assert (figure["rows"], figure["columns"]) == (["fanlora"], [0, 1, 2])
    assert figure["values"] == [[row["ms_per_token"] for row in run.read_json("bench.json")["rows"][:3]]]
    entries = entries.replace(".yaml", ".yaml match_parameters=false").replace(",milora", "")
    run = measured("bench.rounds=1", "bench.beams=[1]", entries, "bench.tenants=[2]", "bench.batch_size=2")
    figure = next(figure for figure in run.read_json("figures.json") if figure["file"] == "modules.png")
    rows = run.read_json("bench.json")["rows"]
    assert figure["rows"] == ["fanlora", "fanlora, 2 in a batch"]
    assert figure["values"] == [[row["ms_per_token"] for row in rows[at : at + 3]] for at in (0, 3)]


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_rows_take_turns_between_the_adapters(name):
    models = tenant_models(small.model(), {"base": None, name: small.method("lora").config}, [1, 2], rows=3, seed=1)
    ids = small.ids(1).repeat(3, 1)

    def chosen(count):
        bench_model = models[count][name]
        with bench_model.context():
            made = bench_model.model.generate(
                input_ids=ids,
                max_new_tokens=2,
                output_scores=True,
                return_dict_in_generate=True,
                **bench_model.arguments,
            )
        return made.scores[0]

    one, two = chosen(1), chosen(2)
    torch.testing.assert_close(one[0], one[2])
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(two[0], two[2])
    assert not torch.allclose(two[0], two[1])
    assert not torch.allclose(two[0], models[2]["base"].model(input_ids=ids).logits[0, -1])


def test_the_option_sets_what_it_needs_unless_it_is_given(lrk):  # noqa: F811
    shown = lrk("bench", "decode", "--tenants", "1,8,64", "--dry-run").out
    assert shown == lrk("bench", "tenants", "bench.tenants=[1,8,64]", "--dry-run").out
    for line in ("batch_size: 64", "beams:\n  - 1\n  tenants:\n  - 1\n  - 8\n  - 64\n", "  peft:", "  - milora k=3"):
        assert line in shown
    shown = lrk(
        "bench", "decode", "--tenants", "8", "bench.batch_size=16", "bench.methods=[base,lora]", "--dry-run"
    ).out
    assert "batch_size: 16" in shown and "peft" not in shown


def test_training_steps_are_measured_and_drawn(lrk, pictures):  # noqa: F811
    entries = ["base", "lora", "lora dropout=0.5", "moelora rank=8", "milora bilevel_every=2", "peft dropout=0.5"]
    ended = lrk("bench", "train", *TRAIN, "bench.rounds=2", f"bench.methods=[{','.join(map(repr, entries))}]")
    assert ended.code == 0, ended
    assert "forward and backward, 4 × 128" not in ended.out and "4 × 5 tokens" in ended.out
    run = Run.open("outputs/latest")
    rows = {row["method"]: row for row in run.read_json("bench.json")["rows"]}
    assert list(rows) == entries
    for row in rows.values():
        assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["step_ratio_quartiles"][0] <= row["step_ratio"] <= row["step_ratio_quartiles"][1]
        assert row["peak_memory_bytes"] > row["step_memory_bytes"]
    assert (rows["base"]["step_ratio"], rows["base"]["cpu_ratio"], rows["base"]["parameters"]) == (1, 1, 0)
    for name, row in rows.items():
        assert (min(row["seconds_on_dev"]) > 0) == name.startswith("milora"), name
        assert (row["step_ratio_with_dev"] > row["step_ratio"]) == name.startswith("milora"), name
    saved = {name: row["saved_bytes"] for name, row in rows.items()}
    assert saved["lora"] < saved["lora dropout=0.5"] < saved["peft dropout=0.5"]
    assert run.metrics["bench/lora/saved_bytes"] == saved["lora"]
    assert (run.path / "plots" / "train.png").stat().st_size > 1000


def test_a_training_step_reaches_every_trained_tensor_and_leaves_the_model_as_it_was():
    models = small_models(("base", "lora", "milora", "dora", "moelora", "peft"))
    ids = small.ids(2, 6)
    marks = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": marks}
    batch["labels"] = ids.masked_fill(marks.bool(), -100)
    for name, bench_model in models.items():
        before = {key: parameter.clone() for key, parameter in bench_model.model.named_parameters()}
        bench_model.model.train()
        train_step.loss(bench_model, batch).backward()
        if bench_model.adapter is not None:
            assert all(parameter.grad is not None for parameter in bench_model.adapter.trained.values()), name
        train_step.timed(bench_model, batch)
        assert all(parameter.grad is None for parameter in bench_model.model.parameters())
        assert all(torch.equal(parameter, before[key]) for key, parameter in bench_model.model.named_parameters())


def test_the_losses_of_a_step_are_one():
    """Ours at answers only, PEFT's over all logits: the adapters differ, so a module that adds nothing is compared."""
    models = small_models(("base", "peft"))
    ids = small.ids(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :4] = -100
    with models["peft"].model.disable_adapter():
        torch.testing.assert_close(train_step.loss(models["base"], batch), train_step.loss(models["peft"], batch))


def test_steps_on_a_tasks_examples(lrk):  # noqa: F811
    words = ["task=tiny_sentiment", "task.limit=200", "hardware.threads=1", "bench.rank=4", "bench.rounds=1"]
    words += ["bench.methods=[base,'milora k=3',peft]", "bench.batch_size=3", "bench.prompt_length=20"]
    ended = lrk("bench", "train", *words)
    assert ended.code == 0, ended
    run = Run.open("outputs/latest")
    record = run.read_json("bench.json")
    assert re.fullmatch(r"3 × \d+ tokens \(tiny_sentiment, 6 answered\)", record["data"])
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["peft"]["peft_ratio"] == rows["peft"]["peft_memory_ratio"] == 1
    for row in rows.values():
        ratios = [own / other for own, other in zip(row["seconds"], rows["peft"]["seconds"], strict=True)]
        assert row["peft_ratio"] == pytest.approx(statistics.median(ratios))
    assert "× peft" in ended.out


def test_the_batch_is_the_one_of_the_length_that_is_asked_for():
    composed = compose("bench", ["bench=train", "task=tiny_sentiment", "task.limit=300", "bench.batch_size=4"])
    loaded = load(composed.config.model, composed.config.hardware, None)
    base = BaseModel(loaded.model, loaded.tokenizer, torch.device("cpu"), {})
    lengths = []
    for asked in (1, 1000):
        composed.config.bench.prompt_length = asked
        batch = batch_of(composed.config, base)
        assert batch["input_ids"].shape[0] == 4
        lengths.append(batch["input_ids"].shape[1])
    assert lengths[0] < lengths[1]
    composed.config.bench.batch_size = 301
    with pytest.raises(UserError, match=r"bench\.batch_size: 301, but task=tiny_sentiment has 300 examples"):
        batch_of(composed.config, base)


def test_a_loss_of_another_package_is_left_out_where_it_is_not_to_be_had(lrk, monkeypatch):  # noqa: F811
    monkeypatch.setitem(PEFTS, "peft+trl", "no_such_package")
    ended = lrk("bench", "train", *TRAIN, "bench.rounds=1", "bench.methods=[base,peft+trl]")
    assert ended.code == 0, ended
    assert "'peft+trl' is skipped: the package no_such_package is not installed" in ended.err
    assert [row["method"] for row in Run.open("outputs/latest").read_json("bench.json")["rows"]] == ["base"]


SMALL = {
    "loop": [
        "bench.steps=2",
        "bench.batch_size=2",
        "bench.prompt_length=5",
        "bench.methods=[lora,'lelora phase=2',alora]",
    ],
    "score": ["bench.rank=2", "bench.batch_size=3", "bench.prompt_length=5", "bench.sample=4"],
    "load": ["bench.methods=[lora,'lora rank=2',peft]", "bench.rank=4"],
    "prepack": ["bench.tenants=2", "bench.prompt_length=5", "bench.new_tokens=3"],
    "icl": ["bench.queries=4", "bench.shots=2", "task.limit=32"],
}
ROWS = {
    "loop": ["lora", "lelora phase=2", "alora"],
    "score": ["lora: one at a time", "lora: together", "lora: taylor", "lora: magnitude"],
    "load": [
        *(
            f"{name}: {what}"
            for name in ("lora", "lora rank=2")
            for what in ("load", "load and check", "read the file")
        ),
        "peft: load",
    ],
    "prepack": ["base", "lora", "base, packed", "lora, packed"],
    "icl": ["base", "whole prompts", "idaicl"],
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_kind_that_measures_time(kind, lrk, pictures):  # noqa: F811
    shape = [] if kind == "icl" else [f"model.shape={SHAPE}"]
    ended = lrk("bench", kind, "hardware.threads=1", "bench.rounds=2", *shape, *SMALL[kind])
    assert ended.code == 0, ended
    run = Run.open("outputs/latest")
    record = run.read_json("bench.json")
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ROWS[kind] and record["bench"]["measure"] == kind
    for row in rows.values():
        reference = rows[row["reference"]]["seconds"]
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        ratios = [own / other for own, other in zip(row["seconds"], reference, strict=True)]
        assert row["time_ratio"] == pytest.approx(statistics.median(ratios))
        assert run.metrics[f"bench/{row['method']}/time_ratio"] == row["time_ratio"]
    assert all(name in ended.out for name in rows) and all(note[:30] in ended.out for note in record["notes"])
    assert (run.path / "plots" / f"{kind}.png").stat().st_size > 1000
    if kind == "score":
        assert record["largest_difference"]["lora"] < 1e-4
    if kind == "prepack":
        assert record["logits_differ"] < 1e-4
    if kind == "loop":
        assert rows["lora"]["between_share"] == 0 < rows["lelora phase=2"]["between_share"] < 1


@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the extra serve is not installed")
def test_a_server_under_load(lrk):  # noqa: F811
    words = ["bench.rounds=1", "bench.requests=3", "bench.new_tokens=4", "bench.tenants=[2]", "bench.rates=[50,inf]"]
    ended = lrk("bench", "serve", "hardware.threads=1", "bench.methods=[base,'milora k=3',vllm+lora]", *words)
    assert ended.code == 0 and "'vllm+lora' is skipped: bench.vllm does not name a Python" in ended.err, ended
    run = Run.open("outputs/latest")
    rows = run.read_json("bench.json")["rows"]
    assert [(row["method"], row["rate"]) for row in rows] == [
        (name, rate) for rate in (50, None) for name in ("base", "milora k=3")
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * row["requests_per_second"]), "all answers have 4 tokens"
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p99"] and row["ms_per_token_p50"] > 0
    assert run.metrics["bench/milora k=3/tenants_2/rate_all/ratio"] == rows[3]["ratio"] != 1
    assert "milora k=3" in ended.out and (run.path / "plots" / "serve_2.png").is_file()
    assert one_line_of(lrk("bench", "serve", f"model.shape={SHAPE}")).endswith("set model.shape=null and a model")


def one_line_of(ended):
    """The message of a mistake that is noticed once the model is there."""
    assert ended.code == 2, ended
    return ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "bench.rates=[]"], "bench.rates: [] must name each number once"),
        (["serve", "bench.rates=[0]"], "bench.rates: 0.0 is out of range"),
        (["serve", "bench.tenants=[1,1]"], "bench.tenants: [1, 1] must name each number once"),
        (["scre"], "bench: unknown value 'scre'; did you mean 'score'? (allowed: decode, icl, load, loop, prepack"),
        (["load", "bench.beams=[1]"], "bench.beams: unknown key; it is a key of lrk bench decode (bench has: measure"),
        (["decode", "bench.measure=train"], "bench.measure: 'train' has other keys; choose it with: lrk bench train"),
        (["score", "bench.methods=[base,lora]"], "bench.methods: unknown value 'base'"),
        (["score", "bench.methods=[milora]", *TRAIN], "bench.methods: 'milora' has no ranks that can be scored"),
        (["icl", "bench.methods=[base,lora]"], "bench.methods: unknown value 'lora'"),
        (["icl", "bench.methods=[base]"], "bench.methods: name a method"),
        (["load", "bench.methods=[milora]", *TRAIN[:3]], "bench.methods: 'milora' is not saved as a LoRA"),
        (["loop", "bench.total_steps=5"], "bench.total_steps: 5 is below the 50 steps of all rounds"),
        (["prepack", "hardware.prepack=true"], "hardware: lrk bench prepack packs weights itself, on a CPU"),
    ],
)
def test_mistakes_with_a_kind_are_one_line(lrk, words, message):  # noqa: F811
    ended = lrk("bench", *words)
    ended.err = ended.err.removeprefix(f"random weights of shape {SHAPE}: 2M-parameter Llama\n")
    assert one_line(ended).startswith(message)


def test_a_folder_of_the_user_adds_a_kind(lrk):  # noqa: F811
    Path("mine/bench").mkdir(parents=True)
    Path("mine/bench/quick.yaml").write_text("defaults: [load]\nrounds: 1\nmethods: [lora]\n")
    shown = lrk("bench", "quick", "--config-dir", "mine", "--dry-run").out
    assert "measure: load" in shown and "rounds: 1" in shown
    text = (ROOT / "conf/bench/icl.yaml").read_text()
    Path("mine/bench/untold.yaml").write_text(text.replace("  - override /task@_global_.task: tiny_sentiment\n", ""))
    message = one_line(lrk("bench", "untold", "--config-dir", "mine"))
    assert message == "task: missing; lrk bench icl asks its examples (task=NAME)"
