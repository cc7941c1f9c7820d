"""The base class of methods, and the Protocols by which a stage asks what a method can do (never by its name).

A method file holds a config schema and one class derived from :class:`Method`. It must import in milliseconds, because
the command line reads every schema: torch and the adapter core are imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.target_sites import Site
    from lowrank_cli.calibration.ida import TokenRule
    from lowrank_cli.scoring.probe import Probe


#: The mean of a tensor over all processes.
Average = Callable[["torch.Tensor"], "torch.Tensor"]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The :data:`Average` of one process."""
    return tensor


class Method:
    """Base of every method: a validated config. Subclasses add capabilities."""

    Config: ClassVar[type[MethodConfig]]
    #: Why the adapter cannot be merged into single weights; empty if it can be merged and exported.
    unmergeable: ClassVar[str] = ""
    #: Why ranks cannot be judged one by one; empty if the adapter can be scored and pruned.
    unprunable: ClassVar[str] = ""
    #: Decoding speed that the method's paper reports, relative to another method, by its name and the number of beams.
    published_speed: ClassVar[Mapping[tuple[str, int], float]] = {}

    def __init__(self, config: Any):
        self.config = config

    def rewrites(self) -> str:
        """How this method changes the model's own weights, which then cannot be quantised; empty if it does not."""
        return ""

    def dev_use(self) -> str:
        """How this method uses dev batches in training; empty if it does not."""
        return ""

    def needs_adam(self) -> str:
        """How this method uses Adam's moments; empty if any optimizer can train it."""
        return ""

    def kept_bytes(self, adapter: Adapter) -> int:
        """Memory that training keeps on the device besides the adapter and its optimizer."""
        return 0

    def rate_scale(self) -> float:
        """The usual learning rate of this method, in relation to that of LoRA."""
        return 1.0

    def needs_prompt(self) -> str:
        """What this method does with the tokens of a prompt, which an image has not; empty if it works without."""
        return ""

    def undivided(self) -> str:
        """Why processes cannot divide the model's own weights while this method trains; empty if they can."""
        return ""


@runtime_checkable
class Adapts(Protocol):
    """Can be trained: turns a loaded model into an adapted one."""

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Adapt ``model`` in place, freeze the rest, and return the handle. The function must not change."""
        ...


@runtime_checkable
class ChoosesSites(Protocol):
    """Adapts some linears of a model, and knows from their names and shapes whether its settings fit."""

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """What :meth:`Adapts.adapt` wraps.

        No weight is read: ``model`` may be on torch's meta device.

        Raises:
            UserError: the method's settings do not fit the model.
        """
        ...


def _no_progress(name: str, units: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda done: None)


@dataclass
class Step:
    """One optimizer step, as :class:`BeforeStep` and :class:`AfterStep` see it."""

    number: int  #: from 1
    total: int  #: steps of the whole run
    adapter: Adapter
    learning_rate: float  #: of this step
    #: this process's share of the mean loss of this step's dev batch, or of the one with a given number, with its graph
    dev_loss: Callable[..., torch.Tensor]
    average: Average
    epoch: int = 1  #: steps of one pass over the training set
    tokens: float = 0.0  #: approximate number of tokens in all steps of the run
    optimizer: torch.optim.Optimizer | None = None  #: steps the trained tensors, except deferred ones
    #: (examples, tokens of one pass) -> a fixed batch of dev examples to score ranks on
    probe: Callable[[int, int], Probe] | None = None
    log: Callable[[dict[str, Any]], None] = lambda row: None  #: writes a line of history.jsonl
    say: Callable[[str], None] = lambda line: None  #: prints a line
    #: (title, units) -> a progress bar for slow work; call what it yields with the number of units done
    watch: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _no_progress
    agree: Callable[[], None] = lambda: None  #: gives all processes the adapter of the first


@dataclass
class Start:
    """The start of a training, as :class:`Prepares` sees it."""

    adapter: Adapter
    #: one forward pass over a number of training prompts drawn by the seed, the same in all processes
    read: Callable[[int], None]
    average: Average
    log: Callable[[dict[str, Any]], None]  #: writes a line of history.jsonl
    say: Callable[[str], None]  #: prints a line


@runtime_checkable
class Prepares(Protocol):
    """Reads training prompts before the first step of a fresh adapter (not of a continued or resumed one)."""

    def prepare(self, start: Start) -> None: ...


@runtime_checkable
class OwnRates(Protocol):
    """Trains some tensors with another learning rate than ``train.learning_rate``."""

    def learning_rates(self, adapter: Adapter, peak: float) -> dict[str, float]:
        """Peak learning rates by name in ``adapter.trained``; others use the run's, which is ``peak``."""
        ...


@runtime_checkable
class BeforeStep(Protocol):
    """Acts before each optimizer step, with gradients of all processes, clipped."""

    def before_step(self, step: Step) -> None: ...


