"""Training components of the frozen weight's singular value decomposition instead of random directions.

W = U S Vᵀ; a window I of its components starts as B₀ = (U S^½)_I, A₀ = (S^½ Vᵀ)_I (up to the scale s), and

    y = (W − s·B₀A₀) x + s·BA x  =  W x + s·(BA − B₀A₀) x  =  W x + s·[B − B₀ | B₀] [A ; A − A₀] x

The last form is computed. Function and gradients are those of training the components next to a frozen rest, but the
stored W stays untouched. So a fresh module changes nothing, not even by rounding; switching it off restores nothing;
updates far below the precision of a bf16 W are kept; and the result is a plain LoRA of rank 2R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.spans import take

#: Largest smaller side of a matrix with exact principal components (LAPACK: about 1 s at 768 × 2048 on one core).
EXACT = 1024


class Window(LowRank):
    """A low-rank module that replaces components of the weight (O, I): s·(BA − B₀A₀).

    The initial factors are saved with the trained ones: signs and order of singular vectors differ between machines,
    so another decomposition would give another function.
    """

    rank_axes = {}  # a rank appears twice in the update, with its trained and its initial factors

    start_a: Tensor  #: A₀ (R, I), fp32
    start_b: Tensor  #: B₀ (O, R), fp32

    def constants(self) -> dict[str, Tensor]:
        return {"lora_A.start": self.start_a, "lora_B.start": self.start_b}

    def down(self) -> Tensor:
        return torch.cat((self.lora_a, self.lora_a - self.start_a))  # (R, I) -> (2R, I)

    def up(self) -> Tensor:
        return torch.cat((self.lora_b - self.start_b, self.start_b), dim=1)  # (O, R) -> (O, 2R)

    @torch.no_grad()
    def set_components(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Train the components u (O, R), s (R,), v (R, I) from B₀ = u (s / scale)^½, A₀ = (s / scale)^½ v."""
        self._set_factors(*self._factors(u, s, v))

    def _factors(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        root = (s / self.scale).sqrt()
        return u * root, root.unsqueeze(1) * v  # (O, R), (R, I)

    def _set_factors(self, b: Tensor, a: Tensor) -> None:
        self._set_start(b, a)
        self.lora_a.data, self.lora_b.data = self.start_a.clone(), self.start_b.clone()

    def _set_start(self, b: Tensor, a: Tensor) -> None:
        for name, start in (("start_b", b), ("start_a", a)):
            self.register_buffer(name, start.detach().clone(memory_format=torch.contiguous_format), persistent=False)


class PrincipalWindow(Window):
    """The window of the largest singular values."""

    def attach(self, weight: Tensor, bias: Tensor | None) -> None:
        self.set_components(*principal(weight, self.rank))


class MovingWindow(Window):
    """A window that can be folded into the stored weight and reopened elsewhere, with another width.

    Folded updates are kept as fp32 factors, W = W₀ + folded_b folded_a. So W₀ is restored bit for bit (from a copy on
    the CPU), loading repeats the same product, a bf16 weight is rounded once instead of at every fold, and the whole
    change is a LoRA. A bf16 weight is dithered (:func:`dithered`), so that changes far below its precision survive on
    average, where rounding to nearest would give W₀. Factors that would outgrow the matrix are replaced by the matrix.
    """

    folded_a: Tensor  #: (F, I)
    folded_b: Tensor  #: (O, F)

    def build(self) -> None:
        self.pretrained: Tensor | None = None  #: (O, I) on the CPU: the weight before the first fold
        self.match_shapes({"lora_A.weight": self.lora_a.shape, "folded_A": torch.Size((0, self.lora_a.shape[1]))})

    def constants(self) -> dict[str, Tensor]:
        return {**super().constants(), "folded_A": self.folded_a, "folded_B": self.folded_b}

    def match_shapes(self, shapes: dict[str, torch.Size]) -> None:
        rank, folded = shapes["lora_A.weight"][0], shapes["folded_A"][0]
        a, b = self.lora_a.detach(), self.lora_b.detach()
        self.set_components(b.new_zeros(len(b), rank), b.new_zeros(rank), a.new_zeros(rank, a.shape[1]))
        self._set_folded(b.new_zeros(len(b), folded), a.new_zeros(folded, a.shape[1]))

    @torch.no_grad()
    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """b (O, F + 2R), a (F + 2R, I), fp32: the folded updates and the current one."""
        b, a = super().delta_factors()
        return torch.cat((self.folded_b, b), dim=1), torch.cat((self.folded_a, a))

    @torch.no_grad()
    def fold(self, weight: Tensor) -> None:
        """Move the update into the stored ``weight`` (O, I). Function and gradients of A and B stay the same."""
        b, a = self.delta_factors()
        if len(a) > min(weight.shape):
            delta = b @ a
            wide = len(delta) <= delta.shape[1]
            unit = torch.eye(min(weight.shape), device=delta.device)
            b, a = (unit, delta) if wide else (delta, unit)
        self._set_folded(b, a)
        self.sync_weight(weight, True)
        self._set_start(self.lora_b, self.lora_a)

    @torch.no_grad()
    def replace_components(self, keep: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
        """After a fold, keep the ranks with indices ``keep`` and add components as in :meth:`set_components`."""
        b, a = self._factors(u, s, v)
        self._set_factors(torch.cat((self.lora_b[:, keep], b), dim=1), torch.cat((self.lora_a[keep], a)))

    @torch.no_grad()
    def sync_weight(self, weight: Tensor, enabled: bool) -> None:
        folded = enabled and len(self.folded_a) > 0
        if self.pretrained is None:
            if not folded:
                return
            self.pretrained = weight.detach().to("cpu", copy=True)
        pretrained = self.pretrained.to(weight.device)
        if not folded:
            weight.copy_(pretrained)
        elif weight.dtype == torch.bfloat16:
            weight.copy_(dithered(pretrained.float() + self.folded_b @ self.folded_a))
        else:
            weight.copy_(pretrained + self.folded_b @ self.folded_a)

    def _set_folded(self, b: Tensor, a: Tensor) -> None:
        self.register_buffer("folded_b", b.detach(), persistent=False)
        self.register_buffer("folded_a", a.detach(), persistent=False)


def dithered(values: Tensor) -> Tensor:
    """fp32 ``values`` (O, I) in bf16, rounded up or down in proportion to the distance.

    The threshold of an entry depends on its index only (multiples of the golden ratio modulo 1, which fill the unit
    interval evenly), so rounding is reproducible, and bf16 values stay the same. The error of an entry is up to a unit
    in the last place, and 0 on average.
    """
    position = torch.arange(values.numel(), device=values.device).view(values.shape)
    threshold = (position * 2654435769 >> 16) & 0xFFFF  # 2^32 / 1.618…; the 16 bits that bf16 lacks
    bits = values.contiguous().view(torch.int32) + threshold.to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading components u (O, R), s (R,), v (R, I) of ``weight`` (O, I), fp32.

    Exact if the smaller side is at most ``EXACT``, else randomized, with 8 extra directions and 16 power iterations
    (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    weight = weight.float()
    if min(weight.shape) <= EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = torch.svd_lowrank(weight, q=rank + 8, niter=16)
        v = vt.t()
    return u[:, :rank], s[:rank], v[:rank]


@dataclass
class Spectrum:
    """All singular values of a matrix (O, I) with k = min(O, I), and the singular vectors of C components."""

    values: Tensor  #: (k,), descending
    index: Tensor  #: (C,), indices of the components, ascending
    left: Tensor  #: (O, C)
    right: Tensor  #: (C, I)

    def components(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The components with indices ``wanted`` (R,), a subset of ``index``: u (O, R), s (R,), v (R, I)."""
        at = torch.searchsorted(self.index, wanted)
        assert torch.equal(self.index[at], wanted)
        return self.left[:, at], self.values[wanted], self.right[at]

    def project(self, x: Tensor, g: Tensor) -> Tensor:
        """uᵢᵀ G vᵢ of the C components, (C,), fp32, for the gradient G = gᵀ x of the weight, g (N, O), x (N, I)."""
        return ((g.float() @ self.left) * (x.float() @ self.right.t())).sum(dim=0)  # (N, C) -> (C,)


@torch.no_grad()
def decompose(weight: Tensor, index: Tensor) -> Spectrum:
    """The spectrum of ``weight`` (O, I) with the components ``index`` (C,).

    Uses the eigenvectors of the smaller Gram matrix in fp64. That is as exact as an fp32 SVD, which also loses
    components below about 1e-7 of the largest, and several times as fast for an elongated matrix (128 × 320: 1.4
    instead of 8.4 ms on one core). A randomized SVD would not give minor components.
    """
    wide = len(weight) <= weight.shape[1]
    flat = (weight if wide else weight.t()).double()  # (k, max(O, I))
    squares, vectors = torch.linalg.eigh(flat @ flat.t())
    near = vectors.flip(1)[:, index]  # (k, C); eigh: ascending
    far = F.normalize(near.t() @ flat, dim=1)  # (C, max(O, I))
    values = squares.flip(0).clamp_min(0).sqrt().float()
    left, right = (near, far) if wide else (far.t(), near.t())
    return Spectrum(values, index, left.float().contiguous(), right.float().contiguous())


def window(weight: Tensor, position: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The components u (O, R), s (R,), v (R, I) of ``weight`` (O, I) in the window of ``width`` at ``position``."""
    if position == 0:
        return principal(weight, width)
    size = min(weight.shape)
    start = window_start(position, size, width)
    return decompose(weight, reachable([position], size, width)).components(torch.arange(start, start + width))


def window_start(position: float, components: int, width: int) -> int:
    """Index of the first component of a window at ``position``, from 0 (principal components) to 1 (minor ones)."""
    return math.floor(position * (components - width) + 0.5)


def reachable(positions: list[float], components: int, width: int) -> Tensor:
    """Ascending indices of all components in windows of up to ``width`` at ``positions``."""
    starts = (window_start(position, components, width) for position in positions)
    return torch.tensor(sorted({i for start in starts for i in range(start, start + width)}))


@contextmanager
def output_gradients(adapter: Adapter, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, backward passes call ``see`` for each module of the adapter.

    It gets the module's key, the inputs (N, I) of its linear in the forward pass, and the gradients (N, O) of its
    outputs: the gradient of the weight is their product, (N, O)ᵀ (N, I).
    """
    keys = {(site.path, site.span): key for key, site in adapter.sites.items()}

    def watch(path: str) -> Callable[[AdaptedLinear, tuple, Tensor], None]:
        def after(linear: AdaptedLinear, args: tuple, y: Tensor) -> None:
            x = args[0].detach()

            def hook(gradient: Tensor) -> None:
                for _, span in linear.updates:
                    see(keys[path, span], x.flatten(0, -2), take(gradient, span).flatten(0, -2))  # -> (N, …)

            y.register_hook(hook)

        return after

    handles = [linear.register_forward_hook(watch(path)) for path, linear in adapter.linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
