"""Random words of a user after a verb: keys with values, misspelt or not, groups, lists, sweeps, and plain rubbish.

``--dry-run`` and ``lrk check`` refuse them in one line, or show a configuration in which every value is the one typed.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from .box import Box
from .samples import Samples
from .trial import Failed

VERBS = ("train", "train", "train", "evaluate", "score", "prune", "export", "generate", "bench", "run")
GROUPS = ("model", "task", "hardware", "method", "recipe")
#: Values of every kind, as they are typed.
VALUES = (
    *("0", "1", "2", "3", "7", "16", "-1", "1.5", "1e-3", "0.1", "1e400", "-0", "007", "1_000", "0x10", "1e3"),
    *("18446744073709551616", "9" * 30, "nan", "NaN", ".nan", "inf", "-inf", "true", "false", "True", "yes", "off"),
    *("null", "None", "~", "''", '""', "' '", "x", "abc def", "'a,b'", "a,b", "a,b,c", "é", "日本", "\u202eabc"),
    *("[]", "[1]", "[1,2]", "[Q,V]", "[all]", "[[]]", "[null]", "[nan]", "[a,[b,[c]]]", "{}", "{a:1}", "{a:{b:1}}"),
    *("{1:2}", "{_target_:os.getcwd}", "[", "{", "'", "\\", "a=b", "a:b", "=", "$x", "${seed}", "${nowhere}", "???"),
    *("${oc.env:NOWHERE}", "${oc.decode:1}", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "str(3)"),
    *("int(3.5)", "float(2)", "bool(1)", "shuffle(1,2)", "sort(2,1)", "tag(a,1)", "json_str({a:1})", "extend_list(1)"),
    *("\x1b[31mred", "[/bold]m", "a\nb", "a\tb", "x" * 3000, "." * 50, "../..", "/", "~nosuchuser/x", "nowhere"),
    *("lora", "llama", "cpu", "cuda", "bf16", "tiny_choice", "{x}", "{sentence}", "(", ".*", "**", "%s", "@file"),
)
SIGNS = ("+", "++", "~", "-", "--", "@", "hydra.", "hydra/", ".", "=")
RUBBISH = (
    *("", " ", "=", "==", "a", "~a", "~", "+", "a=", "=a", "a b", "-", "--", "---", "-x", "--nope", "a=[", "a={"),
    *("hydra.run.dir=x", "hydra.searchpath=[x]", "hydra/launcher=joblib", "hydra/launcher=nope", "hydra.verbose=true"),
    *("+x=1", "++seed=1", "~seed", "~method", "~model.path", "method@x=lora", "method@=lora", "outputs@z=[a,b]"),
    *(
        "run@z={a:1}",
        "a.b.c.d.e=1",
        "..=1",
        "a..b=1",
        ".a=1",
        "a.=1",
        "a[0]=1",
        "task.text[0]=x",
        "task.parts.x.path=y",
    ),
    *("_target_=os.getcwd", "model._target_=os.getcwd", "defaults=[x]", "task={}", "method={}", "model={a:1}", "@"),
    *(
        "\ud800",
        "\x1b]0;x\x07",
        "é=1",
        "seed =1",
        " seed=1",
        "seed= 1",
        "SEED=1",
        "seed=1=2",
        "#",
        "%",
        "\\",
        "'",
        "{}",
    ),
)


def trial(seed: int, box: Box, samples: Samples) -> None:
    """Some words after a verb. Words that are not needed for a failure are left out of its report."""
    chance = random.Random(seed)
    verb, words = chance.choice(VERBS), []
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        words.append(_word(verb, chance))
    ask = ["check", verb] if chance.random() < 0.3 else [verb, "--dry-run"]
    sweep = ["-m"] if chance.random() < 0.12 else []
    if verb in ("evaluate", "score", "prune", "export", "generate") and chance.random() < 0.8:
        words.append("method=none" if verb in ("evaluate", "generate") else "method=lora")
    if verb == "run" and chance.random() < 0.8:
        words.append("recipe=milora")
    box.case = _shown(words)
    try:
        _attempt(box, ask, sweep, words)
    except Failed as failed:
        for word in list(words):
            fewer = [other for other in words if other is not word]
            try:
                _attempt(box, ask, sweep, fewer)
            except Failed as again:
                if str(again)[:40] == str(failed)[:40]:
                    words = fewer
        box.case = _shown(words)
        _attempt(box, ask, sweep, words)
        raise


def _attempt(box: Box, ask: list[str], sweep: list[str], words: list[str]) -> None:
    before = box.snapshot()
    ended = box.run(*ask, *sweep, *words)
    if box.snapshot() != before:
        raise Failed("wrote files, though nothing was to be started")
    if ended.code == 0 and ask[-1] == "--dry-run" and not sweep and "--help" not in words and "-h" not in words:
        try:
            documents = [document for document in yaml.safe_load_all(ended.out) if document is not None]
        except yaml.YAMLError as error:
            raise Failed(f"prints what is not YAML: {' '.join(str(error).split())}") from None
        if len(documents) == 1 and ask[0] != "run":
            for word in words:
                _held(word, documents[0])


def _held(word: str, document: Any) -> None:
    """Raise :class:`Failed` where a typed value became another one."""
    key, equals, typed = word.partition("=")
    at = document
    for name in key.split("."):
        at = at.get(name, _held) if isinstance(at, dict) else _held
    if not equals or at is _held or isinstance(at, dict):
        return
    if isinstance(at, float) and not math.isfinite(at):
        raise Failed(f"accepted {key}={typed} as {at}")
    plain = typed.strip().strip("'\"")
    text = plain.lower()
    if isinstance(at, bool):
        right = text in ("true", "false", "yes", "no", "on", "off", "0", "1", "y", "n") or "(" not in text
    elif isinstance(at, int | float):
        right = _number(plain) == at
    elif isinstance(at, str):
        same = at.lower() == text or (_number(plain) is not None and _number(plain) == _number(at))
        right = same or key.endswith(("path", "gguf", "outputs", "run")) or "(" in text
    else:
        right = True
    if not right:
        raise Failed(f"accepted {key}={typed} as {at!r}")


def _number(text: str) -> float | None:
    if cast := re.fullmatch(r"(int|float)\((.*)\)", text):  # what the user asked for
        value = _number(cast[2])
        return value if value is None or cast[1] == "float" else int(value)
    try:
        return float(text)
    except ValueError:
        return None


def _word(verb: str, chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.15:
        return chance.choice(RUBBISH)
    if kind < 0.35:
        return f"{chance.choice(GROUPS)}={chance.choice((*_choices(), *VALUES))}"
    key = chance.choice(_keys(verb))
    if kind < 0.45:
        at = chance.randrange(len(key) + 1)
        shorter, longer = key[:at] + key[at + 1 :], key + chance.choice(".@[/ ")
        key = chance.choice((shorter, longer, chance.choice(SIGNS) + key, key.upper()))
    return f"{key}={chance.choice(VALUES)}"


@cache
def _keys(verb: str) -> tuple[str, ...]:
    from lowrank_cli import methods
    from lowrank_cli.config.keys import flat
    from lowrank_cli.schema import VERBS

    own = (f"method.{key}" for kind in methods.config_classes().values() for key in flat(kind)) if verb != "run" else ()
    return tuple(dict.fromkeys((*flat(VERBS[verb]), *own)))


@cache
def _choices() -> tuple[str, ...]:
    from lowrank_cli.config.folders import files

    return tuple(_each(files(group) for group in GROUPS))


def _each(names: Any) -> Iterator[str]:
    for group in names:
        yield from group


def _shown(words: list[str]) -> str:
    return " ".join(word if len(word) < 80 else f"{word[:40]}… ({len(word)} characters)" for word in words)
