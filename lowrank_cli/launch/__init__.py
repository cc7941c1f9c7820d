"""Does what a verb asks for: one run, a sweep over runs, a recipe of stages.

Composition and every check come first, then the folder is made, then the stage's module (and with it torch) is
imported. Each folder can be continued from what it holds: config.yaml says what to run, run.json how it ended.
"""
