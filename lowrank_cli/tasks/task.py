"""A task: rows of a data set as prompts with answers, in three splits.

Column names (in ``template``, ``text`` and ``target``) may list alternatives, ``question|question_stem``: the
first that a row has is read. ``choices`` tasks read the options from the column ``choices``: a list of
strings, or the Hub's ``{"text": [...], "label": [...]}``. ``messages.1.content`` reads inside a column.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank_cli.errors import UserError, inside, nearest
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import sources, splits
from lowrank_cli.tasks.patterns import require_pattern

LETTERS = string.ascii_uppercase
OPTION = "{letter}. {text}"  #: one line of ``{options}``


@dataclass(frozen=True)
class Example:
    """One question with what counts as its answer.

    ``answer`` and ``choices`` begin with a space where they continue the prompt's last line.
    """

    prompt: str
    answer: str  #: what a causal model is trained to say
    choices: tuple[str, ...]  #: candidate answers: label words or letters; empty for free answers
    label: int | None  #: index of the answer in ``choices``
    text: tuple[str, ...]  #: what an encoder reads: a text, or a pair
    references: tuple[str, ...]  #: every right answer
    part: str = ""  #: of a mix: the task that it comes from
    first: int = 0  #: index of the first of ``choices`` among the task's ``label_words``
    columns: tuple[str, ...] = ()  #: what stands in each of the template's :func:`columns`


@dataclass(frozen=True)
class Task:
    """A data set ready to be encoded."""

    config: TaskConfig
    name: str
    answer: str  #: ``labels``, ``choices``, ``free`` or ``mix``
    label_words: tuple[str, ...]  #: of a mix: those of all its parts, one after the other
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    template_hash: str  #: changes with anything that shapes prompts or answers
    metric: str


def load(config: TaskConfig) -> Task:
    """Read, check and split a data set. The same config gives the same task, whatever the run's seed.

    On dev and test, free answers to one and the same prompt become one example with several references.

    Raises:
        UserError: data missing, malformed or unlike the config (file and line named), or too few for three splits.
    """
    if config.answer == "mix":
        return _mix(config)
    _check_template(config)
    source = sources.open_source(config)
    names = splits.names(config, source.splits, source.where)
    parts = [examples(config, *source.read(name)) for name in names]
    free = config.answer == "free"
    train, *held_out = parts
    held_out = [_merge(part) if free else part for part in held_out]
    if config.splits == "given":
        dev, test = held_out
    elif config.splits == "held_out":
        kept, taken = splits.hold_out([item.prompt for item in train], min(2 * splits.HELD_OUT, len(train) // 5))
        held = _merge(_pick(train, taken)) if free else _pick(train, taken)
        train, (dev, test) = _pick(train, kept), (_pick(held, half) for half in splits.halves(len(held)))
    elif len(train) < splits.SMALL:
        dev, test = (_pick(held_out[0], indices) for indices in splits.halves(len(held_out[0])))
    else:
        kept, taken = splits.hold_out([item.prompt if free else index for index, item in enumerate(train)])
        train, dev, test = _pick(train, kept), _pick(train, taken), held_out[0]
        dev = _merge(dev) if free else dev
    train, dev, test = (_pick(part, splits.limited(len(part), config.limit)) for part in (train, dev, test))
    sizes = {"train": len(train), "dev": len(dev), "test": len(test)}
    empty = [name for name, size in sizes.items() if not size]
    if empty:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"task: {source.where} leaves no example for {' and '.join(empty)} ({counts})")
    return Task(
        config=config,
        name=config.name,
        answer=config.answer,
        label_words=tuple(config.label_words),
        train=train,
        dev=dev,
        test=test,
        template_hash=template_hash(config),
        metric=config.metric,
    )


def _mix(config: TaskConfig) -> Task:
    """The parts' examples, split by split; ``task.limit`` caps a split of the whole mix.

    Raises:
        UserError: what is wrong with a part, or a limit that leaves a part without examples.
    """
    splits_of: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    words: list[str] = []
    for name, part in config.parts.items():
        with inside("task", f"task.parts.{name}"):
            task = load(part)
        for split, found in splits_of.items():
            found += [replace(example, part=name, first=len(words)) for example in getattr(task, split)]
        words += task.label_words
    limited = {split: _pick(found, splits.limited(len(found), config.limit)) for split, found in splits_of.items()}
    for split, found in limited.items():
        left_out = [name for name in config.parts if all(example.part != name for example in found)]
        if left_out:
            raise UserError(f"task.limit: {config.limit} leaves no {split} example of {', '.join(left_out)}; raise it")
    return Task(
        config=config,
        name=config.name,
        answer=config.answer,
        label_words=tuple(words),
        **limited,
        template_hash=template_hash(config),
        metric=config.metric,
    )


def template_hash(config: TaskConfig) -> str:
    """SHA-256 over all that shapes prompts and answers; data, limits and metric do not enter."""
    if config.parts:
        parts = {name: template_hash(part) for name, part in config.parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    shape = {
        "answer": config.answer,
        "template": config.template,
        "text": list(config.text),
        "label_words": list(config.label_words),
        "label_values": list(config.label_values),
        "option": OPTION,
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def template_hashes(config: TaskConfig) -> dict[str, str]:
    """:func:`template_hash` of a task by its name, and of each part of a mix."""
    return {task.name: template_hash(task) for task in (*config.parts.values(), config)}


def examples(config: TaskConfig, rows: Sequence[dict], where: str) -> list[Example]:
    """One example for each row (``task.lenient``: that has an answer).

    ``where`` names the rows in messages: row ``i``, from 1, is ``where:i``.

    Raises:
        UserError: an absent or empty column, or an answer outside the allowed ones.
    """
    make = {"labels": _label, "choices": _choice, "free": _free}[config.answer]
    names, found = columns(config.template), []
    for number, row in enumerate(rows, start=1):
        place = f"{where}:{number}"
        if config.lenient and not _text(row, config.target, place).strip():
            continue
        options, label, choices, references = make(config, row, place)
        prompt = _prompt(config.template, row, options, place)
        space = "" if prompt[-1:].isspace() else " "
        found.append(
            Example(
                prompt=prompt,
                answer=space + references[0],
                choices=tuple(space + choice for choice in choices),
                label=label,
                text=tuple(_text(row, column, place) for column in config.text),
                references=references,
                columns=tuple(_text(row, name, place) for name in names),
            )
        )
    return found


def columns(template: str) -> list[str]:
    """The columns that a template reads, each once, in its order."""
    fields = (field for _, field, _, _ in string.Formatter().parse(template) if field not in (None, "options"))
    return list(dict.fromkeys(fields))


def content_free(config: TaskConfig, values: Mapping[str, str]) -> Example:
    """The prompt of a task with labels when ``values`` stand in the template's :func:`columns`: nothing to answer."""
    parsed = string.Formatter().parse(config.template)
    prompt = "".join(literal + (values[field] if field else "") for literal, field, _, _ in parsed)
    space = "" if prompt[-1:].isspace() else " "
    choices = tuple(space + word for word in config.label_words)
    return Example(prompt, "", choices, None, tuple(values.values()), (), columns=tuple(values.values()))


