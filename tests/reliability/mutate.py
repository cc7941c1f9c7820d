"""Random changes of files: bytes, the values of JSON and YAML, tensors, and what kind of file it is."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

import yaml

from .box import SECRET_NAME

DEEP = 20_000  #: brackets inside each other: more than a parser's recursion takes


class Executed:
    """Pickled, this makes a folder where it is read."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trap),)


def values(chance: Random, trap: Path) -> Any:
    """One value that a file may hold where another is expected; ``trap`` is what given code would make."""
    return chance.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            3.5,
            2**63,
            10**40,
            1e308,
            float("nan"),
            float("inf"),
            "",
            " ",
            "x",
            "0",
            "nan",
            "null",
            ".",
            "..",
            "../../../elsewhere",
            "~nosuchuser/x",
            "a\nb",
            "a\0b",
            "\ud800",
            "\x1b]0;title\x07",
            "\x1b[31mred\x9b2J",
            "[/bold]m[red]",
            "\u202eabc",
            "é" * 3,
            "x" * 5000,
            [],
            [None],
            [[]],
            [1, "a", {}],
            {},
            {"a": 1},
            {"": []},
            {"_target_": "os.mkdir", "path": str(trap)},
            f"${{oc.env:{SECRET_NAME}}}",
            "${seed}",
            "${nowhere}",
            "???",
        )
    )


def change(path: Path, chance: Random, trap: Path) -> str:
    """Change one file in one way; what was done, in words."""
    ways = [_bytes, _kind]
    if path.suffix in (".json", ".yaml"):
        ways += [_document] * 8
    elif path.suffix == ".jsonl":
        ways += [_line] * 4
    elif path.suffix == ".safetensors":
        ways += [_tensors] * 4
    return f"{path.name}: {chance.choice(ways)(path, chance, trap)}"


def _bytes(path: Path, chance: Random, trap: Path) -> str:
    data = path.read_bytes()
    at = chance.randrange(len(data) + 1)
    way, new = chance.choice(
        (
            ("empty", b""),
            (f"cut at byte {at}", data[:at]),
            (f"byte {at} changed", data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]),
            (f"bytes put in at {at}", data[:at] + chance.randbytes(8) + data[at:]),
            ("in UTF-16", data.decode(errors="replace").encode("utf-16")),
            ("behind a byte order mark", b"\xef\xbb\xbf" + data),
            ("a NUL at the end", data + b"\0"),
            ("deep brackets", b"[" * DEEP),
            ("a pickle", pickle.dumps(Executed(trap))),
            ("twice", data + data),
        )
    )
    path.write_bytes(new)
    return way


def _kind(path: Path, chance: Random, trap: Path) -> str:
    way = chance.choice(("missing", "a folder", "a link to itself", "a link to nothing", "a pipe"))
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a link to itself":
        path.symlink_to(path.name)
    elif way == "a link to nothing":
        path.symlink_to("nothing")
    elif way == "a pipe":
        os.mkfifo(path)
    return way


def _document(path: Path, chance: Random, trap: Path) -> str:
    text = path.read_text()
    document, way = alter(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text), chance, trap)
    if path.suffix == ".json":
        path.write_text(json.dumps(document, indent=2))
    else:
        path.write_text(yaml.safe_dump(document, sort_keys=False), errors="surrogatepass")
    return way


def _line(path: Path, chance: Random, trap: Path) -> str:
    rows = path.read_text().split("\n")
    at = chance.randrange(max(1, len(rows) - 1))
    if chance.random() < 0.3:
        rows[at], way = chance.choice((("", "empty"), ("{", "cut"), ("[" * DEEP, "deep brackets"), ("nan", "nan")))
    else:
        row, way = alter(json.loads(rows[at]), chance, trap)
        rows[at] = json.dumps(row)
    path.write_text("\n".join(rows))
    return f"line {at + 1} {way}"


def alter(document: Any, chance: Random, trap: Path) -> tuple[Any, str]:
    """A copy of ``document`` with one change somewhere in it, mostly near the top; and the change in words."""
    document = copy.deepcopy(document)
    if not isinstance(document, dict | list) or chance.random() < 0.08:
        value = values(chance, trap)
        return value, f"all of it {_shown(value)}"
    at, keys = document, []
    while True:
        items = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = chance.choice(items) if items else None
        keys.append(key)
        below = at[key] if items else None
        if not (isinstance(below, dict | list) and below and chance.random() < 0.6):
            break
        at = below
    where = ".".join(map(str, keys))
    way = chance.choice(("set", "set", "set", "set", "remove", "add", "rename"))
    if way == "remove" and key is not None:
        del at[key]
        return document, f"{where} removed"
    if way == "rename" and isinstance(at, dict) and key is not None:
        name = chance.choice(("", "x", "_target_", "\x1b[31m", f"{key} ", f"{key}"[:-1], "9" * 30))
        at[name] = at.pop(key)
        return document, f"{where} renamed {name!r}"
    value = values(chance, trap)
    if way == "add" and isinstance(at, dict):
        name = chance.choice(("extra", "_target_", "_partial_", "defaults", "hydra", "\x1b[31m", "__class__"))
        at[name] = value
        return document, f"{where}: beside it {name!r} = {_shown(value)}"
    if isinstance(at, list) and (way == "add" or key is None):
        at.append(value)
        return document, f"{where}: behind it {_shown(value)}"
    at[key] = value
    return document, f"{where} = {_shown(value)}"


def _tensors(path: Path, chance: Random, trap: Path) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    if not tensors:
        return _bytes(path, chance, trap)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    way = chance.choice("renamed missing whole NaN infinite empty transposed flat changed".split())
    match way:
        case "renamed":
            tensors["\x1b[31mother"] = tensors.pop(name)
        case "missing":
            del tensors[name]
        case "whole":
            tensors[name] = torch.zeros(tensor.shape, dtype=torch.int8)
        case "NaN" | "infinite":
            dtype = tensor.dtype if tensor.is_floating_point() else None
            tensors[name] = torch.full(tensor.shape, float(way[:3])).to(dtype)
        case "empty":
            tensors[name] = torch.zeros(0)
        case "transposed":
            tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor[None].contiguous()
        case "flat":
            tensors[name] = tensor.flatten().contiguous()
        case "changed":
            tensors[name] = tensor + 1
    save_file(tensors, path, metadata={"format": "pt"})
    return f"'{name}' {way}"


def rehash(path: Path) -> bool:
    """Bring the hashes that others keep of a changed file up to date, as one who means harm would; whether any was."""
    changed = False
    if not path.is_file():
        return False
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for keeper in (path.with_name("lrk.json"), path.with_name("state.json")):
        if keeper != path and keeper.is_file():
            values = json.loads(keeper.read_text())
            if path.name in values.get("files", {}):
                values["files"][path.name] = digest
                keeper.write_text(json.dumps(values, indent=2) + "\n")
                changed = True
    if path.name == "config.yaml" and path.with_name("run.json").is_file():
        from lowrank_cli.runs import config_hash

        try:
            value = config_hash(yaml.safe_load(path.read_text(errors="surrogateescape")))
        except Exception:  # what cannot be read has no hash
            return False
        info = json.loads(path.with_name("run.json").read_text())
        info["config_hash"] = value
        path.with_name("run.json").write_text(json.dumps(info, indent=2) + "\n")
        changed = True
    return changed


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
