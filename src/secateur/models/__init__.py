"""Where a model comes from, its blocks and its prunable weights. The only place that knows architectures."""
