"""What every test gets: one thread, no network, an empty working directory, fixed seeds."""

from __future__ import annotations

import errno
import os
import random
import socket
import sys
import tempfile

import pytest
from command import fake_stages, lrk  # noqa: F401 (fixtures of every test)
from forked import Replaced, no_picture

from lowrank_cli.launch import workers
from lowrank_cli.report import plots

# Read when torch, matplotlib and huggingface_hub are first imported; child processes inherit them.
_hub_cache = tempfile.TemporaryDirectory(prefix="hub-")
os.environ.update(
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
    HF_HOME=_hub_cache.name,
    TOKENIZERS_PARALLELISM="false",
    # No one answers on port 9: requests of child processes fail at once, as on a machine that is offline.
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="localhost,127.0.0.1",
)
_unset = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE")
for _name in _unset:
    os.environ.pop(_name, None)


#: Files that take minutes: they begin first, so that no process is left alone with one of them at the end.
LONGEST = ("test_campaign.py", "test_docs.py", "test_study.py")


def pytest_collection_modifyitems(items):
    """Put the longest files in front (xdist keeps this order with --no-loadscope-reorder)."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Sockets of this process reach loopback addresses only; anything else is unreachable."""
    loopback = {"127.0.0.1", "::1", "localhost", socket.gethostname()}
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in loopback:
            raise OSError(errno.ENETUNREACH, f"tests have no network: {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_server():
    """Workers of this process come from the server of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run_in_child", Replaced("lowrank_cli.launch.workers.run_in_child"))
        yield


render = plots.write


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """Figures are made, and written as empty files: to render one takes longer than a small training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write", no_picture)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Figures are rendered in this test."""
    monkeypatch.setattr(plots, "write", render)


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """The test's own folder as working directory: relative ``outputs`` lands there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every generator that is loaded starts at 0."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
