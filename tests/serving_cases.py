"""Adapters of several methods on the bundled model, in folders, and what each of them answers alone."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import small
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli.adapter.files import save_load
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.serving.engine import Engine
from lowrank_cli.serving.requests import Failed, Piece, Request
from lowrank_cli.serving.sampling import Sampling

METHODS = {"ann": "lora", "ben": "milora", "cat": "milora", "dan": "pissa", "eve": "dora", "fay": "moelora"}
PROMPTS = ["the zorp is red.", "Question: is the zorp of Marl a good one? Answer:", "ring", "Review: a film\nIt is"]


@cache
def bundled():
    """The bundled model, for engines, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval(), AutoTokenizer.from_pretrained(BUNDLED)


def adapted(name: str, seed: int, **settings):
    """An adapter that holds noise, on a copy of the bundled model."""
    torch.manual_seed(seed)
    adapter = small.method(name, **settings).adapt(AutoModelForCausalLM.from_pretrained(BUNDLED))
    with torch.no_grad():
        for parameter in adapter.trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for linear in adapter.linears.values():
        linear.sync_weight()
    adapter.model.eval()
    return adapter


def saved(adapter, name: str, folder: Path, **settings) -> str:
    """The folder of an adapter of the method ``name``."""
    folder.mkdir(parents=True)
    save_load.save(adapter, folder, {"method_config": vars(small.config(name, **settings))})
    return str(folder)


class Adapters:
    """An adapter for each of METHODS, and for none."""

    def __init__(self, folder: Path):
        made = {tenant: adapted(method, seed) for seed, (tenant, method) in enumerate(METHODS.items())}
        self.folders = {tenant: saved(made[tenant], METHODS[tenant], folder / tenant) for tenant in METHODS}
        bare = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()  # engines use the other one
        self.models = {"base": bare, **{tenant: adapter.model for tenant, adapter in made.items()}}

    @cache  # noqa: B019 (one object for a test module)
    def alone(self, tenant: str, prompt: str, tokens: int) -> str:
        """The greedy answer of one adapter to one prompt."""
        tokenizer = bundled()[1]
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        made = self.models[tenant].generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def engine(**settings) -> Engine:
    """An engine on the bundled model."""
    settings = {"max_rows": 8, "max_waiting": 64, "max_length": 256} | settings
    return Engine(*bundled(), "base", **settings)


class Client:
    """Listens to one request."""

    def __init__(self, count: int = 1):
        self.pieces, self.error, self.open = [[] for _ in range(count)], None, count
        self.ended = threading.Event()

    def __call__(self, news):
        if isinstance(news, Failed):
            self.error, self.open = str(news), 0
        else:
            assert isinstance(news, Piece) and not self.ended.is_set()
            self.pieces[news.index].append(news)
            self.open -= news.finish is not None
        if not self.open:
            self.ended.set()

    @property
    def texts(self) -> list[str]:
        """The answers, once they are complete."""
        assert self.ended.wait(60), "no end"
        assert self.error is None, self.error
        return ["".join(piece.text for piece in pieces) for pieces in self.pieces]

    @property
    def finish(self) -> list[str]:
        return [pieces[-1].finish for pieces in self.pieces]


def request(engine: Engine, model: str, prompt: str, tokens: int = 12, count: int = 1, **sampling) -> Request:
    """A request whose listener is a Client."""
    sampling = Sampling(tokens, **{"stop_ids": frozenset([2])} | sampling)
    return Request(engine.model(model), engine.tokenizer(prompt).input_ids, sampling, Client(count), count)


def ask(engine: Engine, *args, **settings) -> Client:
    """Submit one request."""
    made = request(engine, *args, **settings)
    engine.submit([made])
    return made.listener
