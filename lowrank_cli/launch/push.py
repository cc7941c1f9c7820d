"""``lrk push``: uploads what a run exported or trained to the Hub, with its model card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_cli.errors import UserError, WorkFailed, nearest, require_choice, shorten
from lowrank_cli.report import path_format
from lowrank_cli.report.number_format import size
from lowrank_cli.runs import Run
from lowrank_cli.runs.listing import find
from lowrank_cli.schema import parse_overrides

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

STAGES = ("export", "train", "import", "prune")  #: whose runs hold what others can load
KEYS = ("run", "repo", "private", "outputs")
LOGIN = "log in with hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """A folder, and the repository on the Hub that it goes to."""

    run: Run
    folder: Path
    repository: str
    private: bool

    def files(self) -> list[Path]:
        """What is uploaded, by name. Raises UserError for a symbolic link, which may lead out of the run."""
        paths = [self.folder, *sorted(self.folder.rglob("*"))]
        if link := next((path for path in paths if path.is_symlink()), None):
            raise UserError(
                f"run: '{path_format.shown(link)}' is a symbolic link, and push uploads none; put the file itself there"
            )
        return [path for path in paths if path.is_file()]

    def lines(self) -> list[str]:
        """Where to, each file with its size, and what others cannot use of it."""
        files = self.files()
        total = sum(path.stat().st_size for path in files)
        kind = "private" if self.private else "public"
        return [
            f"{path_format.shown(self.folder)} → {self.repository} ({kind}, {size(total)})",
            *(f"  {path.relative_to(self.folder)}  {size(path.stat().st_size)}" for path in files),
            *self._notes(),
        ]

    def _notes(self) -> list[str]:
        if not (self.folder / "adapter_config.json").is_file():
            return []
        base = self.run.read_json(f"{self.folder.name}/adapter_config.json").get("base_model_name_or_path")
        local = isinstance(base, str) and os.path.isabs(base)
        return [f"note: adapter_config.json names the base model by a path of this machine, {base}"] if local else []


def prepare(words: list[str]) -> Upload:
    """The upload that ``KEY=VALUE`` words describe.

    Raises:
        UserError: an unknown key, no repository or a name that the Hub does not allow, or a run with nothing to load.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from lowrank_cli.report.model_card import folder_of

    given = {}
    for override in parse_overrides(words):
        if override.key not in KEYS or not override.sets:
            hint = nearest(override.key, KEYS)
            raise UserError(f"push: unknown key '{override.key}'{hint} (allowed: {', '.join(KEYS)})")
        given[override.key] = override.value.strip("'\"")
    private = given.get("private", "true").lower()
    require_choice("private", private, ("true", "false"))
    if "repo" not in given:
        raise UserError("repo: missing; give repo=ORG/NAME")
    repository = given["repo"]
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"repo: '{repository}' is not the name of a repository on the Hub (allowed: ORG/NAME)")
    run = find(given.get("run"), STAGES, given.get("outputs", "outputs"))
    folder = folder_of(run)
    if folder is None:
        raise UserError(
            f"run: '{path_format.shown(run.path)}' has neither an export nor an adapter; write one with: "
            f"lrk export run={path_format.typed(run.path)}"
        )
    return Upload(run, folder, repository, private == "true")


def push(upload: Upload) -> str:
    """Create the repository if there is none, upload the folder, and return the address of the commit.

    The uploaded card names the repository; that of the run does not, as the next push may go elsewhere. An existing
    repository keeps its visibility.

    Raises:
        UserError: the folder holds a symbolic link, nobody is logged in, or the Hub refuses the name or the token.
        WorkFailed: the Hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from lowrank_cli.report import model_card

    sent: dict[str, Path | bytes] = {str(path.relative_to(upload.folder)): path for path in upload.files()}
    if get_token() is None:
        raise UserError(f"push: nobody is logged in to the Hub; {LOGIN}")
    card = upload.folder / model_card.FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else model_card.card(upload.run, upload.folder)
    sent[model_card.FILE] = model_card.named(text, upload.repository).encode()
    api = HfApi()
    try:
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        commit = api.create_commit(
            upload.repository,
            [CommitOperationAdd(name, content) for name, content in sent.items()],
            commit_message=f"Upload {upload.folder.name} of {upload.run.path.name}",
        )
        return str(commit.commit_url)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"push: the Hub does not let this token write '{upload.repository}'; {LOGIN}") from None
        raise WorkFailed(f"push: the Hub answered {status} for '{upload.repository}'{_said(error)}") from None
    except Exception as error:  # every transport has its own family of network errors
        raise WorkFailed(f"push: the upload failed ({type(error).__name__}: {shorten(str(error))})") from None


def _said(error: HfHubHTTPError) -> str:
    message = " ".join((error.server_message or "").split())
    return f": {message[:200]}" if message else ""
