"""Composes ``conf/`` and the overrides of a command line into one typed, validated configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import hydra.version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lowrank_cli import methods, runs, schema
from lowrank_cli.config import bench_methods
from lowrank_cli.config.errors import Failure, explained, refuse_unsupported, unknown_key
from lowrank_cli.config.folders import GROUPS, conf_folders
from lowrank_cli.config.hydra_loader import WITHOUT_HYDRA, ParsedOnce
from lowrank_cli.config.inline_files import inline_files
from lowrank_cli.config.keys import knows
from lowrank_cli.config.model_width import model_width
from lowrank_cli.errors import UserError, require_choice, require_range
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.reader import check, read_text
from lowrank_cli.schema import TRUST, VERBS, EvaluateRun, Override, TrainRun, parse_overrides, quoted
from lowrank_cli.schema.harness import HarnessConfig
from lowrank_cli.schema.learning_rate import UsualRate, usual_rate

INPUTS = (
    "run",
    "model.path",
    "model.gguf",
    "task.path",
    "method.setting",
    "generate.tenants",
    "serve.tenants",
    "serve.token_file",
    "serve.adapters",
    "serve.chat_template",
    "method.rank_pattern",
    "eval.include_path",
)  #: keys of files and folders that are read; saved as absolute paths
WRITTEN = "generate.output"  # a file
STARTED = "bench.vllm"  # a program
ONLY_TYPED = "no file can set it, only what is typed"
PATHS = (*INPUTS, WRITTEN, "outputs")
ADAPTERS = ("train", "import", "prune")  # stages whose runs hold an adapter
#: Verb: the stages whose runs it reads.
READS = {
    **dict.fromkeys(("train", "score", "evaluate", "export", "generate", "serve"), ADAPTERS),
    "prune": (*ADAPTERS, "score"),
}
NEWEST = (
    "score",
    "prune",
    "evaluate",
    "export",
    "generate",
    "serve",
)  # verbs that read the newest run where none is named
ONE_PROCESS = ("export", "generate", "serve")  #: verbs of one process, however many trained the run
ASKED = ("shots", "num_beams")  # of ``evaluate``: what a task's answers depend on
_GROUP_KINDS = {"model": schema.ModelConfig, "task": schema.TaskConfig, "hardware": schema.HardwareConfig}
OPEN = ("method.options.", "method.beside.", "task.columns.")  #: mappings whose keys no schema fixes
HUB = "hub"  #: the file of the group that is any model, by id, folder or file
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  #: a repository on the Hub
LONGEST_NAME = 100  #: bytes; a folder's name may have 255 (POSIX NAME_MAX), method, model and task included
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1")
FROM_RUN = "_from_run"  # the choice that stands for what an earlier run used


@dataclass(frozen=True)
class Composed:
    """One composed and validated configuration."""

    verb: str
    config: Any  #: an instance of the verb's schema in ``schema.VERBS``
    resolved: dict[str, Any]  #: the same as plain values: what config.yaml holds
    choices: dict[str, str]  #: the file chosen in each group
    overrides: list[str]  #: as the user gave them
    #: the run whose adapter is used: ``config.run``, or the closest run in its lineage that has one
    adapter_run: Path | None = None

    @property
    def keys(self) -> set[str]:
        """The keys and groups that the user set."""
        return {override.key for override in parse_overrides(self.overrides)}

    @property
    def inputs(self) -> dict[str, str]:
        """The files and folders that are read, by key."""
        paths = {key: reduce(lambda at, name: getattr(at, name, None), key.split("."), self.config) for key in INPUTS}
        return {key: path for key, path in paths.items() if path}


@dataclass(frozen=True)
class Source:
    """The earlier run that a verb reads: its folder, its configuration and its choices."""

    path: str
    resolved: dict[str, Any]
    choices: dict[str, str]
    adapter_run: Path | None = None  #: see :attr:`Composed.adapter_run`; None as long as the run does not exist


def loader(config_dir: str | None = None) -> ConfigLoaderImpl:
    """Hydra's loader for our configuration folders and schemas."""
    return _loader(tuple(conf_folders(config_dir)))


