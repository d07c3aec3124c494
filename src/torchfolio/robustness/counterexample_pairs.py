"""Centres and counterexamples near them, from which a benchmark of verifiers is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.measure import untouched
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.properties import Box
from torchfolio.shown import Shown

if TYPE_CHECKING:
    pass

Sweep = Sequence[tuple[float, int]]
Placement = Literal["face", "corner"]

SWEEP: Sweep = ((0.25, 0), (0.25, 100), (0.02, 100), (0.02, 250), (0.02, 500), (0.01, 1000), (0.01, 3000), (0.01, 5000))
"""Attacks that a counterexample must survive: step size over $\\varepsilon$, and number of steps."""

LEAST_MARGIN = 1e-3  # of an exported counterexample, so that other arithmetic misclassifies it too


@dataclass(frozen=True, repr=False)
class Pairs(Shown):
    """Centres, some of them with a counterexample.

    Attributes:
        centers: points with a counterexample, `[n, *shape]`.
        labels: labels of them, 0 or 1 `[n]`.
        targets: labels of the counterexamples `[n]`.
        counterexamples: `[n, *shape]`, within `eps` of their centres.
        clean_centers: without, `[n, *shape]`.
        clean_labels: labels of them `[n]`.
        eps: radius, in the units of the inputs.
        data_range: $R$.
    """

    centers: Tensor
    labels: Tensor
    targets: Tensor
    counterexamples: Tensor
    clean_centers: Tensor
    clean_labels: Tensor
    eps: float
    data_range: float

    def __len__(self) -> int:
        return len(self.centers)

    @property
    def clip(self) -> tuple[float, float]:
        """Range of all inputs."""
        return -self.data_range, self.data_range

    def all(self) -> tuple[Tensor, Tensor]:
        """All centres and labels, `[2n, *shape]` and `[2n]`."""
        return torch.cat([self.centers, self.clean_centers]), torch.cat([self.labels, self.clean_labels])

    def box(self, i: int) -> Box:
        """The inputs of an instance; those with a counterexample come first."""
        return Box.ball(self.all()[0][i : i + 1], self.eps, self.clip)

    def to(self, device: torch.device | str) -> Pairs:
        """The same on another device."""
        return Pairs(
            self.centers.to(device), self.labels.to(device), self.targets.to(device), self.counterexamples.to(device),
            self.clean_centers.to(device), self.clean_labels.to(device), self.eps, self.data_range,
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class HiddenModel(Shown):
    """A network with hidden counterexamples.

    Attributes:
        model: network in evaluation mode.
        pairs: all that were planted.
        valid: mask of the counterexamples that are misclassified, with a centre that is right, and found by no attack
            `[n]`.
        history: training, a row for every look.
        sweep: attacks that were tried.
        restarts: number of restarts of each.
    """

    model: nn.Module
    pairs: Pairs
    valid: Tensor
    history: tuple[dict[str, float], ...] = ()
    sweep: Sweep = SWEEP
    restarts: int = 1000


def draw_pairs(
    shape: Sequence[int],
    n: int = 10,
    eps: float = 0.2,
    data_range: float = 0.1,
    placement: Placement = "face",
    *,
    r: float = 0.98,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Draw centres uniformly in $[-R, R]^d$ with random labels in {0, 1}, and a counterexample for half of them.

    Args:
        shape: shape of one input.
        n: centres of each kind.
        eps: radius relative to $R$, $\\varepsilon = \\text{eps} \\cdot R$.
        data_range: $R$.
        placement: `"face"`: $\\delta_k \\sim U(-\\varepsilon, \\varepsilon)$ where $|\\delta_k| \\ge r \\varepsilon$ (at least
            once), and one small number elsewhere. `"corner"`: $\\pm\\varepsilon$ everywhere, which is what the authors' code
            runs, by a misspelt name; such points coincide with fixed points of sign PGD and are hard to hide.
        r: share that is kept, see `placement`.
        generator: source of everything.

    Raises:
        ValueError: on settings out of range, or if the centres do not fit apart (at least $2 \\varepsilon$ in
            $L_\\infty$) in 10,000 draws.
    """
    checks.between("eps, relative to the data range,", eps, 0, 1, inclusive=False)
    checks.positive("data_range", data_range)
    checks.whole("n", n, 1)
    checks.between("r", r, 0, 1)
    checks.one_of("placement", placement, ("face", "corner"))
    radius = eps * data_range
    drawn: list[Tensor] = []
    taken: list[Tensor] = []
    tries = 0
    examples = []
    while len(drawn) < 2 * n:
        tries += 1
        if tries > 10_000:
            raise ValueError(f"{2 * n} centres {2 * radius:g} apart do not fit in [{-data_range:g}, {data_range:g}]")
        x = data_range * (2 * torch.rand(*shape, generator=generator) - 1)
        if any(float((x - other).abs().max()) < 2 * radius for other in taken):
            continue
        drawn.append(x)
        if len(drawn) <= n:
            delta = _displacement(shape, radius, data_range, placement, r, generator)
            examples.append((x + delta).clamp(-data_range, data_range))
            taken += [x, examples[-1]]
    labels = torch.randint(2, (2 * n,), generator=generator)
    centers = torch.stack(drawn)
    return Pairs(
        centers[:n], labels[:n], 1 - labels[:n], torch.stack(examples), centers[n:], labels[n:], radius, data_range
    )


