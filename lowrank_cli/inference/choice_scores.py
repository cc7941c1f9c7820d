"""Scores of candidate answers: the prefix that prompts share runs once, and so does each prompt for its answers.

Every prompt begins with the same demonstrations, so the KV cache of their longest common prefix is computed once and
serves each batch. Batches hold prompts of similar lengths. A rule turns logits into scores
(:data:`lowrank_cli.calibration.ida.TokenRule`); the default is the log probability.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.lm_head import answers_at
from lowrank_cli.calibration.ida import TokenRule, log_softmax
from lowrank_cli.session.session import Session
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

Tick = Callable[[int], None]
SHIFTABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class Prefix:
    """The common first tokens of several prompts, run once.

    Longer prompts are left-padded, and the cached keys and values are shifted row by row to match: padding between the
    prefix and the rest of a prompt would count in a sliding window, which is measured in cache positions. For the same
    reason, layers with a sliding window keep all keys and values here.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]):
        self.ids = list(ids)
        tokens = torch.tensor([self.ids], device=model.device)  # (1, P)
        self.cache = DynamicCache()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1, **pass_cache(model, self.cache))

    def after(self, padding: Tensor) -> DynamicCache:
        """A KV cache for rows that begin with ``padding`` (B,) pad tokens, then the prefix, P tokens in all.

        Appending to it does not change this prefix.
        """
        positions = torch.arange(len(self.ids), device=padding.device)  # (P,)
        token = (positions - padding[:, None]).clamp_min(0) if padding.any() else None  # (B, P); padding reads token 0
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            for name in ("keys", "values"):
                shared = getattr(layer, name)  # (1, H, P, d)
                rows = shared.expand(len(padding), -1, -1, -1) if token is None else _gather(shared, token)
                setattr(layer, name, rows)  # (B, H, P, d)
        return cache


def _gather(shared: Tensor, token: Tensor) -> Tensor:
    """Keys or values (1, H, P, d) of the tokens (B, P): (B, H, P, d)."""
    _, heads, length, width = shared.shape
    start = length * torch.arange(heads, device=token.device)[:, None]  # (H, 1)
    rows = token[:, None] + start  # (B, 1, P) + (H, 1) -> (B, H, P)
    return shared.reshape(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)


def can_share(model: PreTrainedModel) -> bool:
    """Whether a :class:`Prefix` of ``model`` can be shifted: its layers cache nothing but keys and values."""
    return all(type(layer) in SHIFTABLE for layer in DynamicCache(config=model.config).layers)


def with_demonstrations(examples: Sequence[Example], demonstrations: Sequence[Example]) -> list[str]:
    """Each example's prompt after the answered ``demonstrations`` of its task, separated by blank lines."""
    prefixes: defaultdict[str, str] = defaultdict(str)
    for example in demonstrations:
        prefixes[example.task] += f"{example.prompt}{example.answer}\n\n"
    return [prefixes[example.task] + example.prompt for example in examples]


@torch.no_grad()
def choice_scores(
    session: Session,
    examples: Sequence[Example],
    prompts: Sequence[str],
    shots: int,
    *,
    rule_of: Callable[[tuple[int, ...]], TokenRule] = lambda tokens: log_softmax,
    normalize_length: bool = False,
    tick: Tick = lambda count: None,
) -> list[list[float]]:
    """Scores of each example's choices, in the order of ``examples``. Every process must call this.

    Args:
        prompts: one for each example, with ``shots`` demonstrations.
        rule_of: maps the tokens of all choices (sorted, distinct) to the scoring rule. Where the rule evaluates several
            rules together, each example has one list of scores for each of them.
        normalize_length: divide each score by the number of tokens of its choice.
        tick: called with the number of examples scored since the last call.
    """
    accelerator = session.accelerator
    session.model.eval()
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    options = {index: answers(session, examples[index]) for index in mine}
    rule = rule_of(tuple(sorted({token for row in options.values() for answer in row for token in answer})))
    limits = [
        encode.max_prompt_length(options[index], session.max_length(shots, examples[index].task)) for index in mine
    ]
    rows = dict(
        zip(mine, encode.encode_prompts(session.prompt_tokenizer, [prompts[i] for i in mine], limits), strict=True)
    )
    whole = [rows[index] for index, limit in zip(mine, limits, strict=True) if len(rows[index]) < limit]
    routed = session.adapter is not None and session.adapter.routing is not None  # reads the whole prompt at once
    shared = common_prefix(whole) if shots and not routed and can_share(session.model) else []
    scored: list[tuple[int, list[float]]] = []
    with session.autocast():
        prefix = Prefix(session.model, shared) if shared else None
        for batch, batch_prefix in _batches(rows, prefix, session.batch_size):
            inputs = encode.collate_prompts([rows[i] for i in batch], session.tokenizer.pad_token_id)
            inputs = {key: value.to(session.device) for key, value in inputs.items()}
            scores = candidate_scores(
                session.model, **inputs, options=[options[i] for i in batch], prefix=batch_prefix, rule=rule
            )
            for index, row in zip(batch, scores, strict=True):
                if normalize_length:
                    row = (torch.tensor(row) / torch.tensor([len(answer) for answer in options[index]])).tolist()
                scored.append((index, row))
            tick(len(batch) * accelerator.num_processes)
    return [row for _, row in sorted(accelerator.gather_object(scored))]


