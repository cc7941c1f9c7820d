"""Do scores find the modules that matter? A model damaged in known modules, so that the right answer is known.

    python scripts/research/planted.py FOLDER [--plants 5] [--removed 12] [--steps 200]

The bundled model learns tiny_instruct_mix with all its weights. A plant then removes the largest singular directions
of one random module of every layer, and tiny_instruct is trained again. An update of the damaged modules can undo that,
one of as many others cannot, as the arms `damaged` and `others` show. So a score is right where it prefers the damaged
modules. For each plant:

- LoRA is trained on all modules with about as many parameters, and its modules and ranks are scored by every kind of
  score;
- ALoRA and AdaLoRA are trained with as many ranks, and where their ranks end is the score;
- LoRA of the rank that was removed is trained on the damaged modules alone, on the best of each layer by ablation
  (FanLoRA's way), and on others, drawn one a layer.

Prints for each score how many of the damaged modules it puts first in their layer (hits; chance is one in seven), its
AUC over all modules (chance 0.5), and the exact match of the trained arms: means over the plants, and their range.
Finished runs are kept, so it can be stopped and started again; FOLDER/planted.json has every number.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.adapter.files.save_load import PATTERN
from lowrank_cli.adapter.target_sites import Site, known_sites
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run
from lowrank_cli.runs.scores import SavedScores
from lowrank_cli.schema import KINDS

TASK = "tiny_instruct"
METRIC = "test/exact_match"
WIDE = 2  #: rank of LoRA, ALoRA and AdaLoRA, on all seven roles; the others have --removed on one
OTHERS = 2  #: draws of modules that are not damaged
TUNED = 400  #: steps of the whole model before it is damaged

Layers = dict[int, list[Site]]
Scores = dict[str, float]  #: of each module, by its key


def sites() -> Layers:
    """The bundled model's modules by layer."""
    layers: Layers = {}
    for site in known_sites(AutoModelForCausalLM.from_pretrained(BUNDLED)):
        layers.setdefault(site.layer, []).append(site)
    return layers


def drawn(layers: Layers, seed: str) -> dict[int, Site]:
    """One random module of each layer."""
    return {layer: random.Random(f"{seed} {layer}").choice(of_layer) for layer, of_layer in layers.items()}


def tuned(folder: Path) -> Path:
    """A folder with the bundled model after training all its weights on tiny_instruct_mix."""
    steps = [f"train.max_steps={TUNED}", "train.epochs=100", "train.patience=100"]
    run = lrk(folder / "full", "train", "method=full", f"task={TASK}_mix", "hardware.threads=1", *steps)
    return lrk(folder / "tuned", "export", f"run={run.path}", "export.format=merged").path / "export"


