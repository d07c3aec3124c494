"""Methods for one task."""