def _batches(rows: dict[int, list[int]], prefix: Prefix | None, size: int) -> Iterator[tuple[list[int], Prefix | None]]:
    """Keys of ``rows`` in batches of similar lengths: first the rows that begin with ``prefix``, then the others."""
    begins = {key for key, row in rows.items() if prefix is not None and row[: len(prefix.ids)] == prefix.ids}
    for group, group_prefix in ((begins, prefix), (rows.keys() - begins, None)):
        order = sorted((key for key in rows if key in group), key=lambda key: len(rows[key]))
        for start in range(0, len(order), size):
            yield order[start : start + size], group_prefix


def answers(session: Session, example: Example) -> list[list[int]]:
    """The tokens of each choice as they follow the example's prompt."""
    candidates = encode.candidates(session.prompt_tokenizer, example.prompt, example.choices)
    return with_eos_if_ambiguous(candidates, session.stops(example.task)[0])


def with_eos_if_ambiguous(candidates: list[list[int]], eos: int) -> list[list[int]]:
    """The candidates, all with EOS if one is a prefix of another and would always score higher."""
    if any(a == b[: len(a)] for a in candidates for b in candidates if a is not b):
        return [[*candidate, eos] for candidate in candidates]
    return candidates


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The longest common proper prefix."""
    if not rows:
        return []
    first, last = min(rows), max(rows)  # in lexicographic order all others lie between these two
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last))]
    return shared[: min(map(len, rows)) - 1]


@torch.no_grad()
def candidate_scores(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    options: list[list[list[int]]],
    prefix: Prefix | None = None,
    rule: TokenRule = log_softmax,
) -> list[list[float]]:
    """Sums of the rule's scores over the tokens of each candidate.

    The prompts run once. Where a candidate has more than one token, their KV cache is repeated for all C candidates,
    which run in one more pass. Rows with fewer than C candidates are padded, and their padding is dropped again.

    Args:
        input_ids: left-padded prompts (B, T), which begin with ``prefix`` if there is one.
        attention_mask: (B, T).
        options: for each prompt, its candidates as lists of tokens.

    Returns:
        For each prompt a score for each of its candidates; S lists of them where the rule evaluates S rules together.
    """
    device, width = input_ids.device, len(options)
    tokens, present = _stack(options, device)  # (B, C, K)
    most, longest = tokens.shape[1:]
    past = len(prefix.ids) if prefix else 0
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)  # (B, T)
    out = model(
        input_ids=input_ids[:, past:],  # (B, T) -> (B, T - P)
        attention_mask=attention_mask,
        position_ids=positions[:, past:],
        use_cache=prefix is not None or longest > 1,
        logits_to_keep=1,
        **pass_cache(model, prefix.after((1 - attention_mask).sum(dim=1)) if prefix else None),
    )
    scores = rule(out.logits[:, -1].float(), tokens[:, :, 0])  # (B, V), (B, C) -> (…, B, C)
    rules = scores.shape[:-2]  # (S,), or () for one rule
    if longest > 1:
        cache = returned_cache(out)
        assert cache is not None
        cache.batch_repeat_interleave(most)
        rest = tokens[:, :, :-1].flatten(0, 1)  # (B, C, K) -> (B * C, K - 1)
        mask = torch.cat([attention_mask.repeat_interleave(most, dim=0), torch.ones_like(rest)], dim=1)
        after = positions[:, -1:].repeat_interleave(most, dim=0) + torch.arange(1, longest, device=device)
        counted = present[:, :, 1:].flatten(0, 1)  # (B * C, K - 1)
        inputs = {"input_ids": rest, "attention_mask": mask, "position_ids": after}
        outputs = answers_at(model, {**inputs, **pass_cache(model, cache), "use_cache": True}, counted)
        targets = tokens[:, :, 1:].flatten(0, 1)[counted].unsqueeze(-1)  # (n, 1)
        later = torch.zeros(*rules, counted.numel(), device=device)
        chunks = [rule(logits, targets[span]) for span, logits in outputs.chunks()]  # (n, V), (n, 1) -> (…, n, 1)
        later[..., counted.flatten()] = torch.cat(chunks, dim=-2).squeeze(-1)
        scores = scores + later.view(*rules, width, most, longest - 1).sum(dim=-1)
    scores = scores.cpu()
    return [scores[..., b, : len(row)].tolist() for b, row in enumerate(options)]


def _stack(options: list[list[list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The candidates as (B, C, K) tokens, padded with each row's first token, and a mask that is False on padding."""
    most, longest = max(map(len, options)), max(len(tokens) for row in options for tokens in row)
    tokens = torch.tensor([row[0][0] for row in options], device=device)[:, None, None].repeat(1, most, longest)
    present = torch.zeros(len(options), most, longest, dtype=torch.bool, device=device)
    for b, row in enumerate(options):
        for c, candidate in enumerate(row):
            tokens[b, c, : len(candidate)] = torch.tensor(candidate, device=device)
            present[b, c, : len(candidate)] = True
    return tokens, present
