"""Examples as tokens, for causal models and encoders, and as batches.

Training and testing see the same prompt tokens: a prompt is always tokenised alone, and an answer's tokens are
those that follow it when both are tokenised together. Where joining would change the prompt's tokens, the answer
is tokenised alone. Legend: ``B`` batch, ``T`` tokens of the longest row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_cli.errors import UserError
from lowrank_cli.tasks.task import Example

Tokenizer = PreTrainedTokenizerBase
IGNORED = -100  #: label of positions without loss (``ignore_index`` of torch's ``cross_entropy``)


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answer as one sequence for a causal model."""

    input_ids: list[int]
    prompt_length: int  #: number of prompt tokens, BOS included
    ignored: frozenset[int] = frozenset()  #: positions after the prompt that are not answers: later turns of the user

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def answered(self) -> int:
        """Number of tokens with loss."""
        return len(self.input_ids) - self.prompt_length - len(self.ignored)


@dataclass(frozen=True)
class EncodedText:
    """A text or a pair of texts for an encoder."""

    input_ids: list[int]
    token_type_ids: list[int] | None  #: which text of a pair, if the model distinguishes them
    #: the label, the number, 1.0 for each label that applies and 0.0 for the others, or the tag of each token
    label: int | float | list[float] | list[int]
    #: of tags: the position of the first token of each word; a word that the text was cut before, or without a token,
    #: has None
    words: tuple[int | None, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def answered(self) -> int:
        """Number of answers with loss: one, or one for each word with a token."""
        return sum(position is not None for position in self.words) if self.words else 1


def encode(tokenizer: Tokenizer, example: Example, max_length: int) -> Encoded:
    """Prompt, answer and EOS; see :func:`encode_all`."""
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer: Tokenizer, examples: Sequence[Example], max_length: int, cut: bool = False) -> list[Encoded]:
    """Prompt, answer and EOS of each example.

    A prompt that is too long loses its beginning but keeps BOS. If the example has ``choices``, the prompt leaves space
    for the longest, so that training and scoring truncate it alike.

    Args:
        max_length: largest number of tokens of prompt, answer and EOS.
        cut: leave the prompt up to half of the tokens, and cut the end of an answer that does not fit, EOS included.

    Raises:
        UserError: an answer leaves no space for a prompt.
    """
    prompts = _tokens(tokenizer, [example.prompt for example in examples])
    answers = _answers(tokenizer, prompts, [(example.prompt, example.answer) for example in examples])
    encoded, least = [], len(bos(tokenizer)) + 1
    for example, prompt, answer in zip(examples, prompts, answers):
        limit = max_length - len(answer) - 1
        most = max((len(choice.encode()) for choice in example.choices), default=0)  # a token has at least one byte
        if len(prompt) + most + 1 > max_length and example.choices:
            limit = max_prompt_length(candidates(tokenizer, example.prompt, example.choices), max_length)
        if cut:
            limit = max(limit, min(len(prompt), max_length // 2))
        if limit < least:
            raise no_room(max_length, len(answer), example.answer)
        prompt = truncate(tokenizer, prompt, limit)
        encoded.append(Encoded((prompt + answer + [tokenizer.eos_token_id])[:max_length], len(prompt)))
    return encoded


def no_room(max_length: int, tokens: int, answer: str) -> UserError:
    """The error for an answer of that many tokens that leaves no space for a prompt."""
    return UserError(
        f"task.max_length: {max_length} leaves no room for a prompt before an answer of {tokens} tokens: "
        f"{answer.strip()[:60]!r}"
    )


def max_prompt_length(choices: Sequence[Sequence[int]], max_length: int) -> int:
    """Tokens left for a prompt that is followed by the longest of ``choices`` and EOS."""
    return max_length - max(map(len, choices)) - 1


def encode_prompt(tokenizer: Tokenizer, prompt: str, limit: int) -> list[int]:
    """The prompt's last ``limit`` tokens, including a leading BOS if the tokenizer adds one.

    ``limit`` is :func:`max_prompt_length` for scored choices, ``max_length - max_new_tokens`` for generated answers.

    Raises:
        UserError: ``limit`` leaves no token of the prompt.
    """
    return encode_prompts(tokenizer, [prompt], [limit])[0]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], limits: Sequence[int]) -> list[list[int]]:
    """:func:`encode_prompt` for several prompts, each with its limit."""
    rows = _tokens(tokenizer, list(prompts)) if prompts else []
    return [truncate(tokenizer, row, limit) for row, limit in zip(rows, limits, strict=True)]


def candidates(tokenizer: Tokenizer, prompt: str, choices: Sequence[str]) -> list[list[int]]:
    """The tokens of each choice after ``prompt``, without EOS."""
    tokens = _tokens(tokenizer, [prompt]) * len(choices)
    return _answers(tokenizer, tokens, [(prompt, choice) for choice in choices])


def encode_text(tokenizer: Tokenizer, example: Example, max_length: int, labels: int) -> EncodedText:
    """The text or the pair with the encoder's special tokens; the longer text of a pair is cut first.

    Args:
        labels: number of the head's outputs.

    Raises:
        UserError: there are tags, and the tokenizer cannot say which characters a token stands for.
    """
    if example.words:
        return _encode_words(tokenizer, example, max_length)
    row = tokenizer(*example.text, truncation="longest_first", max_length=max_length)
    return EncodedText(row["input_ids"], row.get("token_type_ids"), label_of(example, labels))


