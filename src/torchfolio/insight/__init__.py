"""What a network has learned, measured and drawn."""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
