"""Differential equations and diffusion."""

from torchfolio.catalog import doors

__getattr__, __dir__, __all__ = doors(__name__)
