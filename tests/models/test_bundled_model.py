"""The checkpoint inside the package: its size and shape, its tokenizer, and that it reads demonstrations."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from lowrank_cli.tasks.tiny import NAMES, generate
from lowrank_cli.tasks.tiny.lexicon import EPISODE_LABELS, HELD_LABELS, SPARE_LABELS, vocabulary

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "lowrank_cli" / "assets" / "tiny_llama"
sys.path.insert(0, str(ROOT / "scripts" / "bundled_model"))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_files_are_few_and_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sizes["model.safetensors"] <= 12_000_000
    assert sum(sizes.values()) <= 12_500_000


def test_architecture(model):
    import torch

    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert config.max_position_embeddings >= 1024
    roles = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert roles == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_special_tokens(model, tokenizer):
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3 and None not in special
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == special
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_tokenizer_gives_every_text_back(tokenizer):
    texts = ["Zobra owns 53 red hats.\n\nQuestion: why?  Two spaces\tand a tab", "é ☃ 漢字 {x} <tag> A.B", " ", "\n"]
    for name in NAMES:
        rows = generate(name, sizes={"train": 20, "dev": 0, "test": 0})["train"]
        texts += [str(value) for row in rows for value in row.values()]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_label_words_are_one_token_that_continues_a_prompt(tokenizer):
    for word in (*HELD_LABELS, *SPARE_LABELS, *EPISODE_LABELS):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
    prompt = "Review: fine.\nSentiment:"
    assert tokenizer.encode(f"{prompt} positive")[:-1] == tokenizer.encode(prompt)
    words = [word for word in vocabulary() if word[0].islower()]
    assert all(len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in words)


def test_prompts_are_short(tokenizer):
    from pretrain_tiny import PROBES

    from lowrank_cli.tasks.tiny.families import FAMILIES

    for name in PROBES:
        rows = generate(f"tiny_{name}", sizes={"train": 100, "dev": 0, "test": 0})["train"]
        lengths = [len(tokenizer.encode(FAMILIES[name].templates[0].format(**row))) for row in rows]
        assert max(lengths) <= 64


def test_continues_a_repeated_list(model, tokenizer):
    """Words in any order, said twice: the third time is predicted."""
    import torch

    rng = Random(0)
    hits = total = 0
    for _ in range(20):
        words = "".join(f" {word}" for word in rng.sample(vocabulary(), 12))
        once = len(tokenizer.encode(words, add_special_tokens=False))
        ids = torch.tensor([tokenizer.encode(words * 3)])
        with torch.no_grad():
            predicted = model(input_ids=ids).logits.argmax(-1)[0, -once - 1 : -1]
        hits += (predicted == ids[0, -once:]).sum().item()
        total += once
    assert hits / total > 0.9


def test_probe_matches_its_own_definition(model, tokenizer):
    """The pretraining's probe, which judges intermediate checkpoints, on the finished one."""
    from pretrain_tiny import probe

    found = probe(model, tokenizer, count=100, shots=(0, 8))
    assert abs(found["sentiment/0"] - 0.5) <= 0.15
    assert found["sentiment/8"] >= 0.65
