"""FanLoRA: the few LoRA modules that matter are selected once, on instruction data, and used for every task.

After Tian et al., "FanLoRA: Fantastic LoRAs and Where to Find Them in Large Language Model Fine-tuning" (EMNLP 2024
Industry Track, pages 515–528), from its abstract alone, which fixes four steps: (a) fine-tune LoRA on all linears on a
large instruction set, (b) score the importance of every module, (c) keep the most critical ones of each layer, (d)
fine-tune downstream tasks with those alone. Steps b and c are ``lrk score score.level=module`` and ``lrk prune
prune.keep=N``, which give a selection; this method is step d, plain LoRA on the modules of a selection.

Reconstructions: the importance score (:mod:`lowrank_cli.scoring.module_scores`); how many modules a layer keeps; the
rank, which is raised to

    r' = round(r · Σ (I + O) over all roles / Σ (I + O) over the selected modules)

so that FanLoRA trains as many parameters as LoRA with rank r on all roles; the scale stays alpha / r.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError
from lowrank_cli.methods.lora import LowRankConfig
from lowrank_cli.methods.protocol import Method
from lowrank_cli.scoring.selection import read

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.target_sites import Site

#: The selection that ``lrk run recipe=fanlora`` gives for the bundled model.
BUNDLED = Path(__file__).parent.parent / "assets" / "tiny_llama_setting.yaml"


@dataclass
class FanLoRAConfig(LowRankConfig):
    """Which modules train, and how large they are. ``rank`` is that of the LoRA whose parameters are matched."""

    made_with: ClassVar[tuple[str, ...]] = ("rank", "alpha", "match_parameters")
    setting: Optional[str] = MISSING  #: a file of ``lrk prune`` or written by hand; null is the bundled model's
    match_parameters: bool = MISSING  #: raise the rank to the parameters of LoRA on all roles, or keep it
    chosen_by: Optional[str] = MISSING  #: what comparisons call the setting; null takes the name in the file
    #: layer, or ``all``, → roles; taken from the file, so that a run holds its modules
    layers: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={"given_by": "method.setting=FILE (YAML, layer: roles, such as layers: {all: [V, D]})"},
    )

    def values_from_files(self, given: Collection[str]) -> dict[str, Any]:
        if self.layers and "setting" not in given:
            return {}
        selection = read(self.setting or BUNDLED)
        return {"layers": selection.layers} | ({} if "chosen_by" in given else {"chosen_by": selection.name})

    def unfit(self, made: Mapping[str, Any]) -> list[str]:
        """Keys whose values do not go with what a run with the values ``made`` keeps.

        ``setting`` is one if it selects other modules.
        """
        return [*super().unfit(made), *(["setting"] if "layers" in made and made["layers"] != self.layers else [])]


class FanLoRA(Method):
    """LoRA on the modules of a selection, with as many parameters as LoRA on all."""

    Config = FanLoRAConfig
    config: FanLoRAConfig

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The selected modules. Raises UserError if the model lacks these layers or roles, or they are too small."""
        from lowrank_cli.adapter.target_sites import known_sites
        from lowrank_cli.scoring.selection import fitting

        config, every = self.config, known_sites(model)
        try:
            sites = fitting(config.layers, every, model.config.model_type)
        except UserError as error:
            if config.setting or not config.chosen_by:
                raise
            raise UserError(
                f"method.setting: none is given, and the bundled model's does not fit here "
                f"({str(error).removeprefix('method.setting: ')}); to find one for this model: lrk train method=lora, "
                f"then lrk score score.level=module, then lrk prune prune.keep=2"
            ) from None
        self._rank(every, sites)
        return sites

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Wrap the selected modules."""
        from lowrank_cli.adapter.adapted_model import inject
        from lowrank_cli.adapter.target_sites import known_sites

        config, sites = self.config, self.sites(model)
        rank = self._rank(known_sites(model), sites)
        return inject(model, sites, rank=rank, alpha=config.alpha * rank / config.rank, dropout=config.dropout)

    def _rank(self, every: list[Site], kept: list[Site]) -> int:
        """The rank at which ``kept`` have as many parameters as ``every`` site with ``method.rank``, if matched.

        Raises UserError if it exceeds the smaller side of a site.
        """
        from lowrank_cli.adapter.target_sites import require_rank

        if not self.config.match_parameters:
            require_rank(kept, self.config.rank, "rank")
            return self.config.rank
        all_features, kept_features = (sum(s.in_features + s.out_features for s in sites) for sites in (every, kept))
        rank = max(1, round(self.config.rank * all_features / kept_features))
        small = min(kept, key=lambda site: min(site.in_features, site.out_features))
        most = min(small.in_features, small.out_features)
        if rank > most:
            raise UserError(
                f"method.rank: the parameters of rank {self.config.rank} on all roles make rank {rank} on these "
                f"modules, above the {most} of '{small.key}'; lower it, or set method.match_parameters=false"
            )
        return rank

    def observations(
        self, adapter: Adapter, add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The number of modules, and their rank."""
        return {"modules": len(adapter.modules), "rank": max(adapter.ranks().values())}, []
