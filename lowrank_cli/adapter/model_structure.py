"""A model's layers and the role of each linear in them, inferred from module names and shapes.

The layers are the longest list of modules in the decoder. The linear of a role is recognised by the few names that
decoders in transformers use. A packed linear is divided by its shape: with H query heads, K key-value heads and head
width d it has (H + 2K) d outputs, whose order follows from its name (:mod:`lowrank_cli.adapter.spans`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import LINEARS, linear_shape, unwrapped
from lowrank_cli.adapter.spans import Span

#: Last name in the path of each role's linear. O is searched for inside attention only, feed-forward roles outside it.
ATTENTION = {
    "Q": ("q_proj", "q_lin", "query"),
    "K": ("k_proj", "k_lin", "key"),
    "V": ("v_proj", "v_lin", "value"),
}
OUTPUT = ("o_proj", "out_proj", "out_lin", "dense", "c_proj")
FEED_FORWARD = {
    "G": ("gate_proj", "w1"),
    "U": ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1"),
    "D": ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "lin2"),
}
QKV = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")  #: queries, keys and values in one linear
GATE_UP = ("gate_up_proj",)  #: gate, then up
#: Packed linears that store features head by head (or group by group); all others store all queries first.
BY_HEAD = ("query_key_value",)
#: Model types that, with more than one key-value head, use neither order.
OTHER_ORDER = ("codegen", "gpt_bigcode")


@dataclass(frozen=True)
class RoleLinear:
    """The linear of a role: its path below the layer, and the role's span of output features if it is packed."""

    path: str
    span: Span | None = None


Roles = dict[str, RoleLinear]


@dataclass(frozen=True)
class Structure:
    """A model's layers and the roles of each. Layers may differ, for example in their kind of attention."""

    layers: str  #: dotted path of the list of layers
    roles: tuple[Roles, ...]  #: by layer
    left_out: str = ""  #: one line on the linears without a role, and why
    plain_gated: bool = False  #: the feed-forward computes just down(act(gate(x)) ⊙ up(x)), under Llama's names
    position_wise: bool = False  #: layers mix positions in attention only
    first_answers: bool = False  #: a classifier reads only the first position of the last layer


def discover(model: PreTrainedModel) -> Structure | None:
    """The structure of ``model``, inferred from its modules; None if it has no layers, or no roles in them."""
    root = _layers_path(model)
    if root is None:
        return None
    blocks = list(model.get_submodule(root).children())
    roles = [_roles(model.config, block) for block in blocks]
    if not any(roles):
        return None
    return Structure(root, tuple(roles), left_out=_left_out(blocks, roles))


def _layers_path(model: PreTrainedModel) -> str | None:
    """Dotted path of the longest outermost list of modules with linears in the decoder."""
    decoder: nn.Module = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists: dict[str, int] = {}
    for name, module in decoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and all(any(_linears(block)) for block in module):
            lists[name] = len(module)
    if not any(lists.values()):
        return None
    longest = max(lists, key=lambda name: lists[name])  # ties: the first
    return ".".join(filter(None, (prefix, longest)))


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and linear for each linear below ``module``, without its wrapper."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(linear := unwrapped(child), LINEARS):
            yield path, linear
        else:
            yield from _linears(child, f"{path}.")


def _roles(config: Any, layer: nn.Module) -> Roles:
    """The roles of one layer; a role whose names match several linears is left out."""
    linears = dict(_linears(layer))

    def only(names: tuple[str, ...], inside: str | None = None, outside: str | None = None) -> str | None:
        """The path of the only linear named one of ``names`` inside (or outside) a child of the layer."""
        paths = [path for path in linears if path.rpartition(".")[2] in names]
        paths = [path for path in paths if inside is None or path.startswith(f"{inside}.")]
        paths = [path for path in paths if outside is None or not path.startswith(f"{outside}.")]
        return paths[0] if len(paths) == 1 else None

    roles: Roles = {}
    packed = only(QKV)
    first = packed or only(ATTENTION["Q"]) or only(OUTPUT[:1])
    attention = first.partition(".")[0] if first and "." in first else None
    if attention:
        if packed:
            roles |= _packed_attention(config, packed, linear_shape(linears[packed])[1])
        else:
            named = {role: only(names, inside=attention) for role, names in ATTENTION.items()}
            roles |= {role: RoleLinear(path) for role, path in named.items() if path}
        output = only(OUTPUT, inside=attention)
        if output:
            roles["O"] = RoleLinear(output)
    gate_up = only(GATE_UP, outside=attention)
    if gate_up:
        half = linear_shape(linears[gate_up])[1] // 2
        roles |= {"G": RoleLinear(gate_up, Span(0, half)), "U": RoleLinear(gate_up, Span(half, 2 * half))}
    for role, names in FEED_FORWARD.items():
        path = only(names, outside=attention)
        if path and role not in roles:
            roles[role] = RoleLinear(path)
    return roles


def _packed_attention(config: Any, path: str, outputs: int) -> Roles:
    """Q, K and V in a linear of (H + 2K) d outputs; none if the shape does not match."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value, odd = divmod(outputs - heads * width, 2 * width)
    if odd or key_value < 1 or heads % key_value or (key_value > 1 and config.model_type in OTHER_ORDER):
        return {}
    by_head = path.rpartition(".")[2] in BY_HEAD and key_value > 1
    groups = key_value if by_head else 1
    edges = [0, heads * width // groups]  # queries of one group; keys; values
    edges += [edges[1] + key_value * width // groups, edges[1] + 2 * key_value * width // groups]
    period = edges[3] if by_head else None
    return {role: RoleLinear(path, Span(edges[at], edges[at + 1], period)) for at, role in enumerate("QKV")}


def _left_out(blocks: list[nn.Module], roles_of: list[Roles]) -> str:
    """One line on weights without a role: experts, or another kind of attention."""
    reasons = []
    fused = [any(p.dim() == 3 and "expert" in name for name, p in block.named_parameters()) for block in blocks]
    several = [
        "D" not in roles and sum(path.endswith(FEED_FORWARD["D"]) for path, _ in _linears(block)) > 1
        for block, roles in zip(blocks, roles_of)
    ]
    if any(fused):
        reasons.append("experts fused into 3-D parameters take no low-rank module")
    elif any(several):
        reasons.append("a layer has several feed-forward parts (experts), which take no low-rank module by role")
    without = sum(not {"Q", "K", "V", "O"} <= roles.keys() for roles in roles_of)
    if without:
        reasons.append(f"{without} of {len(roles_of)} layers lack some of Q, K, V and O")
    return "; ".join(reasons)
