"""Measuring speed and memory: methods on one set of frozen weights, in interleaved rounds."""
