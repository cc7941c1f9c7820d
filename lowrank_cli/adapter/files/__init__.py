"""Adapters on disk: saving and loading, and export for other programs."""
