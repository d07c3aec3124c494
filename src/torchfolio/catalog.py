"""What exists: the papers, their metadata and claims, readable without torch."""
