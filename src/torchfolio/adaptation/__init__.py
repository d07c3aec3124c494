"""Adapting, merging and probing trained networks."""
