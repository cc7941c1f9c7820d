"""Shared by the stages: the loaded session, predictions and choice scores, tenants, progress, checkpoints."""
