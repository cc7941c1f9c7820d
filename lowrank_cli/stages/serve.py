"""``lrk serve``: a server with the OpenAI API, for one model and many adapters."""

from __future__ import annotations

import gc
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_cli.adapter.files.save_load import CONFIG
from lowrank_cli.adapter.tenants.tenant import readable
from lowrank_cli.errors import UserError
from lowrank_cli.inference.tenants import adapter_folder
from lowrank_cli.models.load import Loaded, load
from lowrank_cli.reader import read_json, read_text
from lowrank_cli.runs import Run, progress
from lowrank_cli.runs.tenant_file import tenants_of
from lowrank_cli.runs.vllm_command import vllm_serve
from lowrank_cli.schema import ServeConfig, ServeRun
from lowrank_cli.serving.engine import Engine
from lowrank_cli.session.adapter_run import newest_run_note
from lowrank_cli.session.device import greet, prepare

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  #: of the extra serve


def run(config: ServeRun, run: Run, adapter_run: Path | None, *, resume: bool = False) -> dict[str, float]:
    """Serve until a signal comes, then finish what runs.

    Raises:
        UserError: the port is taken, the extra is not installed, or an adapter cannot be loaded.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve: needs the package {missing[0]}; install it with: pip install 'lowrank-cli[serve]'")
    from lowrank_cli.serving import app, server
    from lowrank_cli.serving.metrics import Metrics

    settings = config.serve
    options = app.Options(
        token=_token(settings),
        adapters=_adapters(settings),
        max_body_bytes=settings.max_body_bytes,
        chat_template=_text("chat_template", settings.chat_template),
    )
    tenants = tenants_of(config)
    with server.listen(settings.host, settings.port) as listener:
        device = prepare(config.hardware).device
        torch.manual_seed(config.seed)
        loaded = load(config.model, config.hardware, None, generates=True)
        loaded.model.to(device).eval().requires_grad_(False)
        source = newest_run_note(config, run)
        greet(run, config.hardware, loaded.model, loaded.header, packing=loaded.packing, source=source)
        engine = _engine(config, loaded)
        run.update(grouped=engine.adapters.bank.grouped)
        try:
            _load(config, engine, tenants)
            metrics = Metrics(engine)
            names = ", ".join(model.name for model in engine.models)
            where = f"{server.address(listener)}/v1"
            progress.console().print(f"serving {names} at {where}; stop with Ctrl-C", soft_wrap=True)
            gc.freeze()  # a collection that walks the model and the libraries would stop all answers for 0.3 s
            began = time.monotonic()
            server.run(app.create(engine, options, metrics), engine, listener, settings.grace)
        finally:
            engine.close()
    return {
        "serve/requests": metrics.answered,
        "serve/tokens": metrics.generated,
        "serve/seconds": time.monotonic() - began,
    }


def _engine(config: ServeRun, loaded: Loaded) -> Engine:
    settings, hardware = config.serve, config.hardware
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    most = min((limit for limit in (loaded.max_positions, positions) if limit is not None), default=None)
    length = settings.max_length or most
    if length is None:
        raise UserError(f"serve.max_length: {loaded.name} does not say how long its input may be; set it")
    if most is not None and length > most:
        raise UserError(f"serve.max_length: {length} is out of range (allowed: 1 to {most}, what {loaded.name} takes)")
    return Engine(
        loaded.model,
        loaded.tokenizer,
        config.model.name,
        max_rows=settings.max_rows,
        max_waiting=settings.max_waiting,
        max_length=length,
        max_bytes=settings.max_bytes,
        grouped=hardware.grouped,
        autocast=hardware.precision == "autocast",
    )


def _load(config: ServeRun, engine: Engine, tenants: dict[str, str]) -> None:
    """Load the adapters, and print what the operator should know about them."""
    console = progress.console()
    for name, folder in tenants.items():
        model = engine.load(name, folder)
        if model.note:
            console.print(f"{name}: {model.note}")
    folders = {name: adapter_folder(Path(folder).expanduser()) for name, folder in tenants.items()}
    command = None if config.hardware.quantization else _vllm(engine, folders)
    if command is not None:
        console.print(f"these are plain LoRAs; on a GPU, vLLM is faster:\n{command}", soft_wrap=True)


def _vllm(engine: Engine, folders: dict[str, Path]) -> str | None:
    """The command with which vLLM serves the adapters; None if it cannot."""
    plain = all(readable(folder) and engine.model(name).adapter is not None for name, folder in folders.items())
    if not folders or not plain:
        return None
    configs = [read_json(folder / CONFIG, dict[str, Any]) for folder in folders.values()]
    base = engine.adapters.bank.model.config
    shown = {name: str(folder.absolute()) for name, folder in folders.items()}
    ranks = [rank for config in configs for rank in (config.get("r", 8), *(config.get("rank_pattern") or {}).values())]
    return vllm_serve(str(base.name_or_path), base.model_type, max(ranks), shown)


def _token(settings: ServeConfig) -> str | None:
    """The content of ``serve.token_file``."""
    token = _text("token_file", settings.token_file)
    if token is not None and not (token.strip().isascii() and token.strip().isprintable() and token.strip()):
        raise UserError(f"serve.token_file: '{settings.token_file}' holds no token; write one line of plain characters")
    return None if token is None else token.strip()


def _text(key: str, path: str | None) -> str | None:
    """The text of a file that a setting names."""
    try:
        return None if path is None else read_text(Path(path), "YAML")
    except UserError as error:
        raise UserError(f"serve.{key}: {error}") from None


def _adapters(settings: ServeConfig) -> Path | None:
    """``serve.adapters``. Raises UserError if there is no such folder."""
    if settings.adapters is not None and not Path(settings.adapters).is_dir():
        raise UserError(f"serve.adapters: there is no folder '{settings.adapters}'")
    return None if settings.adapters is None else Path(settings.adapters)
