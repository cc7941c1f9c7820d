"""An adapted model in the user's hands: made, trained, saved, loaded, merged, switched off."""

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
from lowrank_cli.api.training import Batch, Training, trainer_callback
from lowrank_cli.config.folders import files
from lowrank_cli.errors import UserError, nearest, unknown
from lowrank_cli.inference.adapter_run import method_of_adapter
from lowrank_cli.methods.protocol import Adapts, Method, OwnRates
from lowrank_cli.reader import read_yaml
from lowrank_cli.runs import atomic_folder
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: What :meth:`Adapter.save` writes, and may replace.
SAVED = {save_load.WEIGHTS, save_load.CANARY, save_load.CONFIG, save_load.PATTERN, save_load.PROOF}


def adapt(model: PreTrainedModel, method: str, **settings: Any) -> Adapter:
    """Adapt ``model`` in place; until it is trained, it computes exactly what it did before.

    The model's own weights are frozen; a classification head trains along. Initial values are drawn from torch's
    global generator: call ``torch.manual_seed`` first.

    Args:
        model: a causal language model or a classifier of transformers, in fp32, bf16 or 4 bits.
        method: ``lora``, ``dora``, ``milora``, ``alora``, … (``lrk list methods``).
        settings: the method's keys (``lrk list methods milora`` explains them), such as ``rank=8``. Those left out
            have the values of ``conf/method``, as on the command line.

    Returns:
        The handle that trains, saves, merges and switches off what was added.

    Raises:
        UserError: an unknown method or key, a value out of range, or a model that the method does not fit, in one
            line. The model is then as it was.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> adapter = lrk.adapt(model, "lora", rank=16, alpha=32, target_modules=["Q", "V"])
    """
    _require_adaptable(model)
    made = _configured(method, settings)
    return Adapter(_injected(model, made), made, fresh=True)


