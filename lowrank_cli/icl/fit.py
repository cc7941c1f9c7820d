"""What a calibrating method fits: tensors for each template of the task, kept in the run and checked on loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_cli import tasks
from lowrank_cli.adapter.files import save_load
from lowrank_cli.calibration import statistics_files
from lowrank_cli.calibration.head import head_weight
from lowrank_cli.errors import UserError
from lowrank_cli.icl import demonstrations
from lowrank_cli.icl.hidden_states import last_hidden
from lowrank_cli.icl.queries import Wording
from lowrank_cli.inference.choice_scores import answers
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.runs import Run, progress
from lowrank_cli.session.adapter_run import method_of
from lowrank_cli.session.session import Session
from lowrank_cli.tasks.task import Example, Task

FOLDER = "statistics"  #: of a run: the fitted tensors


@dataclass(frozen=True)
class Fitted:
    """The fitted tensors of each wording, the task's own template first; ``seed`` drew the pool of examples."""

    wordings: list[Wording]
    seed: int


def fit(session: Session) -> Fitted:
    """Fit the method's tensors to the pool of examples, under each template; none where it fits what is shown."""
    method, seed = calibrating_method(session), session.config.seed
    plan, wordings = method.plan(), _tasks(session)
    if plan.shown:
        return Fitted([Wording(task, {}) for task in wordings], seed)
    pools = [demonstrations.pool(task.train, plan, seed) for task in wordings]
    fitted = []
    with progress.bar("fitting", sum(map(len, pools)), shown=session.accelerator.is_main_process) as bar:
        for task, examples in zip(wordings, pools, strict=True):
            texts = demonstrations.feature_texts(plan, task.config, examples)
            features = last_hidden(session, texts, bar.advance)
            labels = torch.tensor([example.label for example in examples])  # (n,)
            fitted.append(Wording(task, method.fit(features, labels, len(task.label_words))))
    return Fitted(fitted, seed)


def load_or_fit(session: Session) -> Fitted:
    """The tensors in ``config.run`` if a calibrating method made it; else fit them now, with the adapter of that run.

    Raises:
        UserError: the tensors are damaged, or were fitted with other settings, data or weights.
    """
    path = Path(session.config.run)  # type: ignore[attr-defined]  # of every verb that calls this
    if not isinstance(method_of(Run.open(path)), Calibrates):
        return fit(session)
    tensors, about = statistics_files.load(path / FOLDER)
    _check_identity(session, path, about)
    wordings: list[dict[str, Tensor]] = [{} for _ in about["templates"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if not (index.isdecimal() and int(index) < len(wordings)):
            raise UserError(f"{path / FOLDER}: the tensor '{name}' belongs to none of the {len(wordings)} templates")
        wordings[int(index)][key] = tensor
    return Fitted([Wording(task, of_task) for task, of_task in zip(_tasks(session), wordings)], about["seed"])


def save(session: Session, fitted: Fitted, folder: Path) -> None:
    """Write the tensors into ``folder``, with what other programs need to use them without this package's tasks."""
    tensors = {
        f"{index}.{key}": tensor
        for index, wording in enumerate(fitted.wordings)
        for key, tensor in wording.tensors.items()
    }
    about = {
        **_identity(session, fitted.seed),
        "model": session.config.model.name,
        "vocabulary": head_weight(session.model).shape[0],
        "method": vars(session.config.method),
        "seed": fitted.seed,
        "answers": answers(session, session.task.test[0]),
        "answers_by_template": [answers(session, wording.task.test[0]) for wording in fitted.wordings],
    }
    statistics_files.save(folder, tensors, about)


def calibrating_method(session: Session) -> Calibrates:
    """The session's method, which calibrates."""
    assert isinstance(session.method, Calibrates)
    return session.method


def _templates(session: Session) -> list[Any]:
    """The wordings that the method asks for as the task names them, its own template first."""
    config, count = session.config.task, calibrating_method(session).plan().templates
    return [config.template, *config.templates[: count - 1]]


def _tasks(session: Session) -> list[Task]:
    """The task in each wording."""
    config, count = session.config.task, calibrating_method(session).plan().templates
    others = [replace(config, template=text, label_words=words) for text, words in config.wordings()[1:count]]
    return [session.task, *map(tasks.load, others)]


def _identity(session: Session, seed: int) -> dict[str, Any]:
    """The settings, data and weights that the fitted tensors depend on."""
    plan, templates = calibrating_method(session).plan(), _templates(session)
    proof = session.adapter_run / "adapter" / save_load.PROOF if session.adapter_run else None
    return {
        "fingerprint": session.fingerprint,
        "adapter": save_load.sha256(proof) if proof else None,
        "task": session.task.name,
        "templates": templates,
        "label_words": list(session.task.label_words),
        "answered": plan.answered,
        "examples": plan.examples,
        "share": plan.share,
        "max_length": session.config.task.max_length,
        "data": _digest(demonstrations.pool(session.task.train, plan, seed)),
    }


def _check_identity(session: Session, path: Path, about: dict[str, Any]) -> None:
    """Raise UserError unless the tensors of the run in ``path`` have this session's identity."""
    for key, value in _identity(session, about["seed"]).items():
        saved = about[key][: len(value)] if key == "templates" else about[key]
        if saved != value:
            config = session.config
            task = {"max_length": f" task.max_length={value}", "data": f" task.limit={config.task.limit or 'null'}"}
            raise UserError(
                f"run: the statistics of {path} were fitted with {key} {saved}, not {value}; fit them again with: "
                f"lrk train method={config.method.name} model={config.model.name} task={config.task.name} "
                f"method.templates={len(_templates(session))}{task.get(key, '')}"
            )


def _digest(examples: Sequence[Example]) -> str:
    """The number of examples, and a hash of their prompts and answers."""
    texts = json.dumps([(example.prompt, example.answer) for example in examples]).encode()
    return f"{len(examples)} examples ({hashlib.sha256(texts).hexdigest()[:16]})"
