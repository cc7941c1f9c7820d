"""Recipes: every shipped one is planned, overrides reach the stages that know them, a failure is continued."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from command import one_line, runs

from lowrank_cli.config.composition import compose, restore
from lowrank_cli.config.folders import description, files
from lowrank_cli.errors import UserError
from lowrank_cli.launch import recipe, single_run, stage, sweep
from lowrank_cli.runs import Run, this_process
from lowrank_cli.runs.process import began

pytestmark = pytest.mark.usefixtures("fake_stages")
SHORT = ("train.max_steps=3", "train.warmup=0.1")


def write(text: str, name: str = "mine") -> tuple[str, str, str]:
    """A recipe of the user's, and the arguments that name it."""
    Path("conf/recipe").mkdir(parents=True, exist_ok=True)
    Path(f"conf/recipe/{name}.yaml").write_text(f"defaults: [_recipe]\nname: {name}\nstages:\n{text}")
    return "--config-dir", "conf", f"recipe={name}"


TWO = """
  - {name: small, stage: train, overrides: [method=lora, method.rank=2, task=tiny_choice, task.limit=9]}
  - {name: base, stage: evaluate, overrides: [method=none]}
  - {name: again, stage: evaluate, overrides: ["run={small}", evaluate.split=dev, task.limit=3]}
"""


def saved(path: Path, folder: str) -> dict:
    return yaml.safe_load((path / folder / "config.yaml").read_text())


def ledger(path: Path) -> dict[str, str]:
    return {item["name"]: item["status"] for item in json.loads((path / "recipe.json").read_text())["stages"]}


@pytest.mark.parametrize("name", files("recipe"))
def test_every_shipped_recipe_can_be_planned(name):
    composed, planned = recipe.plan("run", [f"recipe={name}"], None)
    assert composed.config.recipe.name == name and planned
    assert len(description(files("recipe")[name])) > 10


def test_the_papers_settings():
    (_, train), (_, test) = recipe.plan("run", ["recipe=milora_llama2_7b"], None)[1]
    used = train.config
    assert (used.model.name, used.method.rank, used.method.k, used.method.load_balance) == ("llama2_7b", 32, 3, 1e-2)
    assert used.method.bilevel and used.method.activation_learning_rate == 1e-6
    assert (used.train.learning_rate, used.train.warmup, used.train.epochs, used.train.max_steps) == (
        1e-4,
        0.06,
        10,
        None,
    )
    assert (used.train.eval_every, used.train.patience, used.task.max_length) == (200, 10, 768)
    assert test.config.evaluate.num_beams == 1 and test.config.task.max_length == 768  # BoolQ's answers are scored
    _, generated = recipe.plan("run", ["recipe=milora_llama2_7b", "task=gsm8k", "evaluate.num_beams=3"], None)
    assert dict(generated)["test"].config.evaluate.num_beams == 3


def advertised():
    """Every command in the heading of a shipped recipe that changes it, without what is said of it."""
    for path in files("recipe").values():
        for line in Path(path).read_text().splitlines():
            if found := re.match(r"#\s+lrk run (?!-m)(\S+ \S.*?)(?:\s{2,}|$)", line):
                yield found[1]


@pytest.mark.parametrize("command", list(advertised()))
def test_what_the_heading_of_a_recipe_suggests_can_be_planned(command):
    assert recipe.plan("run", command.split(), None)[1]


def test_a_methods_key_goes_to_the_stages_of_methods_that_have_it():
    planned = dict(recipe.plan("run", ["recipe=alora", "method.score=sensitivity", "method.rank=2"], None)[1])
    assert planned["train"].config.method.score == "sensitivity"
    assert planned["train"].config.method.rank == planned["lora"].config.method.rank == 2


