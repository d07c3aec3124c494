"""Activation patterns: which examples a hidden neuron is active on."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from torchfolio.checks import between, whole

__all__ = ["activation_patterns", "pattern_count_bound", "patterns_needed"]

MOST_ENUMERATED = 5_000  # the enumeration solves a linear program for each pattern and example
DRAWS_PER_PATTERN = 100


def pattern_count_bound(n: int, d: int) -> int:
    """Most activation patterns of $n$ examples of rank $d$: $2 \\sum_{k<d} \\binom{n-1}{k}$.

    It is attained in general position. With $n \\le d$ it is $2^n$.
    """
    if n < 1 or d < 1:
        raise ValueError(f"expected at least one example and one feature, got n={n} and d={d}")
    return 2 * sum(math.comb(n - 1, k) for k in range(min(d, n)))


def patterns_needed(psi: float, xi: float, n: int) -> int:
    """Patterns (or sampled neurons) that make a further one useless with high probability.

    $$P_s \\ge \\min\\Bigl\\{\\frac{n + 1}{\\psi\\xi} - 1,\\; \\frac{2}{\\xi}(n + 1 - \\log\\psi)\\Bigr\\}$$

    With probability at least $1 - \\xi$, one more random pattern lowers the optimum with probability at most $\\psi$.

    Args:
        psi: $\\psi$ in (0, 1).
        xi: $\\xi$ in (0, 1).
        n: number of examples.

    Raises:
        ValueError: on values out of range.
    """
    for name, value in (("psi", psi), ("xi", xi)):
        between(name, value, 0, 1, inclusive=False)
    whole("n", n, 1)
    return math.ceil(min((n + 1) / (psi * xi) - 1, 2 / xi * (n + 1 - math.log(psi))))


def activation_patterns(
    X: Tensor,
    n: int | Literal["all"] = 50,
    epsilon: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    bias: bool = False,
    variants: int = 1,
) -> Tensor:
    """Distinct patterns $\\mathbb 1[Xa \\ge 0]$, as columns.

    Directions $a \\sim N(0, I)$ are drawn (on the CPU, so that a seed gives the same patterns on any device) until
    there are `n` distinct patterns; the order is that of the draws. With `epsilon` above 0 every direction also
    gives the patterns of randomly perturbed data, $(X + \\epsilon R)a$ with random signs $R$, so that the patterns
    cover the uncertainty set (Alg. 5.1).

    Args:
        X: data, `[n, d]`.
        n: number of patterns, or `"all"` of those that open sets of directions have. With up to two columns these
            are enumerated by sorting angles, with more by a linear program for each.
        epsilon: radius of the perturbation.
        generator: source of the directions; PyTorch's global one by default.
        bias: whether the last column of `X` is a positive constant. It is not perturbed, and the pattern of its own
            direction, active on every example, comes first: with it the network can always be an affine function,
            and robust cones, which few random patterns admit, are not all empty.
        variants: perturbed copies of the data for each direction (with `epsilon` above 0).

    Returns:
        Boolean tensor `[n, P]`.

    Warns:
        UserWarning: when there are fewer distinct patterns than asked for.

    Raises:
        ValueError: if `"all"` could be more than 5,000 patterns, or on settings out of range.

    Example:
        >>> X = torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
        >>> activation_patterns(X, "all").shape
        torch.Size([3, 6])
    """
    if X.ndim != 2:
        raise ValueError(f"expected X of shape [n, d], got {tuple(X.shape)}")
    if epsilon < 0 or variants < 1:
        raise ValueError(f"expected epsilon of at least 0 and variants of at least 1, got {epsilon!r} and {variants!r}")
    data = X.detach().cpu().double()
    if n == "all":
        if epsilon > 0:
            raise ValueError("all patterns can be listed only without perturbation, got epsilon above 0")
        return _enumerate(data).to(X.device)
    if not isinstance(n, int) or n < 1:
        raise ValueError(f'expected a number of patterns of at least 1 or "all", got {n!r}')
    return _sample(data, n, epsilon, generator, bias, variants).to(X.device)


def _sample(X: Tensor, n: int, epsilon: float, generator: torch.Generator | None, bias: bool, variants: int) -> Tensor:
    # More than this many cannot be found, so that a small data set does not exhaust the draws.
    most = pattern_count_bound(*X.shape) if epsilon == 0 else 2 ** min(len(X), 62)
    patterns: dict[bytes, Tensor] = {}
    if bias:
        everything = torch.ones(len(X), dtype=torch.bool)
        patterns[everything.numpy().tobytes()] = everything
    draws = 0
    while len(patterns) < min(n, most) and draws < DRAWS_PER_PATTERN * n:
        directions = torch.randn(X.shape[1], n, generator=generator, dtype=torch.float64)
        draws += n
        seen = [X @ directions >= 0]
        if epsilon > 0:
            seen += [_perturb(X, epsilon, generator, bias) @ directions >= 0 for _ in range(variants)]
        # A direction's own pattern comes first, then those of its perturbed copies.
        for pattern in torch.stack(seen, 1).flatten(1).unbind(1) if len(seen) == 1 else _interleave(seen):
            patterns.setdefault(pattern.numpy().tobytes(), pattern)
    if len(patterns) < n:
        warnings.warn(
            f"found {len(patterns)} distinct activation patterns in {draws} draws, fewer than the {n} asked for; "
            "going on with these",
            stacklevel=3,
        )
    return torch.stack(list(patterns.values())[:n], 1)


def _interleave(seen: list[Tensor]) -> list[Tensor]:
    return [column for direction in zip(*(s.unbind(1) for s in seen), strict=True) for column in direction]


def _perturb(X: Tensor, epsilon: float, generator: torch.Generator | None, bias: bool) -> Tensor:
    signs = torch.randint(0, 2, X.shape, generator=generator).double() * 2 - 1
    if bias:
        signs[:, -1] = 0
    return X + epsilon * signs


def _enumerate(X: Tensor) -> Tensor:
    n, d = X.shape
    bound = pattern_count_bound(n, d)
    if d > 2 and bound > MOST_ENUMERATED:
        raise ValueError(
            f"{n} examples with {d} columns may have {bound} activation patterns, expected at most "
            f"{MOST_ENUMERATED} to enumerate; ask for a number of sampled patterns"
        )
    directions = _by_angle(X) if d == 2 else _by_programs(X.numpy())
    return torch.unique((X @ directions >= 0).to(torch.uint8), dim=1).bool()


def _by_angle(X: Tensor) -> Tensor:
    """A direction within each cell of the plane: between consecutive angles at which some example flips."""
    rows = X[X.norm(dim=1) > 0]
    angles = torch.atan2(rows[:, 1], rows[:, 0]) % math.pi + math.pi / 2
    flips = torch.unique(torch.cat([angles, angles + math.pi]))
    between = (flips + torch.cat([flips[1:], flips[:1] + 2 * math.pi])) / 2 if len(flips) else torch.zeros(1).double()
    return torch.stack([between.cos(), between.sin()])


def _by_programs(X: np.ndarray) -> Tensor:
    """A direction within each cell of the arrangement, adding one example's hyperplane after the other.

    A cell's own direction shows one side of the new hyperplane; a linear program asks whether the other is empty.
    """
    rows = X[np.linalg.norm(X, axis=1) > 0]
    cells: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.ones(X.shape[1]))]
    for k, row in enumerate(rows):
        split: list[tuple[np.ndarray, np.ndarray]] = []
        for signs, direction in cells:
            side = row @ direction
            sides = [np.sign(side)] if abs(side) > 1e-9 else []
            split += [(np.append(signs, s), direction) for s in sides]
            for other in {1.0, -1.0} - set(sides):
                wanted = np.append(signs, other)
                # Strictly inside is a matter of scale: signed products of at least 1.
                program = linprog(
                    np.zeros(X.shape[1]), -wanted[:, None] * rows[: k + 1], -np.ones(k + 1), bounds=(None, None)
                )
                if program.status == 0:
                    split.append((wanted, program.x))
        cells = split
    return torch.from_numpy(np.stack([direction for _, direction in cells], 1))
