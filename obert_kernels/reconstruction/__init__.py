"""Remaining weights fitted to what the dense model computes, by least squares on the masks."""
