"""The shape of the package, read from its source: who imports whom, what waits, what is never called."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lowrank_cli"
SOURCES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))

#: Each part of the package, from the top down, and the parts it may import besides itself.
#: Every part may import those of :data:`BOTTOM`. A new arrow is a decision, taken here.
ARROWS = {
    "": {"api"},
    "__main__": {"cli"},
    "cli": {"launch", "config", "methods", "report", "runs"},
    "api": {"config", "inference", "session", "methods", "scoring", "adapter", "runs"},
    "launch": {"config", "stages", "training", "session", "methods", "report", "runs"},
    "config": {"methods", "runs"},
    "stages": {
        *(
            "icl",
            "bench",
            "training",
            "serving",
            "inference",
            "session",
            "methods",
            "scoring",
            "adapter",
            "models",
            "tasks",
            "runs",
        ),
    },
    "bench": {"icl", "inference", "session", "methods", "scoring", "calibration", "adapter", "models", "tasks", "runs"},
    "icl": {"inference", "session", "methods", "calibration", "adapter", "tasks", "runs"},
    "training": {"session", "methods", "adapter", "runs"},
    "serving": {"inference", "session", "methods", "calibration", "adapter", "tasks", "runs"},
    "inference": {"session", "methods", "calibration", "adapter", "tasks", "runs"},
    "session": {"methods", "scoring", "adapter", "models", "tasks", "runs"},
    "methods": {"scoring", "calibration", "adapter"},
    "scoring": {"adapter"},
    "calibration": {"adapter"},
    "adapter": {"native"},
    "models": {"native"},
    "native": set(),
    "tasks": set(),
    "report": {"runs"},
    "runs": set(),
    "schema": set(),
    "terminal": set(),
    "reader": set(),
    "errors": set(),
}
BOTTOM = ("schema", "terminal", "reader", "errors")  #: parts that every one above them may import

#: Imported by every call of ``lrk``, completion and errors included; heavy libraries wait until work starts.
LIGHT = (
    *("cli", "launch", "config", "methods", "report.end_of_run", "tasks.tiny", "runs"),
    *("schema", "terminal", "reader", "errors"),
)
PRIVATE = re.compile(r"lowrank_cli\.methods\.\w+\.")  #: files of one method, imported when it starts
HEAVY = {"torch", "transformers", "datasets", "evaluate", "matplotlib", "accelerate", "scipy", "numpy"}


def module_name(source: Path) -> str:
    """Dotted name of a file given relative to the checkout."""
    return ".".join(source.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(source) for source in SOURCES}


@cache
def tree(source: Path) -> ast.Module:
    return ast.parse((ROOT / source).read_text())


def imports(source: Path) -> set[str]:
    """Dotted names that a file imports, at its top or in a function, or names in a string to import later."""
    found = set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found.add(node.value)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_file_says_in_one_line_what_it_has(source):
    """The site's page of source files shows these lines, and CONTRIBUTING.md has one for each part."""
    line = (ast.get_docstring(tree(source)) or "").partition("\n\n")[0]
    assert line and "\n" not in line and line.endswith((".", ":")), source


def test_the_guide_has_every_part():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    parts = [name for name in ARROWS if name not in ("", "__main__")]
    assert [name for name in parts if not re.search(rf"`(lowrank_cli/)?{name}(/|\.py)`", guide)] == []


