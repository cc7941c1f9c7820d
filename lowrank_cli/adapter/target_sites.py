"""The sites of a model: where low-rank modules go, and the role of each linear.

Roles: Q K V O (attention: query, key, value, output) and G U D (feed-forward: gate, up, down). A family without a
gated feed-forward has no G. A packed linear holds several roles in spans of its output features. Families in the table
below are known; the structure of other decoders is inferred (:mod:`lowrank_cli.adapter.model_structure`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from lowrank_cli.adapter.image_input import reads_images
from lowrank_cli.adapter.linear import LINEARS, linear_shape, unwrapped
from lowrank_cli.adapter.model_structure import RoleLinear, Structure, discover
from lowrank_cli.adapter.spans import Span, width
from lowrank_cli.errors import UserError, nearest

ROLES = ("Q", "K", "V", "O", "G", "U", "D")
#: Groups of roles that read the same input.
SHARED_INPUTS = ("QKV", "GU")


@dataclass(frozen=True)
class Family:
    """The structure of a model family."""

    layers: str  #: path of the list of layers below the base model
    #: by role, the path of its linear below a layer, or (path, index, count) for one of ``count`` equal output spans
    roles: dict[str, str | tuple[str, int, int]]
    first_answers: bool = False  #: see :class:`Structure`
    plain_gated: bool = False  #: see :class:`Structure`


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


#: Further model types whose layers mix positions in attention only: read from their code and tested, not inferable.
POSITION_WISE = frozenset(
    "phi phi3 falcon gpt_neox olmo olmo2 olmoe mixtral stablelm starcoder2 cohere granite gptj bloom mpt".split()
    + "vit clip siglip dinov2".split()  # encoders of images
)
#: Of these, those with Llama's feed-forward.
PLAIN_GATED = frozenset("olmo olmo2 stablelm cohere granite".split())


@dataclass(frozen=True)
class Site:
    """Where a low-rank module goes: a linear, or a span of a packed one.

    ``layer`` and ``role`` are None for a linear without a role.
    """

    path: str
    role: str | None
    layer: int | None
    in_features: int
    out_features: int
    span: Span | None = None

    @property
    def key(self) -> str:
        """Unique name in the model; prefix of the names of saved tensors."""
        return self.path if self.span is None else f"{self.path}.{self.role}"

    @property
    def label(self) -> str:
        """Unique name within its linear."""
        return "whole" if self.span is None else str(self.role)


_structures: WeakKeyDictionary[PreTrainedModel, Structure | None] = WeakKeyDictionary()


def structure_of(model: PreTrainedModel) -> Structure | None:
    """The model's layers and roles, from the table or inferred; None if neither gives them."""
    if model not in _structures:
        kind = model.config.model_type
        if kind in FAMILIES:
            _structures[model] = _from_table(model, FAMILIES[kind])
        else:
            inferred = discover(model)
            _structures[model] = inferred and replace(
                inferred, position_wise=kind in POSITION_WISE, plain_gated=kind in PLAIN_GATED
            )
    return _structures[model]


def _from_table(model: PreTrainedModel, family: Family) -> Structure:
    prefix = model.base_model_prefix if model.base_model is not model else ""
    root = f"{prefix}.{family.layers}" if prefix else family.layers
    roles = []
    for layer in model.get_submodule(root).children():
        layer_roles = {}
        for role, entry in family.roles.items():
            path, index, count = entry if isinstance(entry, tuple) else (entry, 0, 1)
            features = linear_shape(unwrapped(layer.get_submodule(path)))[1] // count
            span = None if count == 1 else Span(index * features, (index + 1) * features)
            layer_roles[role] = RoleLinear(path, span)
        roles.append(layer_roles)
    return Structure(
        root,
        tuple(roles),
        plain_gated=family.plain_gated,
        position_wise=True,
        first_answers=family.first_answers,
    )


def layers_path(model: PreTrainedModel) -> str:
    """Dotted path of the list of layers of a model with known structure."""
    structure = structure_of(model)
    assert structure is not None
    return structure.layers


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model with known structure, from input to output."""
    return list(model.get_submodule(layers_path(model)).children())


def known_sites(model: PreTrainedModel) -> list[Site]:
    """Every site with a role, by layer and in the order of :data:`ROLES`; empty if the structure is unknown."""
    structure = structure_of(model)
    if structure is None:
        return []
    sites = []
    for index, (layer, roles) in enumerate(zip(layers(model), structure.roles)):
        for role in ROLES:
            if role not in roles:
                continue
            path, span = roles[role].path, roles[role].span
            inputs, outputs = linear_shape(unwrapped(layer.get_submodule(path)))
            outputs = outputs if span is None else width(span, outputs)
            sites.append(Site(f"{structure.layers}.{index}.{path}", role, index, inputs, outputs, span))
    return sites


def find_sites(model: PreTrainedModel, targets: list[str]) -> list[Site]:
    """The sites that ``targets`` name.

    Args:
        targets: ``all``, roles, or linears by the last names of their path. A packed linear given by name is one site
            over its whole output.

    Raises:
        UserError: a target that matches nothing, or a packed linear given both as a whole and by role.
    """
    known = known_sites(model)
    roles = [role for role in ROLES if any(site.role == role for site in known)]
    heads = tuple(f"{name}." for name in head_names(model))  # these train in full
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LINEARS) and not f"{path}.".startswith(heads)
    }
    whole = {site.path: site for site in known if site.span is None}
    chosen: dict[str, Site] = {}
    for target in targets:
        if target == "all" or target in ROLES:
            matches = [site for site in known if target in ("all", site.role)]
            if not matches:
                raise _unknown_role(model, target, roles)
        else:
            paths = [path for path in linears if path == target or path.endswith(f".{target}")]
            matches = [whole.get(path) or Site(path, None, None, *linear_shape(linears[path])) for path in paths]
            if not matches:
                names = sorted({path.rsplit(".", 1)[-1] for path in linears})
                hint = nearest(target, [*names, *roles])
                raise UserError(
                    f"method.target_modules: no linear of this model is called '{target}'{hint} "
                    f"(roles: {' '.join(roles) or 'none known'}; linears: {', '.join(names)})"
                )
        chosen.update({site.key: site for site in matches})
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


def require_rank(sites: Iterable[Site], rank: int, key: str) -> None:
    """Raise UserError, naming the method's ``key``, if ``rank`` exceeds the smaller side of a site."""
    for site in sites:
        most = min(site.in_features, site.out_features)
        if rank > most:
            raise UserError(
                f"method.{key}: {rank} is above the matrix '{site.key}' of {site.out_features} × {site.in_features} "
                f"(allowed: 1 to {most})"
            )


def peft_task_type(model: PreTrainedModel) -> str | None:
    """What PEFT calls the kind of answers that ``model`` gives; None for those to images, which have no name there."""
    if reads_images(model):
        return None
    if type(model).__name__.endswith("ForTokenClassification"):
        return "TOKEN_CLS"
    return "SEQ_CLS" if head_names(model) else "CAUSAL_LM"


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that train in full: a classification head, and modules without pretrained weights.

    The loader lists the latter in ``model.fresh_modules``.
    """
    names = [name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)]
    fresh = getattr(model, "fresh_modules", ())
    return names + [name for name in fresh if not name.startswith(tuple(names))]
