"""The command line. Nothing heavy is imported here: help, lists, checks and errors must not wait for torch."""

from __future__ import annotations

import gc
import os
import re
import shlex
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lowrank_cli.errors import (
    Interrupted,
    LrkError,
    UserError,
    WorkFailed,
    cut,
    escaped,
    refusal,
    unknown,
)
from lowrank_cli.runs import stopping
from lowrank_cli.runs.threads import let_waiting_threads_sleep

#: They take overrides.
STAGES = ("train", "import", "score", "prune", "evaluate", "export", "generate", "serve", "bench", "run", "study")
VERBS = (*STAGES, "push", "compare", "report", "list", "check", "new")
KEYS = "keys"  #: long, so ``lrk list`` alone leaves it out
LISTS = ("methods", "models", "tasks", "hardware", "recipes", "studies", "runs")
EXAMPLES = {
    "train": [
        "lrk train method=milora model=llama",
        "lrk train method=lora task=tiny_sentiment train.max_steps=50 seed=1",
        "lrk train -m method=lora,milora seed=0,1,2 hydra/launcher=joblib",
        "lrk train --resume outputs/latest",
    ],
    "import": [
        "lrk import outputs/latest/adapter task=tiny_sentiment",
        "lrk import ORG/NAME model=smollm2_135m",
    ],
    "score": [
        "lrk score",
        "lrk score run=outputs/latest score.kind=taylor",
        "lrk score score.level=module score.kind=kl",
        "lrk score method=lora score.batch=16 score.tokens=4096",
    ],
    "prune": [
        "lrk prune prune.drop=42",
        "lrk prune run=outputs/latest prune.budget=168 prune.per_layer=true",
        "lrk prune prune.keep=2 prune.same_roles=true",
        "lrk prune method=lora prune.drop=42 score.kind=taylor",
    ],
    "evaluate": [
        "lrk evaluate",
        "lrk evaluate run=outputs/latest evaluate.split=dev",
        "lrk evaluate method=none task=tiny_yesno evaluate.shots=8",
        "lrk evaluate -m method=none evaluate.shots=0,4,8",
    ],
    "export": [
        "lrk export",
        "lrk export run=outputs/latest export.target=vllm",
        "lrk export run=outputs/latest export.format=merged",
        "lrk export run=outputs/latest export.format=gguf",
        "lrk export run=outputs/latest export.rank=16 export.max_error=0.05",
    ],
    "generate": [
        'lrk generate "zorp is red. Is zorp red?"',
        'lrk generate run=outputs/latest "zorp is red." generate.temperature=0.8 seed=1',
        "lrk generate --tenants prompts.jsonl generate.output=answers.jsonl",
    ],
    "serve": [
        "lrk serve",
        "lrk serve run=outputs/latest serve.name=tuned serve.port=8080",
        "lrk serve --tenants tenants.jsonl serve.adapters=adapters serve.token_file=token",
    ],
    "bench": [
        "lrk bench decode",
        "lrk bench decode model.shape=100m bench.batch_size=8 bench.beams=[1]",
        "lrk bench decode --tenants 1,8,64 model.shape=100m",
        "lrk bench train model.shape=100m",
        "lrk bench train task=sst2 bench.batch_size=8 bench.methods=[base,lora,peft]",
        "lrk bench score model.shape=100m bench.sample=12",
        "lrk bench decode model.shape=7b hardware=gpu \"bench.methods=[base,lora,'milora k=3']\"",
    ],
    "run": [
        "lrk run recipe=milora",
        "lrk run recipe=milora task=tiny_arithmetic seed=1",
        "lrk run --resume outputs/latest",
    ],
    "study": [
        "lrk study study=lora_variants workers=2",
        "lrk study study=lora_variants train.max_steps=20 study.seeds=[0,1] study.tune=null",
        "lrk study --resume outputs/latest",
    ],
    "push": [
        "lrk push run=outputs/latest repo=ORG/NAME --dry-run",
        "lrk push run=outputs/latest repo=ORG/NAME private=false",
    ],
    "compare": [
        "lrk compare",
        "lrk compare outputs/latest --baseline lora --output comparison",
        "lrk compare --baseline lora --across-tasks",
    ],
    "report": [
        "lrk report",
        "lrk report outputs/latest --output report.html",
        "lrk report outputs/2026-01-31/101500-sweep",
    ],
    "list": [
        "lrk list",
        "lrk list tasks",
        "lrk list methods milora",
        "lrk list keys train",
        "lrk list runs method=lora done",
    ],
    "check": [
        "lrk check method=milora task=rte",
        "lrk check recipe=milora",
        "lrk check study=lora_variants",
        "lrk check train method=lora train.batch_size=64 --memory 24",
    ],
    "new": ["lrk new task reviews", "lrk new model ours --config-dir mine", "lrk new study first"],
}


