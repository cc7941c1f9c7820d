"""Turns errors of Hydra, OmegaConf and YAML into one line: key, value, what is allowed, the nearest match."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from lowrank_cli import methods
from lowrank_cli.config.folders import groups_of
from lowrank_cli.config.keys import flat
from lowrank_cli.errors import LrkError, UserError, nearest, unknown
from lowrank_cli.schema import BENCHES, VERBS, Override

PACKAGE = Path(__file__).resolve().parents[1]
NOUNS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised an error, rather than a library that it called."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


@dataclass
class Failure:
    """What was being composed, so that an error can name keys and choices."""

    loader: ConfigLoaderImpl | None
    verb: str
    overrides: list[Override]

    def options(self, group: str) -> list[str]:
        """The choices of a group; empty if there is no such group."""
        names = self.loader.get_group_options(group) if self.loader is not None else []
        return [name for name in names if not name.startswith("_")]

    def culprit(self) -> Override | None:
        """The first override that cannot be composed on its own, if there is one."""
        if self.loader is None:
            return None
        for override in self.overrides:
            try:
                self.loader.load_configuration(self.verb, [str(override)], RunMode.MULTIRUN)
            except Exception:
                return override
        return None

    def blamed(self) -> str:
        """:meth:`culprit` as it was typed, or else all overrides, or the verb."""
        return str(self.culprit() or " ".join(map(str, self.overrides)) or self.verb)

    def keys(self) -> list[str]:
        """Every known key, under those chosen groups that exist."""
        if self.loader is None:
            return []
        chosen = []
        for override in self.overrides:
            if override.key in groups_of(self.verb) and override.value in (*self.options(override.key), "_from_run"):
                chosen.append(str(override))
        return list(_flat(self.loader.load_configuration(self.verb, chosen, RunMode.MULTIRUN)))


@contextmanager
def explained(failure: Failure) -> Iterator[None]:
    """Raise the errors of the block as :class:`UserError`."""
    try:
        yield
    except LrkError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(_line(error, failure)) from error
    except Exception as error:  # values on which Hydra or OmegaConf crashes
        if _is_ours(error):
            raise
        culprit = failure.culprit()
        options = failure.options(culprit.key) if culprit else []
        why = f"choose one of {', '.join(options)}" if options else f"{type(error).__name__}: {error}"
        raise UserError(f"{culprit or failure.blamed()}: cannot be composed; {why}") from error


def refuse_unsupported(parsed: Iterable[HydraOverride]) -> None:
    """Refuse what Hydra's grammar allows and a run does not: adding or removing keys, and Hydra's own settings."""
    for override in parsed:
        if not override.key_or_group:
            raise UserError(f"'{override.input_line}' is not an override (write KEY=VALUE)")
        if override.is_hydra_override():
            raise UserError(
                f"{override.input_line}: hydra/launcher and hydra.launcher.* belong to a sweep (-m) or a study"
            )
        if override.is_delete() or override.is_add() or override.is_force_add():
            raise UserError(f"{override.input_line}: keys can be neither added nor removed; write KEY=VALUE")
        key = Override.parse(override.input_line or "").key
        if "@" in key:
            name = key.partition("@")[0]
            raise UserError(f"{key}: a group goes to its own section; write {name}=NAME")
        if override.value() == {} and "." not in key:
            raise UserError(f"{key}: {{}} sets nothing; write {key}.KEY=VALUE, or leave it out")


def _flat(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items_ex(resolve=False):
        if prefix or key != "hydra":
            name = prefix + str(key)
            yield name
            if isinstance(value, DictConfig) and not value._is_missing() and not value._is_none():
                yield from _flat(value, f"{name}.")


def _line(error: Exception, failure: Failure) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a choice, looked up as a file
        culprit = failure.culprit()
        return str(unknown(culprit.key, culprit.value, failure.options(culprit.key))) if culprit else message
    if isinstance(error, UnicodeDecodeError):
        return f"{failure.blamed()}: its file is not UTF-8 text ({message})"
    if isinstance(error, OverrideParseException):
        return _syntax(error, failure)
    if isinstance(error, MissingConfigException):
        return _missing(error, message, failure)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem or 'not valid YAML'}"
    ambiguous = re.match(r"Ambiguous value for argument '(.*?)' 1\.|Sweep parameters '(.*)' requires", message)
    if ambiguous:
        return f"{ambiguous[1] or ambiguous[2]}: several values; sweep over them with -m, or write a list: [a,b]"
    required = re.match(r"You must specify '(.*?)'", message)
    if required:
        group = required[1]
        return f"{group}: missing; choose one of {', '.join(failure.options(group))} ({group}=NAME)"
    config = re.match(r"In '(.*?)': \w+ raised while composing config", message)
    if config:
        assert error.__context__ is not None
        return _location(config[1], error.__context__, failure) + _value(error.__context__, failure)
    for override in failure.overrides:
        key = override.key
        if f"Could not override '{key}'" in message:
            inner = error.__cause__
            if isinstance(inner, OmegaConfBaseException) and (inner.full_key or "").startswith(f"{key}."):
                return _value(inner, failure)  # a section was given, with a key that it lacks
            return _unknown_key(key, failure)
    if isinstance(error, ValueError) and "integer string conversion" in message:
        return _too_long(failure)
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException):
        return _value(cause, failure)
    group = next((o.key for o in failure.overrides if "Config group override" in message), "")
    if group and failure.options(group):
        return f"{group}: choose one of {', '.join(failure.options(group))}"
    return message


def _syntax(error: OverrideParseException, failure: Failure) -> str:
    override = Override.parse(error.override)
    key = override.key
    if override.sets and re.fullmatch(r"[\w./@-]+", key):
        return f"{key}: cannot read {override.value}; quote a value with special characters: {key}='\"…\"'"
    groups = groups_of(failure.verb)
    choices = {choice: group for group in groups for choice in failure.options(group)}
    close = difflib.get_close_matches(str(override), choices, n=1, cutoff=0.7)
    hint = f"; did you mean '{choices[close[0]]}={close[0]}'?" if close else ""
    return f"'{override}' is not an override{hint} (write KEY=VALUE)"


def _too_long(failure: Failure) -> str:
    """The message for a whole number of more digits than Python reads."""
    limit = sys.get_int_max_str_digits()
    long = next((item for item in failure.overrides if re.search(rf"\d{{{limit + 1},}}", item.value)), None)
    where = f"{long.key}: '{long.value}'" if long else "a number"
    return f"{where} has too many digits (allowed: at most {limit})"


def _missing(error: MissingConfigException, message: str, failure: Failure) -> str:
    path = error.missing_cfg_file or ""
    group, _, name = path.rpartition("/")
    options = failure.options(group) if group else []
    if not options:
        return message.partition(" Config search path")[0]
    if name.startswith("_"):
        options = [o for o in failure.loader.get_group_options(group) if o.startswith("_")]  # type: ignore
    within = re.match(r"In '([^']+/[^']+)'", message)
    where = f"{within[1]}.yaml, defaults" if within and not within[1].startswith("hydra/") else group
    others = ", or a folder, a .gguf file or ORG/NAME" if group == "model" else ""
    close = nearest(name, options)
    own = "" if close else "; --config-dir DIR adds the files of DIR" if group == "study" else ""
    return f"{where}: unknown value '{name}'{close} (allowed: {', '.join(sorted(options))}{others}{own})"


def _unknown_key(key: str, failure: Failure) -> str:
    if key == "recipe":
        given = next(override for override in failure.overrides if override.root == "recipe")
        return f"{given}: lrk {failure.verb} has no recipes; write: lrk run {given}"
    return _only_from_file(key, failure) or unknown_key(key, failure.keys())


def unknown_key(key: str, keys: list[str]) -> str:
    """The message for a ``key`` that is not one of ``keys``: which methods or verbs have it, else the nearest key."""
    if match := re.match(r"(study\.(?:arms|tasks|groups|pools|views|prepare|folders))\.(\w+)", key):
        return f"{key}: {match[1]} has no '{match[2]}'; write it in the study's file, or add it: '+{match[0]}=…'"
    section, _, leaf = key.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in keys if section and known.rpartition(".")[0] == section]
    listed = f" ({section} has: {', '.join(siblings)})" if siblings else ""
    owners = _owners(section, leaf, bool(siblings) or section in keys)
    return f"{key}: unknown key{f'; {owners}' if owners else _suggest(key, keys, siblings)}{listed}"


def _owners(section: str, leaf: str, known: bool) -> str:
    """Which methods or verbs have a key that is unknown here; empty if none has.

    Args:
        section, leaf: the key, split at its last dot.
        known: whether the section itself exists here. If not, the verbs that have the section may be the answer.
    """
    if section == "method" and known:
        owners = [f"method={name}" for name, kind in methods.config_classes().items() if leaf in flat(kind)]
        return f"it is a key of {_first_names(owners, 'methods')}" if owners else ""
    if section == "bench" and known:
        owners = [f"lrk bench {name}" for name, kind in BENCHES.items() if leaf in flat(kind)]
        return f"it is a key of {_first_names(owners, 'kinds')}" if owners else ""
    keys_of = {verb: set(flat(root)) for verb, root in VERBS.items()}
    owners = [f"lrk {verb}" for verb, keys in keys_of.items() if section and f"{section}.{leaf}" in keys]
    if owners:
        return f"it is a key of {_first_names(owners, 'verbs')}"
    owners = [] if known else [f"lrk {verb}" for verb, keys in keys_of.items() if section in keys]
    return f"{section}.* are keys of {_first_names(owners, 'verbs')}" if owners else ""


def _first_names(names: list[str], noun: str) -> str:
    """Up to three names in a sentence; of more, the first two and how many others (``noun``) there are."""
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} other {noun}"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _suggest(key: str, keys: list[str], siblings: list[str]) -> str:
    """The hint at the nearest key: one that ends alike, else one of the section's ``siblings``, else of all keys."""
    section, _, leaf = key.rpartition(".")
    same = [known for known in keys if known.rpartition(".")[2] == leaf]
    if same:
        return f"; did you mean '{same[0]}'?"
    if siblings:
        short = [name for name in siblings if "".join(word[:1] for word in name.split("_")) == leaf]  # lr
        close = f"; did you mean '{short[0]}'?" if short else nearest(leaf, siblings)
        return close.replace("'", f"'{section}.", 1)
    close = nearest(key, [known for known in keys if known.count(".") == key.count(".")])
    if not close:
        tails = {known.rpartition(".")[2]: known for known in keys}
        match = difflib.get_close_matches(leaf, tails, n=1, cutoff=0.6)
        close = f"; did you mean '{tails[match[0]]}'?" if match else ""
    return close


