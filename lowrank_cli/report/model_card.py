"""The model card of an adapter or an export: ``README.md`` with the metadata that the Hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lowrank_cli.report import export_hints
from lowrank_cli.report.metric_names import STANDARD_ERROR, in_words, is_loss, quality
from lowrank_cli.report.number_format import count, number
from lowrank_cli.report.predictions import answers
from lowrank_cli.report.run_results import ADAPTERS, present_lineage
from lowrank_cli.report.statistics import NORMAL_95, wilson_interval
from lowrank_cli.runs import Run
from lowrank_cli.runs.vllm_command import sglang_serve, vllm_serve

FILE = "README.md"
REPOSITORY = "ORG/NAME"  #: stands for the repository on the Hub until ``lrk push`` names it
BASE = "BASE_MODEL"  #: stands for a base model that is not on the Hub
BASE_GGUF = "BASE.gguf"  #: stands for the base model as a GGUF file
Result = tuple[str, float, tuple[float, float] | None]  #: a metric, its value, and its 95 % interval over the examples
#: Sections of a configuration that say how an adapter was made, and which of their keys (all where there are none).
SETTINGS: dict[str, tuple[str, ...]] = {
    "method": (),
    "train": (),
    "task": ("label_words", "max_length", "system", "limit"),
    "hardware": ("precision", "quantization"),
}


def folder_of(run: Run) -> Path | None:
    """The folder of a run that others can load, its export or else its adapter; None if it has neither."""
    return next((folder for name in ("export", "adapter") if (folder := run.path / name).is_dir()), None)


def write(run: Run) -> None:
    """Write the card of what ``run`` exported or trained into its folder; does nothing if there is none."""
    folder = folder_of(run)
    if folder is not None and run.info["stage"] in (*ADAPTERS, "export"):
        run.write_text(f"{folder.name}/{FILE}", card(run, folder))


def card(run: Run, folder: Path) -> str:
    """The text of the card for ``folder`` of ``run``: metadata in YAML, then Markdown."""
    from huggingface_hub import ModelCardData

    lineage = list(present_lineage(run))
    made = next((one for one in lineage if one.info["stage"] in ADAPTERS), run)
    config = made.config()
    model, task, method = config["model"], config["task"], config["method"]["name"]
    results = list(_results(made))
    encoder = model["kind"] == "encoder"
    kind = _pipeline(model, task["answer"])
    title = f"{model['name']}-{method}-{task['name']}"
    base, data = model.get("id"), _data_sets(task)
    adapter = not any((folder / name).is_file() for name in ("config.json", "model.gguf"))
    index = _model_index(kind, task["name"], data, results) or None
    meta = ModelCardData(
        model_name=title if index else None,
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        library_name=_library(folder),
        license=model.get("license"),
        pipeline_tag=kind,
        tags=["lowrank-cli", method],
        datasets=data or None,
        metrics=sorted({metric.rpartition("/")[2] for metric, *_ in results if not is_loss(metric)}) or None,
        eval_results=index,
        ignore_metadata_errors=True,
    )
    use = _use(run, folder, model, task)
    sections = [
        f"---\n{meta.to_yaml()}\n---",
        f"# {title}",
        _introduction(model, task, method, "An adapter of" if adapter else "Fine-tuned from", data, use),
        f"## Use\n\n{use}",
        f"## Prompt\n\n````text\n{task['template']}\n````" if not encoder and task.get("template") else "",
        f"## Results\n\n{_table(results)}" if results else "",
        f"## Settings\n\n{_settings(made, lineage)}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _library(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "peft"
    if any(folder.glob("*.gguf")):
        return "gguf"
    return "transformers" if (folder / "config.json").is_file() else "lowrank-cli"


def _introduction(
    model: dict[str, Any], task: dict[str, Any], method: str, what: str, data: list[str], use: str
) -> str:
    if model.get("id"):
        base = f"[{model['id']}](https://huggingface.co/{model['id']})"
        base += " (read from a local folder or file)" if model.get("path") or model.get("gguf") else ""
    else:
        base = f"`{model['name']}`" + (" (in the package lowrank-cli)" if _bundled(model) else " (a local checkpoint)")
    source = "data set " + ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in data)
    if not data:
        source = "generated data" if task.get("generator") else "own data"
    licence = model.get("license") or "unknown here"
    made = f"for the task `{task['name']}` ({source}), made with the method `{method}` of lowrank-cli"
    absent = f" `{BASE}` below stands for its folder." if BASE in use else ""
    absent += f" `{BASE_GGUF}` below stands for that model in GGUF." if BASE_GGUF in use else ""
    return f"{what} {base} {made}.{absent}\n\nLicence of the base model: {licence}."


def _bundled(model: dict[str, Any]) -> bool:
    return bool(model.get("bundled")) and not (model.get("path") or model.get("gguf"))


def _data_sets(task: dict[str, Any]) -> list[str]:
    """The data sets on the Hub that a task or the parts of a mix are read from."""
    parts = list(task.get("parts", {}).values()) or [task]
    return list(dict.fromkeys(part["hub"] for part in parts if part.get("hub") and not part.get("path")))


def _use(run: Run, folder: Path, model: dict[str, Any], task: dict[str, Any]) -> str:
    """Code that loads the files of ``folder``."""
    base = model.get("id") or BASE
    encoder = model["kind"] == "encoder"
    loader = _loader(model, task["answer"])
    reader = "AutoImageProcessor" if model.get("images") else "AutoTokenizer"
    read = f"{'processor' if model.get('images') else 'tokenizer'} = {reader}.from_pretrained"
    labels = f", num_labels={len(task['label_words']) or 1}" if encoder else ""
    labels += ", ignore_mismatched_sizes=True" if model.get("images") else ""
    loaded = f'model = {loader}.from_pretrained("{base}"{labels})'
    if any(folder.glob("*.gguf")):
        file = "adapter.gguf" if (folder / "adapter.gguf").is_file() else "model.gguf"
        server = f"llama-server -m {BASE_GGUF} --lora" if file == "adapter.gguf" else "llama-server -m"
        return _fences([], [f"hf download {REPOSITORY} {file} --local-dir .", f"{server} {file}"])
    if (folder / "config.json").is_file():
        python = [
            f"from transformers import {loader}, {reader}",
            "",
            f'model = {loader}.from_pretrained("{REPOSITORY}")',
            f'{read}("{REPOSITORY}")',
        ]
        serve = [] if encoder else [f"vllm serve {REPOSITORY}"]
        return _fences(python, serve)
    if (folder / "adapter_config.json").is_file():
        python = [
            "from peft import PeftModel",
            f"from transformers import {loader}, {reader}",
            "",
            loaded,
            f'model = PeftModel.from_pretrained(model, "{REPOSITORY}")',
            f'{read}("{REPOSITORY if folder.name == "export" else base}")',
        ]
        if encoder:
            return _fences(python, [])
        return _fences(python, [*_serve(run, folder, base), f"lrk import {REPOSITORY} task={task['name']}"])
    if folder.name == "export":
        return _fences([way.partition(": ")[2] for way in export_hints.ways(run, "FOLDER")], [])
    python = [
        "import lowrank_cli as lrk",
        "from huggingface_hub import snapshot_download",
        f"from transformers import {loader}",
        "",
        loaded,
        f'adapter = lrk.load(model, snapshot_download("{REPOSITORY}"))',
    ]
    return _fences(python, [])


def _serve(run: Run, folder: Path, base: str) -> list[str]:
    """The command of an engine that serves the LoRA in ``folder``, if one does."""
    about, adapters = run.read_json(f"{folder.name}/adapter_config.json"), {"tuned": REPOSITORY}
    if run.config().get("export", {}).get("target") == "sglang":
        return [sglang_serve(base, adapters)]
    model_type = run.read_json(f"{folder.name}/lrk.json")["model_type"]
    other = any(value and key.startswith("use_") and key != "use_rslora" for key, value in about.items())
    command = None if other else vllm_serve(base, model_type, about["r"], adapters)  # no kind but LoRA, of either scale
    return [command] if command else []


def _pipeline(model: dict[str, Any], answer: str) -> str:
    """What the Hub calls the use of such a model."""
    if model["kind"] != "encoder":
        return "text-generation"
    if model.get("images"):
        return "image-classification"
    return "token-classification" if answer == "tags" else "text-classification"


def _loader(model: dict[str, Any], answer: str) -> str:
    """The class of transformers that loads such a model."""
    if model["kind"] != "encoder":
        return "AutoModelForCausalLM"
    if model.get("images"):
        return "AutoModelForImageClassification"
    return f"AutoModelFor{'Token' if answer == 'tags' else 'Sequence'}Classification"


def _fences(python: list[str], shell: list[str]) -> str:
    blocks = [("python", python), ("sh", shell)]
    return "\n\n".join("\n".join([f"```{name}", *lines, "```"]) for name, lines in blocks if lines)


def _results(run: Run) -> Iterator[Result]:
    """The metrics of quality of ``run``.

    Shares of correct answers have Wilson's interval, others one of their standard error.
    """
    metrics = run.metrics
    predicted = "test/" if any(name.startswith("test/") for name in metrics) else "dev/"
    for name in quality(metrics):
        value = metrics[name]
        if value is None:
            continue
        known = answers(run.path.resolve(), name, value) if name.startswith(predicted) else None
        if known is not None:
            yield name, value, wilson_interval(value, len(known.correct))
        elif (error := metrics.get(f"{name}{STANDARD_ERROR}")) is not None:
            yield name, value, (value - NORMAL_95 * error, value + NORMAL_95 * error)
        else:
            yield name, value, None


def _table(results: list[Result]) -> str:
    rows = []
    for name, value, interval in results:
        within = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
        rows.append(f"| {in_words(name)} | {number(value)} | {within} |")
    return "\n".join(["| metric | value | 95 % interval over the examples |", "|---|---|---|", *rows])


def _model_index(kind: str, task: str, data: list[str], results: list[Result]) -> list[Any]:
    """The results on the test split as the Hub's model index."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=kind,
            dataset_type=data[0] if len(data) == 1 else task,
            dataset_name=task,
            dataset_split="test",
            metric_type=name.rpartition("/")[2],
            metric_name=in_words(name),
            metric_value=value,
        )
        for name, value, _ in results
        if name.startswith("test/")
    ]


