"""Smaller, growing and switchable networks."""