# Each returns (options text, label, choices, references) of one row.


def _label(config: TaskConfig, row: dict, place: str):
    words, value = tuple(config.label_words), _column(row, config.target, place)
    index = _label_index(value, words, tuple(config.label_values))
    if index is None:
        if config.label_values:
            allowed = ", ".join(config.label_values)
        else:
            allowed = f"0 to {len(words) - 1}" + (", false, true" if len(words) == 2 else "")
        raise UserError(
            f"{place}: label {value!r} in column '{config.target}' is outside the task's labels "
            f"(allowed: {allowed}, {', '.join(words)})"
        )
    return "", index, words, (words[index],)


def _label_index(value: Any, words: Sequence[str], values: Sequence[str]) -> int | None:
    if values:
        key, known = str(value).strip().casefold(), [item.casefold() for item in values]
        if key in known:
            return known.index(key)
    elif isinstance(value, bool):
        return int(value) if len(words) == 2 else None
    elif isinstance(value, int):
        return value if 0 <= value < len(words) else None
    known = [word.casefold() for word in words]
    key = value.strip().casefold() if isinstance(value, str) else None
    return known.index(key) if key in known else None


def _choice(config: TaskConfig, row: dict, place: str):
    listed = _column(row, "choices", place)
    names: list[str] = []
    if isinstance(listed, dict):
        listed, labels = listed.get("text"), listed.get("label", [])
        if not isinstance(labels, list) or (labels and isinstance(listed, list) and len(labels) != len(listed)):
            raise UserError(f"{place}: column 'choices' must have a label for each text, not {labels!r}")
        names = [_plain(name, "choices", place) for name in labels]
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
        raise UserError(f"{place}: column 'choices' must list 2 to {len(LETTERS)} options, not {listed!r}")
    listed = [_plain(text, "choices", place) for text in listed]
    letters = tuple(LETTERS[: len(listed)])
    value = _column(row, config.target, place)
    if isinstance(value, int) and not isinstance(value, bool):
        index = value if 0 <= value < len(listed) else None
    else:
        known = names or list(letters)
        key = str(value).strip()
        index = known.index(key) if key in known else None
    if index is None:
        raise UserError(
            f"{place}: answer {value!r} in column '{config.target}' is none of the row's options "
            f"(allowed: 0 to {len(listed) - 1}, {', '.join(names or letters)})"
        )
    options = "\n".join(OPTION.format(letter=letter, text=text) for letter, text in zip(letters, listed))
    return options, index, letters, (letters[index],)


