"""Calibration in ``transformers``' ``generate``: only the answers can be generated, scored by IDA-Softmax.

    processor = AnswerProcessor.from_folder("RUN/statistics", model, tokenizer.eos_token_id)
    model.generate(**prompts, logits_processor=[processor], num_beams=processor.beams, length_penalty=0.0, …)

A processor serves any number of calls. The scores of a finished answer sum to −Σ log q of its tokens − τ log π. With as
many beams as answers (``beams``) no answer is lost and the best one is returned; if all answers are single distinct
tokens, greedy decoding gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from lowrank_cli.adapter.adapted_model import fingerprint
from lowrank_cli.calibration import statistics_files
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.calibration.ida import IdaSoftmax, TokenRule, prior
from lowrank_cli.errors import UserError
from lowrank_cli.reader import Finite, check

TENSORS = ("mean", "factor", "shares")  #: names of the tensors of each wording
SUPPORTED = {
    "calibration": "ida",
    "normalize_length": False,
    "channel": False,
}  #: settings of the method that ``generate`` can follow


class Settings(TypedDict):
    """The method's settings that determine an answer's score."""

    calibration: str
    normalize_length: bool
    strength: Finite
    tau: Finite
    channel: NotRequired[bool]  #: earlier versions had none


class AnswerProcessor(LogitsProcessor):
    """Restricts ``generate`` to ``answers`` (token ids); ``bonus`` (C,) is added once to each answer's score.

    The input of the first step of a call is taken as the prompts. A new call is recognised by its length and prompts;
    call :meth:`reset` before a prompt that equals the last one plus the token just generated for it.
    """

    def __init__(self, rule: TokenRule, answers: Sequence[Sequence[int]], bonus: Sequence[float], eos: int):
        self.rule, self.eos = rule, eos
        self.beams = len(answers)
        #: tokens so far -> by next token, whether it is scored, and what is added to its score
        self.following: dict[tuple[int, ...], dict[int, tuple[bool, float]]] = {}
        ends = [tuple(answer) if answer[-1] == eos else (*answer, eos) for answer in answers]
        for answer, end, more in zip(answers, ends, bonus, strict=True):
            decided = next(n for n in range(1, len(end) + 1) if sum(other[:n] == end[:n] for other in ends) == 1)
            for at, token in enumerate(end):
                added = more if at + 1 == decided else 0.0
                self.following.setdefault(end[:at], {})[token] = (at < len(answer), added)
        self.reset()

    @classmethod
    def from_folder(cls, folder: str | Path, model: PreTrainedModel, eos: int, template: int = 0) -> AnswerProcessor:
        """Load the ``statistics`` folder of a run or its ``export``.

        Args:
            model: the model that they were fitted with. If it had an adapter, it needs that too, applied or merged;
                then only width and vocabulary are checked, since merging changes every weight.
            eos: id of the end-of-sequence token.
            template: index of the wording.

        Raises:
            UserError: statistics of another model, or of settings that ``generate`` cannot follow: a calibration
                other than ``ida``, scores divided by the answers' lengths, a label without a share while τ > 0.
        """
        tensors, about = statistics_files.load(Path(folder))
        settings = about["method"]
        check(settings, Settings, str(Path(folder) / statistics_files.ABOUT), "method")
        names = [f"{template}.{name}" for name in TENSORS]
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"{folder}: {statistics_files.TENSORS} has no '{missing[0]}'")
        mean, factor, shares = (tensors[name] for name in names)
        for key, supported in SUPPORTED.items():
            if settings.get(key, supported) != supported:
                raise UserError(
                    f"{folder}: these statistics go with method.{key}={settings[key]}; "
                    f"in generate answers are scored with method.{key}={supported}"
                )
        head = head_weight(model)  # (V, D)
        known = about["adapter"] is not None or fingerprint(model) == about["fingerprint"]
        if not known or head.shape != (about["vocabulary"], len(mean)):
            raise UserError(f"{folder}: these statistics belong to another model ({about['model']})")
        by_template = about.get("answers_by_template", [about["answers"]] * len(about["templates"]))
        if len(by_template) != len(about["templates"]):
            raise UserError(f"{folder}: {statistics_files.ABOUT} does not list the answers of each template")
        answers = by_template[template]
        tokens = {token for answer in answers for token in answer}
        rule = IdaSoftmax(head, mean, factor, settings["strength"], tokens)
        return cls(rule, answers, (-prior(shares, settings["tau"])).tolist(), eos)

    def reset(self) -> None:
        """Forget the prompts of the last call."""
        self.start, self.length = 0, -1  # number of tokens in the prompts, and in the input of the last step
        self.prompts: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token (N, V), from log probabilities or logits (a constant cancels)."""
        prompts = {tuple(row) for row in input_ids[:, : self.start].tolist()}
        if input_ids.shape[1] != self.length + 1 or not prompts <= self.prompts:
            self.start, self.prompts = input_ids.shape[1], {tuple(row) for row in input_ids.tolist()}
        self.length = input_ids.shape[1]
        out = torch.full_like(scores, -torch.inf)
        for row, generated in enumerate(input_ids[:, self.start :].tolist()):
            follow = self.following.get(tuple(generated))
            if follow is None:  # finished, or an unused beam
                out[row, self.eos] = 0.0
                continue
            for token, (scored, added) in follow.items():
                chosen = torch.tensor([[token]], device=scores.device)
                value = self.rule(scores[row : row + 1].float(), chosen).item() if scored else 0.0
                out[row, token] = value + added
        return out