def _value(error: BaseException, failure: Failure) -> str:
    """The message for a value that its key cannot hold."""
    key = getattr(error, "full_key", None) or "?"
    message = str(error).partition("\n")[0]
    if from_file := _only_from_file(key, failure):
        return from_file
    value = next((override.value for override in failure.overrides if override.key == key), None)
    shown = getattr(error, "value", None) if value is None else value
    kind = getattr(error, "object_type", None)
    optional = any(
        item.name == key.rpartition(".")[2] and str(item.type).startswith("Optional")
        for item in (fields(kind) if is_dataclass(kind) else ())
    )
    converted = re.search(r"could not be converted to (\w+)|Cannot convert '\w+' to (string)", message)
    if converted:
        below = [override.key for override in failure.overrides if override.key.startswith(f"{key}.")]
        if below and "'dict'" in message:
            return _unknown_key(below[0], failure)  # a key below one that is not a section
        name = (converted[1] or converted[2]).capitalize()
        return f"{key}: '{shown}' is not {NOUNS.get(name, name)}{' or null' if optional else ''}"
    if "Cannot merge DictConfig with ListConfig" in message:
        if kind is list:
            return f"{key}: '{shown}' is not a list; write {key}=[VALUE,VALUE]"
        return f"{key}: '{shown}' cannot replace a whole section; give {key}.KEY=VALUE"
    if isinstance(error, ValidationError):
        if "not a valid bool" in message:
            return f"{key}: '{shown}' is not {NOUNS['Boolean']}"
        if "is not a ListConfig" in message:
            return f"{key}: '{shown}' is not a list; write {key}=[{shown}]"
        if "List[" in message and "incompatible with type hint" in message:
            return f"{key}: '{shown}' is not a list; write [{shown}]"
        if "not Optional" in message:
            return f"{key}: null is not allowed"
        if "Invalid type assigned" in message:
            return f"{key}: '{shown}' cannot replace a whole section; give {key}.KEY=VALUE"
    if "not in" in message and is_dataclass(kind):
        section, names = key.rpartition(".")[0], [item.name for item in fields(kind)]
        if not section:  # of an item in a list, such as a stage of a recipe
            return f"{key}: unknown key{nearest(key, names)} (allowed: {', '.join(names)})"
        return unknown_key(key, [f"{section}.{name}" for name in names])
    return _unknown_key(key, failure) if "is not in struct" in message else f"{key}: {message}"


def _only_from_file(key: str, failure: Failure) -> str:
    """The message for a method's setting that only a file can give, or a key in it; empty for any other key."""
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    typed = next((item for item in failure.overrides if re.match(rf"method\.{re.escape(name)}(\.|$)", item.key)), None)
    if section != "method" or typed is None or f"method.{name}" not in set(failure.keys()):
        return ""
    settings = (item for kind in methods.config_classes().values() for item in fields(kind) if item.name == name)
    file = next((item.metadata["given_by"] for item in settings if "given_by" in item.metadata), None)
    return f"{typed.key}: '{typed.value}' cannot be set by itself; give a file: {file}" if file else ""


def _location(config: str, error: BaseException, failure: Failure) -> str:
    """The file, and where it is found the line, of the key that an error in a YAML file is about."""
    leaf = (getattr(error, "full_key", None) or "").rpartition(".")[2]
    assert failure.loader is not None
    for source in failure.loader.get_sources():
        path = Path(source.path) / f"{config}.yaml"
        if source.scheme() == "file" and path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if re.match(rf"\s*(- )?{re.escape(leaf)}\s*:", line):
                    return f"{path}, line {number}: "
            return f"{path}: "
    return f"{config}.yaml: "
