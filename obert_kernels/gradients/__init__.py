"""Batches to gradients of the weights to prune."""
