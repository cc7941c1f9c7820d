"""In-context learning calibrated: answers of a model whose weights stay as they are, scored differently.

:mod:`~lowrank_cli.calibration.ida` (infinitely many augmented demonstrations, in closed form),
:mod:`~lowrank_cli.calibration.contextual` (divided by what a content-free input gives),
:mod:`~lowrank_cli.calibration.prototypes` (a Gaussian mixture over the answers' probabilities),
:mod:`~lowrank_cli.calibration.head` (what the closed form reads of a model),
:mod:`~lowrank_cli.calibration.statistics_files` (fitted tensors on disk) and
:mod:`~lowrank_cli.calibration.logits_processor` (the same for ``transformers``' ``generate``).

Letters: N rows, C candidate answers, V vocabulary, D width, R rows of the covariance's factor, Y answer tokens.
"""
