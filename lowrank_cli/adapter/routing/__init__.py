"""Prompt-aware routing: which low-rank modules of a layer a prompt uses, chosen once per prompt."""
