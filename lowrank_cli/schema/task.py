"""A data set with its prompt, answers, splits and metric."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, inside, require_choice, require_range
from lowrank_cli.schema.metric import ANSWERS, metrics_of

CHAT = {"auto": None, "true": True, "false": False}
LABELLED = ("labels", "multi_label", "tags")  #: answers from ``label_words``
OF_IMAGES = ("labels", "multi_label", "number")  #: answers to an image
ENTITY_TAG = re.compile(r"O|[BIES]-.+")


@dataclass
class TaskConfig:
    """One data set with its prompt, its answers, its splits and its metric.

    ``answer`` is ``labels`` (one fixed set of ``label_words``), ``choices`` (each row lists its own, answered by
    letter), ``free`` (generated text), ``chat`` (conversations, see :mod:`lowrank_cli.tasks.conversations`) or ``mix``
    (several tasks trained together, each with its own answers). Encoders also answer with a ``number`` (regression),
    ``multi_label`` (any of the ``label_words``) or ``tags`` (one of the ``label_words`` for each word of a text).
    """

    name: str = MISSING
    answer: str = (
        MISSING  #: ``labels``, ``choices``, ``free``, ``chat``, ``number``, ``multi_label``, ``tags``, ``mix``
    )
    template: str = MISSING  #: prompt with ``{column}`` fields; ``{options}`` lists the choices, one a line
    text: list[str] = MISSING  #: one or two columns an encoder reads (text, text pair); empty: the template's first two
    #: the column that holds the label, the index of the choice, the number, or the free answer, or a list of labels,
    #: tags or right answers
    target: str = MISSING
    #: one word for each label, in label order (``labels``, ``multi_label``, ``tags``); with ``free`` these words
    #: are the answers to labels, generated instead of scored
    label_words: list[str] = MISSING
    #: the column's own values in the order of the labels or options; empty: 0, 1, …, false/true, the words or letters
    label_values: list[str] = MISSING
    metric: str = MISSING  #: what runs are compared by (see the table of metrics)
    extract: Optional[str] = MISSING  #: regular expression; the last match in a free answer is what counts
    max_length: int = MISSING  #: tokens of prompt and answer together; longer prompts lose their beginning
    max_new_tokens: int = MISSING  #: longest generated answer, in tokens
    hub: Optional[str] = MISSING  #: data set on the Hub
    subset: Optional[str] = MISSING  #: configuration name on the Hub
    #: a data file, which is split once, or a folder of ``<split>.jsonl`` or other files, instead of the Hub
    path: Optional[str] = MISSING
    generator: Optional[str] = MISSING  #: a generator of :mod:`lowrank_cli.tasks.tiny`, instead of both
    #: ``paper`` (the papers' rule, see :mod:`lowrank_cli.tasks.splits`), ``given``, ``whole`` (all of the evaluation
    #: set is test, and part of the train split is dev), or ``held_out`` of the train split
    splits: str = MISSING
    train_split: str = MISSING  #: names of the given splits
    dev_split: str = MISSING  #: likewise
    test_split: str = MISSING  #: likewise
    limit: Optional[int] = MISSING  #: keep at most this many examples of each split
    parts: dict[str, TaskConfig] = field(default_factory=dict)  #: tasks of a ``mix``, by name; its lengths bound theirs
    #: other wordings, for methods that compare them: a template, or ``{template: …, label_words: […]}``
    templates: list[Any] = field(default_factory=list)
    #: ``free`` and ``chat`` only: rows without an answer are left out, and an answer too long for ``max_length`` loses
    #: its end, instead of being refused
    lenient: bool = False
    #: ``choices`` only: the column that lists a row's options, or a column for each option
    options: list[str] = field(default_factory=lambda: ["choices"])
    more_metrics: list[str] = field(default_factory=list)  #: what is measured besides ``metric``
    #: ``{NAME: COLUMN}``: what the data call a column that is read as NAME, in rows of any kind of answer
    columns: dict[str, str] = field(default_factory=dict)
    #: whether prompts and answers are turns in the model's chat template: ``true``, ``false``, or ``auto``: those of
    #: ``chat``, and a prompt of ``lrk generate`` to a model without an adapter, if its tokenizer has one
    chat: str = "auto"
    system: Optional[str] = None  #: system turn of conversations that have none
    #: Jinja chat template instead of the model's, or a file that holds one
    chat_template: Optional[str] = None
    #: the column with an image, which is a file (relative to the folder of the data) or the bytes of one, for models
    #: that read images; of files in folders named for their labels it is ``image``
    image: Optional[str] = None

    def validate(self) -> None:
        require_choice("task.answer", self.answer, ANSWERS)
        require_choice("task.chat", self.chat.lower(), CHAT)
        if (self.answer == "mix") != bool(self.parts):
            raise UserError("task.parts: task.answer=mix names its tasks there, another answer has none")
        for name, part in self.parts.items():
            if part.parts:
                raise UserError(f"task.parts: '{part.name}' is a mix itself; name its parts instead")
            with inside("task", f"task.parts.{name}"):
                part.validate()
        require_choice("task.splits", self.splits, ("paper", "given", "whole", "held_out"))
        for key, metrics in {"metric": [self.metric], "more_metrics": self.more_metrics}.items():
            for metric in metrics:
                require_choice(f"task.{key}", metric, metrics_of(self.answer))
        require_range("task.max_length", self.max_length, 2)
        require_range("task.max_new_tokens", self.max_new_tokens, 1)
        if self.limit is not None:
            require_range("task.limit", self.limit, 1)
        if self.parts:
            self._refuse_what_parts_have()
        if self.image is not None and self.answer not in OF_IMAGES:
            raise UserError(
                f"task.image: an image is answered with {', '.join(OF_IMAGES)}, not with task.answer={self.answer}"
            )
        if self.lenient and self.answer not in ("free", "chat"):
            raise UserError(f"task.lenient: true is for task.answer=free or chat, not {self.answer}")
        self._validate_labels()
        for index, entry in enumerate(self.templates):
            self._validate_wording(f"task.templates[{index}]", entry)
        for index, (template, _) in enumerate(self.wordings()):
            key = "templates" if index else "template"
            if self.answer not in ("chat", "mix") and not re.search(r"\{(?!options\})", template):
                raise UserError(f"task.{key}: {template!r} names no {{column}}, so every prompt would be the same")

    def _validate_labels(self) -> None:
        """Refuse labels that are too few, ambiguous or of no use for this kind of answer."""
        words = list(self.label_words)
        if self.answer in LABELLED and len(words) < 2:
            hint = "; name them, or set task.path=FOLDER, with a folder for each label" if self.image else ""
            raise UserError(f"task.label_words: {words} names fewer than two labels{hint}")
        for key in ("label_words", "label_values"):
            named = [word.casefold() for word in getattr(self, key)]
            if len(set(named)) < len(named):
                raise UserError(f"task.{key}: {list(getattr(self, key))} names a label twice")
            if not all(word.strip() for word in named):
                raise UserError(f"task.{key}: {list(getattr(self, key))} holds an empty word")
        if self.answer == "choices":
            if not self.options:
                raise UserError("task.options: empty; name the column that lists a row's options, or one for each")
        elif self.options != ["choices"]:
            raise UserError(f"task.options: {list(self.options)} is for task.answer=choices, not {self.answer}")
        elif self.label_values and len(self.label_values) != len(words):
            raise UserError("task.label_values: must be as many as task.label_words, or empty")
        metrics = {self.metric, *self.more_metrics}
        if "f1" in metrics and len(words) != 2:
            raise UserError(f"task.metric: f1 is of the second of two labels, not of {words}; take macro_f1")
        for word in words:
            if "," in word and (self.answer == "multi_label" or "macro_f1" in metrics):
                raise UserError(f"task.label_words: '{word}' has a comma, which stands between labels")
            if self.answer == "tags" and len(word.split()) != 1:
                raise UserError(f"task.label_words: '{word}' has a space, which stands between tags")
            if any(metric.startswith("entity") for metric in metrics) and not ENTITY_TAG.fullmatch(word):
                raise UserError(
                    f"task.label_words: '{word}' is no tag of an entity (O, or B-TYPE, I-TYPE, E-TYPE, S-TYPE); "
                    f"set task.metric=tag_accuracy"
                )

    @property
    def chats(self) -> bool | None:
        """``chat``; None for ``auto``."""
        return CHAT[self.chat.lower()]  # YAML's true and false arrive as True and False

    def wordings(self) -> list[tuple[str, list[str]]]:
        """Each template and its label words, the task's own first."""
        own = list(self.label_words)
        others = [
            (entry["template"], list(entry["label_words"])) if isinstance(entry, dict) else (entry, own)
            for entry in self.templates
        ]
        return [(self.template, own), *others]

    def _validate_wording(self, key: str, entry: Any) -> None:
        """Refuse what is neither a template nor one with as many label words as the task."""
        if isinstance(entry, str):
            return
        whole = isinstance(entry, dict) and sorted(entry) == ["label_words", "template"]
        if not whole or not isinstance(entry["template"], str) or not isinstance(entry["label_words"], list):
            raise UserError(f"{key}: {entry!r} is neither a template nor {{template: TEXT, label_words: [WORD, …]}}")
        words = entry["label_words"]
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise UserError(f"{key}.label_words: {words} must be words (quote numbers and yes, no, true, false)")
        if len(words) != len(self.label_words) or len({word.casefold() for word in words}) < len(words):
            raise UserError(
                f"{key}.label_words: {words} must be {len(self.label_words)} different words, as task.label_words are"
            )

    def _refuse_what_parts_have(self) -> None:
        """Prompts, answers and data of a mix are those of its parts; of its own it has a name, lengths and a limit."""
        own = ("name", "max_length", "max_new_tokens", "limit", "parts")
        for key, value in vars(mix()).items():
            if key not in own and getattr(self, key) != value:
                raise UserError(f"task.{key}: a mix has none of its own; set task.parts.NAME.{key} of its tasks")


def mix() -> TaskConfig:
    """What the YAML of a mix starts from: nothing of its own but its parts, its name and its lengths."""
    return TaskConfig(
        answer="mix",
        template="",
        text=[],
        target="",
        label_words=[],
        label_values=[],
        metric="mean",
        extract=None,
        hub=None,
        subset=None,
        path=None,
        generator=None,
        splits="given",
        train_split="",
        dev_split="",
        test_split="",
        limit=None,
    )
