"""Composition: what is found where, typed values, the run that evaluate reads, and every mistake as one line."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import yaml
from command import reconfigure

from lowrank_cli import config, methods, schema
from lowrank_cli.config import folders
from lowrank_cli.config.keys import comments, method_keys
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, provenance


def refused(overrides, verb="train", **more) -> str:
    with pytest.raises(UserError) as caught:
        config.compose(verb, overrides, **more)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def trained(overrides=(), finish=True) -> Run:
    """A finished training run, without the training."""
    composed = config.compose("train", list(overrides))
    run = Run.create(
        composed.config.outputs,
        stage="train",
        config=composed.resolved,
        choices=composed.choices,
        overrides=composed.overrides,
        command="",
    )
    if finish:
        run.finish({"test/accuracy": 0.5})
    return run


# ------------------------------------------------------------------------------------------- what is composed


def test_defaults_train_milora_on_the_bundled_model():
    composed = config.compose("train", [])
    assert composed.choices == {"model": "llama", "task": "tiny_yesno", "hardware": "cpu", "method": "milora"}
    assert isinstance(composed.config, schema.TrainRun)
    assert isinstance(composed.config.method, methods.config_classes()["milora"])
    assert (composed.config.seed, composed.config.outputs, composed.config.name) == (0, "outputs", None)


def test_values_are_typed_and_lists_are_lists():
    overrides = [
        "train.learning_rate=1e-4",
        "train.max_steps=null",
        "method.target_modules=[Q,V]",
        "method.k=2",
        "seed=7",
    ]
    composed = config.compose("train", [*overrides, "method.alpha=4"])
    assert composed.config.train.learning_rate == 1e-4 and composed.config.train.max_steps is None
    assert composed.config.method.target_modules == ["Q", "V"] and composed.config.method.alpha == 4.0
    assert composed.resolved["method"]["target_modules"] == ["Q", "V"] and composed.resolved["seed"] == 7
    assert composed.overrides == [*overrides, "method.alpha=4"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=hub", "model.id=org/Phi-2"], "Phi-2"),
        (["model=hub", "model.path=models/own"], "own"),
        (["model=hub", "model.gguf=some/small.Q4_0.gguf"], "small.Q4_0"),
        (["model=hub", "model.gguf=held"], "only.Q8_0"),
        (["model=hub", "model.id=org/Phi-2", "model.name=mine"], "mine"),
        (["model=llama", "model.path=models/own"], "own"),
        (["model=gpt2", "model.path=models/own"], "gpt2"),  # its weights, from a folder
        (["model=gpt2", "model.id=org/other"], "other"),
        (["model=llama"], "llama"),
        (["model=./held"], "held"),
        (["model=held/only.Q8_0.gguf"], "only.Q8_0"),
        (["model=org/Phi-2"], "Phi-2"),
        (["model=org/Phi-2", "model.name=mine"], "mine"),
    ],
)
def test_a_model_is_named_by_its_weights(overrides, name, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "only.Q8_0.gguf").touch()
    assert config.compose("train", overrides).config.model.name == name


def test_a_model_without_weights_and_one_with_two_kinds_are_one_line():
    assert refused(["model=hub"]) == (
        "model: nothing to load; set model.id (Hub), model.path (folder) or model.gguf (file)"
    )
    assert refused(["model=hub", "model.path=a", "model.gguf=b"]).endswith("both name the weights; give one")
    assert "holds causal models" in refused(["model=minilm", "model.gguf=b", "task=tiny_sentiment"])


@pytest.mark.parametrize("spelling", [["model=hub", "model.id=org/Phi-2"], ["model=org/Phi-2"]], ids=["key", "group"])
def test_a_run_is_named_by_its_model(spelling):
    run = trained([*spelling, "method=lora"])
    assert run.path.name.endswith("-lora-Phi-2-tiny_yesno") and run.info["model"] == "Phi-2"
    assert config.compose("evaluate", [f"run={run.path}"]).config.model.name == "Phi-2"
    trained(["model=org/Other", "method=lora"])
    assert config.compose("evaluate", ["model=org/Phi-2"]).config.run == os.path.abspath(run.path)
    assert refused(["model=org/Third"], "evaluate") == (
        "run: no finished run of model=hub under 'outputs'; start one with: lrk train model=hub model.id=org/Third"
    )
    assert "was made with 'org/Phi-2', not 'org/Other'" in refused([f"run={run.path}", "model=org/Other"], "evaluate")


def test_a_model_of_no_such_name_folder_or_repository_is_one_line():
    assert refused(["model=./nowhere"]) == "model: there is no folder './nowhere', and no model of that name"
    assert refused(["model=lama"]).endswith("vit_base, or a folder, a .gguf file or ORG/NAME)")
    Path("llama").mkdir()
    assert config.compose("train", ["model=llama"]).config.model.bundled, "a file of the group comes first"
    Path("a b, c").mkdir()
    model = config.compose("train", ["model='a b, c'"]).config.model
    assert (model.name, model.path) == ("a b, c", os.path.abspath("a b, c"))


def test_the_configuration_of_a_run_comes_back_from_its_folder():
    run = trained(["method=lora", "task.limit=5", "train.warmup=0.1"])
    before = config.compose("train", ["method=lora", "task.limit=5", "train.warmup=0.1"])
    assert dataclasses.asdict(config.restore(run)) == dataclasses.asdict(before)


@pytest.mark.parametrize("value", ["my data", "a(b),c", "it's", "a=b", "é", "back\\slash", "end\\", "[x]", "{y}"])
def test_a_path_may_hold_any_character(value):
    composed = config.compose("train", [f"task.path={value}", f"outputs={value}"])
    assert composed.config.outputs == value
    assert composed.config.task.path == os.path.abspath(value)


def test_a_path_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert config.compose("train", ["model.path=~/models"]).config.model.path == "/home/someone/models"
    assert config.compose("train", ["model.path=null"]).config.model.path is None


@pytest.mark.parametrize("spelling", ["data", "./data", "data/", "'data'", "other/../data", "{here}/data"])
def test_a_folder_that_is_read_is_saved_in_one_spelling(spelling):
    here = os.getcwd()
    plain = config.compose("train", [f"task.path={here}/data"])
    composed = config.compose("train", [f"task.path={spelling.replace('{here}', here)}"])
    assert composed.resolved == plain.resolved and composed.inputs == {"task.path": f"{here}/data"}


def test_a_folder_named_in_the_users_file_is_saved_absolute():
    Path("mine/task").mkdir(parents=True)
    text = (folders.conf_folder() / "task" / "sst2.yaml").read_text()
    Path("mine/task/own.yaml").write_text(f"{text}path: data\n")
    assert config.compose("train", ["task=own"], "mine").config.task.path == os.path.abspath("data")


# --------------------------------------------------------------------------------------------- where it lies


def test_the_users_folder_comes_first():
    Path("mine/method").mkdir(parents=True)
    text = "# Mine\ndefaults: [_lora]\nname: lora\nrank: 2\nalpha: 4\ndropout: 0\ntarget_modules: [Q]\n"
    Path("mine/method/lora.yaml").write_text(text)
    Path("mine/method/small.yaml").write_text(text)
    for choice in ("lora", "small"):
        composed = config.compose("train", [f"method={choice}"], "mine")
        assert composed.config.method.rank == 2 and composed.choices["method"] == choice
    Path("mine/method/small.yaml").write_text(text.replace("rank: 2", "rank: 12"))
    assert config.compose("train", ["method=small"], "mine").config.method.rank == 12
    assert config.compose("train", ["method=milora"], "mine").config.method.name == "milora"
    assert config.compose("train", ["method=lora"]).config.method.rank != 2
    assert "no folder 'yours'" in refused([], config_dir="yours")


def test_an_installed_wheel_brings_its_own_conf(monkeypatch, tmp_path):
    shutil.copytree(folders.conf_folder(), tmp_path / "site" / "lowrank_cli" / "conf")
    shutil.copytree(folders.conf_folder(), tmp_path / "site" / "conf")  # another package's
    monkeypatch.setattr(folders.runs, "ROOT", tmp_path / "site")
    assert folders.conf_folder() == tmp_path / "site" / "lowrank_cli" / "conf"
    assert config.compose("train", []).choices["method"] == "milora"


def test_a_checkout_is_used_where_it_lies():
    assert folders.conf_folder() == provenance.ROOT / "conf"


# ------------------------------------------------------------------------------------------------- mistakes

METHODS = ", ".join(methods.names())
MISTAKES = {
    "method=milra": "method: unknown value 'milra'; did you mean 'milora'? (allowed: " + METHODS,
    "model=lama": "model: unknown value 'lama'; did you mean 'llama'? (allowed:",
    "task=tiny_yesn": "task: unknown value 'tiny_yesn'; did you mean 'tiny_yesno'? (allowed:",
    "hardware=gpus": "hardware: unknown value 'gpus'; did you mean 'gpu'? (allowed: cpu, ddp, fsdp, gpu, gpu_4bit)",
    "train.lerning_rate=1": "train.lerning_rate: unknown key; did you mean 'train.learning_rate'?",
    "lerning_rate=1": "lerning_rate: unknown key; did you mean 'train.learning_rate'?",
    "rank=8": "rank: unknown key; did you mean 'method.rank'?",
    "method.rnk=8": "method.rnk: unknown key; did you mean 'method.rank'? (method has: name, rank,",
    "metod=lora": "metod: unknown key; did you mean 'method'?",
    "a.b.c=1": "a.b.c: unknown key",
    "method.rank=abc": "method.rank: 'abc' is not a whole number",
    "method.rank=1.5": "method.rank: '1.5' is not a whole number",
    "train.learning_rate=fast": "train.learning_rate: 'fast' is not a number",
    "train.max_steps=": "train.max_steps: '' is not a whole number or null",
    "model.bundled=maybe": "model.bundled: 'maybe' is not true or false",
    "method.target_modules=Q": "method.target_modules: 'Q' is not a list; write method.target_modules=[Q]",
    "method.target_modules={a: 1}": "method.target_modules: '{a: 1}' is not a list; write method.target_modules=[",
    "method.rank=true": "method.rank: 'true' is not a whole number",
    "method.rank=[1,2]": "method.rank: '[1,2]' is not a whole number",
    "method.gate=[scaled]": "method.gate: '[scaled]' is not text",
    "task.hub=[a]": "task.hub: '[a]' is not text or null",
    "run.name=x": "run.name: unknown key; did you mean 'name'?",
    "seed.value=1": "seed.value: unknown key",
    "task.limit=ten": "task.limit: 'ten' is not a whole number or null",
    "task.parts=[a]": "task.parts: '[a]' cannot replace a whole section; give task.parts.KEY=VALUE",
    "task.parts={a: 3}": "task.parts.a: unknown key",
    "train={lr: 3}": "train.lr: unknown key; did you mean 'train.learning_rate'? (train has: learning_rate,",
    "hardware={x: 1}": "hardware.x: unknown key (hardware has: name, device,",
    "hardware.quantization=nf5": "hardware.quantization: unknown value 'nf5'; did you mean 'nf4'? (allowed: null, nf4)",
    "hardware.quantization=nf4": "hardware.quantization: nf4 is for hardware.device=cuda and hardware.precision=bf16",
    "hardware.grouped=triton": "hardware.grouped: triton is for hardware.device=cuda, not cpu; set torch",
    "train.learning_rate=true": "train.learning_rate: 'true' is not a number",
    "train.learning_rate=inf": "train.learning_rate: inf is out of range (allowed: a finite number, at least 0)",
    "outputs=": "outputs: no folder is named; write outputs=FOLDER",
    "run=": "run: no folder is named; write run=FOLDER",
    "train=5": "train: '5' cannot replace a whole section",
    "seed=null": "seed: null is not allowed",
    "seed=-1": "seed: -1 is out of range (allowed: 0 to 4294967295)",
    "method.rank=0": "method.rank: 0 is out of range (allowed: at least 1)",
    "method.k=0": "method.k: 0 is out of range",
    "method.k=8": "method.k: 8 is out of range",
    "train.warmup=2": "train.warmup: 2.0 is out of range (allowed: 0 to 1)",
    "train.epochs=nan": "train.epochs: nan is out of range",
    "task.metric=acuracy": "task.metric: unknown value 'acuracy'; did you mean 'accuracy'?",
    "milora": "'milora' is not an override; did you mean 'method=milora'? (write KEY=VALUE)",
    "=3": "'=3' is not an override (write KEY=VALUE)",
    "a b": "'a b' is not an override (write KEY=VALUE)",
    "task.template=(x": "task.template: cannot read (x; quote a value with special characters",
    "seed=1,2": "seed=1,2: several values; sweep over them with -m",
    "seed=range(3)": "seed=range(3): several values; sweep over them with -m",
    "+train.extra=1": "+train.extra=1: keys can be neither added nor removed",
    "~method": "~method: keys can be neither added nor removed",
    "method=null": "method: choose one of " + METHODS,
    "method@other=lora": "method@other: a group goes to its own section; write method=NAME",
    "hydra/launcher=joblib": (
        "hydra/launcher=joblib: hydra/launcher and hydra.launcher.* belong to a sweep (-m) or a study"
    ),
    "name=a/b": "name: 'a/b' cannot be part of a folder's name",
    "name=..": "name: '..' cannot be part of a folder's name",
    "method.layers=[1]": "method.layers: unknown key; it is a key of method=fanlora",
    "seed=" + "1" * 5000: "seed: '" + "1" * 60 + "…" + "1" * 20 + "' has too many digits (allowed: at most 4300)",
    "method.name=lora": "method.name: 'lora' does not go with the keys of milora (allowed: milora, or",
    "method.name=foo": "method.name: unknown value 'foo' (allowed: " + METHODS,
    "train.epochs=0": "train.epochs: 0.0 is out of range (allowed: above 0)",
    "evaluate.split=dev": "evaluate.split: unknown key",
    "task.label_words=[yes,Yes]": "task.label_words: ['yes', 'Yes'] names a label twice",
    "task.label_values=[a,a]": "task.label_values: ['a', 'a'] names a label twice",
    "task.label_words=['',no]": "task.label_words: ['', 'no'] holds an empty word",
    "task.template=hello": "task.template: 'hello' names no {column}, so every prompt would be the same",
    "recipe=milora": "recipe=milora: lrk train has no recipes; write: lrk run recipe=milora",
    "hardware=[nan]": "hardware=[nan]: cannot be composed; choose one of cpu, ddp, fsdp, ",
    "method=[1]": "method=[1]: cannot be composed; choose one of " + METHODS,
    "task={}": "task: {} sets nothing; write task.KEY=VALUE",
    "outputs@z=[a,b]": "outputs@z: a group goes to its own section; write outputs=NAME",
    "run@z={a:1}": "run@z: a group goes to its own section; write run=NAME",
    "hardware.compile=str(3)": "hardware.compile: '3' is not true or false",
    "hardware.compile=3": "hardware.compile: '3' is not true or false",
    "seed=18446744073709551616": "seed: 18446744073709551616 is out of range",
    "method.rank=18446744073709551616": "method.rank: 18446744073709551616 is out of range",
    "name=" + "x" * 101: "name: '" + "x" * 101 + "' is longer than 100 bytes",
    "method=" + "x" * 5000: "method: unknown value '" + "x" * 60 + "…" + "x" * 20 + "' (allowed: " + METHODS,
}


@pytest.mark.parametrize("override", ["method.ranks=4", "method.ranks=[4]", "method.ranks={Q: 4}", "method.ranks.Q=4"])
def test_a_mapping_that_a_file_gives_names_the_key_of_the_file(override):
    key, _, value = override.partition("=")
    expected = f"{key}: '{value}' cannot be set by itself; give a file: method.rank_pattern=FILE (JSON, module: rank: "
    assert refused(["method=lora", override]).startswith(expected)


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override):
    message = refused([override])
    assert message.startswith(MISTAKES[override]), message


FILES = {
    "defaults: [_lora]\nname: lora\nrnk: 3\n": "line 3: method.rnk: unknown key; did you mean 'method.rank'?",
    "defaults: [_lora]\nname: lora\nrank: abc\n": "line 3: method.rank: 'abc' is not a whole number",
    "defaults: [_lora]\nname: [lora\nrank: 3\n": "line 3: expected ',' or ']'",
    "name: lora\nrank: 3\n": "method: the file needs a schema: 'defaults: [_lora]'",
    "": "method: the file needs a schema",
    "- a\n": "method: the file needs a schema",
    "defaults: [_lra]\nname: lora\n": "method/mine.yaml, defaults: unknown value '_lra'; did you mean '_lora'?",
    "defaults: [_lora]\nrank: 3\n": "method.alpha, method.dropout, method.name, method.target_modules: missing",
    "defaults: [_lora]\nname: ${nothing}\n": "method.",
    "defaults: [_lora]\nname: milora\nrank: 3\nalpha: 1\ndropout: 0\ntarget_modules: [Q]\n": "method.name: 'milora'",
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_the_users_file_names_it(text):
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/mine.yaml").write_text(text)
    message = refused(["method=mine"], config_dir="mine")
    assert FILES[text] in message
    if "line" in FILES[text]:
        assert message.startswith(str(Path("mine/method/mine.yaml").resolve()))


def test_run_needs_a_recipe():
    assert refused([], "run").startswith("recipe: missing; choose one of ")
    assert refused(["recipe=milra"], "run").startswith("recipe: unknown value 'milra'; did you mean 'milora'?")


# ------------------------------------------------------------------------------------ the run evaluate reads


def test_evaluate_takes_groups_and_values_from_the_newest_run():
    trained(["method=lora"])
    run = trained(["method=lora", "method.rank=3", "task=tiny_choice", "task.limit=9", "model.path=x", "seed=5"])
    composed = config.compose("evaluate", ["task.limit=4", "evaluate.num_beams=2"])
    used = composed.config
    assert (used.method.rank, used.task.name, used.task.limit, used.model.path) == (
        3,
        "tiny_choice",
        4,
        os.path.abspath("x"),
    )
    assert (used.run, used.evaluate.num_beams, used.seed) == (str(run.path.absolute()), 2, 5)
    assert composed.choices == {**run.info["choices"]}
    assert "_from_run" not in yaml.safe_dump(composed.resolved)


def test_evaluate_finds_the_run_of_a_method():
    lora = trained(["method=lora", "method.rank=3"])
    trained([])
    used = config.compose("evaluate", ["method=lora"]).config
    assert used.run == str(lora.path.absolute()) and used.method.rank == 3
    assert "start one with: lrk train method=full" in refused(["method=full"], "evaluate")


def test_evaluate_asks_as_the_run_did_on_its_own_task():
    run = trained(["task=tiny_arithmetic", "evaluate.shots=8", "evaluate.num_beams=3"])
    used = config.compose("evaluate", []).config.evaluate
    assert (used.shots, used.num_beams) == (8, 3)
    used = config.compose("evaluate", [f"run={run.path}", "evaluate.shots=2"]).config.evaluate
    assert (used.shots, used.num_beams) == (2, 3)
    used = config.compose("evaluate", [f"run={run.path}", "task=tiny_yesno"]).config.evaluate
    assert (used.shots, used.num_beams) == (0, 1)


def test_a_job_below_latest_is_saved_by_its_own_name():
    run = trained()
    (run.path / "01-train").mkdir()
    for file in ("run.json", "config.yaml", "metrics.json"):
        shutil.copy(run.path / file, run.path / "01-train" / file)
    used = config.compose("evaluate", ["run=outputs/latest/01-train", "model.path=outputs/latest"]).config
    assert (used.run, used.model.path) == (str(run.path.absolute() / "01-train"), str(run.path.absolute()))


def test_statistics_are_found_by_their_task():
    topic = trained(["method=idaicl", "task=tiny_topic"])
    trained(["method=idaicl", "task=tiny_sentiment"])
    found = config.compose("evaluate", ["method=idaicl", "task=tiny_topic"]).config
    assert found.run == str(topic.path.absolute())
    assert "lrk train method=idaicl task=cb" in refused(["method=idaicl", "task=cb"], "evaluate")


def test_what_a_run_keeps_was_made_with():
    run = trained(["method=lora"])
    message = refused([f"run={run.path}", "method.rank=4"], "evaluate")
    assert message.startswith(f"method.rank: 4, but '{run.path}' was made with 8; leave it out, or make another")
    assert message.endswith("lrk train method=lora task=tiny_yesno method.rank=4")
    message = refused([f"run={run.path}", "model=gpt2"], "evaluate")
    assert message.startswith(f"model: '{run.path}' was made with 'llama', not 'gpt2'; leave model out")
    folder = config.compose("evaluate", [f"run={run.path}", "model=gpt2", "model.path=x"]).config
    assert folder.model.name == "gpt2"
    fitted = trained(["method=idaicl", "task=sst2", "method.templates=2"])
    config.compose("evaluate", [f"run={fitted.path}", "method.templates=1"])
    message = refused([f"run={fitted.path}", "method.templates=3"], "evaluate")
    assert message.endswith("lrk train method=idaicl task=sst2 method.templates=3")


def test_switching_a_group_replaces_its_values():
    run = trained(["task=tiny_choice", "task.limit=9"])
    used = config.compose("evaluate", [f"run={run.path}", "task=tiny_yesno"]).config
    assert (used.task.name, used.task.limit) == ("tiny_yesno", None)
    used = config.compose("evaluate", [f"run={run.path}", "task=tiny_choice"]).config
    assert (used.task.name, used.task.limit) == ("tiny_choice", 9)


def test_a_run_in_the_users_words():
    path = Path("my outputs (old), 2")
    run = trained([f"outputs={path}"])
    assert config.compose("evaluate", [f"run={run.path}"]).config.run == str(run.path.absolute())
    assert config.compose("evaluate", [f"outputs={path}"]).config.run == str(run.path.absolute())


def test_the_frozen_model_needs_no_run():
    composed = config.compose("evaluate", ["method=none", "task=tiny_choice"])
    assert composed.config.run is None and composed.choices["task"] == "tiny_choice"
    assert "never trained" in refused(["method=none", "run=x"], "evaluate")


def test_what_is_no_training_run_is_refused():
    assert "no finished run under 'outputs'" in refused([], "evaluate")
    assert "no folder 'nowhere'" in refused(["run=nowhere"], "evaluate")
    assert "unknown value 'milra'" in refused(["method=milra"], "evaluate")
    unfinished = trained(finish=False)
    assert "not finished" in refused([f"run={unfinished.path}"], "evaluate")
    unfinished.finish({})
    assert "was trained with 'milora', not 'lora'" in refused([f"run={unfinished.path}", "method=lora"], "evaluate")
    assert "unknown key; did you mean 'method.rank'" in refused(["method.rnk=2"], "evaluate")
    saved = unfinished.config()["method"]
    reconfigure(unfinished, method={**saved, "rank": "x"})
    assert "config.yaml: method.rank is 'x'; expected a whole number" in refused([], "evaluate")


# ---------------------------------------------------------------------------------------------------- sweeps


def test_sweeps_expand_in_the_order_given():
    jobs = config.expand("train", ["method=lora,milora", "seed=range(2)", "task.limit=4"])
    assert jobs[0] == ["method=lora", "seed=0", "task.limit=4"]
    assert [job[:2] for job in jobs[1:]] == [[m, s] for m, s in [
        ("method=lora", "seed=1"), ("method=milora", "seed=0"), ("method=milora", "seed=1")]]  # fmt: skip
    assert len(config.expand("train", ["task=glob(tiny_*)"])) == len([t for t in folders.files("task") if "tiny_" in t])


def test_quoting_survives_hydras_parser():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for value in ["a", "it's", "\\", "\\'", "a\\\\'b\\", "'", "x, y"]:
        parsed = OverridesParser.create().parse_override(f"key={schema.quoted(value)}")
        assert parsed.value() == value


class Commented:
    """A field: of no meaning."""

    #: ``one``;
    #: and more
    first: int = 1
    second: int = 2  #: two or three
    third: int = 3


@pytest.mark.parametrize("name", methods.names())
def test_every_key_of_a_method_is_explained(name):
    rows = method_keys(name, None)
    assert [key for key, _, meaning in rows if not meaning] == []


def test_a_comment_is_found_above_a_field_and_behind_it():
    assert comments(Commented) == {"first": "one; and more", "second": "two or three"}
