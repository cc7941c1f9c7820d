"""Log probabilities in vLLM, for ``prove_vllm.py``: run by a Python that has vLLM, JSON on stdin and stdout.

Imports vLLM and the standard library only; that environment may have no more.
"""

import json
import os
import sys

TOP = 20  #: values of a next token; the most that vLLM gives by default


def main() -> None:
    """Answer one request: by LoRA (a folder, or null for the bare model) and prompt, the most probable next tokens."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM's output goes to stderr
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.load(sys.stdin)
    engine = LLM(**request["engine"])
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=TOP)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    result = {}
    for number, (name, folder) in enumerate(request["adapters"].items(), start=1):
        lora = LoRARequest(name, number, folder) if folder else None
        outputs = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        result[name] = [
            {token: known.logprob for token, known in output.outputs[0].logprobs[0].items()} for output in outputs
        ]
    json.dump(result, answers)


if __name__ == "__main__":
    main()
