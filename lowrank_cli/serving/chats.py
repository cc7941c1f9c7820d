"""The chat templates of the server: an adapter that was trained in one answers in it, all others in the server's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lowrank_cli.adapter.files import save_load
from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_text
from lowrank_cli.runs import Run
from lowrank_cli.schema import TaskConfig
from lowrank_cli.session.adapter_run import check_chat
from lowrank_cli.tasks.chat import Chat, chat_of

FILE = "chat_template.jinja"  #: where transformers saves the template of a tokenizer
REFUSALS = (TemplateError, ValueError, TypeError)  #: what a template raises for messages that it does not take


@dataclass(frozen=True)
class Template:
    """How conversations are written for a model."""

    text: str  #: Jinja
    ends: frozenset[int]  #: tokens that end an answer, besides EOS
    system: str | None = None  #: system message of conversations that have none

    def tokens(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The prompt that asks for the next answer. Raises UserError if the template refuses the messages."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            ids = tokenizer.apply_chat_template(
                [*messages], chat_template=self.text, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except REFUSALS as problem:
            raise UserError(f"messages: the chat template refuses them: {problem}") from None
        return cast(list[int], ids)


def server_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> Template | None:
    """The template ``given`` by the operator, else the tokenizer's own; None if it has none."""
    own = tokenizer.chat_template
    text = given or (own.get("default") if isinstance(own, dict) else own)
    return None if text is None else Template(text, _ends(tokenizer, text))


def adapter_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Template | None:
    """The template that an adapter was trained in, as its run records it, or the file next to it.

    None if it was trained on plain prompts, or nothing is known. Of a mix of tasks with different templates, it is that
    of the first one; a system turn is used if all tasks have the same.

    Args:
        folder: of a run or of an adapter.

    Raises:
        UserError: the template of the run is not the one that the adapter was trained in.
    """
    for home in (folder, folder.parent):
        if (home / "run.json").is_file():
            return _of_run(tokenizer, Run.open(home, key="serve"))
    if not (folder / FILE).is_file():
        return None
    text = read_text(folder / FILE, "YAML")
    return Template(text, _ends(tokenizer, text))


def _of_run(tokenizer: PreTrainedTokenizerBase, run: Run) -> Template | None:
    section = run.config("task.answer")["task"]
    task = _task(section)
    chats: dict[str, Chat] = {}
    for part in task.parts.values() or [task]:
        if chat := chat_of(tokenizer, part):
            chats[part.name] = chat
    if not chats:
        return None
    adapter = run.path / "adapter"
    if (adapter / save_load.PROOF).is_file():
        hashes = {name: chat.hash for name, chat in chats.items()}
        check_chat(hashes, save_load.read_proof(adapter)["about"], adapter)
    first, *others = chats.values()
    system = first.system if all(other.system == first.system for other in others) else None
    return Template(first.template, frozenset(first.stops), system)


def _task(section: dict[str, Any]) -> TaskConfig:
    """The task of a run's configuration."""
    parts = {name: _task(part) for name, part in section.get("parts", {}).items()}
    return TaskConfig(**{**section, "parts": parts})


def _ends(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[int]:
    """The special token with which a template ends what the assistant says."""
    said = "§"
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except REFUSALS:
        return frozenset()
    assert isinstance(text, str)
    following = tokenizer(text.rpartition(said)[2].lstrip(), add_special_tokens=False).input_ids[:1]
    return frozenset(following) & frozenset(tokenizer.all_special_ids)
