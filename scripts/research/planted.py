"""Do scores find the modules that matter? A task planted in known modules, so that the right answer is known.

    python scripts/research/planted.py FOLDER [--plants 3] [--strength 0.7] [--steps 300]

A plant adds a random update of rank 2 to one random module of every layer of the bundled model. What the changed model
answers to the sentences of tiny_topic is the task, and the original model is adapted to it. So an update of the planted
modules alone can do it, and a score or an allocation of ranks is right where it prefers them. For each plant:

- LoRA on all modules is trained, and its modules and ranks are scored by every kind of score;
- ALoRA and AdaLoRA are trained, which move ranks, and their final ranks are the score;
- LoRA of the same rank is trained on the planted modules alone, and on as many others, also one a layer: whether it
  matters at all where the update goes.

Prints for each score how many of the planted modules it puts first in their layer (hits; chance is one in seven), its
AUC over all modules (chance 0.5), and the accuracy of the trained arms: means over the plants, and their range.
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

from lowrank_cli import config, tasks
from lowrank_cli.adapter.files.save_load import PATTERN
from lowrank_cli.adapter.target_sites import Site, known_sites
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run
from lowrank_cli.runs.scores import SavedScores
from lowrank_cli.schema import KINDS

TASK = "tiny_topic"
TEST, DEV = 560, 256  #: sentences; the rest is for training
RANK = 2  #: of a planted update
OTHERS = 2  #: draws of modules that are not planted
ATTEMPTS = 200
CHANGED, MOST = 0.4, 0.45  #: shares of the sentences: whose answer changes at least, with one label at most

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


def plant(folder: Path, planted: dict[int, Site], seed: int, strength: float) -> None:
    """Write the task of one plant as JSON lines into ``folder``, and print how its labels are distributed.

    Random updates are drawn until the answers to ``CHANGED`` of the sentences change, and no label has over ``MOST``.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BUNDLED).eval(), AutoTokenizer.from_pretrained(BUNDLED)
    task = tasks.load(config.compose("evaluate", ["method=none", f"task={TASK}"]).config.task)
    prompts = {example.columns[0]: example.prompt for split in (task.train, task.dev, task.test) for example in split}
    sentences = sorted(prompts)
    random.Random(seed).shuffle(sentences)
    answers = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in task.label_words]
    by_length: dict[int, list[int]] = {}
    rows = [tokenizer(prompts[sentence]).input_ids for sentence in sentences]
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)

    @torch.no_grad()
    def labels() -> torch.Tensor:
        found = torch.empty(len(rows), dtype=torch.long)
        for indices in by_length.values():
            ids = torch.tensor([rows[index] for index in indices])  # (B, T)
            found[indices] = model(input_ids=ids, logits_to_keep=1).logits[:, -1, answers].argmax(dim=-1)
        return found

    before = labels()
    weights = [model.get_submodule(site.path).weight.data for site in planted.values()]  # (out, in) each
    own = [weight.clone() for weight in weights]
    torch.manual_seed(seed)
    for _ in range(ATTEMPTS):
        for weight, original in zip(weights, own, strict=True):
            update = torch.randn(weight.shape[0], RANK) @ torch.randn(RANK, weight.shape[1])
            weight.copy_(original + strength * original.norm() / update.norm() * update)
        after = labels()
        changed = (before != after).float().mean().item()
        counts = after.bincount(minlength=len(answers))
        if changed >= CHANGED and counts.max() <= MOST * len(rows):
            break
    else:
        raise SystemExit(f"plant {seed}: no update in {ATTEMPTS} changes the answers well; try another --strength")
    print(f"plant {seed}: {', '.join(site.key for site in planted.values())}")
    print(f"  labels {counts.tolist()}, {changed:.0%} of the answers changed", flush=True)
    lines = [{"sentence": sentence, "label": label} for sentence, label in zip(sentences, after.tolist(), strict=True)]
    folder.mkdir(parents=True)
    ends = {"test": TEST, "dev": TEST + DEV, "train": len(lines)}
    start = 0
    for split, end in ends.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[start:end]))
        start = end


