"""Low-rank modules that are more than LoRA's: each file is one kind, used by the methods that need it."""
