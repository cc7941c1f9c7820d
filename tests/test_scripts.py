"""The scripts behind the result pages and the bundled model import what the package has."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
OURS = sorted([*(SCRIPTS / "research").glob("*.py"), *(SCRIPTS / "bundled_model").glob("*.py")])


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_a_script_can_be_imported(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where a dataclass looks up its annotations
    spec.loader.exec_module(module)
    root = getattr(module, "ROOT", None)
    assert root is None or (root / "pyproject.toml").is_file()
