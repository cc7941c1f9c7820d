"""Run folders: names, atomic files, status, what is found and what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from email.message import Message
from pathlib import Path

import pytest
import yaml

from lowrank_cli import runs
from lowrank_cli.errors import UserError
from lowrank_cli.runs import Run, all_runs, atomic_folder, atomic_write, config_hash, discard, find, provenance, settled

CHOICES = {"model": "llama", "task": "tiny_yesno", "hardware": "cpu", "method": "milora"}


def create(stage="train", choices=None, outputs="outputs", **more):
    config = {"seed": 3, "outputs": str(outputs), "name": more.get("name"), "method": {"rank": 8}}
    return Run.create(
        outputs, stage=stage, config=config, choices=choices or CHOICES, overrides=["seed=3"], command="lrk", **more
    )


def test_a_new_run_says_what_runs():
    run = create(name="first try")
    date, name = run.path.parts[1:]
    assert len(date) == len("2026-01-31") and name[6:] == "-milora-llama-tiny_yesno-first-try"
    assert yaml.safe_load((run.path / "config.yaml").read_text())["method"] == {"rank": 8}
    info = json.loads((run.path / "run.json").read_text())
    assert info == run.info
    assert (info["status"], info["stage"], info["seed"], info["choices"]) == ("running", "train", 3, CHOICES)
    assert {"started", "command", "overrides", "config_hash", "git", "packages", "python", "device"} <= set(info)
    assert info["packages"]["hydra-core"].startswith("1.3")


def test_runs_of_the_same_second_get_their_own_folders():
    paths = [create().path for _ in range(5)]
    assert len(set(paths)) == 5
    assert Path("outputs/latest").resolve() == paths[-1].resolve()
    assert not Path(os.readlink("outputs/latest")).is_absolute()


def test_recipes_are_named_as_such():
    assert create("run", {"recipe": "milora"}).path.name.endswith("-recipe-milora")


def test_a_run_of_prompts_is_not_named_after_a_task():
    assert create("generate").path.name[6:] == "-milora-llama"


def test_an_exact_folder_is_taken_as_it_is():
    assert create(folder="outputs/x/y/job").path == Path("outputs/x/y/job")
    assert not Path("outputs/latest").exists()


def test_a_folder_called_latest_is_left_alone():
    Path("outputs/latest").mkdir(parents=True)
    assert create().path.is_dir()
    assert not Path("outputs/latest").is_symlink()


def test_outputs_that_cannot_be_written():
    Path("outputs").write_text("a file")
    with pytest.raises(UserError, match=r"outputs: cannot write to 'outputs'"):
        create()


@pytest.mark.parametrize("path", ["../x", "/tmp/x", "a/../../x", ".", ""])
def test_a_path_outside_the_folder_is_refused(path):
    with pytest.raises(UserError, match="outside the run folder"):
        create().file(path)


def test_a_link_that_leads_out_is_refused(tmp_path):
    run = create()
    (run.path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside the run folder"):
        run.file("link/x")


def test_history_is_appended_and_rewound():
    run = create()
    for step in (1, 2, 3):
        run.log({"step": step})
    with (run.path / "history.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # a kill came here
    assert [row["step"] for row in run.history()] == [1, 2, 3]
    run.rewind(2)
    assert [row["step"] for row in Run.open(run.path).history()] == [1, 2]
    run.rewind(0)
    assert run.history() == []


def test_how_a_run_ends():
    run = create()
    run.fail("broken", 2)
    assert (run.info["status"], run.info["error"], run.info["exit_code"]) == ("failed", "broken", 2)
    started, seconds = run.info["started"], run.info["seconds"]
    run.begin()
    assert (run.info["status"], run.info["started"]) == ("running", started)
    assert "error" not in run.info and "resumed" in run.info
    run.interrupt()
    assert run.info["status"] == "interrupted" and run.info["seconds"] >= seconds
    run.begin()
    run.finish({"test/accuracy": 0.5})
    again = Run.open(run.path)
    assert again.done and again.metrics == {"test/accuracy": 0.5} and again.info["peak_memory_bytes"] > 1e6


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts from the start")
def test_peak_memory_is_each_runs_own():
    large = create()
    large.begin()
    held = bytearray(b"x") * 2**28  # 256 MiB, every page written
    del held
    large.finish({})
    small = create()
    small.begin()
    small.finish({})
    assert large.info["peak_memory_bytes"] - small.info["peak_memory_bytes"] > 2**27


def test_a_process_lives_until_it_ends():
    from lowrank_cli.runs.process import began, is_alive, is_gone, this_process

    me, file = this_process(), Path("run.json")  # signs of life count on other machines only
    assert is_alive(me, file) and not is_alive(None, file) and not is_alive({**me, "began": -1}, file)
    assert not is_alive({**me, "pid": 2**30, "began": None}, file)
    assert is_gone({**me, "began": -1}, file) and not (is_gone(me, file) or is_gone(None, file))
    with subprocess.Popen(["sleep", "60"]) as other:
        record = {**me, "pid": other.pid, "began": began(other.pid)}
        assert is_alive(record, file)
        other.kill()
        other.wait()
    assert not is_alive(record, file)


def test_another_machine_shows_signs_of_life(monkeypatch):
    from lowrank_cli.runs import process
    from lowrank_cli.runs.process import is_alive, is_gone, showing_life, this_process

    file = Path("run.json")
    file.write_text("{}")
    other = {**this_process(), "host": "another"}
    assert is_alive(other, file) and not is_gone(other, file)
    os.utime(file, (0, 0))
    assert is_gone(other, file) and not is_alive(other, file)
    silent = {key: value for key, value in other.items() if key != "beat"}  # of an earlier version: nobody can tell
    assert not is_alive(silent, file) and not is_gone(silent, file)
    monkeypatch.setattr(process, "BEAT", 0.01)
    with showing_life(file):
        limit = time.monotonic() + 60
        while not is_alive(other, file):
            assert time.monotonic() < limit
            time.sleep(0.01)
    assert not is_gone(other, file)


def test_a_silent_run_writes_nothing():
    run = create()
    before = sorted(run.path.rglob("*")), run.info
    silent = Run.open(run.path, writes=False)
    silent.log({"step": 1})
    silent.write_text("a", "b")
    silent.finish({"test/accuracy": 1.0})
    assert (sorted(run.path.rglob("*")), Run.open(run.path).info) == before


def test_opening_what_is_no_run():
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        Run.open("nowhere")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        Run.open("empty")
    Path("empty/sweep.json").write_text("{}")
    with pytest.raises(UserError, match="a sweep; name one of its jobs"):
        Run.open("empty")
    Path("empty/run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read as JSON"):
        Run.open("empty")


def test_a_broken_config_names_the_file():
    run = create()
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml' cannot be read"):
        run.config()
    (run.path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="it is null; expected keys with values"):
        run.config()


def test_the_newest_finished_run_is_found():
    first, second, third = create(), create(choices={**CHOICES, "method": "lora"}), create()
    with pytest.raises(UserError, match="no finished run under 'outputs'; start one with: lrk train"):
        find(None, ("train",), "outputs")
    first.finish({})
    second.finish({})
    assert find(None, ("train",), "outputs").path == second.path
    assert find(None, ("train",), "outputs", {"method": "milora"}).path == first.path
    with pytest.raises(UserError, match="lrk train method=full"):
        find(None, ("train",), "outputs", {"method": "full"})
    with pytest.raises(UserError, match=r"not finished .* lrk train --resume"):
        find(third.path, ("train",), "outputs")
    with pytest.raises(UserError, match="is a run of train, not of evaluate"):
        find(first.path, ("evaluate",), "outputs")


def test_latest_stands_for_the_folder_it_points_at():
    run = create()
    assert Run.open("outputs/latest").path == run.path


def test_a_job_below_latest_keeps_its_folder_when_latest_moves_on():
    run = create()
    job = create(folder=run.path / "01-fit")
    found = Run.open("outputs/latest/01-fit")
    create()
    assert found.path == job.path and Run.open(found.path).info["stage"] == "train"
    assert settled("outputs/elsewhere") == Path("outputs/elsewhere")


def test_a_folder_that_is_not_there_has_a_nearest_match():
    run = create()
    with pytest.raises(UserError, match=f"; did you mean '{run.path.name}'"):
        Run.open(str(run.path)[:-1])


def test_a_recipe_is_no_training_run():
    run = create("run", {"recipe": "x"})
    run.write_json("recipe.json", {})
    with pytest.raises(UserError, match="is a recipe; name one of its stages"):
        find(run.path, ("train",), "outputs")


def test_all_runs_lists_jobs_and_stages_once():
    run = create()
    job = create(folder=run.path.with_name("sweep") / "job")
    part = create(folder=job.path / "01-train")
    assert [found.path for found in all_runs("outputs")] == [run.path, job.path, part.path]
    assert all_runs("nowhere") == []


def test_discard_takes_a_new_folder_back():
    first = create()
    second = create()
    discard(second.path, "outputs")
    assert Path("outputs/latest").resolve() == first.path.resolve()
    discard(first.path, "outputs")
    assert not Path("outputs").exists()


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    atomic_write("a", "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        atomic_write("a", "new")
    assert Path("a").read_text() == "old" and os.listdir() == ["a"]


def test_files_keep_the_usual_permissions():
    Path("plain").write_text("")
    atomic_write("atomic", b"")
    with atomic_folder("folder"):
        pass
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat("atomic").st_mode) == stat.S_IMODE(os.stat("plain").st_mode)
    assert stat.S_IMODE(os.stat("folder").st_mode) == 0o777 & ~mask


def test_a_folder_appears_whole_or_not_at_all():
    for content in ("one", "two"):
        with atomic_folder("final") as folder:
            (folder / "file").write_text(content)
            assert not (Path("final") / "file").exists() or content == "two"
        assert Path("final/file").read_text() == content
    with pytest.raises(RuntimeError), atomic_folder("final") as folder:
        (folder / "file").write_text("three")
        raise RuntimeError
    assert Path("final/file").read_text() == "two" and os.listdir() == ["final"]


def test_the_hash_is_of_what_decides_the_result():
    config = {"seed": 0, "outputs": "a", "name": None}
    assert config_hash(config) == config_hash({"name": "x", "outputs": "b", "seed": 0})
    assert config_hash(config) != config_hash({**config, "seed": 1})


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_state() is None
    assert runs.peak_memory_bytes() > 1e6


@pytest.fixture
def versions_are_read():
    """They are read once in a process, and here once more."""
    provenance.untested_versions.cache_clear()
    yield
    provenance.untested_versions.cache_clear()


def test_versions_outside_the_declared_ranges_are_named(monkeypatch, versions_are_read):
    class Distribution:
        metadata = Message()
        requires = (
            "pyyaml<1,>=0.5",
            "numpy>=1",
            "rich<1; extra == 'fast'",
            "absent<1; extra == 'fast'",
            "pytest<1; extra == 'dev'",
            "typer<0.1; python_version < '3'",
        )

    def version(name):
        if name == "absent":
            raise provenance.metadata.PackageNotFoundError(name)
        return {"numpy": "3.0rc1", "rich": "15.0+local"}.get(name, "6.0")

    Distribution.metadata["Provides-Extra"] = "fast"
    Distribution.metadata["Provides-Extra"] = "dev"
    monkeypatch.setattr(provenance.metadata, "distribution", lambda name: Distribution)
    monkeypatch.setattr(provenance.metadata, "version", version)
    named = ["pyyaml 6.0 (tested: <1,>=0.5)", "rich 15.0+local (tested: <1)"]
    assert list(provenance.untested_versions()) == named
    assert create().info["untested"] == named


def test_a_run_says_that_versions_are_untested(lrk, fake_stages, monkeypatch, versions_are_read):
    installed = provenance.metadata.version
    monkeypatch.setattr(
        provenance.metadata, "version", lambda name: "99.0" if name == "transformers" else installed(name)
    )
    ended = lrk("train", "train.max_steps=1")
    lines = [line for line in ended.err.splitlines() if line.startswith("warning: untested versions: ")]
    assert ended.code == 0 and len(lines) == 1 and "transformers 99.0 (tested: " in lines[0]
    info = json.loads(Path("outputs/latest/run.json").read_text())
    assert any(item.startswith("transformers 99.0 (") for item in info["untested"])
    assert lrk("train", "--dry-run").err == ""
