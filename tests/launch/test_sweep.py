"""Sweeps: job folders, failures that spare the others, the ledger, resuming, both launchers, evaluate and recipes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import one_line, runs
from forked import Lrk
from joblib.externals.loky import get_reusable_executor

from lowrank_cli.errors import UserError
from lowrank_cli.launch.gpu_locks import claim_gpu
from lowrank_cli.runs import this_process
from lowrank_cli.runs.process import began

pytestmark = pytest.mark.usefixtures("fake_stages")
STEPS = ("train.max_steps=3", "train.warmup=0.1")


def ledger(sweep: Path) -> dict:
    return json.loads((sweep / "sweep.json").read_text())


def states(sweep: Path) -> dict[str, str]:
    """Label of each job, without its hash, and how it stands in its own folder."""
    found = {}
    for job in ledger(sweep)["jobs"]:
        status = json.loads((sweep / job["id"] / "run.json").read_text())["status"]
        assert job["status"] == status
        found[job["id"].partition("-")[2]] = status
    return found


@pytest.mark.slow
def test_a_sweep_runs_every_combination(lrk):
    ended = lrk("train", "-m", "method=lora,milora", "seed=0,1", *STEPS, "name=try")
    assert ended.code == 0, ended.err
    (sweep,) = runs()
    assert sweep.name.endswith("-sweep-try") and Path("outputs/latest").resolve() == sweep.resolve()
    assert states(sweep) == dict.fromkeys(["lora-seed0", "lora-seed1", "milora-seed0", "milora-seed1"], "done")
    assert sorted(entry.name for entry in sweep.iterdir() if entry.is_file()) == ["sweep.json"]
    assert (ledger(sweep)["status"], ledger(sweep)["overrides"][0]) == ("done", "method=lora,milora")
    assert ended.out.count("done") == 4 and "0.5100" in ended.out
    job = sweep / ledger(sweep)["jobs"][0]["id"]
    info = json.loads((job / "run.json").read_text())
    assert info["command"] == f"lrk train method=lora seed=0 {' '.join(STEPS)} name=try"
    assert info["config_hash"].startswith(job.name.partition("-")[0])
    assert not list(Path().glob("multirun*")) and not list(sweep.rglob(".hydra"))


def test_libraries_keep_their_logging(lrk):
    class Handler(logging.Handler):
        closed = False

        def close(self):
            self.closed = True
            super().close()

    handler, logger = Handler(), logging.getLogger("a.library")
    assert lrk("train", "-m", "seed=0,1", "train.max_steps=1").code == 0
    assert not handler.closed and not logger.disabled


def test_a_failed_job_spares_the_others(lrk):
    ended = lrk("train", "-m", "train.learning_rate=0.1,2", "train.weight_decay=9,0", *STEPS)
    (sweep,) = runs()
    assert ended.code == 1
    assert f"3 of 4 jobs are not done; continue with: lrk train -m --resume {sweep}" in ended.err
    assert list(states(sweep).values()) == ["failed", "done", "failed", "failed"]
    assert ledger(sweep)["status"] == "failed"
    bug = sweep / ledger(sweep)["jobs"][0]["id"]
    assert "RuntimeError: a bug" in (bug / "error.txt").read_text()
    assert "train/loss is nan" in ended.out


def test_resume_runs_only_what_is_not_done(lrk):
    lrk("train", "-m", "train.learning_rate=0.1,2", *STEPS)
    (sweep,) = runs()
    assert list(states(sweep).values()) == ["done", "failed"]
    before = {path: path.read_text() for path in sweep.rglob("history.jsonl")}
    Path("mended").touch()
    ended = lrk("train", "--resume", str(sweep))
    assert ended.code == 0 and list(states(sweep).values()) == ["done", "done"]
    after = {path: path.read_text() for path in sweep.rglob("history.jsonl")}
    (changed,) = [path for path in after if after[path] != before[path]]
    rows = [json.loads(line) for line in after[changed].splitlines()]
    assert [(row["step"], row["resumed"]) for row in rows] == [(1, False), (2, True), (3, True)]
    assert len(runs()) == 1
    assert "all jobs of" in lrk("train", "-m", "--resume", str(sweep)).err
    assert "a sweep of train, not of evaluate" in lrk("evaluate", "--resume", str(sweep)).err


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(lrk):
    ended = lrk("train", "-m", "train.warmup=0.1,1,0.2", "train.max_steps=3")
    (sweep,) = runs()
    assert (ended.code, ended.err.splitlines()[-1]) == (
        130,
        f"interrupted: continue with: lrk train -m --resume {sweep}",
    )
    assert list(states(sweep).values()) == ["done", "interrupted", "pending"]
    assert ledger(sweep)["status"] == "interrupted"
    assert lrk("train", "-m", "--resume", str(sweep)).code == 0
    assert set(states(sweep).values()) == {"done"}


def test_a_sweep_that_another_process_works_on_is_left_alone(lrk):
    lrk("train", "-m", "train.learning_rate=0.1,2", *STEPS)
    (sweep,) = runs()
    asked, job = ledger(sweep), sweep / ledger(sweep)["jobs"][1]["id"] / "run.json"
    failed = json.loads(job.read_text())
    with subprocess.Popen(["sleep", "60"]) as other:
        living = {**this_process(), "pid": other.pid, "began": began(other.pid)}
        for at, record, name in ((sweep / "sweep.json", asked, sweep), (job, failed, job.parent)):
            at.write_text(json.dumps({**record, "status": "running", "process": living}))
            ended = lrk("train", "--resume", str(sweep))
            assert (ended.code, ended.out) == (2, "")
            assert ended.err == f"error: --resume: '{name}' is running (process {other.pid}); end that first\n"
            at.write_text(json.dumps(record))
        other.kill()
    Path("mended").touch()
    assert lrk("train", "--resume", str(sweep)).code == 0 and "process" not in ledger(sweep)


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(lrk):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    ended = lrk("train", "-m", "train.learning_rate=0.1,2", "seed=0,1", *STEPS, *launcher)
    (sweep,) = runs()
    assert ended.code == 1 and sorted(states(sweep).values()) == ["done", "done", "failed", "failed"]
    failed = [sweep / job["id"] for job in ledger(sweep)["jobs"] if job["status"] == "failed"]
    assert all("error: train/loss is nan" in (job / "log.txt").read_text() for job in failed)
    Path("mended").touch()
    assert lrk("train", "-m", "--resume", str(sweep)).code == 0
    assert set(states(sweep).values()) == {"done"}


def test_a_sweep_of_evaluations(lrk):
    lrk("train", "method=lora", *STEPS)
    ended = lrk("evaluate", "-m", "evaluate.shots=0,4", "seed=0,1")
    assert ended.code == 0, ended.err
    assert list(states(runs()[1])) == ["shots0-seed0", "shots0-seed1", "shots4-seed0", "shots4-seed1"]
    saved = [path.read_text() for path in runs()[1].glob("*/config.yaml")]
    assert all(f"run: {runs()[0].absolute()}" in text and "name: lora" in text for text in saved)
    assert lrk("evaluate", "-m", f"run={runs()[0]},{runs()[0]}").code == 0


def test_a_sweep_of_recipes(lrk):
    ended = lrk("run", "-m", "recipe=milora", "seed=0,1", *STEPS)
    assert ended.code == 0, ended.err
    (sweep,) = runs()
    assert states(sweep) == {"seed0": "done", "seed1": "done"}
    assert len(list(sweep.glob("*/02-test/metrics.json"))) == 2
    assert [json.loads(p.read_text())["seed"] for p in sorted(sweep.glob("*seed1/0*/run.json"))] == [1, 1]


def test_equal_jobs_run_once(lrk):
    ended = lrk("train", "-m", "seed=0,0", *STEPS)
    assert f"  folder: {runs()[0]}\n  next: lrk compare {runs()[0]}\n" in ended.out
    assert len(ledger(runs()[0])["jobs"]) == 1


@pytest.mark.parametrize("verb", ["train", "evaluate", "run"])
def test_a_sweep_over_nothing_is_refused(lrk, verb):
    assert one_line(lrk(verb, "-m", "hydra/launcher=joblib", "seed=1")).startswith("-m: nothing to sweep over; give")


def test_one_job_is_named_in_the_singular(lrk):
    ended = lrk("train", "-m", "train.learning_rate=2,2", *STEPS)
    assert f"  folder: {runs()[0]}\n" in ended.out and "next:" not in ended.out
    assert "error: 1 of 1 job is not done; " in ended.err and "1 job, 1 not done" in ended.out


def test_nothing_starts_where_one_job_is_wrong(lrk):
    assert "no stage train" in one_line(lrk("train", "-m", "method=lora,none"))


def test_a_job_that_dies_is_told_apart(lrk, monkeypatch):
    """The launcher's process ends without a word: the folder says running, the ledger must not."""
    lrk("train", "-m", "train.warmup=1", "seed=0,1", "train.max_steps=3")
    (sweep,) = runs()
    first = sweep / ledger(sweep)["jobs"][0]["id"] / "run.json"
    first.write_text(json.dumps({**json.loads(first.read_text()), "status": "running"}))
    monkeypatch.setattr("lowrank_cli.launch.sweep.Launcher.launch", lambda *a: None)
    ended = lrk("train", "--resume", str(sweep))
    assert ended.code == 1 and list(states(sweep).values()) == ["failed", "failed"]
    assert "its process ended without a result" in ended.out


