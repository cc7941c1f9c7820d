"""The usual learning rate: from the method and the width of the model, wherever that is written down."""

from __future__ import annotations

import json
import struct

import pytest

from lowrank_cli.config.composition import compose, rebuild
from lowrank_cli.config.model_width import model_width
from lowrank_cli.schema import ModelConfig
from lowrank_cli.schema.learning_rate import UsualRate


def rate(*overrides: str) -> float:
    return compose("train", overrides).config.train.learning_rate


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=lora"], 2e-3),
        (["method=full"], 2e-3),
        (["method=lora", "model=llama2_7b"], 2.9e-4),  # 5e-4 · (2000 / 4096)^0.781
        (["method=full", "model=llama2_7b"], 2.9e-5),
        (["method=milora", "model=smollm2_135m"], 1.3e-3),
        (["method=peft", "method.type=ia3", "model=llama2_7b"], 2.9e-3),
        (["method=lora", "model=roberta_base", "task=sst2"], 5e-4),
        (["method=full", "model=roberta_large", "task=sst2"], 4e-5),
        (["method=lora", "model=llama2_7b", "train.learning_rate=1e-4"], 1e-4),
        (["method=lora", "model=llama2_7b", "model.id=ours/other"], 5e-4),  # its width is not known
    ],
)
def test_the_rate_follows_from_the_method_and_the_width(overrides, expected):
    assert rate(*overrides) == expected


def test_a_saved_configuration_holds_the_number():
    composed = compose("train", ["method=lora", "model=llama2_7b"])
    assert composed.resolved["train"]["learning_rate"] == 2.9e-4
    again = rebuild("train", composed.resolved, composed.choices, [])
    assert again.config == composed.config


def model(**values) -> ModelConfig:
    plain = {"name": "ours", "kind": "causal", "id": None, "path": None, "bundled": False, "revision": None}
    return ModelConfig(**{**plain, "trust_remote_code": False, **values})


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 576}, 576),
        ({"n_embd": 768}, 768),
        ({"text_config": {"hidden_size": 640}, "hidden_size": None}, 640),
        ({"hidden_size": "wide"}, None),
        ([], None),
    ],
)
def test_the_width_of_a_folder(tmp_path, config, width):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_width(model(path=str(tmp_path))) == width


def gguf_header(*pairs: tuple[str, int, bytes]) -> bytes:
    text = b"".join(
        struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value for key, kind, value in pairs
    )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + text


def test_the_width_of_a_gguf_file(tmp_path):
    name = struct.pack("<Q", 5) + b"llama"
    width = ("llama.embedding_length", 4, struct.pack("<I", 576))
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_header(("general.architecture", 8, name), ("llama.rope", 6, b"\0\0\0\0"), width))
    assert model_width(model(gguf=str(file))) == model_width(model(gguf=str(tmp_path))) == 576
    file.write_bytes(file.read_bytes()[:60])
    assert model_width(model(gguf=str(file))) is None


def test_the_rate_of_a_model_that_was_never_downloaded_says_so():
    composed = compose("train", ["method=lora", "model=ours/unknown"])
    assert composed.config.train.learning_rate == 5e-4


def test_a_rate_in_words():
    usual = UsualRate(3e-4, "for a decoder of width 4096")
    assert usual.described(3e-4) == "0.0003, for a decoder of width 4096"
    assert usual.described(1e-4) == "0.0001 (usual: 0.0003, for a decoder of width 4096)"
    assert usual.described(3e-3) == "0.003 is 10 times the usual 0.0003 (for a decoder of width 4096)"
    assert usual.described(3e-5) == "3e-05 is 1/10 of the usual 0.0003 (for a decoder of width 4096)"
    assert usual.described(0) == "0 is far below the usual 0.0003 (for a decoder of width 4096)"


def test_plans_say_where_the_rate_is_from(lrk):
    plan = lrk("check", "method=lora", "model=llama2_7b", "task=sst2", "train.learning_rate=2e-3").out
    assert "0.002 is 7 times the usual 0.00029 (for a decoder of width 4096)" in plan
    shown = lrk("train", "--dry-run", "method=lora", "model=llama2_7b").out
    assert "\ntrain:\n  learning_rate: 0.00029  # for a decoder of width 4096\n" in shown


def test_a_plan_estimates_steps_tokens_and_time(lrk):
    """The bundled tokenizer has about 32 tokens an example of this task; 2 epochs of 2,048 examples are 256 steps."""
    plan = lrk("check", "method=lora", "train.epochs=2", "train.max_steps=1000").out
    row = next(line for line in plan.splitlines() if line.startswith("steps"))
    assert row.split()[1:9] == ["256,", "2", "passes", "over", "2,048", "examples,", "about", row.split()[8]]
    assert 4096 * 25 < int(row.split()[8].replace(",", "")) < 4096 * 40
    assert "(an estimate, at " in plan
    limited = lrk("check", "method=lora", "task.limit=64", "train.max_steps=5").out
    assert "5, 1.25 passes over 64 examples" in limited


def test_a_plan_without_the_data_has_no_estimate(lrk):
    plan = lrk("check", "method=lora", "task=sst2").out
    assert "passes over" not in plan and "an estimate" not in plan