@torch.no_grad()
def damage(source: Path, folder: Path, damaged: dict[int, Site], removed: int) -> None:
    """Write the model in ``source`` without the ``removed`` largest singular directions of each module."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for site in damaged.values():
        weight = model.get_submodule(site.path).weight.data  # (out, in)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.sub_((u[:, :removed] * s[:removed]) @ v[:removed])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def lrk(folder: Path, verb: str, *overrides: str) -> Run:
    """The finished run in ``folder``, made now where it is not there."""
    if not folder.is_dir():
        outputs = folder.parent / "outputs"
        command = [sys.executable, "-m", "lowrank_cli", verb, *overrides, f"outputs={outputs}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (outputs / "latest").resolve().rename(folder)
    return Run.open(folder)


def only(chosen: dict[int, Site], rank: int, file: Path) -> list[str]:
    """Overrides that train these modules alone; the setting is written into ``file``."""
    lines = "".join(f"  {layer}: [{site.role}]\n" for layer, site in chosen.items())
    file.write_text(f"name: {file.stem}\nlayers:\n{lines}")
    return ["method=fanlora", f"method.setting={file}", "method.match_parameters=false", f"method.rank={rank}"]


def best(scores: Scores, layers: Layers) -> dict[int, Site]:
    """The module of each layer with the highest score."""
    return {layer: max(of_layer, key=lambda site: scores.get(site.key, 0.0)) for layer, of_layer in layers.items()}


def final_ranks(run: Run) -> Scores:
    """The rank of each module of an adapter whose ranks moved."""
    return json.loads((run.path / "adapter" / PATTERN).read_text())


def scored(folder: Path, adapter: Run) -> dict[str, Scores]:
    """Every kind of score of an adapter's modules; a module's score by ranks is the sum over its ranks."""
    found = {}
    for level, kinds in KINDS.items():
        for kind in kinds:
            if kind != "dnas":  # trains gates anew
                where = folder / f"score-{level}-{kind}"
                run = lrk(where, "score", f"run={adapter.path}", f"score.level={level}", f"score.kind={kind}")
                found[f"{kind} ({level}s)"] = {
                    entry["module"]: sum(entry["scores"]) for entry in SavedScores.read(run.path).modules
                }
    return found


def hits(scores: Scores, damaged: dict[int, Site], layers: Layers) -> float:
    """Share of the layers whose damaged module has the highest score of the layer; ties count in part."""
    found = []
    for layer, site in damaged.items():
        of_layer = [scores.get(other.key, 0.0) for other in layers[layer]]
        best = max(of_layer)
        found.append((scores.get(site.key, 0.0) == best) / of_layer.count(best))
    return mean(found)


def auc(scores: Scores, damaged: dict[int, Site], layers: Layers) -> float:
    """Probability that a damaged module has a higher score than another one; ties count half."""
    keys = {site.key for site in damaged.values()}
    others = [site.key for of_layer in layers.values() for site in of_layer if site.key not in keys]
    pairs = [(scores.get(a, 0.0), scores.get(b, 0.0)) for a in keys for b in others]
    return mean((a > b) + 0.5 * (a == b) for a, b in pairs)


def one_plant(
    source: Path, folder: Path, seed: int, removed: int, steps: int, layers: Layers
) -> dict[str, dict[str, float]]:
    """Hits and AUC by score, and exact match by arm."""
    damaged = drawn(layers, f"plant {seed}")
    if not (folder / "model").is_dir():
        damage(source, folder / "model", damaged, removed)
    print(f"plant {seed}: {', '.join(site.key for site in damaged.values())}", flush=True)
    common = [f"model={folder / 'model'}", f"task={TASK}", f"seed={seed}", "hardware.threads=1"]
    training = [*common, f"train.max_steps={steps}", "train.epochs=100", "train.patience=100"]

    def on(chosen: dict[int, Site], name: str) -> Run:
        return lrk(folder / name, "train", *only(chosen, removed, folder / f"{name}.yaml"), *training)

    arms = {
        name: lrk(folder / name, "train", f"method={name}", f"method.rank={WIDE}", *training)
        for name in ("lora", "alora", "adalora")
    }
    found = scored(folder, arms["lora"])
    found |= {f"final ranks of {name}": final_ranks(arms[name]) for name in ("alora", "adalora")}
    arms["damaged"] = on(damaged, "damaged")
    arms["best by ablation"] = on(best(found["ablation (modules)"], layers), "kept")
    for draw in range(OTHERS):
        rest = {layer: [site for site in of_layer if site != damaged[layer]] for layer, of_layer in layers.items()}
        arms[f"others {draw}"] = on(drawn(rest, f"others {seed} {draw}"), f"others-{draw}")
    bare = lrk(folder / "none", "evaluate", "method=none", *common, "evaluate.batch_size=64")
    return {
        "hits": {name: hits(scores, damaged, layers) for name, scores in found.items()},
        "auc": {name: auc(scores, damaged, layers) for name, scores in found.items()},
        "exact match": {"none": bare.metrics[METRIC]} | {name: run.metrics[METRIC] for name, run in arms.items()},
    }


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """Means over the plants, and their range."""

    def span(values: list[float]) -> str:
        return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = ["| score | hits | AUC |", "|---|---|---|"]
    for name in results[0]["hits"]:
        cells = [span([result[key][name] for result in results]) for key in ("hits", "auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| trained | exact match |", "|---|---|"]
    for name in results[0]["exact match"]:
        lines.append(f"| {name} | {span([result['exact match'][name] for result in results])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plants", type=int, default=5)
    parser.add_argument("--removed", type=int, default=12, help="singular directions taken out of each module")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    folder, layers = args.folder.resolve(), sites()
    source = tuned(folder)
    results = []
    for seed in range(args.plants):
        results.append(one_plant(source, folder / f"plant-{seed}", seed, args.removed, args.steps, layers))
        record = {"plants": args.plants, "removed": args.removed, "steps": args.steps, "results": results}
        (folder / "planted.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
