"""Runs a verb: one stage, a recipe of stages, or a sweep over either.

Composition and all checks come first, then the run folder, then the import of the stage's module (and with it torch).
A run is resumed from its folder alone: config.yaml says what to run, run.json how it ended.
"""
