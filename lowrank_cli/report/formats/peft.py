"""Runs in the JSON layout of PEFT's method comparison, so that its loader and its page read them.

One file for each run, as PEFT has one for each experiment. In huggingface/peft (commit 5d602fd) the keys are those that
``log_results`` of ``method_comparison/MetaMathQA/utils.py`` writes and ``method_comparison/processing.py`` reads.
PEFT's loader needs numbers, so what a run did not measure is 0: reserved accelerator memory, all of it on a CPU, and
the train loss of a run that did not train.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.report.comparison import Comparison, Row, Section
from lowrank_cli.runs import Run, write_json

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write(comparison: Comparison, folder: Path) -> None:
    """Write ``<model>--<task>/<method>--<model>-<setting>-seed<seed>.json`` for each run of the comparison."""
    for section in comparison.sections:
        for row in section.rows:
            for seed, folders in row.runs.items() if not (row.pool or row.view) else ():
                experiment = "-".join(filter(None, [section.model, row.setting, f"seed{seed}"]))
                try:
                    record = experiment_record(Run.open(folders[0]), section, row, seed, f"{row.method}/{experiment}")
                except UserError:  # deleted since
                    continue
                target = folder / _plain(f"{section.model}--{section.task}")
                target.mkdir(parents=True, exist_ok=True)
                write_json(target / f"{_plain(row.method)}--{_plain(experiment)}.json", record)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", name)


def experiment_record(run: Run, section: Section, row: Row, seed: int, experiment: str) -> dict[str, Any]:
    """The record of one run; the metrics of its last entry hold the metric that the section compares."""
    info, config = run.info, run.config()
    model, method, train = config.get("model", {}), config.get("method", {}), config.get("train", {})
    parameters, total = run.metrics.get("trainable_parameters"), run.metrics.get("total_parameters")
    whole = parameters is not None and parameters == total
    return {
        "run_info": {
            "created_at": info.get("started", ""),
            "total_time": info.get("seconds", 0.0),
            "experiment_name": experiment,
            "peft_branch": f"lowrank-cli {info.get('packages', {}).get('lowrank-cli', '')}".strip(),
            "peft_worktree_is_dirty": (info.get("git") or {}).get("dirty", False),
            "train_config": {
                "model_id": model.get("id") or info.get("model") or section.model,
                "dtype": config.get("hardware", {}).get("precision"),
                "seed": seed,
                **train,
            },
            "peft_config": None if whole else {"peft_type": str(method.get("name", "")).upper(), **method},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": info.get("device_memory_bytes", 0),
            "accelerator_memory_reserved_99th": 0,
            "train_time": run.metrics.get("train/seconds", 0.0),
            "file_size": sum(file.stat().st_size for file in (run.path / "adapter").glob("*.safetensors")),
            "num_trainable_params": parameters,
            "num_total_params": total,
            "status": "success",
            "metrics": _metrics(run, section, row.values[seed], train.get("batch_size", 0)),
        },
        "meta_info": {
            "model_info": {"sha": model.get("revision"), "created_at": None},
            "dataset_info": {section.task: {"sha": None, "created_at": None}},
            "package_info": {
                key: value
                for name in PACKAGES
                for key, value in (
                    (f"{name}-version", info.get("packages", {}).get(name)),
                    (f"{name}-commit-hash", None),
                )
            },
            "system_info": {"system": info.get("platform"), "accelerator": info.get("device")},
            "pytorch_info": "",
        },
    }


def _metrics(run: Run, section: Section, value: float, batch_size: int) -> list[dict[str, Any]]:
    """An entry for each logged step with a dev metric, and the final one."""
    split, _, name = section.metric.partition("/")
    entries = []
    loss, tokens, step = 0.0, 0, 0
    for line in run.history():
        step, loss = line["step"], line.get("train/loss") or loss
        tokens = line.get("train/tokens", tokens)
        if "dev/loss" in line:
            entries.append(
                {"step": step, "valid loss": line["dev/loss"], "train loss": loss, "train samples": step * batch_size}
            )
    final = {
        "step": step,
        f"{split} {name}": value,
        "train loss": loss,
        "train samples": step * batch_size,
        "train total tokens": tokens,
    }
    return [*entries, final]
