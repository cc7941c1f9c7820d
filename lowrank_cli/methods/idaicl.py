"""IDAICL: in-context learning with implicit, infinite augmentation of the demonstrations; no weights change.

Zhou et al., "Enhancing In-Context Learning via Implicit Demonstration Augmentation", ACL 2024. With μ and Σ of the
demonstrations' features and the share π_y of each answer among them, the prediction for logits z = W h + b is

    ŷ = argmax_y  −log q(y) − τ log π_y,    −log q(y) = z_y − logsumexp_k( z_k + λ Δw_kᵀμ + (λ/2) Δw_kᵀ Σ Δw_k )

(see ``calibration/ida.py``). ``train`` fits μ, Σ and π, once for each template; ``evaluate`` predicts with them, with
``evaluate.shots`` demonstrations in the prompt: 0 uses the statistics only. With ``statistics: shown`` there is nothing
to fit before: each evaluation takes them from the demonstrations that it shows. λ = τ = 0 is plain in-context learning.
``calibration`` selects a method that the paper compares with, on the same demonstrations, or ``loo``, which is ours:
each demonstration shown is asked after the others, and their mean answer tells how far a set pushes the answers.

Reconstruction: the paper reads a demonstration's feature at its last position and leaves open whether that is after the
answer (``features: answer``) or before it (``features: prompt``). The score of an answer of several tokens is the sum
over its tokens, each by the rule above with the same μ and Σ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.protocol import Calibrates, Method, Plan, Probes
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    import torch

    from lowrank_cli.calibration.ida import TokenRule

CALIBRATIONS = ("ida", "none", "conca", "dconca", "proca", "loo")
CHOICES = ("random", "similar", "dissimilar", "imbalanced")
#: Names that metrics and arrangements use themselves.
TAKEN = ("std", "worst", "template", "draw", "permutation", "demonstrations", "oracle_all_sets", "oracle_each_set")
#: Keys that may differ among calibrations that share the model's passes.
BESIDE = ("calibration", "statistics", "strength", "tau", "probes", "unlabelled")


@dataclass
class IDAICLConfig(MethodConfig):
    """How answers are scored, which demonstrations are in the prompt, and over how many sets to report."""

    made_with: ClassVar[tuple[str, ...]] = ("features", "examples", "share", "channel")
    #: ``ida``; ``none`` (plain in-context learning); ``conca``, ``dconca`` (divided by what content-free inputs give);
    #: ``proca`` (a mixture over the answers' probabilities); ``loo``, of ours (divided by what the demonstrations shown
    #: give on average, each asked after the others)
    calibration: str = MISSING
    strength: float = MISSING  #: λ of ``ida``: how far features are augmented, at least 0
    tau: float = MISSING  #: τ of ``ida``: how much the answers' shares in D are made up for
    #: compare answers by their mean score over tokens, not by the sum. In the sum each token pays its own λ Δwᵀμ and
    #: (λ/2) Δwᵀ Σ Δw, some nats a token: ``ida`` puts answers of more tokens further back than plain scoring does
    normalize_length: bool = MISSING
    #: of which demonstrations μ, Σ and π are: of D (``train``), or of those ``shown`` to any query, as in the paper
    statistics: str = "train"
    features: str = MISSING  #: a demonstration's feature is read behind its ``answer``, or behind its ``prompt``
    examples: Optional[int] = MISSING  #: size of D, a random part of the training set; null takes all of it
    #: ``random``; the most ``similar`` or ``dissimilar`` to each query (cosine of features behind the prompts, the
    #: extreme one last); ``imbalanced``: random with a given ``share``
    demonstrations: str = MISSING
    share: Optional[float] = MISSING  #: of the first label, in D and among the demonstrations, where ``imbalanced``
    per_query: bool = False  #: draw demonstrations for each query, as in the paper; else one set serves all queries
    draws: int = MISSING  #: sets of demonstrations, disjoint as long as there are enough in D
    permutations: int = MISSING  #: orders of each set, the drawn one first
    templates: int = MISSING  #: wordings of the task (``task.template``, then ``task.templates``)
    probes: int = MISSING  #: content-free inputs of ``dconca``
    #: examples of D that ``proca`` is fitted on, their labels unread and none of them shown: at most so many. Only
    #: ``dconca`` too reads texts without labels, all of D, for its words
    unlabelled: int = MISSING
    #: name: keys, such as ``{plain: {calibration: none}}``: other calibrations of the same answers, out of the same
    #: passes of the model; their metrics end with the name
    beside: dict[str, Any] = field(default_factory=dict)
    strengths: list[float] = MISSING  #: values of ``strength`` of ``ida`` for a curve, out of the same passes too
    taus: list[float] = MISSING  #: values of ``tau`` for a curve, likewise
    #: score P(query | answer), with the answer in front of the query, as channel in-context learning does. ``ida`` then
    #: keeps Y × V numbers for the Y different tokens of the queries
    channel: bool = False
    #: also report what the best constant offset of each answer would give, one for all arrangements and one for each.
    #: These bounds are found with the labels of the queries: no calibration has them
    oracles: bool = False

    def unfit(self, made: Mapping[str, Any]) -> list[str]:
        """Also ``templates``, if more are asked for than were fitted, and ``statistics``, if none were."""
        more = self.templates > made.get("templates", 1)
        unmade = self.statistics == "train" and made.get("statistics", "train") != "train"
        return [*super().unfit(made), *["templates"] * more, *["statistics"] * unmade]

    def validate(self) -> None:
        require_choice("method.calibration", self.calibration, CALIBRATIONS)
        require_choice("method.statistics", self.statistics, ("train", "shown"))
        require_choice("method.features", self.features, ("answer", "prompt"))
        require_choice("method.demonstrations", self.demonstrations, CHOICES)
        require_range("method.strength", self.strength, 0)
        require_range("method.tau", self.tau, 0)
        for key in ("draws", "permutations", "templates", "probes", "unlabelled"):
            require_range(f"method.{key}", getattr(self, key), 1)
        for key in ("strengths", "taus"):
            for value in getattr(self, key):
                require_range(f"method.{key}", value, 0)
        if self.examples is not None:
            require_range("method.examples", self.examples, 2)
        if self.calibration == "proca" and self.demonstrations in ("similar", "dissimilar"):
            raise UserError(
                f"method.demonstrations: proca asks examples of D, whose most {self.demonstrations} is known"
            )
        if self.calibration == "loo" and (self.per_query or self.demonstrations in ("similar", "dissimilar")):
            raise UserError(
                "method.calibration: loo asks the demonstrations of a set, so all queries need the same set"
            )
        if self.share is None and self.demonstrations == "imbalanced":
            raise UserError(
                "method.share: missing; method.demonstrations=imbalanced needs the share of the first label, 0 to 1"
            )
        if self.share is not None and self.demonstrations != "imbalanced":
            raise UserError(
                f"method.share: {self.share} with method.demonstrations={self.demonstrations}; "
                f"a share goes with method.demonstrations=imbalanced, and only with it"
            )
        if self.share is not None:
            require_range("method.share", self.share, 0, 1)
        if self.draws > 1 and self.demonstrations in ("similar", "dissimilar"):
            raise UserError(
                f"method.draws: {self.draws}, but {self.demonstrations} demonstrations are not drawn; set 1"
            )
        for name, keys in self.beside.items():
            self._validate_beside(name, keys)

    def _validate_beside(self, name: str, keys: Any) -> None:
        where = f"method.beside.{name}"
        if name in TAKEN or not re.fullmatch(r"\w+", name):
            raise UserError(f"{where}: a name is made of letters, digits and _, and is none of {', '.join(TAKEN)}")
        if not isinstance(keys, Mapping):
            raise UserError(f"{where}: '{keys}' names no keys, such as {{calibration: none}}")
        for key, value in keys.items():
            require_choice(where, key, BESIDE)
            kind = str if key in ("calibration", "statistics") else int if key in ("probes", "unlabelled") else float
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"{where}.{key}: '{value}' is no {'text' if kind is str else 'number'}")
        if self.statistics == "shown" and keys.get("statistics") == "train":
            raise UserError(f"{where}.statistics: train needs method.statistics=train, with which they are fitted")
        try:
            self.other(**keys).validate()
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('method.')}") from None

    def other(self, **keys: Any) -> IDAICLConfig:
        """This configuration with other ``keys``, by itself."""
        return replace(self, beside={}, strengths=[], taus=[], **keys)


class IDAICL(Method):
    """Fits the statistics of the demonstrations and scores answers with them."""

    Config = IDAICLConfig
    config: IDAICLConfig

    def plan(self) -> Plan:
        c = self.config
        return Plan(
            choice=c.demonstrations,
            share=c.share,
            examples=c.examples,
            draws=c.draws,
            permutations=c.permutations,
            templates=c.templates,
            answered=c.features == "answer",
            normalize_length=c.normalize_length,
            per_query=c.per_query or c.demonstrations in ("similar", "dissimilar"),
            shown=c.statistics == "shown",
            channel=c.channel,
            oracles=c.oracles,
        )

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
        """Fit μ, the factor of Σ, and π."""
        from lowrank_cli.calibration.ida import statistics

        return vars(statistics(features, labels, classes))

    def rule(self, fitted: dict[str, torch.Tensor], head: torch.Tensor, tokens: Sequence[int]) -> TokenRule:
        from lowrank_cli.calibration.ida import IdaSoftmax, log_softmax

        if self.config.calibration != "ida":
            return log_softmax
        return IdaSoftmax(head, fitted["mean"], fitted["factor"], self.config.strength, tokens)

    def probes(self, columns: Mapping[str, Sequence[str]], unseen: Sequence[int], rng: Random) -> Probes:
        """ConCa's content-free inputs; D-ConCa's random words of the domain; PROCA's unlabelled examples."""
        from lowrank_cli.calibration.contextual import CONTENT_FREE, random_texts

        kind = self.config.calibration
        if kind == "conca":
            return Probes([dict.fromkeys(columns, text) for text in CONTENT_FREE])
        if kind == "dconca":
            drawn = [random_texts(texts, self.config.probes, rng) for texts in columns.values()]
            return Probes([dict(zip(columns, row, strict=True)) for row in zip(*drawn, strict=True)])
        if kind == "proca":
            if not unseen:
                raise UserError("evaluate.shots: all examples are shown, and proca is fitted on others; show fewer")
            return Probes(examples=rng.sample(unseen, min(self.config.unlabelled, len(unseen))))
        return Probes(left_out=kind == "loo")

    def adjust(self, fitted: dict[str, torch.Tensor], probes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        from lowrank_cli.calibration import contextual, prototypes
        from lowrank_cli.calibration.ida import prior

        kind = self.config.calibration
        if kind == "ida":
            return scores - prior(fitted["shares"], self.config.tau).to(scores)
        if kind == "conca":
            return scores - contextual.bias(probes)
        if kind in ("dconca", "loo") and probes.shape[-2]:  # without demonstrations none is asked
            return scores - contextual.bias(probes.log_softmax(dim=-1))
        if kind == "proca":
            return prototypes.fit(probes, seed=0).posterior(scores)
        return scores

    def variants(self) -> dict[str, dict[float, Calibrates]]:
        c = self.config
        curves: dict[str, dict[float, Calibrates]] = {
            "strength": {v: IDAICL(c.other(calibration="ida", strength=v)) for v in sorted(c.strengths)},
            "tau": {v: IDAICL(c.other(calibration="ida", tau=v)) for v in sorted(c.taus)},
        }
        return {key: methods for key, methods in curves.items() if methods}

    def beside(self) -> dict[str, Calibrates]:
        return {name: IDAICL(self.config.other(**keys)) for name, keys in self.config.beside.items()}
