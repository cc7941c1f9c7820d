"""``lrk import``: an adapter that the PEFT library wrote, as a run like those of ``lrk train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from transformers import PreTrainedModel

from lowrank_cli import methods
from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import peft_lora, save_load
from lowrank_cli.adapter.ranks import rebuild
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.models.load import load
from lowrank_cli.reader import read_json
from lowrank_cli.runs import Run, atomic_folder, progress
from lowrank_cli.schema import ImportRun
from lowrank_cli.session.device import greet, prepare
from lowrank_cli.session.peft_folder import CONFIG, fetch
from lowrank_cli.tasks.task import template_hash


def run(config: ImportRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Write ``adapter/`` into ``run``'s folder.

    Raises:
        UserError: the adapter cannot be read, is more than what the method computes, or belongs to another model.
    """
    assert config.adapter is not None
    folder = fetch(config.adapter, config.revision)
    device = prepare(config.hardware).device
    torch.manual_seed(config.seed)
    loaded = load(config.model, config.hardware, None)
    loaded.model.to(device)
    greet(run, config.hardware, loaded.model, loaded.header)
    method = methods.create(config.method)
    assert isinstance(method, Adapts)
    adapter = method.adapt(loaded.model)
    fill(adapter, folder)
    if doubt := _other_base(folder, loaded.model, [config.model.id, config.model.path, config.model.gguf]):
        progress.console().print(f"warning: {doubt}")
    about = {
        "task": config.task.name,
        "template_hash": template_hash(config.task),
        "parts": {task.name: template_hash(task) for task in config.task.parts.values()},
        "method": config.method.name,
        "model": config.model.name,
    }
    with atomic_folder(run.file("adapter")) as target:
        save_load.save(adapter, target, about)
    ranks = adapter.ranks().values()
    return {
        "import/modules": len(ranks),
        "import/largest_rank": max(ranks),
        "import/ranks": sum(ranks),
        "trainable_parameters": sum(parameter.numel() for parameter in adapter.trained.values()),
    }


@torch.no_grad()
def fill(adapter: Adapter, folder: Path) -> None:
    """Give ``adapter`` the ranks and tensors of the one in ``folder``; its modules that are not there are removed.

    A module has the scale of the method, so where PEFT's differs, the ratio goes into B.

    Raises:
        UserError: files are missing or damaged, or hold what the adapter does not compute.
    """
    if (folder / save_load.PROOF).is_file():  # one of ours, which knows its model
        proof = save_load.read_proof(folder)
        save_load.check_fingerprint(proof, adapter.fingerprint, str(folder), adapter.model.config.model_type)
    kind = next(iter(adapter.modules.values()))
    others = kind.tensors().keys() - {"lora_A.weight", "lora_B.weight"}
    found = peft_lora.read(adapter.model, folder, "lrk import", (kind.peft_options() or {}).keys(), others)
    if outside := found.keys() - {site.path for site in adapter.sites.values()}:
        raise UserError(
            f"{folder}: has '{min(outside)}', which method.target_modules leaves out; name its linear there"
        )
    rebuild(adapter, {path: len(factors.a) for path, factors in found.items()}, str(folder))
    for path, module in adapter.modules.items():
        factors, tensors = found[path], module.tensors()
        tensors["lora_A.weight"].copy_(factors.a)
        tensors["lora_B.weight"].copy_(factors.b.float() * (factors.scale / module.scale))
        for name, tensor in factors.others.items():
            tensors[name].copy_(tensor)
    for linear in adapter.linears.values():
        linear.sync_weight()


class About(TypedDict):
    """The key of ``adapter_config.json`` that names the base."""

    base_model_name_or_path: NotRequired[str | None]


def _other_base(folder: Path, model: PreTrainedModel, names: list[str | None]) -> str:
    """Why the adapter may belong to another model than the loaded one, which has ``names``; empty if it names it."""
    if (folder / save_load.PROOF).is_file():
        return ""
    base = read_json(folder / CONFIG, About).get("base_model_name_or_path")
    known = [name for name in (*names, model.config.name_or_path) if name]
    if base and any(base == name or os.path.realpath(base) == os.path.realpath(name) for name in known):
        return ""
    named = f"the adapter names '{base}' as its base" if base else "the adapter does not name its base"
    return f"{named}; that this model ({known[0] if known else 'random weights'}) has the same weights is not verified"
