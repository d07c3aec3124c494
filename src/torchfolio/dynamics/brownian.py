"""Brownian motion: one path, however it is queried, at little memory."""

from __future__ import annotations

from torchfolio.dynamics.brownian_grid import BrownianGrid
from torchfolio.dynamics.brownian_interval import BrownianInterval
from torchfolio.dynamics.brownian_path import Brownian, joined_area, mix

__all__ = ["Brownian", "BrownianGrid", "BrownianInterval", "joined_area", "mix"]
