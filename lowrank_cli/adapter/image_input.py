"""What a model of images reads in place of tokens: ``pixel_values`` (B, C, H, W), without a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BYTE = 256  #: values of a color channel
PIXELS = 16 * 16  #: of a patch, which is what a model reads as a token; some have 14 × 14 or 32 × 32


def reads_images(model: PreTrainedModel) -> bool:
    """Whether the model reads images and nothing else."""
    return model.main_input_name == "pixel_values"


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the image encoder in a ``config.json``: CLIP and SigLIP have a text encoder beside it."""
    return config.get("vision_config") or config


def image_tokens(config: Mapping[str, Any]) -> int:
    """Patches of an image, by the ``config.json`` of its model."""
    vision = _vision(config)
    height, width = _pair(vision.get("image_size", 224))  # ViT's values; most files leave defaults out
    high, wide = _pair(vision.get("patch_size", 16))
    return (height // high) * (width // wide)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A height and a width, where one number stands for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model was made for."""
    vision = _vision(model.config.to_dict())
    return vision["num_channels"], *_pair(vision["image_size"])


def image_width(config: Mapping[str, Any]) -> int | None:
    """Hidden size of the image encoder; None if ``config`` does not say."""
    return _vision(config).get("hidden_size")


def input_width(model: PreTrainedModel) -> int | None:
    """Hidden size of what reads texts or images; None if the model's configuration names none."""
    if reads_images(model):
        return image_width(model.config.to_dict())
    return getattr(model.config.get_text_config(), "hidden_size", None)


def input_vocabulary(model: PreTrainedModel) -> int:
    """Number of different tokens, or of the values of a color channel, that the model reads."""
    return BYTE if reads_images(model) else int(model.config.vocab_size)


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of the model for token ids (B, T); of a model of images, for an image made from each row."""
    ids = ids.to(model.device)
    if not reads_images(model):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape = image_shape(model)
    size = math.prod(shape)
    places = torch.arange(1, size + 1, device=ids.device)  # so that no two patches are alike
    values = ids.repeat(1, size // ids.shape[1] + 1)[:, :size] * places % BYTE  # (B, T) -> (B, C * H * W)
    pixels = (values / (BYTE / 2) - 1).view(-1, *shape)  # (B, C, H, W), between -1 and 1
    return {"pixel_values": pixels.to(model.dtype)}


def token_embedding(model: PreTrainedModel) -> Tensor | None:
    """The weight (V, D) of the token embedding, which a linear may share; None for a model of images."""
    if reads_images(model):
        return None
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
