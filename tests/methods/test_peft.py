"""PEFT's tuners as methods: the function at the start, what trains, saving and loading, switching off, mistakes."""

from __future__ import annotations

import json

import pytest
import small
import torch
from command import FEW_STEPS

from lowrank_cli import methods
from lowrank_cli.adapter.files import save_load
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Start
from lowrank_cli.runs import Run

pytest.importorskip("peft")
#: Tuners with options that fit a model of width 32.
TUNERS = {
    "boft": {},
    "delora": {},
    "gralora": {},
    "hira": {},
    "hra": {},
    "ia3": {},
    "loha": {},
    "lokr": {},
    "lora": {"r": 4, "use_rslora": True},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 8},
    "randlora": {},
    "vera": {"r": 16},
}


def adapted(kind: str, seed: int = 3, moved: bool = False, family: str = "llama", **options):
    torch.manual_seed(seed)
    values = {"name": "peft", "type": kind, "target_modules": ["all"], "options": options or TUNERS.get(kind, {})}
    adapter = methods.configured(values, "test").adapt(small.model(family))
    adapter.model.eval()
    if moved:
        with torch.no_grad():
            for parameter in adapter.trained.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return adapter


def logits(adapter) -> torch.Tensor:
    return adapter.model(input_ids=small.ids()).logits


@pytest.mark.parametrize("kind", TUNERS)
def test_a_tuner_starts_as_the_model_trains_saves_and_is_switched_off(kind, tmp_path):
    bare = small.model("llama")(input_ids=small.ids()).logits
    torch.testing.assert_close(logits(adapted(kind)), bare, atol=1e-6, rtol=0)
    adapter = adapted(kind, moved=True)
    adapter.require_declared()
    assert adapter.count() == sum(p.numel() for p in adapter.model.parameters() if p.requires_grad) > 0
    assert (logits(adapter) - bare).abs().max() > 1e-3
    save_load.save(adapter, tmp_path, {})
    fresh = adapted(kind, seed=4)
    save_load.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(adapter))
    moved = logits(adapter)
    with adapter.disabled():
        torch.testing.assert_close(logits(adapter), bare, atol=1e-6, rtol=0)
    assert torch.equal(logits(adapter), moved)


def test_roles_choose_the_linears():
    values = {"name": "peft", "type": "lora", "target_modules": ["Q", "D"], "options": {}}
    adapter = methods.configured(values, "test").adapt(small.model("llama"))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.trained} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vra", {}, "method.type: unknown value 'vra'; did you mean 'vera'?"),
        ("vera", {"rr": 3}, "method.options of method.type=vera: unknown value 'rr'; did you mean 'r'?"),
        ("lora", {"target_modules": ["x"]}, "unknown value 'target_modules'"),
        ("lora", {"init_lora_weights": "lora_ga"}, "init_lora_weights: 'lora_ga' needs a preparation"),
        ("lora", {"init_lora_weights": "eva", "eva_config": {"rho": 2}}, "EVA has no settings here"),
        ("miss", {"r": 64}, "method.type: 'miss' cannot adapt this model so: `r` (64) must be less"),
    ],
)
def test_mistakes_are_one_line(kind, options, message):
    with pytest.raises(UserError) as error:
        adapted(kind, **options)
    assert message in str(error.value)


def test_options_are_set_one_by_one_and_only_where_there_are_any(lrk):
    ended = lrk("train", "method=peft", "method.type=vera", "method.options.r=16", "--dry-run")
    assert ended.code == 0 and "    r: 16\n" in ended.out
    ended = lrk("train", "method=lora", "method.options.r=16", "--dry-run")
    assert ended.code == 2 and "method.options.r: unknown key" in ended.err


@pytest.mark.parametrize("init", ["olora", "eva"])
def test_initial_values_of_lora_train_and_come_back(init, lrk):
    """OLoRA also rewrites the frozen weights, which loading does again."""
    options = f"method.options={{r:4,init_lora_weights:{init}}}"
    assert lrk("train", "method=peft", "method.type=lora", options, *FEW_STEPS, "test=false").code == 0
    trained = Run.open("outputs/latest")
    ended = lrk("evaluate", "run=outputs/latest", "evaluate.split=dev")
    assert ended.code == 0, ended.err
    answers = [
        [json.loads(row) for row in (run.path / "predictions.jsonl").read_text().splitlines()]
        for run in (trained, Run.open("outputs/latest"))
    ]
    assert answers[0] == answers[1]


def test_eva_starts_from_the_principal_components_of_the_inputs():
    values = {"name": "peft", "type": "lora", "target_modules": ["Q"], "options": {"r": 4, "init_lora_weights": "eva"}}
    method = methods.configured(values, "test")
    adapter = method.adapt(small.model())
    mask = torch.ones_like(small.ids(8))
    mask[:, -2:] = 0
    kept: list[torch.Tensor] = []
    layer = adapter.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda module, args: kept.append(args[0][mask.bool()]))

    def read(count: int) -> None:
        adapter.model(input_ids=small.ids(8), attention_mask=mask)

    method.prepare(Start(adapter, read, lambda tensor: tensor, lambda row: None, lambda line: None))
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)
    centred = kept[0] - kept[0].mean(dim=0)
    best = torch.linalg.svd(centred, full_matrices=False).S[:4].square().sum()
    assert (centred @ a.T).square().sum() > 0.99 * best