def _displacement(
    shape: Sequence[int], radius: float, data_range: float, placement: str, r: float, generator: torch.Generator | None
) -> Tensor:
    delta = radius * (2 * torch.rand(*shape, generator=generator) - 1)
    if placement == "corner":
        return radius * torch.where(delta < 0, -1.0, 1.0)
    far = delta.abs() >= r * radius
    if not far.any():
        chosen = int(torch.randint(delta.numel(), (), generator=generator))
        side = 1.0 if float(delta.flatten()[chosen]) >= 0 else -1.0
        size = radius * (r + (1 - r) * float(torch.rand((), generator=generator)))
        far.view(-1)[chosen], delta.view(-1)[chosen] = True, side * size
    small = data_range / 100 * (2 * float(torch.rand((), generator=generator)) - 1)
    return torch.where(far, delta, torch.full_like(delta, max(-radius, min(radius, small))))


def withstands(
    model: nn.Module, x: Tensor, y: Tensor, pairs: Pairs, sweep: Sweep = SWEEP, restarts: int = 1000, seed: int = 0
) -> Tensor:
    """Which centres `[N]` are classified right, and still are after every attack of the sweep."""
    with untouched(model, training=False), torch.no_grad():
        held = model(x).argmax(1) == y
    for alpha, steps in sweep:
        rows = held.nonzero()[:, 0]
        if not len(rows):
            break
        generator = torch.Generator(x.device).manual_seed(seed)
        attacked = pgd(
            model, x[rows], y[rows], eps=pairs.eps, alpha=alpha * pairs.eps, steps=steps, restarts=restarts,
            loss="sum_margin", clip=pairs.clip, generator=generator,
        )  # fmt: skip
        held[rows] = ~attacked.success
    return held


def survives(model: nn.Module, pairs: Pairs, sweep: Sweep = SWEEP, restarts: int = 1000, seed: int = 0) -> Tensor:
    """Which counterexamples are valid `[n]`: misclassified by some margin, with a centre that is right, and found by no
    attack of the sweep."""
    with untouched(model, training=False), torch.no_grad():
        z = model(pairs.counterexamples)
        gap = z.gather(1, pairs.targets[:, None]) - z.gather(1, pairs.labels[:, None])
        valid = (z.argmax(1) == pairs.targets) & (gap[:, 0] >= LEAST_MARGIN)
    rows = valid.nonzero()[:, 0]
    if len(rows):
        valid[rows] = withstands(model, pairs.centers[rows], pairs.labels[rows], pairs, sweep, restarts, seed)
    return valid.cpu()
