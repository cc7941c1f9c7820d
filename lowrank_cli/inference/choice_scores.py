"""Scores of candidate answers under prompts: what prompts share runs once, and so does each prompt for its answers.

Demonstrations stand in front of every prompt, so the longest run of tokens that the prompts share is computed once and
its KV cache serves each batch. Batches hold prompts of alike lengths. How logits become scores is a rule
(:data:`lowrank_cli.calibration.ida.TokenRule`); the plain one is the log probability.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.lm_head import answers_at
from lowrank_cli.calibration.ida import TokenRule, log_softmax
from lowrank_cli.inference.session import Session
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

Tick = Callable[[int], None]
SHIFTABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class Prefix:
    """Tokens that several prompts begin with, run once.

    A batch of longer prompts is left-padded, and its rows' keys and values are shifted likewise: padding between a
    prefix and the rest of a prompt would count in a sliding window, which is measured in places of the cache. So the
    cache keeps all keys and values of layers with a window too.
    """

    def __init__(self, model: torch.nn.Module, ids: Sequence[int]):
        self.ids = list(ids)
        tokens = torch.tensor([self.ids], device=model.device)  # (1, P)
        self.cache = DynamicCache()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1, **pass_cache(model, self.cache))

    def behind(self, padding: Tensor) -> DynamicCache:
        """The KV cache of the first P tokens of rows that begin with ``padding`` (B,) tokens of padding, then with the
        prefix; what is appended to it leaves this one as it is."""
        places = torch.arange(len(self.ids), device=padding.device)  # (P,)
        token = (places - padding[:, None]).clamp_min(0) if padding.any() else None  # (B, P); any where padding is
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            for kept in ("keys", "values"):
                before = getattr(layer, kept)  # (1, H, P, d)
                rows = before.expand(len(padding), -1, -1, -1) if token is None else _picked(before, token)
                setattr(layer, kept, rows)  # (B, H, P, d)
        return cache


def _picked(kept: Tensor, token: Tensor) -> Tensor:
    """Keys or values (1, H, P, d) of the tokens (B, P): (B, H, P, d)."""
    _, heads, length, width = kept.shape
    start = length * torch.arange(heads, device=token.device)[:, None]  # (H, 1)
    rows = token[:, None] + start  # (B, 1, P) + (H, 1) -> (B, H, P)
    return kept.reshape(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)


def can_share(model: PreTrainedModel) -> bool:
    """Whether a :class:`Prefix` of ``model`` can be shifted: all that its layers keep are keys and values of tokens."""
    return all(type(layer) in SHIFTABLE for layer in DynamicCache(config=model.config).layers)


def with_demonstrations(examples: Sequence[Example], demonstrations: Sequence[Example]) -> list[str]:
    """Each example's prompt behind the answered ``demonstrations`` of its task, a blank line between two."""
    shown: defaultdict[str, str] = defaultdict(str)
    for example in demonstrations:
        shown[example.part] += f"{example.prompt}{example.answer}\n\n"
    return [shown[example.part] + example.prompt for example in examples]


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
    """Scores of each example's choices behind its prompt of ``shots`` demonstrations, in order; for all processes.

    ``rule_of`` gives the rule for all tokens of all choices (sorted, once each); of rules together, each example has
    one list of scores for each rule.
    """
    accelerator, size = session.accelerator, session.batch_size
    session.model.eval()
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    options = {index: answers(session, examples[index]) for index in mine}
    rule = rule_of(tuple(sorted({token for row in options.values() for answer in row for token in answer})))
    rooms = [encode.prompt_room(options[index], session.room(shots, examples[index].part)) for index in mine]
    rows = dict(zip(mine, encode.encode_prompts(session.tokenizer, [prompts[i] for i in mine], rooms), strict=True))
    whole = [rows[index] for index, limit in zip(mine, rooms, strict=True) if len(rows[index]) < limit]
    routed = session.adapter is not None and session.adapter.routing is not None  # by the whole prompt, not by a part
    shared = common_prefix(whole) if shots and not routed and can_share(session.model) else []
    found = []
    with session.autocast():
        prefix = Prefix(session.model, shared) if shared else None
        with_it = {index for index in mine if shared and rows[index][: len(shared)] == shared}
        for front, group in (
            (prefix, [i for i in mine if i in with_it]),
            (None, [i for i in mine if i not in with_it]),
        ):
            order = sorted(group, key=lambda index: len(rows[index]))
            for start in range(0, len(order), size):
                part = order[start : start + size]
                inputs = encode.collate_prompts([rows[i] for i in part], session.tokenizer.pad_token_id)
                inputs = {key: value.to(session.device) for key, value in inputs.items()}
                scores = candidate_scores(
                    session.model, **inputs, options=[options[i] for i in part], prefix=front, rule=rule
                )
                for index, row in zip(part, scores, strict=True):
                    if normalize_length:
                        row = (torch.tensor(row) / torch.tensor([len(answer) for answer in options[index]])).tolist()
                    found.append((index, row))
                tick(len(part) * accelerator.num_processes)
    return [row for _, row in sorted(gather_object(found))]


