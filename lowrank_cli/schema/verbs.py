"""The verbs that take overrides."""

from __future__ import annotations

from lowrank_cli.schema.bench import BenchRun
from lowrank_cli.schema.evaluate import EvaluateRun
from lowrank_cli.schema.export import ExportRun
from lowrank_cli.schema.generate import GenerateRun
from lowrank_cli.schema.import_run import ImportRun
from lowrank_cli.schema.prune import PruneRun
from lowrank_cli.schema.recipe import RecipeRun
from lowrank_cli.schema.score import ScoreRun
from lowrank_cli.schema.serve import ServeRun
from lowrank_cli.schema.study import StudyRun
from lowrank_cli.schema.train import TrainRun

#: What each verb that takes overrides is configured by.
VERBS: dict[str, type] = {
    "train": TrainRun,
    "import": ImportRun,
    "score": ScoreRun,
    "prune": PruneRun,
    "evaluate": EvaluateRun,
    "export": ExportRun,
    "generate": GenerateRun,
    "serve": ServeRun,
    "bench": BenchRun,
    "run": RecipeRun,
    "study": StudyRun,
}

#: Verbs that run until a signal stops them, so that nothing is left to resume.
ENDLESS = ("serve",)
