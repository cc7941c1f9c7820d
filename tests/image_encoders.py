"""Random encoders of images and drawn images, as the documentation makes them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from lowrank_cli.tasks.tiny import vision

KINDS = vision.KINDS
FEW = {"train": 4, "validation": 2, "test": 3}  #: images of each shape


def model(folder: Path, kind: str = "vit") -> Path:
    """The folder of a checkpoint of two layers."""
    vision.make_model(folder, kind)
    return folder


def images(folder: Path, counts: dict[str, int] = FEW) -> Path:
    """The folder of a data set."""
    vision.make_images(folder, counts=counts)
    return folder


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Random pixels and labels."""
    drawn = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=drawn), "labels": torch.arange(rows) % 4}


def loaded(folder: Path):
    """The model of a folder with a head for the four shapes, in evaluation mode."""
    torch.manual_seed(1)
    return transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=4).eval()
