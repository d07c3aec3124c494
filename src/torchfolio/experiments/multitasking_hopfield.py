"""Measures multitasking Hopfield networks: simulation against theory in each regime, and learning by both protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchfolio.experiments._hopfield_recall import by_examples, drawn_patterns, in_theory, relaxed, unbalanced
from torchfolio.runs import Results, Run, plots, setting, threads
from torchfolio.theory.multitasking_hopfield import (
    MultitaskingHopfield,
    PhaseDiagram,
    energy_from_losses,
    fill_blanks,
    mean_field,
    phase_diagram,
    sparse_patterns,
    sse_losses,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        run.values("loss_identity", run.arm("identity", _identity, run.seed))
        _stored(run)
        _noisy(run)
        _learned(run)
        run.values("negative_control", run.arm("dense", _dense, run.settings, run.seed, run.device))
        run.arm("phase", _phase, run.settings)


def _identity(seed: int) -> dict[str, float]:
    patterns = sparse_patterns(200, 4, 0.3, samples=10, seed=seed)
    states = fill_blanks(torch.zeros(10, 200).double(), 10, seed=seed)
    energy = MultitaskingHopfield(normalize=False).fit(patterns).energy(states, diagonal=True) / 200
    blanks = (patterns == 0).double().mean(-1)[:, None]
    return {"largest": float((energy - energy_from_losses(*sse_losses(states, patterns), blanks)).abs().max())}


def _simulate(run: Run[Settings], N: int, K: int, d: float, samples: int, T: float = 0.0) -> dict[str, Any]:
    patterns = drawn_patterns(run, N, K, d, samples)
    theory = mean_field(K, d, T).best
    recalled = relaxed(MultitaskingHopfield().fit(patterns), patterns, run.settings, run.seed, T)
    return {**recalled, "theory": theory.amplitudes, "regime": theory.regime}


def _stored(run: Run[Settings]) -> None:
    """Without noise, from mild to strong dilution."""
    settings, values = run.settings, {}
    for K in settings.K:
        for d in settings.d:
            m = run.arm(f"stored K={K} d={d:g}", _simulate, run, settings.N, K, d, settings.samples)["ordered"]
            if K == 3 and d <= 0.5:
                values |= {f"m{k + 1}_d{100 * d:.0f}": float(m[k]) for k in range(3)}
                values["slope"] = float(np.polyfit(range(3), np.log(np.asarray(m)), 1)[0])  # of d = 0.5, the last
    run.values("hierarchical", values)


def _noisy(run: Run[Settings]) -> None:
    settings = run.settings
    size = settings.parallel_N, 3
    strong = run.arm("parallel", _simulate, run, *size, 0.9, settings.parallel_samples, 0.2)["thermal"]
    mild = run.arm("mild", _simulate, run, *size, 0.4, settings.parallel_samples, 0.05)["ordered"]
    least, largest = np.min(np.asarray(strong), -1), np.max(np.asarray(strong), -1)
    run.values("parallel", ratio=np.mean(least / largest), largest=largest.mean(), ratio_mild=mild[2] / mild[0])
    hot = run.arm("hot", _simulate, run, settings.N, 3, 0.3, settings.samples, 1.2)["thermal"]
    run.values("noise", largest=np.max(np.asarray(hot)), bound=4 / settings.N**0.5)


def _learned(run: Run[Settings]) -> None:
    settings = run.settings
    curves = {rule: run.arm(rule, by_examples, run, rule) for rule in ("supervised", "unsupervised")}
    theory = run.arm("theory", in_theory, settings)
    run.arm("unbalanced", unbalanced, run)
    values = {f"{name}_{M}": curve["m1"][k] for name, curve in curves.items() for k, M in enumerate(settings.M)}
    values |= {f"theory_{M}": m1 for M, m1 in zip(settings.M, theory["m1"], strict=True)}
    target = 0.8 * (1 - settings.learning_d)
    for name, curve in curves.items():
        rising = np.maximum.accumulate(curve["m1"])
        values[f"needed_{name}"] = float(np.exp(np.interp(target, rising, np.log(settings.M))))
    run.values("protocols", values)


def _dense(settings: Settings, seed: int, device: torch.device) -> dict[str, float]:
    """An ordinary Hopfield network, from one pattern and from an equal mixture of two."""
    patterns = sparse_patterns(settings.N, 3, 0.0, settings.samples, seed=seed).to(device)
    network = MultitaskingHopfield().fit(patterns)
    m = relaxed(network, patterns, settings, seed)["thermal"].mean(0)
    mixture = fill_blanks((patterns[:, 0] + patterns[:, 1]).sign(), settings.replicas, seed=seed)
    mixed = network.relax(mixture, settings.sweeps, seed=seed).magnetisations[-1].abs()[..., :2]
    return {"first": float(m[0]), "others": float(m[1:].max()), "both": float(mixed.min(-1).values.max())}


def _phase(settings: Settings) -> dict[str, Any]:
    d, T = np.linspace(0.05, 0.95, settings.grid), np.linspace(0.02, 1.12, settings.grid)
    diagram = phase_diagram(3, d.tolist(), T.tolist())
    return {"amplitudes": diagram.amplitudes, "regimes": [list(row) for row in diagram.regimes]}


def figures(results: Results) -> plots.Figures:
    """Amplitudes and learning curves over theory, and the phase diagram."""
    s: Settings = results.settings
    d, T = (tuple(np.linspace(*ends, s.grid).tolist()) for ends in ((0.05, 0.95), (0.02, 1.12)))
    amplitudes = torch.as_tensor(np.asarray(results.arms[0]["phase"]["amplitudes"]))
    regimes = tuple(map(tuple, results.arms[0]["phase"]["regimes"]))
    phases = PhaseDiagram(3, d, T, amplitudes, regimes).plot()
    curves = {name: (name, "m1") for name in ("theory", "supervised", "unsupervised")}
    learning = plots.curves(
        results, curves, x=s.M, xlabel="examples of each pattern", ylabel="overlap $m_1$", logx=True
    )
    return {"amplitudes": _amplitudes(results), "learning": learning, "phase diagram": phases}


def _amplitudes(results: Results) -> Figure:
    import matplotlib.pyplot as plt

    s: Settings = results.settings
    fig, axes = plt.subplots(1, len(s.K), figsize=(4.5 * len(s.K), 3.8), layout="constrained", squeeze=False)
    for ax, K in zip(axes[0], s.K, strict=True):
        for k, d in enumerate(s.d):
            arm, index = f"stored K={K} d={d:g}", np.arange(1, K + 1)
            ax.semilogy(index, results.values(arm, "theory")[0], c=f"C{k}", lw=1, label=f"d = {d:g}")
            ax.plot(index, results.values(arm, "ordered").T, "o", c=f"C{k}", ms=4)
        ax.set(
            xlabel="pattern μ", ylabel="overlap $|m_\\mu|$", title=f"K = {K}: theory (lines), simulation", xticks=index
        )
        ax.legend(fontsize=8)
    return fig
