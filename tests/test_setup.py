"""The scripts' set-up, with stand-ins for venv and pip; and what a built wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

FAKE_VENV = """
import os, sys, shutil
folder = sys.argv[-1]
assert sys.argv[1:] == ["--clear", folder]
shutil.rmtree(folder, ignore_errors=True)
os.makedirs(f"{folder}/bin")
os.symlink(sys.executable, f"{folder}/bin/python")
"""

# Runs in the checkout. A file there says how this install goes; every command and every install is logged.
FAKE_PIP = """
import os, pathlib, signal, sys, time
plan = pathlib.Path("plan").read_text() if os.path.exists("plan") else ""
scripts = pathlib.Path(sys.executable).parent
if sys.argv[1] != "by-uv":
    with open("commands", "a") as log:
        print("pip", *sys.argv[1:], file=log)
if sys.argv[1] == "config":
    print(pathlib.Path("settings").read_text() if os.path.exists("settings") else "", end="")
    sys.exit()
with open("installs", "a") as log:
    print("onto the last one" if (scripts / "lrk").exists() else "onto an empty .venv", file=log)
lrk = scripts / "lrk"
lrk.write_text('#!/bin/sh\\nprintf "%s\\\\n" "$PWD" "$@"\\n')
lrk.chmod(0o755)
for number in range(300):
    print("Collecting package", number, flush=True)
print("Installing collected packages: one, two, three", flush=True)
if plan == "fail":
    print("ERROR: no such package", file=sys.stderr, flush=True)
if plan == "kill":
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "slow":
    time.sleep(0.5)
sys.exit(3 if plan == "fail" else 0)
"""

FAKE_UV = """#!/bin/sh
echo uv "$@" >> commands
[ ! -e no-uv ] || exit 2
exec "$4" -m pip by-uv
"""

FAKE_TOOL = """
import os, pathlib, sys
name = pathlib.Path(__file__).stem
with open("calls", "a") as log:
    print(name, *sys.argv[1:], file=log)