def answers(session: Session, example: Example) -> list[list[int]]:
    """The tokens of each choice behind the example's own prompt."""
    return ended(encode.candidates(session.tokenizer, example.prompt, example.choices), session.tokenizer.eos_token_id)


def ended(candidates: list[list[int]], eos: int) -> list[list[int]]:
    """The candidates, with EOS behind each where one is the beginning of another and would always score higher."""
    if any(a == b[: len(a)] for a in candidates for b in candidates if a is not b):
        return [[*candidate, eos] for candidate in candidates]
    return candidates


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all rows share and none of them is."""
    if not rows:
        return []
    first, last = min(rows), max(rows)  # in lexicographic order all others lie between these two
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last))]
    return shared[: min(map(len, rows)) - 1]


@torch.no_grad()
def candidate_scores(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    options: list[list[list[int]]],
    prefix: Prefix | None = None,
    rule: TokenRule = log_softmax,
) -> list[list[float]]:
    """Σ of the rule's scores of each candidate's tokens after its left-padded prompt (B, T).

    The prompts begin with ``prefix``, if there is one. For each of them C numbers, or S lists of them for S rules
    together. The prompts run once; where a candidate has more than one token, their KV cache is repeated for all C
    candidates and the rest runs in one more pass. Rows with fewer candidates are filled up and cut again.
    """
    device, width = input_ids.device, len(options)
    tokens, present = _stacked(options, device)  # (B, C, K)
    most, longest = tokens.shape[1:]
    past = len(prefix.ids) if prefix else 0
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)  # (B, T)
    out = model(
        input_ids=input_ids[:, past:],  # (B, T) -> (B, T - P)
        attention_mask=attention_mask,
        position_ids=positions[:, past:],
        use_cache=prefix is not None or longest > 1,
        logits_to_keep=1,
        **pass_cache(model, prefix.behind((1 - attention_mask).sum(dim=1)) if prefix else None),
    )
    scores = rule(out.logits[:, -1].float(), tokens[:, :, 0])  # (B, V), (B, C) -> (…, B, C)
    together = scores.shape[:-2]  # of one rule: ()
    if longest > 1:
        cache = returned_cache(out)
        cache.batch_repeat_interleave(most)
        rest = tokens[:, :, :-1].flatten(0, 1)  # (B, C, K) -> (B * C, K - 1)
        mask = torch.cat([attention_mask.repeat_interleave(most, dim=0), torch.ones_like(rest)], dim=1)
        after = positions[:, -1:].repeat_interleave(most, dim=0) + torch.arange(1, longest, device=device)
        counted = present[:, :, 1:].flatten(0, 1)  # (B * C, K - 1)
        inputs = {"input_ids": rest, "attention_mask": mask, "position_ids": after}
        found = answers_at(model, {**inputs, **pass_cache(model, cache), "use_cache": True}, counted)
        chosen = tokens[:, :, 1:].flatten(0, 1)[counted].unsqueeze(-1)  # (n, 1)
        later = torch.zeros(*together, counted.numel(), device=device)
        said = [rule(logits, chosen[span]) for span, logits in found.chunks()]  # (n, V), (n, 1) -> (…, n, 1)
        later[..., counted.flatten()] = torch.cat(said, dim=-2).squeeze(-1)
        scores = scores + later.view(*together, width, most, longest - 1).sum(dim=-1)
    scores = scores.cpu()
    return [scores[..., b, : len(row)].tolist() for b, row in enumerate(options)]


def _stacked(options: list[list[list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The candidates as (B, C, K) tokens, and which of them are there; elsewhere stands the row's first token."""
    most, longest = max(map(len, options)), max(len(tokens) for row in options for tokens in row)
    tokens = torch.tensor([row[0][0] for row in options], device=device)[:, None, None].repeat(1, most, longest)
    present = torch.zeros(len(options), most, longest, dtype=torch.bool, device=device)
    for b, row in enumerate(options):
        for c, candidate in enumerate(row):
            tokens[b, c, : len(candidate)] = torch.tensor(candidate, device=device)
            present[b, c, : len(candidate)] = True
    return tokens, present