@cache
def _loader(folders: tuple[Path, ...]) -> ConfigLoaderImpl:
    hydra.version.setbase("1.3")
    setup_globals()
    store = ConfigStore.instance()
    for verb, root in VERBS.items():
        store.store(name=f"_{'recipe' if verb == 'run' else verb}_run", node=root)
    for group, node in {**_GROUP_KINDS, "recipe": schema.RecipeConfig, "study": schema.StudyConfig}.items():
        store.store(group=group, name=f"_{group}", node=node)
    store.store(group="task", name="_mix", node=schema.mix())
    for name, node in methods.config_classes().items():
        store.store(group="method", name=f"_{name}", node=node)
    store.store(group="eval", name="_lm_eval", node=HarnessConfig)
    for name, kind in schema.BENCHES.items():
        store.store(group="bench", name=f"_{name}", node=kind)
    search_path = create_config_search_path(f"file://{folders[-1]}")
    for folder in folders[:-1]:
        search_path.prepend("user", f"file://{folder}")
    made = ConfigLoaderImpl(search_path)
    made.repository = ParsedOnce(search_path)
    return made


def _file(load: ConfigLoaderImpl, name: str) -> Any:
    """The values of one existing file, without those of its defaults list."""
    file = load.repository.load_config(name)
    assert file is not None
    return file.config


def compose(
    verb: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
    source: Source | None = None,
    later: tuple[str, ...] = (),
) -> Composed:
    """Compose, resolve and validate the configuration of one run.

    A verb that reads an earlier run takes its groups and its seed from that run, except what the overrides switch.
    ``source`` stands in for a run that does not exist yet (a recipe is checked before it starts), and so do paths
    that begin with one of ``later``.
    """
    load = loader(config_dir)
    given = _expand_models(load, [_literal_path(override) for override in parse_overrides(overrides)])
    with explained(Failure(load, verb, given)):
        parsed = OverridesParser.create().parse_overrides([str(override) for override in given])
        refuse_unsupported(parsed)
        if verb in READS:
            source = source or _find_source(verb, load, {item.key_or_group: item.value() for item in parsed})
            if source is not None:
                given = _adopt(verb, load, source, parsed)
    with explained(Failure(load, verb, given)):
        if "hydra" in _file(load, verb):
            raise UserError(f"{verb}.yaml: hydra: unknown key; Hydra's own settings cannot be set")
        cfg = load.load_configuration(verb, [*map(_adding, given), *WITHOUT_HYDRA], RunMode.RUN)
        chosen = cfg.hydra.runtime.choices.items()
        choices = {key: value for key, value in chosen if not key.startswith("hydra") and value is not None}
        _refuse_added(cfg, given)
        if source is not None:
            choices |= {key: source.choices[key] for key, value in choices.items() if value == FROM_RUN}
            cfg.run = source.path
        _require_booleans(cfg, parsed)
        _make_absolute(cfg, later)
        _inline_chat_templates(cfg)
        _list_labels(cfg)
        _fill_defaults(load, cfg, choices)
        if choices.get("model") and cfg.hydra.runtime.choices.model != FROM_RUN:
            _name_model(cfg, {item.key_or_group for item in parsed})
        if "method" in cfg:
            own = [item.key_or_group for item in parsed if item.key_or_group.startswith("method.")]
            inline_files(cfg.method, [key.split(".")[1] for key in own], later)
        with open_dict(cfg):
            del cfg["hydra"]
            if verb == "bench":
                cfg.variants = bench_methods.compose(load, cfg.bench)
        composed = _finish(verb, cfg, choices, list(overrides))
    typed = [item.key_or_group for item in parsed]
    if WRITTEN not in typed and verb == "generate" and composed.config.generate.output:
        raise UserError(f"{WRITTEN}: a configuration file says {composed.config.generate.output}; {ONLY_TYPED}")
    if STARTED not in typed and verb == "bench" and getattr(composed.config.bench, "vllm", None):
        raise UserError(f"{STARTED}: a configuration file says {composed.config.bench.vllm}; {ONLY_TYPED}")
    if TRUST not in typed:
        adopted = source is not None and source.resolved["model"].get("trust_remote_code")
        refuse_code(composed, source.path if source and adopted else f"model={choices.get('model')}")
    if source is not None and not (verb == "train" and methods.can(composed.config.method.name, Calibrates)):
        _check_made_with(composed.config.method, source)  # what calibrates is fitted anew
    return composed if source is None else replace(composed, adapter_run=source.adapter_run)


def refuse_code(composed: Composed, where: str) -> None:
    """Raise UserError if the configuration lets Python code of the model run; ``where`` names its file or folder."""
    if isinstance(composed.config, schema.RunConfig | schema.BenchRun) and composed.config.model.trust_remote_code:
        raise UserError(
            f"{TRUST}: '{where}' says true, which would run Python code that comes with its model; if you trust that, "
            f"type {TRUST}=true"
        )


