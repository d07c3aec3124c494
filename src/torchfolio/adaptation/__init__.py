"""Adapting, merging and probing trained networks."""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
