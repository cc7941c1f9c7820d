"""Fitted statistics on disk: a safetensors file, and a JSON file that describes it and holds its hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from lowrank_cli.adapter.files.save_load import check_files, read_tensors, sha256
from lowrank_cli.errors import UserError
from lowrank_cli.reader import Count, PlainName, Sha256, check, read_json

FORMAT = 2
TENSORS, ABOUT = "statistics.safetensors", "calibration.json"


class About(TypedDict):
    """``calibration.json``."""

    format: int
    fingerprint: str
    adapter: str | None
    task: str
    templates: list[str | dict[str, Any]]  #: as in ``task.templates``
    label_words: list[str]
    answered: bool
    examples: int | None
    share: float | None
    max_length: Count
    data: str
    model: str
    vocabulary: Count
    method: dict[str, Any]
    seed: int
    answers: list[list[Count]]  #: of the first template
    answers_by_template: NotRequired[list[list[list[Count]]]]  #: earlier versions had the same answers for all
    files: dict[PlainName, Sha256]


def save(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write into the existing ``folder``; ``about`` is JSON."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    record = {"format": FORMAT, **about, "files": {TENSORS: sha256(folder / TENSORS)}}
    (folder / ABOUT).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and their ``about``. Raises UserError if a file is missing, damaged or altered."""
    if not (folder / ABOUT).exists():
        raise UserError(f"{folder}: holds no statistics ({ABOUT} is missing)")
    about = read_json(folder / ABOUT, dict[str, Any])
    if (version := about.get("format")) != FORMAT:
        raise UserError(f"{folder}: statistics of format {version} (this version reads {FORMAT})")
    check(about, About, str(folder / ABOUT))
    if TENSORS not in about["files"]:
        raise UserError(f"{folder}: {ABOUT} does not list {TENSORS}")
    check_files(folder, about["files"])
    return read_tensors(folder / TENSORS), about
