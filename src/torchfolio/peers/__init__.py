"""What a user would use instead of each method, and how both are timed."""
