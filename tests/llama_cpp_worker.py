"""Logits and token ids of llama.cpp, run by a Python that has llama-cpp-python: one JSON request on stdin."""

import json
import os
import sys

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

from llama_cpp import Llama  # noqa: E402

request = json.load(sys.stdin)
model = Llama(
    model_path=request["model"],
    lora_path=request.get("lora"),
    logits_all=True,
    n_ctx=128,
    n_threads=1,
    n_threads_batch=1,
    type_k=0,  # keys and values in fp32, not fp16
    type_v=0,
    flash_attn=False,
    verbose=False,
)
model.eval(request["ids"])
logits = model.scores[: len(request["ids"])].tolist()  # (T, V)
tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
json.dump({"logits": logits, "tokens": tokens}, answers)
