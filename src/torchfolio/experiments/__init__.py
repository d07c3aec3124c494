"""One module per paper that measures its claims."""
