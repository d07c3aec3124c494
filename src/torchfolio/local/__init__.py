"""Learning without end-to-end backpropagation: layers and blocks trained by losses of their own."""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
