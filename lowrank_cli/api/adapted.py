"""The public handle of an adapted model: create, train, save, load, merge and switch off."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli import methods
from lowrank_cli.adapter import adapted_model
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.quantized import quantized
from lowrank_cli.api.batches import Batch
from lowrank_cli.api.training import Training, trainer_callback
from lowrank_cli.config.folders import files
from lowrank_cli.errors import UserError, nearest, unknown
from lowrank_cli.methods.protocol import Adapts, Method, OwnRates
from lowrank_cli.reader import read_yaml
from lowrank_cli.runs import atomic_folder
from lowrank_cli.schema import MethodConfig
from lowrank_cli.session.adapter_run import method_of_adapter

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: Files that :meth:`Adapter.save` writes, and may replace.
SAVED = {save_load.WEIGHTS, save_load.CANARY, save_load.CONFIG, save_load.PATTERN, save_load.PROOF}


def adapt(model: PreTrainedModel, method: str, **settings: Any) -> Adapter:
    """Adapt ``model`` in place. Until it is trained, it computes exactly what it did before.

    The model's own weights are frozen, except for a classification head. Initial values come from torch's global
    generator: call ``torch.manual_seed`` first.

    Args:
        model: a causal language model or a classifier of transformers, in fp32, bf16 or 4 bits.
        method: ``lora``, ``dora``, ``milora``, ``alora``, … (``lrk list methods``).
        settings: the method's keys (``lrk list methods milora`` explains them), such as ``rank=8``. Others have the
            values of ``conf/method``, as on the command line.

    Returns:
        The handle that trains, saves, merges and switches off the adapter.

    Raises:
        UserError: an unknown method or key, a value out of range, or a model that does not fit the method. The model
            is unchanged then.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> adapter = lrk.adapt(model, "lora", rank=16, alpha=32, target_modules=["Q", "V"])
    """
    _require_adaptable(model)
    configured = _configured(method, settings)
    return Adapter(_adapted(model, configured), configured, fresh=True)


def load(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Adapter:
    """Load a saved adapter into ``model``, which must have the weights that it was trained on.

    Checks the SHA-256 of every file, the model's fingerprint, the tensors' names and shapes, and the logits of a fixed
    input, saved with the adapter.

    Args:
        model: as for :func:`adapt`, not adapted yet.
        folder: a folder of :meth:`Adapter.save`, or a run of ``lrk train`` or ``lrk prune``, or its ``adapter/``. (For
            folders of ``lrk export`` or the PEFT library, use :class:`lowrank_cli.Bank` or that library.)

    Returns:
        The handle, as from :func:`adapt`; training continues from the saved values.

    Raises:
        UserError: one of the checks failed, or the adapter's method is unknown. If only the logits differ, the model
            has the adapter nonetheless; load the model again.

    Example:
        >>> adapter = lrk.load(model, "outputs/latest")
    """
    _require_adaptable(model)
    path = Path(folder).expanduser()
    path = path / "adapter" if (path / "run.json").is_file() else path
    proof = save_load.read_proof(path)
    save_load.check_fingerprint(proof, adapted_model.fingerprint(model), str(path), model.config.model_type)
    method = method_of_adapter(path)
    adapter = _adapted(model, method)
    save_load.load(adapter, path)
    return Adapter(adapter, method, fresh=False)


class Adapter:
    """The adapter of one model, from :func:`adapt` or :func:`load`.

    Attributes:
        model: the adapted model, the same object as was given.
        config: all settings of the method; read-only.
        history: reports of the method in training, a row for each: ``{"step": …, …}``.
    """

    model: PreTrainedModel
    config: MethodConfig
    history: list[dict[str, Any]]

    def __init__(self, adapter: adapted_model.Adapter, method: Method, *, fresh: bool):
        self._adapter, self._method = adapter, method
        self._training = Training(adapter, method, fresh)
        self.model, self.config, self.history = adapter.model, method.config, self._training.history

    def __repr__(self) -> str:
        count = len(self._adapter.modules)
        return f"<lrk.Adapter {self.config.name}: {count} modules, {self._adapter.count():,} trained parameters>"

    def ranks(self) -> dict[str, int]:
        """The current rank of each low-rank module, by path (ALoRA, AdaLoRA and SoRA change ranks)."""
        return self._adapter.ranks()

    def count(self) -> int:
        """The number of trained parameters."""
        return self._adapter.count()

    def parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer: all trained ones, except those that the method steps itself."""
        return list(self._training.stepped().values())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`parameters` in groups by learning rate.

        Args:
            learning_rate: of all parameters without a rate set by the method (such as LoRA+'s, MiLoRA's
                ``router_learning_rate``).

        Example:
            >>> optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3), weight_decay=0.0)
        """
        own = self._method.learning_rates(self._adapter, learning_rate) if isinstance(self._method, OwnRates) else {}
        groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
        for name, parameter in self._training.stepped().items():
            groups.setdefault(own.get(name, learning_rate), []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]

    @contextmanager
    def training(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        train: Iterable[Batch] = (),
        dev: Iterable[Batch] = (),
        steps_per_epoch: int | None = None,
    ) -> Iterator[None]:
        """Inside, the method takes part in your own training loop.

        Each ``optimizer.step()`` is one step: the method acts before it (AdaLoRA) or after it (ALoRA, SoRA, LeLoRA,
        MiLoRA), and gradients are cleared. The loss that the model returns includes the method's own term, if any
        (MiLoRA, MOELoRA, AdaLoRA); a loop that computes its loss from logits adds :meth:`extra_loss`. If the method
        acts in training, a backward pass outside of this block is an error.

        MiLoRA routes by the prompt: the tokens before the first label that is not -100, or ``prompt_mask`` (B, T),
        an additional argument of the model.

        Args:
            optimizer: of :meth:`parameter_groups`. Must be ``torch.optim.Adam`` or ``AdamW`` if the method changes
                ranks (AdaLoRA, ALoRA, LeLoRA, SoRA), since moments move with them.
            steps: total number of steps, for the method's schedules.
            train: training batches (dicts of tensors with ``labels``), of which MiLoRA reads a few in advance.
            dev: right-padded dev batches, for methods that use held-out examples (ALoRA, LeLoRA, MiLoRA).
            steps_per_epoch: for schedules in epochs (ALoRA). Defaults to the length of ``train`` if it has one, else
                to ``steps``.

        Raises:
            UserError: the optimizer does not match the trained parameters, or batches that the method needs are
                missing.

        Warns:
            UserWarning: at the end, if the number of steps was not ``steps`` or the method has not finished.

        Example:
            >>> with adapter.training(optimizer, steps=len(batches), train=batches, dev=dev_batches):
            ...     for batch in batches:
            ...         model(**batch).loss.backward()
            ...         optimizer.step()
        """
        with self._training.running(optimizer, steps, train, dev, steps_per_epoch):
            yield

    def extra_loss(self) -> Tensor:
        """The method's own loss term of the last forward pass; 0 for most methods.

        Only for loops that give the model no ``labels``: the loss of the model already includes it.
        """
        return self._training.extra_loss()

    def callback(self, *, dev: Iterable[Batch] = ()) -> TrainerCallback:
        """:meth:`training` for ``transformers.Trainer``, with its optimizer, number of steps and batches.

        Args:
            dev: as for :meth:`training`.

        Example:
            >>> optimizers = (torch.optim.AdamW(adapter.parameter_groups(1e-3)), None)
            >>> Trainer(model, args, train_dataset=data, optimizers=optimizers, callbacks=[adapter.callback()]).train()
        """
        return trainer_callback(self._training, dev)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the adapter, and the files that :func:`load` checks it with.

        LoRA, DoRA, LoRA-FA, ALoRA, … use the format of the PEFT library, which can load them too.

        Args:
            folder: a new folder, or one with an adapter, which is replaced.

        Raises:
            UserError: the folder holds other files, or the adapter is switched off.
        """
        path = Path(folder).expanduser().resolve()
        if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= SAVED):
            raise UserError(f"save: '{folder}' holds other files; name a new folder, or one that holds an adapter")
        if not all(linear.enabled for linear in self._adapter.linears.values()):
            raise UserError("save: the adapter is switched off; save it outside of `with adapter.disabled():`")
        about = {"method": self.config.name, "method_config": asdict(self.config)}
        with atomic_folder(path) as temporary:
            save_load.save(self._adapter, temporary, about)

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare one; afterwards the adapter is on or off as before.

        A trained classification head stays as trained.

        Raises:
            UserError: the method trains the model's own weights.

        Example:
            >>> with torch.no_grad(), adapter.disabled():
            ...     reference = model(**batch).logits
        """
        if not (self._adapter.linears or self._adapter.tuner):
            raise UserError(f"disabled: {self.config.name} trains the model's own weights, so there is no bare model")
        return self._adapter.disabled()

    def merge(self) -> None:
        """Add all updates to the weights, for the speed of the bare model; a copy of the weights stays on the CPU.

        Raises:
            UserError: the method cannot be merged (MiLoRA, MOELoRA), the weights are in 4 bits, or one is shared with
                the input embedding.
        """
        self._adapter.merge()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit."""
        self._adapter.unmerge()


