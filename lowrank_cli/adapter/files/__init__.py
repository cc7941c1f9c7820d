"""Adapters on disk: saved and loaded exactly, or exported for other programs."""
