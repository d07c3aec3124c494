"""Verifiers: whether a property holds on a whole box of inputs.

- `Interval`, `Crown`: by bounds of the whole box;
- `CrownSplit`: by bounds of ever smaller boxes, complete in the limit, for inputs of few coordinates
  (`torchfolio.robustness.relu_split.ReluSplit` is for wide ones);
- `milp_verify`: exact, for small ReLU networks.
"""

from __future__ import annotations

from torchfolio.robustness.bound_verifiers import Crown, Interval, exact_copy, searched
from torchfolio.robustness.box_split import CrownSplit
from torchfolio.robustness.milp_verifier import milp_verify

__all__ = ["Crown", "CrownSplit", "Interval", "exact_copy", "milp_verify", "searched"]
