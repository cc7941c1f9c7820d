"""Spreads the parallel processes of a sweep over the GPUs, which launchers such as joblib do not do."""

from __future__ import annotations

import fcntl
import os
from itertools import count
from pathlib import Path

from lowrank_cli.errors import UserError

#: The lock of this process, kept until it ends: CUDA cannot move to another device.
_held: list[int] = []


def claim_gpu(folder: Path) -> None:
    """Restrict this process to one of its visible GPUs: the one that the fewest other processes have claimed.

    Call it before CUDA starts. The first call decides, for the life of the process. With fewer than two visible GPUs
    it does nothing.

    Args:
        folder: where all processes of the sweep keep their locks, ``<device>-<number>``.

    Raises:
        UserError: ``folder`` is a link.
        OSError: a lock file is a link.
    """
    visible = _visible()
    if _held or len(visible) < 2:
        return
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; expected a folder, which holds the sweep's locks")
    folder.mkdir(exist_ok=True)
    for number in count():
        for device in visible:
            lock = os.open(folder / f"{device}-{number}", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                _held.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = device
                return


def _visible() -> list[str]:
    """The GPUs visible to this process, named as in ``CUDA_VISIBLE_DEVICES``."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, starts no CUDA
