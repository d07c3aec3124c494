"""Whether a network's backdoor expert favours one class more than the experts of clean networks do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.expert import extract_backdoor_expert
from torchfolio.backdoor.model_detector import ModelDetector, ModelVerdict, Scan
from torchfolio.measure import outputs

__all__ = ["ConcentrationVerdict", "ExpertConcentration", "concentration", "judge"]


def concentration(expert: nn.Module, x: Tensor) -> Tensor:
    """Mean confidence of a backdoor expert in every class on clean inputs, `[C]`.

    It has unlearned the task but kept its backdoor, if there is one; an all-to-one backdoor's target may then draw
    many inputs that have no trigger.
    """
    return outputs(expert, x).double().softmax(1).mean(0)


@dataclass(frozen=True, repr=False)
class ConcentrationVerdict(ModelVerdict):
    """A verdict by rank among reference networks; `evidence` holds `p_value`, `alpha`, `references`, `class`, `shares`."""

    def sentences(self, classes: Sequence[str] = ()) -> list[str]:
        """The verdict in words; `classes` names the network's."""
        suspect, alpha, k = self.evidence["class"], self.evidence["alpha"], len(self.evidence["references"])
        named = classes[suspect] if suspect < len(classes) else suspect
        sentences = [
            f"{'More' if self.is_backdoored else 'Not more'} concentrated on one class ({named}) than clean networks are: p "
            f"= {self.evidence['p_value']:.3g}, from {k} references.",
            f"A clean network trained like them is called suspicious with probability at most {percent(alpha)}; a backdoored "
            "one may well be missed.",
        ]
        if k < needed(alpha):
            sentences.append(f"With {k} references it cannot be called suspicious at all: that takes {needed(alpha)}.")
        return sentences


class ExpertConcentration(ModelDetector):
    """Whether a network's backdoor expert concentrates on one class more than those of clean networks do.

    The score is the largest of the confidences of `concentration`. A network is suspicious if its score exceeds the $k$-th
    largest of those of $K$ reference networks, $k = \\lfloor \\alpha (K + 1) \\rfloor$. If the network is clean and
    trained like the references, this happens with probability at most $\\alpha$; with fewer than $1 / \\alpha - 1$
    references it cannot happen. A network that is not suspicious may have a backdoor all the same.

    Args:
        references: networks for the same task that are known to be clean.
        alpha: share of clean networks that may be called suspicious.
        unlearn_lr: this and what follows as in `torchfolio.backdoor.badexpert.BaDExpert`, for all networks alike.
        unlearn_batch: batch size.
        unlearn_epochs: passes over the examples, at most.
        device: device that experts are made on; where each network is by default.

    Raises:
        ValueError: if `alpha` is outside (0, 1).
    """

    def __init__(
        self,
        references: Sequence[nn.Module],
        alpha: float = 0.05,
        *,
        unlearn_lr: float | Literal["auto"] = "auto",
        unlearn_batch: int | Literal["auto"] = "auto",
        unlearn_epochs: int | Literal["auto"] = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        checks.between("alpha", alpha, 0, 1, inclusive=False)
        self.references, self.alpha = list(references), alpha
        self.settings: dict[str, Any] = {
            "unlearn_lr": unlearn_lr, "unlearn_batch": unlearn_batch, "unlearn_epochs": unlearn_epochs, "device": device,
        }  # fmt: skip

    @property
    def needed(self) -> int:
        """How many references a verdict takes."""
        return needed(self.alpha)

    def _scan(self, model: nn.Module, clean: tuple[Tensor, Tensor] | None, scan: Scan) -> ModelVerdict:
        assert clean is not None
        shares = []
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # an expert's shortcomings say nothing here: all are treated alike
            for net in scan.items([model, *self.references], "experts"):
                expert = extract_backdoor_expert(net, clean, seed=scan.seed, **self.settings)
                shares.append(concentration(expert, clean[0]))
        return judge(shares[0], shares[1:], self.alpha)


def judge(shares: Tensor, references: Sequence[Tensor], alpha: float) -> ConcentrationVerdict:
    """The verdict of `ExpertConcentration` from what `concentration` gives for the network and for the references."""
    score = float(shares.max())
    others = sorted((float(other.max()) for other in references), reverse=True)
    rank = math.floor(alpha * (len(others) + 1) + 1e-9)
    threshold = others[rank - 1] if rank else math.inf
    suspected = int(shares.argmax())
    suspicious = score > threshold
    evidence = {
        "shares": shares.tolist(), "references": others, "alpha": alpha, "class": suspected,
        "p_value": (1 + sum(other >= score for other in others)) / (len(others) + 1),
    }  # fmt: skip
    pairs = tuple((k, suspected) for k in range(len(shares)) if k != suspected) if suspicious else ()
    return ConcentrationVerdict(suspicious, score, threshold, pairs, evidence=evidence)


def needed(alpha: float) -> int:
    """How many references a verdict at that level takes."""
    return math.ceil(1 / alpha - 1e-9) - 1


def percent(share: float) -> str:
    """A share as a percentage of two digits."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