def lrk(folder: Path, verb: str, *overrides: str) -> Run:
    """The finished run in ``folder``, made now where it is not there."""
    if not (folder / "metrics.json").is_file():
        outputs = folder.parent / "outputs"
        command = [sys.executable, "-m", "lowrank_cli", verb, *overrides, f"outputs={outputs}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (outputs / "latest").resolve().rename(folder)
    return Run.open(folder)


def only(chosen: dict[int, Site], file: Path) -> list[str]:
    """Overrides that train these modules alone, with a rank as in LoRA; the setting is written into ``file``."""
    lines = "".join(f"  {layer}: [{site.role}]\n" for layer, site in chosen.items())
    file.write_text(f"name: {file.stem}\nlayers:\n{lines}")
    return ["method=fanlora", f"method.setting={file}", "method.match_parameters=false"]


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


def hits(scores: Scores, planted: dict[int, Site], layers: Layers) -> float:
    """Share of the layers whose planted module has the highest score of the layer; ties count in part."""
    found = []
    for layer, site in planted.items():
        of_layer = [scores.get(other.key, 0.0) for other in layers[layer]]
        best = max(of_layer)
        found.append((scores.get(site.key, 0.0) == best) / of_layer.count(best))
    return mean(found)


def auc(scores: Scores, planted: dict[int, Site], layers: Layers) -> float:
    """Probability that a planted module has a higher score than another one; ties count half."""
    keys = {site.key for site in planted.values()}
    others = [site.key for of_layer in layers.values() for site in of_layer if site.key not in keys]
    pairs = [(scores.get(a, 0.0), scores.get(b, 0.0)) for a in keys for b in others]
    return mean((a > b) + 0.5 * (a == b) for a, b in pairs)


def one_plant(folder: Path, seed: int, strength: float, steps: int, layers: Layers) -> dict[str, dict[str, float]]:
    """Hits and AUC by score, and test accuracy by arm."""
    planted = drawn(layers, f"plant {seed}")
    if not (folder / "data").is_dir():
        plant(folder / "data", planted, seed, strength)
    common = [f"task={TASK}", f"task.path={folder / 'data'}", "task.splits=given", f"seed={seed}", "hardware.threads=1"]
    common += [f"train.max_steps={steps}", "train.epochs=100", "train.patience=100"]
    arms = {
        "lora": lrk(folder / "lora", "train", "method=lora", *common),
        "alora": lrk(folder / "alora", "train", "method=alora", *common),
        "adalora": lrk(folder / "adalora", "train", "method=adalora", *common),
        "planted": lrk(folder / "planted", "train", *only(planted, folder / "planted.yaml"), *common),
    }
    for draw in range(OTHERS):
        rest = {layer: [site for site in of_layer if site != planted[layer]] for layer, of_layer in layers.items()}
        chosen = drawn(rest, f"others {seed} {draw}")
        settings = only(chosen, folder / f"others-{draw}.yaml")
        arms[f"others {draw}"] = lrk(folder / f"others-{draw}", "train", *settings, *common)
    bare = lrk(folder / "none", "evaluate", "method=none", *common[:3], "evaluate.batch_size=64")
    found = scored(folder, arms["lora"])
    found |= {f"final ranks of {name}": final_ranks(arms[name]) for name in ("alora", "adalora")}
    return {
        "hits": {name: hits(scores, planted, layers) for name, scores in found.items()},
        "auc": {name: auc(scores, planted, layers) for name, scores in found.items()},
        "accuracy": {"none": bare.metrics["test/accuracy"]}
        | {name: run.metrics["test/accuracy"] for name, run in arms.items()},
    }


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """Means over the plants, and their range."""

    def span(values: list[float]) -> str:
        return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = ["| score | hits | AUC |", "|---|---|---|"]
    for name in results[0]["hits"]:
        cells = [span([result[key][name] for result in results]) for key in ("hits", "auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| trained | test accuracy |", "|---|---|"]
    for name in results[0]["accuracy"]:
        lines.append(f"| {name} | {span([result['accuracy'][name] for result in results])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plants", type=int, default=3)
    parser.add_argument("--strength", type=float, default=0.7, help="norm of an update over that of its weight")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    folder, layers = args.folder.resolve(), sites()
    results = []
    for seed in range(args.plants):
        results.append(one_plant(folder / f"plant-{seed}", seed, args.strength, args.steps, layers))
        record = {"plants": args.plants, "strength": args.strength, "steps": args.steps, "results": results}
        (folder / "planted.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
