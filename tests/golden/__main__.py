"""``python -m tests.golden``: shows that a change left alone what ``lrk`` prints, computes and reads.

python -m tests.golden check              the transcripts (as tests/test_golden.py does)
python -m tests.golden renew [NAME]...    record what is printed now; then read `git diff tests/golden`
python -m tests.golden record FOLDER      run folders, losses, scores, weights, before the change; minutes
python -m tests.golden check FOLDER       the same after the change, on the same machine
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("check").add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    actions.add_parser("renew").add_argument("names", nargs="*", metavar="NAME")
    actions.add_parser("record").add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        prepare(Path(scratch))
        if options.action == "renew":
            return renew(options.names, Path(scratch))
        if options.folder is None:
            return check_transcripts(Path(scratch))
        from . import numbers

        folder = options.folder.resolve()
        if options.action == "record":
            folder.mkdir(parents=True)
            numbers.record(folder, Path(scratch))
            return 0
        differences = 0
        for text in numbers.check(folder, Path(scratch)):
            print(text, flush=True)
            differences += 1
        print(f"{differences} of {len(numbers.MADE) + len(numbers.OPENED)} commands differ")
        return int(differences > 0)


def prepare(scratch: Path) -> None:
    """One thread, no network and empty caches, as in the tests."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        os.environ.pop(name, None)
    os.environ.update(
        OMP_NUM_THREADS="1",
        MPLBACKEND="Agg",
        TOKENIZERS_PARALLELISM="false",
        HF_HOME=str(scratch / "hub"),
        HTTP_PROXY="http://127.0.0.1:9",  # no one answers there
        HTTPS_PROXY="http://127.0.0.1:9",
        NO_PROXY="localhost,127.0.0.1",
    )
    warnings.simplefilter("ignore")


def check_transcripts(scratch: Path) -> int:
    from . import transcripts

    differences = [transcripts.check(file, scratch / file.stem) for file in transcripts.FILES]
    print("\n".join(filter(None, differences)) or f"{len(differences)} transcripts are as recorded")
    return int(any(differences))


def renew(names: list[str], scratch: Path) -> int:
    from . import transcripts

    for file in transcripts.FILES:
        if not names or file.stem in names:
            print(f"{file.stem}: {'changed' if transcripts.renew(file, scratch / file.stem) else 'as before'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
