"""llama.cpp in a process of the Python that ``LRK_LLAMA_CPP`` names, which has llama-cpp-python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch


def llama_cpp(
    model: Path, ids: list[int], texts: list[str], lora: Path | None = None
) -> tuple[torch.Tensor, list[list[int]]]:
    """The log probabilities (T, V) after each of ``ids``, and the token ids of ``texts``; skips the test without it."""
    python = os.environ.get("LRK_LLAMA_CPP")
    if python is None:
        pytest.skip("LRK_LLAMA_CPP names no Python with llama-cpp-python")
    request = {"model": str(model), "ids": ids, "texts": texts} | ({"lora": str(lora)} if lora else {})
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    ended = subprocess.run([python, "-I", worker], input=json.dumps(request), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answer = json.loads(ended.stdout)
    return torch.tensor(answer["logits"]).log_softmax(-1), answer["tokens"]
