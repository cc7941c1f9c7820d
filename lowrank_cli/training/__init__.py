"""What a training keeps and passes on while it goes: checkpoints, and its history to experiment trackers."""
