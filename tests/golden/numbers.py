"""What ``lrk`` computes: losses, metrics, predictions, scores, weights; and its run folders, opened again.

What ``lrk bench`` measures are times, so it is not here. Everything else is exact on one machine, and depends on the
processor and on the versions of libraries.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lowrank_cli import methods
from lowrank_cli.config.folders import files
from lowrank_cli.methods.protocol import Adapts
from lowrank_cli.schema import KINDS

from .command import ROOT, Ended, call, normalised, working_directory

SMALL = ("hardware.threads=1", "task.limit=16")
TRAIN = (
    *("task=tiny_yesno", *SMALL, "train.max_steps=20", "train.batch_size=4"),
    *("train.log_every=1", "train.eval_every=10", "train.checkpoint_every=10"),
)
#: What makes a method's own work as small as its training.
OWN = {"alora": ("method.dev_batch=4", "method.rounds=2", "method.score=taylor")}
TRAINABLE = [name for name in methods.names() if methods.can(name, Adapts)]
CALIBRATIONS = ("ida", "conca", "dconca", "proca", "none")
TASKS = [name for name in files("task") if name.startswith("tiny_") and name != "tiny_mix"]
HARDWARE = ("precision=bf16", "gradient_checkpointing=layers", "compile=true")
PROMPT = "Question: Does Loquen clean a vase?\nText: Loquen cleans a blue vase.\nAnswer:"
UNFINISHED = ("train", "method=alora", *OWN["alora"], *TRAIN, "train.max_steps=60", "train.checkpoint_every=5")

#: Commands that make runs, by the folder of their outputs.
MADE = {
    **{f"train_{name}": ("train", f"method={name}", *OWN.get(name, ()), *TRAIN) for name in TRAINABLE},
    **{f"train_{value.replace('=', '_')}": ("train", "method=lora", *TRAIN, f"hardware.{value}") for value in HARDWARE},
    **{f"train_task_{task}": ("train", "method=milora", *TRAIN, f"task={task}", "train.max_steps=2") for task in TASKS},
    **{
        f"fit_{name}": ("train", "method=idaicl", f"method.calibration={name}", "task=tiny_sentiment", *SMALL)
        for name in CALIBRATIONS
    },
    **{f"frozen_{task}": ("evaluate", "method=none", f"task={task}", *SMALL, "evaluate.shots=2") for task in TASKS},
    **{
        f"score_{level}_{kind}": ("score", "run=train_lora/latest", f"score.level={level}", f"score.kind={kind}")
        for level, kinds in KINDS.items()
        for kind in kinds
    },
    "prune_drop": ("prune", "run=score_rank_ab/latest", "prune.drop=100"),
    "prune_per_layer": ("prune", "run=score_rank_taylor/latest", "prune.budget=120", "prune.per_layer=true"),
    "prune_keep": ("prune", "run=score_module_ablation/latest", "prune.keep=2"),
    "prune_same_roles": ("prune", "run=score_module_kl/latest", "prune.keep=2", "prune.same_roles=true"),
    "train_on": ("train", "run=prune_drop/latest", "train.max_steps=3"),
    "evaluate": ("evaluate", "run=train_milora/latest", "evaluate.split=dev"),
    "export_lora": ("export", "run=train_lora/latest"),
    "export_rank": ("export", "run=train_dora/latest", "export.rank=4", "export.max_error=0.1"),
    "export_merged": ("export", "run=train_dora/latest", "export.format=merged"),
    "generate": ("generate", "run=train_lora/latest", PROMPT, "generate.max_new_tokens=12"),
    "generate_sampled": ("generate", "run=train_milora/latest", PROMPT, "generate.temperature=0.8", "seed=1"),
    "sweep": ("train", "-m", "method=lora", "train.learning_rate=1e-3,1e30", *TRAIN),
    "recipe": ("run", "recipe=mine", "--config-dir", "mine"),
}
#: Commands that open runs which those made, by the folder in which they write.
OPENED = {
    **{f"evaluate_{name}": ("evaluate", f"run=train_{name}/latest") for name in TRAINABLE},
    **{f"evaluate_{name}": ("evaluate", f"run=fit_{name}/latest") for name in CALIBRATIONS},
    "evaluate_pruned": ("evaluate", "run=prune_keep/latest"),
    "score_pruned": ("score", "run=prune_drop/latest", "score.kind=taylor"),
    "prune_scored": ("prune", "run=score_rank_taylor/latest", "prune.drop=30"),
    "train_on_pruned": ("train", "run=prune_drop/latest", "train.max_steps=3"),
    "export_trained": ("export", "run=train_lelora/latest"),
    "generate_trained": ("generate", "run=train_moelora/latest", PROMPT),
    "unfinished": ("train", "--resume", "unfinished/latest"),
    "sweep": ("train", "-m", "--resume", "sweep/latest"),
    "recipe": ("run", "--resume", "recipe/latest"),
    "compare": ("compare", "train_lora", "train_milora", "train_dora", "--baseline", "lora"),
    "list": ("list", "runs", "--outputs", "recipe"),
}
SHOWN = 24  #: lines of what differs in one command
PRINTED = ("generate", "compare", "list")  #: verbs whose output is part of the record
#: Parts of the names of measurements, and the name of an adapter's own checksums: one of its files names the checkout.
MACHINE = ("seconds", "per_second", "memory", "bytes", "files")
#: Of a run folder, what says when and where it was made, and what no reader of it needs.
LEFT_OUT = ("plots", "checkpoints", "log.txt", "warnings.txt", "sweep.json", "recipe.json")


def record(folder: Path, scratch: Path) -> None:
    """Make runs in ``folder/runs``, open copies of them, and write ``folder/made`` and ``folder/opened``."""
    shutil.copytree(Path(__file__).parent / "given", folder / "runs")
    _write(folder / "made", _make(folder / "runs"))
    with working_directory(folder / "runs"):
        _interrupt(UNFINISHED, Path("unfinished"))
    _write(folder / "opened", _open(folder / "runs", scratch))


def check(folder: Path, scratch: Path) -> Iterator[str]:
    """Make runs again in ``scratch`` and open copies of the recorded ones; yields what differs from the record."""
    shutil.copytree(Path(__file__).parent / "given", scratch / "again")
    for part, outcomes in (("opened", _open(folder / "runs", scratch)), ("made", _make(scratch / "again"))):
        for name, now in outcomes:
            recorded = folder / part / f"{name}.json"
            before = recorded.read_text().splitlines() if recorded.is_file() else []
            title = f"{part}/{name} as recorded"
            lines = [*difflib.unified_diff(before, _text(now).splitlines(), title, "now", "", "", 1, "")]
            if lines:
                yield "\n".join([*lines[:SHOWN], *[f"… and {len(lines) - SHOWN} more lines"] * (len(lines) > SHOWN)])


def _make(folder: Path) -> Iterator[tuple[str, Any]]:
    with working_directory(folder):
        for name, command in MADE.items():
            yield name, outcome(Path(name), command, call(*command, f"outputs={name}"))


def _open(runs: Path, scratch: Path) -> Iterator[tuple[str, Any]]:
    """Each run folder is copied with its neighbours, which it names by relative paths and by absolute ones."""
    shutil.copytree(runs, scratch / "opened", symlinks=True)
    with working_directory(scratch / "opened"):
        for name, command in OPENED.items():
            new = [] if "--resume" in command or command[0] in ("compare", "list") else [f"outputs={name}"]
            yield name, outcome(Path(name), command, call(*command, *new))


def _interrupt(command: tuple[str, ...], outputs: Path) -> None:
    """Start ``command`` in a process of its own, and stop it after its first checkpoint."""
    arguments = [sys.executable, "-m", "lowrank_cli", *command, f"outputs={outputs}"]
    with subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(outputs.glob("latest/checkpoints/step-*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130, f"not interrupted: {process.returncode}"


def outcome(outputs: Path, command: tuple[str, ...], ended: Ended) -> dict[str, Any]:
    """How a command ended and what lies in the run folders below ``outputs``."""
    last = [line for line in ended.err.splitlines() if line.startswith(("error:", "interrupted:", "Traceback"))]
    runs = {normalised(str(file.parent)): _files(file.parent) for file in sorted(outputs.glob("2*/**/run.json"))}
    printed = [" ".join(line.split()) for line in ended.out.splitlines()] if command[0] in PRINTED else []
    return {"command": ["lrk", *command], "code": ended.code, "errors": last, "printed": printed, "runs": runs}


def _files(run: Path) -> dict[str, Any]:
    """The content of every file of a run folder, its own files before those of ``adapter/`` and ``export/``."""
    inner = {file.parent for file in run.glob("*/**/run.json")}
    paths = [file for file in run.rglob("*") if file.is_file() and not inner & {*file.parents}]
    names = sorted((str(file.relative_to(run)) for file in paths), key=lambda name: ("/" in name, name))
    return {name: _content(run / name) for name in names if name.partition("/")[0] not in LEFT_OUT}


def _content(file: Path) -> Any:
    """What a file says, without what differs between machines and days; a hash of predictions and of each tensor."""
    if file.suffix == ".safetensors":
        return {name: _tensor(tensor) for name, tensor in load_file(file).items()}
    if file.name == "run.json":
        info = json.loads(file.read_text())
        kept = ("status", "stage", "choices", "overrides", "model", "seed", "error")
        return _portable({key: info.get(key) for key in kept})
    if file.suffix == ".json":
        return _portable(json.loads(file.read_text()))
    if file.name == "history.jsonl":
        return [_portable(json.loads(line)) for line in file.read_text().splitlines()]
    if file.suffix in (".yaml", ".txt"):
        return normalised(file.read_text()).splitlines()
    return _hash(file.read_bytes())


def _portable(value: Any) -> Any:
    """``value`` without what a clock or the system measured, and with floats as they are written in full."""
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items() if not any(word in k for word in MACHINE)}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return normalised(value) if isinstance(value, str) else value


def _tensor(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {[*tensor.shape]} {_hash(tensor.contiguous().view(torch.uint8).numpy().tobytes())}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write(folder: Path, outcomes: Iterator[tuple[str, Any]]) -> None:
    folder.mkdir()
    for name, value in outcomes:
        (folder / f"{name}.json").write_text(_text(value))
