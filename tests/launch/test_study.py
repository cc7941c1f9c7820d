"""Studies: equal tuning, seeds of their own, failures that spare the others, stops, kills, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from command import Ended, one_line, reconfigure, runs
from forked import Lrk

from lowrank_cli.launch.study_plan import Cell, Plan
from lowrank_cli.launch.tuning import Search, rungs
from lowrank_cli.runs import Run
from lowrank_cli.schema import StudyConfig, TuneConfig

fake = pytest.mark.usefixtures("fake_stages")
SMALL = {
    "arms": {"plain": ["method=lora"], "routed": ["method=milora"]},
    "baseline": "plain",
    "seeds": [0, 1],
    "tasks": {"yesno": ["task=tiny_yesno"]},
    "overrides": ["train.max_steps=3", "train.warmup=0.1"],
}


def write(**changes) -> None:
    """A study of the user's own: study=mine with --config-dir mine."""
    Path("mine/study").mkdir(parents=True, exist_ok=True)
    values = {"defaults": ["_study"], "name": "mine", **SMALL, **changes}
    Path("mine/study/mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.fixture
def study(lrk):
    """``study("study.seeds=[0]", **changes of the file)``."""

    def call(*overrides: str, **changes) -> Ended:
        write(**changes)
        return lrk("study", "study=mine", "--config-dir", "mine", *overrides)

    return call


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def statuses(folder: Path) -> dict[str, str]:
    """Each run folder in a study's, and how it stands."""
    files = sorted(folder.glob("*/**/run.json"))
    return {str(file.parent.relative_to(folder)): read(file)["status"] for file in files}


@fake
@pytest.mark.slow
def test_every_arm_is_tuned_alike_and_compared_with_its_best_value(study):
    tune = {"search": {"train.learning_rate": [0.1, 0.3, 0.5]}}
    ended = study("workers=2", tune=tune)
    assert ended.code == 0, ended.err
    (folder,) = runs()
    assert folder.name.endswith("-study-mine") and read(folder / "run.json")["status"] == "done"
    about = read(folder / "study.json")
    assert (about["baseline"], about["seeds"], about["groups"]) == ("plain", [0, 1], {"all": ["yesno"]})
    tuning = read(folder / "tuning.json")
    assert [entry["arm"] for entry in tuning] == ["plain", "routed"]
    for entry in tuning:
        assert [trial["values"]["train.learning_rate"] for trial in entry["trials"]] == [0.1, 0.3, 0.5]
        assert [trial["mean"] for trial in entry["trials"]] == [0.2, 0.0, 0.2]
        assert (entry["best"], entry["at_edge"]) == ({"train.learning_rate": 0.3}, {})
    assert (folder / "report.html").is_file() and (folder / "comparison" / "compare.tex").is_file()
    assert "tuned" in ended.err + ended.out and "detectable" in ended.err + ended.out
    final = {name: status for name, status in statuses(folder).items() if name.startswith("runs/")}
    assert final == {f"runs/all/yesno/{arm}/{seed}": "done" for arm in SMALL["arms"] for seed in (0, 1)}
    for name in final:
        config = Run.open(folder / name).config()
        assert (config["train"]["learning_rate"], config["seed"]) == (0.3, int(name[-1]))
    trials = [Run.open(folder / name) for name in statuses(folder) if name.startswith("tuning/")]
    assert {run.info["seed"] for run in trials} == {100}
    assert {name for run in trials for name in run.metrics if "/" in name} == {
        "dev/accuracy",
        "dev/loss",
        "train/steps",
    }


@fake
def test_what_fails_leaves_the_others_alone_and_only_that_is_run_again(study, lrk):
    arms = {**SMALL["arms"], "fast": ["method=lora", "train.learning_rate=2"]}
    ended = study(arms=arms)
    (folder,) = runs()
    assert ended.code == 1 and f"2 of 6 runs are not done; continue with: lrk study --resume {folder}" in ended.err
    assert [name for name, status in statuses(folder).items() if status == "failed"] == [
        f"runs/all/yesno/fast/{seed}" for seed in (0, 1)
    ]
    assert "runs/all/yesno/fast/0: train/loss is nan at step 2" in ended.err
    kept = folder / "runs/all/yesno/plain/0"
    before = (kept / "run.json").read_bytes()
    Path("mended").touch()
    ended = lrk("study", "--resume", str(folder))
    assert ended.code == 0, ended.err
    assert set(statuses(folder).values()) == {"done"} and (kept / "run.json").read_bytes() == before


@fake
def test_a_killed_study_goes_on_where_it_was(study, lrk):
    write(seeds=[0, 77])
    process = Lrk("study", "study=mine", "--config-dir", "mine")
    waiting = wait_for("outputs/latest/runs/all/yesno/plain/77/waiting")
    process.kill()
    process.wait()
    (folder,) = runs()
    wait_until(lambda: read(waiting.parent / "run.json")["status"] == "interrupted")  # the child does not outlive it
    done = (folder / "runs/all/yesno/plain/0/run.json").read_bytes()
    for arm in SMALL["arms"]:
        (folder / f"runs/all/yesno/{arm}/77").mkdir(parents=True, exist_ok=True)
        (folder / f"runs/all/yesno/{arm}/77/go").touch()
    ended = lrk("study", "--resume", str(folder))
    assert ended.code == 0, ended.err
    assert set(statuses(folder).values()) == {"done"}
    assert (folder / "runs/all/yesno/plain/0/run.json").read_bytes() == done
    assert [row["resumed"] for row in Run.open(waiting.parent).history()] == [False, True, True]


@fake
def test_ctrl_c_stops_the_children_and_says_how_to_go_on(lrk):
    write(seeds=[77])
    process = Lrk("study", "study=mine", "--config-dir", "mine")
    waiting = wait_for("outputs/latest/runs/all/yesno/plain/77/waiting")
    for words in (["study=mine", "--config-dir", "mine", "folder=outputs/latest"], ["--resume", "outputs/latest"]):
        ended = lrk("study", *words)
        assert ended.code == 2 and "is running" in ended.err
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    errors = process.errors()
    (folder,) = runs()
    assert errors.splitlines()[-1] == f"interrupted: continue with: lrk study --resume {folder}"
    assert read(waiting.parent / "run.json")["status"] == "interrupted" == read(folder / "run.json")["status"]


@fake
@pytest.mark.slow
def test_a_launcher_runs_a_study_and_a_killed_run_leaves_the_others_alone(study, lrk):
    arms = {**SMALL["arms"], "fast": ["method=lora", "train.learning_rate=2"]}
    write(arms=arms, seeds=[0, 77], tune={"search": {"train.weight_decay": [0.0, 0.1]}})
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = Lrk("study", "study=mine", "--config-dir", "mine", *launcher)
    killed = wait_for("outputs/latest/runs/all/yesno/plain/77/waiting").parent
    (folder,) = runs()
    assert {status for name, status in statuses(folder).items() if name.startswith("tuning/")} == {"done", "failed"}
    (killed.parents[1] / "routed/77").mkdir(exist_ok=True)
    (killed.parents[1] / "routed/77/go").touch()
    os.kill(read(killed / "run.json")["process"]["pid"], signal.SIGKILL)
    assert process.wait() == 1, process.errors()
    errors = process.errors()
    final = {name: status for name, status in statuses(folder).items() if name.startswith("runs/")}
    assert final.pop("runs/all/yesno/plain/77") == "failed"
    assert "runs/all/yesno/plain/77: its process was killed (SIGKILL)" in errors
    assert set(final.values()) == {"done"} and not (folder / ".stop").exists()
    assert "error: train/loss is nan" in (folder / "tuning/all/yesno/fast/weight_decay0.0/100/log.txt").read_text()
    (killed / "go").touch()
    Path("mended").touch()
    assert read(folder / "study.json")["launcher"] == launcher
    wrong = lrk("study", "--resume", str(folder), "hydra.launcher.n_jobz=2")
    assert (wrong.code, wrong.err) == (2, "error: hydra.launcher.n_jobz: unknown key\n")
    ended = lrk("study", "--resume", str(folder), "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert "every trial in tuning/all/yesno/fast diverged" in ended.err  # its result; it is not repeated
    assert statuses(folder)["runs/all/yesno/plain/77"] == "done"
    later = lrk("evaluate", f"run={folder}/runs/all/yesno/plain/0", "--dry-run")  # that launcher ran in this process
    assert later.code == 0, later.err


def wait_for(file: str) -> Path:
    wait_until(Path(file).exists)
    return Path(file).resolve()


def wait_until(true) -> None:
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@fake
def test_more_seeds_keep_what_is_done_and_other_settings_are_refused(study):
    assert study().code == 0
    (folder,) = runs()
    before = (folder / "runs/all/yesno/plain/0/run.json").read_bytes()
    tables, elsewhere = folder / "comparison" / "method_comparison", Path("elsewhere")
    shutil.rmtree(tables)
    elsewhere.mkdir()
    tables.symlink_to(elsewhere.resolve())
    assert study("study.seeds=[0,1,2]", f"folder={folder}").code == 0
    assert any(tables.iterdir()) and not any(elsewhere.iterdir())
    assert len(statuses(folder)) == 6 and (folder / "runs/all/yesno/plain/0/run.json").read_bytes() == before
    kept = {file: (folder / file).read_bytes() for file in ("run.json", "config.yaml", "study.json")}
    ended = study("train.max_steps=2", f"folder={folder}")
    said = "folder: its runs of all/yesno/plain were made with train.max_steps=3, not 2"
    assert ended.code == 2 and said in ended.err
    assert {file: (folder / file).read_bytes() for file in kept} == kept
    assert (folder / "runs/all/yesno/plain/0/run.json").read_bytes() == before


@fake
def test_a_study_from_somebody_else_cannot_search_over_trust(study, lrk):
    assert study(arms={"plain": ["method=lora", "train.learning_rate=2"]}).code == 1
    (folder,) = runs()
    run = Run.open(folder)
    changed = {**run.config()["study"], "tune": {"search": {"model.trust_remote_code": [False, True]}}}
    reconfigure(run, study=changed)
    ended = lrk("study", "--resume", str(folder))
    assert ended.code == 2 and "model.trust_remote_code: no file can set it" in ended.err
    assert not (folder / "tuning").exists()


@fake
def test_a_study_from_somebody_else_cannot_name_a_launchers_command(study, lrk):
    assert study(arms={"plain": ["method=lora", "train.learning_rate=2"]}).code == 1
    (folder,) = runs()
    record = read(folder / "study.json") | {"launcher": ["hydra/launcher=joblib", "hydra.launcher.setup=[touch made]"]}
    (folder / "study.json").write_text(json.dumps(record))
    ended = lrk("study", "--resume", str(folder))
    assert ended.code == 2 and "it was started with hydra.launcher.setup=[touch made]; type that again" in ended.err


@fake
def test_a_trial_that_diverges_has_its_result_and_is_not_run_again(study, lrk):
    tune = {"search": {"train.learning_rate": [0.3, 2]}}
    ended = study(tune=tune, arms={"plain": ["method=lora"], "broken": ["method=lora", "train.weight_decay=9"]})
    (folder,) = runs()
    assert ended.code == 1 and "3 of 8 runs are not done" in ended.err  # the broken arm's
    assert "1 failed" in ended.out
    assert read(folder / "failures.json") == {
        "tuning/all/yesno/plain/learning_rate2/100": "train/loss is nan at step 2",
        "tuning/all/yesno/broken/learning_rate0.3/100": "RuntimeError: a bug",
        "tuning/all/yesno/broken/learning_rate2/100": "train/loss is nan at step 2",
        **dict.fromkeys(
            (f"runs/all/yesno/broken/{seed}" for seed in (0, 1)), "some trials in tuning/all/yesno/broken failed"
        ),
    }
    assert ended.err.count("RuntimeError: a bug") == 1
    page = " ".join((folder / "report.html").read_text().split())
    assert "RuntimeError: a bug" in page and "some trials in tuning/all/yesno/broken failed" in page
    (plain, _) = read(folder / "tuning.json")
    assert [trial["mean"] for trial in plain["trials"]] == [0.0, None]
    diverged = folder / "tuning/all/yesno/plain/learning_rate2/100/run.json"
    before, failures = diverged.read_bytes(), read(folder / "failures.json")
    assert lrk("study", "--resume", str(folder)).code == 1
    assert diverged.read_bytes() == before and read(folder / "failures.json") == failures


@fake
def test_a_comparison_waits_for_trials_that_failed(study, lrk):
    """One trial has a bug. Repeated, it may be the best one, so its arm is not compared before."""
    arms = {"plain": ["method=lora"], "other": ["method=lora", "train.weight_decay=9"]}
    ended = study(arms=arms, tune={"search": {"train.max_steps": [1, 2]}}, overrides=[])
    (folder,) = runs()
    assert ended.code == 1
    assert statuses(folder)["tuning/all/yesno/other/max_steps1/100"] == "done"
    assert not (folder / "runs/all/yesno/other").exists()
    assert {statuses(folder)[f"runs/all/yesno/plain/{seed}"] for seed in (0, 1)} == {"done"}


def test_values_that_do_not_name_a_folder_get_a_hash():
    plan = Plan(StudyConfig(name="mine", arms={"a": ["method=lora"]}, baseline="a", seeds=[0], tasks={"t": []}))

    def folder(value) -> str:
        return plan.trial(Cell("all", "t", "a"), {"train.learning_rate": value}, 9).folder

    assert folder(1e-3) == "tuning/all/t/a/learning_rate0.001/9"
    named = [folder("a b"), folder("a_b"), folder("a/b"), folder("x" * 200), folder("x" * 200 + "y"), folder([1, 2])]
    assert len({*named}) == 6 and max(map(len, named)) < 130
    assert {len(Path(name).parts) for name in named} == {6}


@fake
def test_a_trial_without_the_metric_says_what_it_has(study):
    arms = {"plain": ["evaluate", "method=none"]}
    ended = study(arms=arms, overrides=[], tune={"search": {"evaluate.shots": [0, 2]}})
    assert ended.code == 1 and "it has no dev/loss (it has: dev/accuracy)" in ended.err


@fake
def test_prepared_runs_are_made_for_each_seed_and_named_in_overrides(study):
    prepare = {"start": ["train", "method=lora", "task=tiny_yesno", "train.max_steps=1"]}
    arms = {"plain": ["method=lora"], "more": ["evaluate", "run={start}"]}
    tune = {"search": {"evaluate.shots": [0, 2]}, "metric": "dev/accuracy"}
    ended = study(arms=arms, prepare=prepare, tune=tune)
    assert ended.code == 0, ended.err
    (folder,) = runs()
    for seed in (0, 1):
        used = Run.open(folder / f"runs/all/yesno/more/{seed}").config()["run"]
        assert used == str((folder / f"prepared/all/start/{seed}").resolve())
        assert "test/accuracy" in Run.open(Path(used)).metrics
    measured = [*folder.glob("prepared/all/start/100"), *folder.glob("tuning/all/yesno/more/*/100")]
    assert len(measured) == 3  # they serve tuning alone
    assert [[name for name in Run.open(path).metrics if name.endswith("accuracy")] for path in measured] == [
        ["dev/accuracy"]
    ] * 3


@fake
def test_successive_halving_of_a_study(study):
    """Short trials have a schedule of their own; every arm has as many on every rung; the others go on from there."""
    tune = {"search": {"train.learning_rate": [0.1, 0.2, 0.25, 0.5]}, "halving": 2}
    ended = study("study.seeds=[0]", tune=tune, overrides=["train.max_steps=5", "train.epochs=3"])
    assert ended.code == 0, ended.err
    (folder,) = runs()
    for entry in read(folder / "tuning.json"):
        tried = [(trial["part"], trial["values"]["train.learning_rate"]) for trial in entry["trials"]]
        assert tried == [(2, 0.1), (2, 0.2), (2, 0.25), (2, 0.5), (1, 0.25), (1, 0.2)]
        assert (entry["best"], entry["at_edge"]) == ({"train.learning_rate": 0.25}, {})
    at = folder / "tuning/all/yesno/plain"
    steps = {
        path.name: (run.config()["train"]["max_steps"], run.config()["train"]["epochs"])
        for path in at.iterdir()
        if (run := Run.open(path / "100"))
    }
    short = {f"learning_rate{rate}-1of2": (3, 1.5) for rate in (0.1, 0.2, 0.25, 0.5)}
    assert steps == short | {"learning_rate0.25": (5, 3), "learning_rate0.2": (5, 3)}
    assert "train.max_steps=3" in Run.open(at / "learning_rate0.1-1of2/100").info["command"]
    page = " ".join((folder / "report.html").read_text().split())
    assert "yesno · 1/2 of the steps" in page and "yesno · all of the steps" in page and "Successive halving" in page


@fake
def test_widening_ends_where_the_key_does(study):
    """The trials are alike, so the first one, the largest, is chosen; beyond it would be 1.62 of all steps."""
    ended = study(tune={"search": {"train.warmup": [0.9, 0.5]}, "widen": 2, "metric": "dev/accuracy"})
    assert ended.code == 0, ended.err
    (folder,) = runs()
    for entry in read(folder / "tuning.json"):
        assert [trial["values"]["train.warmup"] for trial in entry["trials"]] == [0.9, 0.5]
        assert (entry["best"], entry["at_edge"]) == ({"train.warmup": 0.9}, {"train.warmup": "upper"})
    assert "warmup at its upper end" in ended.out


@fake
def test_check_counts_the_runs_and_starts_none(lrk):
    write(tune={"search": {"train.learning_rate": [0.1, 0.3, 0.5]}, "seeds": [7, 8]})
    ended = lrk("check", "study=mine", "--config-dir", "mine", "--no-probe")
    assert (ended.code, ended.err) == (0, "")
    assert "16: 12 of tuning, 4 of the comparison" in ended.out and "plain (the baseline), routed" in ended.out
    assert "warning" not in ended.out and not Path("outputs").exists()
    write(tune={"search": {"train.learning_rate": [0.1, 0.3, 0.5]}, "widen": 2})
    ended = lrk("check", "study=mine", "--config-dir", "mine", "--no-probe")
    assert "10: 6 of tuning (up to 4 more where a search is widened), 4 of the comparison" in ended.out
    write(tune={"search": {"train.learning_rate": [0.1, 0.3, 0.5, 0.7]}, "halving": 2})
    ended = lrk("check", "study=mine", "--config-dir", "mine", "--no-probe")
    assert "16: 12 of tuning, 4 of" in ended.out and "4 for 1/2 of the steps, then 2 for all steps" in ended.out
    write(tune={"search": {"train.learning_rate": [0.1, 0.3], "method.k": [1, 2]}})
    ended = lrk("check", "study=mine", "--config-dir", "mine", "--no-probe")
    assert "warning: the arms have different numbers of trials" in ended.out and "plain 2, routed 4" in ended.out


@pytest.mark.slow
def test_check_estimates_the_time_from_a_few_steps():
    write(overrides=["train.max_steps=20", "task.limit=32"], arms={"plain": ["method=lora"]})
    process = Lrk("check", "study", "study=mine", "--config-dir", "mine")
    assert process.wait() == 0, process.errors()
    assert "time: about " in process.output() and not Path("outputs").exists()


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"baseline": "plan"}, [], "study.baseline: unknown value 'plan'; did you mean 'plain'?"),
        ({"seeds": [0, 0]}, [], "study.seeds: [0, 0] must name one seed or more, each once"),
        ({"tasks": {}}, [], "study.groups.all.tasks: there is none"),
        ({"tasks": {"a/b": ["task=rte"]}}, [], "study.tasks: 'a/b' cannot name a folder"),
        ({"tasks": {"one": {"plain": []}}}, [], "has no overrides for the arm 'routed'"),
        ({}, ["train.max_stepz=3"], "train.max_stepz: unknown key; did you mean 'train.max_steps'?"),
        ({"arms": {"plain": ["method=lorra"]}}, [], "study, all/yesno/plain: method: unknown value 'lorra'"),
        ({"arms": {"plain": ["trian", "method=lora"]}}, [], "study.arms.plain: unknown value 'trian'"),
        ({"arms": {"plain": "method=lora"}}, [], "study.arms.plain: 'method=lora' is not a list; write [method=lora]"),
        ({"overrides": ["task.path={{data}}"]}, [], "task.path: there is no file or folder '{data}'"),
        ({"overrides": ["task.path={data}"]}, [], "'{data}': unknown value 'data' (allowed: seed)"),
        ({"folders": {"data": None}, "overrides": ["task.path={data}"]}, [], "study.folders.data: missing"),
        ({}, ["study.folders.data=nowhere"], "study.folders.data"),
        ({"pools": {"both": ["plain", "other"]}}, [], "study.pools.both: unknown value 'other'"),
        ({"overrides": ["model.trust_remote_code=true"]}, [], "model.trust_remote_code: no file can set it"),
        ({"tune": {"search": {"model.trust_remote_code": [False, True]}}}, [], "trust_remote_code: no file can set it"),
        ({"tune": {"search": {"train.lerning_rate": [1, 2]}}}, [], "did you mean 'train.learning_rate'?"),
        (
            {"tune": {"search": {"train.learning_rate": [0.1, 0.2]}, "metric": "dev/bleu"}},
            [],
            "study, all/yesno/plain: tune.metric: unknown value 'dev/bleu'",
        ),
        ({"tune": {"search": {}}}, [], "study.tune.search: names no key to tune"),
        ({"tune": {"search": {"train.learning_rate": [1]}}}, [], "is no list of two values or more"),
        ({"tune": {"search": {"train.learning_rate": [1, 2]}, "seeds": [1]}}, [], "1 is a seed of the comparison"),
        (
            {"tune": {"search": {"train.learning_rate": [1, 2]}, "metric": "test/accuracy"}},
            [],
            "study.tune.metric: 'test/accuracy' is not of the dev split",
        ),
        ({"tune": {"search": {"train.learning_rate": [1, 2, 3]}, "halving": 2}}, [], "needs 4 trials or more"),
        (
            {"tune": {"search": {"train.learning_rate": [1, 2, 3, 4]}, "halving": 2, "widen": 1}},
            [],
            "study.tune.halving: does not go with widen",
        ),
        (
            {
                "arms": {"plain": ["evaluate", "method=none"]},
                "overrides": [],
                "tune": {"search": {"evaluate.shots": [0, 1, 2, 3]}, "halving": 2, "metric": "dev/accuracy"},
            },
            [],
            "study, all/yesno/plain: tune.halving: lrk evaluate with method=none trains no steps",
        ),
        (
            {"tune": {"search": {"train.learning_rate": {"low": 2, "high": 1}}, "sampler": "random", "budget": 2}},
            [],
            "is no range",
        ),
    ],
    ids=lambda value: None if isinstance(value, list | dict) else value[:40],
)
def test_mistakes_are_named_before_anything_runs(study, changes, overrides, message):
    assert message in one_line(study(*overrides, **changes))


