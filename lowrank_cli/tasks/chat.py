"""Conversations in a chat template: prompts, tokens, and a mask of what is trained.

All turns of the assistant are trained, each with the stop token that the template puts after it. Where the template
marks them (``{% generation %}``), transformers returns the mask. Elsewhere a turn begins where the prompt that asks for
it ends, which must be a prefix of the whole conversation, and ends with its content and the stop token.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lowrank_cli.errors import UserError, nearest
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.conversations import ASSISTANT, SYSTEM, USER, Turn
from lowrank_cli.tasks.encode import Encoded
from lowrank_cli.tasks.task import Example

Turns = Sequence[Turn]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: For conversations with a model that has no template.
PLAIN = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
{{ 'Assistant:\\n' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\\n\\n' }}
{%- else %}
{{ ('User:\\n' if message.role == 'user' else '') + message.content + '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}
"""
#: In front of templates that write the date: what Llama 3.1 writes where it knows none, so that prompts do not age.
DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
MARK = "lrkmark"  #: an answer that no template contains
#: Names that transformers gives to a template, besides the tokenizer's special tokens.
NAMES = ("messages", "add_generation_prompt", "tools", "documents", "enable_thinking")
FUNCTIONS = ("raise_exception", "strftime_now", "namespace", "range", "dict", "cycler", "joiner", "lipsum")


def chat_of(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, *, asked: bool = False) -> Chat | None:
    """The chat template in which a task is trained and asked; None if its prompts stay as they are.

    With ``task.chat=auto`` conversations are written in the model's template, or a plain one if it has none.

    Args:
        asked: a prompt of the user's to a model that no task has trained; ``auto`` writes it in the model's template
            too.

    Raises:
        UserError: ``task.chat=true`` and there is no template; ``task.chat_template`` is wrong; or it, or
            ``task.system``, is set for plain prompts.
    """
    own, given = tokenizer.chat_template, config.chat_template
    conversations = config.answer == "chat"
    if isinstance(own, dict):
        own = own.get("default")
    if config.chats and not (own or given):
        raise UserError("task.chat: true, but the model's tokenizer has no chat template; set task.chat_template=FILE")
    if not (conversations or config.chats or (asked and config.chats is None and (own or given))):
        for key in ("system", "chat_template"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"task.{key}: needs a chat, and the prompts of {config.name} are plain; set task.chat=true"
                )
        return None
    if config.chats is False:
        return Chat(tokenizer, _plain(tokenizer), config.system, "plain turns (task.chat=false)")
    if given is not None:
        return Chat(tokenizer, _checked(given, tokenizer), config.system, "task.chat_template")
    if own is not None:
        return Chat(tokenizer, own, config.system, f"the model's chat template (task.chat={config.chat.lower()})")
    return Chat(tokenizer, _plain(tokenizer), config.system, "plain turns, as the model has no chat template")


