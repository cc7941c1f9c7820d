"""What several stages share: the loaded session, answers and their scores, tenants, progress and checkpoints."""
