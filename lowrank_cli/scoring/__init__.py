"""Importance scores of an adapter's ranks or modules, measured on a fixed batch of dev examples.

S is minus the mean cross-entropy over response tokens (causal) or examples (encoder), in nats.
"""
