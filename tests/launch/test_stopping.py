"""Signals: what stops, when, with which exit code, and what is left to continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from command import runs
from forked import Lrk

from lowrank_cli.errors import Interrupted
from lowrank_cli.launch import stage
from lowrank_cli.runs import Run, progress, stopping
from lowrank_cli.runs.stopping import Stop
from lowrank_cli.stages.train import Trainer

WAITS = ("train", "seed=77", "train.max_steps=3", "train.warmup=0.1")
PARALLEL = ("train", "-m", "train.max_steps=3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def send(number: int) -> None:
    """A signal to this process; Python handles it before the next line."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


def test_a_parent_that_has_ended_already_is_noticed():
    noticed = Event()
    ended = subprocess.Popen(["true"])
    ended.wait()
    stopping.with_parent(noticed.set, ended.pid)
    assert noticed.wait(10)


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a script's background
class Cli:
    def main(): os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C before the command line handles it
sys.modules["lowrank_cli.cli"] = Cli
import lowrank_cli
lowrank_cli.cli = Cli
from lowrank_cli.__main__ import main
main()
"""
ENDING = """
import os, signal
from lowrank_cli.runs import stopping
stopping.finish(3)
os.kill(os.getpid(), signal.{})
[None for _ in range(1000)]
"""


def run_program(program: str) -> tuple[int, str]:
    """The exit code and the stderr of a Python program."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_ctrl_c_while_the_program_is_imported_leaves_no_traceback():
    assert run_program(IMPORTING) == (-signal.SIGINT, "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_after_the_work_ends_the_process_with_its_code(name):
    assert run_program(ENDING.format(name)) == (3, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_first_signal_raises_and_gives_the_exit_code(number, code):
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    with stopping.signals():
        assert not stopping.requested() and stopping.exit_code() == 130
        with pytest.raises(Stop):
            send(number)
        assert stopping.requested() and stopping.exit_code() == code
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before


def test_a_loop_may_finish_its_step_but_a_second_signal_ends_it(monkeypatch):
    with stopping.signals(), stopping.on_stop(lambda: None):
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # `timeout` sends it twice
        stopping.check()
        monkeypatch.setattr(stopping, "DEBOUNCE", 0.0)
        send(signal.SIGUSR1)  # asks, and never insists
        with pytest.raises(Stop):
            send(signal.SIGTERM)


@pytest.mark.parametrize("every", [0, 5])
def test_a_scoring_inside_training_stops_at_once_where_checkpoints_were_written(every):
    """Without any, the step ends first, and its checkpoint is where the run goes on."""
    reached = []
    bar = SimpleNamespace(watch=lambda name, total: nullcontext(lambda count: None))
    trainer = SimpleNamespace(settings=SimpleNamespace(checkpoint_every=every), bar=bar)
    with (
        stopping.signals(),
        stopping.on_stop(lambda: None),
        pytest.raises(Stop) if every else nullcontext(),
        Trainer.watch(trainer, "scoring", 2) as tick,
    ):
        send(signal.SIGTERM)
        reached.append("the next pass")
        tick(1)
    assert bool(reached) == (every == 0)


def test_a_swallowed_interrupt_is_raised_again_where_a_loop_counts():
    with stopping.signals(), progress.bar("evaluating", 2, shown=False) as bar:
        with suppress(BaseException):
            send(signal.SIGTERM)
        with pytest.raises(Stop):
            bar.advance()


def test_a_stop_before_the_work_counts_when_it_begins():
    called = []
    with stopping.signals():
        with pytest.raises(Stop):
            send(signal.SIGTERM)
        with stopping.on_stop(lambda: called.append("stop")):
            assert called == ["stop"]


def test_whatever_a_library_makes_of_the_interrupt_the_run_was_interrupted(lrk, fake_stages):
    lrk("train", "train.learning_rate=2", "train.max_steps=3")
    run = Run.open(runs()[0])
    says = pytest.raises(Interrupted, match="continue with: lrk train --resume")
    with stopping.signals(), says as raised, stage.recorded(run):
        try:
            send(signal.SIGTERM)
        except Stop:
            raise ImportError("numpy failed to import") from None
    assert raised.value.exit_code == 143 and Run.open(run.path).info["status"] == "interrupted"


@pytest.fixture
def start(fake_stages):
    """``start(*arguments)`` is ``lrk`` in a process of its own, as soon as a file like ``seen`` lies there."""

    def call(*arguments: str, seen: str = "outputs/*/*/waiting") -> Lrk:
        process = Lrk(*arguments)
        limit = time.monotonic() + 120
        while not list(Path().glob(seen)):
            assert process.poll() is None, process.errors()
            assert time.monotonic() < limit
            time.sleep(0.05)
        return process

    return call


def ended(process: Lrk) -> tuple[int, str]:
    """The exit code and the last line of stderr."""
    return process.wait(), process.errors().splitlines()[-1]


def states(sweep: Path) -> dict[str, str]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    return {job["id"].partition("-")[2]: job["status"] for job in jobs}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_that_says_how_to_go_on(start, number, code):
    process = start(*WAITS)
    process.send_signal(number)
    assert ended(process) == (code, f"interrupted: continue with: lrk train --resume {runs()[0]}")
    assert Run.open(runs()[0]).info["status"] == "interrupted"


@pytest.mark.slow
def test_a_signal_before_the_run_is_one_line(monkeypatch, lrk):
    monkeypatch.setattr("lowrank_cli.launch.single_run.start", lambda *a, **k: send(signal.SIGTERM))
    done = lrk("train")
    assert (done.code, done.err) == (143, "interrupted: nothing was started\n")


@pytest.mark.slow
def test_a_signal_reaches_both_processes(start):
    process = start(*WAITS, "hardware.processes=2")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, f"interrupted: continue with: lrk train --resume {runs()[0]}")
    assert Run.open(runs()[0]).info["status"] == "interrupted"


@pytest.mark.slow
def test_a_killed_worker_is_named(start):
    process = start(*WAITS, "hardware.processes=2")
    import psutil

    workers = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    workers["1"].kill()
    code, line = ended(process)
    assert code == 1 and line == f"error: worker process 1 (pid {workers['1'].pid}) was killed (SIGKILL)"
    assert Run.open(runs()[0]).info["status"] == "failed"


@pytest.mark.slow
def test_a_signal_to_a_sweep_reaches_its_jobs(start):
    """Only to the process that was called, as a batch system does."""
    process = start(*PARALLEL, "seed=77,0,1", seen="outputs/*/*/*/waiting")
    process.send_signal(signal.SIGTERM)
    (sweep,) = runs()
    assert ended(process) == (143, f"interrupted: continue with: lrk train -m --resume {sweep}")
    assert states(sweep)["seed77"] == "interrupted" and not list(sweep.glob(".stop"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the job", "the launcher's process"])
def test_a_killed_job_leaves_the_others_alone(start, victim):
    import psutil

    process = start(*PARALLEL, "seed=77,0,1,2", seen="outputs/*/*/*/waiting")
    (waiting,) = Path().glob("outputs/*/*/*/waiting")
    job = psutil.Process(Run.open(waiting.parent).info["process"]["pid"])
    waiting.with_name("go").touch()  # a second attempt does not wait
    (job if victim == "the job" else job.parent()).kill()
    (sweep,) = runs()
    code, line = ended(process)
    done = {"seed0": "done", "seed1": "done", "seed2": "done"}
    if victim == "the job":
        assert code == 1 and line.startswith("error: 1 of 4 jobs is not done; continue with: lrk train -m --resume")
        assert states(sweep) == {**done, "seed77": "failed"}
        assert Run.open(waiting.parent).info["error"] == "its process was killed (SIGKILL)"
    else:
        assert code == 0 and states(sweep) == {**done, "seed77": "done"}
