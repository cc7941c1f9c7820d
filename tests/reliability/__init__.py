"""A campaign of seeded trials against the command line: kills, faults, bad input, and folders given by others.

    python -m tests.reliability                          what CI runs, a few minutes
    python -m tests.reliability mutations --seed 17      one trial again; --keep FOLDER leaves its files there
    python -m tests.reliability --full                   the whole campaign, continued where it was stopped
    python -m tests.reliability --full --table           only write its table into docs/explanation/reliability.md

A trial is a function of a seed. It runs commands in forked processes (:mod:`.command`) inside a folder of its own
(:mod:`.box`), starting from runs that were made once (:mod:`.samples`), and raises :class:`.trial.Failed` where a
command did anything but succeed with the right content, or end with 1 or 2 and one line that says what is wrong.
"""
