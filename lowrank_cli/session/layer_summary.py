"""A one-line summary of a model's layers and their roles, made without its weights."""

from __future__ import annotations

from lowrank_cli.adapter.target_sites import ROLES, structure_of
from lowrank_cli.methods.protocol import ChoosesSites, Method
from lowrank_cli.models.outline import outline
from lowrank_cli.schema import ModelConfig


def layer_summary(model: ModelConfig, method: Method) -> str | None:
    """``30 in model.layers, each with Q K V O G U D``; None if the model's configuration is not on this machine.

    Raises:
        UserError: the settings of ``method`` do not fit the model.
    """
    network = outline(model)
    if network is None:
        return None
    if isinstance(method, ChoosesSites):
        method.sites(network)
    structure = structure_of(network)
    if structure is None:
        return f"not found in this '{network.config.model_type}': methods take its linears by name, not by role"
    counts: dict[str, int] = {}
    for roles in structure.roles:
        named = " ".join(role for role in ROLES if role in roles) or "no roles"
        counts[named] = counts.get(named, 0) + 1
    if len(counts) == 1:
        each = f"each with {next(iter(counts))}"
    else:
        each = "; ".join(f"{count} with {named}" for named, count in counts.items())
    summary = f"{len(structure.roles)} in {structure.layers}, {each}"
    return f"{summary} ({structure.left_out})" if structure.left_out else summary
