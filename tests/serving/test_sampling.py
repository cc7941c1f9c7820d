"""How tokens are chosen, and how they become text."""

from __future__ import annotations

import pytest
import torch
from serving_cases import bundled

from lowrank_cli.serving.sampling import Sampling, choose, draw
from lowrank_cli.serving.text import Text


def drawn(logits, top_p, count=4000):
    """How often each token is drawn, as a share."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([draw(logits, top_p, generator) for _ in range(count)])
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    error = 4 * (0.25 / 4000) ** 0.5  # four standard deviations, at most
    torch.testing.assert_close(drawn(probabilities.log(), 1.0), probabilities, atol=error, rtol=0)
    nucleus = torch.tensor([0.0, 0.5, 0.0, 0.35]) / 0.85
    torch.testing.assert_close(drawn(probabilities.log(), 0.8), nucleus, atol=error, rtol=0)
    assert drawn(probabilities.log(), 1e-9, 50)[1] == 1, "the most probable token is always among them"


def test_rows_do_not_influence_each_other():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(1), Sampling(1, temperature=1.0, seed=3), Sampling(1, temperature=1e-9, seed=3), Sampling(1)]
    logits[3, 7] = torch.nan
    together = choose(logits, [(one, *one.generators(1)) for one in settings])
    for row, one in enumerate(settings):
        assert choose(logits[row : row + 1], [(one, *one.generators(1))]) == [together[row]]
    assert together[3] is None, "not a number"
    assert together[0].id == logits[0].argmax() and together[2].id == logits[2].argmax()


def test_answers_without_a_seed_differ():
    assert len({Sampling(1).generators(1)[0].initial_seed() for _ in range(3)}) == 3
    one, two = (Sampling(1, seed=4).generators(2) for _ in range(2))
    assert [g.initial_seed() for g in one] == [g.initial_seed() for g in two]
    assert one[0].initial_seed() != one[1].initial_seed()


@pytest.mark.parametrize("sample", ["The café costs 5 €, naïve 😀 friend.\n\nBye", "", "a  b   c", "żółć"])
def test_pieces_of_text_are_whole_characters_and_add_up(sample):
    tokenizer = bundled()[1]
    text, pieces = Text(tokenizer), []
    for token in tokenizer(sample, add_special_tokens=False).input_ids:
        pieces.append(text.add(token))
    pieces.append(text.rest())
    assert "".join(pieces) == sample and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("cd",), "ab"),
        (("bcx", "cd"), "ab"),
        (("ef", "bc"), "a"),
        (("a",), ""),
        (("efgh",), "abcdef"),
        (("f",), "abcde"),
        (("bcde", "d"), "abc"),
    ],
)
def test_text_ends_before_the_first_stop_string(stop, left):
    class Letters:
        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    text, sent = Text(Letters(), stop), ""
    for letter in "abcdef":
        sent += text.add(ord(letter))
        if text.stopped:
            break
        assert left.startswith(sent), "nothing of a stop string is sent"
    sent += "" if text.stopped else text.rest()
    assert sent == left and text.stopped == (left != "abcdef")
