"""Model configurations for tests, and models that are refused."""

from __future__ import annotations

import pytest

from lowrank_cli.errors import UserError
from lowrank_cli.models.load import Head, load
from lowrank_cli.schema import HardwareConfig, ModelConfig


def config(name="made", kind="causal", **values) -> ModelConfig:
    base = {"id": None, "path": None, "bundled": False, "revision": None, "trust_remote_code": False}
    return ModelConfig(name=name, kind=kind, **{**base, **values})


def hardware(precision="fp32") -> HardwareConfig:
    return HardwareConfig(name="cpu", device="cpu", precision=precision, processes=1, threads=1)


def refused(message: str, found: ModelConfig, head: Head | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(found, hardware(), head)
    assert "\n" not in str(error.value)
