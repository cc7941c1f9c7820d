"""Install the checkout named on the command line into its ``.venv``; the stamp comes by standard input.

The kernel holds ``.venv.lock`` for as long as this process or its pip lives, so two set-ups at once install
once and a killed one leaves no stale lock. While an install is under way the file has content; content found
with the lock free means that an install was interrupted, and that ``.venv`` has to start empty.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path


def main() -> int:
    root, stamp = Path(sys.argv[1]), sys.stdin.read()
    venv, python = root / ".venv", root / ".venv" / "bin" / "python"
    finished = venv / "stamp"
    with open(root / ".venv.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lrk: waiting for another set-up of this checkout", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)

        before = finished.read_text() if finished.exists() else ""
        if before == stamp:
            return 0
        lock.seek(0)
        interrupted = bool(lock.read())
        moved = bool(before) and before.partition("\n")[0] != stamp.partition("\n")[0]
        print(f"lrk: setting up {venv} (some minutes and gigabytes the first time)", flush=True)
        lock.write("installing\n")
        lock.flush()
        finished.unlink(missing_ok=True)

        def run(*command: str | Path) -> int:
            keep = [lock.fileno()]
            return subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, pass_fds=keep).returncode

        if (interrupted or moved or not python.exists()) and run(sys.executable, "-m", "venv", "--clear", venv):
            print("lrk: set-up failed: could not make a virtual environment (see above)")
            return 1
        code = run(python, "-m", "pip", "install", "--disable-pip-version-check", "--editable", ".[dev]")
        if code < 0:
            print("lrk: set-up was interrupted; the next call starts it again")
            return 1
        lock.truncate(0)
        if code:
            print("lrk: set-up failed: pip could not install the packages (see above)")
            return 1
        finished.write_text(stamp)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("lrk: set-up was interrupted; the next call starts it again")
        sys.exit(130)
