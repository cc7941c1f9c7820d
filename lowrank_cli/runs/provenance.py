"""Where a result comes from: configuration, code, packages, machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DISTRIBUTION = "lowrank-cli"
PACKAGES = (DISTRIBUTION, "torch", "transformers", "accelerate", "datasets", "evaluate", "hydra-core", "numpy")
ROOT = Path(__file__).resolve().parents[2]  #: the checkout, or the folder of an installed package
RECORDING = ("outputs", "name", "tracker", "test")  #: keys that say what of a run is recorded, and where


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that decide the result: the configuration without :data:`RECORDING`."""
    content = {key: value for key, value in config.items() if key not in RECORDING}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of this package's checkout; None for an installed package."""
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@cache
def untested_versions() -> tuple[str, ...]:
    """Installed dependencies outside the ranges that this package declares, which are the tested ones.

    Each is a text such as ``"numpy 3.0.1 (tested: <3,>=2)"``. Empty if this package is not installed.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ()
    extras = ["", *(distribution.metadata.get_all("Provides-Extra") or [])]
    untested = {}
    for requirement in map(Requirement, distribution.requires or []):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras if extra != "dev"):
            continue
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                untested[requirement.name] = f"{requirement.name} {version} (tested: {requirement.specifier})"
    return tuple(untested.values())


def cpu_name() -> str:
    """The system's name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