class Verb(TyperCommand):
    """A command whose help ends with examples and the configuration groups on this machine."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for example in EXAMPLES[ctx.info_name]:
                formatter.write(f"  {example}\n")
        if ctx.info_name in (*STAGES, "check"):
            from lowrank_cli.config.folders import GROUPS, files, groups_of

            with formatter.section("Groups"):
                for group in (*GROUPS, "recipe", "study") if ctx.info_name == "check" else groups_of(ctx.info_name):
                    formatter.write_text(f"{group}={{{', '.join(files(group))}}}")
            with formatter.section("Keys"):
                formatter.write_text(f"lrk list keys SECTION explains {_sections(ctx.info_name)}")
                formatter.write_text("lrk list methods NAME explains method.*")


def _sections(verb: str) -> str:
    from lowrank_cli.config.keys import sections

    return ", ".join(f"{name}.*" for name in sections("train" if verb in ("check", "run") else verb))


def _complete(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides, and for check the verbs. Bash splits words at ``=``: they are joined, and only the rest returned."""
    from lowrank_cli.config.completion import completions
    from lowrank_cli.config.folders import files

    words: list[str] = []
    for word in [*(ctx.params.get("overrides") or []), *["="] * _at_equals(), incomplete]:
        if words and (word.startswith("=") or words[-1].endswith("=")):
            words[-1] += word
        else:
            words.append(word)
    assert ctx.info_name is not None
    verb, matches = ctx.info_name, []
    if verb == "check":
        if len(words) == 1:
            matches = [name for name in STAGES if name.startswith(words[0])]
        verb = words.pop(0) if len(words) > 1 and words[0] in STAGES else "train"
    if verb == "bench":
        kinds = files("bench", ctx.params.get("config_dir"))
        if len(words) == 1:
            matches += [name for name in kinds if name.startswith(words[0])]
        elif words[0] in kinds:
            words = [f"bench={words[0]}", *words[1:]]
    matches += completions(verb, words[:-1], words[-1], ctx.params.get("config_dir"))
    return [item[len(words[-1]) - len(incomplete) :] for item in matches]


def _at_equals() -> bool:
    """Whether the word at bash's cursor is a lone ``=``, which the parser hides."""
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    return at.isdigit() and words[int(at) : int(at) + 1] == ["="]


def _complete_list(incomplete: str) -> list[str]:
    return [name for name in (*LISTS, KEYS) if name.startswith(incomplete)]


OVERRIDES_HELP = "groups and values to change"
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help=OVERRIDES_HELP, autocompletion=_complete),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the composed configuration and stop")]
ConfigDir = Annotated[
    str | None, typer.Option("--config-dir", metavar="DIR", help="your own groups, looked up before conf/")
]
Resume = Annotated[
    str | None, typer.Option("--resume", metavar="DIR", help="continue a run, recipe or sweep from its folder")
]
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="sweep: key=a,b runs once for each value")]

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: lrk train method=milora model=llama",
)


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    """Low-rank adaptation of pretrained transformers: train, evaluate and compare methods."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"lrk {installed('lowrank-cli')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(cls=Verb)
def train(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Train a method on a task, keep the best adapter, and test it."""
    _stage("train", overrides or [], multirun, resume, dry_run, config_dir)


