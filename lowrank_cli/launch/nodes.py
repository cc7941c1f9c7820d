"""Training on several machines: ``lrk`` is called on each, and the first one tells the others which folder to join.

``NODE_RANK`` numbers the machines from 0 (under Slurm ``SLURM_NODEID`` does), and ``MASTER_ADDR`` is the first one's
host (under Slurm, the first of the job); ``MASTER_PORT`` is a free port there, by default torchrun's. The run folder
must be on a disk that all share.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.runs import stopping

PORT = 29500  #: torchrun's
WAIT = 600  #: seconds for all nodes to arrive
TRY = 5  #: seconds of one attempt to reach the first node


@dataclass(frozen=True)
class Node:
    """This machine among ``count``."""

    rank: int
    count: int
    host: str  #: of the first node
    port: int

    def tell(self, folder: Path) -> Any:
        """Tell the other nodes the run folder, as long as the result is kept."""
        store = self._store(first=True)
        store.set("folder", str(folder.absolute()))
        return store

    def ask(self) -> Path:
        """The run folder that the first node tells. Raises WorkFailed if it tells none in time."""
        for _ in range(WAIT // TRY):
            stopping.check()
            try:
                return Path(self._store(first=False).get("folder").decode())
            except RuntimeError:  # nobody listens there yet
                continue
        raise WorkFailed(f"no answer from the first node at {self.host}:{self.port} in {WAIT} s; see its output")

    def _store(self, first: bool) -> Any:
        from torch.distributed import TCPStore

        # torch's agent uses the same server, as it runs in this process (multi_tenant)
        return TCPStore(
            self.host,
            self.port,
            is_master=first,
            timeout=timedelta(seconds=WAIT if first else TRY),
            wait_for_workers=False,
            multi_tenant=True,
        )


def this_node(config: Any) -> Node | None:
    """This machine, if ``config`` asks for several. Raises UserError if it is not told which one it is."""
    hardware = getattr(config, "hardware", None)
    count: int = getattr(hardware, "nodes", 1)
    if count == 1:
        return None
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID", "")
    if not rank.isdecimal() or int(rank) >= count:
        raise UserError(
            f"hardware.nodes: {count}, but NODE_RANK is '{rank}' (allowed: 0 to {count - 1}, another on each node; "
            f"srun sets SLURM_NODEID)"
        )
    return Node(int(rank), count, os.environ.get("MASTER_ADDR") or _first_of_job(), _port())


def _port() -> int:
    port = os.environ.get("MASTER_PORT") or str(PORT)
    if not port.isdecimal():
        raise UserError(f"hardware.nodes: MASTER_PORT is '{port}', which is not a port")
    return int(port)


def _first_of_job() -> str:
    """The first host of this Slurm job."""
    hosts = os.environ.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise UserError("hardware.nodes: MASTER_ADDR is not set; it is the address of the first node")
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"hardware.nodes: MASTER_ADDR is not set, and '{' '.join(command)}' does not name the first node"
        ) from None
