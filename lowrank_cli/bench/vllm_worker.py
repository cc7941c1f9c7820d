"""Decodes with vLLM for ``lrk bench decode``, run by a Python that has vLLM: JSON lines in, JSON lines out.

The first line configures the engine (:func:`engine`), every other one is a batch (:func:`decode`). The answer to a
failed request has the key ``error``. Imports vLLM and the standard library only; that environment may have no more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import pairwise
from typing import Any


def main() -> None:
    """Answer requests until the input ends. vLLM's output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            request = json.loads(line)
            if model is None:
                model, answer = engine(request), {"ready": True}
            else:
                answer = decode(model, **request)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def engine(settings: dict[str, Any]) -> Any:
    """The engine of vLLM's ``LLM``, made with these arguments."""
    from vllm import LLM

    return LLM(**settings).llm_engine


def decode(engine: Any, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]:
    """Continue ``prompts`` (token ids), each with the LoRA of the folder in ``adapters`` (None is the bare model).

    Times are in seconds: ``first`` until every prompt has a token, ``steps`` and ``cpu_steps`` (processor time) of each
    later token, ``seconds`` in all; ``memory`` is the largest resident size of this process, in bytes.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folders = sorted({folder for folder in adapters if folder is not None})
    began = time.perf_counter()
    for row, (ids, folder) in enumerate(zip(prompts, adapters)):
        engine.add_request(
            f"{began}-{row}",
            {"prompt_token_ids": ids},
            SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True),
            lora_request=None if folder is None else LoRARequest(folder, 1 + folders.index(folder), folder),
        )
    ends: list[float] = []
    cpu_ends: list[float] = []
    lengths: dict[str, int] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        if len(lengths) == len(prompts) and min(lengths.values()) > len(ends):
            ends.append(time.perf_counter())
            cpu_ends.append(time.process_time())
    return {
        "seconds": time.perf_counter() - began,
        "first": ends[0] - began,
        "steps": [after - before for before, after in pairwise(ends)],
        "cpu_steps": [after - before for before, after in pairwise(cpu_ends)],
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    main()
