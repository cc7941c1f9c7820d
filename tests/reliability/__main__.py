"""``python -m tests.reliability``: runs trials, says which failed and how to repeat them, and writes the table."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

from . import table
from .box import Box
from .families import FAMILIES
from .samples import Samples
from .trial import CONTROL, Failed, Result, Skipped


def main() -> int:
    options = arguments()
    families = options.families or list(FAMILIES)
    done = table.read(options.record) if options.record else {}
    if not options.table:
        scratch = Path(tempfile.mkdtemp(prefix="reliability-"))
        prepare(scratch)
        try:
            for family in families:
                seeds = options.seed or range(options.trials or FAMILIES[family].trials(options.full))
                left = [seed for seed in seeds if options.seed or (family, seed) not in done]
                samples = Samples(options.samples or scratch / "samples", scratch / "home")
                for result in run(family, left, scratch, samples, options.keep):
                    done[family, result.seed] = result
                    if options.record:
                        table.append(options.record, result)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    results = [result for result in done.values() if result.family in families]
    table.summarise(results)
    if options.table:
        table.write(results, {name: family.title for name, family in FAMILIES.items()}, table.ROOT / "docs")
    return int(any(result.status == "failed" for result in results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)}; all when left out")
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="only this trial (can be repeated)")
    parser.add_argument("--trials", type=int, metavar="N", help="the trials 0 to N - 1 of each family")
    parser.add_argument("--full", action="store_true", help="the whole campaign, recorded and continued")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="JSON lines of trials; those in it are not repeated"
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing; write the table in docs/explanation/reliability.md"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the files of failed trials here")
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="keep the runs that trials start from here")
    options = parser.parse_args()
    options.samples = options.samples and options.samples.resolve()
    for family in options.families:
        if family not in FAMILIES:
            parser.error(f"unknown family '{family}' (allowed: {', '.join(FAMILIES)})")
    if options.seed and len(options.families) != 1:
        parser.error("--seed: name the one family that it belongs to")
    if options.full and options.record is None:
        options.record = table.ROOT / "reliability.jsonl"
    if options.table and not (options.record and options.record.is_file()):
        parser.error("--table: there is no record (--full, or --record FILE)")
    return options


def prepare(scratch: Path) -> None:
    """What every trial shares: one thread, no network, no files outside ``scratch``; then the imports."""
    home = scratch / "home"
    home.mkdir()
    os.environ.update(
        OMP_NUM_THREADS="1",
        MPLBACKEND="Agg",
        TOKENIZERS_PARALLELISM="false",
        HOME=str(home),
        HF_HOME=str(home / "hub"),
        MPLCONFIGDIR=str(home / "matplotlib"),
        TMPDIR=str(scratch),
        PYTHONPATH=str(table.ROOT),
        HTTP_PROXY="http://127.0.0.1:9",
        HTTPS_PROXY="http://127.0.0.1:9",
        NO_PROXY="localhost,127.0.0.1",
    )
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        os.environ.pop(name, None)
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    from .command import preload, warm

    preload()
    warm(scratch)


def run(family: str, seeds: Iterable[int], scratch: Path, samples: Samples, keep: Path | None) -> Iterable[Result]:
    """The trials of ``seeds``, each in a box that is removed after it; a line for each failure."""
    seeds, began, busy = list(seeds), time.monotonic(), sum(os.times()[:4])
    for number, seed in enumerate(seeds, 1):
        root = scratch / f"{family}-{seed}"
        result = attempt(family, seed, Box(root, samples.home), samples)
        if result.status == "failed":
            print(f"FAILED {result.what}\n    {result.reason}\n    {result.again}", flush=True)
            if keep is not None:
                shutil.rmtree(keep / root.name, ignore_errors=True)
                shutil.copytree(root, keep / root.name, symlinks=True, ignore=_pipes)
        shutil.rmtree(root, ignore_errors=True)
        if number % max(1, len(seeds) // 10) == 0 or number == len(seeds):
            used = sum(os.times()[:4]) - busy
            print(f"{family}: {number} of {len(seeds)}, {time.monotonic() - began:.0f} s, CPU {used:.0f} s", flush=True)
        yield result


def attempt(family: str, seed: int, box: Box, samples: Samples) -> Result:
    """One trial."""
    began = time.monotonic()
    result = Result(family, seed, "passed", "")
    try:
        result.figures = FAMILIES[family].trial(seed, box, samples)
    except Skipped as reason:
        result.status, result.reason = "skipped", str(reason)
    except Failed as reason:
        result.status, result.reason = "failed", str(reason)
    except Exception as bug:  # of the trial: the others go on
        at = traceback.extract_tb(bug.__traceback__)[-1]
        result.status = "failed"
        result.reason = f"the trial itself: {type(bug).__name__}: {bug} ({Path(at.filename).name}:{at.lineno})"
    what = box.case
    if result.status == "failed" and box.commands:
        what += f"; lrk {shlex.join(box.commands[-1].arguments)}"
    result.what, result.reason = plain(what), plain(result.reason)
    result.seconds = round(time.monotonic() - began, 2)
    return result


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def plain(text: str) -> str:
    """``text`` in one short line that does a terminal no harm."""
    text = CONTROL.sub(lambda control: ascii(control[0])[1:-1], " ".join(text.split()))
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) < 600 else f"{text[:400]}… ({len(text)} characters)"


if __name__ == "__main__":
    sys.exit(main())
