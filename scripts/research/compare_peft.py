"""Our LoRA and the PEFT library's in the same setting: same model, data order, schedule, seeds and training loop.

    python scripts/research/compare_peft.py model=minilm model.path=FOLDER task=sst2 task.path=FOLDER \
        method.rank=8 train.learning_rate=1e-3 train.max_steps=150 train.batch_size=16 --seeds 0 1 2 --out FILE

Every override of ``lrk train`` is understood. Prints dev accuracy by seed and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from lowrank_cli.config.composition import compose
from lowrank_cli.methods.lora import LoRA
from lowrank_cli.runs import Run
from lowrank_cli.runs.provenance import cpu_name, package_versions
from lowrank_cli.session import session
from lowrank_cli.stages import train


class PeftLoRA(LoRA):
    """The PEFT library's LoRA on the same linears, handed to our training loop."""

    def adapt(self, model):
        import peft

        from lowrank_cli.adapter.adapted_model import Adapter
        from lowrank_cli.adapter.target_sites import find_sites, head_names

        config = self.config
        adapter = Adapter(model, {})
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[site.path for site in find_sites(model, list(config.target_modules))],
            modules_to_save=head_names(model) or None,
            task_type="SEQ_CLS" if head_names(model) else "CAUSAL_LM",
        )
        peft.get_peft_model(model, settings)
        adapter.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return adapter


def accuracy(overrides: list[str], method: type[LoRA], folder: Path) -> dict[str, float]:
    """Metrics of one training with ``method``."""
    composed = compose("train", [*overrides, "method=lora"])
    session.methods.create = method
    run = Run.create(
        folder, stage="train", config=composed.resolved, choices=composed.choices, overrides=overrides, command=""
    )
    return train.run(composed.config, run, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
    for seed in args.seeds:
        for name, method in (("ours", LoRA), ("peft", PeftLoRA)):
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(accuracy([*args.overrides, f"seed={seed}"], method, Path(folder)))
            row = found[name][-1]
            print(
                f"seed {seed} {name}: dev accuracy {row['dev/accuracy']:.4f} in {row['train/seconds']:.0f} s",
                flush=True,
            )
    medians = {name: statistics.median(row["dev/accuracy"] for row in rows) for name, rows in found.items()}
    print(f"median dev accuracy: ours {medians['ours']:.4f}, peft {medians['peft']:.4f}")
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "command": f"python scripts/research/compare_peft.py {' '.join(args.overrides)}",
            "seeds": args.seeds,
            "commit": commit,
            "machine": cpu_name(),
            "packages": package_versions(),
            "median_dev_accuracy": medians,
            "runs": found,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
