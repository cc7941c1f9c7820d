"""``lrk bench load``: loading one more adapter into a serving model, with our bank and with the PEFT library.

Our bank verifies what it loads: the hashes of all files, the model's fingerprint and all shapes; ``load and check``
also compares logits with those saved with the adapter. The library's ``load_adapter`` does none of this.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.bench.base_model import load_base
from lowrank_cli.bench.bench_models import adapted_copy
from lowrank_cli.bench.entries import available_methods, is_peft
from lowrank_cli.bench.rounds import interleaved
from lowrank_cli.bench.timings import Timing, figures, metrics, rows, timed
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, progress
from lowrank_cli.schema import BenchRun

__all__ = ["figures", "measure", "metrics"]


@dataclass(frozen=True)
class Loading:
    """The work to time, and what removes the adapter again."""

    work: Callable[[], object]
    undo: Callable[[], object] = lambda: None

    def sample(self, device: torch.device) -> Timing:
        timing = timed(self.work, device)
        self.undo()
        return timing


def measure(config: BenchRun, run: Run) -> dict[str, Any]:
    """Rows for each of ``bench.methods``; times are relative to the first one's."""
    base = load_base(config, run)
    base.model.requires_grad_(False)
    loadings: dict[str, Loading] = {}
    sizes = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own use of Transformers
        for number, (entry, variant) in enumerate(available_methods(config).items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            assert variant is not None
            adapter = adapted_copy(base.model, entry, variant, config.seed).adapter
            assert adapter is not None
            save_load.save(adapter, folder, {})
            loadings |= (_peft if is_peft(entry) else _bank)(base.model, entry, folder)
            sizes.append(f"{entry}: {(folder / save_load.WEIGHTS).stat().st_size / 1e6:.1f} MB")
        total = (config.bench.rounds + 1) * len(loadings)
        with progress.bar("measuring", total, shown=True) as bar:
            work = {entry: partial(loading.sample, base.device) for entry, loading in loadings.items()}
            samples = interleaved(work, config.bench.rounds, bar)
    return {
        **base.facts,
        "title": "Loading one more adapter",
        "notes": [f"adapters: {', '.join(sizes)}"],
        "rows": rows(samples, next(iter(samples))),
    }


def _bank(base: PreTrainedModel, entry: str, folder: Path) -> dict[str, Loading]:
    bank = Bank(copied(base))
    try:
        bank.load("first", folder)
    except UserError:
        raise UserError(f"bench.methods: '{entry}' is not saved as a LoRA, so a bank cannot load it") from None

    def load_and_check() -> None:
        bank.load("second", folder)
        bank.check(["second"])

    def remove() -> None:
        bank.remove("second")

    return {
        f"{entry}: load": Loading(lambda: bank.load("second", folder), remove),
        f"{entry}: load and check": Loading(load_and_check, remove),
        f"{entry}: read the file": Loading(lambda: load_file(folder / save_load.WEIGHTS)),
    }


def _peft(base: PreTrainedModel, entry: str, folder: Path) -> dict[str, Loading]:
    import peft

    served = peft.PeftModel.from_pretrained(copied(base), folder, adapter_name="first")
    load = partial(served.load_adapter, folder, "second")
    return {f"{entry}: load": Loading(load, lambda: served.delete_adapter("second"))}
