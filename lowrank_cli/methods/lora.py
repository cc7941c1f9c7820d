"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685, section 4.1).

y = W x + s · B A drop(x),   s = alpha / rank,   A: (R, I) Kaiming-uniform, B: (O, R) zero

Two variants are settings. Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732) has s = alpha / √rank, so that
updates do not shrink as the rank grows. LoRA+ (Hayou et al., ICML 2024, arXiv 2402.12354) trains B with a higher
learning rate than A.

With a rank pattern each module has its own R, and s stays alpha / ``rank`` for all. This trains an allocation of ALoRA
or ``lrk prune`` from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, require_range
from lowrank_cli.methods.protocol import Method
from lowrank_cli.reader import read_json
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.low_rank import LowRank
    from lowrank_cli.adapter.target_sites import Site


@dataclass
class LowRankConfig(MethodConfig):
    """Settings of every low-rank module."""

    made_with: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    rank: int = MISSING  #: R, at most the smaller side of any target
    alpha: float = MISSING  #: the update is scaled by alpha / rank
    dropout: float = MISSING  #: probability of zeroing an input of A during training

    def validate(self) -> None:
        require_range("method.rank", self.rank, 1)
        if not self.alpha > 0:
            raise UserError(f"method.alpha: {self.alpha} must be above 0, or the update is nothing")
        require_range("method.dropout", self.dropout, 0, 0.99)


@dataclass
class LoRAConfig(LowRankConfig):
    """One low-rank module on each target linear."""

    made_with: ClassVar[tuple[str, ...]] = ("rank", "alpha", "target_modules", "rslora")
    start_rank_key: ClassVar[str] = "rank"  #: what sets ``start_rank``
    #: ``all``, roles (Q K V O attention; G U D gate, up, down), or names of linears (``q_proj`` or a full path)
    target_modules: list[str] = MISSING
    rslora: bool = False  #: scale by alpha / √rank instead of alpha / rank
    b_learning_rate_ratio: float = 1.0  #: learning rate of B over that of A (LoRA+); LoRA+'s paper advises 16

    def validate(self) -> None:
        super().validate()
        if not 0 < self.b_learning_rate_ratio < math.inf:
            raise UserError(f"method.b_learning_rate_ratio: {self.b_learning_rate_ratio} must be above 0 and finite")
        if not self.target_modules:
            raise UserError("method.target_modules: the list is empty; name roles (Q K V O G U D), linears, or all")

    @property
    def start_rank(self) -> int:
        """The rank of a fresh module."""
        return self.rank

    @property
    def scaled_alpha(self) -> float:
        """s times the rank of a fresh module."""
        return self.alpha * math.sqrt(self.start_rank) if self.rslora else self.alpha

    def module_ranks(self) -> dict[str, int]:
        """The rank of each module by its key; empty if all have ``start_rank``."""
        return {}


@dataclass
class PatternConfig(LoRAConfig):
    """LoRA's own settings."""

    #: JSON file, module → rank (``adapter/rank_pattern.json`` of a run whose ranks moved); modules not in it get none
    rank_pattern: Optional[str] = None
    #: the file's content, so that a run holds its ranks
    ranks: dict[str, int] = field(
        default_factory=dict,
        metadata={"given_by": 'method.rank_pattern=FILE (JSON, module: rank: {"model.layers.0.mlp.up_proj": 4})'},
    )

    def values_from_files(self, given: Collection[str]) -> dict[str, Any]:
        if self.rank_pattern is None or (self.ranks and "rank_pattern" not in given):
            return {}
        return {"ranks": read_pattern(self.rank_pattern)}

    def module_ranks(self) -> dict[str, int]:
        return self.ranks


def read_pattern(path: str) -> dict[str, int]:
    """The ranks by module in a file. Raises UserError if the file is not a rank pattern."""
    if Path(path).is_dir():
        inside = [file for name in ("", "adapter") if (file := Path(path) / name / "rank_pattern.json").is_file()]
        hint = f"; did you mean '{inside[0]}'?" if inside else ", and no run whose ranks have moved"
        raise UserError(f"method.rank_pattern: '{path}' is a folder, not a JSON file{hint}")
    try:
        ranks = read_json(Path(path))
    except UserError as error:
        raise UserError(f"method.rank_pattern: {error}") from None
    if not isinstance(ranks, dict) or not ranks or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise UserError(
            f"method.rank_pattern: '{path}' must hold ranks of 1 or more by module, such as {{\"model.layers.0.mlp"
            f'.up_proj": 8}}'
        )
    return ranks


class LoRA(Method):
    """Freezes the model and trains one low-rank module for each target linear."""

    Config: ClassVar[type[LoRAConfig]] = PatternConfig
    config: LoRAConfig

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target linears. Raises UserError if the model lacks one, or one is smaller than its rank."""
        from lowrank_cli.adapter.ranks import require_ranks
        from lowrank_cli.adapter.target_sites import find_sites, require_rank

        config = self.config
        sites = find_sites(model, list(config.target_modules))
        require_rank(sites, config.start_rank, config.start_rank_key)
        require_ranks({site.key: site for site in sites}, config.module_ranks(), "method.rank_pattern")
        return sites

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Wrap the target linears of ``model``; a classification head, if any, trains in full."""
        from lowrank_cli.adapter.adapted_model import inject
        from lowrank_cli.adapter.ranks import rebuild

        config, sites, kind = self.config, self.sites(model), self.kind()
        rank, alpha = config.start_rank, config.scaled_alpha
        adapter = inject(model, sites, rank=rank, alpha=alpha, dropout=config.dropout, kind=kind)
        if ranks := config.module_ranks():
            rebuild(adapter, ranks, "method.rank_pattern")
            adapter.initial_ranks = adapter.ranks()
        return adapter

    def kind(self) -> Callable[..., LowRank]:
        """The class or factory of the low-rank modules, see :func:`lowrank_cli.adapter.adapted_model.inject`."""
        from lowrank_cli.adapter.low_rank import LowRank

        return LowRank

    def learning_rates(self, adapter: Adapter, peak: float) -> dict[str, float]:
        """That of every B, if LoRA+'s ratio sets it apart."""
        ratio = self.config.b_learning_rate_ratio
        return {name: ratio * peak for name in adapter.trained if name.endswith(".lora_B.weight") and ratio != 1}