class Chat:
    """A chat template with its tokenizer.

    Args:
        template: Jinja, as in a tokenizer's ``chat_template``.
        system: the system turn of conversations that have none.
        source: where the template is from, for messages.

    Raises:
        UserError: the tokenizer cannot say which characters a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, system: str | None, source: str):
        if not tokenizer.is_fast:
            raise UserError("task.chat: the model's tokenizer does not map tokens to text (it is not a fast tokenizer)")
        #: adds no special tokens, as the template writes them all
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A", pair="$A $B", special_tokens=[]
        )
        self.template = DATE * ("strftime_now" in template) + template
        self.system, self.source = system, source
        self.marked = bool(GENERATION.search(template))
        self.stop, self._ending = self._stop()

    def __str__(self) -> str:
        stop = self.stops[0]
        return f"chat: {self.source}; answers end with {self.tokenizer.convert_ids_to_tokens(stop)}"

    @property
    def hash(self) -> str:
        """SHA-256 of what shapes prompts besides the conversation."""
        return hashlib.sha256(json.dumps([self.template, self.system]).encode()).hexdigest()

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer; the first is the one that is trained."""
        return list(dict.fromkeys(token for token in (self.stop, self.tokenizer.eos_token_id) if token is not None))

    def turns(self, example: Example) -> tuple[Turn, ...]:
        """The example as a conversation with a system turn, if there is one."""
        turns = example.turns or (Turn(USER, example.prompt), Turn(ASSISTANT, example.answer.strip()))
        return self._with_system(turns)

    def asking(self, prompt: str) -> str:
        """The text that asks the model to answer ``prompt``."""
        return self._render(self._with_system((Turn(USER, prompt),)), "prompt", answering=True)

    def rendered(self, example: Example, limit: int) -> Example:
        """The example with its prompt as the model reads it, and answers that follow it.

        Args:
            limit: tokens that a prompt may have. One with more loses its first exchanges, as in training.
        """
        turns = self.turns(example)
        before: tuple[Turn, ...] | None = turns[:-1]
        while before is not None:
            prompt = self._render(before, example.where, answering=True)
            before = _without_first_exchange(before) if len(self._ids(prompt)) > limit else None
        choices = tuple(choice.strip() for choice in example.choices)
        return replace(example, prompt=prompt, answer=turns[-1].content, choices=choices, turns=turns)

    def encode(self, example: Example, max_length: int, cut: bool = False) -> Encoded:
        """The conversation up to its last stop token, with loss on all answers.

        One that is too long loses its first exchanges; the last one is shortened like other prompts and answers (see
        :func:`encode.encode_all`, also for the arguments).

        Raises:
            UserError: nothing would be trained, or an answer leaves no space for a prompt.
        """
        remaining: tuple[Turn, ...] | None = self.turns(example)
        while remaining is not None:
            ids, trained = self.tokens(remaining, example.where)
            remaining = _without_first_exchange(remaining) if len(ids) > max_length else None
        start, end = trained.index(1), len(trained) - trained[::-1].index(1)
        prompt, answer = ids[:start], ids[start:end]
        if len(ids[:end]) > max_length:
            longest = [answer[:-1]]
            if example.choices:
                shown = self.rendered(example, max_length)
                longest = encode.candidates(self.tokenizer, shown.prompt, shown.choices)
            limit = encode.max_prompt_length(longest, max_length)
            limit = max(limit, min(start, max_length // 2)) if cut else limit
            if limit < 1:
                raise encode.no_room(max_length, len(answer), example.answer)
            prompt = encode.truncate(self.tokenizer, prompt, limit)
        kept = (prompt + answer)[:max_length]
        gaps = [at - start + len(prompt) for at in range(start, end) if not trained[at]]
        return Encoded(kept, len(prompt), frozenset(at for at in gaps if at < len(kept)))

    def tokens(self, turns: Turns, where: str) -> tuple[list[int], list[int]]:
        """The tokens of the whole conversation, and 1 for each that is trained, 0 for the others.

        Raises:
            UserError: nothing would be trained, or the template does not let itself be masked.
        """
        if self.stop is None:
            raise UserError(
                f"task.chat: {self.source} ends answers with no special token, so a model would not learn to stop; "
                f"give another one by task.chat_template=FILE"
            )
        text = self._render(turns, where)
        row = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = row["input_ids"]
        if self.marked:
            trained = self._marked(turns)
        else:
            spans, trained = self._spans(turns, text, where), [0] * len(ids)
            for at, (first, last) in enumerate(row["offset_mapping"]):
                trained[at] = int(any(start <= first and last <= end for start, end in spans))
        for at in range(1, len(ids)):
            if ids[at] == self.stop and trained[at - 1] and ids[at - 1] != self.stop:
                trained[at] = 1
        if not any(trained):
            raise UserError(f"{where}: {self.source} marks no token of the assistant, so nothing would be trained")
        if ids[len(trained) - 1 - trained[::-1].index(1)] != self.stop:
            raise UserError(f"{where}: {self.source} marks no stop token, so a model would not learn to stop")
        return ids, trained

    def _marked(self, turns: Turns) -> list[int]:
        row = self.tokenizer.apply_chat_template(
            _dicts(turns), chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(row["assistant_masks"])

    def _spans(self, turns: Turns, text: str, where: str) -> list[tuple[int, int]]:
        """Where each answer begins in ``text``, and where its stop token ends."""
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            before = self._render(turns[:number], where, answering=True)
            start = len(before) if text.startswith(before) else -1
            endings = [text.find(content + self._ending, start) for content in (turn.content, turn.content.strip())]
            at = next((at for at in endings if at >= 0), -1)
            if start < 0 or at < 0:
                raise UserError(
                    f"{where}: {self.source} writes turn {number + 1} otherwise than it asks for it, so its tokens "
                    f"cannot be told apart; give a template with {{% generation %}} by task.chat_template=FILE"
                )
            content = turn.content if at == endings[0] else turn.content.strip()
            spans.append((start, at + len(content) + len(self._ending)))
        return spans

    def _stop(self) -> tuple[int | None, str]:
        """The first special token that the template puts after an answer, and the text up to and with it."""
        text = self._render((Turn(USER, "?"), Turn(ASSISTANT, MARK)), self.source)
        after = text.rpartition(MARK)[2]
        row = self.tokenizer(after, add_special_tokens=False, return_offsets_mapping=True)
        added = self.tokenizer.added_tokens_decoder.items()
        special = {*self.tokenizer.all_special_ids, *(token for token, content in added if content.special)}
        for token, (_, end) in zip(row["input_ids"], row["offset_mapping"], strict=True):
            if token in special:
                return token, after[:end]
        return None, after

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self.system is None or turns[0].role == SYSTEM:
            return turns
        return (Turn(SYSTEM, self.system), *turns)

    def _render(self, turns: Turns, where: str, *, answering: bool = False) -> str:
        """The conversation as text; ``answering`` ends it where the assistant's next turn begins."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                _dicts(turns), chat_template=self.template, tokenize=False, add_generation_prompt=answering
            )
        except jinja2.TemplateError as error:
            remedy = "; leave the system turn out (task.system, or the row's)" if turns[0].role == SYSTEM else ""
            raise UserError(f"{where}: {self.source} refuses the conversation: {error}{remedy}") from error
        return text


def _dicts(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _without_first_exchange(turns: tuple[Turn, ...]) -> tuple[Turn, ...] | None:
    """The conversation without the first turns of user and assistant; None if no question would be left."""
    start = int(turns[0].role == SYSTEM)
    return (*turns[:start], *turns[start + 2 :]) if len(turns) > start + 2 else None


def _plain(tokenizer: PreTrainedTokenizerBase) -> str:
    """:data:`PLAIN`, after BOS if the tokenizer puts it in front of texts."""
    return "{{ bos_token }}" * bool(encode.bos(tokenizer)) + PLAIN


class _Generation(jinja2.ext.Extension):
    """Parses ``{% generation %}``, which transformers adds to Jinja."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _checked(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template of the user's. Raises UserError if it is not Jinja, or uses a name that nothing defines."""
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    known = [*NAMES, *FUNCTIONS, *tokenizer.special_tokens_map]
    try:
        used = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"task.chat_template: line {error.lineno}: {error.message}") from error
    for name in sorted(used - set(known)):
        raise UserError(
            f"task.chat_template: unknown variable '{name}'{nearest(name, known)} (allowed: {', '.join(known)})"
        )
    return template
