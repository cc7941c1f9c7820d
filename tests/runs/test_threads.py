"""CPU threads fit the model and the machine, and a resumed run keeps those it began with."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command import runs

from lowrank_cli.runs import threads
from lowrank_cli.runs.threads import Threads, available_cores, cgroup_cores, choose, let_waiting_threads_sleep
from lowrank_cli.schema import HardwareConfig
from lowrank_cli.session.device import prepare

QUICK = ["task.limit=8", "train.batch_size=4", "train.max_steps=1"]


@pytest.fixture
def machine(monkeypatch):
    """Eight cores, no limits."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "cgroup_cores", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(("width", "count"), [(32, 1), (64, 1), (127, 1), (128, 2), (320, 5), (4096, 8)])
def test_a_wide_model_gets_more_threads_than_a_narrow_one(machine, width, count):
    assert choose(None, width).count == count


def test_the_setting_wins(machine):
    assert choose(3, 64) == Threads(3, "hardware.threads")


def test_the_tightest_limit_counts(machine):
    assert available_cores() == Threads(8, "all cores")
    machine.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert available_cores() == Threads(5, "the cores given to this process")
    machine.setattr(threads, "cgroup_cores", lambda: 3.5)
    assert available_cores() == Threads(3, "cgroup limit of 3.5 cores")
    machine.setenv("OMP_NUM_THREADS", "2")
    assert available_cores() == Threads(2, "OMP_NUM_THREADS")
    assert choose(None, 4096).count == 2


@pytest.mark.parametrize("value", ["", "many", "0", "-1"])
def test_a_thread_count_that_is_none_is_ignored(machine, value):
    machine.setenv("OMP_NUM_THREADS", value)
    assert available_cores().count == 8


def test_less_than_a_core_still_is_one_thread(machine):
    machine.setattr(threads, "cgroup_cores", lambda: 0.5)
    assert choose(None, 4096) == Threads(1, "cgroup limit of 0.5 cores")


def test_cgroup_limits_of_version_2_are_read_up_to_the_root(tmp_path):
    inner = tmp_path / "cgroup" / "user" / "job"
    inner.mkdir(parents=True)
    process = tmp_path / "self"
    process.write_text("0::/user/job\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cgroup_cores(tmp_path / "cgroup", process) is None
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert cgroup_cores(tmp_path / "cgroup", process) == 2.5


def test_cgroup_limits_of_version_1_are_read(tmp_path):
    folder = tmp_path / "cgroup" / "cpu" / "job"
    folder.mkdir(parents=True)
    process = tmp_path / "self"
    process.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    (folder / "cpu.cfs_quota_us").write_text("150000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cores(tmp_path / "cgroup", process) == 1.5
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_cores(tmp_path / "cgroup", process) is None


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_cores(tmp_path, tmp_path / "nothing") is None


def test_waiting_threads_sleep_unless_the_user_decided(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_waiting_threads_sleep()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_waiting_threads_sleep()
    assert os.environ["GOMP_SPINCOUNT"] == str(threads.SPINS)


def test_the_command_sets_it_before_torch_comes():
    program = (
        "import sys, os; sys.argv = ['lrk', '--version']\n"
        "from lowrank_cli import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean)
    assert done.stdout.splitlines()[-1] == f"False {threads.SPINS}"


@pytest.mark.parametrize(("setting", "count"), [(3, 3), (None, 8)])
def test_loading_has_the_threads_of_the_setting_or_of_the_cores(machine, setting, count):
    try:
        prepare(HardwareConfig(name="cpu", device="cpu", precision="fp32", processes=1, threads=setting))
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(1)


def test_a_run_says_and_records_its_threads_and_a_resumed_one_keeps_them(machine, lrk):
    try:
        started = lrk("train", "method=lora", *QUICK, "train.checkpoint_every=1")
        assert "2 CPU threads: a model this narrow gains nothing from all 8 cores (hardware.threads=N)" in started.err
        file = runs()[0] / "run.json"
        info = json.loads(file.read_text())
        assert info["threads"]["count"] == torch.get_num_threads() == 2
        file.write_text(json.dumps({**info, "status": "interrupted", "threads": {"count": 1, "reason": "all cores"}}))
        (file.parent / "metrics.json").unlink()  # else there is nothing left to compute
        again = lrk("train", "--resume", str(file.parent))
        assert "1 CPU thread: all cores" in again.err
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert json.loads(file.read_text())["threads"] == {"count": 1, "reason": "all cores"}
