"""One stage in one run folder: check, make the folder, do the work, record the outcome."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from lowrank_cli import methods, stages
from lowrank_cli.config.composition import Composed, Source, compose, restore
from lowrank_cli.errors import Diverged, Interrupted, LrkError, UserError, WorkFailed, escaped, refusal
from lowrank_cli.launch import tenants
from lowrank_cli.launch.distributed import spawn
from lowrank_cli.launch.nodes import Node, this_node
from lowrank_cli.methods.protocol import Adapts, Calibrates
from lowrank_cli.report import bench, path_format, scores, selections
from lowrank_cli.report.end_of_run import end_of_run
from lowrank_cli.runs import PENDING, Run, progress, showing_life, stopping
from lowrank_cli.runs.library_warnings import library_warnings
from lowrank_cli.schema import ENDLESS, BenchRun, EvaluateRun, RunConfig, ServeRun, TrainRun, check_task
from lowrank_cli.schema.metric import require_data
from lowrank_cli.schema.train import OPTIMIZER_LIBRARIES
from lowrank_cli.training.tracking import require as require_tracker


def check(
    verb: str,
    overrides: list[str],
    config_dir: str | None,
    source: Source | None = None,
    later: tuple[str, ...] = (),
) -> Composed:
    """Compose a stage's configuration, and check all that can be checked without data and weights.

    Args:
        source: the run that the stage starts from, where it is known but not made yet.
        later: prefixes of paths that earlier stages will make: these need not exist yet.

    Raises:
        UserError: the configuration cannot work.
    """
    composed = compose(verb, overrides, config_dir, source, later)
    config = composed.config
    _refuse_missing_folders(config, later)
    _refuse_to_write_quantized(verb, config)
    if config.hardware.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("hardware.attention: flash needs the package flash-attn; install it, or take sdpa")
    if not isinstance(config, RunConfig):
        return composed
    check_task(config.model, config.task)
    _refuse_unsupported_stage(composed)
    _refuse_unused_values(config)
    if config.model.images and (use := methods.create(config.method).needs_prompt()):
        raise UserError(
            f"method: '{config.method.name}' {use}, and {config.model.name} reads images; take another method"
        )
    if hasattr(config, "evaluate"):
        for task in (config.task, *config.task.parts.values()):
            require_data("task.metric", [task.metric])
            require_data("task.more_metrics", task.more_metrics)
    if verb != "generate" and isinstance(method := methods.create(config.method), Calibrates):
        _refuse_uncalibratable(composed, method)
    if isinstance(config, ServeRun):
        tenants.check(config)
    if isinstance(config, EvaluateRun) and config.eval is not None:
        _refuse_outside_harness(config)
    if isinstance(config, TrainRun):
        require_tracker(config.tracker)
        _refuse_optimizer(config)
        _refuse_packing(config)
        check_shares(config)
    return composed


def check_shares(config: TrainRun) -> None:
    """Raise UserError unless the processes can divide batches and weights as the configuration says."""
    accumulated, hardware = config.train.gradient_accumulation, config.hardware
    if hardware.divided and (reason := methods.create(config.method).undivided()):
        raise UserError(
            f"hardware.shard: {hardware.shard} divides the model's weights, and method={config.method.name} {reason}; "
            f"set hardware.shard=null, or take another method"
        )
    if config.train.batch_size % (accumulated * hardware.world):
        nodes = f"hardware.nodes={hardware.nodes} times " if hardware.nodes > 1 else ""
        raise UserError(
            f"train.batch_size: {config.train.batch_size} cannot be shared by {nodes}hardware.processes="
            f"{hardware.processes} times train.gradient_accumulation={accumulated}"
        )


def _refuse_outside_harness(config: EvaluateRun) -> None:
    """Refuse what eval=lm_eval cannot measure or would ignore."""
    if config.model.kind != "causal":
        raise UserError(f"eval: lm_eval asks causal models, and {config.model.name} is an encoder; leave eval out")
    if methods.can(config.method.name, Calibrates):
        raise UserError(f"eval: lm_eval does not see what method={config.method.name} calibrates; leave eval out")
    config.hardware.require_one_process("eval=lm_eval runs in one; set it to 1")
    if config.evaluate.shots or config.evaluate.num_beams > 1:
        raise UserError(
            "evaluate.shots, evaluate.num_beams: eval=lm_eval has eval.num_fewshot and greedy decoding instead"
        )


def _refuse_optimizer(config: TrainRun) -> None:
    """Refuse an optimizer whose library is missing, or that the method cannot be trained with."""
    name = config.train.optimizer
    library, extra = OPTIMIZER_LIBRARIES.get(name, ("", ""))
    if library and importlib.util.find_spec(library) is None:
        raise UserError(f"train.optimizer: {name} needs a library: pip install 'lowrank-cli[{extra}]'")
    if name != "adamw" and (use := methods.create(config.method).needs_adam()):
        raise UserError(f"train.optimizer: {name}, but method={config.method.name} {use}; set train.optimizer=adamw")


def _refuse_packing(config: TrainRun) -> None:
    """Refuse ``train.packing=true`` where batches cannot be packed."""
    if not config.train.packing:
        return
    if config.model.kind == "encoder":
        raise UserError(
            f"train.packing: true, but the encoder {config.model.name} gives one answer for each row; set it to false"
        )
    if isinstance(methods.create(config.method), Calibrates):
        raise UserError(f"train.packing: true, but method={config.method.name} trains nothing; set it to false")
    if config.hardware.compile:
        raise UserError(
            "train.packing: true changes the number of examples in a row, which hardware.compile=true would compile "
            "again and again; set one of them to false"
        )


def _refuse_unsupported_stage(composed: Composed) -> None:
    """Refuse a stage that the method lacks or rules out."""
    verb, name, choice = composed.verb, composed.config.method.name, composed.choices["method"]
    can = methods.capabilities(name)
    if reason := methods.refusal(name, verb):
        able = [other for other in methods.names() if verb in methods.capabilities(other)]
        raise UserError(
            f"method: '{choice}' has no {verb}: {reason} (allowed: {', '.join(able)}; run=FOLDER names such a run)"
        )
    if verb not in can:
        raise UserError(f"method: '{choice}' has no stage {verb} (it has: {', '.join(sorted(can)) or 'none'})")


def _refuse_missing_folders(config: Any, later: tuple[str, ...]) -> None:
    folders = {"model.path": config.model.path}
    if isinstance(config, RunConfig):
        folders |= {"task.path": config.task.path}
        folders |= {f"task.parts.{name}.path": item.path for name, item in config.task.parts.items()}
    for key, path in folders.items():
        exists = path is None or Path(path).is_dir() or (key != "model.path" and Path(path).is_file())
        if not exists and not path.startswith(later):
            hint = f"; write model.gguf={path} for a GGUF file" if path.endswith(".gguf") else ""
            what = "folder" if key == "model.path" else "file or folder"
            raise UserError(f"{key}: there is no {what} '{path_format.shown(path)}'{hint}")
    if (file := config.model.gguf) is not None and not file.startswith(later) and not Path(file).exists():
        raise UserError(f"model.gguf: there is no file or folder '{path_format.shown(file)}'")


def _refuse_unused_values(config: Any) -> None:
    """Refuse values that the chosen model, task or method would ignore."""
    if not hasattr(config, "evaluate"):
        return
    evaluate, task = config.evaluate, config.task
    if evaluate.num_beams > 1 and all(item.answer not in ("free", "chat") for item in task.parts.values() or [task]):
        raise UserError(
            f"evaluate.num_beams: {evaluate.num_beams} beams search for generated text, but the answers of {task.name} "
            f"are scored (task.answer={task.answer}); set evaluate.num_beams=1"
        )
    if chat := next((item for item in task.parts.values() or [task] if item.chats or item.answer == "chat"), None):
        if evaluate.shots:
            raise UserError(
                f"evaluate.shots: {evaluate.shots} demonstrations go in front of a plain prompt, and {chat.name} is "
                f"asked in a chat template; set evaluate.shots=0"
            )
        if config.model.kind == "encoder" and chat.chats:
            raise UserError(
                f"task.chat: true, but the encoder {config.model.name} reads no prompt; leave task.chat out"
            )
    if config.model.kind == "encoder":
        if evaluate.shots:
            raise UserError(
                f"evaluate.shots: {evaluate.shots} demonstrations need a prompt, and the encoder {config.model.name} "
                f"has none; set evaluate.shots=0"
            )
        if not methods.can(config.method.name, Adapts):
            trained = "" if "train" in methods.capabilities(config.method.name) else "train it, or "
            raise UserError(
                f"method: '{config.method.name}' would leave the head of the encoder {config.model.name} random; "
                f"{trained}take a causal model (such as model=llama)"
            )


def _refuse_to_write_quantized(verb: str, config: Any) -> None:
    """Refuse methods and exports that change the frozen weights where these are kept in 4 bits."""
    kind = config.hardware.quantization
    if not kind:
        return
    for method in filter(None, config.variants.values() if isinstance(config, BenchRun) else [config.method]):
        if writes := methods.create(method).rewrites():
            raise UserError(
                f"hardware.quantization: {kind} keeps the model's weights in 4 bits, and method={method.name} "
                f"{writes}; set hardware=gpu, or take another method"
            )
    if verb == "export" and config.export.whole:
        raise UserError(
            f"export.format: {config.export.format} writes updates into the weights, and "
            f"hardware.quantization={kind} keeps them in 4 bits (allowed: lora, gguf)"
        )


def _refuse_uncalibratable(composed: Composed, method: Calibrates) -> None:
    """Refuse tasks that a calibrating method cannot use, and export options that it would ignore."""
    task, plan = composed.config.task, method.plan()
    if task.answer != "labels":
        raise UserError(
            f"task.answer: {task.name} has task.answer={task.answer}; calibration compares label words "
            f"(task.answer=labels)"
        )
    if task.chats:
        raise UserError(
            "task.chat: true, but calibration compares label words after plain prompts; leave task.chat out"
        )
    if plan.templates > 1 + len(task.templates):
        raise UserError(
            f"method.templates: {plan.templates}, but task={task.name} has {1 + len(task.templates)} of them "
            f"(allowed: 1 to {1 + len(task.templates)})"
        )
    shots = getattr(composed.config, "evaluate", None) and composed.config.evaluate.shots
    shown = any(one.plan().shown for one in (method, *method.beside().values()))
    if shown and composed.verb != "bench" and not shots:
        raise UserError(
            f"method.statistics: shown, but {composed.verb} shows no demonstrations"
            f"{'; set evaluate.shots, or' if shots == 0 else ';'} fit with method.statistics=train"
        )
    for key in ("export.format", "export.target", "export.rank"):
        if key in composed.keys:
            name = composed.choices["method"]
            raise UserError(f"{key}: '{name}' exports its statistics, which have one form; leave {key} out")


def plan(verb: str, overrides: list[str], config_dir: str | None) -> tuple[Composed, list[tuple[str, Composed]]]:
    """The checked configuration of a new run, and of each stage in it by name: here there is one."""
    composed = check(verb, overrides, config_dir)
    return composed, [(verb, composed)]


def remaining(run: Run, composed: Composed) -> list[tuple[str, Composed]]:
    """The configurations that resuming ``run`` would execute, by name."""
    return [(composed.verb, composed)]


def create(composed: Composed, config_dir: str | None, command: str, folder: Path | None = None) -> Run:
    """Make the run folder, where :func:`work` starts."""
    return Run.create(
        composed.config.outputs,
        stage=composed.verb,
        config=composed.resolved,
        choices=composed.choices,
        overrides=composed.overrides,
        command=command,
        name=composed.config.name,
        status=PENDING,
        folder=folder,
    )


def work(run: Run, composed: Composed) -> None:
    """Start or resume the stage of a run folder, and draw its plots. A failure is recorded and raised.

    Of several nodes, those after the first only add their processes.
    """
    hardware, node = composed.config.hardware, this_node(composed.config)
    if node and node.rank:
        _join(run, composed, node)
        return
    resume = run.info["status"] != PENDING
    run.begin()
    with recorded(run):
        if run.completed:  # only the plots are missing
            pass
        elif hardware.world > 1:
            spawn(run, hardware, resume, node)
        else:
            perform(run, composed, resume)
        from lowrank_cli.report import model_card, plots

        with library_warnings(run):
            plots.draw(run)
            try:
                model_card.write(run)
            except UserError as error:  # a file of an earlier run that cannot be read costs the card, not this run
                progress.console().print(f"no model card: {error}")
        run.finish(run.metrics)


def _join(run: Run, composed: Composed, node: Node) -> None:
    """Add this node's processes to a run that the first node records."""
    try:
        spawn(run, composed.config.hardware, any(run.path.glob("checkpoints/step-*")), node)
    except KeyboardInterrupt:
        raise Interrupted("the first node says how to continue", stopping.exit_code()) from None


