"""Adapters on disk: safetensors with PEFT's tensor names, and a proof that ties them to a base model.

A folder holds ``adapter_model.safetensors``, ``adapter_config.json`` (only if stock PEFT computes the same function),
``rank_pattern.json`` (only if ranks have changed), ``canary.safetensors`` (a fixed input and its logits) and the proof
``lrk.json`` (base model, and the SHA-256 of every other file). Loading checks all of it, and raises an error unless the
adapter computes exactly what it did.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.image_input import input_vocabulary, inputs_of
from lowrank_cli.adapter.ranks import rebuild
from lowrank_cli.adapter.target_sites import head_names, peft_task_type
from lowrank_cli.errors import UserError
from lowrank_cli.reader import Count, PlainName, Sha256, Where, check, read_json

FORMAT = 1
PATTERN = "rank_pattern.json"  #: module → rank, if ranks have changed; another training can start from it
WEIGHTS, CANARY, CONFIG, PROOF = (
    "adapter_model.safetensors",
    "canary.safetensors",
    "adapter_config.json",
    "lrk.json",
)
PREFIX = "base_model.model."
TOKENS = 16  #: tokens of a canary
#: Largest difference of canary logits for the same function, relative to their largest magnitude.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
#: The same where an adapter was saved in one dtype and runs in another: on SmolLM2, 30 layers deep, the logits of the
#: model alone differ by 0.03 between fp32 and bf16, those of adapters by up to 0.06.
OTHER_DTYPE = 1e-1


class Proof(TypedDict):
    """``lrk.json``."""

    format: int
    model_type: str
    fingerprint: str
    dtype: Annotated[str, Where(TOLERANCE.__contains__, f"one of {', '.join(TOLERANCE)}")]
    ranks: dict[str, Count] | None
    about: dict[str, Any]
    files: dict[PlainName, Sha256]


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Copies of :func:`named` on the CPU."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in named(adapter).items()}


def named(adapter: Adapter) -> dict[str, Tensor]:
    """Every trained tensor and constant of the adapter, by its saved name."""
    adapter.require_declared()
    others = {
        f"{key}.{name}": tensor
        for key, module in adapter.modules.items()
        for name, tensor in {**module.tensors(), **module.constants()}.items()
    }
    return {PREFIX + name: tensor for name, tensor in {**adapter.trained, **adapter.constants, **others}.items()}


@torch.no_grad()
def assign(adapter: Adapter, saved: dict[str, Tensor], source: str) -> None:
    """Copy ``saved`` into the adapter. Raises UserError on missing, unexpected or differently shaped tensors."""
    expected = named(adapter)
    missing, unexpected = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or unexpected:
        which = f"lacks '{min(missing)}'" if missing else f"has '{min(unexpected)}', which this method does not make"
        raise UserError(f"{source}: {which} ({len(missing)} tensors missing, {len(unexpected)} unexpected)")
    for key, module in adapter.modules.items():
        module.match_shapes(
            {name: saved[f"{PREFIX}{key}.{name}"].shape for name in (*module.tensors(), *module.constants())}
        )
    for name, tensor in named(adapter).items():
        if tensor.shape != saved[name].shape:
            raise UserError(
                f"{source}: '{name}' is {tuple(saved[name].shape)}, but this method makes it {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])
    for linear in adapter.linears.values():
        linear.sync_weight()


def save(adapter: Adapter, folder: Path, about: dict[str, Any]) -> None:
    """Write the adapter into the existing ``folder``; :func:`load` returns ``about`` (JSON values)."""
    save_file(tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    config = peft_config(adapter)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    changed = adapter.ranks() if adapter.ranks() != adapter.initial_ranks else None
    if changed:
        (folder / PATTERN).write_text(json.dumps(changed, indent=2) + "\n")
    prove(adapter, folder, *canary(adapter), ranks=changed, about=about)


def prove(
    adapter: Adapter,
    folder: Path,
    ids: Tensor,
    logits: Tensor,
    ranks: dict[str, int] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write the canary, ``ids`` (1, 16) and ``logits`` (V,), and ``lrk.json`` with the hashes of all files.

    Args:
        ranks: the rank of each module, if ranks have changed.
        about: JSON values that :func:`load` returns.
    """
    save_file({"input_ids": ids, "logits": logits}, folder / CANARY)
    proof = {
        "format": FORMAT,
        "model_type": adapter.model.config.model_type,
        "fingerprint": adapter.fingerprint,
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "ranks": ranks,
        "about": about or {},
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != PROOF},
    }
    (folder / PROOF).write_text(json.dumps(proof, indent=2) + "\n")


