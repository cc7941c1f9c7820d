"""What every stage that touches a model starts from: task, model, tokenizer and method on the chosen hardware."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cli import methods, tasks
from lowrank_cli.adapter.adapted_model import Adapter
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.lm_head import answer_losses
from lowrank_cli.adapter.target_sites import find_sites
from lowrank_cli.adapter.tenants.update_class import require_grouped
from lowrank_cli.adapter.training.compiled import require_compiler
from lowrank_cli.errors import UserError, require_choice
from lowrank_cli.inference import progress
from lowrank_cli.methods.protocol import Adapts, Method
from lowrank_cli.models.load import check_task, load
from lowrank_cli.models.quantize import require_quantization
from lowrank_cli.reader import check
from lowrank_cli.runs import Run
from lowrank_cli.runs.threads import Threads, available_cores, choose
from lowrank_cli.schema import HardwareConfig, RunConfig
from lowrank_cli.scoring.probe import Probe
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example, Task

PROMPTS = 16  #: of one batch, where the configuration says nothing


@dataclass
class Session:
    """A model ready to be trained or asked, and the data to do it with."""

    config: RunConfig
    accelerator: Accelerator
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method
    adapter: Adapter | None  #: None for a method that adapts nothing
    header: str  #: the line a run prints first
    max_positions: int | None  #: longest input in tokens, where the model has a position table
    foundation: Path | None  #: the run that holds the adapter's weights; None where there is none yet

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def greet(self, run: Run) -> None:
        """Choose the CPU threads, and print the run's first lines: which model this is, and how it computes."""
        greet(run, self.config.hardware, self.model, self.header)

    def note_device(self, run: Run) -> None:
        """Record the GPU and its peak memory in run.json; a CPU run has both there already."""
        if self.device.type == "cuda":
            run.update(
                device=torch.cuda.get_device_name(self.device),
                device_memory_bytes=torch.cuda.max_memory_allocated(self.device),
            )

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic on fp32 weights, where the hardware config asks for it."""
        enabled = self.config.hardware.precision == "autocast"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def batch_size(self) -> int:
        """Prompts of one batch: ``evaluate.batch_size``, or :data:`PROMPTS` for a verb without that key."""
        evaluate = getattr(self.config, "evaluate", None)
        return PROMPTS if evaluate is None else evaluate.batch_size

    @property
    def encoder(self) -> bool:
        return self.config.model.kind == "encoder"

    def room(self, shots: int = 0, part: str = "") -> int:
        """Tokens that a prompt with ``shots`` demonstrations and its answer may have, in ``part`` of a mix."""
        task = self.config.task
        lengths = [task.max_length, *([task.parts[part].max_length] if part else [])]
        wanted = min(lengths) * (shots + 1)
        return min(wanted, self.max_positions or wanted)

    def new_tokens(self, part: str = "") -> int:
        """Longest generated answer, in tokens, in ``part`` of a mix."""
        task = self.config.task
        return min([task.max_new_tokens, *([task.parts[part].max_new_tokens] if part else [])])

    def encode(self, examples: Sequence[Example]) -> list[Any]:
        """Examples as tokens of the right kind for the model."""
        if self.encoder:
            return [encode.encode_text(self.tokenizer, example, self.room(part=example.part)) for example in examples]
        encoded: list[Any] = [None] * len(examples)
        for part in dict.fromkeys(example.part for example in examples):
            own = [index for index, example in enumerate(examples) if example.part == part]
            cut = self.config.task.parts.get(part, self.config.task).lenient
            rows = encode.encode_all(self.tokenizer, [examples[index] for index in own], self.room(part=part), cut)
            for index, row in zip(own, rows, strict=True):
                encoded[index] = row
        return encoded

    def weight(self, encoded: Any) -> int:
        """How much an example counts in a mean loss: its response tokens, or 1 for an encoder."""
        return 1 if self.encoder else len(encoded.input_ids) - encoded.prompt_length

    def batch(self, encoded: Sequence[Any]) -> dict[str, Tensor]:
        """A training batch on the device; ``prompt_mask`` only where the method routes by it."""
        collate = encode.collate_encoder if self.encoder else encode.collate_causal
        batch = collate(encoded, self.tokenizer.pad_token_id)
        if not (self.adapter and self.adapter.routing):
            batch.pop("prompt_mask", None)
        return {key: value.to(self.device) for key, value in batch.items()}

    def probe(self, size: int, tokens: int) -> Probe:
        """This process's share of a fixed batch of ``size`` dev examples (all, where there are fewer) to score on."""
        dev, world = self.task.dev, self.accelerator.num_processes
        if min(size, len(dev)) < world:
            raise UserError(
                f"hardware.processes: {world} cannot share the {min(size, len(dev))} dev examples to score on"
            )
        chosen = random.Random(self.config.seed).sample(dev, min(size, len(dev)))
        mine = self.encode(chosen[self.accelerator.process_index :: world])
        return Probe(
            self.batch(mine),
            tokens,
            self.autocast,
            lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )

    def loss_sum(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy summed over response tokens (causal, labels shifted) or examples (encoder), in fp32.

        ``model`` is the session's, or what wraps it for data parallelism.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.encoder:
            return F.cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="sum")
        return answer_losses(model, inputs, batch["labels"], self.model).sum()


