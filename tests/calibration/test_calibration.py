"""Calibration: the closed form against sampling, low rank against explicit, a shared prefix against whole prompts."""

from __future__ import annotations

import json
import random
from itertools import permutations, product

import pytest
import small
import torch

from lowrank_cli.calibration import contextual, oracle, prototypes, statistics_files
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.ida import IdaSoftmax, log_softmax, offsets, prior, statistics, together
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.inference.choice_scores import Prefix, candidate_scores, common_prefix
from lowrank_cli.tasks.encode import collate_prompts

#: Answers that share first tokens, differ in length, or are one token.
OPTIONS = [[[20, 21], [20, 22], [23]], [[10], [11, 12, 13]], [[30, 31, 32, 33], [34]]]
PROMPTS = [[5, 9, 12, 40, 7], [8, 8, 30], [21, 4, 33, 6, 17, 50, 11]]
SHARED = [3, 44, 19, 27, 6, 51]


def some_features(count: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator) * 0.4 + 0.3


def some_head(tokens: int = 9, width: int = 6) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)) * 0.5


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_the_closed_form_is_the_mean_inverse_probability_of_sampled_features(strength):
    features, head, bias = some_features(40), some_head(), torch.linspace(-0.5, 0.5, 9)
    hidden = some_features(3)[2]
    found = statistics(features, torch.zeros(40, dtype=torch.long), 1)
    covariance = torch.cov(features.t(), correction=0)
    torch.manual_seed(0)
    drawn = torch.distributions.MultivariateNormal(
        (hidden + strength * found.mean).double(), strength * covariance.double()
    ).sample((20_000,))
    inverse = (drawn @ head.double().t() + bias).log_softmax(-1).neg().exp()  # (M, V): 1 / p(y | h̃)
    error = inverse.std(dim=0) / len(drawn) ** 0.5
    rule = IdaSoftmax(head, found.mean, found.factor, strength, range(9))
    logits = (head @ hidden + bias).unsqueeze(0)
    closed = rule(logits, torch.arange(9).unsqueeze(0)).neg().exp().squeeze(0)
    assert (error / closed).max() < 0.05, "sampling says too little to compare with"
    assert ((inverse.mean(dim=0) - closed).abs() < 4 * error).all()


@pytest.mark.parametrize("count", [4, 40], ids=["fewer examples than width", "more"])
def test_the_factor_gives_what_the_explicit_covariance_gives(count):
    features, head, strength = some_features(count), some_head(), 0.7
    found = statistics(features, torch.zeros(count, dtype=torch.long), 1)
    assert found.factor.shape[0] <= min(count, 6)
    covariance = torch.cov(features.double().t(), correction=0)
    difference = head.double()[:, None] - head.double()[None]  # (V, V, D): w_k − w_y
    quadratic = torch.einsum("kyd,de,kye->yk", difference, covariance, difference)
    linear = torch.einsum("kyd,d->yk", difference, features.double().mean(dim=0))
    expected = strength * linear + 0.5 * strength * quadratic
    ours = offsets(head, found.mean, found.factor, strength, torch.arange(9))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_augmentation_it_is_the_softmax_bit_for_bit():
    found = statistics(some_features(40), torch.zeros(40, dtype=torch.long), 1)
    logits, tokens = torch.randn(5, 9), torch.tensor([[2, 7]] * 5)
    rule = IdaSoftmax(some_head(), found.mean, found.factor, 0.0, [2, 7])
    assert torch.equal(rule(logits, tokens), log_softmax(logits, tokens))


def test_different_answers_row_by_row_are_scored_as_one_by_one():
    found = statistics(some_features(40), torch.zeros(40, dtype=torch.long), 1)
    rule = IdaSoftmax(some_head(), found.mean, found.factor, 0.5, [1, 2, 7])
    logits, tokens = torch.randn(3, 9), torch.tensor([[2, 7], [7, 1], [1, 1]])
    single = [[rule(logits[b : b + 1], tokens[b : b + 1, c : c + 1]).item() for c in range(2)] for b in range(3)]
    torch.testing.assert_close(rule(logits, tokens), torch.tensor(single))


def test_terms_that_overflow_exp_stay_finite():
    found = statistics(some_features(40) * 100, torch.zeros(40, dtype=torch.long), 1)
    scores = IdaSoftmax(some_head() * 10, found.mean, found.factor, 0.5, range(9))(
        torch.zeros(1, 9), torch.arange(9).unsqueeze(0)
    )
    assert scores.isfinite().all() and scores.min() < -1e4


def test_class_shares_are_counted_with_one_more_of_each():
    found = statistics(some_features(8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]), 4)
    assert found.shares.tolist() == pytest.approx([6 / 12, 3 / 12, 2 / 12, 1 / 12])


