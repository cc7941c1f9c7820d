"""Install the checkout into a folder of it; the stamp comes by standard input.

    setup_venv.py .venv                                         # .[dev], in the versions of constraints.txt
    setup_venv.py .venv-newest --upgrade --editable '.[dev]'    # what the options say, whatever the stamp

The kernel holds ``FOLDER.lock`` for as long as this process or its installer lives, so two set-ups at once install
once and a killed one leaves no stale lock. While an install is under way the file has content; content found
with the lock free means that an install was interrupted, and that the folder has to start empty.

What venv, uv and pip say goes into ``FOLDER.log``; people see a line a step, on a terminal also what they are at.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

from install import LOCKED, ROOT, install

TAIL = 20  #: lines of the log that a failure shows


def main() -> int:
    name, *options = sys.argv[1:]
    stamp = sys.stdin.read()
    venv, python = ROOT / name, ROOT / name / "bin" / "python"
    finished = venv / "stamp"
    with open(ROOT / f"{name}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lrk: waiting for another set-up of this checkout", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)

        before = finished.read_text() if finished.exists() else ""
        if before == stamp and not options:
            return 0
        lock.seek(0)
        interrupted = bool(lock.read())
        moved = bool(before) and before.partition("\n")[0] != stamp.partition("\n")[0]
        print(f"lrk: setting up {venv} (some minutes and gigabytes the first time; log: {name}.log)", flush=True)
        lock.write("installing\n")
        lock.flush()
        finished.unlink(missing_ok=True)

        with open(ROOT / f"{name}.log", "w") as log:

            def run(*command: str | Path) -> int:
                keep = [lock.fileno()]
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                with subprocess.Popen(command, cwd=ROOT, pass_fds=keep, text=True, errors="replace", **pipes) as made:
                    for line in made.stdout:
                        log.write(line)
                        log.flush()
                        show(line.strip())
                show("")
                return made.returncode

            if (interrupted or moved or not python.exists()) and run(sys.executable, "-m", "venv", "--clear", venv):
                return failed(log.name, "could not make a virtual environment")
            print("lrk: collecting packages", flush=True)
            code = install(run, python, *(options or (*LOCKED, "--editable", ".[dev]")))
            if code < 0:
                print("lrk: set-up was interrupted; the next call starts it again")
                return 1
            lock.truncate(0)
            if code:
                return failed(log.name, "the packages could not be installed")
        finished.write_text(stamp)
    return 0


def show(line: str) -> None:
    """What uv or pip is at, in one line that the next one replaces; the number of packages in a line that stays."""
    if resolved := re.match(r"Resolved (\d+) packages?\b", line):
        replace("")
        print(f"lrk: installing {_packages(int(resolved[1]))}", flush=True)
    elif line.startswith("Installing collected packages:"):
        replace("")
        print(f"lrk: installing {_packages(line.count(',') + 1)}", flush=True)
    else:
        replace(line)


def _packages(count: int) -> str:
    return f"{count} package{'s' * (count != 1)}"


def replace(line: str) -> None:
    """Put ``line`` in place of the terminal's last one; nothing where there is no terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def failed(log: str, what: str) -> int:
    """Show the end of the log, and say what went wrong; the exit code."""
    lines = Path(log).read_text(errors="replace").splitlines()
    print("\n".join(lines[-TAIL:]))
    print(f"lrk: set-up failed: {what} (above is the end of {log})")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nlrk: set-up was interrupted; the next call starts it again")
        sys.exit(130)