def load(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """Load the adapter in ``folder`` into an adapted model and return its ``about``.

    Raises UserError as :func:`fill` does, and if the canary's logits differ from the saved ones.
    """
    proof = fill(adapter, folder)
    _check_canary(adapter, folder, proof["dtype"])
    return proof["about"]


def fill(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """Copy the tensors of ``folder`` into an adapted model, without the canary's check, and return ``lrk.json``.

    If ranks had changed, modules are resized first. Raises UserError if a file is missing, truncated or altered, the
    base model differs, or tensors do not fit.
    """
    proof = read_proof(folder)
    check_fingerprint(proof, adapter.fingerprint, str(folder), adapter.model.config.model_type)
    changed = proof.get("ranks")
    rebuild(adapter, adapter.initial_ranks if changed is None else changed, str(folder))
    assign(adapter, read_tensors(folder / WEIGHTS), str(folder))
    return proof


def check_fingerprint(proof: dict[str, Any], fingerprint: str, source: str, model_type: str) -> None:
    """Raise UserError unless the adapter with ``proof`` belongs to the model with ``fingerprint``."""
    if proof["fingerprint"] != fingerprint:
        raise UserError(
            f"{source}: this adapter belongs to another model (a '{proof['model_type']}' with fingerprint "
            f"{proof['fingerprint'][:12]}; loaded: '{model_type}' {fingerprint[:12]}); check model "
            f"and hardware.quantization"
        )


def read_proof(folder: Path) -> dict[str, Any]:
    """``lrk.json`` of an adapter folder, after checking the hashes of all files in it."""
    if not (folder / PROOF).exists():
        raise UserError(f"{folder}: not an adapter folder ({PROOF} is missing)")
    proof = read_json(folder / PROOF, dict[str, Any])
    if (version := proof.get("format", FORMAT)) != FORMAT:
        raise UserError(f"{folder}: adapter format {version} (this version reads {FORMAT})")
    check(proof, Proof, str(folder / PROOF))
    files = proof["files"]
    check_files(folder, files)
    for name in (WEIGHTS, CANARY):
        if name not in files:
            raise UserError(f"{folder}: {PROOF} does not list {name}")
    return proof


def check_files(folder: Path, files: dict[str, str]) -> None:
    """Raise UserError unless ``folder`` holds all ``files`` (name → SHA-256) unchanged."""
    for name, saved in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing")
        if sha256(folder / name) != saved:
            raise UserError(f"{folder}: {name} was truncated or altered (its SHA-256 is not the one saved with it)")


@torch.no_grad()
def canary(adapter: Adapter, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A fixed input (1, 16), and its logits: (V,) of the last position, or (labels,); fp32, on the CPU.

    A model of images reads an image made from the input.
    """
    model = adapter.model
    if ids is None:
        ids = (torch.arange(1, TOKENS + 1) * 37 % min(input_vocabulary(model), 1000)).unsqueeze(0)
    training = model.training
    model.train(False)
    with adapter.continuous():
        logits = model(**inputs_of(model, ids)).logits
    model.train(training)
    return ids, logits.reshape(-1, logits.shape[-1])[-1].float().cpu().contiguous()


def _check_canary(adapter: Adapter, folder: Path, dtype: str) -> None:
    ids, saved = read_canary(folder, input_vocabulary(adapter.model))
    _, logits = canary(adapter, ids)
    check_logits(logits, saved, str(folder), dtype, adapter.model.dtype)


def read_canary(folder: Path, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The saved input (1, 16) and logits, (V,) or (labels,), of :func:`canary`.

    Raises UserError unless the tensors fit a model with ``vocabulary`` tokens.
    """
    saved = read_tensors(folder / CANARY, "input_ids", "logits")
    ids, logits = saved["input_ids"], saved["logits"]
    if ids.dtype != torch.long or ids.shape != (1, TOKENS):
        raise UserError(f"{folder / CANARY}: input_ids is {ids.dtype} {tuple(ids.shape)}; expected {TOKENS} token ids")
    if not (ids.min() >= 0 and ids.max() < vocabulary):
        raise UserError(f"{folder / CANARY}: input_ids holds tokens that the model lacks (it has {vocabulary})")
    if logits.dtype != torch.float32 or logits.ndim != 1 or not logits.numel():
        raise UserError(f"{folder / CANARY}: logits is {logits.dtype} {tuple(logits.shape)}; expected one row of fp32")
    return ids, logits


def check_logits(logits: Tensor, saved: Tensor, source: str, then: str, now: torch.dtype) -> None:
    """Raise UserError unless a canary's ``logits`` equal the ``saved`` ones, within the precision of both dtypes.

    Args:
        source: for the error message.
        then: the model's dtype when the adapter was saved.
        now: the model's dtype.
    """
    if logits.shape != saved.shape:
        raise UserError(f"{source}: the canary has {len(saved)} logits, and this model gives {len(logits)}")
    error = (logits - saved).abs().max() / saved.abs().max().clamp_min(1e-6)
    if not error <= (TOLERANCE[then] if str(now) == f"torch.{then}" else OTHER_DTYPE):
        raise UserError(
            f"{source}: the adapter does not compute what it did when it was saved "
            f"(canary logits differ by {error:.1%}); check the model's files and hardware.precision"
        )


def peft_config(adapter: Adapter) -> dict[str, Any] | None:
    """PEFT's configuration of this adapter, or None if stock PEFT would not compute the same function.

    Ranks may differ between modules, but not the scale: servers that ignore PEFT's patterns use lora_alpha / r for all.
    """
    kinds = [(module.scale, module.peft_options()) for module in adapter.modules.values()]
    packed = any(site.span is not None for site in adapter.sites.values())
    if adapter.routing is not None or packed or not kinds or any(kind != kinds[0] for kind in kinds):
        return None
    scale, options = kinds[0]
    if options is None:
        return None
    heads, most = head_names(adapter.model), max(adapter.ranks().values())
    smaller = {re.escape(key): rank for key, rank in adapter.ranks().items() if rank != most}  # keys are patterns
    return {
        "peft_type": "LORA",
        "task_type": peft_task_type(adapter.model),
        "base_model_name_or_path": adapter.model.config.name_or_path or None,
        "r": most,
        "lora_alpha": scale * most,
        "rank_pattern": smaller,
        "alpha_pattern": {pattern: scale * rank for pattern, rank in smaller.items()},
        "target_modules": sorted(adapter.linears),
        "modules_to_save": heads or None,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_dropout": next(iter(adapter.modules.values())).dropout,
        "inference_mode": True,
        **options,
    }


def read_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError if it cannot be read or lacks one of ``names``."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    for name in names:
        if name not in tensors:
            raise UserError(f"{path}: the tensor '{name}' is missing")
    return tensors


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
