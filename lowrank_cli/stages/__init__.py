"""The stages of a pipeline, by verb. Each module has ``run(config, run, *, resume=False) -> metrics``."""

STAGES = {
    "train": "lowrank_cli.stages.train",
    "score": "lowrank_cli.stages.score",
    "prune": "lowrank_cli.stages.prune",
    "evaluate": "lowrank_cli.stages.evaluate",
    "bench": "lowrank_cli.stages.bench",
    "export": "lowrank_cli.stages.export",
    "generate": "lowrank_cli.stages.generate",
}

#: Verbs whose output is their result: what else there is to say goes to stderr.
PRINTS = ("generate",)
