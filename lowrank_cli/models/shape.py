"""Models with random weights, to measure time and memory, which depend on the shape alone."""

from __future__ import annotations

from typing import Any

from lowrank_cli.schema import HardwareConfig, ModelConfig
from lowrank_cli.schema.hardware import ATTENTION


def random_model(model: ModelConfig, hardware: HardwareConfig, device: Any, generates: bool = False) -> tuple[Any, str]:
    """A ``LlamaForCausalLM`` with the sizes in ``model.shape``, on ``device``, in the precision of ``hardware``.

    Weights are drawn from the device's global generator (seed it first).
    ``generates`` and the second result are those of :func:`lowrank_cli.models.prepack.prepack_for`.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lowrank_cli.models.prepack import prepack_for

    layers, width, feed_forward, heads, key_value_heads, vocabulary = model.sizes()
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
    )
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION[hardware.attention]
        ).eval()
    return network, prepack_for(network, hardware, generates)
