"""The stages of a pipeline, one module a verb, each with ``run(config, run, *, resume=False) -> metrics``."""

STAGES = {
    "train": "lowrank_cli.stages.train",
    "score": "lowrank_cli.stages.score",
    "prune": "lowrank_cli.stages.prune",
    "evaluate": "lowrank_cli.stages.evaluate",
    "bench": "lowrank_cli.stages.bench",
    "export": "lowrank_cli.stages.export",
    "generate": "lowrank_cli.stages.generate",
    "serve": "lowrank_cli.stages.serve",
}

#: Stages of recipes and studies: those that end by themselves.
ENDING = tuple(name for name in STAGES if name != "serve")

#: Verbs that print their result to stdout; everything else goes to stderr.
PRINTS = ("generate",)
