"""Operations and time."""

from torchfolio.measure.flops import FlopCounter, count_flops, flops_by_module
from torchfolio.measure.timing import Alternation, alternate

__all__ = ["Alternation", "FlopCounter", "alternate", "count_flops", "flops_by_module"]
