"""A task: rows of a data set as prompts with answers, in three splits.

Column names (in ``template``, ``text`` and ``target``) may list alternatives, ``question|question_stem``: the
first one that a row has is read. ``choices`` tasks read the options from one column, which holds a list of strings or
the Hub's ``{"text": [...], "label": [...]}``, or from a column each. ``messages.1.content`` reads inside a column.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError, inside, nearest
from lowrank_cli.schema import TaskConfig
from lowrank_cli.tasks import conversations, sources, splits
from lowrank_cli.tasks.conversations import Turn
from lowrank_cli.tasks.patterns import require_pattern
from lowrank_cli.tasks.sources import Row

LETTERS = string.ascii_uppercase
OPTION = "{letter}. {text}"  #: one line of ``{options}``
MARKED = re.compile(r"\(?([A-Z])[).:]\s*")  #: an option that begins with its letter
SEPARATOR = ", "  #: between the labels of a ``multi_label`` answer


Picture = Path | bytes  #: an image's file, or what is in it


@dataclass(frozen=True)
class Example:
    """A prompt and its right answers.

    ``answer`` and ``choices`` begin with a space where they continue the prompt's last line.
    """

    prompt: str
    answer: str  #: the text that a causal model is trained to generate
    choices: tuple[str, ...]  #: candidate answers: label words or letters; empty for free answers
    label: int | None  #: index of the answer in ``choices``
    text: tuple[str, ...]  #: an encoder's input: a text, or a pair
    references: tuple[str, ...]  #: all right answers
    task: str = ""  #: in a mix: the task that it comes from
    first: int = 0  #: index of the first of ``choices`` among the task's ``label_words``
    columns: tuple[str, ...] = ()  #: its values of the template's :func:`columns`
    turns: tuple[Turn, ...] = ()  #: the conversation that ends with the answer; empty for other tasks
    #: what an encoder's head learns besides ``label``: the number, the labels, or the tag of each word
    target: float | tuple[int, ...] | None = None
    words: tuple[str, ...] = ()  #: of ``tags``: what is tagged
    picture: Picture | None = None  #: the image that the answer is about
    where: str = dataclass_field(default="", compare=False)  #: file and line, for messages


@dataclass(frozen=True)
class Task:
    """A data set ready to be encoded."""

    config: TaskConfig
    name: str
    answer: str  #: see :class:`~lowrank_cli.schema.TaskConfig`
    label_words: tuple[str, ...]  #: of a mix: those of all its tasks, concatenated
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    template_hash: str  #: changes with anything that shapes prompts or answers
    metric: str
    note: str = ""  #: how the data were split, if nothing says so


def load(config: TaskConfig, only: str | None = None) -> Task:
    """Read, check and split a data set. The result does not depend on the run's seed.

    On dev and test, free answers to the same prompt become one example with several references.

    Args:
        only: ``dev`` or ``test`` if no other split is used. The others are left empty where this one does not follow
            from them, so the data need not have them.

    Raises:
        UserError: the data are missing, malformed or do not fit the config (the message names file and line), or there
            are too few for three splits.
    """
    if config.answer == "mix":
        return _mix(config, only)
    _check_template(config)
    source = sources.open_source(config)
    if only is not None and (name := splits.alone(config, only, source)):
        return _alone(config, only, source, name)
    names = (sources.ONLY,) if source.whole else splits.names(config, source.splits, source.name)
    free = config.answer in ("free", "chat")
    read = [source.read(name) for name in names]
    train, *held_out = [examples(config, split.rows, split.name, split.lines, split.folder) for split in read]
    held_out = [_merge(split) if free else split for split in held_out]
    if source.whole or config.splits == "held_out":
        kept, taken = splits.hold_out([item.prompt for item in train], min(2 * splits.HELD_OUT, len(train) // 5))
        held = _merge(_pick(train, taken)) if free else _pick(train, taken)
        train, (dev, test) = _pick(train, kept), (_pick(held, half) for half in splits.halves(len(held)))
    elif config.splits == "given":
        dev, test = held_out
    elif config.splits == "paper" and len(train) < splits.SMALL:
        dev, test = (_pick(held_out[0], indices) for indices in splits.halves(len(held_out[0])))
    else:
        keys = [item.prompt if free else index for index, item in enumerate(train)]
        kept, taken = splits.hold_out(keys, min(splits.HELD_OUT, len(train) // 5))
        train, dev, test = _pick(train, kept), _pick(train, taken), held_out[0]
        dev = _merge(dev) if free else dev
    train, dev, test = (_pick(split, splits.limited(len(split), config.limit)) for split in (train, dev, test))
    sizes = {"train": len(train), "dev": len(dev), "test": len(test)}
    empty = [name for name, size in sizes.items() if not size]
    if empty:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"task: {source.name} leaves no example for {' and '.join(empty)} ({counts})")
    note = _split_note(source.name, sizes) if source.whole else ""
    return _task(config, config.label_words, {"train": train, "dev": dev, "test": test}, note)


def _alone(config: TaskConfig, only: str, source: sources.Source, name: str) -> Task:
    """The task with the split ``only``, which is all of the source's split ``name``, and no others."""
    split = source.read(name)
    rows = examples(config, split.rows, split.name, split.lines, split.folder)
    rows = _merge(rows) if config.answer in ("free", "chat") else rows
    if not rows:
        raise UserError(f"task: {split.name} leaves no example for {only}")
    missing = f"{source.name} has no split '{config.train_split}', so the {only} set is all of '{name}'"
    rows = _pick(rows, splits.limited(len(rows), config.limit))
    return _task(
        config,
        config.label_words,
        {"train": [], "dev": [], "test": [], only: rows},
        "" if config.splits == "given" else missing,
    )


