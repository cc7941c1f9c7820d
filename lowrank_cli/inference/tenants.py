"""Tenants: adapters in folders, loaded into a bank on one model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.adapter.tenants import tenant
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.runs import Run, progress
from lowrank_cli.session.adapter_run import method_of_adapter


class Tenants:
    """A bank of adapters loaded from runs, from our adapter folders or from those of the PEFT library."""

    def __init__(self, model: PreTrainedModel, max_bytes: int | None, grouped: str | None):
        self.bank = Bank(model, max_bytes, grouped)
        self._adapters: dict[str, Adapter] = {}  # by the method's configuration; reused to read many folders

    def load(self, names: Iterable[str]) -> dict[str, UserError]:
        """Load each adapter by its folder and verify its canary output. Returns the errors of those that failed."""
        failed: dict[str, UserError] = {}
        loaded = []
        for name in names:
            try:
                self._load(name, name)
                loaded.append(name)
            except UserError as error:
                failed[name] = error
        failed |= self.bank.check(loaded)
        if unsure := [name for name in loaded if name not in failed and not self.bank.proven(name)]:
            adapters = f"{len(unsure)} adapter{'s have' if len(unsure) > 1 else ' has'}"
            progress.console().print(
                f"{adapters} no {save_load.PROOF}: that they were trained on this model was not verified ({unsure[0]}"
                f"{', …' if len(unsure) > 1 else ''})"
            )
        for name in failed.keys() & set(loaded):
            self.bank.remove(name)
        return failed

    def add(self, name: str, folder: str) -> None:
        """Load one adapter and verify its canary output. The bank is unchanged if that raises UserError."""
        self._load(name, folder)
        for error in self.bank.check([name]).values():
            self.bank.remove(name)
            raise error

    def _load(self, name: str, path: str) -> None:
        folder = adapter_folder(Path(os.path.expanduser(path)))
        if tenant.readable(folder):
            self.bank.load(name, folder)
        elif (folder / save_load.PROOF).is_file():
            adapter = self._adapter(folder)
            proof = save_load.fill(adapter, folder)
            self.bank.add(name, adapter, tenant.saved_canary(folder, proof, self.bank.model.config.vocab_size))
        else:
            raise UserError(f"tenant: '{path}' is no run with an adapter, and no adapter folder")

    def _adapter(self, folder: Path) -> Adapter:
        """An adapter of the folder's method on a copy of the model's modules, which shares the model's weights."""
        method = method_of_adapter(folder)
        if not isinstance(method, Adapts):
            raise UserError(f"tenant: '{folder}' holds no adapter, its method is {method.config.name}")
        key = repr(method.config)
        if key not in self._adapters:
            self._adapters[key] = method.adapt(copied(self.bank.model))
            for linear in self._adapters[key].linears.values():
                linear.enable(False)  # unfolds the update: the bank reads its factors
        return self._adapters[key]


def adapter_folder(path: Path) -> Path:
    """The adapter folder of the run in ``path``, which must be finished, or else ``path`` itself."""
    if not os.path.isdir(path):  # False, not an error, for an invalid path
        raise UserError(f"tenant: there is no folder '{path}'")
    if not (path / "run.json").is_file():
        return path
    run = Run.open(path)
    if not run.done:
        raise UserError(f"tenant: '{path}' is not finished (it is {run.info.get('status')})")
    return path / "adapter"