@app.command("import", cls=Verb)
def import_(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADAPTER] [KEY=VALUE]...", autocompletion=_complete, help=OVERRIDES_HELP),
    ] = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Make a run of an adapter that the PEFT library wrote: a folder, or ORG/NAME on the Hub."""
    arguments = overrides or []
    arguments = _expand_shorthand("import", arguments, config_dir) if resume is None else arguments
    _stage("import", arguments, False, resume, dry_run, config_dir)


@app.command(cls=Verb)
def score(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Score every rank or module of an adapter (run=FOLDER, or the newest) on dev examples."""
    _stage("score", overrides or [], multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def prune(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Remove the lowest-scoring ranks or modules from an adapter, and save the smaller one as a new run."""
    _stage("prune", overrides or [], multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def evaluate(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Measure a trained run (run=FOLDER, or the newest), or the frozen model (method=none)."""
    _stage("evaluate", overrides or [], multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def export(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Export a trained adapter (run=FOLDER, or the newest) as a PEFT LoRA or a merged model, and verify its logits."""
    _stage("export", overrides or [], multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def generate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT] [KEY=VALUE]...", autocompletion=_complete, help=OVERRIDES_HELP),
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='JSON lines {"tenant": RUN, "prompt": TEXT} to answer, many adapters in a batch'
        ),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="keep a run folder of one prompt's answer, as for a file of prompts")
    ] = False,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Continue a prompt with a trained adapter (run=FOLDER, or the newest), or a file of prompts with many adapters."""
    arguments = _with_tenants("generate", overrides, tenants)
    arguments = _expand_shorthand("generate", arguments, config_dir)
    _stage("generate", arguments, multirun, resume, dry_run, config_dir, save=save)


@app.command(cls=Verb)
def serve(
    overrides: Overrides = None,
    tenants: Annotated[
        str | None,
        typer.Option(metavar="FILE", help='JSON lines {"name": NAME, "tenant": RUN}: adapters to serve together'),
    ] = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Serve a trained adapter (run=FOLDER, or the newest), or a file of them, with the OpenAI API."""
    arguments = _with_tenants("serve", overrides, tenants)
    _stage("serve", _expand_shorthand("serve", arguments, config_dir), False, resume, dry_run, config_dir)


@app.command(cls=Verb)
def bench(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND] [KEY=VALUE]...",
            autocompletion=_complete,
            help="what to measure (a name of bench= below; default: decode), then groups and values to change",
        ),
    ] = None,
    tenants: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="also decode with this many different adapters in one batch")
    ] = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Measure the speed and memory of methods in generation, training, scoring, loading and more."""
    from lowrank_cli.launch import shorthand

    arguments = overrides or []
    arguments = arguments if tenants is None else shorthand.tenants(arguments, tenants)
    _stage("bench", _expand_shorthand("bench", arguments, config_dir), multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def run(
    overrides: Overrides = None,
    multirun: Multirun = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Run a recipe: several stages in a row, continued from the first unfinished one with --resume."""
    _stage("run", overrides or [], multirun, resume, dry_run, config_dir)


@app.command(cls=Verb)
def study(
    overrides: Overrides = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    config_dir: ConfigDir = None,
) -> None:
    """Compare methods fairly: the same tuning for each, then several seeds, with what the difference can tell."""
    _stage("study", overrides or [], False, resume, dry_run, config_dir)


def _with_tenants(verb: str, overrides: list[str] | None, tenants: str | None) -> list[str]:
    """The overrides, with ``--tenants`` as one of them."""
    return [*(overrides or []), *([f"{verb}.tenants={tenants}"] if tenants is not None else [])]


def _stage(
    verb: str,
    overrides: list[str],
    multirun: bool,
    resume: str | None,
    dry_run: bool,
    config_dir: str | None,
    save: bool = True,
) -> None:
    from lowrank_cli.launch import single_run, sweep

    if resume is not None:
        extra = [*["--dry-run"] * dry_run, *["--config-dir"] * (config_dir is not None)]
        if extra:
            raise UserError(f"--resume: a run continues with its own configuration; leave out {' '.join(extra)}")
        _warn_untested_versions()
        (sweep if sweep.is_sweep(resume) else single_run).resume(verb, resume, overrides)
    elif dry_run:
        from lowrank_cli.launch.listing import yaml_of

        typer.echo(escaped(yaml_of(_preview(verb, overrides, config_dir, multirun))), nl=False)
    else:
        command = shlex.join(["lrk", *sys.argv[1:]])
        _warn_untested_versions()
        if multirun:
            sweep.start(verb, overrides, config_dir, command)
        else:
            single_run.start(verb, overrides, config_dir, command, save=save)


def _warn_untested_versions() -> None:
    """Print one line to stderr if installed libraries are outside the tested version ranges."""
    from lowrank_cli.runs import untested_versions

    if untested := untested_versions():
        print(f"warning: untested versions: {'; '.join(untested)}", file=sys.stderr)


def _expand_shorthand(verb: str, arguments: list[str], config_dir: str | None) -> list[str]:
    """``arguments`` as overrides: generate takes a prompt among them, import an adapter, bench a kind in front."""
    if verb not in ("import", "generate", "serve", "bench"):
        return arguments
    from lowrank_cli.launch import imported, shorthand

    if verb == "import":
        return imported.overrides(arguments)
    if verb == "bench":
        return shorthand.bench(arguments, config_dir)
    return shorthand.generate(arguments) if verb == "generate" else shorthand.serve(arguments)


def _preview(verb: str, overrides: list[str], config_dir: str | None, multirun: bool) -> list[tuple[str, Any]]:
    from lowrank_cli.launch import single_run, sweep

    return (sweep if multirun else single_run).preview(verb, overrides, config_dir)


@app.command(cls=Verb)
def push(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="repo=ORG/NAME; run=FOLDER (default: the newest); private=false; outputs=FOLDER (of the runs)",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be uploaded and stop; offline")] = False,
) -> None:
    """Upload a run's export, or else its adapter, to the Hub with its model card; private unless you say otherwise."""
    from lowrank_cli.launch.push import prepare, push
    from lowrank_cli.terminal import Terminal

    upload = prepare(words or [])
    Terminal().print("\n".join(upload.lines()), soft_wrap=True)
    if not dry_run:
        Terminal().print(f"pushed: {push(upload)}", soft_wrap=True)


@app.command(cls=Verb)
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN_OR_FOLDER]...", help="runs, sweeps, folders of them, or a study; else --outputs"),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="the method to test the others against")] = None,
    metric: Annotated[str | None, typer.Option(help="what to compare, such as test/accuracy")] = None,
    across_tasks: Annotated[
        bool, typer.Option("--across-tasks", help="also test methods over all tasks together, paired by task and seed")
    ] = False,
    percent: Annotated[bool, typer.Option("--percent", help="accuracy and other shares in percent")] = False,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="also write the comparison here: Markdown, CSV, LaTeX, plots, PEFT's JSON"),
    ] = None,
    outputs: Annotated[str, typer.Option(metavar="FOLDER", help="the folder of runs")] = "outputs",
) -> None:
    """Compare finished runs or a study: methods by task and model, over seeds, with intervals and paired tests."""
    from lowrank_cli.report.compare import compare as compare_runs
    from lowrank_cli.terminal import Terminal

    Terminal().print(compare_runs(runs or [], baseline, metric, output, outputs, across_tasks, percent))


@app.command(cls=Verb)
def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER]...", help="runs, sweeps, recipes, studies, or folders of them; else the newest"
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="the method to test the others against")] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE.html", help="else report.html in the folder; of several folders, here"),
    ] = None,
    outputs: Annotated[str, typer.Option(metavar="FOLDER", help="the folder of runs")] = "outputs",
) -> None:
    """Write one HTML page about runs: curves, comparison, predictions. It needs no network."""
    from lowrank_cli.report import path_format
    from lowrank_cli.report.html.page import write
    from lowrank_cli.terminal import Terminal

    Terminal().print(f"report: {path_format.shown(write(paths or [], baseline, output, outputs))}")