def searched(search: Search, optimum: float, seeds: tuple[int, ...] = (0,)) -> list[float]:
    """The values that a search tries, where the loss is the distance to ``optimum`` on a log scale."""
    tried = []
    while proposed := search.propose():
        for trial in proposed:
            rate = trial.values["rate"]
            tried.append(rate)
            search.tell(trial, dict.fromkeys(seeds, abs(rate - optimum)))
    return tried


def test_a_grid_widens_beyond_the_end_at_which_its_best_lies():
    search = Search(TuneConfig(search={"rate": [0.001, 0.002]}), ["rate"], lower=True)
    assert searched(search, optimum=0.004) == [0.001, 0.002]
    assert (search.best(), search.at_edge(), search.beyond()) == ({"rate": 0.002}, {"rate": "upper"}, 0.004)
    search.widen(0.004)
    assert searched(search, optimum=0.004) == [0.004] and search.beyond() == 0.008
    search.widen(0.008)
    searched(search, optimum=0.004)
    assert (search.best(), search.at_edge(), search.beyond()) == ({"rate": 0.004}, {}, None)


@pytest.mark.parametrize(
    ("values", "best", "beyond"),
    [
        ([4, 8], 8, 16),
        ([4, 8], 4, 2),
        ([1, 2], 1, None),
        ([0, 1], 1, 2),
        ([0, 4], 0, None),
        ([False, True], True, None),
    ],
)
def test_a_grid_is_widened_by_values_of_its_kind(values, best, beyond):
    search = Search(TuneConfig(search={"rank": values}), ["rank"], lower=True)
    for trial in search.propose():
        search.tell(trial, {0: float(trial.values["rank"] != best)})
    assert search.beyond() == beyond and not isinstance(search.beyond(), float)


