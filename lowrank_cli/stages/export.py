"""``lrk export``: a trained adapter in a format for other programs, refused if its outputs would differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import engines
from lowrank_cli.adapter.files.export import as_lora, loaded_error, lora_error, save_lora, save_merged
from lowrank_cli.adapter.files.gguf_export import LORA_FILE, MODEL_FILE, save_lora_gguf, save_merged_gguf
from lowrank_cli.adapter.files.save_load import TOLERANCE, canary, peft_config
from lowrank_cli.errors import UserError
from lowrank_cli.icl import calibrate
from lowrank_cli.methods.protocol import Calibrates
from lowrank_cli.models.load import quiet
from lowrank_cli.runs import Run, atomic_folder, progress
from lowrank_cli.runs.vllm_command import vllm_refusal
from lowrank_cli.schema import ExportRun
from lowrank_cli.session.session import Session, load_adapter, start


def run(config: ExportRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Write ``export/`` into ``run``'s folder.

    Raises:
        UserError: the exported logits differ by more than ``export.max_error``.
    """
    session = start(config, adapter_run)
    load_adapter(session)
    session.greet(run)
    session.model.eval()
    settings = config.export
    tolerance = TOLERANCE[str(session.model.dtype).removeprefix("torch.")]
    allowed = tolerance if settings.max_error is None else settings.max_error
    if isinstance(session.method, Calibrates):
        return calibrate.export(session, run, allowed)
    assert session.adapter is not None
    metrics: dict[str, float] = {}
    with atomic_folder(run.file("export")) as folder:
        for chat in session.chats.values():  # whoever serves the model asks as it was trained
            session.tokenizer.chat_template = chat.template
        (session.processor or session.tokenizer).save_pretrained(folder)
        if settings.whole:
            error = _save_whole(session, settings.format, folder)
        else:
            error, metrics = _save_lora(config, session.adapter, folder)
        if not error <= allowed:
            raise UserError(
                f"export.max_error: the exported logits differ by {error:.2g} of the largest (allowed: "
                f"{allowed:g}); set {_alternatives(config)}a larger export.max_error"
            )
    return {**metrics, "export/logit_error": error}


def _save_lora(config: ExportRun, adapter: Adapter, folder: Path) -> tuple[float, dict[str, float]]:
    """Write a LoRA; returns the relative error of the canary's logits, and what more there is to report."""
    settings = config.export
    loras, lost = as_lora(adapter, settings.rank)
    loras = _for_engine(adapter, loras, settings.target)
    rank = max(len(a) for _, a in loras.values())
    adapter_rank = max(sum(module.rank for module, _ in linear.updates) for linear in adapter.linears.values())
    if rank > adapter_rank:
        progress.console().print(_explain_rank(config, rank, adapter_rank, peft_config(adapter) is not None))
    if settings.format == "gguf":
        save_lora_gguf(adapter, loras, folder / LORA_FILE)
    else:
        save_lora(adapter, loras, folder)
    return lora_error(adapter, loras), {"export/rank": rank, "export/weight_error": lost}


def _save_whole(session: Session, form: str, folder: Path) -> float:
    """Write the whole model, load it again, and return the relative error of the canary's logits."""
    adapter, dtype = session.adapter, session.model.dtype
    assert adapter is not None
    ids, expected = canary(adapter)
    loaded: Any
    with quiet(True):
        if form == "gguf_merged":
            save_merged_gguf(adapter, folder)
            known = {"config": session.model.config, "dtype": dtype}
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL_FILE, **known)
        else:
            save_merged(adapter, folder)
            loaded = type(session.model).from_pretrained(folder, dtype=dtype)
    return loaded_error(loaded.to(session.device).eval(), ids, expected)


def _for_engine(adapter: Adapter, loras: engines.Loras, target: str) -> engines.Loras:
    """``loras`` as the engine ``target`` takes them. Raises UserError if it cannot."""
    if target == "sglang":
        return engines.for_sglang(adapter, loras)
    if target == "vllm":
        engines.require_no_head(adapter, target)
        if refusal := vllm_refusal(adapter.model.config.model_type, max(len(a) for _, a in loras.values())):
            raise UserError(f"export.target: {refusal}")
    return loras


def _alternatives(config: ExportRun) -> str:
    """Settings with which an export may differ less, each followed by "or"."""
    settings = ["a larger export.rank (null keeps everything)"] if config.export.rank else []
    if config.hardware.quantization is None:
        other = {"lora": "merged", "merged": "lora", "gguf": "gguf_merged", "gguf_merged": "gguf"}
        settings.append(f"export.format={other[config.export.format]}")
        if config.hardware.precision == "bf16":
            settings.append("hardware.precision=fp32")
    return "".join(f"{setting}, or " for setting in settings)


def _explain_rank(config: ExportRun, rank: int, adapter_rank: int, peft_loads: bool) -> str:
    """Why an export has a higher rank than its adapter; ``peft_loads``: PEFT can load the adapter as it is."""
    also = f"; PEFT loads the adapter/ of run={config.run} as it is" if peft_loads else ""
    return (
        f"rank {rank}: what {config.method.name} changes in a weight is not a LoRA of its largest rank, "
        f"{adapter_rank}; export.rank=N keeps the best N ranks{also}"
    )
