"""Measures naive Bayes beside logistic regression: samples needed by dimension, and on features of networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe, crossover, gaussian_fit, learning_curve
from torchfolio.data import load
from torchfolio.experiments._samples_needed import log_slope, samples_needed
from torchfolio.models import ConvNet, collect_features
from torchfolio.runs import Results, Run, plots, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arm = dict[str, Any]
Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """What is simulated, and which network's features are probed."""

    dimensions: tuple[int, ...] = setting((50, 100, 200, 400, 800), "features of the mixture of two classes")
    dimensions_3: tuple[int, ...] = setting((100, 200, 400), "features of the mixture of three classes")
    pool: int = setting(5, "samples to draw from, as a multiple of the features")
    test_points: int = setting(4000, "samples to test on")
    points: int = setting(30, "sizes of the grid")
    images: str = setting("mnist10k", "set of images; one half trains the network, the other the heads")
    train_size: int = setting(8000, "images of both halves together")
    widths: tuple[int, ...] = setting((32, 64, 256), "channels of the network's layers; the last are the features")
    epochs: int = setting(2, "passes over the network's half")
    sizes: tuple[int, ...] = setting(
        (20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 4000), "labels that the heads get"
    )
    repeats: int = setting(12, "subsets of each size up to 300; larger sizes get three")


SCALES = {
    "smoke": Settings((20, 40), (20,), 10, 500, 8, "digits", 1000, (8, 16, 32), 2, (20, 30, 50, 100, 200, 500), 2),
    "quick": Settings(),
    "full": Settings((50, 100, 200, 400, 800, 1600), points=60, images="cifar10", train_size=20_000, epochs=20),
}


def run(run: Run[Settings]) -> None:
    """Simulate, then probe features; one thread, as most matrices are small."""
    with threadpool_limits(1):
        s = run.settings
        own = {"pool": s.pool, "test_points": s.test_points, "points": s.points, "seed": run.seed}
        needed = run.arm("two_classes", samples_needed, 2, s.dimensions, **own)
        run.arm("three_classes", samples_needed, 3, s.dimensions_3, **own)
        slopes = {f"{head}_slope": log_slope(needed["dimensions"], needed[head]) for head in ("nb", "lr")}
        run.values("sample_complexity", slopes, ratio=needed["lr"][-1] / needed["nb"][-1])
        supervised = run.arm("supervised", _probe, run, s.epochs)
        untrained = run.arm("untrained", _probe, run, 0)
        run.arm("transfer", _probe, run, s.epochs, transfer=True)
        _claim_regimes(run, supervised, untrained)
        pixels = run.arm("class_variances", _class_variances, run.seed)
        by_class, shared = pixels["by_class"], pixels["shared"]
        run.values("control_class_variances", lead_20=by_class[0] - shared[0], lead_30=by_class[1] - shared[1])


def _features(run: Run[Settings], epochs: int, transfer: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels that the heads get, of images that the network was not trained on; and those of the test."""
    settings = run.settings
    data = run.data(settings.images, val=0, train_size=settings.train_size)
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    half = len(x) // 2
    ours, heads, test = (torch.ones(len(t), dtype=torch.bool) for t in (x[:half], x[half:], x_test))
    if transfer:  # one half of the classes trains the network, the other half the heads
        border = data.num_classes // 2
        ours, heads, test = y[:half] < border, y[half:] >= border, y_test >= border
    net = ConvNet(data.num_classes, data.shape[0], settings.widths)
    layer = f"layer{len(settings.widths)}"
    if epochs:
        run.fit(net, (x[:half][ours], y[:half][ours]), epochs=epochs)
    rows = [collect_features(net, part, layer, flatten="pool")[layer] for part in (x[half:][heads], x_test[test])]
    return rows[0], y[half:][heads], rows[1], y_test[test]


def _probe(run: Run[Settings], epochs: int, transfer: bool = False) -> Arm:
    """Curves of both heads, errors in %."""
    X, y, X_test, y_test = _features(run, epochs, transfer)
    sizes = [m for m in run.settings.sizes if m <= len(X)]
    repeats = [run.settings.repeats if m <= 300 else 3 if m < len(X) else 1 for m in sizes]
    heads = {"nb": NaiveBayesProbe(), "lr": make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=1000))}
    curves = learning_curve(X, y, X_test, y_test, sizes, repeats, heads, seed=run.seed)
    diagnostics = gaussian_fit(X, y)
    return {
        "sizes": sizes,
        **{name: 100 * curve.mean for name, curve in curves.items()},
        "crossover": crossover(curves["nb"], curves["lr"]) or float("nan"),
        "divergence": float(np.nanmean(diagnostics.divergence)),
        "variances": diagnostics.variance_quantiles,
    }


def _claim_regimes(run: Run[Settings], supervised: Arm, untrained: Arm) -> None:
    sizes, nb, lr = (np.array(supervised[key]) for key in ("sizes", "nb", "lr"))
    m = dict(zip(sizes.tolist(), (lr - nb).tolist(), strict=True))
    many = sizes >= 100
    run.values("two_regimes", lead_20=m[20], lead_30=m[30], lr_lead_many=(nb - lr)[many].min(),
               crossover=supervised["crossover"])  # fmt: skip
    at = int(np.flatnonzero(sizes == 200)[0])
    run.values("plateau", nb_left=nb[at] - nb[-1], lr_left=lr[at] - lr[-1])
    sizes, nb, lr = (np.array(untrained[key]) for key in ("sizes", "nb", "lr"))
    run.values("control_random_features", nb_lead=(lr - nb)[sizes >= 50].max())


def _class_variances(seed: int) -> Arm:
    """Errors in % on scikit-learn's digits at 20 and 30 labels, with a variance for each class and with shared ones."""
    heads = {"by_class": GaussianNB(var_smoothing=1e-2), "shared": NaiveBayesProbe()}
    curves = learning_curve(*digits(seed), [20, 30], 50, heads, seed=seed)
    return {name: 100 * curve.mean for name, curve in curves.items()}


def digits(seed: int) -> tuple[Array, Array, Array, Array]:
    data = load("digits", val=0, seed=seed, normalize=False)
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    return x.flatten(1).double().numpy(), y.numpy(), x_test.flatten(1).double().numpy(), y_test.numpy()


def figures(results: Results) -> plots.Figures:
    """Samples needed by dimension, and errors by number of labels."""
    heads = {"naive Bayes": "nb", "logistic regression": "lr"}

    def draw(arm: str, x: str, **axes: Any) -> Figure:
        lines = {name: (arm, key) for name, key in heads.items()}
        return plots.curves(results, lines, x=results.values(arm, x)[0], logx=True, **axes)

    probed = {"xlabel": "labels", "ylabel": "test error (%)"}
    return {
        "samples needed": draw("two_classes", "dimensions", xlabel="features", ylabel="samples needed", logy=True),
        **{f"{arm} features": draw(arm, "sizes", **probed) for arm in ("supervised", "untrained", "transfer")},
    }
