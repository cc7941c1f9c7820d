"""Scoring of candidate answers: the shared prompt pass gives what a full pass over each candidate gives."""

import pytest
import small
import torch

from lowrank_cli.inference.choice_scores import candidate_scores, with_demonstrations, with_eos_if_ambiguous
from lowrank_cli.tasks.encode import collate_prompts
from lowrank_cli.tasks.task import Example

PROMPTS = [[5, 9, 12, 40, 7], [8, 8, 30], [21, 4, 33, 6, 17, 50, 11]]
#: Several tokens, shared first tokens, fewer candidates in one row.
OPTIONS = [
    [[10], [11, 12, 13]],
    [[20, 21], [20, 22], [23]],
    [[30, 31, 32, 33], [34]],
]


def alone(adapter, prompt: list[int], answer: list[int]) -> float:
    """Σ log p of the answer's tokens by one full pass without padding or cache."""
    ids = torch.tensor([prompt + answer])
    mask = torch.tensor([[1] * len(prompt) + [0] * len(answer)])
    extra = {"prompt_mask": mask} if adapter.routing else {}
    with torch.no_grad():
        logits = adapter.model(input_ids=ids, **extra).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("name", ["lora", "milora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma"])
def test_candidates_score_as_they_would_alone(name, family):
    adapter = small.adapted(name, family)
    batch = collate_prompts(PROMPTS, 0)
    found = candidate_scores(adapter.model, batch["input_ids"], batch["attention_mask"], OPTIONS)
    expected = [
        [alone(adapter, prompt, answer) for answer in answers] for prompt, answers in zip(PROMPTS, OPTIONS, strict=True)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("options", [OPTIONS, [[[3], [4]]] * 3], ids=["long", "single tokens"])
def test_routers_run_once_a_prompt_however_many_candidates(options):
    adapter = small.adapted("milora")
    batch = collate_prompts(PROMPTS, 0)
    candidate_scores(adapter.model, batch["input_ids"], batch["attention_mask"], options)
    assert adapter.routing.routed == len(PROMPTS) * 2


def test_demonstrations_stand_in_front_with_their_answers():
    def example(text, answer):
        return Example(text, answer, (), None, (text,), (answer.strip(),))

    shown = [example("a =", " 1"), example("b =", " 2")]
    assert with_demonstrations([example("c =", " 3")], shown) == ["a = 1\n\nb = 2\n\nc ="]
    assert with_demonstrations([example("c =", " 3")], []) == ["c ="]


def test_an_answer_that_begins_another_one_has_to_end():
    assert with_eos_if_ambiguous([[5], [5, 6]], 2) == [[5, 2], [5, 6, 2]]
    assert with_eos_if_ambiguous([[5], [6, 5]], 2) == [[5], [6, 5]]
