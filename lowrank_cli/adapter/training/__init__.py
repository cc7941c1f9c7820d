"""Cheaper training passes: recomputed activations and compiled layers."""
