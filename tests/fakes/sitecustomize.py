"""On PYTHONPATH this makes every Python process, launched workers too, run :mod:`fake_stage` for each verb.

What it writes is not drawn: that takes longer than the run.
"""

from lowrank_cli import stages
from lowrank_cli.report import plots

stages.STAGES.update(train="fake_stage", evaluate="fake_stage")
plots.draw = lambda run: []
