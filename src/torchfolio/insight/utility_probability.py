"""Scores of a network as utilities: what maximum likelihood learns, and how far its probabilities can be believed.

A softmax network gives numbers whose order decides (argmax, beams) and whose size is read as probability (sampling,
expectations). This module tells the two apart: the regret of the revealed choice, which maximum likelihood bounds; the
map from utilities to probabilities by a rationality that is chosen by decisions and not by likelihood; and reports on
which rules change under increasing maps of the scores. The rules themselves are in `decisions`, the fits in `rationality`.

Our reading: the paper's own equation from utilities to probabilities is not public beyond its abstract. This is the one
of standard choice theory (Luce), with the rationality fitted to a decision rule's task metric; it satisfies every
statement of the abstract.

Reference:
    Huang and Yuan, Utility-Probability Duality of Neural Networks, arXiv 2305.14859.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive
from torchfolio.data import Examples
from torchfolio.insight.decisions import (
    Beam,
    argmax_decision,
    beam_search,
    mbr_decision,
    rational_choice,
    sample_decision,
    sample_sequences,
)
from torchfolio.insight.rationality import GRID, RationalityFit, choices, fit_rationality, fit_temperature
from torchfolio.measure import Analysis, Panel, calibration_error, outputs, untouched

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "GRID",
    "Beam",
    "Believability",
    "RationalityFit",
    "argmax_decision",
    "beam_search",
    "fit_rationality",
    "fit_temperature",
    "frequency_from_utility",
    "invariance_report",
    "mbr_decision",
    "paradox_report",
    "rational_choice",
    "regret_bounds",
    "sample_decision",
    "sample_sequences",
    "utility_gradient",
    "utility_regret",
]


def utility_regret(logits: Tensor, y: Tensor) -> Tensor:
    """How much better than the revealed choice the best alternative is, $R = \\max_{y'} u(y') - u(y) \\ge 0$, `[N]`.

    Args:
        logits: utilities `[N, C]`.
        y: revealed choices, labels `[N]`.
    """
    logits, y = torch.as_tensor(logits), torch.as_tensor(y)
    choices(logits, y)
    return logits.max(1).values - logits.gather(1, y[:, None])[:, 0]


def regret_bounds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sandwich $R \\le -\\log P(y) \\le R + \\log C$: regret, negative log-likelihood and upper bound, `[N]` each.

    The left is reached where one alternative is infinitely better than all others, the right where all are equal.
    """
    logits, y = torch.as_tensor(logits), torch.as_tensor(y)
    logits = logits if logits.is_floating_point() else logits.float()
    regret = utility_regret(logits, y)
    return regret, F.cross_entropy(logits, y, reduction="none"), regret + math.log(logits.shape[1])