def load(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Adapter:
    """Put a saved adapter on ``model``, which must have the weights that it was trained on.

    Checked are the SHA-256 of every file, the model's fingerprint, the tensors' names and shapes, and the logits that
    a fixed input gave when the adapter was saved.

    Args:
        model: as for :func:`adapt`, not adapted yet.
        folder: what :meth:`Adapter.save` wrote; or a run of ``lrk train`` or ``lrk prune``, or its ``adapter/``. (What
            ``lrk export`` or the PEFT library wrote is for :class:`lowrank_cli.Bank` and for that library.)

    Returns:
        The handle, as :func:`adapt` gives it; training goes on from the saved values.

    Raises:
        UserError: one of the checks failed, or nothing says which method made the adapter. Where the logits differ,
            the model holds the adapter all the same; load the model anew.

    Example:
        >>> adapter = lrk.load(model, "outputs/latest")
    """
    _require_adaptable(model)
    path = Path(folder).expanduser()
    path = path / "adapter" if (path / "run.json").is_file() else path
    proof = save_load.read_proof(path)
    save_load.check_fingerprint(proof, adapted_model.fingerprint(model), str(path), model.config.model_type)
    made = method_of_adapter(path)
    adapter = _injected(model, made)
    save_load.load(adapter, path)
    return Adapter(adapter, made, fresh=False)


class Adapter:
    """The adapter on one model. Made by :func:`adapt` and :func:`load`.

    Attributes:
        model: the adapted model: the object that was given.
        config: the method's settings, all of them; not to be changed.
        history: what the method reported while it trained, a row for each report: ``{"step": …, …}``.
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
        """The rank of each low-rank module by its path, as it is now (ALoRA, AdaLoRA and SoRA change it)."""
        return self._adapter.ranks()

    def count(self) -> int:
        """How many numbers train."""
        return self._adapter.count()

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to step: all that trains, but for what the method steps itself."""
        return list(self._training.stepped().values())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`parameters` for an optimizer, in groups where the method has learning rates of its own.

        Args:
            learning_rate: of all tensors that have none of their own (``router_learning_rate`` of MiLoRA is one).

        Example:
            >>> optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3), weight_decay=0.0)
        """
        own = self._method.learning_rates(self._adapter) if isinstance(self._method, OwnRates) else {}
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
        """Inside, the method takes part in a training loop of your own, whatever the method is.

        Each ``optimizer.step()`` is one step: the method acts before it (AdaLoRA) and after it (ALoRA, SoRA, LeLoRA,
        MiLoRA), and gradients are cleared. The loss that the model returns includes the method's own term, if it has
        one (MiLoRA, MOELoRA, AdaLoRA); a loop that computes its loss from logits adds :meth:`extra_loss`. A backward
        pass outside of this block is an error where the method would miss it.

        MiLoRA routes by the prompt: the tokens before the first label that is not -100, or ``prompt_mask`` (B, T) as
        one more argument of the model.

        Args:
            optimizer: of :meth:`parameter_groups`. ``torch.optim.Adam`` or ``AdamW`` where the method acts after
                steps, since the moments of ranks move with them.
            steps: how many there will be: schedules of the method are shares of it.
            train: training batches (dicts of tensors with ``labels``), which MiLoRA reads a few of beforehand.
            dev: dev batches, right-padded, for methods that look at held-out examples (ALoRA, LeLoRA, MiLoRA).
            steps_per_epoch: of one pass over the training set, for schedules in epochs (ALoRA); the length of
                ``train`` where it has one, else ``steps``.

        Raises:
            UserError: the optimizer does not step what it should, or the method needs batches that are missing.

        Warns:
            UserWarning: at the end, where other than ``steps`` steps were taken or the method has not finished.

        Example:
            >>> with adapter.training(optimizer, steps=len(batches), train=batches, dev=dev_batches):
            ...     for batch in batches:
            ...         model(**batch).loss.backward()
            ...         optimizer.step()
        """
        with self._training.running(optimizer, steps, train, dev, steps_per_epoch):
            yield

    def extra_loss(self) -> Tensor:
        """The method's own term of the loss of the pass that just ran; 0 for most methods.

        Only for a loop that gives the model no ``labels``: the model's own loss holds it already.
        """
        return self._training.extra_loss()

    def callback(self, *, dev: Iterable[Batch] = ()) -> TrainerCallback:
        """:meth:`training` for ``transformers.Trainer``, with its optimizer, its number of steps and its batches.

        Args:
            dev: as for :meth:`training`.

        Example:
            >>> optimizers = (torch.optim.AdamW(adapter.parameter_groups(1e-3)), None)
            >>> Trainer(model, args, train_dataset=data, optimizers=optimizers, callbacks=[adapter.callback()]).train()
        """
        return trainer_callback(self._training, dev)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter, and what :func:`load` checks it by, into ``folder``, which is new or holds an adapter.

        A LoRA (or DoRA, LoRA-FA, ALoRA, …) is in the format of the PEFT library, which reads it too.

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
        """Inside, the model is the bare one; afterwards the adapter is as it was before, on or off.

        A classification head that trained along stays as trained.

        Raises:
            UserError: the method trains the model's own weights.

        Example:
            >>> with torch.no_grad(), adapter.disabled():
            ...     reference = model(**batch).logits
        """
        if not self._adapter.linears:
            raise UserError(f"disabled: {self.config.name} trains the model's own weights, so there is no bare model")
        return self._adapter.disabled()

    def merge(self) -> None:
        """Fold all updates into the weights, for the speed of the bare model; a copy of these stays on the CPU.

        Raises:
            UserError: no single weight equals an adapted one (MiLoRA, MOELoRA), or the weights are in 4 bits, or one
                is shared with the input embedding.
        """
        self._adapter.merge()

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit."""
        self._adapter.unmerge()


def _configured(name: str, settings: dict[str, Any]) -> Method:
    """The method with its YAML's values and ``settings``."""
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
    """Raise UserError for a model that no method can adapt."""
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


def _injected(model: PreTrainedModel, method: Method) -> adapted_model.Adapter:
    """``model`` adapted by ``method``; as it was before where that raises UserError."""
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
