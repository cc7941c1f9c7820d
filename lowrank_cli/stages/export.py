"""``lrk export``: a trained adapter for other programs, refused where it would not be the same function."""

from __future__ import annotations

from pathlib import Path

import torch

from lowrank_cli.adapter.files.export import as_lora, lora_error, save_lora, save_merged
from lowrank_cli.adapter.files.save_load import TOLERANCE, peft_config
from lowrank_cli.errors import UserError
from lowrank_cli.icl import calibrate
from lowrank_cli.inference import progress
from lowrank_cli.inference.session import start
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.models.load import quiet
from lowrank_cli.runs import Run, atomic_folder
from lowrank_cli.schema import ExportRun
from lowrank_cli.stages.evaluate import load_adapter


def run(config: ExportRun, run: Run, *, resume: bool = False) -> dict[str, float]:
    """Write ``export/`` into ``run``'s folder. Raises UserError above ``export.max_error``."""
    session = start(config)
    load_adapter(session)
    session.greet(run)
    session.model.eval()
    asked = config.export
    usual = TOLERANCE[str(session.model.dtype).removeprefix("torch.")]
    allowed = usual if asked.max_error is None else asked.max_error
    if isinstance(session.method, Calibrates):
        return calibrate.export(session, run, allowed)
    assert session.adapter is not None
    adapter = session.adapter
    metrics: dict[str, float] = {}

    def loaded(folder: Path) -> torch.nn.Module:
        return type(session.model).from_pretrained(folder, dtype=session.model.dtype).to(session.device).eval()

    with atomic_folder(run.file("export")) as folder:
        if asked.format == "lora":
            loras, lost = as_lora(adapter, asked.rank)
            error = lora_error(adapter, loras)
            rank = max(len(a) for _, a in loras.values())
            metrics |= {"export/rank": rank, "export/weight_error": lost}
            own = max(sum(part.rank for part, _ in linear.updates) for linear in adapter.linears.values())
            if rank > own:
                progress.console().print(_why(config, rank, own, whole=peft_config(adapter) is not None))
            save_lora(adapter, loras, folder)
        else:
            with quiet(True):
                error = save_merged(adapter, folder, loaded)
        session.tokenizer.save_pretrained(folder)
        if not error <= allowed:
            raise UserError(
                f"export.max_error: the exported logits differ by {error:.2g} of the largest (allowed: "
                f"{allowed:g}); set {_instead(config)}a larger export.max_error"
            )
    return {**metrics, "export/logit_error": error}


def _instead(config: ExportRun) -> str:
    """Settings under which an export may differ less, each with an "or" behind it."""
    ways = ["a larger export.rank (null keeps everything)"] if config.export.rank else []
    if config.hardware.quantization is None:
        ways.append(f"export.format={'merged' if config.export.format == 'lora' else 'lora'}")
        if config.hardware.precision == "bf16":
            ways.append("hardware.precision=fp32")
    return "".join(f"{way}, or " for way in ways)


def _why(config: ExportRun, rank: int, own: int, whole: bool) -> str:
    """What an export of more than its adapter's ``own`` rank owes that to; ``whole``: PEFT reads the adapter itself."""
    also = f"; PEFT loads the adapter/ of run={config.run} as it is" if whole else ""
    return (
        f"rank {rank}: what {config.method.name} changes in a weight is no LoRA of its largest rank, {own}; "
        f"export.rank=N keeps the best N ranks{also}"
    )
