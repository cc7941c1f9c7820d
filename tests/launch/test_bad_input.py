"""A user's mistakes: one line on stderr that says what is wrong and what to do, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest
from command import one_line

from lowrank_cli import methods
from lowrank_cli.cli import call

SMALL = ["hardware.threads=1", "task.limit=8", "train.max_steps=1", "train.batch_size=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of LoRA on tiny_sentiment."""
    outputs = tmp_path_factory.mktemp("trained")
    assert call(["train", "method=lora", "task=tiny_sentiment", *SMALL, f"outputs={outputs}"]) == 0
    return (outputs / "latest").resolve()


def refused(capsys, arguments: list[str], *parts: str) -> None:
    """The command ends with 2 and one line that holds all ``parts``; the folder stays as it was."""
    before = snapshot()
    capsys.readouterr()
    code = call(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert snapshot() == before


def snapshot() -> set[Path]:
    return set(Path().rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "method=milroa"], ["method", "'milroa'", "did you mean 'milora'", ", ".join(methods.names())]),
        (["train", "model=lama"], ["model", "'lama'", "did you mean 'llama'"]),
        (["train", "task=tiny_sentimnet"], ["task", "did you mean 'tiny_sentiment'"]),
        (["train", "hardware=cpus"], ["hardware", "did you mean 'cpu'"]),
        (["train", "train.lerning_rate=1"], ["train.lerning_rate", "did you mean", "train.learning_rate"]),
        (["train", "train.lr=1"], ["train.lr", "did you mean 'train.learning_rate'?"]),
        (
            ["train", "method=lora", "method.k=3"],
            ["method.k: unknown key; it is a key of method=milora and method=moelora (method has: name, "],
        ),
        (["train", "rank=4"], ["rank", "method.rank"]),
        (["train", "method.rank=abc"], ["method.rank", "'abc' is not a whole number"]),
        (["train", "train.learning_rate=fast"], ["train.learning_rate", "'fast'"]),
        (["train", "seed=1.5"], ["seed", "1.5"]),
        (["train", "method.rank=0"], ["method.rank: 0 is out of range", "at least 1"]),
        (["train", "method.rank=1000"], ["method.rank: 1000 is above the matrix", "allowed: 1 to 128"]),
        (["train", "method.k=0"], ["method.k: 0 is out of range", "1 to 7"]),
        (["train", "method.k=8"], ["method.k: 8 is out of range", "1 to 7"]),
        (["train", "method.k=3", "method.target_modules=[Q,V]"], ["method.k: 3 is out of range", "1 to 2"]),
        (["train", "method.target_modules=[v_porj]"], ["'v_porj'", "did you mean 'v_proj'"]),
        (["train", "method.target_modules=[]"], ["method.target_modules", "empty"]),
        (["train", "method=none"], ["'none' has no stage train"]),
        (["train", "name=../elsewhere"], ["name", "../elsewhere"]),
        (["train", "task.path=nowhere", "task=sst2"], ["task.path", "'nowhere'"]),
        (["train", "model.path=nowhere"], ["model.path", "'nowhere'"]),
        (["train", "train.batch_size=10", "train.gradient_accumulation=4"], ["train.gradient_accumulation", "10"]),
        (["train", "model=minilm", "task=tiny_choice", "method=lora"], ["minilm is an encoder"]),
        (["train", "hardware=gpu"], ["cuda", "hardware=cpu"]),
        (["train", "model=llama2_7b"], ["Llama-2-7b-hf", "model=llama", "model.path", "hf auth login"]),
        (["train", "task=sst2"], ["sst2", "task.path"]),
        (["train", "--resume", "nowhere"], ["--resume: there is no folder 'nowhere'"]),
        (["evaluate", "run=nowhere"], ["'nowhere'"]),
        (["evaluate"], ["no finished run", "lrk train"]),
        (["evaluate", "method=none", "prune.drop=3"], ["prune.drop: unknown key; it is a key of lrk prune"]),
        (["evaluate", "method=none", "prune.drp=3"], ["prune.drp: unknown key; prune.* are keys of lrk prune"]),
        (["train", "evaluate.split=dev"], ["it is a key of lrk evaluate (evaluate has: batch_size, "]),
        (
            ["bench", "evaluate.shots=3"],
            ["it is a key of lrk train, lrk prune and lrk evaluate"],
        ),
        (
            ["evaluate", "method=none", "method.rank=3"],
            ["it is a key of method=adalora, method=alora and 9 other methods (method has: name)"],
        ),
        (["evaluate", "method=none", "evaluate.shots=99", "task.limit=8"], ["evaluate.shots: 99", "8"]),
        (["run", "recipe=milroa"], ["recipe", "did you mean 'milora'"]),
        (["compare", "nowhere"], ["nowhere"]),
        (["list", "methodz"], ["methodz", "methods"]),
        (["trian"], ["'trian'", "did you mean 'train'"]),
        (["train", "--dry-runn"], ["--dry-runn"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) and value[0] in ("train", "evaluate") else None,
)
def test_one_line(capsys, arguments, parts):
    if arguments[:2] == ["train", "hardware=gpu"]:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    refused(capsys, arguments, *parts)


