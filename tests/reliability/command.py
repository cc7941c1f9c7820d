"""One ``lrk`` command in a forked process: nothing is imported again, so that a trial costs what its work costs.

The process is guarded. A write outside its box, a connection to another machine and a foreign program are refused and
reported, so that a trial that fails cannot do harm.
"""

from __future__ import annotations

import atexit
import codecs
import gc
import importlib
import io
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events whose arguments (by position) are paths that change.
CHANGES = {
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.truncate": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "shutil.rmtree": (0,),
}
PROGRAMS = {"git", "uname", Path(sys.executable).name}  #: what a command may start: provenance, and its own workers
LOOPBACK = {"127.0.0.1", "::1", "localhost", None, b"localhost"}
PATIENCE = 5  #: seconds that may pass for each of CPU time
#: Imported once, before the first fork. What a stage still imports late costs time only.
PRELOADED = (
    "lowrank_cli.cli",
    "lowrank_cli.report.plots",
    "lowrank_cli.report.compare",
    "lowrank_cli.inference.tenants",
    "lowrank_cli.launch.single_run",
    "lowrank_cli.launch.sweep",
    "lowrank_cli.config.completion",
    "lowrank_cli.launch.imported",
    "lowrank_cli.launch.listing",
    "lowrank_cli.launch.shorthand",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "lowrank_cli.tasks.metrics",
    "matplotlib.pyplot",
)
#: Run once, before the first fork, so that what the libraries make when first used is there. None goes backward: the
#: engine of torch starts a thread for each GPU, and a process with such threads cannot be forked.
WARMING = (
    ("evaluate", "method=none", "task=tiny_sentiment", "task.limit=4", "hardware.threads=1"),
    ("generate", "method=none", "zorp is red.", "generate.max_new_tokens=4", "hardware.threads=1"),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``code`` is minus the number of a signal that killed it; None where it took too long."""

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str
    reports: tuple[str, ...]  #: what the guard refused
    seconds: float
    #: from the last signal that was sent to the end
    stopped_after: float | None = None


def preload() -> None:
    """Import and compose what every command needs; to be called once, before the first fork."""
    from lowrank_cli import methods, stages
    from lowrank_cli.config.composition import compose

    for name in (*stages.STAGES.values(), *PRELOADED):
        importlib.import_module(name)
    for name in methods.names():
        methods.create(methods.config_classes()[name](name=name))
    compose("train", ["method=lora"])
    codecs.lookup("utf-8-sig")  # imported when first asked for, which another user may not be able to do
    gc.collect()
    gc.freeze()


def warm(folder: Path) -> None:
    """Run the commands of :data:`WARMING` in ``folder``, between :func:`preload` and the first fork."""
    from lowrank_cli import cli

    with chdir(folder), redirect_stdout(io.StringIO()) as shown, redirect_stderr(shown):
        for arguments in WARMING:
            assert cli.call(list(arguments)) == 0, shown.getvalue()
    gc.collect()
    gc.freeze()


class Command:
    """``lrk ARGUMENTS`` in ``cwd``, started. Files may change below ``roots`` only.

    ``prepare`` is called in the new process first: it may limit resources, close descriptors, change the user.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        roots: Sequence[Path],
        environment: Mapping[str, str],
        prepare: Callable[[], None] | None = None,
    ):
        self.arguments = tuple(arguments)
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 (stdout, stderr, reports; see wait)
        self._began = time.monotonic()
        self._signalled: float | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(cwd, roots, environment, prepare)

    def send(self, number: int) -> None:
        """Signal the process, if it still lives."""
        self._signalled = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process and those that it started, without warning."""
        for kill in (os.killpg, os.kill):  # the group exists as soon as the process has made it
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def _cpu_seconds(self) -> float:
        """CPU time of the process itself; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime

    def wait(self, timeout: float) -> Ended:
        """The end of the command.

        It is killed after ``timeout`` seconds of its own CPU time, or, as it may wait for something, after ``PATIENCE``
        times as many that pass: other processes may leave it little of the processor.
        """
        waited, pause = 0.0, 0.001
        while (late := self.running()) and waited < PATIENCE * timeout and self._cpu_seconds() < timeout:
            time.sleep(pause)
            waited += pause
            pause = min(pause * 1.5, 0.02)
        now = time.monotonic()
        self.kill()
        _, status = os.waitpid(self.pid, 0)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
            file.close()
        code = None if late else os.waitstatus_to_exitcode(status)
        stopped = None if self._signalled is None else now - self._signalled
        reports = tuple(dict.fromkeys(texts[2].splitlines()))
        return Ended(self.arguments, code, texts[0], texts[1], reports, now - self._began, stopped)

    def _run(
        self,
        cwd: Path,
        roots: Sequence[Path],
        environment: Mapping[str, str],
        prepare: Callable[[], None] | None,
    ) -> None:
        """The new process; never returns."""
        code = 1
        try:
            os.setsid()
            for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), *(f.fileno() for f in self._files[:2]))):
                os.dup2(source, target)
            os.chdir(cwd)
            os.environ.update(environment)
            tempfile.tempdir = None
            sys.argv[:] = ["lrk", *self.arguments]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if prepare is not None:
                prepare()
            sys.addaudithook(guard(roots, self._files[2].fileno()))
            code = main()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def main() -> int:
    """``lrk`` as the interpreter runs it, up to the exit code."""
    from lowrank_cli import __main__

    try:
        __main__.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:  # as Py_FinalizeEx says it
            with suppress(OSError, ValueError):
                print(f"Exception ignored in: {stream}\n{error}", file=sys.stderr, flush=True)
            code = 120
    return code


def guard(roots: Sequence[Path], reports: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses changes outside ``roots``, connections and programs, and reports them."""
    allowed = tuple(os.path.realpath(root) for root in roots)
    devices = {os.devnull, "/dev/full", "/dev/tty", "/proc/self/clear_refs"}

    def refuse(what: str) -> None:
        os.write(reports, (what.replace("\n", " ") + "\n").encode(errors="backslashreplace"))
        raise PermissionError(f"the guard of a trial refuses: {what}")

    def changes(path: Any, follows: bool = False) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file
        name = os.fsdecode(path)
        parent = os.path.realpath(os.path.dirname(os.path.abspath(name)))
        paths = {os.path.join(parent, os.path.basename(name)), *([os.path.realpath(name)] if follows else [])}
        if name not in devices and not all(_below(path, allowed) for path in paths):
            refuse(f"writes '{name}'")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES:
                changes(path, follows=True)
        elif event in CHANGES:
            for position in CHANGES[event]:
                changes(arguments[position])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            program = os.path.basename(os.fsdecode(arguments[0]))
            if program not in PROGRAMS:
                refuse(f"starts '{program}'")
        elif event == "socket.getaddrinfo" and arguments[0] not in LOOPBACK:
            raise OSError(f"a trial has no network: {arguments[0]!r}")

    return hook


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root + os.sep) for root in roots)
