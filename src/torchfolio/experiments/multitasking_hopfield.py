"""Measures multitasking Hopfield networks: simulation against theory in each regime, and learning by both protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchfolio.experiments._hopfield_recall import by_examples, by_patterns, dense, in_theory, unbalanced
from torchfolio.runs import Results, Run, plots, setting, threads
from torchfolio.theory.multitasking_hopfield import (
    MultitaskingHopfield,
    PhaseDiagram,
    energy_from_losses,
    fill_blanks,
    phase_diagram,
    sparse_patterns,
    sse_losses,
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the simulations."""

    N: int = setting(2000, "number of spins")
    K: tuple[int, ...] = setting((3, 5), "numbers of patterns")
    d: tuple[float, ...] = setting((0.25, 0.5, 0.8, 0.9), "dilutions without noise")
    samples: int = setting(3, "sets of patterns")
    replicas: int = setting(20, "states relaxed in each")
    sweeps: int = setting(15, "sweeps without noise")
    noisy_sweeps: int = setting(100, "sweeps with noise, of which the second half is averaged")
    parallel_N: int = setting(5000, "number of spins at strong dilution")
    parallel_samples: int = setting(5, "sets of patterns there")
    learning_N: int = setting(1500, "number of spins where examples are learned")
    learning_d: float = setting(0.3, "dilution there")
    r: float = setting(0.3, "quality of the examples")
    M: tuple[int, ...] = setting((5, 11, 21, 41, 81), "numbers of examples, odd")
    grid: int = setting(12, "points along each side of the phase diagram")


SCALES = {
    "smoke": Settings(
        N=300, samples=2, replicas=4, sweeps=6, noisy_sweeps=10, parallel_N=500, parallel_samples=2, learning_N=200,
        grid=4,
    ),
    "quick": Settings(),
    "full": Settings(
        N=10_000, K=(3, 5, 8), samples=20, noisy_sweeps=400, parallel_N=20_000, parallel_samples=20, learning_N=5000,
        grid=24,
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Everything on one thread: the matrices are small."""
    with threads(1):
        run.values("loss_identity", run.arm("identity", identity, run.seed))
        stored(run)
        noisy(run)
        learned(run)
        run.values("negative_control", run.arm("dense", dense, run))
        run.arm("phase", phase, run.settings)


def identity(seed: int) -> dict[str, float]:
    """Largest difference between the energy of random states and its expression by squared-error losses."""
    patterns = sparse_patterns(200, 4, 0.3, samples=10, seed=seed)
    states = fill_blanks(torch.zeros(10, 200).double(), 10, seed=seed)
    energy = MultitaskingHopfield(normalize=False).fit(patterns).energy(states, diagonal=True) / 200
    blanks = (patterns == 0).double().mean(-1)[:, None]
    return {"largest": float((energy - energy_from_losses(*sse_losses(states, patterns), blanks)).abs().max())}


def stored(run: Run[Settings]) -> None:
    """Without noise, from mild to strong dilution."""
    s = run.settings
    cases = [(K, d) for K in s.K for d in s.d]
    arms = {(K, d): run.arm(f"stored K={K} d={d:g}", by_patterns, run, s.N, K, d, s.samples) for K, d in cases}
    overlaps = {d: np.asarray(arm["ordered"]) for (K, d), arm in arms.items() if K == 3 and d <= 0.5}
    values = {f"m{k + 1}_d{100 * d:.0f}": m[k] for d, m in overlaps.items() for k in range(3)}
    run.values("hierarchical", values, slope=np.polyfit(range(3), np.log(overlaps[max(overlaps)]), 1)[0])


def noisy(run: Run[Settings]) -> None:
    """With noise: strong and mild dilution, and above the critical temperature."""
    settings = run.settings
    N, samples = settings.parallel_N, settings.parallel_samples
    strong = run.arm("parallel", by_patterns, run, N, 3, 0.9, samples, 0.2)["thermal"]
    mild = run.arm("mild", by_patterns, run, N, 3, 0.4, samples, 0.05)["ordered"]
    least, largest = np.min(np.asarray(strong), -1), np.max(np.asarray(strong), -1)
    run.values("parallel", ratio=np.mean(least / largest), largest=largest.mean(), ratio_mild=mild[2] / mild[0])
    hot = run.arm("hot", by_patterns, run, settings.N, 3, 0.3, settings.samples, 1.2)["thermal"]
    run.values("noise", largest=np.max(np.asarray(hot)), bound=4 / settings.N**0.5)


def learned(run: Run[Settings]) -> None:
    """From examples, by both protocols."""
    settings = run.settings
    curves = {rule: run.arm(rule, by_examples, run, rule) for rule in ("supervised", "unsupervised")}
    overlaps = {**curves, "theory": run.arm("theory", in_theory, settings)}
    run.arm("unbalanced", unbalanced, run)
    values = {f"{name}_{M}": curve["m1"][k] for name, curve in overlaps.items() for k, M in enumerate(settings.M)}
    target = 0.8 * (1 - settings.learning_d)
    for name, curve in curves.items():
        rising = np.maximum.accumulate(curve["m1"])
        values[f"needed_{name}"] = float(np.exp(np.interp(target, rising, np.log(settings.M))))
    run.values("protocols", values)


def plane(settings: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Dilutions and temperatures of the phase diagram."""
    return tuple(np.linspace(0.05, 0.95, settings.grid)), tuple(np.linspace(0.02, 1.12, settings.grid))


def phase(settings: Settings) -> dict[str, Any]:
    """The phase diagram of 3 patterns."""
    diagram = phase_diagram(3, *plane(settings))
    return {"amplitudes": diagram.amplitudes, "regimes": [list(row) for row in diagram.regimes]}


def figures(results: Results) -> plots.Figures:
    """Amplitudes and learning curves over theory, and the phase diagram."""
    s, diagram = results.settings, results.arms[0]["phase"]
    regimes = tuple(map(tuple, diagram["regimes"]))
    phases = PhaseDiagram(3, *plane(s), torch.as_tensor(diagram["amplitudes"]), regimes)
    lines = {name: (name, "m1") for name in ("theory", "supervised", "unsupervised")}
    learning = plots.curves(results, lines, x=s.M, xlabel="examples of each pattern", ylabel="overlap $m_1$", logx=True)
    return {"amplitudes": amplitudes(results), "learning": learning, "phase diagram": phases.plot()}


def amplitudes(results: Results) -> Any:
    """A figure of overlaps with every pattern without noise, over theory."""
    import matplotlib.pyplot as plt

    s: Settings = results.settings
    fig, axes = plt.subplots(1, len(s.K), figsize=(4.5 * len(s.K), 3.8), layout="constrained", squeeze=False)
    for ax, K in zip(axes[0], s.K, strict=True):
        index = np.arange(1, K + 1)
        for k, d in enumerate(s.d):
            arm = f"stored K={K} d={d:g}"
            ax.semilogy(index, results.values(arm, "theory")[0], c=f"C{k}", lw=1, label=f"d = {d:g}")
            ax.plot(index, results.values(arm, "ordered").T, "o", c=f"C{k}", ms=4)
        ax.set(xlabel="pattern μ", ylabel="overlap $|m_\\mu|$", xticks=index)
        ax.set_title(f"K = {K}: theory (lines), simulation")
        ax.legend(fontsize=8)
    return fig