def test_a_methods_key_overrides_what_later_stages_set_themselves():
    _, planned = recipe.plan("run", ["recipe=idaicl_gpt2_large", "method.templates=15", "method.draws=1"], None)
    methods = {name: composed.config.method for name, composed in planned}
    assert {(method.templates, method.draws) for method in methods.values()} == {(15, 1)}
    assert methods["idaicl"].calibration == "ida" and methods["conca"].calibration == "conca"


def test_beams_of_the_shipped_recipe_want_generated_answers():
    (_, train), (_, test) = recipe.plan("run", ["recipe=milora"], None)[1]
    assert (train.config.task.answer, test.config.evaluate.num_beams) == ("free", 3)
    with pytest.raises(UserError, match=r"stage 'test': evaluate\.num_beams: 3 beams .* set evaluate\.num_beams=1"):
        recipe.plan("run", ["recipe=milora", "task=tiny_choice"], None)
    recipe.plan("run", ["recipe=milora", "task=tiny_choice", "evaluate.num_beams=1"], None)


def test_stages_run_in_a_row(lrk):
    ended = lrk("run", *write(TWO), *SHORT, "name=x")
    assert ended.code == 0, ended.err
    (path,) = runs()
    assert path.name.endswith("-recipe-mine-x") and ledger(path) == dict.fromkeys(["small", "base", "again"], "done")
    small, base, again = (saved(path, folder) for folder in ("01-small", "02-base", "03-again"))
    assert (small["method"]["rank"], small["task"]["limit"], small["train"]["max_steps"]) == (2, 9, 3)
    assert (base["method"]["name"], base["run"], base["task"]["name"]) == ("none", None, "tiny_yesno")
    assert again["run"] == str((path / "01-small").absolute())
    assert (again["method"]["rank"], again["task"]["name"], again["task"]["limit"]) == (2, "tiny_choice", 3)
    assert json.loads((path / "metrics.json").read_text())["dev/accuracy"] == 0.5
    assert json.loads((path / "run.json").read_text())["status"] == "done"
    assert all(name in ended.out for name in ("small", "base", "again"))
    assert f"{path}\n" in ended.out and ended.out.endswith(f"  next: lrk compare {path}\n")
    assert "train.max_steps=3" in saved(path, ".")["recipe"]["stages"][0]["overrides"]
    assert (path / "01-small" / "plots" / "loss.png").is_file()


FOUR = """
  - {name: large, stage: train, overrides: [method=lora, method.rank=4]}
  - {name: worth, stage: score, overrides: ["run={large}"]}
  - {name: small, stage: prune, overrides: ["run={worth}", prune.drop=4]}
  - {name: again, stage: evaluate, overrides: ["run={small}"]}
"""


def test_a_stage_uses_the_adapter_of_the_closest_stage_that_left_one(lrk):
    """What pruning reads is a scoring; what it takes ranks out of is the trained adapter."""
    planned = recipe.plan("run", list(write(FOUR)[2:]), "conf")[1]
    assert [stage.adapter_run for _, stage in planned] == [None] * 4, "they do not exist yet"
    assert lrk("run", *write(FOUR), *SHORT).code == 0
    (path,) = runs()
    stages = [Run.open(path / name) for name in ("01-large", "02-worth", "03-small", "04-again")]
    used = [restore(stage).adapter_run for stage in stages]
    assert [run and run.name for run in used] == [None, "01-large", "01-large", "03-small"]
    assert compose("prune", [f"run={stages[1].path}", "prune.drop=4"]).adapter_run == used[2]
    assert compose("train", [f"run={stages[2].path}"]).adapter_run == compose("evaluate", []).adapter_run == used[3]


def test_overrides_reach_the_stages_that_know_them(lrk):
    lrk("run", *write(TWO), *SHORT, "task=tiny_sentiment", "seed=4", "evaluate.batch_size=2")
    small, base, again = (saved(runs()[0], folder) for folder in ("01-small", "02-base", "03-again"))
    assert {part["seed"] for part in (small, base, again)} == {4}
    assert {part["task"]["name"] for part in (small, base, again)} == {"tiny_sentiment"}
    assert {part["evaluate"]["batch_size"] for part in (small, base, again)} == {2}