def test_a_label_without_examples_has_no_prior_to_make_up_for():
    shares = torch.tensor([0.75, 0.25, 0.0])
    assert prior(shares, 0.0).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r"method\.tau: 0\.5, but label 2 has no example"):
        prior(shares, 0.5)
    torch.testing.assert_close(prior(shares[:2], 0.5), torch.tensor([0.75, 0.25]).log() / 2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_has_its_adapters_update(family):
    model = small.adapted("lora", family, target_modules=["lm_head"]).model.eval()
    hidden = some_features(3, 32)
    torch.testing.assert_close(hidden @ head_weight(model).t(), model.get_output_embeddings()(hidden))
    assert not torch.allclose(head_weight(model), model.get_output_embeddings().weight)


def test_rules_together_score_as_one_by_one():
    model, batch = small.model("llama"), collate_prompts(PROMPTS, 0)
    found = statistics(some_features(40, 32), torch.zeros(40, dtype=torch.long), 1)
    head = model.get_output_embeddings().weight.detach()
    rules = [IdaSoftmax(head, found.mean, found.factor, strength, range(64)) for strength in (0.25, 1.0)]
    both = candidate_scores(model, **batch, options=OPTIONS, rule=together(rules))
    for at, rule in enumerate(rules):
        assert [row[at] for row in both] == candidate_scores(model, **batch, options=OPTIONS, rule=rule)


# ---------------------------------------------------------------------------------- answers of a model, shared prefix


def alone(model, rule, prompt: list[int], answer: list[int]) -> float:
    """Σ of the rule's token scores, one full pass for each token."""
    total = 0.0
    for at, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:at]])).logits[:, -1]
        total += rule(logits, torch.tensor([[token]])).item()
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "qwen3", "gemma"])
@pytest.mark.parametrize("shared", [[], SHARED], ids=["whole prompts", "shared prefix"])
@torch.no_grad()
def test_candidates_score_as_they_would_alone(family, shared):
    model = small.adapted("lora", family).model
    head = model.get_output_embeddings().weight
    found = statistics(some_features(40, 32), torch.zeros(40, dtype=torch.long), 1)
    answered = sorted({token for row in OPTIONS for answer in row for token in answer})
    for rule in (log_softmax, IdaSoftmax(head, found.mean, found.factor, 0.5, answered)):
        prefix = Prefix(model, shared) if shared else None
        batch = collate_prompts([shared + prompt for prompt in PROMPTS], 0)
        for _ in range(2):  # the prefix serves again
            ours = candidate_scores(model, **batch, options=OPTIONS, prefix=prefix, rule=rule)
        for row, prompt, options in zip(ours, PROMPTS, OPTIONS, strict=True):
            assert row == pytest.approx([alone(model, rule, shared + prompt, a) for a in options], abs=2e-4)


def test_the_common_prefix_leaves_something_of_every_prompt():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1]
    assert common_prefix([[1, 2], [3, 2]]) == [] == common_prefix([])


# ------------------------------------------------------------------------------------------- what it is up against


def test_an_input_without_content_is_undecided_once_divided_by_itself():
    scores = torch.tensor([[-1.0, -3.0, -2.0]])
    even = scores - contextual.bias(scores)
    assert torch.allclose(even, even[:, :1].expand_as(even))


def test_content_free_inputs_count_by_their_mean_probability():
    scores = torch.tensor([[-1.0, -3.0], [-5.0, -4.0], [-2.0, -9.0]])
    torch.testing.assert_close(contextual.bias(scores), scores.exp().mean(dim=0).log())
    each_query = torch.stack([scores, scores + 1])  # (2, 3, 2)
    torch.testing.assert_close(contextual.bias(each_query)[0], contextual.bias(scores))


@pytest.mark.parametrize("answers", [2, 3])
def test_the_oracle_finds_the_best_offsets(answers):
    generator = torch.Generator().manual_seed(answers)
    labels = torch.randint(answers, (40,), generator=generator)
    scores = torch.randn(40, answers, generator=generator, dtype=torch.float64)
    scores[torch.arange(40), labels] += 0.7
    scores[:, 0] += 3.0

    def right(offsets):
        return int(((scores + torch.as_tensor(offsets)).argmax(dim=1) == labels).sum())

    found = right(oracle.best_offsets(scores, labels, torch.zeros(answers, dtype=torch.float64)))
    grid = torch.linspace(-6, 2, 161).double().tolist()
    best = max(right([*offsets, 0.0]) for offsets in product(grid, repeat=answers - 1))
    assert found >= best > right([0.0] * answers) + 5


def test_random_texts_have_the_words_and_the_mean_length_of_the_domain():
    texts = contextual.random_texts(["a b c", "d e f g h"], 30, random.Random(0))
    assert {len(text.split()) for text in texts} == {4}
    assert {word for text in texts for word in text.split()} == set("abcdefgh")