def utility_gradient(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The direction in which a step of maximum likelihood moves the weights, as revealed minus expected utility.

    $$-\\nabla_w \\bigl(-\\log P_w(y|x)\\bigr) = \\nabla_w u_w(x, y) - \\sum_{y'} P_w(y'|x) \\nabla_w u_w(x, y'),$$

    averaged over the examples: the revealed choice gains utility, all alternatives lose it in proportion to how
    attractive they are now.

    Args:
        module: network from x to utilities `[N, C]`, in the mode it is in; its gradients and buffers stay as they were.
        x: inputs.
        y: labels `[N]`.

    Returns:
        The direction for each trained parameter by name.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("expected a parameter that requires a gradient, got none")
    with untouched(module):
        utilities = module(x)
        choices(utilities, y)
        revealed = F.one_hot(y, utilities.shape[1]).to(utilities.dtype)
        weights = (revealed - utilities.detach().softmax(1)) / len(y)
        grads = torch.autograd.grad(utilities, list(named.values()), weights, allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


def frequency_from_utility(start: Tensor, end: Tensor, probability_sum: Tensor, lr: float) -> Tensor:
    """How often each alternative was revealed, from what the utilities gained: an exact identity.

    Tabular utilities that take T steps of maximum likelihood at a constant rate, an observation each, keep the surprise
    of the data: $\\sum_t 1[y_t = y] = \\sum_t P_t(y) + (u_T(y) - u_0(y)) / \\alpha$.

    Args:
        start: $u_0$, `[..., C]`.
        end: $u_T$.
        probability_sum: $\\sum_t P_t$, of the probabilities before every step.
        lr: $\\alpha$.
    """
    shapes = [tuple(t.shape) for t in (start, end, probability_sum)]
    if len(set(shapes)) > 1:
        raise ValueError(f"expected utilities and sums of one shape, got {', '.join(map(str, shapes))}")
    return probability_sum + (end - start) / positive("lr", lr)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "3u": lambda u: 3 * u,
    "u + 5": lambda u: u + 5,
    "exp": lambda u: (u - u.max()).exp(),
    "softplus": F.softplus,
    "rank": lambda u: u.argsort(-1).argsort(-1).to(u.dtype),
}


def invariance_report(
    rule: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]],
    logits: Tensor,
    transforms: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> pd.DataFrame:
    """Which rules change their outputs under increasing maps of the utilities: a row for each rule and map.

    Args:
        rule: function from logits `[..., V]` to outputs, or several by name; random ones with fixed random numbers.
        logits: utilities.
        transforms: strictly increasing maps by name; linear, exponential, softplus and ranks by default.

    Returns:
        Columns `rule`, `transform`, `changed` (share of outputs) and `invariant`.
    """
    import pandas as pd

    rules = rule if isinstance(rule, Mapping) else {getattr(rule, "__name__", "rule"): rule}
    rows = []
    for name, decide in rules.items():
        before = decide(logits)
        for label, transform in (TRANSFORMS if transforms is None else transforms).items():
            after = decide(transform(logits))
            changed = float((before != after).double().mean())
            rows.append({"rule": name, "transform": label, "changed": changed, "invariant": changed == 0})
    return pd.DataFrame(rows)


def paradox_report(history: pd.DataFrame) -> dict[str, float]:
    """Whether held-out likelihood got worse while decisions did not, from a training's history.

    Args:
        history: columns `val_loss` and `val_accuracy`, a row for each epoch; `FitResult.history.to_frame()`.

    Returns:
        `best_epoch` (of the lowest loss, from 0), `loss_ratio` (end over minimum) and `accuracy_change` (end minus that
        of the best epoch).

    Raises:
        ValueError: if a column is missing, there is no epoch, or a value is not finite.
    """
    missing = {"val_loss", "val_accuracy"} - set(history.columns)
    if missing or not len(history):
        raise ValueError(f"expected epochs with val_loss and val_accuracy, got {list(history.columns)}")
    held = history[["val_loss", "val_accuracy"]].to_numpy(dtype=float)
    if not math.isfinite(held.sum()):
        raise ValueError("expected a finite val_loss and val_accuracy at every epoch, got NaN or infinity")
    loss, accuracy = history["val_loss"].to_numpy(), history["val_accuracy"].to_numpy()
    best = int(loss.argmin())
    return {
        "best_epoch": float(best),
        "loss_ratio": float(loss[-1] / loss[best]),
        "accuracy_change": float(accuracy[-1] - accuracy[best]),
    }


class Believability(Analysis):
    """How far a classifier's probabilities can be believed, and its decisions: what `inspect` shows.

    Sampling from the network's probabilities is right on average with the probability of the label; that is compared
    with taking the best class, at the usual reading, at the rationality of the highest likelihood, and at the smallest
    one that decides nearly as well as the best class.
    """

    def look(self, *models: nn.Module, data: Examples, layers: Sequence[str] = (), seed: int = 0) -> Panel:
        import pandas as pd

        logits, y = outputs(models[0], data).double(), data.labels
        if y is None or logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                "How far its probabilities can be believed is not shown: it needs a classifier and labels."
            )
        choices(logits, y)
        accuracy = float((logits.argmax(1) == y).double().mean())

        def right(kappa: float) -> float:
            return float(rational_choice(logits, kappa).exp().gather(1, y[:, None]).mean())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decided = fit_rationality(right, reference=accuracy)
        likely = fit_temperature(logits, y)
        rows = []
        for name, kappa in (("usual reading", 1.0), ("by likelihood", likely), ("by decisions", decided.kappa)):
            choice = rational_choice(logits, kappa)
            rows.append(
                {
                    "reading": name, "rationality": kappa, "sampling accuracy": right(kappa),
                    "log loss": float(F.nll_loss(choice, y)), "calibration error": calibration_error(choice.exp(), y),
                }
            )  # fmt: skip
        table = pd.DataFrame(rows)
        usual = rows[0]
        sentences = [
            f"The best class is right for {accuracy:.1%} of {len(y):,} examples; a class drawn by the network's own "
            f"probabilities would be for {usual['sampling accuracy']:.1%}. Likelihood asks for a rationality of "
            f"{likely:.2f} (a temperature of {1 / likely:.2f}), "
            + (
                f"decisions for {decided.kappa:.2f}."
                if decided.reached
                else "and at no rationality tried do draws decide nearly as well as the best class."
            ),
            f"Its confidence is off by {usual['calibration error']:.1%} on average. A rationality far from 1 by likelihood "
            "means that its probabilities are too timid (above 1) or too sure (below 1); the order of its classes stays.",
        ]
        notes = ["With fewer than some 500 examples these figures vary by several points."] if len(y) < 500 else []
        record: dict[str, Any] = {"accuracy": accuracy, "by_likelihood": likely, "by_decisions": decided.kappa,
                                  "reached": decided.reached, "readings": rows}  # fmt: skip
        return Panel("How far can its probabilities be believed?", sentences, notes, [table], record=record,
                     eyebrow=f"utility and probability, {len(y):,} examples")  # fmt: skip