@pytest.mark.slow
def test_ctrl_c_reaches_joblib():
    """A real signal to a real process group: finished jobs stay, the others say interrupted."""
    process = Lrk("train", "-m", "seed=0,77", *STEPS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    wait_for("waiting")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130, process.errors()
    (sweep,) = runs()
    assert states(sweep)["seed77"] == "interrupted" and ledger(sweep)["status"] == "interrupted"


TAKES_ONE = """
import os, sys, time
from pathlib import Path
from lowrank_cli.launch.gpu_locks import claim_gpu
for _ in range(2):  # the second job of a process stays where the first one was
    claim_gpu(Path("locks"))
print(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"), flush=True)
sys.stdin.read()
"""


def test_processes_side_by_side_share_the_gpus_evenly(monkeypatch):
    with ExitStack() as stack:

        def start(visible: str) -> subprocess.Popen:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            command = [sys.executable, "-c", TAKES_ONE]
            made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(made)
            return made

        def taken(process: subprocess.Popen) -> str:
            return process.stdout.readline().strip()

        several = [start("4,GPU-7") for _ in range(4)]
        found = [taken(process) for process in several]
        assert sorted(found) == ["4", "4", "GPU-7", "GPU-7"]
        several[0].communicate()  # it ends, and its place is free again
        assert taken(start("4,GPU-7")) == found[0]
        assert taken(start("3")) == "3"


def test_locks_behind_a_link_of_a_given_sweep_are_not_made(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    Path("elsewhere").mkdir()
    Path("locks").symlink_to("elsewhere")
    with pytest.raises(UserError, match="locks: is a link"):
        claim_gpu(Path("locks"))
    Path("real").mkdir()
    Path("real/4-0").symlink_to("../elsewhere/made")
    with pytest.raises(OSError):
        claim_gpu(Path("real"))
    assert not list(Path("elsewhere").iterdir())


@pytest.mark.slow
def test_joblib_jobs_on_gpus_get_one_each_and_others_are_left_alone(lrk, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    get_reusable_executor().shutdown()  # processes of earlier sweeps have an environment of their own
    asked = ("-m", "seed=0,1", *STEPS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    for hardware, allowed in (("cpu", {"0,1"}), ("gpu", {"0", "1"})):
        assert lrk("train", *asked, f"hardware={hardware}", f"name={hardware}").code == 0
        (sweep,) = [path for path in runs() if path.name.endswith(f"-sweep-{hardware}")]
        logged = [(sweep / job["id"] / "history.jsonl").read_text() for job in ledger(sweep)["jobs"]]
        assert {json.loads(text.splitlines()[0])["devices"] for text in logged} <= allowed


@pytest.fixture(params=["submitit_local", "ray"])
def launcher(request, monkeypatch):
    """The override of a launcher whose plugin is installed."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))  # Ray keeps a token there
    pytest.importorskip(f"hydra_plugins.hydra_{request.param.partition('_')[0]}_launcher")
    return f"hydra/launcher={request.param}"


def wait_for(pattern: str) -> Path:
    """The first file of a pattern in a job's folder, once it is there."""
    while not (found := sorted(Path("outputs").glob(f"*/*/*/{pattern}"))):
        time.sleep(0.1)
    return found[0]


@pytest.mark.slow
def test_a_launcher_loses_nothing_when_a_job_is_killed(launcher):
    """Statuses and tracebacks are there at once; the others end as they would; --resume runs the rest alone."""
    process = Lrk("train", "-m", "seed=77,0", "train.weight_decay=0,9", *STEPS, launcher)
    traceback, waiting = wait_for("error.txt"), wait_for("waiting")
    assert "RuntimeError: a bug" in traceback.read_text()
    assert json.loads((traceback.parent / "run.json").read_text())["status"] == "failed"
    os.kill(json.loads((waiting.parent / "run.json").read_text())["process"]["pid"], signal.SIGKILL)
    code, err = process.wait(300), process.errors()
    (sweep,) = runs()
    assert code == 1 and "3 of 4 jobs are not done; continue with: lrk train -m --resume" in err, err
    assert states(sweep) == {
        "seed77-weight_decay0": "failed",
        "seed77-weight_decay9": "failed",
        "seed0-weight_decay0": "done",
        "seed0-weight_decay9": "failed",
    }
    info = json.loads((waiting.parent / "run.json").read_text())
    assert info["error"] == "its process was killed (SIGKILL)"
    assert info["config_hash"].startswith(waiting.parent.name.partition("-")[0])
    (waiting.parent / "go").touch()
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*-seed0-weight_decay0/run.json")}
    process = Lrk("train", "-m", "--resume", str(sweep))
    process.wait(300)
    err = process.errors()
    assert "2 of 4 jobs are not done" in err and states(sweep)["seed77-weight_decay0"] == "done", err
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_submitit_loses_nothing_when_its_own_process_is_killed():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = Lrk("train", "-m", "seed=77,0,1", *STEPS, "hydra/launcher=submitit_local")
    waiting = wait_for("waiting")
    pid = json.loads((waiting.parent / "run.json").read_text())["process"]["pid"]
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    assert process.wait(300) == 1, process.errors()
    (sweep,) = runs()
    assert states(sweep) == {"seed77": "interrupted", "seed0": "done", "seed1": "done"}
    (waiting.parent / "go").touch()
    process = Lrk("train", "-m", "--resume", str(sweep))
    assert process.wait(300) == 0 and set(states(sweep).values()) == {"done"}, process.errors()


def test_a_sweep_on_slurm_composes(lrk):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=120", "hydra.launcher.gpus_per_node=1")
    ended = lrk("check", "train", "-m", "method=lora,milora", "seed=0,1,2", *slurm)
    assert ended.code == 0 and "6 runs" in ended.out, ended.err
    wrong = one_line(lrk("train", "-m", "seed=0,1", slurm[0], "hydra.launcher.timeout_mni=120"))
    assert wrong == "hydra.launcher.timeout_mni: unknown key"
