"""The command line: help, plans, lists, mistakes, exit codes, resuming; and that none of it waits for torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from command import one_line, runs, shell

from lowrank_cli import cli, methods, schema
from lowrank_cli.config.keys import section_keys, sections
from lowrank_cli.report.run_results import collect
from lowrank_cli.runs import Run, this_process
from lowrank_cli.runs.process import began


def info(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


# ----------------------------------------------------------------------------------- without anything heavy


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["check"], ["list"], ["train", "--dry-run"], ["train", "method=milra"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments):
    ended = shell(*arguments)
    assert ended.code == (2 if "method=milra" in arguments else 0), ended
    assert "was imported" not in ended.err


def test_completion_imports_nothing_heavy():
    asked = {"_LRK_COMPLETE": "complete_bash", "COMP_WORDS": "lrk\ntrain\nmethod\n=\nmi", "COMP_CWORD": "4"}
    ended = shell(**asked)
    assert (ended.code, ended.out.split()) == (0, ["milora"])


def test_module_and_script_are_the_same(lrk):
    assert shell("--version").out == lrk("--version").out
    assert lrk("--version").out.startswith("lrk 0.")


# -------------------------------------------------------------------------------------- help, lists, plans


def test_help_names_the_verbs(lrk):
    for ended in (lrk("--help"), lrk()):
        assert ended.code == 0
        assert all(f"\n  {verb} " in ended.out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself(lrk, verb):
    ended = lrk(verb, "--help")
    assert ended.code == 0 and "Examples:\n  lrk " in ended.out and ended.err == ""
    if verb in ("train", "evaluate", "check"):
        shown = " ".join(ended.out.split())  # lines fold at the terminal's width
        assert f"method={{{', '.join(methods.names())}}}" in shown and "tiny_yesno" in shown
    if verb in cli.STAGES:
        assert all(option in ended.out for option in ("--dry-run", "--config-dir", "--resume"))
        assert ("--multirun" in ended.out) == (verb not in ("import", "study", "serve"))


@pytest.mark.slow
def test_examples_of_the_help_are_valid(lrk, fake_stages):
    lrk("train", "method=milora")
    lrk("train", "method=lora")
    for verb, examples in cli.EXAMPLES.items():
        for example in examples:
            words = shlex.split(example)[2:]
            if verb in ("import", "serve"):  # read the adapters that they name
                continue
            if verb in cli.STAGES and not any(word.startswith("--") for word in words):
                ended = lrk("check", verb, *words, *["--no-probe"] * (verb == "study"))
                assert (ended.code, ended.err) == (0, ""), example


def test_list_says_what_there_is(lrk):
    everything = lrk("list").out
    for what in cli.LISTS:
        ended = lrk("list", what)
        assert ended.code == 0 and ended.out in everything
        assert not any(line.endswith(" ") for line in ended.out.splitlines())
    assert "milora" in lrk("list", "methods").out and "once per prompt" in lrk("list", "methods").out
    assert "no runs yet" in everything
    assert "did you mean 'tasks'" in one_line(lrk("list", "taks"))
    assert "method.k" in lrk("list", "methods", "milora").out
    assert "did you mean 'milora'" in one_line(lrk("list", "methods", "milra"))
    assert "lrk list methods NAME" in one_line(lrk("list", "tasks", "trec"))


def test_list_explains_the_keys_of_every_section(lrk):
    everything = lrk("list", "keys").out
    for section in ("train", "evaluate", "score", "prune", "export", "generate", "bench", "hardware", "task", "model"):
        ended = lrk("list", "keys", section)
        assert ended.code == 0 and ended.out in everything, section
    rows = [line.split(maxsplit=2) for line in lrk("list", "keys", "train").out.splitlines()]
    assert rows[0] == ["train", "(lrk", "train)"]
    assert ["train.batch_size", "16", "examples of one step, over all processes and accumulated batches"] in rows
    kinds = lrk("list", "keys", "score").out
    for level, choices in schema.KINDS.items():
        for kind, meaning in choices.items():
            assert f"{kind} ({level})" in kinds and meaning.split()[-1] in kinds
    assert "hardware.threads" in lrk("list", "keys", "hardware").out
    assert "did you mean 'prune'" in one_line(lrk("list", "keys", "prun"))
    assert "score.*" in lrk("prune", "--help").out and "lrk list keys SECTION" in lrk("prune", "--help").out


def test_every_key_of_a_section_is_explained():
    for verb in schema.VERBS:
        for section in sections(verb) if verb != "run" else ():
            assert all(meaning for _, _, meaning in section_keys(section, None)), section


def test_list_shows_the_users_own(lrk):
    Path("mine/task").mkdir(parents=True)
    Path("mine/task/own.yaml").write_text("# My own task\n")
    assert "My own task" in lrk("list", "tasks", "--config-dir", "mine").out


def test_check_prints_the_plan(lrk):
    ended = lrk("check", "method=lora", "method.rank=4", "train.batch_size=8", "train.gradient_accumulation=2")
    assert (ended.code, ended.err) == (0, "")
    assert not any(line.endswith(" ") for line in ended.out.splitlines())
    for text in ("rank=4", "tiny_yesno", "8 examples a step = 1 processes × 2 accumulated × 4", "nothing was started"):
        assert text in ended.out
    assert not Path("outputs").exists()
    assert "none" in lrk("check", "evaluate", "method=none").out
    assert "2 runs" in lrk("check", "train", "-m", "seed=0,1").out
    assert "did you mean 'train'" in one_line(lrk("check", "trian"))


def test_dry_run_prints_what_would_be_saved(lrk, fake_stages):
    printed = lrk("train", "--dry-run", "method=lora", "task.limit=4").out
    assert not Path("outputs").exists()
    lrk("train", "method=lora", "task.limit=4")
    usual = "  # tuned on the bundled model"  # where the learning rate is from
    assert printed.replace(usual, "") == (runs()[0] / "config.yaml").read_text() and usual in printed
    assert "a\\u202eb" in lrk("train", "--dry-run", "model=hub", "model.id='a\u202eb'").out  # shown, and not acted on
    documents = list(yaml.safe_load_all(lrk("train", "--dry-run", "-m", "seed=3,4").out))
    assert [document["seed"] for document in documents] == [3, 4]


# ----------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    ("trian",): "verb: unknown value 'trian'; did you mean 'train'?",
    ("method=milora",): "the verb is missing; did you mean 'lrk train method=milora'?",
    ("train", "--dryrun"): "No such option: --dryrun (Possible options: --dry-run) (see: lrk train --help)",
    ("train", "method=milra"): "method: unknown value 'milra'; did you mean 'milora'?",
    ("train", "rank=8"): "rank: unknown key; did you mean 'method.rank'?",
    ("train", "method.rank=x"): "method.rank: 'x' is not a whole number",
    ("train", "method=none"): "method: 'none' has no stage train (it has: evaluate, generate, serve)",
    ("train", "model.path=nowhere"): "model.path: there is no folder 'nowhere'",
    ("train", "task.path=nowhere"): "task.path: there is no file or folder 'nowhere'",
    ("train", "hardware.processes=3"): "train.batch_size: 16 cannot be shared by hardware.processes=3",
    ("train", "--config-dir", "nowhere"): "--config-dir: there is no folder 'nowhere'",
    ("train", "--resume", "nowhere"): "--resume: there is no folder 'nowhere'",
    (
        "train",
        "--resume",
        "nowhere",
        "seed=1",
    ): "--resume: a run continues with its own configuration; leave out seed=1",
    ("evaluate",): "run: no finished run under 'outputs'; start one with: lrk train",
    (
        "evaluate",
        "method=idaicl",
        "task=cb",
    ): "run: no finished run of method=idaicl task=cb under 'outputs'; start one with: lrk train method=idaicl task=cb",
    ("evaluate", "run=nowhere"): "run: there is no folder 'nowhere'",
    ("run",): "recipe: missing; choose one of ",
    ("train", "-m", "seed=0,1", "method.rank=0"): "method.rank: 0 is out of range",
    ("train", "-m", "method=lora,milra"): "method: unknown value 'milra'; did you mean 'milora'?",
    (
        "train",
        "-m",
        "seed=0,1",
        "hydra/launcher=joblb",
    ): "hydra/launcher: unknown value 'joblb'; did you mean 'joblib'?",
    ("train", "-m", "seed=0,1", "hydra.launcher.n_job=2"): "hydra.launcher.n_job: unknown key",
    ("train", "-m", "hydra.sweep.dir=x"): "hydra.sweep.dir=x: of Hydra's own keys only",
    ("train", "evaluate.num_beams=3"): "evaluate.num_beams: 3 beams search for generated text, but",
    ("train", "model=minilm", "evaluate.shots=2"): "evaluate.shots: 2 demonstrations need a prompt, and",
    ("evaluate", "method=none", "model=minilm"): "method: 'none' would leave the head of the encoder minilm random",
    ("train", "train.gradient_accumulation=3"): "train.batch_size: 16 cannot be shared by hardware.processes=1 times",
    ("compare", "nowhere"): "",
    ("compare",): "compare: there is no folder 'outputs'",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_leaves_nothing(lrk, arguments):
    assert one_line(lrk(*arguments)).startswith(MISTAKES[arguments])


def test_a_mistake_that_the_stage_finds_leaves_nothing(lrk, fake_stages):
    assert one_line(lrk("train", "task.max_length=3")) == "task.max_length: 3 is too short"
    lrk("train")
    assert lrk("train", "task.max_length=3").code == 2
    assert len(runs()) == 1 and Path("outputs/latest").resolve() == runs()[0].resolve()


# --------------------------------------------------------------------------------------- runs and their end


def test_a_run_from_start_to_end(lrk, fake_stages):
    arguments = ["train", "method=lora", "train.max_steps=3", "name=first", "seed=2"]
    ended = lrk(*arguments)
    assert (ended.code, ended.err) == (0, "") and "0.5200" in ended.out
    (path,) = runs()
    assert path.name.endswith("-lora-llama-tiny_yesno-first")
    assert (
        info(path)["status"] == "done"
        and info(path)["command"] == "lrk train method=lora train.max_steps=3 name=first seed=2"
    )
    assert json.loads((path / "metrics.json").read_text())["test/accuracy"] == 0.52
    assert (path / "plots" / "loss.png").is_file()
    ended = lrk("evaluate")
    assert ended.code == 0 and info(runs()[1])["choices"] == info(path)["choices"]
    assert yaml.safe_load((runs()[1] / "config.yaml").read_text())["run"] == str(path.absolute())
    assert "2 run" not in lrk("list", "runs").out and lrk("list", "runs").out.count("done") == 2


def test_a_run_whose_process_was_killed_is_listed_as_interrupted(lrk, fake_stages):
    assert lrk("train", "train.max_steps=1").code == 0
    run = Run.open(runs()[0])
    run.update(status="running", process={**this_process(), "began": -1})
    assert "interrupted" in lrk("list", "runs").out and "running" not in lrk("list", "runs").out
    run.update(process=this_process())
    assert "running" in lrk("list", "runs").out


def test_outputs_may_lie_elsewhere(lrk, fake_stages):
    assert lrk("train", "outputs=else where", "train.max_steps=1").code == 0
    assert not Path("outputs").exists()
    assert lrk("evaluate", "outputs=else where").code == 0
    assert lrk("list", "runs", "--outputs", "else where").out.count("done") == 2


def test_work_that_fails_keeps_its_folder(lrk, fake_stages):
    ended = lrk("train", "train.learning_rate=2")
    assert (ended.code, ended.err) == (1, "error: train/loss is nan at step 2\n")
    assert "--resume" in ended.out
    (path,) = runs()
    assert (info(path)["status"], info(path)["error"]) == ("failed", "train/loss is nan at step 2")
    Path("mended").touch()
    assert lrk("train", "--resume", str(path)).code == 0
    assert info(path)["status"] == "done" and "error" not in info(path)


def test_a_bug_keeps_its_traceback(lrk, fake_stages):
    ended = lrk("train", "train.weight_decay=9")
    assert ended.code == 1 and "Traceback" in ended.err and "RuntimeError: a bug" in ended.err
    (path,) = runs()
    assert "RuntimeError: a bug" in (path / "error.txt").read_text()
    assert info(path)["status"] == "failed" and info(path)["error"] == "RuntimeError: a bug"


def test_an_interrupted_run_says_how_to_go_on(lrk, fake_stages):
    ended = lrk("train", "train.warmup=1", "train.max_steps=4")
    (path,) = runs()
    assert (ended.code, ended.err) == (130, f"interrupted: continue with: lrk train --resume {path}\n")
    assert info(path)["status"] == "interrupted"
    assert "belongs to train" in lrk("evaluate", "--resume", str(path)).err
    assert lrk("train", "--resume", "outputs/latest").code == 0
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["resumed"]) for row in rows] == [(1, False), (2, True), (3, True), (4, True)]
    ended = lrk("train", "--resume", str(path))
    assert (ended.code, ended.err) == (2, f"error: --resume: '{path}' is finished\n")
    assert info(path)["status"] == "done"


def test_a_killed_run_is_continued(lrk, fake_stages):
    lrk("train", "train.warmup=1", "train.max_steps=4")
    (path,) = runs()
    (path / "run.json").write_text(json.dumps({**info(path), "status": "running"}))
    assert lrk("train", "--resume", str(path)).code == 0


def test_a_run_is_the_same_from_every_directory(lrk, fake_stages, monkeypatch):
    Path("data").mkdir()
    lrk("train", "task.path=data", "train.warmup=1", "train.max_steps=3")
    path = runs()[0].absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert lrk("train", "--resume", str(path)).code == 0
    ended = lrk("evaluate", f"run={os.path.relpath(path)}", f"outputs={path.parents[1]}")
    assert ended.code == 0, ended.err
    (evaluated,) = [run for run in path.parent.iterdir() if run != path]
    saved = yaml.safe_load((evaluated / "config.yaml").read_text())
    assert (saved["run"], saved["task"]["path"]) == (str(path), str(path.parents[2] / "data"))


def test_an_evaluation_is_paired_by_the_seed_of_its_training_from_every_directory(lrk, fake_stages, monkeypatch):
    lrk("train", "seed=3")
    lrk("evaluate", f"run={runs()[0]}", "seed=5")
    outputs = Path("outputs").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert {result.seed for result in collect([str(outputs)], "outputs").results} == {3}


@pytest.fixture
def other_process():
    """Another living process, and what run.json would say of it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process, {**this_process(), "pid": process.pid, "began": began(process.pid)}
        process.kill()


