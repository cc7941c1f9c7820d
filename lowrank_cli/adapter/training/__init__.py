"""What makes training passes cheaper: recomputed activations, compiled layers."""
