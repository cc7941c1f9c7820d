"""Answers of a loaded model: predictions, scores of candidate answers, and adapters of many tenants in one batch."""
