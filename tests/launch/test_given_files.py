"""Files from somebody else: nothing in them acts; content of the wrong kind is one line with file, key and value."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from command import one_line, reconfigure, runs
from rich.text import Text
from safetensors.torch import load_file, save_file
from small import adapted

from lowrank_cli import reader
from lowrank_cli.adapter.adapted_model import fingerprint
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.tenants import tenant
from lowrank_cli.config import composition, sweep
from lowrank_cli.errors import UserError, escaped
from lowrank_cli.reader import MAX_DEPTH, read_json, read_json_lines, read_yaml
from lowrank_cli.report import plots, tables
from lowrank_cli.report.end_of_run import end_of_run
from lowrank_cli.runs import Run, child, scan
from lowrank_cli.runs.library_warnings import library_warnings
from lowrank_cli.runs.prompt_file import read_requests
from lowrank_cli.session.adapter_run import check_template, method_of
from lowrank_cli.tasks.sources import read_jsonl
from lowrank_cli.terminal import Terminal
from lowrank_cli.training import checkpoint

STEPS = ("train.max_steps=2", "train.warmup=0.1")
ESCAPES = "m[/bold]x\x1b]0;title\x07\x9b2J\u202e"


@pytest.fixture
def made(fake_stages):
    """A finished run of LoRA, without a model."""
    composed = composition.compose("train", ["method=lora", *STEPS])
    run = Run.create(
        "outputs", stage="train", config=composed.resolved, choices=composed.choices, overrides=[], command="lrk"
    )
    run.log({"step": 1, "train/loss": 1.0})
    run.finish({"test/accuracy": 0.5})
    return run


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which is one line that a terminal prints as it stands."""
    text = str(error.value)
    assert "\n" not in text and escaped(text) == text
    return text


def refused(lrk, *arguments: str) -> str:
    """The one line that a command ends with, which writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    ended = lrk(*arguments)
    assert (ended.code, ended.out) == (2, "") and ended.err.count("\n") == 1, ended
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return ended.err.removeprefix("error: ").rstrip()


def interrupted(run: Run) -> None:
    """As Ctrl-C leaves a run."""
    run.update(status="interrupted")


# ------------------------------------------------------------------------------------ code that comes with a model


def trusting(run: Run) -> None:
    reconfigure(run, model={**run.config()["model"], "trust_remote_code": True, "path": str(Path("model").absolute())})
    Path("model").mkdir(exist_ok=True)


@pytest.mark.parametrize("verb", ["evaluate", "score", "prune", "export", "generate", "train"])
def test_trust_is_not_adopted_from_a_run(made, lrk, verb):
    trusting(made)
    extra = {"prune": ["prune.drop=3"], "generate": ["hello"]}.get(verb, [])
    message = refused(lrk, verb, f"run={made.path}", *extra)
    assert message.startswith(f"model.trust_remote_code: '{made.path}' says true, which would run Python code")
    assert "type model.trust_remote_code=true" in message
    for typed in ("true", "false"):
        done = lrk(verb, f"run={made.path}", *extra, f"model.trust_remote_code={typed}", "--dry-run")
        assert done.code == 0 and f"trust_remote_code: {typed}" in done.out


def test_trust_of_a_resumed_run_is_typed(made, lrk):
    trusting(made)
    interrupted(made)
    message = refused(lrk, "train", "--resume", str(made.path))
    assert message.startswith("model.trust_remote_code: ") and "type model.trust_remote_code=true" in message
    assert "leave out seed=3" in refused(lrk, "train", "--resume", str(made.path), "seed=3")
    assert lrk("train", "--resume", str(made.path), "model.trust_remote_code=true").code == 0


def test_trust_of_a_resumed_sweep_is_typed(fake_stages, lrk):
    assert lrk("train", "-m", "seed=0,1", *STEPS).code == 0
    (folder,) = runs()
    job = Run.open(next(folder.glob("*seed1")))
    trusting(job)
    interrupted(job)
    assert refused(lrk, "train", "-m", "--resume", str(folder)).startswith("model.trust_remote_code: ")
    assert lrk("train", "-m", "--resume", str(folder), "model.trust_remote_code=true").code == 0


RECIPE = """# mine
defaults: [_recipe]
name: mine
stages:
  - {name: fit, stage: train, overrides: [method=lora, train.max_steps=2, train.warmup=0.1%s]}
  - {name: test, stage: evaluate, overrides: ["run={fit}"]}
