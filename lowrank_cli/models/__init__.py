"""Pretrained models: where they lie and how they are loaded."""
