"""Which linear plays which role in a model, and the sites for low-rank modules that follow from it.

Roles: Q K V O (attention: query, key, value, output) and G U D (feed-forward: gate, up, down). A family without a
gated feed-forward has no G. A packed linear holds several roles in spans of its output features. Of decoders all this
is read from the modules (:mod:`lowrank_cli.adapter.model_structure`); the table says what they do not show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.linear import LINEARS, bare, linear_shape
from lowrank_cli.adapter.model_structure import Place, Structure, discover
from lowrank_cli.adapter.spans import Span, width
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
    first_answers: bool = False  #: see :class:`Structure`
    plain_gated: bool = False  #: likewise


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
        plain_gated=True,
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


#: Model types outside the table whose layers compute each position by itself outside attention, as that shows in their
#: code and in the tests, not in their modules.
POSITION_WISE = frozenset(
    "phi phi3 falcon gpt_neox olmo olmo2 olmoe mixtral stablelm starcoder2 cohere granite gptj bloom mpt".split()
)
#: Those of them whose feed-forward is Llama's.
PLAIN_GATED = frozenset("olmo olmo2 stablelm cohere granite".split())


@dataclass(frozen=True)
class Site:
    """One place for a low-rank module: a linear, or a span of a packed one.

    ``layer`` and ``role`` are None for a linear that has no role.
    """

    path: str
    role: str | None
    layer: int | None
    in_features: int
    out_features: int
    span: Span | None = None

    @property
    def key(self) -> str:
        """Unique in the model; what saved tensors are named by."""
        return self.path if self.span is None else f"{self.path}.{self.role}"

    @property
    def label(self) -> str:
        """Name below the adapted linear."""
        return "whole" if self.span is None else str(self.role)


_structures: WeakKeyDictionary[PreTrainedModel, Structure | None] = WeakKeyDictionary()


def structure_of(model: PreTrainedModel) -> Structure | None:
    """The model's layers and roles, from the table or else from its modules; None where neither shows them."""
    if model not in _structures:
        kind = model.config.model_type
        if kind in FAMILIES:
            _structures[model] = _tabled(model, FAMILIES[kind])
        else:
            found = discover(model)
            _structures[model] = found and replace(
                found, position_wise=kind in POSITION_WISE, plain_gated=kind in PLAIN_GATED
            )
    return _structures[model]


def _tabled(model: PreTrainedModel, family: Family) -> Structure:
    prefix = model.base_model_prefix if model.base_model is not model else ""
    root = f"{prefix}.{family.layers}" if prefix else family.layers
    roles = []
    for layer in model.get_submodule(root).children():
        own = {}
        for role, place in family.roles.items():
            name, part, count = place if isinstance(place, tuple) else (place, 0, 1)
            features = linear_shape(bare(layer.get_submodule(name)))[1] // count
            own[role] = Place(name, None if count == 1 else Span(part * features, (part + 1) * features))
        roles.append(own)
    return Structure(
        root,
        tuple(roles),
        plain_gated=family.plain_gated,
        position_wise=True,
        first_answers=family.first_answers,
    )


def layers_path(model: PreTrainedModel) -> str:
    """Dotted path of the list of layers; the model's structure must be known."""
    structure = structure_of(model)
    assert structure is not None
    return structure.layers


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model of known structure, from the input to the output."""
    return list(model.get_submodule(layers_path(model)).children())


def known_sites(model: PreTrainedModel) -> list[Site]:
    """Every site that has a role, layer by layer in the order of :data:`ROLES`; empty where no structure is known."""
    structure = structure_of(model)
    if structure is None:
        return []
    sites = []
    for index, (layer, roles) in enumerate(zip(layers(model), structure.roles)):
        for role in ROLES:
            if role not in roles:
                continue
            place = roles[role]
            inputs, outputs = linear_shape(bare(layer.get_submodule(place.name)))
            outputs = outputs if place.span is None else width(place.span, outputs)
            sites.append(Site(f"{structure.layers}.{index}.{place.name}", role, index, inputs, outputs, place.span))
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
    kind = model.config.model_type
    if not roles:
        return UserError(
            f"method.target_modules: '{target}' names no module, as the layers and roles of this '{kind}' cannot be "
            f"found from its modules; name its linears instead"
        )
    structure = structure_of(model)
    why = f"; {structure.left_out}" if structure and structure.left_out else ""
    return UserError(f"method.target_modules: family '{kind}' has no role '{target}' (it has {' '.join(roles)}{why})")


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that train in full beside an adapter: a classification head, and what is new otherwise.

    ``model.fresh_modules``, where the loader set it, names modules that the checkpoint had no weights for.
    """
    names = [name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)]
    fresh = getattr(model, "fresh_modules", ())
    return names + [name for name in fresh if not name.startswith(tuple(names))]