def _settings(made: Run, lineage: list[Run]) -> str:
    """What the adapter was made with, as YAML, and its size; without local paths and what is not set."""
    trained = next((run for run in lineage if run.info["stage"] == "train"), made).config()
    sections = {**made.config(), "train": trained.get("train", {})}
    chosen = {
        name: {
            key: value for key, value in sections.get(name, {}).items() if (not keys or key in keys) and _told(value)
        }
        for name, keys in SETTINGS.items()
    }
    text = yaml.safe_dump(
        {**{name: values for name, values in chosen.items() if values}, "seed": trained.get("seed")},
        sort_keys=False,
        allow_unicode=True,
    )
    sizes = [
        f"{in_words(name)}: {count(made.metrics[name])}"
        for name in ("trainable_parameters", "activated_parameters", "total_parameters")
        if made.metrics.get(name) is not None
    ]
    packages = made.info.get("packages", {})
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("lowrank-cli", "torch", "transformers") if name in packages
    )
    return "\n\n".join(filter(None, [f"````yaml\n{text}````", "; ".join(sizes), versions]))


def _told(value: Any) -> bool:
    """Whether a setting is set, and no path of this machine."""
    return value not in (None, [], {}, "") and not (
        isinstance(value, str) and (os.path.isabs(value) or value[:1] == "~")
    )


def named(text: str, repository: str) -> str:
    """A card with ``repository`` in place of :data:`REPOSITORY`."""
    return re.sub(rf"\b{REPOSITORY}\b", lambda _: repository, text)
