"""The cost model against measurements on a CPU: processor time of steps, and bytes between two processes.

    python scripts/research/cost_check.py                    # the bundled model
    python scripts/research/cost_check.py FOLDER             # the Llama model in FOLDER, times only

Times are ratios to the frozen model, medians of interleaved rounds of ``lrk bench``, on one thread, without packed
weights. Bytes are what crosses the loopback interface of an otherwise empty network namespace (``unshare``, which needs
root) in a step of two processes under gloo: the difference between a longer and a shorter run. Writes
docs/results/cost_check.json; ``cost_model.py --write`` then renews the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost_model import CHECKED, FP32, KEPT, RANK, Shape, exchanged, gathered, methods, trained_tensors, wire

from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import all_runs
from lowrank_cli.runs.provenance import cpu_name, git_state, package_versions

ROWS, TOKENS = 2, 128  #: of a training step
PROMPT, NEW = 64, 32  #: tokens of a row that decodes
STEPS = (4, 24)  #: optimizer steps of the runs whose traffic is compared


def shape_of(folder: Path) -> Shape:
    """The sizes of the model in ``folder``."""
    config = json.loads((folder / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return Shape(*(config[name] for name in names), config["vocab_size"])


def name_of(folder: Path) -> str:
    """What the page calls the model in ``folder``."""
    return "bundled" if folder == BUNDLED.resolve() else folder.name


def lrk(verb: str, *overrides: str) -> Any:
    """The newest run of a command that is run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, "hardware.threads=1", f"outputs={folder}"]
        subprocess.run([sys.executable, "-m", "lowrank_cli", *verb.split(), *words], check=True)
        (run,) = all_runs(Path(folder))
        return run.read_json("bench.json")


def ratios(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Processor time of a training step and of a decoding step, relative to the frozen model's."""
    shape = shape_of(folder)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as selection:
        selection.write(f"layers: {{all: [{', '.join(KEPT)}]}}\n")
        selection.flush()
        entries = f"bench.methods=[base,lora,dora,milora,'fanlora setting={selection.name}']"
        common = [f"model.path={folder}", entries, f"bench.rank={RANK}", f"bench.rounds={rounds}"]
        size = [f"bench.batch_size={ROWS}", f"bench.prompt_length={TOKENS}"]
        trained = lrk("bench train", *common, *size)["rows"]
        length = [f"bench.prompt_length={PROMPT}", f"bench.new_tokens={NEW}", "bench.beams=[1]"]
        decoded = lrk("bench decode", *common, *length, "hardware.prepack=false")["rows"]
    for kind, rows, key in (("a training step", trained, "cpu_ratio"), ("a decoding step", decoded, "cpu_step_ratio")):
        for (method, model), row in zip(methods(shape).items(), rows[1:], strict=True):
            base, added = model.train_flops(ROWS, TOKENS) if rows is trained else model.decode_flops(PROMPT + NEW // 2)
            yield {
                "what": f"time of {kind}, × frozen",
                "method": method,
                "predicted": 1 + added / base,
                "measured": row[key],
            }


def traffic(folder: Path) -> Iterator[dict[str, Any]]:
    """MB that cross the network in a step of two processes."""
    shape = shape_of(folder)
    plain, ways = methods(shape), {"LoRA": "lora", "DoRA": "dora", "MiLoRA": "milora method.bilevel=false"}
    for method, words in ways.items():
        volume = exchanged(plain[method].parameters, trained_tensors(plain[method]))
        yield _row("all-reduce, MB sent", method, 2 * wire(volume, 2), bytes_of_step(folder, words))
    lora = plain["LoRA"]
    layers = gathered(shape, 2) * FP32 / 2  # the model is in fp32 here
    both = 2 * (wire(exchanged(lora.parameters, trained_tensors(lora)), 2) + layers)
    yield _row("`fsdp`, MB sent", "LoRA", both, bytes_of_step(folder, "lora hardware.shard=node"))


def _row(what: str, method: str, predicted: float, measured: float) -> dict[str, Any]:
    return {"what": what, "method": method, "predicted": predicted / 1e6, "measured": measured / 1e6}


def bytes_of_step(folder: Path, words: str) -> float:
    """Bytes of a step of ``lrk train method=WORDS`` with two processes."""
    method, *overrides = words.split()
    counts = []
    for steps in STEPS:
        run = [
            f"method={method}",
            *overrides,
            f"method.rank={RANK}",
            f"model.path={folder}",
            f"train.max_steps={steps}",
        ]
        task = ["task=tiny_entailment", "task.limit=16", "train.batch_size=4", "train.eval_every=1000", "test=false"]
        command = ["unshare", "-n", sys.executable, __file__, "--alone", *run, *task, "train.checkpoint_every=1000"]
        counts.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]))
    return (counts[1] - counts[0]) / (STEPS[1] - STEPS[0])


def alone(overrides: list[str]) -> None:
    """Train with two processes in this empty network namespace, and print the bytes that its loopback received."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, "hardware.processes=2", "hardware.threads=1", f"outputs={folder}"]
        subprocess.run([sys.executable, "-m", "lowrank_cli", "train", *words], check=True)
    (loopback,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    print(loopback.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.alone)
        return
    folder = (args.folder or BUNDLED).resolve()
    rows = [*ratios(folder, args.rounds), *(traffic(folder) if args.folder is None else ())]
    about = {"git": git_state(), "machine": cpu_name(), "packages": package_versions(), "rounds": args.rounds}
    checked = json.loads(CHECKED.read_text()) if CHECKED.is_file() else {}
    checked[name_of(folder)] = {**about, "rank": RANK, "rows": rows}
    CHECKED.write_text(json.dumps(checked, indent=1) + "\n")


if __name__ == "__main__":
    main()
