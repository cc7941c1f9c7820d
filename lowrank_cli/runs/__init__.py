"""Run folders: configuration, provenance and results of a run. Every file but the history is replaced atomically.

One run is ``outputs/<date>/<time>-<method>-<model>-<task>[-<name>]/`` and holds

- ``config.yaml``: the composed configuration
- ``run.json``: status, stage, command, overrides, seed, hash, versions, device, times, memory
- ``history.jsonl``: one line per logged step
- ``metrics.json``: flat numbers, once the run is done
- ``error.txt``: the traceback, if a bug ended the run

and what its stage adds (``adapter/``, ``checkpoints/``, ``predictions.jsonl``, ``plots/``, …).
"""

from lowrank_cli.runs.files import atomic_folder, atomic_write, remove_leftovers, write_json
from lowrank_cli.runs.listing import all_runs, child, find, scan
from lowrank_cli.runs.new_folder import discard, new_folder, settled
from lowrank_cli.runs.process import is_alive, is_gone, peak_memory_bytes, showing_life, this_process
from lowrank_cli.runs.provenance import ROOT, config_hash, untested_versions
from lowrank_cli.runs.run import DONE, FAILED, INTERRUPTED, PENDING, RUNNING, Run

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "PENDING",
    "ROOT",
    "RUNNING",
    "Run",
    "all_runs",
    "atomic_folder",
    "atomic_write",
    "child",
    "config_hash",
    "discard",
    "find",
    "is_alive",
    "is_gone",
    "new_folder",
    "peak_memory_bytes",
    "remove_leftovers",
    "scan",
    "settled",
    "showing_life",
    "this_process",
    "untested_versions",
    "write_json",
]
