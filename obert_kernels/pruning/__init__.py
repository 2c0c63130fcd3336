"""Fisher to scores, masks and new weights."""
