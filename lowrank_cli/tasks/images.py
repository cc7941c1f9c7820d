"""Images of examples: checked when a task is read, decoded batch by batch, because pixels take most memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_cli.errors import UserError
from lowrank_cli.tasks.encode import label_of
from lowrank_cli.tasks.task import Example, Picture

if TYPE_CHECKING:
    import PIL.Image

#: What is decoded. Pillow knows more formats, of which some start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NO_RANGE = ("I", "F")  #: Pillow's modes of 32-bit greys: no convention says which value is white


@dataclass(frozen=True)
class EncodedImage:
    """An image and its answer, for an encoder of images."""

    picture: Picture
    label: int | float | list[float] | list[int]  #: see :class:`~lowrank_cli.tasks.encode.EncodedText`
    length: int  #: patches that the model reads
    where: str  #: file and line, for messages
    answered = 1  #: answers with loss


def encode(example: Example, labels: int, length: int) -> EncodedImage:
    """The image with its answer.

    Args:
        labels: number of the head's outputs.
        length: patches that the model makes of an image.
    """
    assert example.picture is not None, "check_task asks for a task with images"
    return EncodedImage(example.picture, label_of(example, labels), length, example.where)


def collate(encoded: Sequence[EncodedImage], processor: Any) -> dict[str, torch.Tensor]:
    """``pixel_values`` (B, C, H, W) and ``labels``, (B,) or (B, labels).

    Args:
        processor: the model's image processor, which scales, crops and normalises.

    Raises:
        UserError: an image cannot be decoded.
    """
    images = [_opened(row.picture, row.where, decoded) for row in encoded]
    pixels: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]  # (B, C, H, W)
    return {"pixel_values": pixels, "labels": torch.tensor([row.label for row in encoded])}


def require_images(examples: Sequence[Example]) -> None:
    """Read the header of every image. Raises UserError for the first that is none."""
    for example in examples:
        if example.picture is not None:
            _opened(example.picture, example.where, _require_range)


def _require_range(image: PIL.Image.Image) -> None:
    if image.mode in NO_RANGE:
        raise ValueError("32-bit greys; save it as a PNG of 8 or 16 bits")


def decoded(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB, turned as its camera says. Of 16-bit greys the upper 8 bits are kept."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip them at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # Pillow warns of palettes with it
        image = image.convert("RGBA")
    return image.convert("RGB")


def _opened(picture: Picture, where: str, use: Callable[[PIL.Image.Image], Any]) -> Any:
    """What ``use`` makes of the open image. Raises UserError if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        known = isinstance(error, Image.UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if known else " ".join(str(error).split()) or type(error).__name__
        shown = f"'{picture}'" if isinstance(picture, Path) else "its bytes"
        raise UserError(f"{where}: {shown} cannot be read as an image ({reason})") from None
