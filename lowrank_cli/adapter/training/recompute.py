"""Less memory in training: what the backward pass computes again instead of finding it saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_cli.adapter.fused_autograd import Remake
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.errors import UserError

KEY = "hardware.gradient_checkpointing"


def recompute(model: PreTrainedModel, what: str, compiled: bool = False) -> None:
    """From now on, passes of the adapted ``model`` that record gradients save less; equal outputs and gradients.

    - ``none``: nothing is computed again;
    - ``feed_forward``: the activated and multiplied features of a gated feed-forward, from its gate and up features
      (the multiplied ones are saved all the same for a down projection in 4 bits), and what norms of a layer give to
      adapted linears, from what the norms read;
    - ``layers``: every layer, from its input (about a third more time; the least memory);
    - ``auto``: ``feed_forward`` where the model has a gated one and is not ``compiled``, elsewhere ``none``.

    Raises UserError for a model that has no such part.
    """
    structure = structure_of(model)
    if what == "auto":
        what = "none" if compiled or structure is None or not structure.plain_gated else "feed_forward"
    if what == "none":
        return
    if structure is None:
        raise UserError(f"{KEY}: the layers of this '{model.config.model_type}' are not known; set it to none")
    if what == "feed_forward" and not structure.plain_gated:
        raise UserError(
            f"{KEY}: family '{model.config.model_type}' is not known to have a feed-forward like Llama's; "
            f"take layers, or none"
        )
    for layer, roles in zip(layers(model), structure.roles):
        if what == "layers":
            layer.forward = partial(_checkpointed, layer.forward)
        else:
            parent = layer.get_submodule(roles["G"].name.rpartition(".")[0])
            parent.forward = partial(_gated, parent, parent.forward)
            for norm in filter(_is_norm, layer.children()):
                norm.forward = partial(_normed, norm.forward)


def _checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """The hooks of a layer, its router among them, run outside, once."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _gated(block: Any, forward: Callable, x: Tensor) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), (B, T, D) -> (B, T, D)."""
    if not torch.is_grad_enabled():
        return forward(x)
    gate, up, down = block.gate_proj(x), block.up_proj(x), block.down_proj
    product = GatedProduct.apply(gate, up, block.act_fn)  # type: ignore[no-untyped-call]
    if not isinstance(down, AdaptedLinear):
        return down(product)
    return down(product, Remake(partial(_product, block.act_fn), (gate.detach(), up.detach())))


def _is_norm(module: nn.Module) -> bool:
    """Whether a child of a layer is one of its norms: a function of one tensor, with parameters for each feature."""
    parameters = list(module.parameters())
    return not list(module.children()) and bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)


def _normed(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D). In fp32 its own backward pass saves ``x`` anyway; else it saves a copy in fp32."""
    y = forward(x)
    if torch.is_grad_enabled() and x.dtype == torch.float32:
        Remake(forward, (x.detach(),)).remember(y)
    return y


def _product(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


class GatedProduct(torch.autograd.Function):
    """act(gate) ⊙ up, elementwise, which saves no more than its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _product(act, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (to_gate,) = torch.autograd.grad(activated, gate, gradient * up)
        return to_gate, gradient * activated.detach(), None
