"""``eval=lm_eval``: tasks of the lm-evaluation-harness instead of the run's own task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range


@dataclass
class HarnessConfig:
    """What the lm-evaluation-harness measures."""

    tasks: list[str] = MISSING  #: tasks or groups by the harness's names
    num_fewshot: Optional[int] = MISSING  #: demonstrations in front of each prompt; null: as each task says
    limit: Optional[int] = MISSING  #: examples of each task, the first ones; null: all
    #: a folder of your own task files (YAML), which may name Python functions to call: give only one that you trust
    include_path: Optional[str] = MISSING
    max_length: Optional[int] = MISSING  #: tokens of prompt and answer together; null: as many as the model has

    @property
    def label(self) -> str:
        """The tasks in a name: at most three, else the first and how many more."""
        first, *more = self.tasks
        return "+".join(self.tasks) if len(more) < 3 else f"{first}+{len(more)}"

    def validate(self) -> None:
        if not self.tasks:
            raise UserError("eval.tasks: the list is empty; name a task, such as eval.tasks=[hellaswag]")
        for key, low in (("num_fewshot", 0), ("limit", 1), ("max_length", 2)):
            if (value := getattr(self, key)) is not None:
                require_range(f"eval.{key}", value, low)
