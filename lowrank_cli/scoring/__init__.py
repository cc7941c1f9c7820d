"""Scores: how much each rank, or each module, of an adapter is worth on a fixed batch of dev examples.

S is minus the mean cross-entropy over response tokens (causal) or examples (encoder), in nats.
"""
