"""What a method is, and the small Protocols by which a stage asks what it can do (never by its name).

A method file stands alone: its config schema, and a class derived from :class:`Method` with the same name as the
file. It must import in milliseconds, because the command line reads every schema: torch and the adapter core are
imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.core import Adapter


class Method:
    """Base of every method: a checked config, and whatever capabilities the subclass adds."""

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any):
        self.config = config


@runtime_checkable
class Adapts(Protocol):
    """Can be trained: turns a loaded model into an adapted one (needed by ``train``)."""

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Wrap ``model`` in place, freeze what is not trained, and return the handle. Exact identity at the start."""
        ...


@dataclass
class Step:
    """What :class:`BeforeStep` and :class:`AfterStep` see of one optimizer step."""

    number: int  #: of this step, from 1
    total: int  #: steps of the whole run
    adapter: Adapter
    learning_rate: float  #: of this step
    dev_loss: Callable[[], torch.Tensor]  #: this process's share of the mean loss of a dev batch, with its graph
    average: Callable[[torch.Tensor], torch.Tensor]  #: mean over all processes


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
class Settles(Protocol):
    """Changes what is left of the adapter while it trains, down to its budget."""

    def settled(self) -> bool:
        """Whether the budget is reached: no earlier adapter is kept as the best, and none counts for patience."""
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


#: What each stage of a recipe asks of a method.
STAGE_NEEDS: dict[str, type] = {"train": Adapts, "evaluate": Method}