def part(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_table_names_every_part():
    assert {part(module) for module in MODULES} == set(ARROWS)


def test_table_points_down():
    parts = list(ARROWS)
    for above, below in ARROWS.items():
        assert all(parts.index(other) > parts.index(above) for other in below), above


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_arrows_point_down(source):
    module = module_name(source)
    own = part(module)
    allowed = ARROWS[own] | {own} | set(BOTTOM[BOTTOM.index(own) + 1 :] if own in BOTTOM else BOTTOM)
    for target in imports(source) & MODULES - {"lowrank_cli"}:
        assert part(target) in allowed, f"{source} imports {target}"
        if part(target) == "methods" and own != "methods":
            public = {"lowrank_cli.methods", "lowrank_cli.methods.protocol"}
            assert target in public, f"{source} names {target}: ask a method what it can do"


def test_nothing_heavy_is_imported_early():
    light = tuple(f"lowrank_cli.{name}." for name in LIGHT)
    modules = [name for name in MODULES if f"{name}.".startswith(light) and not PRIVATE.match(name)]
    program = f"import sys, {', '.join(modules)}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stderr, done.stdout.strip()) == ("", "")


#: Methods whose names are also words of the field or of Python; they are looked for as ``method=NAME`` alone.
WORDS = {"lora", "full", "none"}
#: Modules outside of methods/ that may name methods, and why.
NAMING = {
    "lowrank_cli": "example of the library",
    "lowrank_cli.api": "example of the library",
    "lowrank_cli.api.adapted": "what a loop of one's own has to do, by method",
    "lowrank_cli.cli": "examples of commands",
    "lowrank_cli.adapter.kinds.dora": "a kind that the field knows by this name, as PEFT's format does (use_dora)",
    "lowrank_cli.launch.shorthand": "what lrk bench compares where nothing is named, and the bare model's method",
}


def method_names_in(text: str) -> set[str]:
    """The registered methods that ``text``, code or prose, names; not those in a longer name such as ``qalora``."""
    registered = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - {"peft"}  # a library's name too
    prose = "|".join(registered - WORDS)
    chosen = "|".join(WORDS)
    found = re.findall(rf"(?<![a-z])({prose})(?![a-z])|method=({chosen})\b", text.lower().replace("lora-fa", "lora_fa"))
    return {name or word for name, word in found}


def test_methods_are_named_in_their_own_folder_only():
    named = {module_name(source): method_names_in((ROOT / source).read_text()) for source in SOURCES}
    outside = {module: found for module, found in named.items() if found and part(module) != "methods"}
    assert {module: found for module, found in outside.items() if module not in NAMING} == {}
    assert set(NAMING) == set(outside), "an exception that nothing needs"


def test_names_of_methods_are_recognised():
    assert method_names_in("MiLoRA's routers, use_dora, DoRALinear") == {"milora", "dora"}
    assert method_names_in("the LoRA of qalora; none, full; method=none") == {"none"}


#: What `lrk bench` measures beside, where someone has installed it.
MEASURED = {"liger_kernel", "trl", "vllm"}


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in requirements}
    providers = importlib.metadata.packages_distributions()
    for source in SOURCES:
        for name in {target.partition(".")[0] for target in imports(source)}:
            if name in sys.stdlib_module_names or name in {"lowrank_cli", *MEASURED}:
                continue
            found = providers.get(name, [name])  # what is optional may be absent
            distributions = {provider.lower().replace("_", "-") for provider in found}
            assert distributions & declared, f"{source} imports {name}, which pyproject.toml does not name"


def test_one_part_knows_each_library():
    for source in SOURCES:
        own, names = part(module_name(source)), {target.partition(".")[0] for target in imports(source)}
        assert own == "config" or "hydra" not in names, source
        assert own == "tasks" or not names & {"datasets", "evaluate"}, source
        assert own == "cli" or "typer" not in names, source
        allowed = {"lowrank_cli", "torch", "safetensors", "transformers", *sys.stdlib_module_names}
        allowed |= {"bitsandbytes", "gguf", "triton"}  # optional, and imported by who asks for them
        assert own != "adapter" or names <= allowed, source


#: Who parses JSON besides the reader: data of a task and prompts, line by line, what compare has written itself, and
#: what a benchmark and its own process tell each other.
PARSERS = {
    *("reader", "tasks.sources", "runs.prompt_file", "report.run_results"),
    *("bench.vllm", "bench.vllm_worker"),
}


def test_files_are_read_and_text_is_printed_in_one_way():
    for source in SOURCES:
        name = module_name(source).removeprefix("lowrank_cli.")
        called = {ast.unparse(node.func) for node in ast.walk(tree(source)) if isinstance(node, ast.Call)}
        assert not called & {"Console", "rich.console.Console"}, f"{source}: print through lowrank_cli/terminal.py"
        parsing = called & {"json.loads", "json.load", "yaml.safe_load"}
        assert not parsing or name in PARSERS, f"{source}: read through lowrank_cli/reader.py"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_what_is_public():
    nodes = [node for source in SOURCES for node in ast.walk(tree(source))]
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    ours = {name for name in named | {node.attr for node in nodes if isinstance(node, ast.Attribute)} if private(name)}
    for source in (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")):
        for node in ast.walk(tree(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowrank_cli"):
                assert not any(private(alias.name) for alias in node.names), f"{source}:{node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr in ours:
                owner = ast.unparse(node.value).partition(".")[0]
                others = ("self", "os", "torch")
                assert owner in others, f"{source}:{node.lineno} reads {ast.unparse(node)}"


def dangerous(call: ast.Call) -> bool:
    """Does this call run code, or load an object, that comes from data?"""
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        name in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load")
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or keywords.get("trust_remote_code") == "True"
        or keywords.get("shell") == "True"
    )


def test_nothing_runs_what_it_reads():
    sources = [*SOURCES, *(path.relative_to(ROOT) for path in (ROOT / "scripts").rglob("*.py"))]
    found = [
        f"{source}:{node.lineno}: {ast.unparse(node)}"
        for source in sources
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Call) and dangerous(node)
    ]
    assert not found
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "trust_remote_code: true" not in path.read_text(), path


def test_dangerous_calls_are_recognised():
    unsafe = ["torch.load(p)", "pickle.loads(b)", "f(trust_remote_code=True)", "run(c, shell=True)"]
    safe = ["torch.load(p, weights_only=True)", "model.eval()", "f(trust_remote_code=model.remote)"]
    calls = {text: ast.parse(text, mode="eval").body for text in unsafe + safe}
    assert [text for text, call in calls.items() if dangerous(call)] == unsafe
