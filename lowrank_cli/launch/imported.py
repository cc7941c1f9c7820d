"""The command line of ``lrk import`` as overrides: what an adapter of the PEFT library says about itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from lowrank_cli import methods, runs
from lowrank_cli.errors import UserError
from lowrank_cli.launch.shorthand import OVERRIDE
from lowrank_cli.reader import Finite, Where, read_json
from lowrank_cli.schema import parse_overrides, quoted
from lowrank_cli.session.peft_folder import CONFIG, fetch

BUNDLED = ("lowrank_cli", "assets", "tiny_llama")  #: end of the path of the bundled model, on any machine


class About(TypedDict):
    """The keys of ``adapter_config.json`` that a method's configuration takes over."""

    r: Annotated[int, Where(lambda rank: rank > 0, "a whole number above 0")]
    lora_alpha: Finite
    use_rslora: NotRequired[bool | None]
    lora_dropout: NotRequired[Finite | None]
    target_modules: NotRequired[list[str] | str | None]
    base_model_name_or_path: NotRequired[str | None]


def overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``lrk import`` as overrides; those that were typed come after what the adapter says.

    Raises:
        UserError: no adapter or several are named, or its ``adapter_config.json`` cannot be read.
    """
    named = [argument for argument in arguments if not OVERRIDE.match(argument)]
    given = parse_overrides(argument for argument in arguments if OVERRIDE.match(argument))
    named += [override.value.strip("'\"") for override in given if override.key == "adapter"]
    if len(named) != 1:
        raise UserError(f"import: name one adapter, a folder or ORG/NAME on the Hub, not {len(named)}")
    folder = Path(named[0]).expanduser()
    adapter = os.path.abspath(runs.settled(folder)) if folder.is_dir() else named[0]
    typed = {override.key: override.value.strip("'\"") for override in given}
    config = fetch(adapter, typed.get("revision"), (CONFIG,)) / CONFIG
    about = read_json(config, About)
    own = [f"adapter={quoted(adapter)}", *_method(about)]
    if not any(key == "model" or key.startswith("model.") for key in typed):
        own += _model(about.get("base_model_name_or_path"))
    return [*own, *(str(override) for override in given if override.key != "adapter")]


def _method(about: About) -> Iterator[str]:
    """The method and its settings. Where a module has another rank or scale, its tensors say so."""
    yield f"method={methods.of_peft(about)}"
    rank, alpha = about["r"], about["lora_alpha"]
    yield f"method.rank={rank}"
    yield f"method.alpha={float(alpha * math.sqrt(rank) if about.get('use_rslora') else alpha)}"
    yield f"method.dropout={float(about.get('lora_dropout') or 0.0)}"
    targets = about.get("target_modules")
    if isinstance(targets, list):
        yield f"method.target_modules=[{','.join(map(quoted, sorted(targets)))}]"


def _model(base: str | None) -> list[str]:
    """The overrides that choose the model that the adapter names; none for the bundled one, which is the default."""
    if not base or Path(base).parts[-len(BUNDLED) :] == BUNDLED:
        return []
    if os.path.isdir(base):
        return ["model=hub", f"model.path={quoted(os.path.abspath(base))}"]
    return ["model=hub", f"model.id={quoted(base)}"]
