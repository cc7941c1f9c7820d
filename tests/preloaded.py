"""Imported once by the server of :mod:`forked`, so that what it forks starts at once. No thread, no backward pass."""

from reliability.command import preload

preload()