sys.exit(name == os.environ.get("BROKEN"))
"""


class Checkout:
    """A copy of the scripts in a folder whose name has a space, with a PATH that holds what they may use."""

    def __init__(self, folder: Path):
        self.root = folder / "my checkout"
        self.bin = folder / "bin"
        modules = folder / "modules"
        for path in (self.root, self.bin, modules):
            path.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        self.edit_pyproject("first")
        self.edit_constraints("absent==1")
        (modules / "venv.py").write_text(FAKE_VENV)
        (modules / "pip.py").write_text(FAKE_PIP)
        for tool in ("ruff", "mypy", "pytest"):
            (modules / f"{tool}.py").write_text(FAKE_TOOL)
        for tool in ("sh", "cat", "cmp", "readlink"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.python3(f'exec "{sys.executable}" "$@"')
        self.environment = {"PATH": str(self.bin), "PYTHONPATH": str(modules)}

    def python3(self, body: str) -> None:
        script = self.bin / "python3"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    def edit_pyproject(self, text: str) -> None:
        (self.root / "pyproject.toml").write_text(text)

    def edit_constraints(self, text: str) -> None:
        (self.root / "constraints.txt").write_text(text)

    def provide_uv(self) -> None:
        uv = self.bin / "uv"
        uv.write_text(FAKE_UV)
        uv.chmod(0o755)

    def plan(self, text: str) -> None:
        (self.root / "plan").write_text(text)

    def start(self, *arguments: str, script: str | Path = "lrk", cwd=None, **environment) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / "scripts" / script, *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *arguments: str, **options) -> tuple[int, str, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installs(self) -> list[str]:
        return self.lines("installs")

    @property
    def commands(self) -> list[str]:
        return self.lines("commands")

    def lines(self, name: str) -> list[str]:
        log = self.root / name
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_first_call_installs_and_the_second_starts_no_python(checkout):
    code, out, err = checkout.call("train", "method=milora")
    assert (code, out) == (0, f"{checkout.root}\ntrain\nmethod=milora\n")
    assert [line.partition(" (")[0] for line in err.splitlines()] == [
        f"lrk: setting up {checkout.root}/.venv",
        "lrk: collecting packages",
        "lrk: installing 3 packages",
    ]
    assert (checkout.root / ".venv.log").read_text().count("Collecting package") == 300
    (checkout.bin / "python3").unlink()
    assert checkout.call("list") == (0, f"{checkout.root}\nlist\n", "")
    assert checkout.installs == ["onto an empty .venv"]


def test_runs_in_the_callers_directory_through_links(checkout, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (tmp_path / "bin" / "first").symlink_to("../my checkout/scripts/lrk")
    (elsewhere / "second").symlink_to(tmp_path / "bin" / "first")
    code, out, _ = checkout.call("a b", "c*", script=elsewhere / "second", cwd=elsewhere)
    assert (code, out) == (0, f"{elsewhere}\na b\nc*\n")
    assert (checkout.root / ".venv").is_dir()


def test_changed_pyproject_installs_again(checkout):
    checkout.call()
    checkout.edit_pyproject("second")
    assert checkout.call()[0] == 0
    assert checkout.call()[2] == ""
    assert checkout.installs == ["onto an empty .venv", "onto the last one"]


def test_changed_constraints_install_again(checkout):
    checkout.call()
    checkout.edit_constraints("absent==2")
    assert checkout.call()[0] == 0
    assert checkout.call()[2] == ""
    assert checkout.installs == ["onto an empty .venv", "onto the last one"]


def test_pip_installs_the_locked_versions_without_uv(checkout):
    checkout.call()
    (command,) = checkout.commands
    assert command.startswith("pip install ") and command.endswith(" --constraint constraints.txt --editable .[dev]")


def test_uv_on_path_installs_the_locked_versions_with_the_settings_of_pip(checkout):
    checkout.provide_uv()
    (checkout.root / "settings").write_text(
        ":env:.find-links='/three'\n"
        "global.constraint='/cap.txt'\n"
        "global.extra-index-url='file:///one file:///two'\n"
        "global.find-links='/replaced by the variable'\n"
        "global.timeout='60'"
    )
    assert checkout.call()[0] == 0
    assert checkout.commands[-1] == (
        f"uv pip install --python {checkout.root}/.venv/bin/python --index-strategy unsafe-best-match "
        "--build-constraint constraints.txt --index file:///one --index file:///two --find-links /three "
        "--constraint /cap.txt --constraint constraints.txt --editable .[dev]"
    )
    assert checkout.installs == ["onto an empty .venv"]


def test_pip_installs_where_uv_fails(checkout):
    checkout.provide_uv()
    (checkout.root / "no-uv").touch()
    assert checkout.call()[0] == 0
    assert [command.split()[0] for command in checkout.commands] == ["pip", "uv", "pip"]
    assert checkout.installs == ["onto an empty .venv"]


def test_killed_install_starts_afresh(checkout):
    checkout.plan("kill")
    code, out, _ = checkout.call()
    assert code != 0
    assert out == ""
    checkout.plan("")
    assert checkout.call()[0] == 0
    assert checkout.installs == ["onto an empty .venv"] * 2


def test_interrupted_install_says_so_and_starts_afresh(checkout):
    checkout.plan("slow")
    process = checkout.start()
    while not checkout.installs:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "lrk: set-up was interrupted; the next call starts it again" in err.splitlines()
    assert checkout.call()[0] == 0
    assert checkout.installs == ["onto an empty .venv"] * 2


def test_failed_install_is_tried_again(checkout):
    checkout.plan("fail")
    code, out, err = checkout.call()
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("lrk: set-up failed: the packages")
    assert err.splitlines()[-1].endswith(f"(above is the end of {checkout.root}/.venv.log)")
    assert err.splitlines()[-2] == "ERROR: no such package" and len(err.splitlines()) < 30
    checkout.plan("")
    assert checkout.call()[0] == 0
    assert checkout.installs == ["onto an empty .venv", "onto the last one"]


def test_two_at_once_install_once(checkout):
    checkout.plan("slow")
    both = [checkout.start("list"), checkout.start("list")]
    assert [process.communicate(timeout=60)[0] for process in both] == [f"{checkout.root}\nlist\n"] * 2
    assert len(checkout.installs) == 1


def test_copied_checkout_gets_its_own_environment(checkout, tmp_path):
    checkout.call()
    copy = tmp_path / "copy"
    shutil.copytree(checkout.root, copy, symlinks=True)
    checkout.root = copy
    assert checkout.call()[0] == 0
    assert checkout.installs == ["onto an empty .venv"] * 2


@pytest.mark.parametrize("present", ["Python 3.8.10", None])
def test_without_a_new_enough_python(checkout, present):
    if present:
        checkout.python3(f'case "$1" in --version) echo {present} ;; *) exit 1 ;; esac')
    else:
        (checkout.bin / "python3").unlink()
    code, out, err = checkout.call("train")
    assert (code, out) == (1, "")
    assert err == f"lrk: Python 3.11 or newer is needed; found {present or 'no python3'}\n"
    assert not (checkout.root / ".venv").exists()


def test_test_script_passes_arguments_on_and_reports_every_failure(checkout, tmp_path):
    assert checkout.call("-k", "a b", script="test", cwd=tmp_path)[0] == 0
    calls = (checkout.root / "calls").read_text().splitlines()
    assert [line.split()[0] for line in calls] == ["ruff", "ruff", "mypy", "pytest"]
    assert calls[-1].endswith(" -k a b")

    code, _, err = checkout.call(script="test", BROKEN="mypy")
    assert code == 1
    assert err.splitlines()[-1] == "failed: types"
    assert len((checkout.root / "calls").read_text().splitlines()) == 8


def test_newest_versions_have_an_environment_of_their_own_looked_up_every_time(checkout):
    checkout.provide_uv()
    for _ in range(2):
        code, out, _ = checkout.call("--newest", "-k", "a b", script="test")
        assert (code, out) == (0, "0 versions differ from constraints.txt\n")
    assert checkout.installs == ["onto an empty .venv", "onto the last one"]
    assert all(line.endswith(" --upgrade --editable .[dev,4bit]") for line in checkout.commands if line[:2] == "uv")
    command = "pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m not slow @tests/newest.txt -k a b"
    assert checkout.lines("calls") == [command] * 2
    assert not (checkout.root / ".venv").exists()

    code, _, err = checkout.call("--newest", script="test", BROKEN="pytest")
    assert (code, err.splitlines()[-1]) == (1, "failed: tests on the newest versions")


def test_versions_that_differ_from_the_lock_are_named(checkout):
    pins = [
        f"packaging=={packaging.__version__}",
        "PyYAML==0.1  # via us",
        "numpy==0.1 ; python_version < '3'",
        "no==1",
    ]
    checkout.edit_constraints("\n".join(pins).lower())
    command = [sys.executable, checkout.root / "scripts" / "versions.py"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(" (")[2] for line in out] == ["locked: 0.1)", ""]
    assert out[0].startswith("pyyaml 6") and out[1] == "1 version differs from constraints.txt"


#: In a test file: it imports a library whose releases have broken this package, or may.
LIBRARY = re.compile(
    r"(?:^ *(?:import|from) |importorskip\(\")"
    r"(?:accelerate|datasets|evaluate|gguf|huggingface_hub|hydra|peft|transformers)\b",
    re.MULTILINE,
)


def test_newest_tests_exist_and_are_all_that_import_other_libraries_and_more():
    listed = (ROOT / "tests" / "newest.txt").read_text().splitlines()
    assert all((ROOT / path).is_file() for path in listed)
    files = (ROOT / "tests").rglob("test_*.py")
    importing = {str(path.relative_to(ROOT)) for path in files if LIBRARY.search(path.read_text())}
    assert len(importing) > 20 and importing <= set(listed)


LOCK = [
    Requirement(line.partition("#")[0])
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.partition("#")[0].strip()
]


#: Extras that constraints.txt leaves out; pyproject.toml says so.
UNLOCKED = ("eval", "ray", "smollm2", "tensorboard", "wandb", "mlflow", "trackio", "schedule_free", "zst")


def test_lock_holds_exact_versions_only():
    assert all(pin.url is None and not pin.extras for pin in LOCK)
    assert all([part.operator for part in pin.specifier] == ["=="] for pin in LOCK)
    assert not [pin for pin in LOCK if "+" in str(pin.specifier)], "a build of one machine"
    assert "://" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(
    ("system", "platform", "machine"),
    [("Linux", "linux", "x86_64"), ("Linux", "linux", "aarch64"), ("Darwin", "darwin", "arm64")],
)
def test_lock_has_a_version_in_range_for_every_requirement(python, system, platform, machine):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "sys_platform": platform,
        "platform_machine": machine,
    }
    pins = {pin.name: pin.specifier for pin in LOCK if pin.marker is None or pin.marker.evaluate(environment)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra, items in project["project"]["optional-dependencies"].items():
        wanted += items if extra not in UNLOCKED else []
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(str(pins[requirement.name]).removeprefix("==")), requirement


def test_wheel_holds_configs_and_bundled_files(tmp_path, monkeypatch):
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "lrk = lowrank_cli.__main__:main" in wheel.read(entry_points).decode()

    def files(folder: str) -> set[str]:
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(ROOT)) for path in found if path.suffix != ".pyc"}

    configs = {f"lowrank_cli/{name}" for name in files("conf")}
    assert "lowrank_cli/conf/train.yaml" in configs
    assert any(name.endswith(".safetensors") for name in files("lowrank_cli/assets"))
    assert held == files("lowrank_cli") | configs
