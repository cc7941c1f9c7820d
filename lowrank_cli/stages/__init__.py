"""The stages of a pipeline, by verb. Each module has ``run(config, run, *, resume=False) -> metrics``."""

STAGES = {
    "train": "lowrank_cli.stages.train",
    "evaluate": "lowrank_cli.stages.evaluate",
    "export": "lowrank_cli.stages.export",
}
