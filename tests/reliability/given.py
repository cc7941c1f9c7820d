"""Folders and files that somebody else made to act: code, callables, secrets, paths, escapes, patterns, pickles.

Nothing in them is executed, no secret is resolved, nothing is written elsewhere, and no terminal is steered. A command
refuses them in one line, or reads them as the data that they are.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .box import SECRET_NAME, Box
from .mutate import Executed
from .samples import SMALL, Samples
from .trial import Failed

ESCAPES = (
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "[/bold]x",
    "[red]x[/red]",
    "[link=file:///]x",
    "\u202ex",
    "\x08\x08",
)
SHORT = ("generate.max_new_tokens=4", "hardware.threads=1")
PROMPT = "zorp is red."
BOUND = 30.0  #: s


def trial(seed: int, box: Box, samples: Samples) -> None:
    """The attacks take turns; the seed draws their details and the command that reads them."""
    attack = ATTACKS[seed % len(ATTACKS)]
    box.case = (attack.__doc__ or "").split("\n")[0].rstrip(".")
    attack(random.Random(seed), box, samples)


def code_of_a_model(chance: random.Random, box: Box, samples: Samples) -> None:
    """A run folder whose model comes with Python code."""
    sample = chance.choice(("trained_lora", "unfinished"))
    run = samples.place(sample, box)
    config = _config(box, run)
    config["model"] |= {"path": str(box.work / "model"), "bundled": False, "trust_remote_code": True}
    _write_config(box, run, config)
    _model(box, chance)
    words = ("train", "--resume", str(run)) if sample == "unfinished" else _reading(chance, box, run)
    box.run(*words)


def code_of_a_typed_model(chance: random.Random, box: Box, samples: Samples) -> None:
    """A model folder with Python code, named on the command line without trust."""
    _model(box, chance)
    box.run(*chance.choice((("train", *SMALL), ("evaluate", "method=none", *SMALL[2:4]))), "model.path=model")


def callable_of_a_launcher(chance: random.Random, box: Box, samples: Samples) -> None:
    """A sweep folder whose launcher calls what it names."""
    run = samples.place("sweep", box)
    call = f"{{_target_:os.mkdir,path:{box.executed}}}"
    launcher = chance.choice(
        (
            [f"+hydra.callbacks.x={call}"],
            [f"hydra.callbacks.x={call}"],
            [f"hydra.callbacks={{x:{call}}}"],
            ["hydra.launcher._target_=os.mkdir", f"+hydra.launcher.path={box.executed}"],
            ["+hydra.launcher._target_=os.mkdir", f"++hydra.launcher.path={box.executed}"],
            [f"hydra.launcher={call}"],
            [f"hydra.sweeper={call}"],
            [f"++hydra.launcher.x={call}"],
            [f"hydra.searchpath=[file://{box.work}]", "hydra/launcher=given"],
            ["hydra/launcher=../../given"],
            [f"hydra.launcher.x=${{oc.env:{SECRET_NAME}}}"],
            [f"hydra.run.dir={box.root}/elsewhere"],
            ["hydra.sweep.subdir=../../elsewhere"],
            [{"a": 1}],
            [None],
            "hydra/launcher=joblib",
        )
    )
    (box.work / "hydra" / "launcher").mkdir(parents=True)
    (box.work / "hydra" / "launcher" / "given.yaml").write_text(f"_target_: os.mkdir\npath: {box.executed}\n")
    _set(box.work / run / "sweep.json", launcher=launcher)
    box.case += f": {launcher}"
    box.run("train", "-m", "--resume", str(run), codes=(1, 2), timeout=BOUND)


def callable_of_a_configuration(chance: random.Random, box: Box, samples: Samples) -> None:
    """A configuration that names something to call."""
    call = {"_target_": "os.mkdir", "path": str(box.executed)}
    run = samples.place("trained_lora", box)
    config = _config(box, run)
    section = chance.choice(("method", "model", "task", "hardware", "train", "evaluate"))
    place = chance.choice(("section", "key", "top", "user's file"))
    box.case += f": {place} {section}"
    if place == "user's file":
        group = chance.choice(("method", "model", "task", "hardware"))
        folder = box.work / "conf" / group
        folder.mkdir(parents=True)
        schema = {"method": "_lora"}.get(group, f"_{group}")
        (folder / "given.yaml").write_text(yaml.safe_dump({"defaults": [schema], "name": "lora", **call}))
        box.run("train", f"{group}=given", "--config-dir", "conf", codes=(2,), names=("_target_", "given"))
        return
    if place == "section":
        config[section] = config[section] | call
    elif place == "key":
        config[section][chance.choice(sorted(config[section]))] = call
    else:
        config |= call
    _write_config(box, run, config)
    box.run(*_reading(chance, box, run), codes=(2,), timeout=BOUND)


def secret(chance: random.Random, box: Box, samples: Samples) -> None:
    """An interpolation that would read the environment."""
    text = f"${{oc.env:{SECRET_NAME}}}"
    if chance.random() < 0.3:
        run = samples.place("recipe", box)
        config = _config(box, run)
        key = chance.choice(("name=", "task.hub=", "run=", "model.path="))
        config["recipe"]["stages"][1]["overrides"].append(f"{key}{text}")
        _write_config(box, run, config)
        box.case += f": recipe {key}"
        box.run("run", "--resume", str(run), codes=(1, 2), timeout=BOUND)
        return
    run = samples.place("trained_lora", box)
    config = _config(box, run)
    keys = [
        ("name",),
        ("outputs",),
        ("run",),
        ("model", "id"),
        ("model", "path"),
        ("model", "name"),
        ("task", "hub"),
        ("task", "name"),
    ]
    *above, key = chance.choice(
        [*keys, ("task", "template"), ("method", "rank"), ("seed",), ("task", "subset"), ("model", "revision")]
    )
    at = config
    for name in above:
        at = at[name]
    at[key] = chance.choice((text, f"x{text}", f"${{oc.decode:{text}}}"))
    _write_config(box, run, config)
    box.case += f": {'.'.join([*above, key])}={at[key]}"
    box.run(*_reading(chance, box, run), codes=(2,), timeout=BOUND)


def path_elsewhere(chance: random.Random, box: Box, samples: Samples) -> None:
    """A path in a given folder that leads out of it."""
    there = chance.choice(("../../../../elsewhere", str(box.root / "elsewhere"), "../../../../precious"))
    kind = chance.choice(("recipe folder", "sweep job", "resumed outputs", "link"))
    box.case += f": {kind} {there if not there.startswith('/') else 'absolute'}"
    if kind == "recipe folder":
        run = samples.place("recipe", box)
        values = json.loads((box.work / run / "recipe.json").read_text())
        values["stages"][1]["folder"] = there
        (box.work / run / "recipe.json").write_text(json.dumps(values))
        words = ("run", "--resume", str(run))
    elif kind == "sweep job":
        run = samples.place("sweep", box)
        values = json.loads((box.work / run / "sweep.json").read_text())
        shutil.copytree(box.work / run / values["jobs"][1]["id"], box.root / "elsewhere")
        values["jobs"][1]["id"] = there if "precious" not in there else str(box.root / "elsewhere")
        (box.work / run / "sweep.json").write_text(json.dumps(values))
        words = ("train", "-m", "--resume", str(run))
    elif kind == "resumed outputs":
        run = samples.place("unfinished", box)
        _write_config(box, run, _config(box, run) | {"outputs": there})
        words = ("train", "--resume", str(run))
    else:
        run = samples.place("unfinished", box)
        name = chance.choice(("history.jsonl", "metrics.json", "predictions.jsonl", "run.json.lock", "error.txt"))
        (box.work / run / name).unlink(missing_ok=True)
        (box.work / run / name).symlink_to(box.precious)
        words = ("train", "--resume", str(run))
    before = {name for name in box.snapshot() if not name.startswith("work/")}
    box.run(*words, timeout=BOUND)
    new = {name for name in box.snapshot() if not name.startswith("work/")} - before
    if new:
        raise Failed(f"wrote outside the run: {min(new)}")


def escapes(chance: random.Random, box: Box, samples: Samples) -> None:
    """Escapes and markup in what is shown."""
    text = chance.choice(ESCAPES)
    sample = chance.choice(("trained_lora", "evaluated", "scored"))
    run = samples.place(sample, box)
    file = chance.choice(("run.json", "config.yaml", "metrics.json", "name"))
    verb = chance.choice(("list", "compare", "evaluate", "dry run"))
    if file == "name":
        moved = run.with_name(f"120000-{text}".replace("/", ""))
        (box.work / run).rename(box.work / moved)
        run, key = moved, ""
    elif file == "run.json":
        key = chance.choice(("stage", "status", "command", "started", "device", "seed", "choices", "error"))
        info = json.loads((box.work / run / file).read_text())
        value: Any = dict.fromkeys(info["choices"], text) if key == "choices" else text
        if key == "error":
            _set(box.work / run / file, status="failed")
        _set(box.work / run / file, **{key: value})
    elif file == "metrics.json":
        key = "test/accuracy"
        _set(box.work / run / file, **{f"test/{text}": 0.5})
    else:
        section, key = chance.choice((("task", "name"), ("model", "name"), ("method", "name"), ("task", "metric")))
        config = _config(box, run)
        config[section][key] = text
        _write_config(box, run, config)
        key = f"{section}.{key}"
    box.case += f": {text!r} in {file} {key}, {verb}"
    words: tuple[str, ...] = {"list": ("list", "runs"), "compare": ("compare",)}.get(verb, ())
    box.run(
        *(words or ("evaluate", f"run={run}", *(["--dry-run"] * (verb == "dry run")))),
        codes=(0, 2) if words else (0, 1, 2),
    )


def patterns(chance: random.Random, box: Box, samples: Samples) -> None:
    """A PEFT folder whose patterns and numbers do not fit."""
    run = samples.place("exported", box)
    folder = box.work / run / "export"
    for name in ("lrk.json", "canary.safetensors"):
        if chance.random() < 0.7:
            (folder / name).unlink(missing_ok=True)
    key, value = chance.choice(
        (
            ("alpha_pattern", {"(": 1}),
            ("alpha_pattern", {".*": "z"}),
            ("alpha_pattern", {".*": [1]}),
            ("alpha_pattern", [1]),
            ("alpha_pattern", "x"),
            ("alpha_pattern", {"(a+)+b": 1, "((.*)*)*x": 2}),
            ("alpha_pattern", {"(.|.)*" * 12 + "Z": 1}),
            ("alpha_pattern", {"x" * 100_000: 1}),
            ("alpha_pattern", {f"layer{i}": i for i in range(50_000)}),
            ("alpha_pattern", {".*": float("inf")}),
            ("alpha_pattern", {".*": 1e308}),
            ("rank_pattern", {"(": 1}),
            ("rank_pattern", {".*": -1}),
            ("rank_pattern", [None]),
            ("lora_alpha", float("inf")),
            ("lora_alpha", float("nan")),
            ("lora_alpha", True),
            ("lora_alpha", 10**400),
            ("r", "z"),
            ("use_rslora", "no"),
            ("target_modules", {"_target_": "os.mkdir"}),
            ("auto_mapping", {"parent_library": "given", "base_model_class": "Given"}),
            ("base_model_name_or_path", "\x1b[2J"),
        )
    )
    _set(folder / "adapter_config.json", **{key: value})
    _rehash(folder)
    box.case += f": {key}={str(value)[:60]}"
    _answered(box, run, folder.relative_to(box.work))


def pickles(chance: random.Random, box: Box, samples: Samples) -> None:
    """A pickle where weights are looked for."""
    data = pickle.dumps(Executed(box.executed))
    run = samples.place(chance.choice(("trained_lora", "unfinished")), box)
    here = box.work / run
    for path in [*here.rglob("*.safetensors")]:
        for name in ("adapter_model.bin", "pytorch_model.bin", f"{path.stem}.pt", f"{path.stem}.bin"):
            path.with_name(name).write_bytes(data)
        if chance.random() < 0.5:
            path.write_bytes(data)
            _rehash(path.parent)
    if list(here.glob("checkpoints/*")):
        box.run("train", "--resume", str(run))
    elif chance.random() < 0.5:
        _answered(box, run, run / "adapter")
    else:
        box.run(*_reading(chance, box, run))


def circle(chance: random.Random, box: Box, samples: Samples) -> None:
    """A run that was made from itself, or from one that was made from it."""
    run, other = samples.place("trained_lora", box), samples.place("evaluated", box)
    target = chance.choice((run, other))
    for here in {run, target}:
        _write_config(box, here, _config(box, here) | {"run": str(box.work / (target if here == run else run))})
    box.case += f": {'itself' if target == run else 'two runs'}"
    box.run(*_reading(chance, box, run), timeout=BOUND)


ATTACKS: list[Callable[[random.Random, Box, Samples], None]] = [
    code_of_a_model,
    code_of_a_typed_model,
    callable_of_a_launcher,
    callable_of_a_configuration,
    secret,
    path_elsewhere,
    escapes,
    patterns,
    pickles,
    circle,
]


def _reading(chance: random.Random, box: Box, run: Path) -> tuple[str, ...]:
    return chance.choice(
        (
            ("evaluate", f"run={run}"),
            ("evaluate", f"run={run}", "--dry-run"),
            ("generate", f"run={run}", PROMPT, *SHORT),
            ("export", f"run={run}"),
            ("score", f"run={run}", "score.batch=4", "score.kind=magnitude"),
            ("train", f"run={run}", "train.max_steps=2"),
            ("check", "evaluate", f"run={run}"),
        )
    )


def _answered(box: Box, run: Path, tenant: Path) -> None:
    """A batch of the given adapter and the bare model: the latter is answered whatever the former is."""
    rows = [{"tenant": str(tenant), "prompt": PROMPT}, {"tenant": None, "prompt": PROMPT}]
    (box.work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = box.run("generate", "method=none", "--tenants", "prompts.jsonl", *SHORT, timeout=BOUND)
    answers = [json.loads(line) for line in ended.out.split("\n") if line]
    if not any("answer" in row and row.get("tenant") is None for row in answers):
        raise Failed(f"the other tenant got no answer: {ended.err.strip()[:150]}")
    for row in answers:
        if "answer" in row and len(row["answer"]) > 1000:
            raise Failed("the answer is longer than asked for")


def _model(box: Box, chance: random.Random) -> None:
    """``work/model``: the bundled model, with a module of code that its configuration or its tokenizer names."""
    from lowrank_cli.models.load import BUNDLED

    folder = box.work / "model"
    shutil.copytree(BUNDLED, folder)
    (folder / "given.py").write_text(f"import os\nos.mkdir({str(box.executed)!r})\nGiven = None\n")
    kind = chance.choice(("configuration", "model", "tokenizer", "all"))
    names = {"AutoConfig": "given.Given", "AutoModelForCausalLM": "given.Given", "AutoModel": "given.Given"}
    config = json.loads((folder / "config.json").read_text())
    if kind in ("configuration", "all"):
        config["model_type"] = "given"
    if kind != "tokenizer":
        config["auto_map"] = names
    (folder / "config.json").write_text(json.dumps(config))
    if kind in ("tokenizer", "all"):
        _set(
            folder / "tokenizer_config.json", tokenizer_class="Given", auto_map={"AutoTokenizer": ["given.Given", None]}
        )
    box.case += f": {kind}"


def _config(box: Box, run: Path) -> dict[str, Any]:
    return yaml.safe_load((box.work / run / "config.yaml").read_text())


def _write_config(box: Box, run: Path, config: dict[str, Any]) -> None:
    """The run's configuration, with the hash that goes with it."""
    from lowrank_cli.runs import config_hash

    (box.work / run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _set(box.work / run / "run.json", config_hash=config_hash(config))


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _rehash(folder: Path) -> None:
    from .mutate import rehash

    for path in folder.iterdir():
        if path.is_file():
            rehash(path)
