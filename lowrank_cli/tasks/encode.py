"""Examples as tokens: what a causal model is trained on and asked, and what an encoder reads.

Training and testing see the same prompt tokens: a prompt is always tokenised by itself, and an answer's
tokens are those that follow it when both are tokenised together. Where joining changes the prompt's own
tokens, the answer is tokenised alone. Legend: ``B`` batch, ``T`` tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lowrank_cli.errors import UserError
from lowrank_cli.tasks.task import Example

IGNORED = -100  #: label of positions that carry no loss (torch's ``cross_entropy`` default)


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answer as one sequence for a causal model."""

    input_ids: list[int]
    prompt_length: int  #: leading tokens that belong to the prompt, BOS included


@dataclass(frozen=True)
class EncodedText:
    """A text or a pair of texts for an encoder."""

    input_ids: list[int]
    token_type_ids: list[int] | None  #: which text of a pair, where the model tells them apart
    label: int


def encode(tokenizer, example: Example, max_length: int) -> Encoded:
    """Prompt, answer and EOS; see :func:`encode_all`."""
    return encode_all(tokenizer, [example], max_length)[0]


def encode_all(tokenizer, examples: Sequence[Example], max_length: int, cut: bool = False) -> list[Encoded]:
    """Prompt, answer and EOS of each example, at most ``max_length`` tokens.

    A longer prompt loses its beginning but keeps BOS. Where the answer is one of several ``choices``, room is
    left for the longest, so that training and scoring keep the same prompt. With ``cut`` a prompt keeps half of the
    tokens where it needs them, and an answer that is longer than the rest loses its end, EOS included.

    Raises:
        UserError: an answer leaves no room for a prompt.
    """
    prompts = _tokens(tokenizer, [example.prompt for example in examples])
    answers = _answers(tokenizer, prompts, [(example.prompt, example.answer) for example in examples])
    encoded, least = [], len(_bos(tokenizer)) + 1
    for example, prompt, answer in zip(examples, prompts, answers):
        room = max_length - len(answer) - 1
        most = max((len(choice.encode()) for choice in example.choices), default=0)  # a token has a byte or more
        if len(prompt) + most + 1 > max_length and example.choices:
            room = prompt_room(candidates(tokenizer, example.prompt, example.choices), max_length)
        if cut:
            room = max(room, min(len(prompt), max_length // 2))
        if room < least:
            raise UserError(
                f"task.max_length: {max_length} leaves no room for a prompt before an answer of "
                f"{len(answer)} tokens: {example.answer.strip()[:60]!r}"
            )
        prompt = _truncate(tokenizer, prompt, room)
        encoded.append(Encoded((prompt + answer + [tokenizer.eos_token_id])[:max_length], len(prompt)))
    return encoded


def prompt_room(choices: Sequence[Sequence[int]], max_length: int) -> int:
    """Tokens left for the prompt beside the longest of ``choices`` and EOS."""
    return max_length - max(map(len, choices)) - 1


def encode_prompt(tokenizer, prompt: str, room: int) -> list[int]:
    """The prompt's last ``room`` tokens, BOS in front where the tokenizer adds one.

    ``room`` is :func:`prompt_room` for scored choices, ``max_length - max_new_tokens`` for generated answers.

    Raises:
        UserError: no room for a token of the prompt.
    """
    return encode_prompts(tokenizer, [prompt], [room])[0]


def encode_prompts(tokenizer, prompts: Sequence[str], rooms: Sequence[int]) -> list[list[int]]:
    """:func:`encode_prompt` of each prompt with its room."""
    rows = _tokens(tokenizer, list(prompts)) if prompts else []
    return [_truncate(tokenizer, row, room) for row, room in zip(rows, rooms, strict=True)]


def candidates(tokenizer, prompt: str, choices: Sequence[str]) -> list[list[int]]:
    """The tokens of each choice after ``prompt``, without EOS."""
    tokens = _tokens(tokenizer, [prompt]) * len(choices)
    return _answers(tokenizer, tokens, [(prompt, choice) for choice in choices])


def encode_text(tokenizer, example: Example, max_length: int) -> EncodedText:
    """The text or the pair with the encoder's special tokens; of a pair the longer is cut first."""
    row = tokenizer(*example.text, truncation="longest_first", max_length=max_length)
    assert example.label is not None, "an encoder predicts labels"
    return EncodedText(row["input_ids"], row.get("token_type_ids"), example.first + example.label)


def collate_causal(encoded: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """A right-padded training batch; every tensor is (B, T) and integer.

    ``labels`` hold the answer's tokens and EOS, elsewhere ``IGNORED``; ``prompt_mask`` is 1 on prompts.
    """
    marks = ([1] * row.prompt_length + [0] * (len(row.input_ids) - row.prompt_length) for row in encoded)
    answers = ([IGNORED] * row.prompt_length + row.input_ids[row.prompt_length :] for row in encoded)
    return {
        "input_ids": _padded((row.input_ids for row in encoded), pad_id),
        "attention_mask": _padded(([1] * len(row.input_ids) for row in encoded), 0),
        "labels": _padded(answers, IGNORED),
        "prompt_mask": _padded(marks, 0),
    }


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """A left-padded batch to continue: ``input_ids`` and ``attention_mask``, both (B, T)."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}  # both (B, T)


def collate_encoder(encoded: Sequence[EncodedText], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask``, ``token_type_ids`` if any (B, T), ``labels`` (B,)."""
    batch = {
        "input_ids": _padded((row.input_ids for row in encoded), pad_id),
        "attention_mask": _padded(([1] * len(row.input_ids) for row in encoded), 0),
        "labels": torch.tensor([row.label for row in encoded]),  # (B,)
    }
    if encoded[0].token_type_ids is not None:
        batch["token_type_ids"] = _padded((row.token_type_ids for row in encoded), 0)
    return batch


def _padded(rows: Iterable[list[int]], filler: int) -> torch.Tensor:
    """Rows of unlike lengths, filled up on the right."""
    rows = list(rows)
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])  # (B, T)


def _answers(tokenizer, prompts: list[list[int]], pairs: list[tuple[str, str]]) -> list[list[int]]:
    """The answer's tokens of each (prompt, answer), given the prompt's tokens."""
    joined = _tokens(tokenizer, [prompt + answer for prompt, answer in pairs])
    found = []
    for prompt, both, (_, answer) in zip(prompts, joined, pairs):
        if both[: len(prompt)] == prompt and len(both) > len(prompt):
            found.append(both[len(prompt) :])
        else:
            found.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return found


def _tokens(tokenizer, texts: list[str]) -> list[list[int]]:
    """Each text's tokens, BOS in front where the tokenizer adds one, and nothing behind."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bos = _bos(tokenizer)
    return [bos + row for row in rows]


def _bos(tokenizer) -> list[int]:
    special = tokenizer("")["input_ids"]
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def _truncate(tokenizer, tokens: list[int], room: int) -> list[int]:
    """The last ``room`` tokens, counting a BOS that stays in front."""
    if len(tokens) <= room:
        return tokens
    bos = _bos(tokenizer)
    if room <= len(bos):
        raise UserError("task.max_length: leaves no room for a prompt; raise it, or lower task.max_new_tokens")
    return bos + tokens[len(tokens) - (room - len(bos)) :]
