"""The width of a model, read from its files without loading it."""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_cli.errors import UserError
from lowrank_cli.reader import read_json
from lowrank_cli.schema import ModelConfig

NAMES = ("hidden_size", "n_embd", "d_model")  #: of the width in config.json; GPT-2 and OPT have their own
#: GGUF's types of values and their sizes in bytes; 8 is a string, 9 an array
GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
HUB_SECONDS = 5  #: the Hub counts as unreachable if it takes longer to answer


def model_width(model: ModelConfig) -> int | None:
    """Hidden size of the model: of its own files if they are here, else ``model.width``, else as the Hub says.

    None if none of them says; loading the model names what is wrong.
    """
    with suppress(UserError, OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error):
        if model.gguf:
            file = Path(model.gguf)
            return _of_gguf(next(file.glob("*.gguf"), file) if file.is_dir() else file)
        if model.path:
            return _of_config(read_json(Path(model.path) / "config.json"), model.images)
    if model.width or not model.id or model.bundled:
        return model.width
    return _of_config(_from_hub(model.id, model.revision), model.images)


def _of_config(config: Any, images: bool) -> int | None:
    """Of a config.json; that of a multimodal model has its decoder's in ``text_config``.

    Args:
        images: take that of the encoder of images instead.
    """
    config = config if isinstance(config, dict) else {}
    inner = config.get("vision_config" if images else "text_config")
    sizes = [config.get(name) for name in NAMES]
    width = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    return _of_config(inner, images) if width is None and isinstance(inner, dict) else width


def _of_gguf(file: Path) -> int | None:
    """``<architecture>.embedding_length`` in the header of a GGUF file (version 2 or 3), before the vocabulary."""
    with file.open("rb") as stream:

        def read(form: str) -> int:
            return int(struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0])

        if stream.read(4) != b"GGUF" or read("I") < 2:
            return None
        read("Q")  # tensors
        for _ in range(read("Q")):
            key, kind = stream.read(read("Q")), read("I")
            if key.endswith(b".embedding_length"):
                return read("I")
            if kind == 8:
                stream.seek(read("Q"), 1)
            elif kind == 9:
                return None  # an array is part of the vocabulary, which comes last
            else:
                stream.seek(GGUF_BYTES[kind], 1)
    return None


@cache  # a run composes several times, and a sweep once for each job
def _from_hub(repository: str, revision: str | None) -> Any:
    """config.json of a repository, from the Hub's cache or the Hub itself; None if neither answers."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session

    with suppress(Exception):  # every transport has its own family of network errors
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return read_json(Path(cached))
        if not constants.HF_HUB_OFFLINE:
            url = hf_hub_url(repository, "config.json", revision=revision)
            answer = get_session().get(url, headers=build_hf_headers(), timeout=HUB_SECONDS, follow_redirects=True)
            return answer.json() if answer.status_code == 200 else None
    return None
