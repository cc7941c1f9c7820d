"""How other programs load what ``lrk export`` wrote, as lines to copy."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from lowrank_cli.runs.vllm_command import sglang_serve, vllm_serve

if TYPE_CHECKING:
    from lowrank_cli.runs import Run

#: How transformers loads the base of an adapter that was trained on 4 bits (as ``models/quantize.py``).
IN_4_BITS = (
    ", dtype='bfloat16', quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, "
    "bnb_4bit_quant_type={!r}, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='bfloat16', "
    "llm_int8_skip_modules=['lm_head', 'classifier', '.*pooler'])"
)
CLASSIFIERS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}  #: by PEFT's task type


def ways(run: Run, where: str | None = None) -> list[str]:
    """``load: PYTHON`` and, for a causal model, ``serve: COMMAND``; none where the run exported nothing.

    Args:
        where: the folder or repository that they name; None is the run's folder.
    """
    folder = run.path.absolute() / "export"
    shown = where or str(folder)
    if not folder.is_dir():
        return []
    if (folder / "adapter_config.json").is_file():
        config = run.config("hardware", "task.parts", "task.label_words")
        model_type = run.read_json("export/lrk.json")["model_type"]
        return _lora(shown, run.read_json("export/adapter_config.json"), config, model_type)
    if (folder / "config.json").is_file():
        (kind,) = run.read_json("export/config.json")["architectures"]
        serve = [f"serve: vllm serve {shlex.quote(shown)}"] if kind.endswith("CausalLM") else []
        return [f"load: transformers.{kind}.from_pretrained({shown!r})", *serve]
    if (folder / "adapter.gguf").is_file():
        return [f"serve: llama-server -m BASE.gguf --lora {shlex.quote(f'{shown}/adapter.gguf')}"]
    if (folder / "model.gguf").is_file():
        return [f"serve: llama-server -m {shlex.quote(f'{shown}/model.gguf')}"]
    processor = "lowrank_cli.calibration.logits_processor.AnswerProcessor"
    return [
        f"load: processor = {processor}.from_folder({shown!r}, model, tokenizer.eos_token_id)",
        "use: model.generate(**prompts, logits_processor=[processor], num_beams=processor.beams, length_penalty=0.0)",
    ]


def _lora(folder: str, adapter: dict[str, Any], config: dict[str, Any], model_type: str) -> list[str]:
    base, kind = adapter["base_model_name_or_path"], config["hardware"].get("quantization")
    options = IN_4_BITS.format(kind) if kind else ""
    if adapter["task_type"] in CLASSIFIERS:
        task = config["task"]
        labels = sum(len(part["label_words"]) for part in task["parts"].values() or [task]) or 1  # a number has none
        called = f"peft.AutoPeftModelFor{CLASSIFIERS[adapter['task_type']]}.from_pretrained"
        return [f"load: {called}({folder!r}, num_labels={labels}{options})"]
    if adapter["task_type"] is None:  # of images, for which PEFT has no class
        labels = len(config["task"]["label_words"]) or 1
        options += ", ignore_mismatched_sizes=True"  # most of these models come with a head for other labels
        loaded = f"transformers.AutoModelForImageClassification.from_pretrained({base!r}, num_labels={labels}{options})"
        return [f"load: peft.PeftModel.from_pretrained({loaded}, {folder!r})"]
    load = f"load: peft.AutoPeftModelForCausalLM.from_pretrained({folder!r}{options})"
    if kind:  # a server as it stands would take the base in full precision
        return [load]
    if config["export"].get("target") == "sglang":
        return [load, f"serve: {sglang_serve(str(base), {'tuned': folder})}"]
    command = vllm_serve(str(base), model_type, adapter["r"], {"tuned": folder})
    return [load, f"serve: {command}"] if command else [load]
