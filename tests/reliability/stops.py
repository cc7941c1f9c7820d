"""SIGTERM, SIGINT or SIGUSR1 at a random moment: the command says how to go on and ends soon, and goes on exactly."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

from .box import Box, outcome, same
from .kills import newest, trainable
from .samples import Samples, training
from .trial import Failed

SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT = 5.0  #: s; 2 are promised, on a machine with nothing else to do
STOPPED = (130, 143, 138)  #: 128 and the signal's number, or that of Ctrl-C for all of them
LONG = ("task=tiny_sentiment", "hardware.threads=1", "train.batch_size=4", "train.max_steps=4000", "train.epochs=1000")
#: Commands that work for a while, by verb; {run} is a trained run.
VERBS = {
    "train": ("train", "method=lora", *LONG),
    "train -m": ("train", "-m", "method=lora", "seed=0,1", *LONG),
    "score": ("score", "run={run}", "task.limit=256", "score.batch=256", "score.tokens=256"),
    "evaluate": ("evaluate", "run={run}", "task.limit=512", "evaluate.batch_size=1", "evaluate.shots=4"),
    "generate": ("generate", "--save", "run={run}", "zorp is red.", "generate.max_new_tokens=900"),
    "tenants": ("generate", "run={run}", "--tenants", "prompts.jsonl", "generate.max_new_tokens=200"),
    "bench": ("bench", "decode", "model.shape=4x256x512x4", "bench.rounds=500", "bench.methods=[base,lora]"),
    "run": ("run", "recipe=milora", *LONG[1:]),
}


def trial(seed: int, box: Box, samples: Samples) -> dict[str, float] | None:
    """Every second trial stops a long command and measures; the others stop a short training and continue it."""
    chance = random.Random(seed)
    number = chance.choice(SIGNALS)
    if seed % 2:
        return _continued(seed, chance, number, box, samples)
    verb = list(VERBS)[seed // 2 % len(VERBS)]
    run = samples.place("trained_lora", box)
    rows = [json.dumps({"tenant": str(run), "prompt": f"zorp {i} is"}) for i in range(40)]
    (box.work / "prompts.jsonl").write_text("\n".join(rows))
    moment = chance.uniform(0.5, 3.0)
    box.case = f"{verb}, {number.name} after {moment:.1f} s"
    before = set(box.work.glob("outputs/2*/*"))
    command = box.start(*(word.format(run=run) for word in VERBS[verb]))
    _wait(command, moment)
    command.send(number)
    ended = box.judged(command.wait(60), codes=(0, *STOPPED))
    made = set(box.work.glob("outputs/2*/*")) - before
    if ended.code == 0:  # the work was over when the signal came
        if unfinished := [folder.name for folder in made if _status(folder) not in (None, "done")]:
            raise Failed(f"exit code 0, but {unfinished[0]} is not done")
        return None
    assert ended.stopped_after is not None
    if ended.stopped_after > LIMIT:
        raise Failed(f"stopped after {ended.stopped_after:.1f} s, more than {LIMIT:g}")
    if made:  # before that there is nothing to go on with
        _says(ended.err)
    for folder in made:
        if (status := _status(folder)) not in (None, "interrupted"):
            raise Failed(f"{folder.name} says {status} after the stop")
    return {f"{verb} {number.name}": round(ended.stopped_after, 3)}


def _status(folder: Path) -> str | None:
    """Of a run or a sweep; None for a sweep that was stopped before it began."""
    files = [file for name in ("run.json", "sweep.json") if (file := folder / name).is_file()]
    return json.loads(files[0].read_text())["status"] if files else None


def _continued(
    seed: int, chance: random.Random, number: signal.Signals, box: Box, samples: Samples
) -> dict[str, float] | None:
    method = trainable()[seed // 2 % len(trainable())]
    expected, moment = outcome(samples.method(method)), chance.uniform(0.1, 1.0) * samples.seconds(method)
    box.case = f"{method}, {number.name} after {moment:.2f} s, then continued"
    command = box.start("train", *training(method))
    _wait(command, moment)
    begun = newest(box) is not None
    command.send(number)
    ended = command.wait(60)
    if begun or ended.code != -number:  # before there is a folder, there is nothing to say
        box.judged(ended, codes=(0, *STOPPED))
    run = newest(box)
    if ended.code != 0:
        if run is not None:
            _says(ended.err)
        words = ("--resume", str(run.relative_to(box.work))) if run is not None else training(method)
        box.run("train", *words, codes=(0,), timeout=120)
        run = newest(box)
    assert run is not None
    same(outcome(run), expected, "continued")
    return None


def _wait(command, moment: float) -> None:
    limit = time.monotonic() + moment
    while command.running() and time.monotonic() < limit:
        time.sleep(0.005)


def _says(err: str) -> None:
    if not any(line.startswith("interrupted: ") for line in err.split("\n")):
        raise Failed(f"does not say that it was interrupted: {err.strip()[-100:]!r}")
