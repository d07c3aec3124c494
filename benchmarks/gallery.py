"""The pictures of the documentation's home, each measured by a method: five of the demo's, and three of theory and solvers.

python benchmarks/gallery.py [--output docs/assets/gallery]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from torchfolio import data, engine
from torchfolio.dynamics import odeint
from torchfolio.report import demo
from torchfolio.report.sheet import Bars, Squares
from torchfolio.robustness.bounds import crown, ibp
from torchfolio.robustness.properties import Box, Property
from torchfolio.theory import NNGPKernel, StudentTProcessRegressor

SIZE = (4.2, 2.4)


def from_demo() -> dict[str, Figure | str]:
    """The first picture of each of the demo's five cards."""
    digits = data.load("digits")
    net = demo.deep_network()
    engine.fit(net, digits.train, optimizer=demo.adam(), epochs=demo.EPOCHS, batch_size=64, seed=0)
    parts = {"memory": demo.less_memory, "smaller": demo.one_bit, "backdoor": demo.backdoor, "inside": demo.comparison,
             "draw": demo.drawing}  # fmt: skip
    return {name: _alone(part(name, digits, net).pictures[0].figure) for name, part in parts.items()}


def _alone(picture: Figure | Bars | Squares | str) -> Figure | str:
    """A picture that needs no style of a page around it."""
    if not isinstance(picture, Bars):
        assert not isinstance(picture, Squares)
        return picture
    figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
    ax.barh(list(picture.values), list(picture.values.values()))
    ax.invert_yaxis()
    ax.set(xlabel=picture.unit)
    return figure


def bounds() -> Figure:
    """How far the output of a network may move when its input does: intervals, and linear bounds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    radii = np.linspace(0, 0.3, 25)
    ends = Property.rows(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
    methods: dict[str, Any] = {"interval bounds": ibp, "CROWN": crown}
    for name, method in methods.items():
        rows = torch.stack([method(net, Box(x - r, x + r), ends).lower[0] for r in radii]).detach()
        ax.fill_between(radii, rows[:, 0], -rows[:, 1], alpha=0.35, label=name)
    seen = [net(x + float(r) * (2 * torch.rand(2000, 4, dtype=torch.float64) - 1)).detach() for r in radii]
    ax.fill_between(radii, [float(s.min()) for s in seen], [float(s.max()) for s in seen], color="k", alpha=0.6,
                    label="2,000 samples")  # fmt: skip
    ax.set(xlabel="radius around an input", ylabel="output")
    ax.legend(fontsize=8, loc="upper left")
    return figure


def flow() -> Figure:
    """Trajectories of a pendulum with friction, integrated from many starts at once."""
    ts = torch.linspace(0, 8, 120)
    angle = torch.linspace(-3, 3, 9)
    starts = torch.stack([angle, torch.linspace(2, -2, 9)], 1)
    states, _ = odeint(lambda t, y: torch.stack([y[..., 1], -torch.sin(y[..., 0]) - 0.3 * y[..., 1]], -1), starts, ts)
    figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
    paths = states if states.shape[0] == len(starts) else states.transpose(0, 1)
    for path in paths:
        ax.plot(path[:, 0], path[:, 1], lw=1.2)
    ax.set(xlabel="angle", ylabel="speed")
    return figure


def infinite() -> Figure:
    """What an infinitely wide network says between few points, one of them an outlier."""
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(-2, 2, 14))[:, None]
    y = np.sin(2 * X[:, 0]) + 0.05 * rng.standard_normal(14)
    y[9] += 1.5
    grid = np.linspace(-2.6, 2.6, 150)[:, None]
    model = StudentTProcessRegressor(NNGPKernel(2, "erf"), prior="inverse_gamma", steps=60, lr=0.05).fit(X, y)
    predictive = model.predict(grid, return_dist=True)
    low, mid, high = (np.asarray(predictive.quantile(q)) for q in (0.05, 0.5, 0.95))
    figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
    ax.fill_between(grid[:, 0], low, high, alpha=0.25)
    ax.plot(grid[:, 0], mid)
    ax.plot(X[:, 0], y, "k.", ms=5)
    ax.set(xlabel="x", ylabel="y")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "assets" / "gallery")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Figure | str] = {"verify": bounds(), "dynamics": flow(), "theory": infinite(), **from_demo()}
    for name, picture in pictures.items():
        if isinstance(picture, str):
            (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
            continue
        with plt.rc_context({"svg.hashsalt": "torchfolio"}):
            picture.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