def _task(config: TaskConfig, words: Sequence[str], by_split: Mapping[str, list[Example]], note: str) -> Task:
    if config.image is not None:
        from lowrank_cli.tasks.images import require_images  # texts are read without torch and Pillow

        for split in by_split.values():
            require_images(split)
    return Task(
        config=config,
        name=config.name,
        answer=config.answer,
        label_words=tuple(words),
        **by_split,
        template_hash=template_hash(config),
        metric=config.metric,
        note=note,
    )


def _split_note(path: str, sizes: Mapping[str, int]) -> str:
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    return f"{Path(path).name} has no splits: {counts}, the same for every seed"


def _mix(config: TaskConfig, only: str | None) -> Task:
    """The examples of all tasks of a mix, split by split; ``task.limit`` caps the splits of the whole mix.

    Raises:
        UserError: a task of the mix is wrong, or the limit leaves none of its examples.
    """
    mixed: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    words: list[str] = []
    notes: list[str] = []
    for name, of_mix in config.parts.items():
        with inside("task", f"task.parts.{name}"):
            task = load(of_mix, only)
        for split, items in mixed.items():
            items += [replace(example, task=name, first=len(words)) for example in getattr(task, split)]
        words += task.label_words
        notes += [task.note] if task.note else []
    limited = {split: _pick(items, splits.limited(len(items), config.limit)) for split, items in mixed.items()}
    for split, items in limited.items():
        if only not in (None, split):
            continue
        left_out = [name for name in config.parts if all(example.task != name for example in items)]
        if left_out:
            raise UserError(f"task.limit: {config.limit} leaves no {split} example of {', '.join(left_out)}; raise it")
    return _task(config, words, limited, "; ".join(notes))


