"""The stages of a pipeline, one module a verb, each with ``run(config, run, *, resume=False) -> metrics``."""

STAGES = {
    "train": "lowrank_cli.stages.train",
    "import": "lowrank_cli.stages.import_adapter",
    "score": "lowrank_cli.stages.score",
    "prune": "lowrank_cli.stages.prune",
    "evaluate": "lowrank_cli.stages.evaluate",
    "bench": "lowrank_cli.stages.bench",
    "export": "lowrank_cli.stages.export",
    "generate": "lowrank_cli.stages.generate",
    "serve": "lowrank_cli.stages.serve",
}

#: Stages of recipes and studies: they end by themselves, and overrides say all about them.
IN_RECIPES = tuple(name for name in STAGES if name not in ("import", "serve"))

#: Verbs that print their result to stdout; everything else goes to stderr.
PRINTS = ("generate",)