@runtime_checkable
class AfterStep(Protocol):
    """Acts after each optimizer step, and has state for checkpoints."""

    def after_step(self, step: Step) -> None: ...

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors from which :meth:`load_state` continues, bit for bit."""
        ...

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None: ...


@runtime_checkable
class StepsOnDev(Protocol):
    """Steps some tensors itself, on dev batches."""

    @property
    def dev_every(self) -> int:
        """Number of training steps for each :meth:`dev_step`; 0: no dev steps."""
        ...

    def dev_step(self, step: Step) -> None: ...


@runtime_checkable
class Settles(Protocol):
    """Changes the adapter's ranks in training until they fit its budget."""

    def unsettled(self) -> str | None:
        """Why the current adapter cannot be kept as the best, nor count for patience; None if it can."""
        ...


@runtime_checkable
class AddsLoss(Protocol):
    """Adds a term to the training loss of the last forward pass (one accumulated batch)."""

    def extra_loss(self, adapter: Adapter, average: Average = same) -> torch.Tensor:
        """A value whose mean over processes, which is what ``average`` gives, is the term."""
        ...


@runtime_checkable
class Observes(Protocol):
    """Reports metrics and figures (see ``report/plots.py``) of an evaluation."""

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and figures since the last call, training passes excluded; ``add_up`` sums over processes."""
        ...


@runtime_checkable
class Diagnoses(Protocol):
    """Recognises problems in the metrics that it observed."""

    def diagnosis(self, observed: Mapping[str, float]) -> str | None:
        """The problem in one line, or None."""
        ...


@dataclass(frozen=True)
class Plan:
    """The demonstrations that a :class:`Calibrates` asks for, drawn from a set D."""

    choice: str  #: ``random``, ``similar``, ``dissimilar`` or ``imbalanced``
    share: float | None  #: of the first label in D and among the demonstrations, if ``imbalanced``
    examples: int | None  #: size of D; None for all training examples
    draws: int  #: sets of demonstrations
    permutations: int  #: orders of each set
    templates: int  #: wordings, the task's own first
    answered: bool  #: read features after a demonstration's answer instead of after its prompt
    normalize_length: bool  #: compare answers by the mean score of their tokens instead of the sum
    per_query: bool = False  #: each query has demonstrations of its own
    shown: bool = False  #: fit the demonstrations that are shown, instead of D
    channel: bool = False  #: score the query after each answer instead of the answers after the query
    oracles: bool = False  #: report what offsets chosen with the queries' labels would give


@dataclass(frozen=True)
class Probes:
    """Inputs that a :class:`Calibrates` scores besides the queries; one kind of them, or none."""

    texts: Sequence[Mapping[str, str]] = ()  #: artificial inputs: a text for each column of the template
    examples: Sequence[int] = ()  #: indices of examples of D that are not in the prompt
    left_out: bool = False  #: every demonstration, after the other ones of its set


@runtime_checkable
class Calibrates(Protocol):
    """Calibrates in-context answers of an unchanged model: ``train`` fits tensors, not weights."""

    def plan(self) -> Plan: ...

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
        """Fit demonstrations: features (n, D), the inputs of the language model's head, and labels (n,)."""
        ...

    def rule(self, fitted: dict[str, torch.Tensor], head: torch.Tensor, tokens: Sequence[int]) -> TokenRule:
        """The rule by which logits score the answers' ``tokens``, for a head (V, D)."""
        ...

    def probes(self, columns: Mapping[str, Sequence[str]], unseen: Sequence[int], rng: Random) -> Probes:
        """Further inputs to score, besides the queries.

        Args:
            columns: D's texts for each column of the template.
            unseen: indices of the examples of D that are not in the prompt.
        """
        ...

    def adjust(self, fitted: dict[str, torch.Tensor], probes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Calibrated answer scores (N, C), higher is better.

        Args:
            probes: scores of the probes (M, C); of artificial inputs (N, M, C) where each query has demonstrations of
                its own, after which they are scored.
        """
        ...

    def variants(self) -> dict[str, dict[float, Calibrates]]:
        """For each key with a curve to plot, the method at each value; all show the same demonstrations."""
        ...

    def beside(self) -> dict[str, Calibrates]:
        """Further calibrations to report, by name; all show the same demonstrations."""
        ...


#: The capabilities that each stage of a recipe accepts; a method needs one of them.
STAGE_NEEDS: dict[str, tuple[type, ...]] = {
    "train": (Adapts, Calibrates),
    "import": (Adapts,),
    "score": (Adapts,),
    "prune": (Adapts,),
    "evaluate": (Method,),
    "export": (Adapts, Calibrates),
    "generate": (Method,),
    "serve": (Method,),
}
