"""Fitted statistics on disk: one safetensors file, and a JSON file that says what they are and holds its hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_cli.adapter.state import sha256
from lowrank_cli.errors import UserError

FORMAT = 2
TENSORS, ABOUT = "statistics.safetensors", "calibration.json"


def save(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write into the existing ``folder``; ``about`` is JSON."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    record = {"format": FORMAT, **about, "files": {TENSORS: sha256(folder / TENSORS)}}
    (folder / ABOUT).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and what was said about them; UserError where a file is missing, damaged or altered."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        version, expected = about["format"], about["files"][TENSORS]
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no statistics ({ABOUT} is missing)") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: {ABOUT} is damaged") from None
    if version != FORMAT:
        raise UserError(f"{folder}: statistics of format {version} (this version reads {FORMAT})")
    try:
        if sha256(folder / TENSORS) != expected:
            raise UserError(f"{folder}: {TENSORS} was truncated or altered (its SHA-256 is not the one saved with it)")
        return load_file(folder / TENSORS), about
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {TENSORS} cannot be read ({error})") from None