def _configured(name: str, settings: dict[str, Any]) -> Method:
    """The method with the values of its YAML, overridden by ``settings``."""
    choices = [choice for choice in methods.names() if methods.can(choice, Adapts)]
    if name not in choices:
        raise unknown("method", name, choices)
    keys = [item.name for item in fields(methods.config_classes()[name]) if item.name != "name"]
    for key in settings:
        if key not in keys:
            raise UserError(f"method.{key}: unknown key{nearest(key, keys)} ({name} has: {', '.join(keys)})")
    values = read_yaml(files("method")[name])
    del values["defaults"]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return methods.configured(values | plain, "adapt", given=settings)


def _require_adaptable(model: PreTrainedModel) -> None:
    """Raise UserError if no method can adapt the model."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: {kind} is no PreTrainedModel of transformers; load one with from_pretrained")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise UserError("model: it is adapted already; load the model anew for another adapter, or use lrk.Bank")
    if model.config.is_encoder_decoder:
        raise UserError(f"model: {kind} is an encoder-decoder, which is not supported")
    if model.base_model is model:
        raise UserError(
            f"model: {kind} gives no logits; load it with AutoModelForCausalLM or AutoModelForSequenceClassification"
        )
    if (dtype := str(model.dtype).removeprefix("torch.")) not in save_load.TOLERANCE:
        raise UserError(
            f"model: its weights are {dtype} (allowed: {', '.join(save_load.TOLERANCE)}); load it with dtype="
        )


def _adapted(model: PreTrainedModel, method: Method) -> adapted_model.Adapter:
    """Adapt ``model``; if that raises UserError, restore it."""
    assert isinstance(method, Adapts)
    if (writes := method.rewrites()) and any(map(quantized, model.parameters())):
        raise UserError(f"method: {method.config.name} {writes}, and the model's weights are quantised")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        return method.adapt(model)
    except UserError:
        for path, module in list(model.named_modules()):
            if isinstance(module, AdaptedLinear):
                module.enable(False)
                adapted_model.replace_module(model, path, module.base)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