def template_hash(config: TaskConfig) -> str:
    """SHA-256 of everything that shapes prompts and answers, but not of data, limits and metric."""
    if config.parts:
        hashes = {name: template_hash(task) for name, task in config.parts.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    shape: dict[str, Any] = {
        "answer": config.answer,
        "template": config.template,
        "text": list(config.text),
        "label_words": list(config.label_words),
        "label_values": list(config.label_values),
        "option": OPTION,
    }
    options = list(config.options) if config.options != ["choices"] else None
    later = {"chat": config.chats, "system": config.system, "chat_template": config.chat_template, "options": options}
    later["image"] = config.image
    shape |= {key: value for key, value in later.items() if value is not None}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def template_hashes(config: TaskConfig) -> dict[str, str]:
    """:func:`template_hash` by name: of a task, and of each task of a mix."""
    return {task.name: template_hash(task) for task in (*config.parts.values(), config)}


def examples(
    config: TaskConfig, rows: Sequence[Row], name: str, lines: Sequence[int] = (), folder: Path = Path()
) -> list[Example]:
    """One example for each row; with ``task.lenient``, rows without an answer are skipped.

    Args:
        name: what messages call the rows: row ``i``, from 1, is ``name:i``.
        lines: what is written instead of ``i``, for each row.
        folder: where relative paths of images begin.

    Raises:
        UserError: an image is missing, a column is absent or empty, or an answer is not allowed.
    """
    numbers = lines or range(1, len(rows) + 1)
    if config.columns:
        rows = [_renamed(config, row, f"{name}:{number}") for row, number in zip(rows, numbers, strict=True)]
    if config.answer == "chat":
        return _chats(config, rows, name, numbers)
    if config.image is not None:
        return _of_images(config, config.image, rows, name, numbers, folder)
    if config.answer in TARGETS:
        return [_for_encoder(config, row, f"{name}:{number}") for number, row in zip(numbers, rows, strict=True)]
    make = {"labels": _label, "choices": _choice, "free": _free}[config.answer]
    names, result = columns(config.template), []
    texts = config.text or names[:2]
    for number, row in zip(numbers, rows, strict=True):
        where = f"{name}:{number}"
        if config.lenient and not any(_answers(row, config.target, where)):
            continue
        options, label, choices, references = make(config, row, where)
        prompt = _prompt(config.template, row, options, where)
        space = "" if prompt[-1:].isspace() else " "
        result.append(
            Example(
                prompt=prompt,
                answer=space + references[0],
                choices=tuple(space + choice for choice in choices),
                label=label,
                text=tuple(_text(row, column, where) for column in texts),
                references=references,
                columns=tuple(_text(row, column, where) for column in names),
                where=where,
            )
        )
    return result


def _of_images(
    config: TaskConfig, column: str, rows: Sequence[Row], name: str, numbers: Sequence[int], folder: Path
) -> list[Example]:
    """Examples of rows with an image: a file, or the Hub's ``{"bytes": …, "path": …}``. Prompts have its name."""
    values = [_column(row, column, f"{name}:{number}") for row, number in zip(rows, numbers, strict=True)]
    named, pictures = [], []
    for row, value, number in zip(rows, values, numbers, strict=True):
        picture = _picture(value, column, f"{name}:{number}", folder)
        shown = value if isinstance(value, str) else value.get("path") or f"{name}:{number}"
        named.append(row | {column: shown})
        pictures.append(picture)
    plain = examples(replace(config, image=None, columns={}), named, name, numbers)
    return [replace(example, picture=picture) for example, picture in zip(plain, pictures, strict=True)]


def _picture(value: Any, column: str, where: str, folder: Path) -> Picture:
    if isinstance(value, dict) and isinstance(content := value.get("bytes"), bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise UserError(f"{where}: column '{column}' must name the file of an image, not {str(value)[:60]!r}")
    file = folder / Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{where}: there is no image '{file}' (column '{column}')")
    return file


def _renamed(config: TaskConfig, row: Row, where: str) -> Row:
    """The row with the columns that ``task.columns`` names."""
    try:
        return row | {name: _column(row, column, where) for name, column in config.columns.items()}
    except UserError as error:
        raise UserError(f"task.columns: {error}") from None


def _chats(config: TaskConfig, rows: Sequence[Row], name: str, numbers: Sequence[int]) -> list[Example]:
    """One example for each conversation: its last turn is the answer, and all before it the prompt."""
    result, form = [], conversations.form_of(rows[0], f"{name}:{numbers[0]}") if rows else ""
    for number, row in zip(numbers, rows, strict=True):
        where = f"{name}:{number}"
        turns = conversations.read(row, where, form, config.lenient)
        if turns:
            prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in turns[:-1])
            answer = turns[-1].content
            result.append(Example(prompt, answer, (), None, (), (answer,), turns=turns, where=where))
    return result


def columns(template: str) -> list[str]:
    """The columns that a template reads, in order of first use."""
    fields = (field for _, field, _, _ in string.Formatter().parse(template) if field not in (None, "options"))
    return list(dict.fromkeys(fields))


def content_free(config: TaskConfig, values: Mapping[str, str]) -> Example:
    """A prompt without an answer: the template of a task with labels, with ``values`` as its :func:`columns`."""
    parsed = string.Formatter().parse(config.template)
    prompt = "".join(literal + (values[field] if field else "") for literal, field, _, _ in parsed)
    space = "" if prompt[-1:].isspace() else " "
    choices = tuple(space + word for word in config.label_words)
    return Example(prompt, "", choices, None, tuple(values.values()), (), columns=tuple(values.values()))


def flipped(config: TaskConfig, example: Example) -> list[Example]:
    """The example the other way round, once for each of its choices: the choice is the prompt, the query the answer.

    What the template says after its last column goes in front: ``Review: {text}\\nSentiment:`` becomes
    ``Sentiment: good\\nReview: …``.
    """
    *_, (literal, field, _, _) = string.Formatter().parse(config.template)
    end = len(example.prompt) - (len(literal) if field is None else 0)
    query, question = "\n" + example.prompt[:end], example.prompt[end:].strip()
    return [
        replace(example, prompt=(question + choice).strip(), answer=query, choices=(query,), label=0, references=())
        for choice in example.choices
    ]


#: Options text, label, choices and references of one row.
Answer = tuple[str, int | None, tuple[str, ...], tuple[str, ...]]


def _label(config: TaskConfig, row: Row, where: str) -> Answer:
    words, index = tuple(config.label_words), _require_label(config, _column(row, config.target, where), where)
    return "", index, words, (words[index],)


def _require_label(config: TaskConfig, value: Any, where: str) -> int:
    """The index of the label that ``value`` names. Raises UserError if it names none."""
    words = tuple(config.label_words)
    index = _label_index(value, words, tuple(config.label_values))
    if index is None:
        if config.label_values:
            allowed = ", ".join(config.label_values)
        else:
            allowed = f"0 to {len(words) - 1}" + (", false, true" if len(words) == 2 else "")
        raise UserError(
            f"{where}: label {value!r} in column '{config.target}' is outside the task's labels "
            f"(allowed: {allowed}, {', '.join(words)})"
        )
    return index


def _label_index(value: Any, words: Sequence[str], values: Sequence[str]) -> int | None:
    """The index of the label that ``value`` names: one of ``label_values``, an index, or a label word."""
    if values:
        key, known = str(value).strip().casefold(), [item.casefold() for item in values]
        if key in known:
            return known.index(key)
    elif isinstance(value, bool):
        return int(value) if len(words) == 2 else None
    elif isinstance(value, int):
        return value if 0 <= value < len(words) else None
    known = [word.casefold() for word in words]
    word = value.strip().casefold() if isinstance(value, str) else None
    return None if word is None or word not in known else known.index(word)


def _choice(config: TaskConfig, row: Row, where: str) -> Answer:
    listed, names = _options(config, row, where)
    letters = tuple(LETTERS[: len(listed)])
    value, values = _column(row, config.target, where), list(config.label_values[: len(listed)])
    if isinstance(value, int) and not isinstance(value, bool) and not values:
        index = value if 0 <= value < len(listed) else None
    else:
        known = values or names or list(letters)
        key = str(value).strip()
        index = known.index(key) if key in known else None
    if index is None:
        allowed = values or [f"0 to {len(listed) - 1}", *(names or letters)]
        raise UserError(
            f"{where}: answer {value!r} in column '{config.target}' is none of the row's options "
            f"(allowed: {', '.join(allowed)})"
        )
    options = "\n".join(OPTION.format(letter=letter, text=text) for letter, text in zip(letters, listed))
    return options, index, letters, (letters[index],)


def _options(config: TaskConfig, row: Row, where: str) -> tuple[list[str], list[str]]:
    """The options of a row, and what the row calls them, if anything.

    Where each option begins with its letter (``A)``), the letter is left out.
    """
    names: list[str] = []
    if len(config.options) > 1:
        options = [_text(row, column, where) for column in config.options]
    else:
        (column,) = config.options
        listed: Any = _column(row, column, where)
        if isinstance(listed, dict):
            listed, labels = listed.get("text"), listed.get("label", [])
            if not isinstance(labels, list) or (labels and isinstance(listed, list) and len(labels) != len(listed)):
                raise UserError(f"{where}: column '{column}' must have a label for each text, not {labels!r}")
            names = [_plain(name, column, where) for name in labels]
        if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
            raise UserError(f"{where}: column '{column}' must list 2 to {len(LETTERS)} options, not {listed!r}")
        options = [_plain(text, column, where) for text in listed]
    marks = [MARKED.match(text) for text in options]
    if all(mark and mark[1] == letter for mark, letter in zip(marks, LETTERS)):
        options = [text[mark.end() :] for text, mark in zip(options, marks) if mark]
    return options, names


def _free(config: TaskConfig, row: Row, where: str) -> Answer:
    """The row's texts, or the word of its label if the task has ``label_words``."""
    if config.label_words:
        return "", None, (), (config.label_words[_require_label(config, _column(row, config.target, where), where)],)
    answers = tuple(dict.fromkeys(filter(None, _answers(row, config.target, where))))
    if not answers:
        raise UserError(f"{where}: column '{config.target}' holds no answer")
    for answer in answers if config.extract else ():
        if not re.search(str(config.extract), answer):
            raise UserError(f"{where}: task.extract={config.extract} matches nothing in {answer[-60:]!r}")
    return "", None, (), answers


def _answers(row: Row, target: str, where: str) -> list[str]:
    """The right answers of a row: one text, or a list of them."""
    value = _column(row, target, where)
    return [_plain(text, target, where).strip() for text in (value if isinstance(value, list) else [value])]


def _for_encoder(config: TaskConfig, row: Row, where: str) -> Example:
    """An example whose answer is no text: a number, a set of labels, or a tag for each word."""
    names = columns(config.template)
    read = list(config.text) or names[:2]
    target = TARGETS[config.answer](config, row, where)
    shown = _joined if config.answer == "tags" else _text
    words = _words(row, read[0], where) if config.answer == "tags" else ()
    if isinstance(target, tuple) and config.answer == "tags" and not len(words) == len(target) > 0:
        raise UserError(
            f"{where}: {len(words)} words in column '{read[0]}', but {len(target)} tags in '{config.target}'"
        )
    return Example(
        prompt=_prompt(config.template, row, "", where, shown),
        answer="",
        choices=(),
        label=None,
        text=tuple(shown(row, column, where) for column in read),
        references=(answer_text(config, target),),
        columns=tuple(shown(row, column, where) for column in names),
        target=target,
        words=words,
        where=where,
    )


def answer_text(config: TaskConfig, target: float | tuple[int, ...]) -> str:
    """What an encoder's answer is called in ``predictions.jsonl``, and compared as."""
    if not isinstance(target, tuple):
        return f"{target:.7g}"
    return (" " if config.answer == "tags" else SEPARATOR).join(config.label_words[index] for index in target)


def _number(config: TaskConfig, row: Row, where: str) -> float:
    value = _column(row, config.target, where)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: column '{config.target}' must hold a number, not {value!r}")
    return number


def _label_set(config: TaskConfig, row: Row, where: str) -> tuple[int, ...]:
    """The labels of a list, or of a text with commas between them; none of an empty one."""
    value = _column(row, config.target, where)
    if isinstance(value, str):
        value = [item for item in value.split(",") if item.strip()]
    listed = value if isinstance(value, list) else [value]
    return tuple(sorted({_require_label(config, item, where) for item in listed}))


def _tags(config: TaskConfig, row: Row, where: str) -> tuple[int, ...]:
    """The tags of a list, or of a text with spaces between them."""
    value = _column(row, config.target, where)
    listed = value.split() if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise UserError(f"{where}: column '{config.target}' must list a tag for each word, not {value!r}")
    return tuple(_require_label(config, item, where) for item in listed)


#: What an encoder's head learns from a row, by ``task.answer``.
TARGETS: dict[str, Callable[[TaskConfig, Row, str], float | tuple[int, ...]]] = {
    "number": _number,
    "multi_label": _label_set,
    "tags": _tags,
}


def _prompt(
    template: str, row: Row, options: str, where: str, read: Callable[[Row, str, str], str] | None = None
) -> str:
    """The template with the row's columns, as ``read`` gives them (default: :func:`_text`)."""
    pieces = []
    for literal, field, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if field is not None:
            pieces.append(options if field == "options" else (read or _text)(row, field, where))
    return "".join(pieces)


def _words(row: Row, column: str, where: str) -> tuple[str, ...]:
    """The words of a list, or of a text with spaces between them."""
    value = _column(row, column, where)
    if isinstance(value, list):
        return tuple(_plain(word, column, where) for word in value)
    return tuple(_plain(value, column, where).split())


def _joined(row: Row, column: str, where: str) -> str:
    return " ".join(_words(row, column, where))


def _text(row: Row, column: str, where: str) -> str:
    return _plain(_column(row, column, where), column, where)


def _plain(value: Any, column: str, where: str) -> str:
    """A text, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise UserError(f"{where}: column '{column}' must hold text, not {value!r}")
    if value != value:
        raise UserError(f"{where}: column '{column}' must hold text, not NaN")
    return str(value)


def _column(row: Row, column: str, where: str) -> Any:
    """The value of the first of ``column``'s alternatives that ``row`` has."""
    for path in column.split("|"):
        if path in row:
            return row[path]
        value: Any = row
        for step in path.split("."):
            inner = dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}
            value = inner.get(int(step) if isinstance(value, list) and step.isdigit() else step)
        if value is not None:
            return value
    raise UserError(f"{where}: no column '{column}'{nearest(column, row)} (columns: {', '.join(row)})")


def _check_template(config: TaskConfig) -> None:
    if config.answer == "chat":
        return
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
    most = 1 if config.answer == "tags" else 2
    if len(config.text) > most:
        allowed = "one column of words" if config.answer == "tags" else "one or two columns"
        raise UserError(f"task.text: an encoder reads {allowed}, not {list(config.text)}")
    if config.extract:
        require_pattern("task.extract", config.extract)


def _merge(items: list[Example]) -> list[Example]:
    """One example for each prompt, with the references of all its examples."""
    merged: dict[str, Example] = {}
    for item in items:
        first = merged.get(item.prompt)
        merged[item.prompt] = replace(first, references=first.references + item.references) if first else item
    return list(merged.values())


def _pick(items: list[Example], indices: list[int]) -> list[Example]:
    return [items[index] for index in indices]