def test_a_failure_is_continued_from_the_first_unfinished_stage(lrk):
    ended = lrk("run", "recipe=milora", *SHORT, "train.learning_rate=2")
    (path,) = runs()
    assert (ended.code, ended.err) == (1, "error: train/loss is nan at step 2\n")
    assert ledger(path) == {"train": "failed", "test": "pending"} and not (path / "02-test").exists()
    Path("mended").touch()
    assert lrk("run", "--resume", str(path)).code == 0
    assert ledger(path) == {"train": "done", "test": "done"}
    rows = [json.loads(line) for line in (path / "01-train" / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["resumed"]) for row in rows] == [(1, False), (2, True), (3, True)]
    assert "is finished" in lrk("run", "--resume", str(path)).err


def test_finished_stages_are_not_repeated(lrk):
    text = TWO + "  - {name: last, stage: train, overrides: [train.learning_rate=2]}\n"
    assert lrk("run", *write(text), *SHORT).code == 1
    (path,) = runs()
    before = (path / "01-small" / "run.json").read_text()
    Path("mended").touch()
    assert lrk("run", "--resume", "outputs/latest").code == 0
    assert (path / "01-small" / "run.json").read_text() == before and set(ledger(path).values()) == {"done"}


def test_a_stage_that_is_continued_alone_is_not_continued_twice(lrk):
    lrk("run", "recipe=milora", *SHORT, "train.learning_rate=2")
    (path,) = runs()
    for working, asked in ((path / "01-train", path), (path, path / "01-train")):
        record = json.loads((working / "run.json").read_text())
        with subprocess.Popen(["sleep", "60"]) as other:
            living = {**this_process(), "pid": other.pid, "began": began(other.pid)}
            (working / "run.json").write_text(json.dumps({**record, "status": "running", "process": living}))
            ended = lrk("run" if asked == path else "train", "--resume", str(asked))
            assert (ended.code, ended.out) == (2, "")
            assert ended.err == f"error: --resume: '{working}' is running (process {other.pid}); end that first\n"
            (working / "run.json").write_text(json.dumps(record))
            other.kill()
    Path("mended").touch()
    assert lrk("train", "--resume", str(path / "01-train")).code == 0
    assert lrk("run", "--resume", str(path)).code == 0
    assert ledger(path) == {"train": "done", "test": "done"}


def test_ctrl_c_names_the_recipe(lrk):
    ended = lrk("run", "recipe=milora", "train.warmup=1", "train.max_steps=3")
    (path,) = runs()
    assert (ended.code, ended.err) == (130, f"interrupted: continue with: lrk run --resume {path}\n")
    assert ledger(path) == {"train": "interrupted", "test": "pending"}
    assert lrk("run", "--resume", str(path)).code == 0


def test_a_recipe_moves_with_its_folder(lrk):
    lrk("run", "recipe=milora", *SHORT, "train.learning_rate=2")
    Path("mended").touch()
    moved = runs()[0].rename("moved")
    assert lrk("run", "--resume", "moved").code == 0
    assert saved(moved, "02-test")["run"] == str(Path("moved/01-train").absolute())


def test_a_recipe_is_continued_from_another_directory(lrk, monkeypatch):
    Path("data").mkdir()
    text = TWO + "  - {name: last, stage: train, overrides: [task.path='data', train.learning_rate=2]}\n"
    assert lrk("run", *write(text), *SHORT, "model.path=data").code == 1
    path, data = runs()[0].absolute(), str(Path("data").absolute())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path("mended").touch()
    (path / "04-last" / "run.json").unlink()  # as if it had not begun
    ended = lrk("run", "--resume", str(path))
    assert ended.code == 0, ended.err
    last = saved(path, "04-last")
    assert (last["task"]["path"], last["model"]["path"]) == (data, data)
    assert saved(path, "03-again")["model"]["path"] == data


