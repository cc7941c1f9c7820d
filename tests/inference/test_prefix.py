"""Prompts that share a prefix score as they do whole, in models whose layers see a window of the last tokens too."""

import pytest
import small
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lowrank_cli.inference.choice_scores import Prefix, can_share, candidate_scores
from lowrank_cli.tasks.encode import collate_prompts

SHARED = [3, 44, 19, 27, 6, 51, 33, 12, 8, 60, 25, 41, 7]
RESTS = [[21, 4], [5, 9, 12, 40, 7, 13, 55, 18, 30], [8, 8, 30, 17, 4], [50], [*range(20, 40)]]
OPTIONS = [[[10], [11, 12, 13]], [[20, 21], [20, 22], [23]], [[30, 31, 32, 33], [34]], [[3], [4]], [[5, 6], [7]]]


def windowed(family: str, window: int) -> PreTrainedModel:
    """A random model whose layers, of Gemma 3 every second one, see the last ``window`` tokens."""
    torch.manual_seed(7)
    if family == "mistral":
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**small.GATED, sliding_window=window))
    else:
        kinds = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**small.GATED, head_dim=8, sliding_window=window, layer_types=kinds))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # or what a token sees would matter little
    return model.eval()


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """Σ log p of the answer's tokens by one full pass without padding or cache."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("window", [3, 8, 20, 100])
def test_a_shared_prefix_scores_as_whole_prompts(family, window):
    """Rows with and without padding, batches of one and of several, prefixes longer and shorter than the padding."""
    model = windowed(family, window)
    for shared in (SHARED, SHARED[:3], []):
        prefix = Prefix(model, shared) if shared else None
        prompts = [shared + rest for rest in RESTS]
        expected = [[alone(model, *pair) for pair in ((p, a) for a in row)] for p, row in zip(prompts, OPTIONS)]
        for size in (1, 2, 5):
            for at in range(0, len(prompts), size):
                part = slice(at, at + size)
                found = candidate_scores(
                    model, **collate_prompts(prompts[part], 0), options=OPTIONS[part], prefix=prefix
                )
                for ours, theirs in zip(found, expected[part], strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_window_matters_here():
    prompt = SHARED + RESTS[1]
    scores = {alone(windowed("mistral", window), prompt, [20, 21]) for window in (3, 8, 20, 100)}
    assert len(scores) == 4


def test_only_keys_and_values_can_be_shared():
    model = small.model("gpt2")
    for config in (model.config, windowed("gemma3", 8).config):
        model.config = config
        assert can_share(model)
    for config in (MambaConfig(), Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2)):
        model.config = config
        assert not can_share(model)
