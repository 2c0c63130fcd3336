"""Gradients to block Fishers of weight matrices."""