def test_clusters_are_matched_so_that_the_gains_sum_to_the_most():
    for seed in range(5):
        gains = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).tolist()
        best = max(permutations(range(5)), key=lambda rows: sum(gains[row][c] for c, row in enumerate(rows)))
        assert prototypes.match(gains) == list(best)


def test_prototypes_find_the_answers_that_a_biased_model_hides():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    scores = torch.randn(120, 3, generator=generator) * 0.2
    scores[torch.arange(120), labels] += 2.0
    scores[:, 0] += 4.0  # the model says the first answer whatever it is asked
    assert (scores.argmax(dim=-1) == labels).double().mean() < 0.4
    found = prototypes.fit(scores, seed=0).posterior(scores)
    assert (found.argmax(dim=-1) == labels).double().mean() > 0.95
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(120, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- on disk


ABOUT = {
    "fingerprint": "f",
    "adapter": None,
    "task": "t",
    "templates": ["{x}"],
    "label_words": ["a", "b"],
    "answered": True,
    "examples": None,
    "share": None,
    "max_length": 64,
    "data": "4 examples",
    "model": "llama",
    "vocabulary": 64,
    "method": {},
    "seed": 0,
    "answers": [[3], [4]],
}


def test_statistics_come_back_as_they_were_saved(tmp_path):
    tensors = {"mean": torch.randn(4), "factor": torch.randn(3, 4)}
    statistics_files.save(tmp_path, tensors, ABOUT)
    loaded, about = statistics_files.load(tmp_path)
    assert about["task"] == "t" and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("damage", ["altered", "missing", "json", "format", "answers"])
def test_damaged_statistics_are_refused(tmp_path, damage):
    statistics_files.save(tmp_path, {"mean": torch.zeros(4)}, ABOUT)
    about = tmp_path / statistics_files.ABOUT
    if damage == "altered":
        (tmp_path / statistics_files.TENSORS).write_bytes(
            (tmp_path / statistics_files.TENSORS).read_bytes()[:-1] + b"x"
        )
    elif damage == "missing":
        about.unlink()
    elif damage == "json":
        about.write_text("{")
    elif damage == "format":
        about.write_text(json.dumps({**json.loads(about.read_text()), "format": 9}))
    elif damage == "answers":
        about.write_text(json.dumps({**json.loads(about.read_text()), "answers": [["x"]]}))
    words = {
        "answers": r"answers\[0\]\[0\] is 'x'; expected a whole number",
        "altered": "altered",
        "missing": "missing",
        "json": "cannot be read as JSON",
        "format": "format 9",
    }
    with pytest.raises(UserError, match=words[damage]):
        statistics_files.load(tmp_path)


# ------------------------------------------------------------------------------------------------------- in generate


@pytest.mark.parametrize("bonus", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 30.0, 0.5]])
@torch.no_grad()
def test_generate_says_the_answer_of_the_best_score(bonus):
    model = small.adapted("lora", "llama").model
    answers = [[20, 21], [20, 22, 23], [23], [23, 20]]  # shared first tokens; one is the beginning of another
    found = statistics(some_features(40, 32), torch.zeros(40, dtype=torch.long), 1)
    rule = IdaSoftmax(model.get_output_embeddings().weight, found.mean, found.factor, 0.5, range(64))
    batch = collate_prompts(PROMPTS, 0)
    scores = candidate_scores(model, **batch, options=[answers] * len(PROMPTS), rule=rule)
    expected = [max(range(4), key=lambda i: row[i] + bonus[i]) for row in scores]
    processor = AnswerProcessor(rule, answers, bonus, eos=2)

    def said(prompts):
        made = model.generate(
            **prompts,
            max_new_tokens=5,
            do_sample=False,
            num_beams=processor.beams,
            length_penalty=0.0,
            early_stopping=False,
            logits_processor=[processor],
            eos_token_id=2,
            pad_token_id=0,
        )
        answered = made[:, prompts["input_ids"].shape[1] :].tolist()
        return [[token for token in row if token not in (0, 2)] for row in answered]

    assert said(batch) == [answers[index] for index in expected]
    for row, index in enumerate(expected):  # other calls of the same processor, with prompts of other lengths
        assert said(collate_prompts([PROMPTS[row]], 0)) == [answers[index]]


@torch.no_grad()
def test_greedy_decoding_of_single_tokens_weighs_the_shares_at_once():
    model = small.model("gpt2")
    batch = collate_prompts(PROMPTS, 0)
    for bonus, expected in (([50.0, 0.0], 20), ([0.0, 50.0], 21)):
        processor = AnswerProcessor(log_softmax, [[20], [21]], bonus, eos=2)
        made = model.generate(**batch, max_new_tokens=2, do_sample=False, logits_processor=[processor], pad_token_id=0)
        assert made[:, batch["input_ids"].shape[1] :].tolist() == [[expected, 2]] * 3