def label_of(example: Example, labels: int) -> int | float | list[float]:
    """What an encoder's head of ``labels`` outputs learns from a row: see :attr:`EncodedText.label`."""
    if isinstance(example.target, tuple):
        return [float(index in example.target) for index in range(labels)]
    if example.target is not None:
        return example.target
    assert example.label is not None, "an encoder predicts labels"
    return example.first + example.label


def _encode_words(tokenizer: Tokenizer, example: Example, max_length: int) -> EncodedText:
    """The words as a text. The tag of a word is that of its first token; other tokens have none."""
    assert isinstance(example.target, tuple)
    if not tokenizer.is_fast:
        raise UserError("task.answer: tags, but the model's tokenizer does not map tokens to text (it is not fast)")
    ends = list(accumulate(len(word) + 1 for word in example.words))  # of each word, with the space after it
    row = tokenizer(
        " ".join(example.words), truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
    )
    positions: list[int | None] = [None] * len(ends)
    for position, (start, end) in enumerate(row["offset_mapping"]):
        word = bisect_right(ends, end - 1)  # a token may begin with the space before its word
        if end > start and positions[word] is None:
            positions[word] = position
    label = [IGNORED] * len(row["input_ids"])
    for tag, first in zip(example.target, positions, strict=True):
        if first is not None:
            label[first] = tag
    return EncodedText(row["input_ids"], row.get("token_type_ids"), label, tuple(positions))


def collate_causal(encoded: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """A right-padded training batch; every tensor is (B, T) and integer.

    ``labels`` hold the answers' tokens and EOS, and ``IGNORED`` elsewhere; ``prompt_mask`` is 1 on prompts.
    """
    return {
        "input_ids": _padded((row.input_ids for row in encoded), pad_id),
        "attention_mask": _padded(([1] * len(row.input_ids) for row in encoded), 0),
        "labels": _padded(map(_labels, encoded), IGNORED),
        "prompt_mask": _padded(map(_prompt, encoded), 0),
    }


def collate_packed(encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """:func:`collate_causal` without padding: one row (1, N) of all examples, and no attention mask."""
    rows = {
        "input_ids": [row.input_ids for row in encoded],
        "labels": map(_labels, encoded),
        "prompt_mask": map(_prompt, encoded),
    }
    return {key: torch.tensor([list(chain.from_iterable(values))]) for key, values in rows.items()}  # (1, N)


def _labels(row: Encoded) -> list[int]:
    start = max(1, row.prompt_length)  # nothing predicts the first token, least of all the example before it in a row
    return [IGNORED if at < start or at in row.ignored else token for at, token in enumerate(row.input_ids)]


def _prompt(row: Encoded) -> list[int]:
    return [1] * row.prompt_length + [0] * (len(row.input_ids) - row.prompt_length)


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """A left-padded batch for generation: ``input_ids`` and ``attention_mask``, both (B, T)."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}  # both (B, T)


def collate_encoder(encoded: Sequence[EncodedText], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and, if any, ``token_type_ids`` (B, T), with ``labels``.

    These are (B,) labels or numbers, (B, labels) numbers 0 and 1, or (B, T) tags with ``IGNORED`` elsewhere.
    """
    labels: list[Any] = [row.label for row in encoded]
    batch = {
        "input_ids": _padded((row.input_ids for row in encoded), pad_id),
        "attention_mask": _padded(([1] * len(row.input_ids) for row in encoded), 0),
        "labels": _padded(labels, IGNORED) if encoded[0].words else torch.tensor(labels),
    }
    token_types = [row.token_type_ids for row in encoded if row.token_type_ids is not None]
    if token_types:
        batch["token_type_ids"] = _padded(token_types, 0)
    return batch


def _padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
    """Right-padded rows."""
    rows = list(rows)
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])  # (B, T)


def _answers(tokenizer: Tokenizer, prompts: list[list[int]], pairs: list[tuple[str, str]]) -> list[list[int]]:
    """The answer's tokens of each (prompt, answer), given the prompts' tokens."""
    joined = _tokens(tokenizer, [prompt + answer for prompt, answer in pairs])
    answers = []
    for prompt, both, (_, answer) in zip(prompts, joined, pairs):
        if both[: len(prompt)] == prompt and len(both) > len(prompt):
            answers.append(both[len(prompt) :])
        else:
            answers.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return answers


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each text's tokens, with a leading BOS if the tokenizer adds one, without EOS."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    front = bos(tokenizer)
    return [front + row for row in rows]


def bos(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of a text: BOS, or nothing."""
    special = tokenizer("")["input_ids"]
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def truncate(tokenizer: Tokenizer, tokens: list[int], limit: int) -> list[int]:
    """The last ``limit`` tokens, of which the first is a BOS if there was one."""
    if len(tokens) <= limit:
        return tokens
    front = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
    if limit <= len(front):
        raise UserError("task.max_length: leaves no room for a prompt; raise it, or lower task.max_new_tokens")
    return front + tokens[len(tokens) - (limit - len(front)) :]
