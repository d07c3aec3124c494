"""Runs of experiments: arms, claims, seeds and the folder they are kept in."""
