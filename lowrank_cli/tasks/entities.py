"""Entities in a sequence of tags: IOB1, IOB2, IOE and IOBES, as conlleval and seqeval's default mode read them."""

from __future__ import annotations

from collections.abc import Sequence

Entity = tuple[str, int, int]  #: type, first word, last word


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one text, in order.

    ``B`` and ``S`` begin an entity and ``E`` and ``S`` end one. ``I`` and ``E`` continue the entity before them if that
    has their type and has not ended, else they begin one.
    """
    found: list[Entity] = []
    kind, first, ended = "", 0, True
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        continues = prefix in ("I", "E") and own == kind and not ended
        if not ended and not continues:
            found.append((kind, first, position - 1))
        if prefix == "O":
            ended = True
            continue
        if not continues:
            kind, first = own, position
        ended = prefix in ("E", "S")
        if ended:
            found.append((kind, first, position))
    return found
