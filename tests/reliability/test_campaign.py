"""The bounded campaign, of which no trial may fail; what trials call wrong, and the table of what they found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import table
from .command import Ended
from .trial import Failed, Result, judge

ROOT = Path(__file__).resolve().parents[2]
TRACEBACK = 'Traceback (most recent call last):\n  File "/x/lowrank_cli/a.py", line 3, in f\nKeyError: 1\n'


@pytest.mark.slow
def test_no_trial_fails(tmp_path):
    """All families in one process: they share its imports and the runs that trials start from."""
    command = [sys.executable, "-m", "tests.reliability", "--samples", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def ended(code: int | None, out: str = "", err: str = "", reports: tuple[str, ...] = ()) -> Ended:
    return Ended(("train",), code, out, err, reports, 1.0)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (ended(1, err=TRACEBACK), "traceback: KeyError: 1 at lowrank_cli/a.py:3"),
        (ended(-11), "exit code -11"),
        (ended(None), "did not end"),
        (ended(2), "0 error lines"),
        (ended(2, err="error: a\nerror: run.json b\n"), "2 error lines"),
        (ended(2, err="error: run.json b\nmore\n"), "where one at the end is wanted"),
        (ended(2, err="error: something is wrong\n"), "names none of run.json"),
        (ended(2, err=f"error: run.json {'x' * 2000}\n"), "an error line of"),
        (ended(0, out="\x1b]0;title\x07"), "stdout holds '\\x1b' raw"),
        (ended(0, reports=("writes '/etc/passwd'",)), "writes '/etc/passwd'"),
    ],
)
def test_what_a_trial_calls_a_failure(how, reason):
    with pytest.raises(Failed) as failed:
        judge(how, names=["run.json"])
    assert reason in str(failed.value)


def test_what_a_trial_calls_right():
    judge(ended(0, out="done\n"))
    judge(ended(2, err="a warning\nerror: 'run.json' cannot be read\n"), names=["run.json"])


def test_the_record_gives_the_table(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    file = tmp_path / "explanation" / "reliability.md"
    file.parent.mkdir()
    file.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    record = tmp_path / "record.jsonl"
    for seed, seconds in enumerate((1.0, 3.0)):
        table.append(record, Result("stops", seed, "passed", "train", figures={"train SIGTERM": seconds}))
    table.append(record, Result("kills", 7, "failed", "lora", "differs"))
    monkeypatch.setattr(table, "commit", lambda: "of other code")
    table.append(record, Result("kills", 8, "failed", "lora", "differs"))
    monkeypatch.undo()
    results = table.read(record).values()
    assert [(result.family, result.seed) for result in results] == [("stops", 0), ("stops", 1), ("kills", 7)]
    table.write(results, {"kills": "killed", "stops": "stopped"}, tmp_path)
    page = file.read_text()
    assert page.startswith("before\n") and page.endswith(f"{table.END}\nafter\n") and "old" not in page
    assert "| `kills` | killed | 1 | 1 | 0 |" in page and "| train | SIGTERM | 2 | 2.0 | 3.0 |" in page
    (failure,) = json.loads((tmp_path / "results" / "reliability.json").read_text())["families"][0]["failures"]
    assert failure["trial"] == "python -m tests.reliability kills --seed 7"


@pytest.mark.parametrize(
    "act",
    ["open(path, 'w')", "os.mkdir(path)", "os.symlink('x', path)", "os.replace('inside', path)", "os.system('id')"],
)
def test_the_guard_refuses(tmp_path, act):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "inside").touch()
    code = (
        "import os, sys; from tests.reliability.command import guard; os.chdir('work'); "
        f"sys.addaudithook(guard(['.'], 2)); open('allowed', 'w').close(); path = '../outside'; {act}"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "PermissionError: the guard of a trial refuses" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["allowed", "inside", "work"]
