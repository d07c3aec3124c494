"""Smaller, growing and switchable networks.

Methods that make a trained network cheaper to keep or to run are classes of `Compression` (see `compression`), which
`torchfolio compress` offers by the slug of their module.
"""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
