"""Models with exact answers."""
