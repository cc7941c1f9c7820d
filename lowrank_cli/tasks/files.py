"""Rows of data files: JSON lines, JSON, CSV, TSV and Parquet, compressed or not, and folders of texts.

JSON lines, JSON, CSV and TSV are read here, because their errors name a line and because texts such as ``NA`` stay
texts. Parquet is read by ``datasets``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import COMPRESSED, parse_json, read_text

Row = dict[str, Any]
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt",)  #: of texts in folders named for labels
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")  #: of images in such folders
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})")


@dataclass(frozen=True)
class Rows:
    """The rows of a split."""

    rows: list[Row]
    name: str  #: row ``i`` is ``name:i`` in messages
    lines: tuple[int, ...] = ()  #: the line of each row in its file, if it is not ``i``
    folder: Path = Path()  #: where relative paths in the rows begin


def split_of(path: Path) -> tuple[str, str]:
    """The name of the split that a file holds, and its kind (``.csv``); empty if it is not a data file."""
    name = path.name
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    stem, dot, kind = name.rpartition(".")
    return (stem, dot + kind) if stem and dot + kind in KINDS else ("", "")


def read(path: Path) -> Rows:
    """The rows of a data file.

    Raises:
        UserError: it is unreadable or empty, or a line of it is malformed (the message names the line).
    """
    kind = split_of(path)[1]
    if kind == ".parquet":
        return Rows(_parquet(path), str(path), folder=path.parent)
    if kind == ".jsonl":
        return Rows(read_jsonl(path), str(path), folder=path.parent)
    if kind == ".json":
        return Rows(_json(path), str(path), folder=path.parent)
    return _table(path, "\t" if kind == ".tsv" else "")


def read_jsonl(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line.

    Raises:
        UserError: the file is unreadable or empty, or a line is not a JSON object (the message names the line).
    """
    return _lines(read_text(path, "rows"), path)


def _lines(text: str, path: Path) -> list[Row]:
    lines = text.rstrip().split("\n")
    if lines == [""]:
        raise UserError(f"{path}: the file is empty")
    return [parse_json(line, dict[str, Any], f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _json(path: Path) -> list[Row]:
    """A list of objects, an object with one key that holds such a list, or JSON lines."""
    text = read_text(path, "rows")
    if text.lstrip()[:1] == "[":
        rows = parse_json(text, list[dict[str, Any]], str(path))
    elif re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        rows = _lines(text, path)
    else:
        lists = [value for value in parse_json(text, dict[str, Any], str(path)).values() if isinstance(value, list)]
        if len(lists) != 1 or not all(isinstance(row, dict) for row in lists[0]):
            raise UserError(f"{path}: expected a list of rows, or an object with one key that holds it")
        rows = lists[0]
    if not rows:
        raise UserError(f"{path}: the file is empty")
    return list(rows)


def _table(path: Path, delimiter: str) -> Rows:
    """CSV with a header. A column of whole numbers holds numbers, every other one texts.

    Args:
        delimiter: between columns; empty for a comma, or a semicolon if the header has no comma.
    """
    text = read_text(path, "rows")
    header = text.partition("\n")[0]
    delimiter = delimiter or (";" if ";" in header and "," not in header else ",")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names, table, lines = [], [], []
    try:
        names = [name.strip() for name in next(reader, [])]
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(f"{path}:{line}: {len(cells)} columns, but the header has {len(names)}")
            table.append(cells)
            lines.append(line)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from error
    if not table:
        raise UserError(f"{path}: the file has no rows below its header")
    if len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}:1: the header needs a different name for each column, not {', '.join(names)}")
    columns = [list(map(int, cells)) if all(map(WHOLE_NUMBER.fullmatch, cells)) else cells for cells in zip(*table)]
    return Rows([dict(zip(names, row)) for row in zip(*columns)], str(path), tuple(lines), path.parent)


def _parquet(path: Path) -> list[Row]:
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        return list(rows.decode(False))  # images stay bytes
    except Exception as error:  # of Arrow and datasets, a family each
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{path}' cannot be read as Parquet: {reason}") from error


def label_folders(root: Path, endings: Sequence[str]) -> dict[str, list[tuple[str, Path]]]:
    """The labels and files of ``SPLIT/LABEL/FILE`` by split, or of ``LABEL/FILE`` by ``""``; empty for none.

    Raises:
        UserError: some labels have files with one of ``endings``, and the folder of another has none.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for file in _ending(root.glob("*/*"), endings):
        found.setdefault("", []).append((file.parent.name, file))
    for file in () if found else _ending(root.glob("*/*/*"), endings):
        found.setdefault(file.parent.parent.name, []).append((file.parent.name, file))
    for split, files in found.items():
        full = {label for label, _ in files}
        empty = (item for item in sorted((root / split).iterdir()) if item.is_dir() and item.name[0] != ".")
        if missing := next((item for item in empty if item.name not in full), None):
            raise UserError(f"task.path: the folder '{missing}' of a label holds no file ({', '.join(endings)})")
    return found


def _ending(paths: Iterable[Path], endings: Sequence[str]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in endings)


def name_images(files: list[tuple[str, Path]], name: str) -> Rows:
    """A row for each image: its file ``image`` below ``name``, and its ``label``, the name of its folder."""
    root = Path(name).expanduser()
    rows = [{"image": str(file.relative_to(root)), "label": label} for label, file in files]
    return Rows(rows, name, folder=root)


def read_texts(files: list[tuple[str, Path]], name: str) -> Rows:
    """A row for each text: its ``text`` and its ``label``, the name of its folder."""
    return Rows(list(_texts(files)), name)


def _texts(files: list[tuple[str, Path]]) -> Iterator[Row]:
    for label, file in files:
        yield {"text": read_text(file, "rows").strip(), "label": label}
