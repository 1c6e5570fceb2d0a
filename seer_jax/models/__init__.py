"""The decoder: configurations, families, layers, cache, and models by name."""
