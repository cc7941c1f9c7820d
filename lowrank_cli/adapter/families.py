"""Which linear plays which role in which family of models: one explicit table, and the search through it.

Roles: Q K V O (attention: query, key, value, output) and G U D (feed-forward: gate, up, down). A family without a
gated feed-forward has no G. A packed linear holds several roles in equal spans of its output features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import LINEARS, linear_shape
from lowrank_cli.errors import UserError, nearest

ROLES = ("Q", "K", "V", "O", "G", "U", "D")
#: Roles of a layer that read the same input.
SIBLINGS = ("QKV", "GU")


@dataclass(frozen=True)
class Family:
    """Where a family keeps its layers (below the base model) and its roles (below a layer).

    A role's place is the name of a linear, or (name, index, count) for one of ``count`` equal spans of its output.
    """

    layers: str
    roles: dict[str, str | tuple[str, int, int]]
    first_answers: bool = False  #: a classifier of the family reads the first position of the last layer alone


def _gated(attention: str = "self_attn", mlp: str = "mlp") -> Family:
    return Family(
        "layers",
        {
            "Q": f"{attention}.q_proj",
            "K": f"{attention}.k_proj",
            "V": f"{attention}.v_proj",
            "O": f"{attention}.o_proj",
            "G": f"{mlp}.gate_proj",
            "U": f"{mlp}.up_proj",
            "D": f"{mlp}.down_proj",
        },
    )


_GPT2 = Family(
    "h",
    {
        "Q": ("attn.c_attn", 0, 3),
        "K": ("attn.c_attn", 1, 3),
        "V": ("attn.c_attn", 2, 3),
        "O": "attn.c_proj",
        "U": "mlp.c_fc",
        "D": "mlp.c_proj",
    },
)
_OPT = Family(
    "decoder.layers",
    {
        "Q": "self_attn.q_proj",
        "K": "self_attn.k_proj",
        "V": "self_attn.v_proj",
        "O": "self_attn.out_proj",
        "U": "fc1",
        "D": "fc2",
    },
)
_BERT = Family(
    "encoder.layer",
    {
        "Q": "attention.self.query",
        "K": "attention.self.key",
        "V": "attention.self.value",
        "O": "attention.output.dense",
        "U": "intermediate.dense",
        "D": "output.dense",
    },
    first_answers=True,
)

#: By ``config.model_type``.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _gated()),
    "gpt2": _GPT2,
    "opt": _OPT,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
}


@dataclass(frozen=True)
class Site:
    """One place for a low-rank module: a linear, or a span of a packed one.

    ``layer`` and ``role`` are None for a linear that the family table does not know.
    """

    path: str
    role: str | None
    layer: int | None
    in_features: int
    out_features: int
    span: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Unique in the model; what saved tensors are named by."""
        return self.path if self.span is None else f"{self.path}.{self.role}"

    @property
    def label(self) -> str:
        """Name below the adapted linear."""
        return "whole" if self.span is None else str(self.role)


def family_of(model: PreTrainedModel) -> Family | None:
    """The table's row for ``model``, or None."""
    return FAMILIES.get(model.config.model_type)


def layers_path(model: PreTrainedModel) -> str:
    """Dotted path of the list of layers; the model's family must be known."""
    family = family_of(model)
    assert family is not None
    prefix = model.base_model_prefix if model.base_model is not model else ""
    return f"{prefix}.{family.layers}" if prefix else family.layers


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a known family, from the input to the output."""
    return list(model.get_submodule(layers_path(model)).children())


def known_sites(model: PreTrainedModel) -> list[Site]:
    """Every site of the family table, layer by layer in the order of :data:`ROLES`; empty for an unknown family."""
    family = family_of(model)
    if family is None:
        return []
    root = layers_path(model)
    sites = []
    for index, layer in enumerate(layers(model)):
        for role in ROLES:
            if role not in family.roles:
                continue
            place = family.roles[role]
            name, part, count = place if isinstance(place, tuple) else (place, 0, 1)
            inputs, outputs = linear_shape(layer.get_submodule(name))
            width = outputs // count
            span = None if count == 1 else (part * width, (part + 1) * width)
            sites.append(Site(f"{root}.{index}.{name}", role, index, inputs, width, span))
    return sites


def find_sites(model: PreTrainedModel, targets: list[str]) -> list[Site]:
    """The sites that ``targets`` name: ``all`` roles, single roles, or linears by the end of their path.

    A packed linear given by name is one site over its whole output. Raises UserError for a target that names nothing.
    """
    known = known_sites(model)
    roles = [role for role in ROLES if any(site.role == role for site in known)]
    heads = tuple(f"{name}." for name in head_names(model))  # trained in full, so never a site
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LINEARS) and not f"{path}.".startswith(heads)
    }
    whole = {site.path: site for site in known if site.span is None}
    chosen: dict[str, Site] = {}
    for target in targets:
        if target == "all" or target in ROLES:
            found = [site for site in known if target in ("all", site.role)]
            if not found:
                raise _unknown_role(model, target, roles)
        else:
            paths = [path for path in linears if path == target or path.endswith(f".{target}")]
            found = [whole.get(path) or Site(path, None, None, *linear_shape(linears[path])) for path in paths]
            if not found:
                names = sorted({path.rsplit(".", 1)[-1] for path in linears})
                hint = nearest(target, [*names, *roles])
                raise UserError(
                    f"method.target_modules: no linear of this model is called '{target}'{hint} "
                    f"(roles: {' '.join(roles) or 'none known'}; linears: {', '.join(names)})"
                )
        chosen.update({site.key: site for site in found})
    packed = {site.path for site in chosen.values() if site.span is not None}
    both = packed & {site.path for site in chosen.values() if site.span is None}
    if both:
        raise UserError(f"method.target_modules: '{min(both)}' is given both as a whole and by roles; choose one")
    return list(chosen.values())


def _unknown_role(model: PreTrainedModel, target: str, roles: list[str]) -> UserError:
    family = model.config.model_type
    if not roles:
        return UserError(
            f"method.target_modules: the roles of family '{family}' are not known; name its linears "
            f"(families with roles: {', '.join(sorted(FAMILIES))})"
        )
    return UserError(f"method.target_modules: family '{family}' has no role '{target}' (it has {' '.join(roles)})")


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that train in full beside an adapter: a classification head, and what is new otherwise.

    ``model.fresh_modules``, where the loader set it, names modules that the checkpoint had no weights for.
    """
    names = [name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)]
    fresh = getattr(model, "fresh_modules", ())
    return names + [name for name in fresh if not name.startswith(tuple(names))]