def attempt(run: Run, work: Callable[[Run, Composed], None]) -> None:
    """Do the work of one run among others. Raises only Interrupted: a failure is recorded in the run folder and printed
    to stderr."""
    try:
        work(run, restore(run))
    except Interrupted:
        raise
    except LrkError as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        print(escaped(traceback.format_exc()), file=sys.stderr)


def perform(run: Run, composed: Composed, resume: bool) -> None:
    """Do the stage's work in this process."""
    module = importlib.import_module(stages.STAGES[composed.verb])
    with library_warnings(run):
        metrics = module.run(composed.config, run, composed.adapter_run, resume=resume)
    run.complete(metrics)


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Keep the run's heartbeat during the block, and record its failure; after a signal, say how to resume."""
    stage = run.info["stage"]
    again = f"continue with: lrk {stage} --resume {path_format.typed(run.path)}"
    if stage in ENDLESS:
        again = "the server has stopped"
    try:
        with showing_life(run.path / "run.json"):
            yield
    except (KeyboardInterrupt, Interrupted, Exception) as error:
        # after a signal the run counts as interrupted, whatever error a library turned the interrupt into
        if stopping.requested() or isinstance(error, (KeyboardInterrupt, Interrupted)):
            with suppress(OSError):
                run.interrupt()
            raise Interrupted(again, stopping.exit_code()) from None
        if isinstance(error, LrkError):
            with suppress(OSError):
                run.fail(str(error), error.exit_code, **({"diverged": True} if isinstance(error, Diverged) else {}))
            raise
        if reason := refusal(error):
            with suppress(OSError):  # a full disk may have no room for this either
                run.fail(reason)
            raise WorkFailed(f"{reason}; {again}") from error
        run.write_text("error.txt", traceback.format_exc())
        run.fail(f"{type(error).__name__}: {error}")
        raise


def summary(run: Run) -> RenderableType:
    """The scores of ranks or the results of a benchmark, where there are any, and the end-of-run table."""
    figures = [*scores.shown(run), *bench.shown(run, methods.published_speeds()), *selections.shown(run)]
    return Group(*figures, end_of_run(run, methods.having("setting")[0]))
