"""What a sub-model can still do, measured on held-out text."""
