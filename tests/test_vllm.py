"""Exports in a real vLLM, where ``LRK_VLLM`` names a Python that has it: the bundled model, one engine, a minute."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import small
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.adapter.files.export import as_lora, save_lora

SCRIPT = Path(__file__).parents[1] / "scripts" / "research" / "prove_vllm.py"
MODEL = Path(__file__).parents[1] / "lowrank_cli" / "assets" / "tiny_llama"
PYTHON = os.environ.get("LRK_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(PYTHON is None, reason="LRK_VLLM names no Python with vLLM"),
]


def exported(name: str, folder: Path, ranks: tuple[int, ...] = (), **settings) -> Path:
    """The export of a method's adapter with random updates; its modules have ``ranks`` in turn, of 0 none is left."""
    torch.manual_seed(3)
    adapter = small.method(name, **settings).adapt(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
    with torch.no_grad():
        for index, (key, module) in enumerate(list(adapter.modules.items())):
            module.lora_b.normal_(std=0.1)
            if ranks and (rank := ranks[index % len(ranks)]):
                module.resize(torch.arange(rank), 0)
            elif ranks:
                adapter.detach(adapter.sites[key])
    folder.mkdir()
    save_lora(adapter, as_lora(adapter, None)[0], folder)
    return folder


def test_every_export_answers_as_in_peft(tmp_path):
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("prove_vllm", SCRIPT)
    prove_vllm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prove_vllm)
    adapters = {
        "lora": exported("lora", tmp_path / "lora"),
        "mixed": exported("alora", tmp_path / "mixed", (4, 1, 3)),
        "pruned": exported("lora", tmp_path / "pruned", (0, 2, 0, 4, 1)),
        "fanlora": exported("fanlora", tmp_path / "fanlora", match_parameters=False),
        "lelora": exported("lelora", tmp_path / "lelora"),
        "output head": exported("lora", tmp_path / "head", target_modules=["Q", "lm_head"]),
    }
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [tokenizer(text).input_ids for text in prove_vllm.PROMPTS[:2]]
    rows = prove_vllm.compared(PYTHON, MODEL, adapters, texts)
    assert len(rows["mixed"]["ranks"]) == 3 and set(rows) == {"bare", *adapters}
    for name, row in rows.items():
        assert row["difference"] < 1e-4, name
        assert row["change"] > 0.1 or name == "bare", name
