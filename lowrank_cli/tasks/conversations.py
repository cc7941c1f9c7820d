"""Rows as conversations, in four forms that are told apart by their columns:

| form | columns |
|---|---|
| OpenAI | ``messages``: a list of ``{"role": …, "content": …}`` |
| ShareGPT | ``conversations``: a list of ``{"from": …, "value": …}`` |
| Alpaca | ``instruction`` and ``output``, and perhaps ``input`` and ``system`` |
| completion | ``prompt`` and ``completion``, each a text or a list of messages |

A conversation may begin with a system turn; then user and assistant take turns, and the assistant has the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_cli.errors import UserError, nearest, shorten

Row = dict[str, Any]

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
#: The names of a role in data sets.
ROLES = {
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
    **dict.fromkeys((USER, "human"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "model", "bot"), ASSISTANT),
}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str  #: ``system``, ``user`` or ``assistant``
    content: str


def read(row: Row, where: str, form: str, lenient: bool = False) -> tuple[Turn, ...]:
    """The conversation of a row; empty if ``lenient`` and the row has no answer.

    Args:
        where: the row's file and line, for messages.
        form: what :func:`form_of` said about the first row.
        lenient: leave out turns of the assistant before the first of the user, and of the user after the last answer.

    Raises:
        UserError: the row has another form, a turn is malformed, roles are out of order, or there is no answer.
    """
    if (own := form_of(row, where)) != form:
        raise UserError(
            f"{where}: the row has {_columns(own)}, but the first has {_columns(form)}; give one form a file"
        )
    turns = FORMS[form][1](row, where)
    if lenient:
        system, turns = [turn for turn in turns[:1] if turn.role == SYSTEM], [t for t in turns if t.role != SYSTEM]
        first = next((at for at, turn in enumerate(turns) if turn.role == USER), len(turns))
        last = max((at for at, turn in enumerate(turns) if turn.role == ASSISTANT), default=-1)
        turns = [*system, *turns[first : last + 1]]
        if last < first or not turns[-1].content.strip():
            return ()
    _check_order(turns, where)
    return tuple(turns)


def form_of(row: Row, where: str) -> str:
    """The form of a row: a key of :data:`FORMS`. Raises UserError if it has the columns of none."""
    for form, (needed, _) in FORMS.items():
        if all(row.get(column) is not None for column in needed):
            return form
    forms = "; ".join(_columns(form) for form in FORMS)
    names = [column for needed, _ in FORMS.values() for column in needed]
    hint = next((hint for column in row if column not in names and (hint := nearest(column, names))), "")
    raise UserError(
        f"{where}: no conversation in columns {', '.join(row) or '(none)'}{hint} (allowed: {forms}); "
        f"task.columns.NAME=COLUMN says which column is meant"
    )


def _columns(form: str) -> str:
    return " and ".join(FORMS[form][0])


def _check_order(turns: Sequence[Turn], where: str) -> None:
    """Raise UserError unless the roles are system (or not), then user and assistant in turn, the assistant last."""
    roles = [turn.role for turn in turns]
    if ASSISTANT not in roles:
        raise UserError(
            f"{where}: no turn of the assistant, so nothing to train on; task.lenient=true leaves such rows out"
        )
    start = int(roles[0] == SYSTEM)
    for number, role in enumerate(roles[start:], start + 1):
        due = ASSISTANT if (number - start) % 2 == 0 else USER
        if role != due:
            more = " (a system turn comes first)" if role == SYSTEM else ""
            more = "; task.lenient=true leaves it out" if number == start + 1 and role == ASSISTANT else more
            raise UserError(f"{where}: turn {number} is of {role}, where {due} is due{more}")
    if roles[-1] != ASSISTANT:
        raise UserError(f"{where}: the last turn is of {roles[-1]} and has no answer; task.lenient=true leaves it out")
    for number, turn in enumerate(turns, 1):
        if turn.role == ASSISTANT and not turn.content.strip():
            raise UserError(f"{where}: turn {number}, of the assistant, is empty")


def _messages(listed: Any, where: str, column: str, role_key: str = "role", text_key: str = "content") -> list[Turn]:
    """The turns in a list; a list of ShareGPT may use OpenAI's keys, as some exports do."""
    if not isinstance(listed, list) or not listed or not all(isinstance(item, dict) for item in listed):
        raise UserError(f'{where}: column \'{column}\' must list turns such as {{"{role_key}": …, "{text_key}": …}}')
    turns = []
    for number, item in enumerate(listed, 1):
        at = f"{where}: {column}, turn {number}"
        name = item.get(role_key, item.get("role"))
        if not isinstance(name, str) or name.strip().lower() not in ROLES:
            hint = nearest(name, ROLES) if isinstance(name, str) else f"; its keys are {', '.join(map(str, item))}"
            shown = shorten(repr(name))
            raise UserError(f"{at}: '{role_key}' is {shown}{hint} (allowed: {', '.join(ROLES)})")
        turns.append(Turn(ROLES[name.strip().lower()], _content(item.get(text_key, item.get("content")), text_key, at)))
    return turns


def _content(value: Any, key: str, at: str) -> str:
    """A text, or the parts of one: ``[{"type": "text", "text": …}]``."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"{at}: '{key}' must be text, not {shorten(repr(value))}")
    return value


def _alpaca(row: Row, where: str) -> list[Turn]:
    system, given = row.get("system") or "", row.get("input") or ""
    asked = _content(row["instruction"], "instruction", where)
    extra = _content(given, "input", where)
    turns = [Turn(USER, f"{asked}\n\n{extra}" if extra.strip() else asked)]
    turns.append(Turn(ASSISTANT, _content(row["output"], "output", where)))
    return [*([Turn(SYSTEM, _content(system, "system", where))] if system else []), *turns]


def _completion(row: Row, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for column, role in (("prompt", USER), ("completion", ASSISTANT)):
        value = row[column]
        turns += (
            _messages(value, where, column) if isinstance(value, list) else [Turn(role, _content(value, column, where))]
        )
    return turns


#: Form -> its columns, and the function that reads them.
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], list[Turn]]]] = {
    "messages": (("messages",), lambda row, where: _messages(row["messages"], where, "messages")),
    "sharegpt": (
        ("conversations",),
        lambda row, where: _messages(row["conversations"], where, "conversations", "from", "value"),
    ),
    "alpaca": (("instruction", "output"), _alpaca),
    "completion": (("prompt", "completion"), _completion),
}