@app.command("list", cls=Verb)
def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join((*LISTS, KEYS))}]", help="default: all except keys", autocompletion=_complete_list
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="after methods or keys: explain those of a method or a section; after runs: only those that are "
            "method=NAME, task=NAME, seed=N, …, done, failed, …",
        ),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="METRIC", help="of runs: by a metric such as test/accuracy, best first")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="of runs: the newest, or with --sort the best, N")] = None,
    outputs: Annotated[str, typer.Option(metavar="FOLDER", help="the folder of runs")] = "outputs",
    config_dir: ConfigDir = None,
) -> None:
    """List methods, models, tasks, hardware, recipes, studies or runs, or explain the keys of a method or section."""
    from lowrank_cli.launch.listing import print_list, print_method_keys, print_runs, print_section_keys

    if what is not None and what not in (*LISTS, KEYS):
        raise unknown("list", what, (*LISTS, KEYS))
    if what == "runs":
        print_runs(names or [], sort, limit, outputs)
        return
    if sort is not None or limit is not None:
        raise UserError("list: --sort and --limit are for runs: lrk list runs --sort METRIC")
    name, more = names[0] if names else None, names[1:] if names else []
    if more:
        raise UserError(f"list: unexpected '{more[0]}' after '{name}'")
    if what == KEYS:
        print_section_keys(name, config_dir)
        return
    if name is not None:
        if what != "methods":
            raise UserError(
                f"list: unexpected '{name}' after '{what}'; lrk list methods NAME explains the keys of a method, "
                f"lrk list keys SECTION those of a section"
            )
        print_method_keys(name, config_dir)
        return
    for group in LISTS if what is None else (what,):
        print_runs([], None, None, outputs) if group == "runs" else print_list(group, config_dir)