"""


def recipe(extra: str = "") -> list[str]:
    Path("conf/recipe").mkdir(parents=True, exist_ok=True)
    Path("conf/recipe/mine.yaml").write_text(RECIPE % extra)
    return ["run", "recipe=mine", "--config-dir", "conf"]


def test_trust_in_a_recipe_is_typed(fake_stages, lrk):
    trust = "model.trust_remote_code=true"
    assert one_line(lrk(*recipe(f", {trust}"))).startswith("recipe mine, stage 'fit': model.trust_remote_code: no file")
    assert lrk(*recipe(), trust).code == 0  # both stages get it
    run = Run.open("outputs/latest")
    assert all(Run.open(run.path / name).config()["model"]["trust_remote_code"] for name in ("01-fit", "02-test"))
    shutil.rmtree(run.path / "02-test")
    interrupted(run)
    assert refused(lrk, "run", "--resume", str(run.path)).startswith("model.trust_remote_code: ")
    assert lrk("run", "--resume", str(run.path), trust).code == 0


def test_trust_in_a_users_file_is_typed(lrk):
    Path("mine/model").mkdir(parents=True)
    values = composition.compose("train", []).resolved["model"] | {"trust_remote_code": True}
    Path("mine/model/mine.yaml").write_text(yaml.safe_dump({"defaults": ["_model"], **values}))
    call = ["train", "model=mine", "--config-dir", "mine", "--dry-run"]
    assert one_line(lrk(*call)).startswith("model.trust_remote_code: 'model=mine' says true")
    assert lrk(*call, "model.trust_remote_code=true").code == 0


# ----------------------------------------------------------------------------------- what launchers and Hydra call

CALLABLE = "{_target_: os.mkdir, path: acted}"
CALL = {"_target_": "os.mkdir", "path": "acted"}


def test_a_saved_launcher_is_a_name_and_plain_settings(fake_stages, lrk):
    assert lrk("train", "-m", "seed=0,1", *STEPS).code == 0
    (folder,) = runs()
    interrupted(Run.open(next(folder.glob("*seed1"))))
    ledger = json.loads((folder / "sweep.json").read_text())
    for override in (
        f"+hydra.callbacks.x={CALLABLE}",
        f"hydra.callbacks.x={CALLABLE}",
        f"hydra.launcher.x={CALLABLE}",
        "hydra.launcher._target_=os.mkdir",
        f"hydra.launcher.n_jobs={CALLABLE}",
        "hydra.searchpath=[file:///tmp]",
        "hydra/launcher=../../mine",
        "hydra.launcher.n_jobs=${oc.env:HOME}",
        "hydra.launcher.temp_folder=/somewhere/else",
        "outputs=elsewhere",
    ):
        (folder / "sweep.json").write_text(json.dumps(ledger | {"launcher": [override]}))
        assert override.partition("=")[0] in refused(lrk, "train", "-m", "--resume", str(folder))
        assert not Path("acted").exists()
    assert lrk("train", "-m", "--resume", str(folder), "hydra/launcher=basic").code == 0  # typed, so another is taken


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "seed=0,1", f"+hydra.callbacks.x={CALLABLE}"],
        ["-m", "seed=0,1", "hydra.launcher._target_=os.mkdir"],
        ["-m", "seed=0,1", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={CALLABLE}"],
        ["-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=${oc.env:HOME}"],
        ["-m", "seed=0,1", "hydra/launcher=mine", "--config-dir", "mine"],
        ["--config-dir", "mine"],
        ["method=mine", "--config-dir", "mine"],
        [f"train={CALLABLE}"],
        [f"method.rank={CALLABLE}"],
        ["model._target_=os.mkdir"],
        [f"+x={CALLABLE}"],
    ],
    ids=" ".join,
)
def test_nothing_typed_or_configured_is_called(fake_stages, lrk, arguments):
    for folder in ("mine/hydra/launcher", "mine/method"):
        Path(folder).mkdir(parents=True)
    Path("mine/hydra/launcher/mine.yaml").write_text("_target_: os.mkdir\npath: acted\n")
    Path("mine/method/mine.yaml").write_text("defaults: [_lora]\n_target_: os.mkdir\n")
    if arguments == ["--config-dir", "mine"]:
        text = (composition.conf_folders(None)[0] / "train.yaml").read_text()
        Path("mine/train.yaml").write_text(f"{text}\nhydra:\n  callbacks:\n    x: {CALLABLE}\n")
    one_line(lrk("train", *arguments, *STEPS))
    assert not Path("acted").exists()


@pytest.mark.parametrize("change", [CALL, {"train": CALL}], ids=str)
def test_a_saved_configuration_names_nothing_to_call(made, lrk, change):
    reconfigure(made, **change)
    for call in (["evaluate", f"run={made.path}"], ["train", f"run={made.path}", "--dry-run"]):
        assert "config.yaml: " in (message := refused(lrk, *call)) and "holds _target_" in message


def test_a_package_is_not_imported_to_look_for_a_model(made, lrk):
    Path("given").mkdir()
    Path("given/__init__.py").write_text("import os\nos.mkdir('acted')\n")
    reconfigure(made, model={**made.config()["model"], "bundled": False, "id": "x/y", "package": "given.model"})
    message = refused(lrk, "evaluate", f"run={made.path}", "--dry-run")
    assert message == "model.package: 'given.model' is not the name of a Python package"


def test_a_saved_launcher_is_read_as_it_was_typed():
    typed = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.backend=loky"]
    assert sweep.saved_launcher(typed) == typed


# ------------------------------------------------------------------------------------------ names and where they lead


def test_folders_of_ledgers_are_plain_names(fake_stages, lrk):
    assert lrk(*recipe()).code == 0
    run = Run.open("outputs/latest")
    interrupted(run)
    ledger = run.read_json("recipe.json")
    Path("sweep").mkdir()
    for name in ("../../../X", "/tmp/X", "..", "a/b", "", ".hidden", "a\0b"):
        ledger["stages"][1]["folder"] = name
        run.write_json("recipe.json", ledger)
        assert "recipe.json: stages[1].folder is " in refused(lrk, "run", "--resume", str(run.path)), name
        Path("sweep/sweep.json").write_text(json.dumps({"stage": "train", "launcher": [], "jobs": [{"id": name}]}))
        message = refused(lrk, "train", "-m", "--resume", "sweep")
        assert "sweep.json: jobs[0].id is " in message and "expected a plain name, no path" in message, name


def test_a_link_does_not_lead_out_of_a_folder():
    Path("inner").mkdir()
    Path("outer").mkdir()
    Path("inner/job").symlink_to(Path("outer").absolute(), target_is_directory=True)
    with pytest.raises(UserError, match="lies outside 'inner'"):
        child(Path("inner"), "job")


def test_a_given_output_is_not_written(fake_stages, lrk):
    composed = composition.compose("generate", ["method=none", "generate.prompt=x", "generate.output=theirs.jsonl"])
    run = Run.create(
        "outputs", stage="generate", config=composed.resolved, choices=composed.choices, overrides=[], command="lrk"
    )
    for status in ("interrupted", "pending"):
        run.update(status=status)
        message = refused(lrk, "generate", "--resume", str(run.path))
        assert f"would write generate.output={Path('theirs.jsonl').absolute()}, outside its folder" in message


def test_an_output_is_typed(fake_stages, lrk):
    Path("mine").mkdir()
    text = (composition.conf_folders(None)[0] / "generate.yaml").read_text()
    Path("mine/generate.yaml").write_text(text.replace("output: null", "output: theirs.jsonl"))
    call = ["generate", "x", "method=none", "--config-dir", "mine", "--dry-run"]
    assert refused(lrk, *call).startswith("generate.output: a configuration file says ")
    assert lrk(*call, "generate.output=mine.jsonl").code == 0
    message = one_line(lrk(*recipe(", generate.output=theirs.jsonl")))
    assert message.startswith("recipe mine, stage 'fit': generate.output: no file can set it")


def test_a_link_among_the_files_of_a_run_is_not_followed(made):
    Path("precious").write_text("mine")
    (made.path / "warnings.txt").symlink_to(Path("precious").absolute())
    with pytest.raises(UserError, match="lies outside the run folder"), library_warnings(made):
        logging.getLogger("transformers").warning("theirs")
    assert Path("precious").read_text() == "mine"


def test_a_figure_lies_among_the_plots(made, pictures):
    figure = {"file": "../run.json", "kind": "heatmap", "title": "", "rows": [], "columns": [], "values": []}
    made.write_json("figures.json", [figure])
    with pytest.raises(UserError, match=r"figures\.json: \[0\]\.file is '\.\./run\.json'; expected a plain name"):
        plots.draw(made)
    made.write_json("figures.json", [{**figure, "file": "a.png", "rows": ["a"], "values": [["x"]]}])
    with pytest.raises(UserError, match=r"\[0\]\.values\[0\]\[0\] is 'x'; expected a number or null"):
        plots.draw(made)
    made.write_json("figures.json", [{**figure, "file": "a.png", "kind": "box", "rows": ["a", "b"]}])
    with pytest.raises(UserError, match=r"figures\.json: 'a\.png' cannot be drawn"):
        plots.draw(made)


# ---------------------------------------------------------------------------------------------------- interpolations


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"id": "${oc.env:SECRET}"}},
        {"task": {"template": "x ${seed}"}},
        {"name": "${now:%Y}"},
        {"method": {"${oc.env:SECRET}": 1}},
    ],
    ids=str,
)
def test_interpolations_of_a_saved_configuration_are_refused(made, lrk, monkeypatch, change):
    monkeypatch.setenv("SECRET", "hunter2")
    saved = made.config()
    for key, value in change.items():
        reconfigure(made, **{key: {**saved[key], **value} if isinstance(value, dict) else value})
    message = refused(lrk, "evaluate", f"run={made.path}")
    assert "config.yaml: " in message and "expected a plain value" in message and "hunter2" not in message
    interrupted(made)
    assert "expected a plain value" in refused(lrk, "train", "--resume", str(made.path))


# ------------------------------------------------------------------------------------------------ terminals and plots


def printed(*renderables) -> str:
    console = Terminal(file=io.StringIO(), width=200)
    for item in renderables:
        console.print(item, crop=False)
    return console.file.getvalue()


def test_what_is_printed_is_shown_as_it_stands(made, lrk):
    assert escaped(ESCAPES) == r"m[/bold]x\x1b]0;title\x07\x9b2J\u202e" and escaped("a\tb\nc") == "a\tb\nc"
    shown = printed(ESCAPES, Text(ESCAPES), Text.assemble(ESCAPES, style="bold"))
    assert "\x1b" not in shown and "\x9b" not in shown and shown.count("m[/bold]x\\x1b]0;title") == 3
    assert str(UserError(f"key: {ESCAPES}")) == f"key: {escaped(ESCAPES)}"
    choices = {**made.info["choices"], "method": ESCAPES}
    made.update(choices=choices, error=ESCAPES, status="failed")
    for table in (
        tables.runs_table([made], {Path("a\x1b[2J"): UserError(ESCAPES)}),
        end_of_run(made),
        tables.jobs_table([made]),
        tables.stages_table([(ESCAPES, made)]),
    ):
        assert not set(printed(table)) & set("\x1b\x07\x9b\u202e")
    for arguments in (["list", "runs"], ["train", f"model={ESCAPES}"], [ESCAPES], ["list", ESCAPES]):
        ended = lrk(*arguments)
        assert not set(ended.out + ended.err) & set("\x1b\x07\x9b\u202e") and "Traceback" not in ended.err


def test_names_of_plots_are_no_formulas(made, pictures):
    name = "$\\frac{$ a_b $x$\x1b"
    made.update(choices={**made.info["choices"], "task": name})
    labels = {"title": name, "rows": [name], "columns": [name], "label": name, "row_label": name}
    grid = {"values": [[1.0]], **labels}
    figures = [
        {"file": "map.png", "kind": "heatmap", **grid},
        {"file": "maps.png", "kind": "heatmaps", "panels": [{"title": name, "values": [[1.0]]}], **labels},
        {"file": "box.png", "kind": "box", **grid},
        {"file": "lines.png", "kind": "lines", **grid, "columns": [1.0]},
    ]
    made.write_json("figures.json", figures)
    assert [path.name for path in plots.draw(made)] == ["loss.png", *(entry["file"] for entry in figures)]


# ---------------------------------------------------------------------------------------------- the one reader


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deep|recursion"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), f"nested more than {MAX_DEPTH} levels"),
        ("{", "cannot be read as JSON"),
        ("9" * 5000, "cannot be read as JSON"),
        ("[]", r"it is \[\]; expected keys with values"),
        ('"' + "x" * 9999 + '"', r"it is 'x+ … x+' \(\d+ characters\); expected keys"),
    ],
    ids=["deep", "nested", "cut", "digits", "list", "long"],
)
def test_json_that_cannot_be_read(text, message):
    Path("a.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_json(Path("a.json"), dict[str, int])
    assert "a.json" in said(error) and len(said(error)) < 250


def test_only_regular_files_of_some_size_are_read(monkeypatch):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for name, message in (("pipe", "it is not a file"), ("folder", "it is not a file"), ("nowhere", "No such file")):
        with pytest.raises(UserError, match=message):
            read_json(Path(name))
    Path("a.json").write_text("[1, 2, 3]")
    monkeypatch.setitem(reader.MAX_BYTES, "JSON", 5)
    with pytest.raises(UserError, match=r"9 bytes \(at most 5 of JSON\)"):
        read_json(Path("a.json"))


#: Each line holds the one before nine times.
BOMB = "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "cannot be read as YAML"),
        ("a: 2020-99-99", "cannot be read as YAML"),
        ("a: 2020-01-01", "a is .*expected text, a number, true, false or null"),
        ("a: !!python/object/apply:os.mkdir [acted]", "cannot be read as YAML"),
        ("&a {a: *a}", "nested more than|cannot be read"),
        (BOMB, "it holds more than"),
    ],
    ids=["cut", "no date", "date", "object", "circle", "bomb"],
)  # fmt: skip
def test_yaml_that_cannot_be_read(text, message, monkeypatch):
    monkeypatch.setattr(reader, "MAX_VALUES", 100_000)
    Path("a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(Path("a.yaml"))
    assert "a.yaml" in said(error) and not Path("acted").exists()


def test_text_that_cannot_be_written_again_is_refused():
    for text, key in (('{"a": ["\\ud800"]}', r"a\[0\]"), ('{"\\udfff": 1}', "a key of it")):
        Path("a.json").write_text(text)
        with pytest.raises(UserError, match=rf"a\.json: {key} is '.ud\w+'; expected text of whole characters") as error:
            read_json(Path("a.json"))
        said(error)


@pytest.mark.parametrize("read", [read_jsonl, read_requests], ids=lambda read: read.__name__)
def test_rows_without_end_are_refused(read):
    with pytest.raises(UserError, match="'/dev/zero' cannot be read: it is not a file"):
        read(Path("/dev/zero"))


@pytest.mark.parametrize(
    "content, why",
    [
        (b"a: [", "cannot be read as YAML"),
        (b"# \xff\nname: lora", "cannot be read: 'utf-8'"),
        (b"- 1", "not a configuration; expected keys with values"),
        (b"defaults: [_lora]", "name: unknown value 'None'"),
    ],
)
def test_a_broken_configuration_file_leaves_lists_alone(lrk, content, why):
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/broken.yaml").write_bytes(content)
    assert lrk("list", "methods", "--config-dir", "mine").code == 0
    message = refused(lrk, "list", "methods", "broken", "--config-dir", "mine")
    assert "broken.yaml" in message and why in message
    assert "method" in one_line(lrk("train", "method=broken", "--config-dir", "mine", "--dry-run"))


def test_a_line_is_named_and_a_cut_one_left_out():
    Path("a.jsonl").write_text('{"step": 1}\n{"step": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: step is 'x'; expected a whole number"):
        read_json_lines(Path("a.jsonl"), dict[str, int])
    Path("a.jsonl").write_text('{"step": 1}\n{"st')
    assert read_json_lines(Path("a.jsonl"), dict[str, int]) == [{"step": 1}]


# ---------------------------------------------------------------------------------------- valid files, wrong content

RUN_JSON = {
    "[]": "it is []; expected keys with values",
    '"x"': "it is 'x'; expected keys with values",
    '{"stage": 3}': "stage is 3; expected one of train, import, score",
    '{"stage": "train"}': "status is missing; expected one of done",
}
for key, value, message in (
    ("stage", "../x", "stage is '../x'; expected one of train"),
    ("status", "dead", "status is 'dead'; expected one of done"),
    ("choices", {"model": 1}, "choices.model is 1; expected text"),
    ("seconds", "x", "seconds is 'x'; expected a finite number"),
    ("process", {"host": "h", "pid": "../1", "began": 1}, "process.pid is '../1'; expected a whole number, 0 or more"),
):
    RUN_JSON[json.dumps({"stage": "train", "status": "done", "config_hash": "", key: value})] = message


def test_broken_neighbours_leave_the_others_alone(made, lrk):
    neighbours = {made.path.with_name(f"broken{number}"): text for number, text in enumerate(RUN_JSON)}
    for folder, text in neighbours.items():
        folder.mkdir()
        (folder / "run.json").write_text(text)
    listed = lrk("list", "runs")
    assert listed.code == 0 and made.path.name in listed.out and "0.5000" in listed.out
    assert listed.out.count("run.json") == len(neighbours)
    for folder in neighbours:
        (line,) = (line for line in listed.out.splitlines() if folder.name in line)
        assert " broken " in line
    assert [run.path for run in scan("outputs")[0]] == [made.path] and {*scan("outputs")[1]} == {*neighbours}
    assert lrk("evaluate").code == 0
    compared = lrk("compare")
    said = " ".join(compared.out.split())
    assert compared.code == 0 and "Left out as broken" in said and "lora" in said
    for folder, text in neighbours.items():
        assert RUN_JSON[text] in refused(lrk, "evaluate", f"run={folder}")
        assert RUN_JSON[text] in refused(lrk, "train", "--resume", str(folder))


@pytest.mark.parametrize("text", ["[]", '{"test/accuracy": "high"}', '{"test/accuracy": [1]}', '{"a": true}'])
def test_broken_metrics_are_of_one_run(made, lrk, text):
    (made.path / "metrics.json").write_text(text)
    listed = lrk("list", "runs")
    assert listed.code == 0 and " broken " in listed.out and "metrics.json" in listed.out
    assert "1 broken" in refused(lrk, "compare")


CONFIGS = {
    "seed": ("0,1", "seed is '0,1'; expected a whole number"),
    "model": ([], "model is []; expected keys with values"),
    "task": ({}, "task.name is missing"),
    "hardware": (None, "hardware is null; expected keys with values"),
    "method": ({"name": "magic"}, "method.name: unknown value 'magic'"),
    "run": (3, "run is 3; expected text or null"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_wrong_sections_of_a_configuration(made, lrk, key):
    value, message = CONFIGS[key]
    reconfigure(made, **{key: value})
    assert f"config.yaml: {message}" in refused(lrk, "evaluate", f"run={made.path}")
    interrupted(made)
    assert "config.yaml: " in refused(lrk, "train", "--resume", str(made.path))


def test_missing_sections_of_a_configuration(made, lrk):
    saved = made.config()
    for key in ("seed", "model", "task", "method", "hardware"):
        config = {name: value for name, value in saved.items() if name != key}
        made.write_text("config.yaml", yaml.safe_dump(config))
        assert f"config.yaml: {key}" in refused(lrk, "evaluate", f"run={made.path}")
    made.write_text("config.yaml", yaml.safe_dump(saved))
    for group, key in (("method", "rnk"), ("model", "pth"), ("task", "tmplate"), ("hardware", "gpus")):
        reconfigure(made, **{**saved, group: {**saved[group], key: 1}})
        assert f"config.yaml: {group}: unknown value '{key}'" in refused(lrk, "evaluate", f"run={made.path}")


def test_an_altered_configuration_is_named(made, lrk):
    made.write_text("config.yaml", yaml.safe_dump({**made.config(), "seed": 5}))
    message = "config.yaml: it was altered after the run began"
    assert message in refused(lrk, "evaluate", f"run={made.path}")
    assert message in refused(lrk, "compare")
    interrupted(made)
    assert message in refused(lrk, "train", "--resume", str(made.path))


def test_runs_that_read_each_other_end_in_one_line(made, lrk):
    assert lrk("evaluate", f"run={made.path}").code == 0
    first, second = made, Run.open("outputs/latest")
    for run, below in ((first, first), (second, first)):
        reconfigure(
            run,
            run=str(below.path.absolute()),
            method=composition.compose("evaluate", ["method=none"]).resolved["method"],
        )
        with pytest.raises(UserError, match="reads itself, through its own run="):
            list(run.lineage())
    assert "reads itself" in refused(lrk, "check", "evaluate", f"run={first.path}")
    assert "reads itself" in refused(lrk, "compare")


METHODS = {
    "name": ("magic", "method.name: unknown value 'magic'"),
    "rank": ("x", "method.rank is 'x'; expected a whole number"),
    "alpha": (-1.0, "method.alpha: -1.0 must be above 0"),
    "rnk": (2, "method: unknown value 'rnk'; did you mean 'rank'"),
}  # fmt: skip


@pytest.mark.parametrize("key", METHODS)
def test_the_method_of_an_earlier_run(made, key):
    value, message = METHODS[key]
    reconfigure(made, method={**made.config()["method"], key: value})
    with pytest.raises(UserError) as error:
        method_of(made)
    assert f"config.yaml: {message}" in said(error)


# -------------------------------------------------------------------------------------------------- adapter folders


@pytest.fixture
def saved():
    """A model with an adapter, and the folder that it was saved in."""
    adapter, folder = adapted(), Path("adapter")
    folder.mkdir()
    save_load.save(adapter, folder, {"task": "a", "template_hash": "b"})
    return adapter, folder


def alter(folder: Path, **changes) -> None:
    proof = json.loads((folder / save_load.PROOF).read_text())
    (folder / save_load.PROOF).write_text(json.dumps(proof | changes))


PROOFS = {
    "fingerprint": (3, "fingerprint is 3; expected text"),
    "dtype": ("float99", "dtype is 'float99'; expected one of float32, bfloat16"),
    "ranks": ([], "ranks is []; expected keys with values or null"),
    "about": ("x", "about is 'x'; expected keys with values"),
    "files": ({"../x": "0" * 64}, "a key of files is '../x'; expected a plain name"),
    "model_type": (None, "model_type is null; expected text"),
}


@pytest.mark.parametrize("key", PROOFS)
def test_wrong_values_of_a_proof(saved, key):
    adapter, folder = saved
    value, message = PROOFS[key]
    alter(folder, **{key: value})
    with pytest.raises(UserError) as error:
        save_load.load(adapter, folder)
    assert said(error) == f"adapter/lrk.json: {message}" or said(error).startswith(f"adapter/lrk.json: {message}")


def test_what_a_proof_says_of_the_task(saved):
    _, folder = saved
    alter(folder, about={"task": "a"})
    with pytest.raises(UserError, match=r"lrk\.json: about\.template_hash is missing; expected text"):
        check_template(SimpleNamespace(parts={}), folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None}, "the tensor 'input_ids' is missing"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, r"is torch.int64 \(1, 3\); expected 16 token ids"),
        ({"input_ids": torch.full((1, 16), 9999)}, "input_ids holds tokens that the model lacks"),
        ({"input_ids": torch.full((1, 16), -1)}, "input_ids holds tokens that the model lacks"),
        ({"input_ids": torch.zeros(1, 16)}, "input_ids is torch.float32"),
        ({"logits": torch.zeros(2, 3)}, r"logits is torch.float32 \(2, 3\)"),
        ({"logits": torch.zeros(3)}, "the canary has 3 logits, and this model gives 64"),
        ({"logits": torch.zeros(64, dtype=torch.long)}, "logits is torch.int64"),
    ],
)  # fmt: skip
def test_canaries_of_the_wrong_kind(saved, change, message):
    adapter, folder = saved
    tensors = {
        key: value for key, value in (load_file(folder / save_load.CANARY) | change).items() if value is not None
    }
    save_file(tensors, folder / save_load.CANARY)
    files = json.loads((folder / save_load.PROOF).read_text())["files"]
    alter(folder, files=files | {save_load.CANARY: save_load.sha256(folder / save_load.CANARY)})
    with pytest.raises(UserError, match=message):
        save_load.load(adapter, folder)


PEFT = [
    ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a finite number"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x'; expected a finite number"),
    ({"alpha_pattern": [1]}, "alpha_pattern is a list (1); expected up to 4096 keys with values or null"),
    ({"alpha_pattern": {"(": 1}}, "a key of alpha_pattern is '('; expected a name of modules"),
    ({"alpha_pattern": {".*": "z"}}, "alpha_pattern..* is 'z'; expected a finite number"),
    ({"alpha_pattern": {"(a+)+": 1}}, "a key of alpha_pattern is '(a+)+'"),
    ({"alpha_pattern": {".*.*.*q": 1}}, "a key of alpha_pattern is '.*.*.*q'"),
    ({"alpha_pattern": {"q" * 300: 1}}, " characters); expected a name of modules"),
    ({"alpha_pattern": {f"layer{i}": i for i in range(50_000)}}, "expected up to 4096 keys with values"),
    ({"lora_alpha": 10**400}, "; expected a finite number"),
    ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern.q is inf; expected a finite number"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0; expected a whole number above 0"),
    ({"rank_pattern": {"q_proj": 3}}, "has rank 4, and adapter_config.json says 3"),
    ({"r": 5}, "has rank 4, and adapter_config.json says 5"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false or null"),
]


def foreign(saved, **changes) -> tuple:
    """An adapter as the PEFT library leaves it: no proof, no canary."""
    adapter, folder = saved
    other = Path("foreign")
    other.mkdir()
    shutil.copy(folder / save_load.WEIGHTS, other)
    config = json.loads((folder / save_load.CONFIG).read_text())
    (other / save_load.CONFIG).write_text(json.dumps(config | changes))
    return adapter.model, other


@pytest.mark.parametrize("change, message", PEFT, ids=lambda value: str(value)[:40])
def test_wrong_values_of_a_peft_folder(saved, change, message):
    model, folder = foreign(saved, **change)
    with pytest.raises(UserError) as error:
        tenant.read(model, "", folder)
    assert message in said(error) and "foreign" in said(error)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"model\.layers\.0\..*", r"layers.[01].self_attn.(q|k)_proj", r"^model.layers.\d.mlp.\w+"],
)
def test_patterns_that_name_modules_are_read(saved, pattern):
    model, folder = foreign(saved, alpha_pattern={pattern: 3}, rank_pattern={pattern: 4})
    plain = {place: b for place, (_, b) in tenant.read(model, "", foreign_plain(folder)).updates.items()}
    read = tenant.read(model, "", folder).updates
    assert any(not torch.equal(b, plain[place]) for place, (_, b) in read.items())


def foreign_plain(folder: Path) -> Path:
    other = folder.with_name("plain")
    shutil.copytree(folder, other)
    config = json.loads((other / save_load.CONFIG).read_text())
    (other / save_load.CONFIG).write_text(json.dumps(config | {"alpha_pattern": {}, "rank_pattern": {}}))
    return other


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def kept(made):
    """A checkpoint, and what loads it."""
    adapter = adapted()
    optimizer = torch.optim.AdamW(adapter.trained.values(), lr=0.1)
    adapter.model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    one = SimpleNamespace(is_main_process=True, process_index=0, gather_object=list)
    progress = {"step": 3, "best_step": 2, "best_loss": 0.5, "stale": 0, "seconds": 1.5, "tokens": 9, "pending": [0.25]}
    checkpoint.save(made, one, adapter, optimizer, SimpleNamespace(), progress)
    folder = checkpoint.newest(made)
    assert folder is not None and folder.name == "step-0000003"
    assert checkpoint.load(folder, one, adapter, optimizer, SimpleNamespace()) == progress
    return made, folder, lambda: checkpoint.load(checkpoint.newest(made), one, adapter, optimizer, SimpleNamespace())


def rewrite(folder: Path, **changes) -> None:
    """Change state.json with a hash that is right."""
    record = json.loads((folder / "state.json").read_text()) | changes
    del record["sha256"]
    (folder / "state.json").write_text(json.dumps({**record, "sha256": checkpoint.record_hash(record)}))


def test_the_state_of_a_checkpoint_is_hashed(kept):
    _, folder, load = kept
    file = folder / "state.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"step": 2}))
    with pytest.raises(UserError, match=r"state\.json was altered \(its SHA-256 is not"):
        load()
    del record["sha256"]  # as checkpoints were before
    file.write_text(json.dumps(record))
    assert load()["step"] == 3


def test_a_checkpoint_without_its_state_is_an_error(kept):
    _, folder, load = kept
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json' cannot be read: No such file"):
        load()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": "x"}, "step is 'x'; expected a whole number"),
        ({"ranks": []}, "ranks is []; expected keys with values"),
        ({"files": {}}, "files is {}; expected the hashes of trained, optimizer, method, rng"),
        ({"pending": 3}, "pending is 3; expected a list"),
        ({"ranks": {"nowhere": 3}}, "has 'nowhere', which this method does not make"),
    ],
    ids=str,
)
def test_wrong_values_of_a_state(kept, changes, message):
    _, folder, load = kept
    rewrite(folder, **changes)
    with pytest.raises(UserError) as error:
        load()
    assert message in said(error)


@pytest.mark.parametrize("name", checkpoint.GROUPS)
def test_files_of_a_checkpoint_of_the_wrong_kind(kept, name):
    _, folder, load = kept
    file = folder / f"{name}.safetensors"
    files = json.loads((folder / "state.json").read_text())["files"]
    if name != "method":  # a method that keeps nothing reads nothing
        save_file({"0.cpu": torch.zeros(3), "9.x": torch.zeros(2)}, file)
        rewrite(folder, files=files | {file.name: save_load.sha256(file)})
        with pytest.raises(UserError, match=str(folder)):
            load()
        file.write_text("no tensors")
        rewrite(folder, files=files | {file.name: save_load.sha256(file)})
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            load()
    file.unlink()
    with pytest.raises(UserError, match=f"{name}.safetensors is missing"):
        load()


@pytest.mark.parametrize("line", ["[]", '{"step": "x"}', '{"train/loss": 1}', '{"step": 1, "train/loss": "low"}', "{"])
def test_lines_of_a_history(made, line):
    (made.path / "history.jsonl").write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"history\.jsonl, line 1"):
        made.rewind(1)


def test_a_fingerprint_is_still_asked_for(saved):
    adapter, folder = saved
    assert tenant.read(adapter.model, fingerprint(adapter.model), foreign(saved)[1]).canary is None
    with pytest.raises(UserError, match="belongs to another model"):
        tenant.read(adapter.model, "other", folder)
