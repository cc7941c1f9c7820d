"""Typed schemas of the config groups, a file a section. Meaning stands here, values stand in ``conf/``.

Nothing heavy is imported. A method's own schema stands in its file under ``lowrank_cli/methods`` and derives from
:class:`MethodConfig`. ``validate`` checks what a type cannot say; it raises :class:`lowrank_cli.errors.UserError`.
``verbs.py`` says which schema each verb has; all that work with a model derive from :class:`RunConfig`, which has the
model, the task, the hardware and the method.
"""

from lowrank_cli.schema.bench import (
    BASE,
    BENCHES,
    PEFTS,
    VLLM,
    VLLM_LORA,
    BenchConfig,
    BenchRun,
    DecodeBench,
    InContextBench,
    LoadBench,
    LoopBench,
    PrepackBench,
    ScoreBench,
    ServeBench,
    TrainBench,
)
from lowrank_cli.schema.evaluate import EvaluateConfig, EvaluateRun, PredictConfig
from lowrank_cli.schema.export import ExportConfig, ExportRun
from lowrank_cli.schema.generate import GenerateConfig, GenerateRun
from lowrank_cli.schema.hardware import HardwareConfig
from lowrank_cli.schema.import_run import ImportRun
from lowrank_cli.schema.method import MethodConfig
from lowrank_cli.schema.metric import METRICS, OF_ENCODERS, metrics_of
from lowrank_cli.schema.model import SHAPES, TRUST, ModelConfig
from lowrank_cli.schema.override import Override, parse_overrides, quoted
from lowrank_cli.schema.prune import PruneConfig, PruneRun
from lowrank_cli.schema.recipe import RecipeConfig, RecipeRun, StageConfig
from lowrank_cli.schema.run import RunConfig, check_task
from lowrank_cli.schema.score import AUTO, KINDS, MODULE_KINDS, SCORE_KINDS, ScoreConfig, ScoreRun, require_window
from lowrank_cli.schema.serve import LOOPBACK, ServeConfig, ServeRun
from lowrank_cli.schema.study import StudyConfig, StudyGroup, StudyRun, TuneConfig
from lowrank_cli.schema.task import TaskConfig, mix
from lowrank_cli.schema.train import TrainConfig, TrainRun
from lowrank_cli.schema.verbs import ENDLESS, VERBS

__all__ = [
    "AUTO",
    "BASE",
    "BENCHES",
    "ENDLESS",
    "KINDS",
    "LOOPBACK",
    "METRICS",
    "MODULE_KINDS",
    "OF_ENCODERS",
    "PEFTS",
    "SCORE_KINDS",
    "SHAPES",
    "TRUST",
    "VERBS",
    "VLLM",
    "VLLM_LORA",
    "BenchConfig",
    "BenchRun",
    "DecodeBench",
    "EvaluateConfig",
    "EvaluateRun",
    "ExportConfig",
    "ExportRun",
    "GenerateConfig",
    "GenerateRun",
    "HardwareConfig",
    "ImportRun",
    "InContextBench",
    "LoadBench",
    "LoopBench",
    "MethodConfig",
    "ModelConfig",
    "Override",
    "PredictConfig",
    "PrepackBench",
    "PruneConfig",
    "PruneRun",
    "RecipeConfig",
    "RecipeRun",
    "RunConfig",
    "ScoreBench",
    "ScoreConfig",
    "ScoreRun",
    "ServeBench",
    "ServeConfig",
    "ServeRun",
    "StageConfig",
    "StudyConfig",
    "StudyGroup",
    "StudyRun",
    "TaskConfig",
    "TrainBench",
    "TrainConfig",
    "TrainRun",
    "TuneConfig",
    "check_task",
    "metrics_of",
    "mix",
    "parse_overrides",
    "quoted",
    "require_window",
]
