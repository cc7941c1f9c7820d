"""Calibrated in-context learning: the answers of an unchanged model, scored differently.

:mod:`~lowrank_cli.calibration.ida` (infinitely many augmented demonstrations, in closed form),
:mod:`~lowrank_cli.calibration.contextual` (relative to content-free inputs),
:mod:`~lowrank_cli.calibration.prototypes` (a Gaussian mixture over the answers' probabilities),
:mod:`~lowrank_cli.calibration.oracle` (what any constant offset could gain, for reports),
:mod:`~lowrank_cli.calibration.head` (the weight of the language model's head),
:mod:`~lowrank_cli.calibration.statistics_files` (fitted tensors on disk) and
:mod:`~lowrank_cli.calibration.logits_processor` (IDA in ``transformers``' ``generate``).

Letters: N rows, C candidate answers, V vocabulary, D width, R rows of the covariance's factor, Y answer tokens.
"""
