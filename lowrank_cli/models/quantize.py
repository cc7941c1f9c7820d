"""``hardware.quantization=nf4``: frozen linears in 4 bits, as in QLoRA.

Dettmers et al., NeurIPS 2023, arXiv 2305.14314. NormalFloat4 in blocks of 64 weights, with quantised scales (double
quantisation, section 3) and products in bf16. bitsandbytes quantises while transformers reads the checkpoint.
Embeddings, norms, heads and poolers are not quantised.
"""

from __future__ import annotations

from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.schema import HardwareConfig

#: Linears that are not quantised: heads may be new and trainable, or share their weight with the embedding.
SKIPPED = ["lm_head", "embed_out", "classifier", "score", r".*\.pooler"]


def require_quantization(quantization: str | None) -> None:
    """Raise UserError if ``quantization`` is set and bitsandbytes is missing."""
    from transformers.utils import is_bitsandbytes_available
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

    if quantization and not is_bitsandbytes_available():
        raise UserError(
            f"hardware.quantization: {quantization} needs the package bitsandbytes, {BITSANDBYTES_MIN_VERSION} or "
            f"newer; install it, or set hardware.quantization=null"
        )


def quantizing(hardware: HardwareConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise each weight as it is read, on this process's device."""
    import torch
    from transformers import BitsAndBytesConfig

    device = torch.cuda.current_device() if hardware.device == "cuda" else hardware.device
    return {
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=hardware.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=SKIPPED,
        ),
    }
