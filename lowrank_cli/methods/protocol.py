"""What a method is, and the small Protocols by which a stage asks what it can do (never by its name).

A method file stands alone: its config schema, and a class derived from :class:`Method` with the same name as the
file. It must import in milliseconds, because the command line reads every schema: torch and the adapter core are
imported inside functions.
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
    from lowrank_cli.calibration.ida import TokenRule
    from lowrank_cli.scoring.probe import Probe


class Method:
    """Base of every method: a checked config, and whatever capabilities the subclass adds."""

    Config: ClassVar[type[MethodConfig]]
    #: Why no single weight equals an adapted one, where none does: such an adapter is neither merged nor exported.
    unmergeable: ClassVar[str] = ""
    #: Why ranks are not judged one by one, where they are not: such an adapter is neither scored nor pruned.
    unprunable: ClassVar[str] = ""
    #: Decoding speed that the method's paper reports, relative to another method, by its name and the number of beams.
    published_speed: ClassVar[Mapping[tuple[str, int], float]] = {}

    def __init__(self, config: Any):
        self.config = config

    def rewrites(self) -> str:
        """What this method writes into the model's weights, where it does: then they cannot be quantised."""
        return ""

    def dev_use(self) -> str:
        """What this method does with dev batches while it trains, where it does something."""
        return ""

    def alone(self) -> str:
        """Why several processes cannot share this method's training, where they cannot."""
        return ""


@runtime_checkable
class Adapts(Protocol):
    """Can be trained: turns a loaded model into an adapted one (needed by ``train``)."""

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Wrap ``model`` in place, freeze what is not trained, and return the handle. Exact identity at the start."""
        ...


def _unwatched(name: str, units: int) -> AbstractContextManager[Callable[[int], None]]:
    """Nobody looks on."""
    return nullcontext(lambda done: None)


@dataclass
class Step:
    """What :class:`BeforeStep` and :class:`AfterStep` see of one optimizer step."""

    number: int  #: of this step, from 1
    total: int  #: steps of the whole run
    adapter: Adapter
    learning_rate: float  #: of this step
    #: this process's share of the mean loss of a dev batch, with its graph: this step's own, or that of a given number
    dev_loss: Callable[..., torch.Tensor]
    average: Callable[[torch.Tensor], torch.Tensor]  #: mean over all processes
    epoch: int = 1  #: steps of one pass over the training set
    tokens: float = 0.0  #: that all steps of the run read, about
    optimizer: torch.optim.Optimizer | None = None  #: of the trained tensors that the method does not step itself
    #: a fixed batch of so many dev examples to score ranks on, with so many tokens a pass
    probe: Callable[[int, int], Probe] | None = None
    log: Callable[[dict[str, Any]], None] = lambda row: None  #: a line for history.jsonl
    say: Callable[[str], None] = lambda line: None  #: a line for who watches
    #: a bar of its own for so many units of something slow; what it gives counts units that are done
    watch: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _unwatched


@dataclass
class Start:
    """What :class:`Prepares` sees of a training that is about to start."""

    adapter: Adapter
    read: Callable[
        [int], None
    ]  #: one forward pass over so many training prompts, drawn by the seed; the same everywhere
    average: Callable[[torch.Tensor], torch.Tensor]  #: mean over all processes
    log: Callable[[dict[str, Any]], None]  #: a line for history.jsonl
    say: Callable[[str], None]  #: a line for who watches


@runtime_checkable
class Prepares(Protocol):
    """Looks at training prompts before the first step of a fresh adapter, not of one that is trained on or resumed."""

    def prepare(self, start: Start) -> None: ...


@runtime_checkable
class OwnRates(Protocol):
    """Trains some tensors at another learning rate than ``train.learning_rate``."""

    def learning_rates(self, adapter: Adapter) -> dict[str, float]:
        """Peak learning rates by the names of ``adapter.trained``; tensors that are not in it have the run's."""
        ...


@runtime_checkable
class BeforeStep(Protocol):
    """Sees the weights together with their gradients (averaged over processes, clipped) before the optimizer steps."""

    def before_step(self, step: Step) -> None: ...


