"""Make a small image encoder with random weights, and drawn images in folders named for their labels.

    python -m lowrank_cli.tasks.tiny.vision demo
    lrk train model=vit_base model.path=demo/vit task=image_folder task.path=demo/shapes

Everything follows from a seed; it needs no network. An image shows one bright shape near its middle on a dark ground.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image

SHAPES = ("circle", "cross", "square", "triangle")
SPLITS = {"train": 80, "validation": 20, "test": 25}  #: images of each shape
SIZE = 32  #: pixels on a side
#: Settings of each kind of encoder: less than a tenth of a million parameters, drawn from a wide distribution, because
#: adapters learn from what frozen weights make of an image.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
    "initializer_range": 0.15,
}
KINDS = ("vit", "clip", "siglip", "dinov2")


def make_model(folder: Path, kind: str = "vit", seed: int = 0) -> None:
    """Write an image encoder with random weights, without a head, and its image processor."""
    import torch
    import transformers

    torch.manual_seed(seed)
    settings: dict[str, Any] = {**SIZES}
    settings |= {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 2 * SIZES["hidden_size"]}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1}
    if kind in ("clip", "siglip"):
        settings = {"vision_config": settings, "text_config": text}
    config = transformers.AutoConfig.for_model(kind, **settings)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    processor = transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)


def make_images(folder: Path, seed: int = 0, counts: dict[str, int] | None = None) -> None:
    """Write ``SPLIT/SHAPE/N.png``; ``counts`` are the images of each shape in each split."""
    draw = random.Random(seed)
    for split, count in (counts or SPLITS).items():
        for shape in SHAPES:
            (folder / split / shape).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                drawn(shape, draw).save(folder / split / shape / f"{number}.png")


def drawn(shape: str, draw: random.Random) -> PIL.Image.Image:
    """An image of a shape."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIZE, SIZE), _color(draw, 0, 80))
    radius = draw.randint(9, 12)
    x, y = (SIZE // 2 + draw.randint(-2, 2) for _ in "xy")
    box, color, pen = (x - radius, y - radius, x + radius, y + radius), _color(draw, 150, 255), ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, color)
    elif shape == "square":
        pen.rectangle(box, color)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], color)
    else:
        third = radius // 3
        pen.rectangle((x - radius, y - third, x + radius, y + third), color)
        pen.rectangle((x - third, y - radius, x + third, y + radius), color)
    return image


def _color(draw: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw.randint(low, high) for _ in "rgb")


def main() -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="Make a small image encoder and images of shapes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="vit", help="of encoder (default: vit)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable_progress_bar()
    make_model(given.folder / given.kind, given.kind, given.seed)
    make_images(given.folder / "shapes", given.seed)
    print(f"model: {given.folder / given.kind}; images: {given.folder / 'shapes'}")


if __name__ == "__main__":
    main()