def test_random_trials_are_the_same_for_every_arm_and_stay_in_the_range():
    tune = TuneConfig(search={"rate": {"low": 1e-4, "high": 1e-2, "log": True}}, sampler="random", budget=20)
    one, other = (searched(Search(tune, ["rate"], lower=True), optimum) for optimum in (1e-3, 1e-2))
    assert one == other and len({*one}) == 20 and all(1e-4 <= rate <= 1e-2 for rate in one)
    assert sum(rate < 1e-3 for rate in one) > 5  # even on the log scale


def test_tpe_finds_the_optimum_with_its_budget_and_repeats_itself():
    pytest.importorskip("optuna")
    tune = TuneConfig(search={"rate": {"low": 0.0, "high": 1.0}}, sampler="tpe", budget=30)
    tried = searched(Search(tune, ["rate"], lower=True), optimum=0.7)
    assert len(tried) == 30 and min(abs(rate - 0.7) for rate in tried) < 0.03
    assert searched(Search(tune, ["rate"], lower=True), optimum=0.7) == tried


def test_failed_trials_never_win():
    search = Search(TuneConfig(search={"rate": [1, 2, 3]}), ["rate"], lower=False)
    for trial, score in zip(search.propose(), [None, float("nan"), 0.1], strict=True):
        search.tell(trial, {0: score, 1: 0.9})
    assert search.best() == {"rate": 3}


