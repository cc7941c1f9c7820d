"""Shared by the stages: the loaded session, predictions and choice scores, pruning, tenants, progress, checkpoints."""