@runtime_checkable
class AfterStep(Protocol):
    """Acts between optimizer steps, and owns state that a checkpoint must hold."""

    def after_step(self, step: Step) -> None: ...

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that :meth:`load_state` needs to continue bit for bit."""
        ...

    def load_state(self, adapter: Adapter, state: dict[str, torch.Tensor]) -> None: ...


@runtime_checkable
class StepsOnDev(Protocol):
    """Steps some tensors itself, on dev batches between the training steps."""

    @property
    def dev_every(self) -> int:
        """Training steps for each of :meth:`dev_step`; 0 for none."""
        ...

    def dev_step(self, step: Step) -> None: ...


@runtime_checkable
class Settles(Protocol):
    """Changes what is left of the adapter while it trains, down to its budget."""

    def unsettled(self) -> str | None:
        """Why the adapter as it is now is not kept as the best and does not count for patience; None: it does."""
        ...


@runtime_checkable
class AddsLoss(Protocol):
    """Adds a term to the training loss of the forward pass that just ran: of one process's one accumulated batch."""

    def extra_loss(self, adapter: Adapter) -> torch.Tensor: ...


@runtime_checkable
class Observes(Protocol):
    """Reports what it did on the prompts of an evaluation: flat metrics and figures (see ``report/plots.py``)."""

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """What happened since it was last asked, without training passes; ``add_up`` sums over processes."""
        ...


@runtime_checkable
class Doubts(Protocol):
    """Tells from the metrics that it observed whether something is wrong."""

    def doubt(self, observed: Mapping[str, float]) -> str | None:
        """One line for who reads the result, or None."""
        ...


@dataclass(frozen=True)
class Plan:
    """The demonstrations that a :class:`Calibrates` asks for. D is the set that all of them are drawn from."""

    choice: str  #: ``random``, ``similar``, ``dissimilar`` or ``imbalanced``
    share: float | None  #: of the first label in D and among the demonstrations, where ``imbalanced``
    examples: int | None  #: size of D; None for all training examples
    draws: int  #: sets of demonstrations
    permutations: int  #: orders of each set
    templates: int  #: wordings, the task's own first
    answered: bool  #: features are read behind a demonstration's answer, not behind its prompt
    normalize_length: bool  #: answers are compared by their mean score over tokens, not by the sum


@runtime_checkable
class Calibrates(Protocol):
    """Answers in context with a model that it leaves as it is: ``train`` fits tensors that are no weights."""

    def plan(self) -> Plan: ...

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
        """What is to be kept of D: features (n, D) that the language model's head reads, labels (n,)."""
        ...

    def rule(self, fitted: dict[str, torch.Tensor], head: torch.Tensor, tokens: Sequence[int]) -> TokenRule:
        """How logits score the answers' ``tokens``, under a head (V, D)."""
        ...

    def probes(
        self, columns: Mapping[str, Sequence[str]], unseen: Sequence[int], rng: Random
    ) -> tuple[list[dict[str, str]], list[int]]:
        """What is asked besides the queries: texts for each column instead of an input's, and some of D's examples.

        ``columns`` are D's texts in each column of the template; ``unseen`` are the indices of its examples that do
        not stand in the prompt, of which the second list is a part.
        """
        ...

    def adjust(self, fitted: dict[str, torch.Tensor], probes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Answer scores (N, C), higher is better, given those of the probes (M, C)."""
        ...

    def variants(self) -> dict[str, dict[float, Calibrates]]:
        """For each key whose curve is asked for, the method with each value of it.

        All share plan, probes and fitted tensors: one pass of the model serves them all.
        """
        ...


#: What each stage of a recipe asks of a method: one of these capabilities.
STAGE_NEEDS: dict[str, tuple[type, ...]] = {
    "train": (Adapts, Calibrates),
    "score": (Adapts,),
    "prune": (Adapts,),
    "evaluate": (Method,),
    "export": (Adapts, Calibrates),
    "generate": (Method,),
}
