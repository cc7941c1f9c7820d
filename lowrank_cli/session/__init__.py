"""What stages work with, loaded from a configuration: device, model with its adapter, tokenizer and task."""
