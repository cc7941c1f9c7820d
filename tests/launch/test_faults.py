"""What a machine refuses and what a kill leaves: one line, nothing half-written taken for whole, and a way on."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import ROOT, one_line, runs
from safetensors.torch import save_file

from lowrank_cli.errors import refusal
from lowrank_cli.report import plots
from lowrank_cli.runs import Run, atomic_folder, atomic_write
from lowrank_cli.runs.files import remove_leftovers

STEPS = ("train.max_steps=3", "train.warmup=0.1")


def history(run: Run) -> list[tuple[int, bool]]:
    return [(row["step"], row["resumed"]) for row in run.history()]


@pytest.fixture
def full_disk(monkeypatch):
    """Call with a number: after so many more files nothing is written to disk."""
    fsync, left = os.fsync, [10**6]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    return lambda room: left.__setitem__(0, room)


@pytest.mark.parametrize("room", [0, 1])
def test_a_run_that_finds_no_room_leaves_nothing(lrk, fake_stages, full_disk, room):
    full_disk(room)
    ended = lrk("train", *STEPS)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("error: No space left on device: '") and not Path("outputs").exists()


def test_a_sweep_that_finds_no_room_leaves_nothing(lrk, fake_stages, full_disk):
    full_disk(3)
    ended = lrk("train", "-m", "seed=0,1", *STEPS)
    assert ended.code == 1 and ended.err.startswith("error: No space left on device") and not Path("outputs").exists()


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(lrk, fake_stages, full_disk):
    full_disk(3)  # config.yaml, and run.json when it was made and when it began
    ended = lrk("train", *STEPS)
    (path,) = runs()
    assert (ended.code, ended.err) == (
        1,
        f"error: No space left on device: '{path.absolute() / 'metrics.json'}'; "
        f"continue with: lrk train --resume {path}\n",
    )
    assert json.loads((path / "run.json").read_text())["status"] == "running"  # no room to say more
    assert not (path / "metrics.json").exists() and not list(path.glob(".*"))
    full_disk(10**6)
    assert lrk("train", "--resume", str(path)).code == 0 and Run.open(path).done


def test_a_file_that_grows_too_large_is_refused_by_name():
    """safetensors is written in Rust, and its errors are not OSErrors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(Exception) as large, atomic_folder("adapter") as folder:
            save_file({"a": torch.zeros(10_000)}, folder / "a.safetensors")
        with pytest.raises(OSError) as also:
            atomic_write("file", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal(large.value) == "File too large" and refusal(also.value) == "File too large: 'file'"
    assert os.listdir() == []
    assert refusal(ValueError("no")) is None and refusal(FileNotFoundError(errno.ENOENT, "no")) is None


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 300 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_the_old_file_survives_on_a_full_file_system(tmpfs):
    with atomic_folder(tmpfs / "step") as folder:
        (folder / "a").write_bytes(b"old" * 50_000)
    with pytest.raises(OSError) as full, atomic_folder(tmpfs / "step") as folder:
        (folder / "a").write_bytes(b"new" * 100_000)
    assert "No space left on device" in str(refusal(full.value))
    assert os.listdir(tmpfs) == ["step"] and (tmpfs / "step" / "a").read_bytes() == b"old" * 50_000
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmpfs / "b", "x" * 300_000)
    assert os.listdir(tmpfs) == ["step"]


def test_what_a_kill_leaves_is_removed_and_what_it_moved_aside_comes_back():
    for name in (".step-0000050-abcd1234", ".adapter-x_2y3z4a", ".adapter-x_2y3z4a.old", ".best-x_2y3z4a.old", "best"):
        Path("run/checkpoints", name).mkdir(parents=True)
        Path("run/checkpoints", name, "file").write_text(name)
    Path("run/.run.json-abcd1234").write_text("{")
    Path("run/.notes").write_text("mine")
    remove_leftovers(Path("run"))
    assert sorted(os.listdir("run")) == [".notes", "checkpoints"]
    assert sorted(os.listdir("run/checkpoints")) == ["adapter", "best"]
    assert Path("run/checkpoints/adapter/file").read_text() == ".adapter-x_2y3z4a.old"
    assert Path("run/checkpoints/best/file").read_text() == "best"


def test_a_resumed_run_starts_without_leftovers(lrk, fake_stages):
    lrk("train", "train.warmup=1", "train.max_steps=3")
    (path,) = runs()
    (path / ".adapter-abcd1234").mkdir()
    assert lrk("train", "--resume", str(path)).code == 0
    assert not list(path.glob(".*"))


def test_plots_that_a_kill_prevented_are_drawn_on_resume(lrk, fake_stages, monkeypatch):
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw", interrupted)
        assert lrk("train", *STEPS).code == 130
    run = Run.open(runs()[0])
    assert run.info["status"] == "interrupted" and run.metrics["train/steps"] == 3
    assert lrk("train", "--resume", str(run.path)).code == 0
    run = Run.open(run.path)
    assert run.done and (run.path / "plots" / "loss.png").is_file()
    assert history(run) == [(1, False), (2, False), (3, False)]  # the work was not repeated


def test_a_run_that_goes_on_elsewhere_is_left_alone(lrk, fake_stages):
    lrk("train", "train.warmup=1", "train.max_steps=3")
    run = Run.open(runs()[0])
    from lowrank_cli.runs import this_process

    run.update(status="running", process={**this_process(), "host": "node7"})
    assert "running" in lrk("list", "runs").out
    ended = lrk("train", "--resume", str(run.path))
    says = f"error: --resume: '{run.path}' is running on 'node7'; end that first; after a kill, wait 120 s\n"
    assert (ended.code, ended.err) == (2, says)
    os.utime(run.path / "run.json", (0, 0))
    assert "interrupted" in lrk("list", "runs").out and "running" not in lrk("list", "runs").out
    assert lrk("train", "--resume", str(run.path)).code == 0


def test_a_deleted_directory_is_one_line(lrk):
    folder = Path("gone").absolute()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    assert one_line(lrk("train", "--dry-run")) == "the current directory was deleted; go to another one"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["list", "tasks"], ["train", "--dry-run"]])
def test_output_that_is_not_taken_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_cli", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_pipe_that_nobody_reads_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lowrank_cli", "train", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
