"""Measures three-layer networks on hierarchical polynomials: against kernels, over samples, and with their controls."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torchfolio.experiments._layerwise_courses import drawn_first_stage, drawn_over_samples, first_stage, over_samples
from torchfolio.experiments._three_layer_baselines import WithoutFirstStage, end_to_end
from torchfolio.runs import Results, Run, plots, setting, threads
from torchfolio.theory.hierarchical_polynomials import (
    HierarchicalPolynomial,
    LayerwiseThreeLayerRegressor,
    RandomFeatureRidge,
    TunedKernelRidge,
    feature_recovery,
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the tasks."""

    d: int = setting(24, "dimension of the main task")
    n: tuple[int, int, int] = setting(
        (2000, 4000, 8000), "samples of each stage, ascending; the second is the one at which all models are compared"
    )
    m1: int = setting(400, "neurons on the feature")
    m2: int = setting(2000, "neurons on the inputs")
    n_test: int = setting(5000, "fresh samples to test on")
    single_d: int = setting(64, "dimension of the single-index task")
    single_n: int = setting(1000, "samples of each stage there")
    epochs: int = setting(30, "epochs of training end to end")
    small_d: tuple[int, ...] = setting((12, 16), "dimensions of the curves over samples")
    small_n: tuple[int, ...] = setting((2, 4, 8), "samples of each stage there, over d squared")
    small_m2: int = setting(800, "neurons on the inputs there")
    steps: tuple[int, ...] = setting(
        (1, 10, 100, 1000, 10_000, 100_000), "numbers of gradient steps whose course is shown"
    )


SCALES = {
    "smoke": Settings(
        d=8, n=(150, 300, 600), m1=50, m2=200, n_test=500, single_d=10, single_n=100, epochs=2, small_d=(4, 6),
        small_n=(4, 8), small_m2=100,
    ),
    "quick": Settings(),
    "full": Settings(d=32, n=(4000, 8000, 16_000), m2=4000, n_test=20_000, small_d=(16, 24, 32), small_n=(2, 4, 8, 16)),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Everything on one thread, so that seeds may run side by side."""
    with threads(1):
        _main(run)
        _controls(run)
        run.arm("path", first_stage, run.settings, run.seed)
        run.arm("curves", over_samples, run.settings, run.seed)


def _target(settings: Settings, seed: int) -> HierarchicalPolynomial:
    return HierarchicalPolynomial(settings.d, seed=seed)


def _fitted(model: Any, target: HierarchicalPolynomial, n: int, settings: Settings, seed: int) -> dict[str, Any]:
    """Relative error of a model fitted to n samples, and what its feature is, where it has one."""
    X, y = target.sample(2 * max(settings.n), seed=2 * seed)
    X_test, y_test = target.sample(settings.n_test, seed=2 * seed + 1)
    model.fit(X[:n].numpy(), y[:n].numpy())
    error = float(((model.predict(X_test.numpy()) - y_test.numpy()) ** 2).mean() / y_test.numpy().var())
    if not hasattr(model, "feature_"):
        return {"error": error}
    recovery = feature_recovery(model, target, X_test)
    shown = {"feature": recovery.feature[:500], "hidden": recovery.hidden[:500]}
    return {"error": error, "correlation": recovery.correlation, "target": recovery.target_correlation, **shown}


def _network(settings: Settings, seed: int) -> LayerwiseThreeLayerRegressor:
    return LayerwiseThreeLayerRegressor(settings.m1, settings.m2, random_state=seed)


def _main(run: Run[Settings]) -> None:
    settings, seed = run.settings, run.seed
    target, n = _target(settings, seed), 2 * settings.n[1]
    ours = [
        run.arm(f"three-layer {m}", _fitted, _network(settings, seed), target, 2 * m, settings, seed)
        for m in settings.n
    ]
    run.arm("random features", _fitted, RandomFeatureRidge(settings.m2, random_state=seed), target, n, settings, seed)
    run.arm("end to end", end_to_end, settings, seed)
    kernels = {"poly2": 2, "poly4": 4, "rbf": None}
    errors = {
        name: run.arm(name, _fitted, TunedKernelRidge(degree), target, n, settings, seed)["error"]
        for name, degree in kernels.items()
    }
    learned = ours[1]["correlation"]
    run.values("beats_kernels", ours=ours[1]["error"], **errors)
    run.values("feature_recovery", learned=learned, target=ours[1]["target"])
    run.values("feature_limit", learned=learned, limit=target.recovery_limit())
    by_size = {name: arm["error"] for name, arm in zip(("half", "same", "double"), ours, strict=True)}
    run.values("scaling", **by_size, kernel=min(errors.values()))


def _controls(run: Run[Settings]) -> None:
    settings, seed = run.settings, run.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that p cannot be seen is the point
        blind = HierarchicalPolynomial(settings.d, link=(0, 0, 1), seed=seed)
    n = 2 * settings.n[1]
    hidden = run.arm("no linear part", _fitted, _network(settings, seed), blind, n, settings, seed)
    run.values("control_no_linear_part", correlation=abs(hidden["correlation"]), error=hidden["error"])
    random = WithoutFirstStage(settings.m1, settings.m2, random_state=seed)
    skipped = run.arm("no first stage", _fitted, random, _target(settings, seed), n, settings, seed)
    run.values("control_no_first_stage", error=skipped["error"])
    link = (0, math.sqrt(0.6), 0, math.sqrt(0.4))
    single = HierarchicalPolynomial(settings.single_d, k=1, link=link, L=1, seed=seed)
    one = run.arm("single index", _fitted, _network(settings, seed), single, 2 * settings.single_n, settings, seed)
    run.values("single_index", error=one["error"], correlation=one["correlation"])


def figures(results: Results) -> plots.Figures:
    """The learned feature against p, all errors, the curves over samples, and the first stage's course."""
    s: Settings = results.settings
    arms = [arm for arm in results.arms[0] if "error" in results.arms[0][arm]]
    fig, ax = plots.axes("hidden polynomial p(x)", "learned feature, scaled")
    main = results.arms[0][f"three-layer {s.n[1]}"]
    ax.plot(main["hidden"], main["feature"], ".", ms=3)
    return {
        "feature": fig,
        "errors": plots.bars(results, {arm: (arm, "error") for arm in arms}, ylabel="test error / variance"),
        "samples": drawn_over_samples(results),
        "first stage": drawn_first_stage(results),
    }