def start(config: RunConfig) -> Session:
    """Load everything that ``config`` names, seeded. Raises UserError before anything slow where it can.

    The adapter is still as it was made: :func:`lowrank_cli.stages.evaluate.load_adapter` fills it from the foundation.
    """
    accelerator = prepare(config.hardware)
    method = methods.create(config.method)
    below = foundation(config)
    adapts = method if below is None or isinstance(method, Adapts) else method_of(Run.open(below))
    check_task(config.model, config.task)
    task = tasks.load(config.task)
    shots = getattr(getattr(config, "evaluate", None), "shots", 0)
    if shots > len(task.train):
        raise UserError(
            f"evaluate.shots: {shots} are asked for, there are {len(task.train)} demonstrations to draw from"
        )
    torch.manual_seed(config.seed)
    labels = len(task.label_words) if config.model.kind == "encoder" else None
    targets = getattr(config.method, "target_modules", None)
    fits = partial(find_sites, targets=list(targets)) if targets else None  # a wrong name costs no download
    loaded = load(config.model, config.hardware, labels, fits)
    model = loaded.model.to(accelerator.device).requires_grad_(False)  # an adapter declares what trains
    adapter = adapts.adapt(model) if isinstance(adapts, Adapts) else None
    return Session(
        config,
        accelerator,
        task,
        model,
        loaded.tokenizer,
        method,
        adapter,
        header=loaded.header,
        max_positions=loaded.max_positions,
        foundation=below,
    )


def foundation(config: RunConfig) -> Path | None:
    """The run whose adapter ``config`` works with: ``config.run``, or what that one stands on in turn."""
    path = getattr(config, "run", None)
    for run in () if path is None else Run.open(path).lineage():
        name = run.config("method.name", "run")["method"]["name"]
        require_choice(f"{run.path / 'config.yaml'}: method.name", name, methods.names())
        if methods.can(name, Adapts) and run.info["stage"] != "score":
            return run.path
    return None


def method_of(run: Run) -> Method:
    """The method of an earlier run, as it was configured. Raises UserError where that is no method's configuration."""
    return methods.configured(run.config("method.name")["method"], str(run.path / "config.yaml"))


class MadeBy(TypedDict):
    """What ``lrk.json`` says of the method that made an adapter outside of a run."""

    method_config: dict[str, Any]


def method_of_adapter(folder: Path) -> Method:
    """The method that made the adapter in ``folder``: what is saved with it says so, or the run that it belongs to.

    Raises UserError where neither does.
    """
    about, file = save_load.read_proof(folder)["about"], f"{folder / save_load.PROOF}: about"
    if "method_config" in about:
        check(about, MadeBy, file)
        return methods.configured(about["method_config"], file)
    if folder.name == "adapter" and (folder.parent / "run.json").is_file():
        return method_of(Run.open(folder.parent))
    raise UserError(f"{folder}: {save_load.PROOF} does not say which method made the adapter; name its run")


def greet(run: Run, hardware: HardwareConfig, model: PreTrainedModel, header: str, packing: str = "") -> None:
    """Compute with as many CPU threads as fit ``model``, note them in run.json, and say both, and of the packing.

    A resumed run computes with the threads that it began with, since their number decides how sums are rounded.
    """
    lines = [Text(header)]
    if hardware.device == "cpu":
        before = run.info.get("threads")
        threads = choose(hardware.threads, model.config.get_text_config().hidden_size)
        threads = threads if before is None else Threads(before["count"], before["reason"])
        torch.set_num_threads(threads.count)
        run.update(threads=asdict(threads))
        if threads.count != hardware.threads:
            lines.append(Text(str(threads), style="dim"))
    if packing:
        lines.append(Text(packing, style="dim"))
    if run.writes:
        progress.console().print(*lines, sep="\n")


def prepare(hardware: HardwareConfig) -> Accelerator:
    """The device of this process, and its CPU threads. Raises UserError where the device, or a library, is not there.

    The threads are ``hardware.threads``, or one for each core until :func:`greet` knows how wide the model is.
    """
    torch.set_num_threads(hardware.threads or available_cores().count)
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device: cuda is asked for, but no CUDA device is visible (use hardware=cpu)")
    if hardware.device == "cuda" and hardware.processes > torch.cuda.device_count():
        raise UserError(
            f"hardware.processes: {hardware.processes} are asked for, but {torch.cuda.device_count()} CUDA devices "
            f"are visible"
        )
    if hardware.compile:
        require_compiler(hardware.device)
    require_quantization(hardware.quantization)
    require_grouped(hardware.grouped)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state(reset_partial_state=world == 1)  # it outlives a run; the next may be set otherwise
    accelerator = Accelerator(cpu=hardware.device == "cpu")
    if hardware.device == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    assert accelerator.num_processes == world == hardware.processes, "processes must be started by torchrun"
    return accelerator
