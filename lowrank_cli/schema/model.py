"""Which pretrained model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from lowrank_cli.errors import UserError, nearest, require_choice, require_range

#: Sizes of Llama models: layers, width, feed-forward width, heads, key-value heads, vocabulary.
SHAPES = {
    "100m": (12, 768, 2048, 12, 12, 32000),
    "1b": (16, 2048, 8192, 32, 8, 128256),  # Llama 3.2
    "7b": (32, 4096, 11008, 32, 32, 32000),  # Llama 2
    "8b": (32, 4096, 14336, 32, 8, 128256),  # Llama 3
    "13b": (40, 5120, 13824, 40, 40, 32000),  # Llama 2
    "70b": (80, 8192, 28672, 64, 8, 32000),  # Llama 2
}
TRUST = "model.trust_remote_code"  #: the key that no file can set, only what is typed


@dataclass
class ModelConfig:
    """Which pretrained model, and where it lies."""

    name: str = MISSING  #: short name, used in run folders and tables; ``???``: that of ``id``, ``path`` or ``gguf``
    kind: str = MISSING  #: ``causal`` (LM head) or ``encoder`` (linear head on the first token or the pooler)
    id: Optional[str] = MISSING  #: repository on the Hub; null when only a folder can be given
    path: Optional[str] = MISSING  #: a local folder, instead of the Hub; relative to the caller's directory
    bundled: bool = MISSING  #: the checkpoint inside this package (``path`` overrides it)
    revision: Optional[str] = MISSING  #: branch, tag or commit on the Hub
    trust_remote_code: bool = MISSING  #: run Python code that comes with the checkpoint
    #: a GGUF file, or a folder with one, instead of the Hub: converted once, see :mod:`lowrank_cli.models.gguf`
    gguf: Optional[str] = None
    #: an installed Python package that holds the model as GGUF, used where the Hub cannot be reached
    package: Optional[str] = None
    #: whether it reads images instead of texts: ViT, DINOv2, the image encoder of CLIP or SigLIP (``kind: encoder``)
    images: bool = False
    license: Optional[str] = None  #: of the weights, as the Hub spells it (``apache-2.0``), for model cards
    #: hidden size, from which the usual learning rate follows; read from a folder or file where one is given
    width: Optional[int] = None
    #: random weights instead: a name of :data:`SHAPES`, or LAYERSxWIDTHxFEEDFORWARDxHEADS (``lrk bench`` only)
    shape: Optional[str] = None

    def validate(self) -> None:
        require_choice("model.kind", self.kind, ("causal", "encoder"))
        if self.shape is not None:
            self.sizes()
        if self.width is not None:
            require_range("model.width", self.width, 1)
        if not (self.bundled or self.id or self.path or self.gguf):
            raise UserError("model: nothing to load; set model.id (Hub), model.path (folder) or model.gguf (file)")
        if self.gguf and self.path:
            raise UserError(f"model.gguf: {self.gguf} and model.path={self.path} both name the weights; give one")
        if self.package is not None and not self.package.isidentifier():  # a dotted name would import what is before it
            raise UserError(f"model.package: '{self.package}' is not the name of a Python package")
        if self.images and self.kind != "encoder":
            raise UserError(f"model.images: true is for model.kind=encoder, not {self.kind}; set model.kind=encoder")
        if self.gguf and self.kind == "encoder":
            raise UserError("model.gguf: holds causal models; set model.kind=causal, or name an encoder by model.path")

    def sizes(self) -> tuple[int, ...]:
        """What ``shape`` stands for, as a row of :data:`SHAPES`."""
        assert self.shape is not None
        if self.shape in SHAPES:
            return SHAPES[self.shape]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", self.shape):
            raise UserError(
                f"model.shape: unknown value '{self.shape}'{nearest(self.shape, SHAPES)} "
                f"(allowed: {', '.join(SHAPES)}, or LAYERSxWIDTHxFEEDFORWARDxHEADS, such as 12x768x2048x12)"
            )
        layers, width, feed_forward, heads = map(int, self.shape.split("x"))
        if width % (2 * heads):
            raise UserError(f"model.shape: a width of {width} does not divide into {heads} heads of even size")
        return layers, width, feed_forward, heads, heads, 32000
