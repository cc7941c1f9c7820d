"""Where rows come from: a folder of JSON lines, the Hub, or a generator of this package.

A row is a dict of columns. ``read`` returns a split's rows and their name in messages: row ``i`` (from 1) is
``name:i``, in a file line ``i``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import parse_json, read_text
from lowrank_cli.schema import TaskConfig

Row = dict[str, Any]
Rows = list[Row]
PROBE_SECONDS = 5  #: the Hub counts as unreachable if it takes longer to answer
WAYS_OUT = "set task.path=FOLDER (with <split>.jsonl files), choose a generated task (task=tiny_yesno)"


@dataclass(frozen=True)
class Source:
    """The named splits of a data set."""

    name: str  #: of the data set, in messages
    splits: tuple[str, ...]
    read: Callable[[str], tuple[Rows, str]]  #: split -> (rows, their name in messages)


def open_source(config: TaskConfig) -> Source:
    """The folder ``task.path`` if set, else the generator, else the Hub."""
    if config.path:
        return folder(config.path)
    if config.generator:
        return _generator(config.generator)
    if config.hub:
        return from_hub(config.hub, config.subset)
    raise UserError("task: no data; set task.path (folder of JSON lines) or task.hub (data set on the Hub)")


def folder(path: str) -> Source:
    """``<split>.jsonl`` files of a folder.

    Raises:
        UserError: there is no such folder, or it holds no .jsonl file.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is a file; give the folder that holds it" if root.is_file() else "no such folder"
        raise UserError(f"task.path: {path}: {what}")
    files = {file.stem: file for file in sorted(root.glob("*.jsonl"))}
    if not files:
        raise UserError(f"task.path: {path} holds no .jsonl file; a split is a file such as train.jsonl")
    return Source(path, tuple(files), lambda split: (read_jsonl(files[split]), str(files[split])))


def read_jsonl(path: Path) -> Rows:
    """The JSON objects of a file, one a line.

    Raises:
        UserError: the file is unreadable or empty, or a line is not a JSON object (the message names the line).
    """
    lines = read_text(path, "rows").rstrip().split("\n")
    if lines == [""]:
        raise UserError(f"{path}: the file is empty")
    return [parse_json(line, dict[str, Any], f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _generator(name: str) -> Source:
    from lowrank_cli.tasks.tiny import generate

    data = generate(name)
    return Source(name, tuple(data), lambda split: (data[split], f"{name} {split}"))


def from_hub(repository: str, subset: str | None) -> Source:
    """The cached copy if there is one (without network), else a download.

    Raises:
        UserError: it is not cached, and the Hub does not answer or does not have it.
    """
    data = _load_cached(repository, subset)
    if data is None:
        _probe(repository)
        data = _download(repository, subset)
    return Source(repository, tuple(data), lambda split: (data[split].to_list(), f"{repository} {split}"))


def _load_cached(repository: str, subset: str | None) -> Any:
    with _offline():
        try:
            return _load(repository, subset)
        except (OSError, ValueError):  # not cached, or not this subset
            return None


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, ``datasets`` reads its cache only, and quietly."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before[:2]
        datasets.logging.set_verbosity(before[2])


def _probe(repository: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=PROBE_SECONDS)
    except GatedRepoError as error:
        raise UserError(
            f"task.hub: '{repository}' is gated: accept its terms on its Hub page and run `hf auth login`; "
            f"or {WAYS_OUT}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"task.hub: no data set '{repository}' on the Hub, or it is private; {WAYS_OUT}") from error
    except Exception as error:  # every transport has its own family of network errors
        raise UserError(
            f"task.hub: '{repository}' is not in the local cache and the Hub cannot be reached "
            f"({type(error).__name__}); {WAYS_OUT}, or connect and try again"
        ) from error


def _download(repository: str, subset: str | None) -> Any:
    try:
        return _load(repository, subset)
    except ValueError as error:  # such as an unknown subset
        raise UserError(f"task.subset: {repository}: {error}") from error


def _load(repository: str, subset: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(repository, subset)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # The Hub converts repositories that hold a loading script to Parquet, in a branch of this name.
        return datasets.load_dataset(repository, subset, revision="refs/convert/parquet")
