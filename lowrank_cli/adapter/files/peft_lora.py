"""Reads low-rank updates in the format of the PEFT library, from a run of ours or from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import LINEARS, linear_shape
from lowrank_cli.errors import UserError
from lowrank_cli.reader import Finite, Where, read_json

MAX_PATTERN = 256  #: characters of a pattern
MAX_PATTERNS = 4096  #: patterns of an adapter; a model of 80 layers has 560 linears
#: A regular expression that cannot be slow: only single characters are repeated, with at most two unbounded repeats.
_ATOM = r"(?:\w|\\[.\-dw]|\.|-|\[[\w-]+\])"
_PLAIN_PATTERN = re.compile(rf"\^?(?:{_ATOM}[*+?]?|[()|])*\$?")

#: Options of the PEFT library that do not change the function of a LoRA of linears, or that :func:`read` handles.
NEUTRAL = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha use_rslora "
    "rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    "lora_dropout runtime_config megatron_core eva_config corda_config lora_ga_config loftq_config "
    "qalora_group_size".split()
)
#: Accepted values of other options; for ``init_lora_weights``, those that leave the frozen weights alone.
PLAIN: dict[str, list[Any]] = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, "gaussian", "eva", "orthogonal"],
}


class NotLowRank(UserError):
    """The adapter is more than low-rank products and routers of prompts, so it cannot be one of many in a batch."""


def _bounded(pattern: str) -> bool:
    """Whether ``pattern`` is a plain regular expression for module names."""
    if len(pattern) > MAX_PATTERN or not _PLAIN_PATTERN.fullmatch(pattern) or len(re.findall(r"[*+]", pattern)) > 2:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


Pattern = Annotated[
    str, Where(_bounded, r"a name of modules, in which \d, ., [0-9], (a|b) and up to two * or + may stand for others")
]
Rank = Annotated[int, Where(lambda rank: rank > 0, "a whole number above 0")]


_FEW = Where(lambda patterns: len(patterns) <= MAX_PATTERNS, f"up to {MAX_PATTERNS} keys with values")


class PeftConfig(TypedDict):
    """The keys of PEFT's ``adapter_config.json`` that determine what an adapter computes."""

    lora_alpha: Finite
    r: NotRequired[Rank]
    use_rslora: NotRequired[bool | None]
    rank_pattern: NotRequired[Annotated[dict[Pattern, Rank], _FEW] | None]
    alpha_pattern: NotRequired[Annotated[dict[Pattern, Finite], _FEW] | None]


@dataclass(frozen=True)
class Factors:
    """The update of one linear: s · B A, with A (R, I), B (O, R), and what else its kind of module has."""

    a: Tensor
    b: Tensor
    scale: float
    others: dict[str, Tensor]  #: (O,) each, by the names of :meth:`~lowrank_cli.adapter.low_rank.LowRank.tensors`


def read(
    model: PreTrainedModel, folder: Path, who: str, options: Collection[str] = (), others: Collection[str] = ()
) -> dict[str, Factors]:
    """The updates of an adapter by the paths of its linears.

    Args:
        who: takes the adapter, for error messages.
        options: options that are taken besides those of a plain LoRA.
        others: names of the tensors (O,) that these add to every linear.

    Raises:
        NotLowRank: other options.
        UserError: files are missing or damaged, or do not fit the model.
    """
    config = _config(folder, who, options)
    ranks, alphas = _compiled(config.get("rank_pattern")), _compiled(config.get("alpha_pattern"))
    tensors, factors = save_load.read_tensors(folder / save_load.WEIGHTS), {}
    paths = [
        name.removeprefix(save_load.PREFIX).removesuffix(".lora_A.weight")
        for name in tensors
        if name.startswith(save_load.PREFIX) and name.endswith(".lora_A.weight")
    ]
    if not paths:
        raise UserError(f"{folder}: {save_load.WEIGHTS} holds no LoRA")
    for path in paths:
        inputs, outputs = _shape(model, path, str(folder))
        a = tensors.pop(f"{save_load.PREFIX}{path}.lora_A.weight")
        b = tensors.pop(f"{save_load.PREFIX}{path}.lora_B.weight", None)
        if b is None or a.shape != (len(a), inputs) or b.shape != (outputs, len(a)):
            raise UserError(f"{folder}: the factors of '{path}' do not fit {outputs} × {inputs}")
        added = {}
        for name in others:
            full = f"{save_load.PREFIX}{path}.{name}"
            tensor = tensors.pop(full, None) if full in tensors else tensors.pop(f"{full}.weight", None)  # old files
            if tensor is None or tensor.numel() != outputs:
                raise UserError(f"{folder}: '{path}' has no {name} of {outputs} outputs")
            added[name] = tensor.flatten()  # (1, O), of a transposed weight, -> (O,)
        if not all(tensor.isfinite().all() for tensor in (a, b, *added.values())):
            raise UserError(f"{folder}: the factors of '{path}' hold NaN or infinity")
        if len(a) != (rank := _matched(ranks, path, config.get("r", len(a)))):
            raise UserError(f"{folder}: '{path}' has rank {len(a)}, and {save_load.CONFIG} says {rank}")
        alpha = _matched(alphas, path, config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        factors[path] = Factors(a, b, scale, added)
    if tensors:
        raise UserError(f"{folder}: has '{min(tensors)}', which is no part of a LoRA of linears")
    return factors


def _config(folder: Path, who: str, options: Collection[str]) -> dict[str, Any]:
    """``adapter_config.json``. Raises NotLowRank if it does not describe a plain LoRA, but for ``options``."""
    if not (folder / save_load.CONFIG).exists():
        raise UserError(f"{folder}: not an adapter folder ({save_load.CONFIG} is missing)")
    config = read_json(folder / save_load.CONFIG, PeftConfig)
    for key, value in config.items():
        plain = PLAIN.get(key, [False if value is True else None])
        if value and key not in NEUTRAL and key not in options and value not in plain:
            raise NotLowRank(f"{folder}: {save_load.CONFIG} has {key}={value}, and {who} takes {key}={plain[0]}")
    return config


def _compiled(patterns: dict[str, Any] | None) -> list[tuple[re.Pattern[str], Any]]:
    """Compile patterns as the PEFT library does: a pattern matches whole names at the end of a path."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in (patterns or {}).items()]


def _matched(patterns: list[tuple[re.Pattern[str], Any]], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``path``, or ``default``."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _shape(model: PreTrainedModel, path: str, source: str) -> tuple[int, int]:
    try:
        linear: nn.Module = model.get_submodule(path)
    except AttributeError:
        raise UserError(f"{source}: has '{path}', which this model lacks") from None
    linear = getattr(linear, "base", linear)  # inside a batch, or adapted
    if not isinstance(linear, LINEARS):
        raise UserError(f"{source}: '{path}' is no linear of this model")
    return linear_shape(linear)
