"""Tasks: data sets as prompts, answers and splits. Nothing here calls a model.

Import :mod:`~lowrank_cli.tasks.encode` (tokens), :mod:`~lowrank_cli.tasks.batches` (order) and
:mod:`~lowrank_cli.tasks.metrics` (slow to import) where you use them.
"""

from lowrank_cli.tasks.task import Example, Task, examples, load

__all__ = ["Example", "Task", "examples", "load"]
