"""What a network has learned, measured and drawn."""
