"""SoundnessBench: does a verifier tell the truth?

Xingjian Zhou, Keyi Shen, Andy Xu, Hongji Xu, Cho-Jui Hsieh, Huan Zhang, Zhouxing Shi, "Testing Neural Network Verifiers: A
Soundness Benchmark with Hidden Counterexamples", TMLR 2025, https://arxiv.org/abs/2412.03154.

Networks are trained with counterexamples that are known and that gradient attacks do not find. A verifier which says
"verified" of such an instance has a bug. The property of each instance: for all $x$ within $\\varepsilon$ ($L_\\infty$) of a
centre $x_0$ and within $[-R, R]^d$, $f_y(x) > f_j(x)$ for all $j \\ne y$.

    pairs = draw_pairs((10,), n=5, eps=0.2, data_range=1.0)
    hidden = hide(net, pairs, steps=3000)
    export(hidden, "bench/")                       # ONNX, VNN-LIB, instances.csv
    score(load("bench/"), CrownSplit(), timeout=10)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from torchfolio import checks
from torchfolio.engine.fit import fit
from torchfolio.engine.rules import LearningRule
from torchfolio.engine.state import FitState
from torchfolio.measure import untouched
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.benchmark_files import Benchmark, Instance, export, load
from torchfolio.robustness.counterexample_pairs import (
    SWEEP,
    HiddenModel,
    Pairs,
    Sweep,
    draw_pairs,
    survives,
    withstands,
)
from torchfolio.robustness.verifier_scores import AttackOnly, CommandVerifier, run_verifier, score, status_of

if TYPE_CHECKING:
    pass

__all__ = [
    "SWEEP",
    "AttackOnly",
    "Benchmark",
    "CommandVerifier",
    "HiddenCounterexamples",
    "HiddenModel",
    "Instance",
    "Pairs",
    "PgdSettings",
    "draw_pairs",
    "export",
    "hide",
    "load",
    "run_verifier",
    "score",
    "status_of",
    "survives",
    "withstands",
]


@dataclass(frozen=True)
class PgdSettings:
    """The attack of a training step.

    Attributes:
        steps: number of steps of ascent.
        restarts: independent starts.
        alphas: step sizes over $\\varepsilon$, which training steps take in turn.
    """

    steps: int = 75
    restarts: int = 75
    alphas: tuple[float, ...] = (0.1,)


class HiddenCounterexamples(LearningRule):
    """The two objectives: misclassify the counterexamples, and withstand the attacks around all centres.

    $$L = \\frac1n \\sum_i \\max\\bigl(0, f_y(x_i') - f_t(x_i') + \\lambda\\bigr)
    + \\frac{1}{2n\\,w} \\sum_{\\delta \\in \\text{window}} \\sum_i \\mathrm{CE}\\bigl(f(x_i + \\delta_i), y_i\\bigr)$$

    Every step finds new perturbations $\\delta$ of all centres by PGD, and keeps those of the last $w$ steps.

    Args:
        pairs: centres and counterexamples; batches of the training are not looked at.
        window: $w$; 1 forgets all but the last.
        margin: $\\lambda$; 0.01.
        attack: attack of a step; `None` trains on the centres alone, without perturbations.
        generator: source of the attack.

    Reference:
        Section 3; details as in the authors' code, but for PGD, which keeps the best point from the first on and also
        looks at the last (there a point counts only once it flips the label).
    """

    def __init__(
        self,
        pairs: Pairs,
        window: int = 300,
        margin: float = 0.01,
        attack: PgdSettings | None = PgdSettings(),
        generator: torch.Generator | None = None,
    ) -> None:
        checks.whole("window", window, 1)
        checks.at_least("margin", margin, 0)
        self.pairs, self.window, self.margin, self.attack, self.generator = pairs, window, margin, attack, generator
        self.count = 0
        self.model: nn.Module | None = None

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        self.model = model
        self.pairs = self.pairs.to(example[0].device)
        self.x, self.y = self.pairs.all()
        with untouched(model, training=False), torch.no_grad():
            outputs = model(self.x)
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise ValueError(f"expected logits [N, K] of at least 2 classes, got shape {tuple(outputs.shape)}")
        # A ring: concatenating the window anew in every step would copy it.
        if not hasattr(self, "seen"):
            self.seen = self.x.new_zeros(self.window, *self.x.shape)
        return model

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        pairs = self.pairs
        filled = self._look() if self.attack is not None else self.x[None]
        n = len(pairs)
        outputs = self.model(torch.cat([pairs.counterexamples, filled.flatten(0, 1)]))
        z, around = outputs[:n], outputs[n:]
        gap = z.gather(1, pairs.labels[:, None]) - z.gather(1, pairs.targets[:, None])
        wrong = F.relu(gap + self.margin).mean()
        adversarial = F.cross_entropy(around, self.y.repeat(len(filled)))
        backward(wrong + adversarial)
        return {
            "loss": (wrong + adversarial).detach(), "counterexamples": wrong.detach(), "adversarial": adversarial.detach(),
        }  # fmt: skip

    def _look(self) -> Tensor:
        """Find perturbations, and return all that the window holds, `[w, 2n, *shape]`."""
        assert self.attack is not None
        assert self.model is not None
        alpha = self.attack.alphas[self.count % len(self.attack.alphas)] * self.pairs.eps
        attacked = pgd(
            self.model, self.x, self.y, eps=self.pairs.eps, alpha=alpha, steps=self.attack.steps,
            restarts=self.attack.restarts, loss="sum_margin", clip=self.pairs.clip, generator=self.generator,
        )  # fmt: skip
        self.seen[self.count % self.window] = attacked.x_adv
        self.count += 1
        return self.seen[: min(self.count, self.window)]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"seen": self.seen, "count": self.count}
        return state if self.generator is None else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.count = state["seen"].to(self.seen), int(state["count"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def hide(
    model: nn.Module,
    pairs: Pairs,
    steps: int = 10_000,
    *,
    lr: float = 1e-3,
    rule: HiddenCounterexamples | None = None,
    sweep: Sweep = SWEEP,
    restarts: int = 1000,
    look_every: int = 200,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> HiddenModel:
    """Train a network to misclassify its counterexamples and to hide them.

    Every `look_every` steps a weak attack is tried, and the whole sweep where it finds not everything. The weights with
    most counterexamples hidden are kept, and training ends when all are.

    Args:
        model: network with inputs of the shape of the centres and at least 2 logits; trained in place.
        pairs: pairs of `draw_pairs`.
        steps: one full batch each.
        lr: peak of Adam's rate, which rises from 0 for 40 % of the steps and falls back to 0.
        rule: objectives; `HiddenCounterexamples(pairs)` by default.
        sweep: attacks of the sweep, as `SWEEP`.
        restarts: number of restarts of each attack of the sweep.
        look_every: steps between looks.
        seed: seed of training and looks.
        device: device of the training.
        progress: whether to show a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    rule = rule if rule is not None else HiddenCounterexamples(pairs, generator=generator)
    best: dict[str, Any] = {"valid": torch.zeros(len(pairs), dtype=torch.bool), "state": None}
    rows: list[dict[str, float]] = []

    def look(state: FitState) -> None:
        if state.epoch_end or (state.step % look_every and state.step != steps):
            return
        there = pairs.to(next(state.model.parameters()).device)
        valid = survives(state.model, there, sweep[1:2] or sweep, min(restarts, 20), seed)
        if valid.any():
            valid = survives(state.model, there, sweep, restarts, seed)
        rows.append(
            {"step": float(state.step), "hidden": float(valid.sum()), **{k: float(v) for k, v in state.scalars.items()}}
        )
        if best["state"] is None or valid.sum() > best["valid"].sum():
            best.update(valid=valid, state=copy.deepcopy(state.model.state_dict()))
        if valid.all():
            state.stop("all counterexamples are hidden")

    fit(
        model, pairs.all(), rule=rule, optimizer=partial(torch.optim.Adam, lr=lr),
        scheduler=partial(LambdaLR, lr_lambda=partial(_up_and_down, steps=steps)), max_steps=steps,
        batch_size=2 * len(pairs), clip_norm=10.0, callbacks=[look], seed=seed, device=device, progress=progress,
    )  # fmt: skip
    if best["state"] is not None:
        model.load_state_dict(best["state"])
    return HiddenModel(model.eval(), pairs, best["valid"], tuple(rows), sweep, restarts)


def _up_and_down(step: int, steps: int) -> float:
    rise = 0.4 * steps
    return max(1e-6, step / rise if step < rise else (steps - step) / (steps - rise))
