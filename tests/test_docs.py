"""The commands of the README, the tutorial and the how-to pages: each runs here, or is composed if it cannot run.

Commands are fences of ``sh``. A comment above a fence says how it is checked. Without one its commands run. With
``<!-- fails -->`` its command ends with exit code 2 and prints the fence below it. With ``<!-- not run: REASON -->``
``lrk`` composes the configuration and does no work. A fence with a title is a file that later commands read.

``SMALL`` makes runs small. Words in capitals stand for what ``STANDS_FOR`` has.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from lowrank_cli.cli import STAGES
from lowrank_cli.config.composition import compose
from lowrank_cli.launch import single_run
from lowrank_cli.launch.study_plan import split

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"(?:<!-- (?P<check>[^>]*?) -->\n)?^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LIMIT = "task.limit=8"
#: Appended to a command that works, so that it takes seconds.
SMALL = {
    "train": ["train.max_steps=2", "train.batch_size=2", LIMIT],
    "import": [LIMIT],
    "score": [LIMIT, "score.batch=2"],
    "prune": [LIMIT, "score.batch=2"],
    "evaluate": [LIMIT],
    "export": [],
    "generate": ["generate.max_new_tokens=2"],
    "bench": [
        "bench.rounds=1",
        "bench.methods=[base,lora]",
        "bench.new_tokens=3",
        "bench.beams=[1]",
        "bench.prompt_length=8",
    ],
    "run": ["train.max_steps=2", LIMIT],
    "study": ["train.max_steps=2", "train.batch_size=2", LIMIT, "study.tune=null"],
}
DECODING = ("bench.new_tokens", "bench.beams")  #: of them, those that other kinds of benchmark lack
MODEL = str(ROOT / "lowrank_cli" / "assets" / "tiny_llama")
#: In commands that are composed only.
STANDS_FOR = {
    "MODEL": MODEL,
    "ENCODER": MODEL,  # not looked into
    "DATA": str(ROOT),
    "STUDY": str(ROOT),
    "FILE.gguf": str(ROOT / "README.md"),
}
SHELL = ("python", "cp", "ls", "head")  #: what runs beside ``lrk``


@dataclass
class Block:
    check: str
    language: str
    title: str | None
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(re.sub(r"\$('[^']*')", r"\1", line), comments=True))]


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["check"] or "", *found.group("language", "title", "text"))
        for found in FENCE.finditer(page.read_text())
    ]


TUTORIAL = [
    DOCS / "tutorial" / f"{name}.md" for name in ("index", "first-run", "your-data", "your-model", "compare", "export")
]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
ERRORS = DOCS / "reference" / "errors.md"
FRONT = [DOCS / "index.md", ROOT / "README.md"]
PAGES = [*FRONT, *TUTORIAL, *HOW_TO, ERRORS]
MEASURED = [
    page for page in sorted((DOCS / "results").glob("*.md")) if re.search(r"^( {4})?lrk ", page.read_text(), re.M)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one small run of ``lrk train``, which pages start from."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        single_run.start("train", ["method=lora", *SMALL["train"]], None, "lrk train")
    return folder / "outputs"


def test_the_tutorial_has_every_page():
    assert {*TUTORIAL} == {*(DOCS / "tutorial").glob("*.md")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pages",
    [FRONT, TUTORIAL, *([page] for page in [*HOW_TO, ERRORS])],
    ids=lambda pages: str(pages[-1].relative_to(ROOT)),
)
def test_commands(pages, lrk, trained):
    shutil.copytree(trained, "outputs", symlinks=True)
    for page in pages:
        found = blocks(page)
        for block, after in pairwise([*found, None]):
            if block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text)
            elif block.language == "python":  # python.md runs in test_api.py
                compile(block.text, str(page), "exec")
            elif block.language == "sh" and block.check == "fails":
                (words,) = block.commands()
                ended = lrk(*words[1:])
                assert (ended.code, ended.err) == (2, after.text), page
            elif block.language == "sh":
                for words in block.commands():
                    (composed if block.check else ran)(words, lrk, page)


def ran(words, lrk, page):
    """Run one command, made small."""
    if words[0] != "lrk":
        assert words[0] in SHELL, f"{page}: {words}"
        subprocess.run(
            [sys.executable if words[0] == "python" else words[0], *words[1:]], check=True, capture_output=True
        )
        return
    verb, *rest = words[1:]
    if "-m" in rest:
        rest = shorter(rest)
    if verb in STAGES and not {"--dry-run", "--resume"} & {*rest}:
        given = {word.partition("=")[0] for word in rest}
        small = SMALL[verb]
        if verb == "bench":
            rest = [word for word in rest if word != "model.shape=100m"]  # of the bundled model, instead
            given |= {*DECODING} if rest[0] != "decode" else set()
            small = [item for item in small if item.partition("=")[0] not in given]
        rest += small
    if page.stem == "in-context":  # the statistics need examples of every label
        rest = [word.replace(LIMIT, "task.limit=24").replace("draws=10", "draws=2") for word in rest]
    ended = lrk(verb, *rest)
    assert ended.code == 0, f"{page}: {shlex.join(words)}\n{ended.err}"


def shorter(words):
    """The words of a sweep with two values of the first key that has several, and one of the others."""
    most = 2
    for index, word in enumerate(words):
        if re.fullmatch(r"[\w.]+=[^\[]*,.*", word):
            words[index], most = ",".join(word.split(",")[:most]), 1
    return words


def composed(words, lrk, page):
    """Compose what one ``lrk`` command would do; other commands are read only."""
    if words[0] != "lrk" or "--resume" in words:
        return
    named = re.compile(rf"\b({'|'.join(map(re.escape, STANDS_FOR))})$")
    verb, *rest = [named.sub(lambda at: STANDS_FOR[at[1]], word) for word in words[1:]]
    rest = [word for word in rest if not word.startswith(("hydra", "tracker="))]  # launchers and trackers are extras
    if "study" in (
        verb,
        *[word.partition("=")[0] for word in rest[:1]],
    ):  # tests/config/test_studies.py composes its runs
        compose("study", split(rest)[0])
        return
    ended = lrk(verb, *rest, *["--dry-run"] * (verb in STAGES))
    assert ended.code == 0, f"{page}: {shlex.join(words)}\n{ended.err}"


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.stem)
def test_commands_of_results_compose(page, lrk, trained):
    """They took minutes and hours; the files that they read are stand-ins."""
    shutil.copytree(trained, "outputs", symlinks=True)
    Path("smollm2").symlink_to(MODEL)
    Path("vllm/bin").mkdir(parents=True)
    Path("vllm/bin/python").symlink_to(sys.executable)
    for name, roles in {
        "keep1": "[V]",
        "keep2": "[V, D]",
        "keep3": "[V, D, O]",
        "keep7": "[Q, K, V, O, G, U, D]",
    }.items():
        Path(f"{name}.yaml").write_text(f"layers: {{all: {roles}}}\n")
    for line in re.findall(r"^(?: {4})?(lrk .*)$", page.read_text(), re.MULTILINE):
        composed(shlex.split(line, comments=True), lrk, page)


def test_no_command_escapes():
    """What looks like a command is a fence that the test above reads."""
    for page in PAGES:
        outside = FENCE.sub("", page.read_text())
        assert not re.search(r"^( {4}|```)\s*(lrk|python|pip) ", outside, re.MULTILINE), page
        assert {block.language for block in blocks(page)} <= {"sh", "bash", "python", "yaml", "text"}, page
        assert all(re.fullmatch(r"|fails|not run: .+", block.check) for block in blocks(page)), page


NAMED = re.compile(r"\b(?:lowrank_cli|conf|scripts|tests|docs)/[\w./-]*\w\.(?:py|yaml|md|txt|json|png)\b")


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_files_that_a_page_names_exist(page):
    assert [name for name in NAMED.findall(page.read_text()) if "NAME" not in name and not (ROOT / name).exists()] == []


@pytest.fixture
def generate():
    """The hook that generates pages."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("generate", DOCS / "reference" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_source_file(generate):
    lines = list(generate.source())
    rows = [line for line in lines if line.startswith("| `")]
    assert "| `device.py` | The device and the CPU threads of this process. |" in rows
    modules = [path for path in (ROOT / "lowrank_cli").rglob("*.py") if path.name != "__init__.py"]
    assert len(rows) == len(modules)


def test_the_reference_explains_every_key(generate):
    """Type, range, default and meaning: of one key as they are, of all that there is a meaning."""
    rows = [line for page in (generate.keys, generate.method_pages) for line in page() if line.startswith("| `")]
    assert "| `train.warmup` | number | 0 to 1 | `0.06` | share of all steps |" in rows
    assert any(row.startswith("| `hardware.device` | text | cpu, cuda | `cpu` |") for row in rows)
    assert [row for row in rows if row.endswith("|  |") and "`name`" not in row] == []