@app.command(cls=Verb)
def check(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERB] [KEY=VALUE]...", help="what you would run", autocompletion=_complete),
    ] = None,
    multirun: Multirun = False,
    config_dir: ConfigDir = None,
    probe: Annotated[bool, typer.Option(help="of a study: take a few steps, to say how long it takes")] = True,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="GIB|auto", help="of a training: its memory, and the largest batch that fits (auto: what is here)"
        ),
    ] = None,
) -> None:
    """Validate a configuration and print the plan, without weights; a study's with a short probe."""
    overrides = list(overrides or [])
    groups = {override.partition("=")[0] for override in overrides}
    verb = "study" if "study" in groups else "run" if "recipe" in groups else "train"
    if overrides and "=" not in overrides[0]:
        verb = overrides.pop(0)
        if verb not in STAGES:
            raise unknown("verb", verb, STAGES)
    plan = _preview(verb, _expand_shorthand(verb, overrides, config_dir), config_dir, multirun)
    if verb == "study":
        from lowrank_cli.launch import study_preview

        study_preview.print_plan(plan[0][1], config_dir, probe)
    else:
        from lowrank_cli.launch.listing import print_plan

        print_plan(plan, memory)


@app.command(cls=Verb)
def new(
    kind: Annotated[str, typer.Argument(metavar="task|model|method|study", help="what the file describes")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="how it is chosen, as in task=NAME")],
    config_dir: Annotated[
        str | None, typer.Option("--config-dir", metavar="DIR", help="the folder of your own groups (default: conf)")
    ] = None,
) -> None:
    """Write a file of your own for a task, model, method or study."""
    from lowrank_cli.launch.new_file import write
    from lowrank_cli.terminal import Terminal

    Terminal().print(write(kind, name, config_dir), soft_wrap=True)


CAUGHT = 130  # what Typer returns for a KeyboardInterrupt; a run raises Interrupted instead, and says how to resume


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 128 + a signal's number."""
    let_waiting_threads_sleep()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed by the shell: >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    code = call(sys.argv[1:])
    stopping.finish(code)
    gc.freeze()  # at exit, collecting the libraries' objects would take seconds
    sys.exit(code)


def call(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    with stopping.signals():
        try:
            _require_directory()
            code = app(arguments, prog_name="lrk", standalone_mode=False) or 0
            if code == CAUGHT:
                print("interrupted: nothing was started", file=sys.stderr)
                return stopping.exit_code()
            sys.stdout.flush()
            return code
        except LrkError as error:
            print(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            if hasattr(error, "format_message"):  # raised by the parser
                print(f"error: {escaped(cut(_usage(error.format_message(), arguments)))}", file=sys.stderr)
                return UserError.exit_code
            if reason := refusal(error):
                _drop_output()
                print(f"error: {escaped(cut(reason))}", file=sys.stderr)
                return WorkFailed.exit_code
            print(escaped(traceback.format_exc()), file=sys.stderr)
            return 1


def _drop_output() -> None:
    """Discard unwritten stdout; else the interpreter retries at exit and prints a second error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory was deleted; go to another one") from None


def _usage(message: str, arguments: list[str]) -> str:
    """The parser's error message as one line, with the nearest verb or the help to read."""
    verb = re.match(r"No such command '(.*?)'", message)
    if verb and "=" in verb[1]:
        return f"the verb is missing; did you mean 'lrk train {shlex.join(arguments)}'?"
    if verb:
        return str(unknown("verb", verb[1], VERBS))
    command = " ".join(["lrk", *arguments[:1], "--help"])
    return f"{' '.join(message.split()).rstrip('.')} (see: {command})"
