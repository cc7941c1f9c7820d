"""Stands in for vLLM: an engine that gives every request one token a step and prints noise; it checks adapters."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace


def SamplingParams(**settings):
    return SimpleNamespace(**settings)


class LLM:
    def __init__(self, model, **settings):
        print("noise on stdout")
        assert (Path(model) / "model.safetensors").is_file() and settings["skip_tokenizer_init"]
        if settings["seed"] == 13:
            raise ValueError("cannot take\nthis model")
        self.llm_engine = Engine(settings)


class Engine:
    def __init__(self, settings):
        self.settings, self.running = settings, {}

    def add_request(self, name, prompt, sampling, lora_request=None):
        if lora_request is not None:
            config = json.loads((Path(lora_request.path) / "adapter_config.json").read_text())
            assert config["r"] <= self.settings["max_lora_rank"] and lora_request.number <= self.settings["max_loras"]
        assert len(prompt["prompt_token_ids"]) + sampling.max_tokens <= self.settings["max_model_len"]
        self.running[name] = (sampling.max_tokens, [])

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        for name, (most, tokens) in list(self.running.items()):
            tokens.append(0)
            if len(tokens) == most:
                del self.running[name]
            yield SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=list(tokens))])
