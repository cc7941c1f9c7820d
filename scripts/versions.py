"""Print the versions of this environment that are not those of constraints.txt."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"


def main() -> None:
    installed = {item.name.lower().replace("_", "-"): item.version for item in metadata.distributions()}
    differ = 0
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        version = installed.get(pin.name)
        if version and (pin.marker is None or pin.marker.evaluate()) and version not in pin.specifier:
            print(f"{pin.name} {version} (locked: {str(pin.specifier).removeprefix('==')})")
            differ += 1
    print(f"{differ} {'version differs' if differ == 1 else 'versions differ'} from {LOCK.name}")


if __name__ == "__main__":
    main()
