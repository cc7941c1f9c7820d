"""vLLM in lrk bench decode: the protocol with its process, played by a fake of the library, and its failures."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import ROOT, lrk, one_line  # noqa: F401 (a fixture)

from lowrank_cli.bench.vllm import Worker, engine_settings
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError, WorkFailed
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run
from lowrank_cli.stages import bench

FAKES = Path(__file__).parents[1] / "fakes"
TINY = ["model.shape=2x32x48x4", "hardware.threads=1", "bench.rank=4", "bench.prompt_length=5", "bench.new_tokens=3"]
TINY += ["bench.rounds=2", "bench.beams=[1]"]
RUN = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_path(sys.argv[-1], run_name='__main__')"


def program(*lines: str) -> str:
    """The path of a shell script."""
    path = Path("program").resolve()
    path.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def python() -> str:
    """A Python in which ``import vllm`` finds the fake."""
    return program(f'exec "{sys.executable}" -c "{RUN}" "{FAKES}" "$@"')


def test_vllm_is_measured_bare_and_with_our_adapters(lrk, python):  # noqa: F811
    words = [f"bench.vllm={python}", "bench.methods=[base,lora,vllm,vllm+lora]"]
    ended = lrk("bench", "decode", *TINY, *words, "bench.batch_size=3", "bench.tenants=[2]")
    assert ended.code == 0, ended
    run = Run.open("outputs/latest")
    rows = {(row["method"], row["tenants"]): row for row in run.read_json("bench.json")["rows"]}
    assert len(rows) == 8
    for tenants in (None, 2):
        ours, theirs = rows["lora", tenants], rows["vllm+lora", tenants]
        assert (theirs["parameters"], theirs["modules"]) == (ours["parameters"], ours["modules"])
        assert theirs["adapters_bytes"] == ours["adapters_bytes"]
        assert theirs["vllm_step_ratio"] == theirs["vllm_cpu_step_ratio"] == 1
        assert ours["vllm_step_ratio"] > 0 and ours["vllm_cpu_step_ratio"] > 0
        assert rows["base", tenants]["vllm_step_ratio"] > 1, "the fake takes no time"
        assert rows["vllm", tenants]["parameters"] == 0
        assert statistics.median(theirs["seconds"]) > 0 and theirs["peak_memory_bytes"] > 0
    assert "CPU × vLLM" in ended.out
    assert "noise on stdout" in (run.path / "vllm.log").read_text()


def test_without_it_its_entries_are_left_out(lrk):  # noqa: F811
    ended = lrk("bench", "decode", *TINY, "bench.methods=[base,vllm]")
    assert ended.code == 0 and "'vllm' is skipped: bench.vllm does not name a Python that has vLLM" in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.vllm=nowhere"], "bench.vllm: 'nowhere' does not run (No such file or directory)"),
        ([f"bench.vllm={sys.executable}"], f"bench.vllm: vLLM of '{sys.executable}' failed: ModuleNotFoundError"),
        (["bench.vllm=/bin/true"], "bench.vllm: vLLM of '/bin/true' ended without an answer"),
        (["bench.beams=[1,3]"], "bench.beams: vLLM is measured without beams; set bench.beams=[1]"),
        (
            ["bench=train"],
            "bench.new_tokens: unknown key; it is a key of lrk bench decode, lrk bench prepack and lrk bench serve",
        ),
    ],
)
def test_what_cannot_be_is_one_line(lrk, words, message):  # noqa: F811
    ended = lrk("bench", *TINY, "bench.methods=[base,vllm]", *words)
    ended.err = ended.err.splitlines(keepends=True)[-1]
    assert one_line(ended).startswith(message)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (6, 8), (8, 8), (300, 320), (512, 512)])
def test_the_engine_has_room_for_the_adapters_ranks(rank, expected):
    config = compose("bench", []).config
    settings = engine_settings(Path("model"), config, SimpleNamespace(rank=rank), 3)
    assert (settings["max_lora_rank"], settings["max_loras"]) == (expected, 3)
    with pytest.raises(UserError, match=r"^bench\.rank: 600 is too large for vLLM \(allowed: up to 512\)"):
        engine_settings(Path("model"), config, SimpleNamespace(rank=600), 1)


def test_what_vllm_says_is_one_line(lrk, python):  # noqa: F811
    ended = lrk("bench", *TINY, "bench.methods=[base,vllm]", f"bench.vllm={python}", "seed=13")
    assert ended.code == 2 and f"vLLM of '{python}' failed: ValueError: cannot take this model\n" in ended.err


def test_an_answer_that_does_not_come_is_not_waited_for():
    silent = program("read line", "echo '{}'", "exec sleep 100")
    with Worker(silent, {}, Path("log")) as worker, pytest.raises(WorkFailed, match=r"did not answer within 0\.1 s"):
        worker.ask({}, 0.1)


def test_a_process_that_ends_midway_is_an_error():
    with Worker(program("read line", "echo '{}'"), {}, Path("log")) as worker:
        for _ in range(2):
            with pytest.raises(WorkFailed, match="ended without an answer"):
                worker.ask({}, 5)


def test_its_last_words_are_told():
    with pytest.raises(UserError, match=r"ended without an answer: Illegal instruction$"):
        Worker(program("echo 'some warning' >&2", "echo 'Illegal instruction' >&2"), {}, Path("log")).__enter__()


def test_a_start_that_fails_leaves_no_process():
    worker = Worker(
        program("echo $$ > pid", "read line", 'echo \'{"error": "no"}\'', "exec sleep 100"), {}, Path("log")
    )
    with pytest.raises(UserError, match=r"^bench\.vllm: vLLM of '.*' failed: no"), worker:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_no_file_names_the_program(lrk):  # noqa: F811
    Path("mine/bench").mkdir(parents=True)
    (Path("mine") / "bench" / "decode.yaml").write_text(
        (ROOT / "conf" / "bench" / "decode.yaml").read_text().replace("vllm: null", "vllm: x")
    )
    message = one_line(lrk("bench", *TINY, "bench.methods=[base]", "--config-dir", "mine"))
    assert message.startswith("bench.vllm: a configuration file says x; no file can set it")


def test_a_run_that_names_a_program_is_not_resumed(monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    words = [*TINY, "bench=decode", "bench.methods=[base]", "bench.vllm=x"]
    with pytest.raises(Exception, match=r"lrk bench --resume"):
        single_run.start("bench", words, None, "lrk bench decode")
    with pytest.raises(UserError, match=r"would start the program bench\.vllm=x; start it anew$"):
        single_run.resume("bench", str(Path("outputs/latest").resolve()))
