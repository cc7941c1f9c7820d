"""Where rows come from: a file or a folder, the Hub, or a generator of this package. A row is a dict of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import files
from lowrank_cli.tasks.files import Row, Rows, read_jsonl

__all__ = ["Row", "Source", "folder", "open_source", "read_jsonl"]

ONLY = "train"  #: the split of a data set without splits
PROBE_SECONDS = 5  #: the Hub counts as unreachable if it takes longer to answer
WAYS_OUT = "set task.path=FILE or FOLDER (with <split>.jsonl files), choose a generated task (task=tiny_yesno)"


@dataclass(frozen=True)
class Source:
    """The named splits of a data set."""

    name: str  #: of the data set, in messages
    splits: tuple[str, ...]
    read: Callable[[str], Rows]
    whole: bool = False  #: it has no splits: :data:`ONLY` is all of it


def open_source(config: TaskConfig) -> Source:
    """The file or folder ``task.path`` if set, else the generator, else the Hub."""
    if config.path:
        path = Path(config.path).expanduser()
        return _file(path, config.path) if path.is_file() else folder(config.path, images=config.image is not None)
    if config.generator:
        return _generator(config.generator)
    if config.hub:
        return from_hub(config.hub, config.subset)
    raise UserError("task: no data; set task.path (a file, or a folder of them) or task.hub (data set on the Hub)")


def folder(path: str, images: bool = False) -> Source:
    """``<split>.jsonl`` files of a folder (or another of :data:`files.KINDS`), or texts in folders named for labels.

    Args:
        images: these folders hold images instead of texts.

    Raises:
        UserError: there is no such folder, it holds no data, two files of one split, or a label without an image.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"task.path: {path}: no such file or folder")
    found: dict[str, Path] = {}
    for file in sorted(root.iterdir()):
        split, kind = files.split_of(file)
        if kind and file.is_file():
            if split in found:
                raise UserError(f"task.path: {path} holds {found[split].name} and {file.name} of one split; remove one")
            found[split] = file
    if found:
        return Source(path, tuple(found), lambda split: files.read(found[split]))
    labelled = files.label_folders(root, files.IMAGES if images else files.TEXTS)
    if not labelled:
        kinds = ", ".join(files.KINDS)
        also = f", and no LABEL/FILE or SPLIT/LABEL/FILE with {', '.join(files.IMAGES)}" if images else ""
        raise UserError(f"task.path: {path} holds no data ({kinds}){also}; a split is a file such as train.jsonl")
    splits = tuple(split or ONLY for split in labelled)
    read = files.name_images if images else files.read_texts
    return Source(path, splits, lambda split: read(labelled.get(split) or labelled[""], path), whole="" in labelled)


def _file(path: Path, shown: str) -> Source:
    """All rows of one file. Raises UserError if it is of no kind that is read."""
    if not files.split_of(path)[1]:
        kinds = ", ".join(files.KINDS)
        raise UserError(f"task.path: {shown} is no data file (allowed: {kinds}, also compressed, or a folder)")
    return Source(shown, (ONLY,), lambda split: files.read(path), whole=True)


@cache
def _generator(name: str) -> Source:
    """Made once in a process: the stages of a recipe read the same rows."""
    from lowrank_cli.tasks.tiny import generate

    data = generate(name)
    return Source(name, tuple(data), lambda split: Rows(data[split], f"{name} {split}"))


def from_hub(repository: str, subset: str | None) -> Source:
    """The cached copy if there is one (without network), else a download.

    Raises:
        UserError: it is not cached, and the Hub does not answer or does not have it.
    """
    data = _load_cached(repository, subset)
    if data is None:
        _probe(repository)
        data = _download(repository, subset)
    return Source(repository, tuple(data), lambda split: Rows(data[split].to_list(), f"{repository} {split}"))


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
