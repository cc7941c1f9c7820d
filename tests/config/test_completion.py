"""Completion of verbs and overrides, asked as the shells ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_cli import cli, methods


@pytest.fixture
def bash(lrk, monkeypatch):
    """Words as bash splits them, ``=`` on its own; the last one is under the cursor."""

    def ask(*words: str) -> list[str]:
        monkeypatch.setenv("_LRK_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["lrk", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        ended = lrk()
        assert ended.err == ""
        return ended.out.split()

    return ask


@pytest.fixture
def zsh(lrk, monkeypatch):
    """The whole line, as zsh and fish pass it."""

    def ask(line: str, shell: str = "fish") -> list[str]:
        monkeypatch.setenv("_LRK_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        ended = lrk()
        assert ended.err == ""
        return [item.partition("\t")[0] for item in ended.out.splitlines()]

    return ask


def test_verbs(bash, zsh):
    assert bash("tra") == ["train"]
    assert zsh("lrk ev") == ["evaluate"]
    assert set(cli.VERBS) == set(bash(""))


def test_choices_of_a_group(bash, zsh):
    assert bash("train", "method", "=", "mi") == ["milora"]
    assert bash("train", "method", "=") == methods.names()
    assert bash("train", "method=mi") == ["method=milora"]  # where bash does not split at =
    assert zsh("lrk train method=mi") == ["method=milora"]
    assert zsh("lrk train seed=1 hardware=d") == ["hardware=ddp"]
    assert bash("run", "recipe", "=", "milora_") == ["milora_llama2_7b"]


def test_keys_come_with_their_value_so_that_no_space_follows(bash, zsh):
    assert bash("train", "train.warm") == ["train.warmup=", "train.warmup=0.06"]
    assert zsh("lrk train train.lear")[0] == "train.learning_rate="
    assert bash("train", "train.max_steps", "=") == ["300"]


def test_keys_follow_the_chosen_group(bash):
    assert "method.k=" in bash("train", "method", "=", "milora", "method.")
    assert "method.k=" not in bash("train", "method", "=", "lora", "method.")


def test_groups_and_sections(bash):
    found = bash("train", "")
    assert {"method=", "model=", "task=", "train.", "evaluate.", "seed="} <= set(found)
    assert not [item for item in found if item.startswith(("_", "hydra"))]


def test_check_takes_a_verb_first(bash):
    assert "evaluate" in bash("check", "eva")
    assert bash("check", "run", "recipe", "=", "milora_") == ["milora_llama2_7b"]
    assert bash("check", "task", "=", "tiny_y") == ["tiny_yesno"]
    assert bash("list", "ta") == ["tasks"]


def test_the_users_own_choices(bash):
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/mimic.yaml").write_text("defaults: [_lora]\n")
    assert bash("train", "--config-dir", "mine", "method", "=", "mi") == ["milora", "mimic"]


def test_a_wrong_line_has_no_completions(bash, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "broken.yaml").write_text("defaults: 3\nname: lora\n")
    assert bash("train", "--config-dir", str(tmp_path), "method", "=", "broken", "method.r") == []
    assert bash("train", "method", "=", "nonsense", "method.ra") == []
    assert bash("train", "(", "tr") == []


def test_values_of_a_group_and_of_those_it_inherits(bash):
    assert bash("train", "model=llama2_7b", "model.path") == ["model.path="]
    assert bash("train", "hardware", "=", "gpu_4bit", "hardware.quantiz") == [
        "hardware.quantization=",
        "hardware.quantization=nf4",
    ]
    assert bash("train", "hardware", "=", "gpu_4bit", "hardware.device", "=") == ["cuda"]


def test_keys_follow_after_a_model_that_is_named_by_its_weights(bash):
    for weights in ("org/name", "/tmp/folder", "./folder"):
        assert bash("train", "model", "=", weights, "hardware.nod") == ["hardware.nodes=", "hardware.nodes=1"]


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from lowrank_cli import cli\n"
        "try: cli.call([])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'hydra', 'transformers'} & sys.modules.keys()))"
    )
    words = {"_LRK_COMPLETE": "complete_bash", "COMP_WORDS": "lrk\ntrain\nmethod.r", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **words})
    assert done.stdout.split("\n")[0].startswith("method.") and done.stdout.endswith("[]\n"), done


def test_zsh_gets_its_form(lrk, monkeypatch):
    monkeypatch.setenv("_LRK_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "lrk train method=mi")
    assert lrk().out.strip() == """_arguments '*: :(("method=milora"))'"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_script_for_bash():
    """The function that --show-completion defines, called as bash calls it."""
    folder = Path(sys.executable).parent
    program = 'eval "$(lrk --show-completion bash)"; COMP_WORDS=(lrk train method = mi); COMP_CWORD=4; '
    program += '_lrk_completion lrk; echo "${COMPREPLY[@]}"; complete -p lrk'
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.splitlines()[0] == "milora", done
    assert "-F _lrk_completion lrk" in done.stdout
