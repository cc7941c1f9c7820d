"""Loads the adapters that are served, each into the lane that can compute it."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.files.peft_lora import NotLowRank
from lowrank_cli.adapter.module_copy import copied
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.inference.tenants import Tenants, adapter_folder
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.runs import Run
from lowrank_cli.serving.chats import adapter_template
from lowrank_cli.serving.lanes import BankLane, CalibratedLane, Lane
from lowrank_cli.serving.requests import Model
from lowrank_cli.session.adapter_run import method_of, method_of_adapter

STATISTICS = "statistics"  #: the folder of a run that holds what a calibration has fitted


class Adapters:
    """The lanes of one model and its adapters. The model must be idle (see :meth:`Lane.suspend`) when one is loaded."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_bytes: int | None,
        grouped: str | None,
        autocast: bool,
    ):
        self._tokenizer, self._autocast = tokenizer, autocast
        self._tenants = Tenants(model, max_bytes, grouped)
        self.bank = self._tenants.bank
        self.bank_lane = BankLane(self.bank, tokenizer, autocast)

    def load(self, name: str, folder: str) -> tuple[Model, Lane]:
        """The adapter of a run or of an adapter folder, and the lane that answers with it.

        Raises:
            UserError: there is none, or it cannot share the model.
        """
        path = Path(os.path.expanduser(folder))
        if (path / "run.json").is_file() and isinstance(method_of(Run.open(path, key="serve")), Calibrates):
            return Model(name, folder=folder, calibrated=True), self._calibrated(path)
        if not path.is_dir():
            raise UserError(f"tenant: there is no folder '{folder}'")
        template = adapter_template(self._tokenizer, path)
        key = self._free(name)
        try:
            self._tenants.add(key, folder)
        except NotLowRank as error:
            return Model(name, folder=folder, template=template), self._own_lane(adapter_folder(path), error)
        note = (
            ""
            if self.bank.proven(key)
            else f"that it was trained on this model was not verified (no {save_load.PROOF})"
        )
        return Model(name, key, folder, template=template, note=note), self.bank_lane

    def remove(self, model: Model) -> None:
        """Forget the adapter of a model of which no answer is running."""
        if model.adapter is not None:
            self.bank.remove(model.adapter)

    def _free(self, name: str) -> str:
        """A name that the bank does not have; it still has those of removed models that are running."""
        key, number = name, 1
        while key in self.bank.names:
            key, number = f"{name} ({number + 1})", number + 1
        return key

    def _own_lane(self, folder: Path, error: NotLowRank) -> Lane:
        """A copy of the model, which shares its weights, with an adapter that the bank refused with ``error``."""
        if not (folder / save_load.PROOF).is_file():
            raise error
        model = copied(self.bank.model)
        if self._adapt(model, folder).routing is not None:
            raise error  # only a bank keeps the routes of rows that join and leave
        return Lane(model.eval(), self._tokenizer, self._autocast)

    def _adapt(self, model: PreTrainedModel, folder: Path) -> Adapter:
        """Put the adapter in ``folder`` into a copy of the model."""
        method = method_of_adapter(folder)
        shared = {id(parameter) for parameter in model.parameters()}
        refusal = UserError(
            f"serve: '{folder}' (method={method.config.name}) changes the model's own weights, which all adapters "
            f"share; merge it with lrk export export.format=merged, and serve that with model.path=FOLDER"
        )
        if not isinstance(method, Adapts) or method.rewrites():
            raise refusal
        adapter = method.adapt(model)
        if any(id(parameter) in shared for parameter in adapter.trained.values()):
            raise refusal
        save_load.load(adapter, folder)
        return adapter

    def _calibrated(self, path: Path) -> Lane:
        """The model with the calibration in the run ``path``, and with the adapter that it was fitted on, if any."""
        adapted = next((run.path for run in Run.open(path).lineage() if (run.path / "adapter").is_dir()), None)
        model = copied(self.bank.model)
        if adapted is not None:
            self._adapt(model, adapted / "adapter")
        eos = self._tokenizer.eos_token_id
        assert isinstance(eos, int)
        processor = AnswerProcessor.from_folder(path / STATISTICS, model, eos)
        return CalibratedLane(model, self._tokenizer, self._autocast, processor)
