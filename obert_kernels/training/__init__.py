"""Training a model that is pruned."""