def _check_made_with(method: schema.MethodConfig, source: Source) -> None:
    """Refuse values of its own method that do not go with what the source keeps."""
    made = source.resolved["method"]
    changed = method.unfit(made) if method.name == made["name"] else []
    if changed:
        key, others = changed[0], " ".join(f"method.{key}={getattr(method, key)}" for key in changed)
        task = source.choices["task"]
        raise UserError(
            f"method.{key}: {getattr(method, key)}, but '{source.path}' was made with {made.get(key)}; leave it out, "
            f"or make another run with: lrk train method={source.choices['method']} task={task} {others}"
        )


def restore(run: runs.Run, values: dict[str, Any] | None = None) -> Composed:
    """The configuration of an existing run, from its folder; ``values`` replace those of its config.yaml."""
    info, file = run.info, run.path / "config.yaml"
    try:
        values = run.config() if values is None else values
        composed = rebuild(info["stage"], values, info.get("choices", {}), info.get("overrides", []))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    path = getattr(composed.config, "run", None)
    return composed if path is None else replace(composed, adapter_run=_adapter_run(runs.Run.open(path)))


def rebuild(verb: Any, resolved: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> Composed:
    """The typed, validated configuration of plain values."""
    require_choice("stage", verb, VERBS)
    with explained(Failure(None, verb, [])):
        cfg = OmegaConf.structured(VERBS[verb])
        if "method" in resolved:
            kinds = methods.config_classes()
            require_choice("method.name", resolved["method"].get("name"), kinds)
            cfg.method = OmegaConf.structured(kinds[resolved["method"]["name"]])
        if verb == "bench":
            require_choice("bench.measure", resolved.get("bench", {}).get("measure"), schema.BENCHES)
            cfg.bench = OmegaConf.structured(schema.BENCHES[resolved["bench"]["measure"]])
        for entry, section in resolved.get("variants", {}).items():
            name = section and section.get("name")
            require_choice(f"variants.{entry}.name", name, [None, *methods.config_classes()])
            cfg.variants[entry] = name and OmegaConf.structured(methods.config_classes()[name])
        cfg.merge_with(OmegaConf.create(resolved))
        return _finish(verb, cfg, choices, overrides)


def _finish(verb: str, cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> Composed:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        give = " ".join(f"{key}=VALUE" for key in missing)
        raise UserError(f"{', '.join(missing)}: missing; give {give}{' or set them in a file' if missing[1:] else ''}")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    _refuse_huge(resolved)
    config = OmegaConf.to_object(cfg)
    _validate(config)
    if isinstance(config, TrainRun) and config.train.learning_rate is None:
        config.train.learning_rate = resolved["train"]["learning_rate"] = usual_rate_of(config).value
    if isinstance(config, TrainRun) and config.train.schedule is None:
        config.train.schedule = resolved["train"]["schedule"] = config.train.usual_schedule
    if isinstance(config, EvaluateRun) and config.eval is not None:
        choices = {**choices, "task": config.eval.label}  # its own task is not measured
    return Composed(verb, config, resolved, choices, overrides)  # type: ignore[arg-type]


def usual_rate_of(config: TrainRun) -> UsualRate:
    """The learning rate that ``train.learning_rate=null`` stands for."""
    return usual_rate(config.model, model_width(config.model), methods.create(config.method).rate_scale())


def _require_booleans(cfg: DictConfig, parsed: Sequence[HydraOverride]) -> None:
    """Refuse other values for true and false than ``BOOLEANS``: OmegaConf converts every whole number."""
    for item in parsed:
        value = item.value()
        if isinstance(OmegaConf.select(cfg, item.key_or_group), bool) and str(value).lower() not in BOOLEANS:
            raise UserError(f"{item.key_or_group}: '{value}' is not true or false")


def _refuse_huge(value: Any, key: str = "") -> None:
    """Refuse whole numbers beyond 64 bits, which no tensor and no random generator takes."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_huge(inner, f"{key}.{name}".strip("."))
    elif isinstance(value, int):
        require_range(key, value, -(2**63), 2**63 - 1)


def _validate(config: Any) -> None:
    """Check what types cannot express. Raises UserError."""
    if config.name is not None and (not config.name.strip(". ") or set(config.name) & set("/\\\0")):
        raise UserError(f"name: '{config.name}' cannot be part of a folder's name")
    if config.name is not None and len(config.name.encode()) > LONGEST_NAME:
        raise UserError(f"name: '{config.name}' is longer than {LONGEST_NAME} bytes")
    if hasattr(config, "seed"):
        require_range("seed", config.seed, 0, 2**32 - 1)
    if isinstance(config, schema.RunConfig):
        name: Any = getattr(config.method, "name", None)
        kinds = methods.config_classes()
        if not isinstance(config.method, schema.MethodConfig):
            raise UserError("method: the file needs a schema: 'defaults: [_lora]' (or another method) as its first key")
        require_choice("method.name", name, kinds)
        if type(config.method) is not kinds[name]:
            fitting = ", ".join(known for known, kind in kinds.items() if kind is type(config.method))
            raise UserError(
                f"method.name: '{name}' does not go with the keys of {fitting} (allowed: {fitting}, or "
                f"'defaults: [_{name}]' in the method's file)"
            )
        if config.model.shape is not None:
            raise UserError("model.shape: random weights are for lrk bench; leave it null")
    for section in (config, *vars(config).values()):
        if hasattr(section, "validate"):
            section.validate()


def _find_source(verb: str, load: ConfigLoaderImpl, given: dict[str, Any]) -> Source | None:
    """The run that the overrides name, or for evaluation the newest fitting one; None where none is read."""
    wanted: dict[str, Any] = {group: given[group] for group in ("method", "model") if group in given}
    if not all(load.repository.config_exists(f"{group}/{choice}") for group, choice in wanted.items()):
        return None  # composing says which choices there are
    primary = _file(load, verb)
    path, outputs = given.get("run", primary.get("run")), given.get("outputs", primary.get("outputs"))
    if path is None and verb not in NEWEST:
        return None
    if "method" in wanted:
        name = _method_name(load, wanted["method"])
        if name in methods.names() and "train" not in methods.capabilities(name):
            if path is not None:
                raise UserError(f"run: method={wanted['method']} is never trained, so it has no run")
            return None
        fitted = name in methods.names() and methods.can(name, Calibrates)
        if fitted and load.repository.config_exists(f"task/{given.get('task')}"):
            wanted["task"] = given["task"]  # what it keeps is of one task
    others = {group: given[group] for group in GROUPS if group in given and group not in wanted}
    weights = {key: given[f"model.{key}"] for key in ("gguf", "path", "id") if given.get(f"model.{key}")}
    own = _weights_name(**weights) if wanted.get("model") == HUB and weights else None  # HUB may be any model
    others |= {f"model.{key}": value for key, value in weights.items()}
    return _source(runs.find(path, READS[verb], outputs, wanted, others, own))


def _source(run: runs.Run) -> Source:
    """What a run used. Raises UserError where its files do not say."""
    choices = run.info.get("choices", {})
    for group in GROUPS:
        if group not in choices:
            raise UserError(f"{run.path / 'run.json'}: choices.{group} is missing")
    resolved = run.config("seed", "method.name", *(f"{group}.name" for group in GROUPS))
    file, method = str(run.path / "config.yaml"), resolved["method"]
    require_choice(f"{file}: method.name", method["name"], methods.config_classes())
    check(method, methods.config_classes()[method["name"]], file, "method")
    kinds = {"method": methods.config_classes()[method["name"]], **_GROUP_KINDS}
    for group, kind in kinds.items():
        for key in resolved[group]:
            require_choice(f"{file}: {group}", key, [item.name for item in fields(kind)])
    return Source(str(run.path), resolved, choices, _adapter_run(run))


def _adapter_run(run: runs.Run) -> Path | None:
    """``run``, or the closest run in its lineage that has an adapter."""
    for earlier in run.lineage():
        name = earlier.config("method.name")["method"]["name"]
        require_choice(f"{earlier.path / 'config.yaml'}: method.name", name, methods.names())
        if methods.can(name, Adapts) and earlier.info["stage"] != "score":
            return earlier.path.absolute()
    return None


def _method_name(load: ConfigLoaderImpl, choice: str) -> Any:
    return _file(load, f"method/{choice}").get("name")


def _adopt(verb: str, load: ConfigLoaderImpl, source: Source, parsed: list[HydraOverride]) -> list[Override]:
    """Overrides that choose the source's sections where the user leaves the choice alone, then the user's.

    The method is the source's own, or one that calibrates its model. With the source's task comes how it was asked.
    Its processes are adopted by verbs that can have several.
    """
    given: dict[str, Any] = {item.key_or_group: item.value() for item in parsed}
    method = source.choices.get("method")
    fresh = given.get("method", method) != method
    _check_model(load, source, given)
    if fresh:
        _check_calibrates(verb, load, source, given.get("method"))
    adopted = [group for group in GROUPS if given.get(group) in (None, source.choices.get(group))]
    adopted = [group for group in adopted if group != "method" or not fresh]
    for group in adopted:
        section = source.resolved[group]
        if group == "hardware" and verb in ONE_PROCESS:
            section = {**section, "processes": 1, "nodes": 1, "shard": None}
        schema_name = section["name"] if group == "method" else group
        node = {"defaults": [f"_{schema_name}", "_self_"], **section}
        ConfigStore.instance().store(group=group, name=FROM_RUN, node=node)
    own = parse_overrides(item.input_line or "" for item in parsed if item.key_or_group not in adopted)
    seed = [] if "seed" in given else [Override("seed", str(source.resolved["seed"]))]
    before = source.resolved.get("evaluate", {}) if "task" in adopted and hasattr(VERBS[verb](), "evaluate") else {}
    kept = {f"evaluate.{key}": str(before[key]) for key in ASKED if key in before}
    asked = [Override(key, value) for key, value in kept.items() if key not in given]
    return [*(Override(group, FROM_RUN) for group in adopted), *seed, *asked, *own]


def _check_model(load: ConfigLoaderImpl, source: Source, given: dict[str, Any]) -> None:
    """Refuse another model, unless it is a folder, in which the same weights may lie."""
    choice, used = given.get("model"), source.choices.get("model")
    other, own = given.get("model.id"), source.resolved["model"].get("id")
    if choice == used == HUB and other and own and other != own:
        raise UserError(f"model: '{source.path}' was made with '{own}', not '{other}'; leave model out")
    if (
        choice in (None, used)
        or given.get("model.path")
        or given.get("model.gguf")
        or not load.repository.config_exists(f"model/{choice}")
    ):
        return
    if not _file(load, f"model/{choice}").get("path"):
        raise UserError(
            f"model: '{source.path}' was made with '{used}', not '{choice}'; leave model out (model.path=FOLDER says "
            f"where its weights lie)"
        )


def _check_calibrates(verb: str, load: ConfigLoaderImpl, source: Source, choice: str | None) -> None:
    """Refuse a method of its own, other than one that works on a trained model as it is."""
    able = [name for name in methods.names() if methods.can(name, Calibrates)]
    if choice is not None and load.repository.config_exists(f"method/{choice}"):
        if _method_name(load, choice) in able:
            return
        if verb != "train":
            raise UserError(f"method: '{source.path}' was trained with '{source.choices['method']}', not '{choice}'")
    raise UserError(
        f"run: method={choice} trains from the pretrained model; on a trained run stands method={' or '.join(able)}, "
        f"and its own method trains on (leave method out)"
    )


def _make_absolute(cfg: DictConfig, later: tuple[str, ...]) -> None:
    """Make the paths of what is read and written absolute, so that they hold in every directory."""
    mixed = OmegaConf.select(cfg, "task.parts") or ()
    for key in (*INPUTS, WRITTEN, *(f"task.parts.{name}.path" for name in mixed)):
        group = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        path = OmegaConf.select(cfg, key) if isinstance(group, DictConfig) else None  # a user's file may hold a list
        if path and not path.startswith(later):
            OmegaConf.update(cfg, key, os.path.abspath(runs.settled(os.path.expanduser(path))))


def _fill_defaults(load: ConfigLoaderImpl, cfg: DictConfig, choices: dict[str, str]) -> None:
    """Give keys that a group's file leaves out the values of the group's ``_base.yaml``, or of the method's own file.

    A task without a name is named like its file.
    """
    sections = {group: cfg[group] for group in GROUPS if isinstance(cfg.get(group), DictConfig) and cfg[group]}
    for group, name in ((g, n) for g, section in sections.items() for n in section if OmegaConf.is_missing(section, n)):
        if (group, name) == ("task", "name") and choices.get("task"):
            cfg.task.name = choices["task"].rpartition("/")[2]
            continue
        base = f"{group}/_base"
        if group == "method" and name != "name":
            base = f"method/{OmegaConf.select(cfg, 'method.name', default=None)}"
        values = _file(load, base) if load.repository.config_exists(base) else {}
        if name in values and not OmegaConf.is_missing(values, name):
            cfg[group][name] = values[name]


def _inline_chat_templates(cfg: DictConfig) -> None:
    """Replace a chat template's file by its text, so that the saved configuration is what ran."""
    parts = OmegaConf.select(cfg, "task.parts") or ()
    for key in ("task.chat_template", *(f"task.parts.{name}.chat_template" for name in parts)):
        given = OmegaConf.select(cfg, key, default=None) if isinstance(cfg.get("task"), DictConfig) else None
        if given and "{" not in given:
            file = Path(given).expanduser()
            if not file.is_file():
                raise UserError(f"{key}: there is no file '{given}'")
            OmegaConf.update(cfg, key, read_text(file, "YAML"))


def _list_labels(cfg: DictConfig) -> None:
    """Let the labels of images in folders, if none are given, be the folders' names in alphabetical order."""
    task = cfg.get("task")
    path = OmegaConf.select(cfg, "task.path", default=None) if isinstance(task, DictConfig) else None
    if not path or not task.get("image") or task.answer != "labels" or task.label_words or not os.path.isdir(path):
        return
    train = Path(path) / task.train_split
    folders = sorted((train if train.is_dir() else Path(path)).iterdir())
    task.label_words = [folder.name for folder in folders if folder.is_dir() and not folder.name.startswith(".")]


def _expand_models(load: ConfigLoaderImpl, given: Sequence[Override]) -> list[Override]:
    """``model=FOLDER``, ``model=FILE.gguf`` and ``model=ORG/NAME`` as ``model=hub`` with the key for such a place.

    A file of the group comes first, then a folder or file, then the Hub.
    """
    expanded: list[Override] = []
    for override in given:
        value = (override.value or "").strip("'\"")
        path = os.path.expanduser(value)
        if override.key != "model" or not value or load.repository.config_exists(f"model/{value}"):
            expanded.append(override)
            continue
        if os.path.isdir(path):
            key = "model.path"
        elif value.endswith(".gguf") or os.path.isfile(path):
            key = "model.gguf"
        elif HUB_NAME.fullmatch(value):
            key = "model.id"
        elif os.sep in value:
            raise UserError(f"model: there is no folder '{value}', and no model of that name")
        else:
            expanded.append(override)
            continue
        expanded += [Override("model", HUB), Override(key, quoted(path))]
    return expanded


def _name_model(cfg: DictConfig, given: Collection[str]) -> None:
    """Name a model after its weights if its file gives no name, or gives it to other weights.

    The width and the licence in the file are not those of other weights either.

    Args:
        given: the keys that the user set.
    """
    model = cfg.model
    unnamed = (
        OmegaConf.is_missing(model, "name") or "model.id" in given or (model.bundled and (model.path or model.gguf))
    )
    if "model.id" in given and "model.width" not in given:
        model.width = None
    if unnamed and "model.license" not in given:
        model.license = None
    if "model.name" in given or not unnamed:
        return
    model.name = _weights_name(model.gguf, model.path, model.id)


def _weights_name(gguf: str | None = None, path: str | None = None, id: str | None = None) -> str:
    """The name of a GGUF file, a folder or a repository."""
    source = Path(gguf or path or id or HUB)
    if gguf and len(files := list(source.glob("*.gguf"))) == 1:  # of a folder
        source = files[0]
    return source.stem if source.suffix == ".gguf" else source.name


def _adding(override: Override) -> str:
    """An override for Hydra, which adds a key only where told to: a mapping such as method.options takes any."""
    return f"++{override}" if f"{override.key}.".startswith(OPEN) else str(override)


def _refuse_added(cfg: DictConfig, given: Sequence[Override]) -> None:
    """Refuse what :func:`_adding` let through where the method has no such mapping."""
    for override in (override for override in given if f"{override.key}.".startswith(OPEN)):
        section, name = override.key.split(".")[:2]
        kind: Any = schema.TaskConfig if section == "task" and OmegaConf.select(cfg, section) else None
        if section == "method":
            kind = methods.config_classes().get(OmegaConf.select(cfg, "method.name", default=None))
        if not (kind and knows(kind, name)):
            keys = [f"{section}.{item.name}" for item in fields(kind)] if kind else []
            raise UserError(unknown_key(override.key, keys))


def _literal_path(override: Override) -> Override:
    """Quote the value of a key that is a path, which may hold any character; ``~`` becomes the home folder."""
    key, value = override.key, override.value
    if key in PATHS and override.sets and not value:
        raise UserError(f"{key}: no folder is named; write {key}=FOLDER, or leave it out")
    if key not in PATHS or not value or value == "null" or value[0] in "'\"":
        return override
    return Override(key, quoted(os.path.expanduser(value)))
