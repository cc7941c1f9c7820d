"""Which GPU a process gets that runs jobs of a sweep beside others: launchers such as joblib leave that open."""

from __future__ import annotations

import fcntl
import os
from itertools import count
from pathlib import Path

from lowrank_cli.errors import UserError

#: The lock that this process keeps until it ends; its CUDA stays on the device that it began with.
_held: list[int] = []


def take_one(folder: Path) -> None:
    """Show this process one of its GPUs, that with the fewest other processes which took theirs in ``folder``.

    The choice is made once, before CUDA starts, and lasts as long as the process. Nothing happens where only one GPU
    or none is visible. Raises UserError where ``folder`` is a link, OSError where a lock is one.
    """
    visible = _visible()
    if _held or len(visible) < 2:
        return
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; expected the sweep's own folder of locks")
    folder.mkdir(exist_ok=True)
    for turn in count():
        for device in visible:
            lock = os.open(folder / f"{device}-{turn}", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                _held.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = device
                return


def _visible() -> list[str]:
    """GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, starts no CUDA
