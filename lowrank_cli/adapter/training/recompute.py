"""Less memory in training: activations that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_cli.adapter.fused_autograd import Recompute
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.target_sites import layers, structure_of
from lowrank_cli.errors import UserError

KEY = "hardware.gradient_checkpointing"


def recompute(model: PreTrainedModel, what: str, compiled: bool = False) -> None:
    """Recompute activations in backward passes of the adapted ``model``; outputs and gradients stay the same.

    Args:
        what: ``none``; ``feed_forward``: the activations and products of a gated feed-forward, from its gate and up
            features (a 4-bit down projection still saves the products), and outputs of norms that adapted linears
            read, from the norms' inputs; ``layers``: every layer, from its input (little memory, about a third more
            time); ``layers_offloaded``: the same, with these inputs in the CPU's memory (least memory); ``auto``:
            ``feed_forward`` if the model has a gated one and is not compiled, else ``none``.
        compiled: whether the layers run compiled.

    Raises:
        UserError: the model's layers or its feed-forward are not known.
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
        if what in ("layers", "layers_offloaded"):
            layer.forward = partial(_checkpointed, layer.forward, what == "layers_offloaded")
        else:
            parent = layer.get_submodule(roles["G"].path.rpartition(".")[0])
            parent.forward = partial(_gated, parent, parent.forward)
            for norm in filter(_is_norm, layer.children()):
                norm.forward = partial(_normed, norm.forward)


def _checkpointed(forward: Callable, offloaded: bool, *args: Any, **kwargs: Any) -> Any:
    """The layer's hooks, such as its router, run once, outside the checkpoint. It saves nothing but ``args``."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with save_on_cpu(pin_memory=True) if offloaded else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _gated(block: Any, forward: Callable, x: Tensor) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), (B, T, D) -> (B, T, D)."""
    if not torch.is_grad_enabled():
        return forward(x)
    gate, up, down = block.gate_proj(x), block.up_proj(x), block.down_proj
    product = GatedProduct.apply(gate, up, block.act_fn)  # type: ignore[no-untyped-call]
    if not isinstance(down, AdaptedLinear):
        return down(product)
    return down(product, Recompute(partial(_product, block.act_fn), (gate.detach(), up.detach())))


def _is_norm(module: nn.Module) -> bool:
    """Whether a child of a layer is a norm: no children, and only parameters of one dimension."""
    parameters = list(module.parameters())
    return not list(module.children()) and bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)


def _normed(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D). Only for fp32, where the norm saves ``x`` anyway; else it saves an fp32 copy."""
    y = forward(x)
    if torch.is_grad_enabled() and x.dtype == torch.float32:
        Recompute(forward, (x.detach(),)).attach_to(y)
    return y


def _product(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


class GatedProduct(torch.autograd.Function):
    """act(gate) ⊙ up, elementwise, saving only its inputs."""

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
        (grad_gate,) = torch.autograd.grad(activated, gate, gradient * up)
        return grad_gate, gradient * activated.detach(), None
