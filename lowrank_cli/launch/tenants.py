"""The adapters of ``lrk serve``, checked by their files before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

from lowrank_cli import methods
from lowrank_cli.errors import UserError
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.reader import read_json
from lowrank_cli.runs import Run
from lowrank_cli.runs.tenant_file import tenants_of
from lowrank_cli.schema import ServeRun

PROOF, PEFT = "lrk.json", "adapter_config.json"  #: one of them is in every adapter folder


class Proof(TypedDict):
    """What is read of ``lrk.json`` here."""

    fingerprint: str


def check(config: ServeRun) -> None:
    """Refuse adapters that are missing, cannot be served, or belong to different models.

    Raises:
        UserError: names the tenant.
    """
    first: tuple[str, str] | None = None  # a tenant and the fingerprint of its model
    for name, folder in tenants_of(config).items():
        try:
            fingerprint = _fingerprint(Path(os.path.expanduser(folder)))
        except UserError as error:
            raise UserError(f"serve: tenant '{name}': {error}") from None
        if fingerprint is None:
            continue
        first = first or (name, fingerprint)
        if fingerprint != first[1]:
            raise UserError(
                f"serve: tenant '{name}': it was trained on another model than '{first[0]}' (fingerprint "
                f"{fingerprint[:12]}, not {first[1][:12]}); one server has one model"
            )


def _fingerprint(path: Path) -> str | None:
    """The fingerprint of the model that the adapter of a run or an adapter folder belongs to; None if it is unknown."""
    if not os.path.isdir(path):  # False, not an error, for an invalid path
        raise UserError(f"there is no folder '{path}'")
    if (path / "run.json").is_file():
        run = Run.open(path, key="serve")
        if not run.done:
            raise UserError(f"'{path}' is not finished (it is {run.info.get('status')})")
        method = methods.configured(run.config("method.name")["method"], str(path / "config.yaml"))
        if isinstance(method, Calibrates):
            return None
        if not isinstance(method, Adapts) or method.rewrites():
            raise UserError(
                f"method={method.config.name} leaves no adapter that could share the model; merge it with lrk export "
                f"run={path} export.format=merged, and serve that with model.path=FOLDER"
            )
        path = path / "adapter"
    if (path / PROOF).is_file():
        return str(read_json(path / PROOF, Proof)["fingerprint"])
    if not (path / PEFT).is_file():
        raise UserError(f"'{path}' is no run with an adapter, and no adapter folder")
    return None