def _free(config: TaskConfig, row: dict, place: str):
    answer = _text(row, config.target, place).strip()
    if not answer:
        raise UserError(f"{place}: column '{config.target}' holds no answer")
    if config.extract and not re.search(config.extract, answer):
        raise UserError(f"{place}: task.extract={config.extract} matches nothing in {answer[-60:]!r}")
    return "", None, (), (answer,)


def _prompt(template: str, row: dict, options: str, place: str) -> str:
    pieces = []
    for literal, field, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if field is not None:
            pieces.append(options if field == "options" else _text(row, field, place))
    return "".join(pieces)


def _text(row: dict, column: str, place: str) -> str:
    return _plain(_column(row, column, place), column, place)


def _plain(value: Any, column: str, place: str) -> str:
    """Text, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise UserError(f"{place}: column '{column}' must hold text, not {value!r}")
    if value != value:
        raise UserError(f"{place}: column '{column}' must hold text, not NaN")
    return str(value)


def _column(row: dict, column: str, place: str) -> Any:
    for name in column.split("|"):
        if name in row:
            return row[name]
        found: Any = row
        for step in name.split("."):
            known = dict(enumerate(found)) if isinstance(found, list) else found if isinstance(found, dict) else {}
            found = known.get(int(step) if isinstance(found, list) and step.isdigit() else step)
        if found is not None:
            return found
    raise UserError(f"{place}: no column '{column}'{nearest(column, row)} (columns: {', '.join(row)})")


def _check_template(config: TaskConfig) -> None:
    try:
        parsed = list(string.Formatter().parse(config.template))
    except ValueError as error:
        raise UserError(f"task.template: {error} in {config.template!r}") from error
    fields = [field for _, field, _, _ in parsed if field is not None]
    if not all(fields):
        raise UserError(f"task.template: an empty {{}} in {config.template!r}; name a column")
    if ("options" in fields) != (config.answer == "choices"):
        raise UserError(
            "task.template: {options} lists the options of task.answer=choices: "
            f"{'it is missing' if config.answer == 'choices' else f'task.answer={config.answer} has none'}"
        )
    if not 1 <= len(config.text) <= 2:
        raise UserError(f"task.text: an encoder reads one or two columns, not {list(config.text)}")
    if config.extract:
        require_pattern("task.extract", config.extract)


def _merge(items: list[Example]) -> list[Example]:
    """One example for each prompt, with the references of all."""
    merged: dict[str, Example] = {}
    for item in items:
        first = merged.get(item.prompt)
        merged[item.prompt] = replace(first, references=first.references + item.references) if first else item
    return list(merged.values())


def _pick(items: list[Example], indices: list[int]) -> list[Example]:
    return [items[index] for index in indices]
