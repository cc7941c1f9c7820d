"""Prompt-aware routing: each layer's low-rank modules are chosen once per prompt."""