def test_successive_halving_trains_the_best_of_each_rung_for_longer():
    """The optimum moves with the length of training; what counts in the end is the score after all steps."""
    optimum = {9: 2, 3: 4, 1: 5}
    search = Search(TuneConfig(search={"rank": list(range(1, 19))}, halving=3), ["rank"], lower=True)
    seen = []
    while trials := search.propose():
        assert len({trial.part for trial in trials}) == 1
        seen.append((trials[0].part, sorted(trial.values["rank"] for trial in trials)))
        for trial in trials:
            search.tell(trial, {0: abs(trial.values["rank"] - optimum[trial.part])})
    assert seen == [(9, list(range(1, 19))), (3, [1, 2, 3, 4, 5, 6]), (1, [3, 4])]
    assert search.best() == {"rank": 4}


def test_successive_halving_leaves_failed_trials_behind():
    search = Search(TuneConfig(search={"rank": [1, 2, 3, 4]}, halving=2), ["rank"], lower=True)
    for trial, score in zip(search.propose(), [None, 0.3, None, None], strict=True):
        search.tell(trial, {0: score})
    (trial,) = search.propose()
    assert (trial.values, trial.part) == ({"rank": 2}, 1)


@pytest.mark.parametrize(
    ("count", "factor", "expected"),
    [
        (5, None, [(5, 1)]),
        (4, 2, [(4, 2), (2, 1)]),
        (9, 3, [(9, 3), (3, 1)]),
        (17, 2, [(17, 8), (8, 4), (4, 2), (2, 1)]),
        (3, 2, [(3, 1)]),
    ],
)
def test_rungs_end_with_two_trials_or_more(count, factor, expected):
    assert rungs(count, factor) == expected