def test_peak_memory_is_the_largest_stages(lrk, monkeypatch):
    monkeypatch.setattr("lowrank_cli.runs.run.peak_memory_bytes", iter([9, 9, 5, 5, 3]).__next__)
    lrk("run", "recipe=milora", *SHORT)
    folders = [runs()[0], *sorted(runs()[0].glob("*/"))]
    assert [Run.open(folder).info["peak_memory_bytes"] for folder in folders] == [9, 9, 5]


def test_a_split_is_for_the_stages_that_evaluate_only(lrk):
    lrk("run", "recipe=milora", *SHORT, "evaluate.split=dev", "evaluate.batch_size=3")
    train, test = (saved(runs()[0], folder)["evaluate"] for folder in ("01-train", "02-test"))
    assert (test["split"], test["batch_size"], train["batch_size"]) == ("dev", 3, 3) and "split" not in train


MISTAKES = {
    "  - {name: a, stage: trian}": "recipe mine, stage 'a': unknown value 'trian'; did you mean 'train'?",
    "  - {name: a, stage: train, overrides: [method=none]}": "stage 'a': method: 'none' has no stage train",
    "  - {name: a, stage: train, overrides: [method.rnk=2]}": "stage 'a': method.rnk: unknown key; did you mean",
    "  - {name: a, stage: evaluate, overrides: ['run={b}']}": "stage 'a', run: unknown value 'b'",
    "  - {name: a, stage: evaluate}": "stage 'a': run: no finished run",
    "  - {name: a/b, stage: train}": "the name must be unique, of letters, digits, - and _",
    "  - {name: a, stage: train}\n  - {name: a, stage: train}": "the name must be unique",
    "  []": "recipe mine: it has no stages",
    "  - name: a\n    stges: train": "mine.yaml, line 5: stges: unknown key; did you mean 'stage'? (allowed: name,",
    "  - {name: a}": "missing",
    "  - {name: a, stage: train, overrides: [task.path=nowhere]}": "task.path: there is no file or folder 'nowhere'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_found_before_anything_runs(lrk, text):
    assert MISTAKES[text] in one_line(lrk("run", *write(text)))


def test_an_override_that_no_stage_knows(lrk):
    for override, said in (
        ("rank=8", "recipe alora: rank: unknown key; did you mean 'method.rank'"),
        ("method.scor=ab", "did you mean 'method.score'"),  # the second stage's
        ("export.fromat=lora", "did you mean 'export.format'"),
        ("prune.drop=3", "it is a key of lrk prune"),
    ):
        assert said in one_line(lrk("run", "recipe=alora", override))
    assert "unknown key; it is a key of method=alora (method has: name, rank," in one_line(
        lrk("run", "recipe=milora", "method.score=ab")
    )
    assert "did you mean 'recipe=milora'" in one_line(lrk("run", "milora"))


def test_a_mistake_that_the_first_stage_finds_leaves_nothing(lrk):
    assert one_line(lrk("run", "recipe=milora", "task.max_length=3")) == "task.max_length: 3 is too short"


def test_plan_and_dry_run(lrk):
    assert "{train}" in lrk("check", "run", "recipe=milora").out
    documents = list(yaml.safe_load_all(lrk("run", "--dry-run", "recipe=milora", "seed=3").out))
    assert [document["seed"] for document in documents] == [3, 3]
    with pytest.raises(UserError):
        recipe.plan("run", ["recipe=milora", "method.k=0"], None)
    assert not Path("outputs").exists()


def test_a_preview_composes_each_stage_once(monkeypatch):
    composed = []
    check = stage.check
    monkeypatch.setattr(stage, "check", lambda verb, *rest: composed.append(verb) or check(verb, *rest))
    single_run.preview("run", ["recipe=milora"], None)
    assert composed == ["train", "evaluate"]
    composed.clear()
    sweep.preview("run", ["recipe=milora", "seed=0,1"], None)
    assert composed == ["train", "evaluate"] * 2
