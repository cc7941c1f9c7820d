"""MkDocs hook: the reference pages that are generated from the command line, the schemas, ``conf/`` and the source."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from hydra.types import RunMode
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf, SCMode

import lowrank_cli
from lowrank_cli import cli
from lowrank_cli.config.composition import loader
from lowrank_cli.config.folders import GROUPS, description, files, groups_of
from lowrank_cli.config.keys import EXPLAINED, comments, section_keys, sections
from lowrank_cli.errors import UserError
from lowrank_cli.schema import VERBS

#: Values that no schema accepts, by type: what is allowed stands in the error that each of them raises.
WRONG: dict[Any, Any] = {int: -1, float: -1.0, str: "?", list[str]: ["?"], list[int]: [-1]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"commands": commands, "keys": keys, "methods": method_pages, "choices": choices, "source": source}
    for name, lines in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines()) + "\n"))
    return files


def commands() -> Iterator[str]:
    """Every verb with its arguments, options and examples."""
    yield "# Commands\n"
    yield "What `lrk VERB --help` prints. Verbs that take `KEY=VALUE` are configured by [these keys](keys.md).\n"
    group: Any = typer.main.get_command(cli.app)
    for verb in cli.VERBS:
        command = group.commands[verb]
        with command.make_context(verb, [], resilient_parsing=True) as context:
            usage = " ".join(["lrk", verb, *command.collect_usage_pieces(context)])
            records = [record for item in command.get_params(context) if (record := item.get_help_record(context))]
        yield f"## lrk {verb}\n\n{command.help}\n\n```text\n{usage}\n```\n"
        yield from table(("option or argument", "meaning"), ((f"`{name}`", text) for name, text in records))
        yield "```text\n" + "\n".join(cli.EXAMPLES[verb]) + "\n```\n"
        if verb in cli.STAGES:
            own = [f"[`{name}`](keys.md#{name})" for name in sections(verb)] if verb != "run" else []
            groups = ", ".join(f"`{name}=`" for name in groups_of(verb))
            yield f"Groups: {groups} ([choices](choices.md)).{' Sections: ' + ', '.join(own) + '.' if own else ''}\n"


def keys() -> Iterator[str]:
    """Every key of every section, with its type, default, range and meaning."""
    yield "# Configuration keys\n"
    yield "Set a key on the command line as `SECTION.KEY=VALUE`. Defaults come from `conf/`; for `model`, `task` and"
    yield "`hardware` they are those of `llama`, `tiny_yesno` and `cpu`. `lrk list keys SECTION` prints a section in a"
    yield "terminal. The keys of `method` depend on the [method](methods.md).\n"
    verbs = [verb for verb in cli.STAGES if verb != "run"]
    top: dict[tuple[str, ...], list[str]] = {}
    for verb in verbs:
        for name, kind in get_type_hints(VERBS[verb]).items():
            if spelled(kind) != "mapping" and not any(is_dataclass(item) for item in parts(kind)):
                row = (f"`{name}`", spelled(kind), default(loaded(verb)[name]), meanings(VERBS[verb]).get(name, ""))
                top.setdefault(row, []).append(verb)
    yield "## Top level\n"
    rows = [(*row, in_verbs(having, verbs)) for row, having in top.items()]
    yield from table(("key", "type", "default", "meaning", "verbs"), rows)
    for name in dict.fromkeys(name for verb in verbs for name in sections(verb)):
        having = [verb for verb in verbs if name in sections(verb)]
        verb = name if name in having else having[0]
        if name in ("bench", "study"):
            yield from bench_tables() if name == "bench" else study_table()
            continue
        given = loaded(verb)[name]
        if given is None:  # a group that is not chosen
            (only,) = files(name)
            given = loaded(verb, f"{name}={only}")[name]
        section = OmegaConf.get_type(given)(**OmegaConf.to_container(given, structured_config_mode=SCMode.DICT))
        yield f"## {name}\n\n{paragraph(inspect.getdoc(type(section)) or '')}\n\nOf {in_verbs(having, verbs)}.\n"
        yield from key_table(name, section)


def bench_tables() -> Iterator[str]:
    """The keys of each kind of benchmark."""
    yield "## bench\n\n`lrk bench NAME` measures what `conf/bench/NAME.yaml` says. Each kind has keys of its own.\n"
    for name, path in files("bench").items():
        section = OmegaConf.to_object(loaded("bench", f"bench={name}").bench)
        yield f"### lrk bench {name}\n\n{description(path)}\n\n{paragraph(inspect.getdoc(type(section)) or '')}\n"
        yield from key_table("bench", section)


def method_pages() -> Iterator[str]:
    """Every method: what it computes, as its file says it, and its keys."""
    yield "# Methods\n"
    yield "`method=NAME` chooses one. `lrk list methods NAME` prints its keys in the terminal.\n"
    for name, path in files("method").items():
        section = OmegaConf.to_object(loaded("evaluate", f"method={name}").method)
        module = sys.modules[type(section).__module__]
        yield f"## {name}\n\n{description(path)}\n\n```text\n{inspect.getdoc(module)}\n```\n"
        yield from key_table("method", section)


def choices() -> Iterator[str]:
    """What every group can be set to."""
    yield "# Models, tasks, hardware, recipes, studies\n"
    yield "Each name is a YAML file of `conf/`, and `--config-dir DIR` adds your own. `lrk list` prints these tables.\n"
    for group in (*(name for name in GROUPS if name != "method"), "recipe", "study"):
        yield f"## {group}=\n"
        yield from table(
            ("name", "what it is"), ((f"`{name}`", description(path)) for name, path in files(group).items())
        )


def source() -> Iterator[str]:
    """Every file of the package with the first sentence of its docstring, by folder."""
    yield "# Source files\n"
    yield "The folders of the package and their files, each with what its docstring says first. What may import what is"
    yield "in `CONTRIBUTING.md`.\n"
    package = Path(lowrank_cli.__file__).parent
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        name = folder.relative_to(package.parent).as_posix()
        yield f"## {name}/\n\n{summary(folder / '__init__.py')}\n"
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        yield from table(("file", "what it has"), ((f"`{path.name}`", summary(path)) for path in modules))


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    return paragraph((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0])


def study_table() -> Iterator[str]:
    """The keys of a study, which its file sets."""
    yield "## study\n\nA study is a file of its own ([how-to](../how-to/study.md)).\n"
    yield from table(
        ("key", "default", "meaning"), ((f"`{key}`", value, text) for key, value, text in section_keys("study", None))
    )


def loaded(verb: str, *overrides: str) -> Any:
    """The composed values of a verb, not yet validated and without a look at earlier runs."""
    chosen = ["study=_study"] if verb == "study" else []
    return loader().load_configuration(verb, [*chosen, *overrides], RunMode.RUN)


def key_table(name: str, section: Any) -> Iterator[str]:
    """One row a key of a section, whose values are the defaults."""
    rows = []
    for item in fields(section):
        key, kind = f"{name}.{item.name}", get_type_hints(type(section))[item.name]
        meaning = meanings(type(section)).get(item.name, "")
        for level, options in EXPLAINED.get(key, {}).items():
            meaning += "".join(f"<br>`{option}` ({level}): {text}" for option, text in options.items())
        if item.name != "name":
            rows.append(
                (f"`{key}`", spelled(kind), allowed(key, kind, section), default(getattr(section, item.name)), meaning)
            )
    yield from table(("key", "type", "allowed", "default", "meaning"), rows) if rows else ["No keys.\n"]


def allowed(key: str, kind: Any, section: Any) -> str:
    """What a key may be, as the error says it that a wrong value raises; empty for any value of its type."""
    kind = next((item for item in parts(kind) if item is not NoneType), kind)
    if kind is bool:
        return "true, false"
    if kind not in WRONG:
        return ""
    try:
        replace(section, **{key.partition(".")[2]: WRONG[kind]}).validate()
    except UserError as error:
        if found := re.fullmatch(rf"{re.escape(key)}\b.*\(allowed: (.*)\)", str(error)):
            return found[1]
    return ""


def meanings(schema: type) -> dict[str, str]:
    """Field → meaning, those of base classes included."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__[:-1]):
        found |= comments(kind)
    return {name: text.replace("<", "&lt;").replace("*", r"\*") for name, text in found.items()}


def parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a type itself otherwise."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def spelled(kind: Any) -> str:
    """A type as a user would say it."""
    names = {NoneType: "null", int: "integer", float: "number", str: "text", bool: "boolean"}
    lists = {list[str]: "list of texts", list[int]: "list of integers"}
    return " or ".join((names | lists).get(item, "mapping") for item in parts(kind))


def default(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, list):
        text = f"[{', '.join(map(str, value))}]"
    else:
        text = str(value).replace("\n", "\\n") or '""'
    return f"`{text}`"


def in_verbs(having: list[str], verbs: list[str]) -> str:
    return "every verb" if having == verbs else ", ".join(f"`lrk {verb}`" for verb in having)


def paragraph(text: str) -> str:
    """A docstring in Markdown."""
    return re.sub(r":\w+:`~?(.*?)`", r"`\1`", text.replace("``", "`"))


def table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A Markdown table, and an empty line behind it."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