def test_a_run_that_another_process_works_on_is_left_alone(lrk, fake_stages, other_process):
    process, record = other_process
    lrk("train", "train.warmup=1", "train.max_steps=3")
    (path,) = runs()
    assert "process" not in info(path)
    living = {**info(path), "status": "running", "process": record}
    (path / "run.json").write_text(json.dumps(living))
    ended = lrk("train", "--resume", str(path))
    assert (ended.code, ended.out) == (2, "") and info(path) == living
    assert ended.err == f"error: --resume: '{path}' is running (process {process.pid}); end that first\n"
    (path / "run.json").write_text(json.dumps({**living, "process": {**record, "began": -1}}))  # its number came back
    assert lrk("train", "--resume", str(path)).code == 0


def test_a_run_says_which_process_works_on_it(lrk, fake_stages):
    seen = {}
    log = Run.log

    def watching(run, row):
        seen.update(info(run.path))
        log(run, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", watching)
        lrk("train", "train.max_steps=1")
    assert seen["process"] == this_process() and seen["process"]["pid"] == os.getpid()


# ---------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_train_evaluate_and_compare_for_real(lrk):
    tiny = ["task.limit=8", "train.max_steps=2", "train.eval_every=1", "train.log_every=1"]
    ended = lrk("train", "method=milora", "model=llama", *tiny)
    assert ended.code == 0, ended.err
    (path,) = runs()
    held = {"config.yaml", "run.json", "history.jsonl", "metrics.json", "predictions.jsonl", "adapter", "plots"}
    assert held <= {entry.name for entry in path.iterdir()}
    assert lrk("evaluate", "evaluate.split=dev").code == 0
    first, second = (json.loads((run / "metrics.json").read_text()) for run in runs())
    assert first["dev/accuracy"] == second["dev/accuracy"]
    ended = lrk("compare", "--output", "comparison")
    assert ended.code == 0 and "milora" in ended.out and any(Path("comparison").iterdir())


def test_list_runs_filters_sorts_and_limits(lrk, fake_stages):
    for method, seed in (("lora", 2), ("lora", 7), ("milora", 3)):
        lrk("train", f"method={method}", f"seed={seed}", "train.max_steps=1")
    lrk("train", "method=lora", "seed=4", "train.max_steps=3", "train.learning_rate=2")

    def seeds(*words: str) -> list[str]:
        return re.findall(r"(?:done|failed) +(\d+) ", lrk("list", "runs", *words).out)

    assert seeds() == ["2", "7", "3", "4"]
    assert seeds("method=lora", "done") == ["2", "7"] and seeds("failed") == ["4"]
    assert seeds("seed=2", "seed=3") == ["2", "3"]  # of one key either will do
    assert seeds("--sort", "test/accuracy") == ["7", "3", "2"] and seeds("--limit", "1") == ["4"]
    assert "test/accuracy 0.5700" in lrk("list", "runs", "--sort", "test/accuracy", "--limit", "1").out
    assert "no run under 'outputs' fits method=dora" in lrk("list", "runs", "method=dora").out
    for words, message in (
        (["dne"], "did you mean 'done'"),
        (["metod=lora"], "did you mean 'method'"),
        (["--sort", "test/acuracy"], "did you mean 'test/accuracy'"),
    ):
        ended = lrk("list", "runs", *words)
        assert ended.code == 2 and message in ended.err
    assert "for runs" in lrk("list", "tasks", "--sort", "x").err
