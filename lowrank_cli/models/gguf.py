"""Models in GGUF, llama.cpp's format: dequantised once and cached as safetensors.

transformers reads the file with the package ``gguf``. The copy is in fp32, 4 bytes a parameter, so that its values are
exactly those of the file. It is in ``$XDG_CACHE_HOME/lowrank-cli/gguf`` (by default in ``~/.cache``), under the file's
name and a hash of its path, size and modification time. If you delete it, it is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from lowrank_cli.errors import UserError, escaped
from lowrank_cli.reader import read_json

ORIGIN = "origin.json"  #: in a converted folder: the source file and its quantisation
INSTALL = "pip install 'lowrank-cli[gguf]'"


class Origin(TypedDict):
    """``origin.json``."""

    file: str
    quantization: str


def find(path: Path, shown: str) -> Path:
    """The GGUF file at ``path``, or the only one in that folder. ``shown`` names it in errors.

    Raises:
        UserError: there is none, or more than one.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
            raise UserError(f"{shown}: the folder holds {f'{names}; name one of them' if files else 'no *.gguf file'}")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{shown}: there is no such file")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise UserError(f"{shown}: {path.name} is one part of several; join them with llama-gguf-split --merge")
    return path.resolve()


def in_package(package: str) -> Path | None:
    """The GGUF file inside a Python package, found without importing it; None if there is none."""
    spec = None
    with suppress(ValueError):  # __main__ has no spec
        spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))), None)


def converted(file: Path) -> Path | None:
    """The cached folder of the converted ``file``, if there is one."""
    folder = _folder(file)
    return folder if (folder / ORIGIN).is_file() else None


def convert(file: Path) -> Path:
    """The cached folder of the converted ``file``, made if necessary; concurrent processes wait for it.

    Raises:
        UserError: the package gguf is missing, transformers does not read this architecture, the file is truncated or
            damaged, or the disk is full.
    """
    folder = _folder(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if converted(file) is None:
            _convert(file, folder)
    return folder


def quantization(folder: Path) -> str:
    """How the weights of a converted model were stored, such as ``Q4_1``."""
    return str(read_json(folder / ORIGIN, Origin)["quantization"])


def described(folder: Path) -> str:
    """A note for the run's header, such as ``dequantised from 4 bits (Q4_1)``."""
    stored = quantization(folder)
    bits = re.search(r"Q(\d)", stored)
    return f"dequantised from {bits[1]} bits ({stored})" if bits else f"converted from {stored}"


def _folder(file: Path) -> Path:
    state = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "lowrank-cli" / "gguf" / f"{file.stem}-{key}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path) -> None:
    stored = _checked(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(escaped(f"model: converting {file.name} ({stored}), once, to {folder}"), file=sys.stderr, flush=True)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype="float32", output_loading_info=True)
        network, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"model.gguf: {file} cannot be converted: {reason}; give the model as a folder of transformers instead, "
            f"with model.path=FOLDER"
        ) from error
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise UserError(
            f"model.gguf: {file} lacks {len(absent)} weights of {type(network).__name__}, such as {absent[0]}"
        )
    network.hf_quantizer, network.is_quantized = None, False  # else transformers refuses to save it
    del network.config.quantization_config
    needed = sum(tensor.nbytes for tensor in network.state_dict().values())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"model.gguf: converted, {file.name} takes {needed / 1e9:.1f} GB, and {folder.parent} has "
            f"{free / 1e9:.1f} GB left; point XDG_CACHE_HOME to a larger disk"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        rows = network.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            _drop_tokens(temporary / "tokenizer.json", rows)
        (temporary / ORIGIN).write_text(json.dumps({"file": str(file), "quantization": stored}) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _drop_tokens(file: Path, rows: int) -> None:
    """Remove the tokens from ``rows`` on: transformers adds defaults that the model has no embeddings for."""
    saved = read_json(file)
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def _checked(file: Path) -> str:
    """How the file's weights are stored. Raises UserError if it is damaged or of an unknown architecture."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.gguf: reading {file.name} needs the package gguf: {INSTALL}")
    from gguf import GGUFReader, LlamaFileType
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"model.gguf: {file} is not a GGUF file")
    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
        kind = reader.fields["general.file_type"].contents() if "general.file_type" in reader.fields else None
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, IndexError) or "cannot reshape" in str(error):  # numpy's, reading beyond the end
            size = file.stat().st_size
            raise UserError(
                f"model.gguf: {file} is truncated: it ends after {size} bytes, in the middle of its data; download or "
                f"copy it again"
            ) from error
        raise UserError(f"model.gguf: {file} is damaged ({error})") from error
    readable = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    if not {architecture, architecture.replace("moe", "_moe"), architecture.replace("-", "_")} & readable:
        raise UserError(
            f"model.gguf: {file.name} is of architecture '{architecture}', which transformers cannot read "
            f"(allowed: {', '.join(sorted(readable))})"
        )
    if kind in set(LlamaFileType):
        return LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common(1)[0][0]
