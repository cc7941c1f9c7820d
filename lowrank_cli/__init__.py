"""lowrank_cli: low-rank adaptation of pretrained transformers, from the command line."""