def data(rows: str, name: str = "train") -> str:
    """A folder with three splits, ``name`` of which holds ``rows``."""
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    good = "".join(json.dumps({"sentence": f"film {i}", "label": i % 2}) + "\n" for i in range(6))
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(rows if split == name else good)
    return str(folder)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("", ["train.jsonl", "empty"]),
        ('{"sentence": "a", "label": 0}\n{"sentence": \n', ["train.jsonl:2"]),
        ('{"sentence": "a", "label": 0}\n[1]\n', ["train.jsonl:2"]),
        (
            '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 7}\n',
            ["train.jsonl:2", "7", "negative, positive"],
        ),
        ('{"sentence": "a", "label": 0}\n{"sentence": "b", "label": "good"}\n', ["train.jsonl:2", "'good'"]),
        ('{"sentense": "a", "label": 0}\n', ["train.jsonl:1", "'sentence'", "did you mean 'sentense'"]),
    ],
)
def test_bad_data_names_file_and_line(capsys, rows, parts):
    refused(capsys, ["train", "task=sst2", f"task.path={data(rows)}"], *parts)


def test_a_run_of_the_wrong_kind(capsys, trained):
    assert call(["evaluate", f"run={trained}", "task.limit=4", "hardware.threads=1"]) == 0
    refused(capsys, ["evaluate", "run=outputs/latest"], "evaluate", "not of train")
    refused(capsys, ["train", "--resume", "outputs/latest"], "lrk evaluate")


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_another_alpha_than_the_adapter_was_trained_with(capsys, trained, verb):
    refused(capsys, [verb, f"run={trained}", "method.alpha=1"], "method.alpha: 1.0, but", "was made with 16.0")


def test_a_template_that_differs_from_the_one_trained_with(capsys, trained):
    arguments = ["evaluate", f"run={trained}", "task.template='\"{text} Verdict:\"'".replace("{text}", column(trained))]
    refused(capsys, arguments, "'tiny_sentiment' was trained with another template")


def column(trained: Path) -> str:
    """A field of the task's own template."""
    import re

    import yaml

    template = yaml.safe_load((trained / "config.yaml").read_text())["task"]["template"]
    return re.search(r"\{\w+\}", template)[0]


def test_an_adapter_for_another_model(capsys, trained, tmp_path):
    import torch

    from lowrank_cli.models.load import BUNDLED

    other = tmp_path / "other"
    other.mkdir()
    for file in BUNDLED.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    weights[name] = weights[name] + torch.ones_like(weights[name])
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, ["evaluate", f"run={trained}", f"model.path={other}"], "belongs to another model")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_adapter_file(capsys, trained, tmp_path, damage):
    import shutil

    copy = shutil.copytree(trained, tmp_path / "copy")
    path = copy / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    refused(
        capsys,
        ["evaluate", f"run={copy}"],
        "adapter_model.safetensors",
        "is missing" if damage == "missing" else damage,
    )


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("- {name: a, stage: train, overrides: [method=none]}", ["a", "no stage train"]),
        ("- {name: a, stage: frobnicate}", ["frobnicate", "allowed: train, "]),
        ("- {name: a, stage: train, overrides: [method.rnak=3]}", ["method.rnak", "method.rank"]),
        ("- {name: a, stage: evaluate, overrides: ['run={b}']}", ["stage 'a', run: unknown value 'b'"]),
    ],
)
def test_recipes_are_checked_before_anything_runs(capsys, recipe, parts):
    folder = Path("groups/recipe")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# mine\ndefaults:\n  - _recipe\nname: mine\nstages:\n{recipe}\n")
    refused(capsys, ["run", "recipe=mine", "--config-dir", "groups"], *parts)


def test_an_override_that_no_stage_knows(capsys):
    refused(capsys, ["run", "recipe=milora", "train.lerning_rate=1"], "train.lerning_rate", "train.learning_rate")


def test_a_sweep_over_nothing_is_named(lrk):
    assert "no values to sweep over" in one_line(lrk("train", "-m", "method=glob(xx*)"))
