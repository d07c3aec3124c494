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
import csv
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from torchfolio.engine.fit import fit
from torchfolio.engine.rules import LearningRule
from torchfolio.engine.state import FitState
from torchfolio.errors import TorchfolioError
from torchfolio.measure import untouched
from torchfolio.robustness.attacks import attacked, pgd
from torchfolio.robustness.onnx_file import read_onnx, write_onnx
from torchfolio.robustness.properties import Box, Property, Status, Verdict, Verifier, classification
from torchfolio.robustness.vnnlib import read_vnnlib, write_vnnlib

if TYPE_CHECKING:
    import pandas as pd

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

Sweep = Sequence[tuple[float, int]]
Placement = Literal["face", "corner"]

SWEEP: Sweep = ((0.25, 0), (0.25, 100), (0.02, 100), (0.02, 250), (0.02, 500), (0.01, 1000), (0.01, 3000), (0.01, 5000))
"""Attacks that a counterexample must survive: step size over $\\varepsilon$, and number of steps."""

LEAST_MARGIN = 1e-3  # of an exported counterexample, so that other arithmetic misclassifies it too


@dataclass(frozen=True)
class Pairs:
    """Centres, some of them with a counterexample.

    Attributes:
        centers: with a counterexample, `[n, *shape]`.
        labels: of them, 0 or 1 `[n]`.
        targets: labels of the counterexamples `[n]`.
        counterexamples: `[n, *shape]`, within `eps` of their centres.
        clean_centers: without, `[n, *shape]`.
        clean_labels: of them `[n]`.
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
        shape: of one input.
        n: centres of each kind.
        eps: radius relative to $R$, $\\varepsilon = \\text{eps} \\cdot R$.
        data_range: $R$.
        placement: `"face"`: $\\delta_k \\sim U(-\\varepsilon, \\varepsilon)$ where $|\\delta_k| \\ge r \\varepsilon$ (at least
            once), and one small number elsewhere. `"corner"`: $\\pm\\varepsilon$ everywhere, which is what the authors' code
            runs, by a misspelt name; such points coincide with fixed points of sign PGD and are hard to hide.
        r: see `placement`.
        generator: of everything.

    Raises:
        ValueError: on settings out of range, or if the centres do not fit apart (at least $2 \\varepsilon$ in
            $L_\\infty$) in 10,000 draws.
    """
    if not 0 < eps < 1:
        raise ValueError(f"expected eps between 0 and 1, relative to the data range, got {eps}")
    if not data_range > 0 or n < 1 or not 0 <= r <= 1:
        raise ValueError(f"expected data_range > 0, n >= 1 and r in [0, 1], got {data_range}, {n}, {r}")
    if placement not in ("face", "corner"):
        raise ValueError(f"expected placement face or corner, got {placement!r}")
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
    kept = delta.abs() >= r * radius
    if not kept.any():
        chosen = int(torch.randint(delta.numel(), (), generator=generator))
        side = 1.0 if float(delta.flatten()[chosen]) >= 0 else -1.0
        size = radius * (r + (1 - r) * float(torch.rand((), generator=generator)))
        kept.view(-1)[chosen], delta.view(-1)[chosen] = True, side * size
    small = data_range / 100 * (2 * float(torch.rand((), generator=generator)) - 1)
    return torch.where(kept, delta, torch.full_like(delta, max(-radius, min(radius, small))))


@dataclass(frozen=True)
class PgdSettings:
    """The attack of a training step.

    Attributes:
        steps: of ascent.
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
        attack: of a step; `None` trains on the centres alone, without perturbations.
        generator: of the attack.

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
        if window < 1:
            raise ValueError(f"expected a window of at least 1, got {window}")
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
        found = pgd(
            self.model, self.x, self.y, eps=self.pairs.eps, alpha=alpha, steps=self.attack.steps,
            restarts=self.attack.restarts, loss="sum_margin", clip=self.pairs.clip, generator=self.generator,
        )  # fmt: skip
        self.seen[self.count % self.window] = found.x_adv
        self.count += 1
        return self.seen[: min(self.count, self.window)]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"seen": self.seen, "count": self.count}
        return state if self.generator is None else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.count = state["seen"].to(self.seen), int(state["count"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])


@dataclass(frozen=True)
class HiddenModel:
    """A network with hidden counterexamples.

    Attributes:
        model: in evaluation mode.
        pairs: all that were planted.
        valid: which counterexamples are misclassified, with a centre that is right, and found by no attack `[n]`.
        history: training, a row for every look.
        sweep: attacks that were tried.
        restarts: of each.
    """

    model: nn.Module
    pairs: Pairs
    valid: Tensor
    history: tuple[dict[str, float], ...] = ()
    sweep: Sweep = SWEEP
    restarts: int = 1000


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
        model: with inputs of the shape of the centres and at least 2 logits; trained in place.
        pairs: of `draw_pairs`.
        steps: one full batch each.
        lr: peak of Adam's rate, which rises from 0 for 40 % of the steps and falls back to 0.
        rule: the objectives; `HiddenCounterexamples(pairs)` by default.
        sweep: see `SWEEP`.
        restarts: of each attack of the sweep.
        look_every: steps between looks.
        seed: of training and looks.
        device: of the training.
        progress: show a progress bar.
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
        found = pgd(
            model, x[rows], y[rows], eps=pairs.eps, alpha=alpha * pairs.eps, steps=steps, restarts=restarts,
            loss="sum_margin", clip=pairs.clip, generator=generator,
        )  # fmt: skip
        held[rows] = ~found.success
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


def export(hidden: HiddenModel, folder: str | Path, timeout: int = 100) -> Path:
    """Write a benchmark as VNN-COMP lays it out.

    `model.onnx`, `vnnlib/{i}.vnnlib`, `instances.csv`; instances with a hidden counterexample first, clean ones after.
    Counterexamples are written to `secret/` beside, which no verifier should see, with the sweep that they survived.

    Raises:
        ValueError: if no counterexample is hidden.
    """
    from safetensors.torch import save_file

    if not hidden.valid.any():
        raise ValueError("no counterexample is hidden: there is nothing to test verifiers with")
    folder = Path(folder)
    for part in ("vnnlib", "secret"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pairs = hidden.pairs.to("cpu")
    shape = pairs.centers.shape[1:]
    model = copy.deepcopy(hidden.model).cpu().float().eval()
    write_onnx(model, folder / "model.onnx", shape)
    with torch.no_grad():
        classes = model(pairs.centers[:1]).shape[1]
    n = len(pairs)
    chosen = [*hidden.valid.nonzero()[:, 0].tolist(), *range(n, 2 * n)]
    rows = []
    for i, k in enumerate(chosen):
        prop = classification(int(pairs.all()[1][k]), classes)
        path = write_vnnlib(folder / "vnnlib" / f"{i}.vnnlib", pairs.box(k), prop)
        rows.append(["model.onnx", f"vnnlib/{i}.vnnlib", timeout])
        if k < n:
            ((box, _),) = read_vnnlib(path, shape)
            assert box.contains(pairs.counterexamples[k : k + 1].double()).all()
    with (folder / "instances.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    save_file(
        {"counterexamples": pairs.counterexamples[hidden.valid].contiguous()},
        folder / "secret" / "counterexamples.safetensors",
    )
    record = {
        "hidden": int(hidden.valid.sum()), "eps": pairs.eps, "data_range": pairs.data_range,
        "sweep": [list(s) for s in hidden.sweep], "restarts": hidden.restarts,
    }  # fmt: skip
    (folder / "secret" / "record.json").write_text(json.dumps(record, indent=1))
    return folder


@dataclass(frozen=True)
class Instance:
    """One question to a verifier.

    Attributes:
        onnx: path of the network.
        vnnlib: path of the property.
        timeout: seconds.
        kind: `"unverifiable"` (there is a hidden counterexample), `"clean"`, or `"unknown"`.
        counterexample: the hidden one.
    """

    onnx: Path
    vnnlib: Path
    timeout: float
    kind: Literal["unverifiable", "clean", "unknown"] = "unknown"
    counterexample: Tensor | None = None

    def read(self) -> tuple[nn.Sequential, list[tuple[Box, Property]]]:
        """The network and its properties."""
        net, shape = read_onnx(self.onnx)
        return net, read_vnnlib(self.vnnlib, shape)


@dataclass(frozen=True)
class Benchmark:
    """Instances in a folder."""

    folder: Path
    instances: tuple[Instance, ...] = field(default=())

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    def __len__(self) -> int:
        return len(self.instances)


def load(folder: str | Path) -> Benchmark:
    """Read a benchmark that `export` wrote, or one in the layout of VNN-COMP (`instances.csv` or `NAME_instances.csv`).

    Raises:
        FileNotFoundError: if there is no list of instances, or it names a file that is not there.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    lists = [*folder.glob("instances.csv"), *folder.glob("*_instances.csv")]
    if not lists:
        raise FileNotFoundError(f"there is no instances.csv in {folder}")
    secret = folder / "secret" / "counterexamples.safetensors"
    examples = load_file(secret)["counterexamples"] if secret.is_file() else None
    instances = []
    with lists[0].open(newline="") as file:
        for i, row in enumerate(r for r in csv.reader(file) if r):
            onnx, vnnlib = _there(folder, row[0]), _there(folder, row[1])
            timeout = float(row[2]) if len(row) > 2 else 100.0
            if examples is None:
                instances.append(Instance(onnx, vnnlib, timeout))
            elif i < len(examples):
                instances.append(Instance(onnx, vnnlib, timeout, "unverifiable", examples[i]))
            else:
                instances.append(Instance(onnx, vnnlib, timeout, "clean"))
    return Benchmark(folder, tuple(instances))


def _there(folder: Path, name: str) -> Path:
    """A file of a benchmark; lists may name folders that were left out."""
    for path in (folder / name.strip(), folder / Path(name.strip()).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} lists {name.strip()}, which is not there")


WORDS: dict[str, Status] = {
    "unsat": "verified", "verified": "verified", "holds": "verified", "safe": "verified",
    "sat": "falsified", "falsified": "falsified", "violated": "falsified", "unsafe": "falsified",
    "timeout": "unknown", "unknown": "unknown", "error": "unknown",
}  # fmt: skip


def status_of(word: str) -> Status:
    """What a result of VNN-COMP means. Whole words alone count: "unsat" is not "sat", "unsafe" not "safe".

    Raises:
        ValueError: on another word.
    """
    found = WORDS.get(word.strip().lower())
    if found is None:
        raise ValueError(f"expected a result among {', '.join(WORDS)}, got {word!r}")
    return found


class AttackOnly:
    """The straw man: says "verified" when PGD finds nothing. Unsound.

    Args:
        steps: of PGD.
        restarts: of PGD.
        alpha: step size over the radius.
        seed: of the starts.
    """

    name = "attack only"

    def __init__(self, steps: int = 100, restarts: int = 100, alpha: float = 0.1, seed: int = 0) -> None:
        self.steps, self.restarts, self.alpha, self.seed = steps, restarts, alpha, seed

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        """Attack the box around its centre; boxes that are cut on one side are attacked around their middle."""
        started = time.perf_counter()
        center, radius = (lower + upper) / 2, (upper - lower) / 2

        def scaled(u: Tensor) -> Tensor:
            return model((center + radius * u).to(center))

        zeros = torch.zeros_like(center)[None]
        with attacked(model):
            found = pgd(
                scaled, zeros, torch.tensor([label], device=center.device), eps=1.0, alpha=self.alpha, steps=self.steps,
                restarts=self.restarts, generator=torch.Generator(center.device).manual_seed(self.seed),
            )  # fmt: skip
        witness = torch.minimum(torch.maximum(center + radius * found.x_adv[0], lower), upper)
        seconds = time.perf_counter() - started
        return Verdict("falsified", witness, seconds) if bool(found.success[0]) else Verdict("verified", None, seconds)


class CommandVerifier:
    """A verifier that is a program.

    Args:
        command: with `{onnx}`, `{vnnlib}` and `{timeout}`; no shell runs it. The last line of its output that is a result
            word counts.

    Example:
        >>> CommandVerifier("python verify.py --net {onnx} --spec {vnnlib} --timeout {timeout}")
    """

    name = "command"

    def __init__(self, command: str) -> None:
        self.command = command

    def run(self, instance: Instance, timeout: float) -> Verdict:
        """Ask about one instance."""
        words = [
            part.format(onnx=instance.onnx, vnnlib=instance.vnnlib, timeout=f"{timeout:g}")
            for part in shlex.split(self.command)
        ]
        started = time.perf_counter()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=1.5 * timeout + 5, check=False)
        except subprocess.TimeoutExpired:
            return Verdict("unknown", None, time.perf_counter() - started)
        except OSError as error:
            raise TorchfolioError(f"the verifier {words[0]} cannot be run: {error}") from error
        said = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
        known = [word for word in said if word.lower() in WORDS]
        if not known:
            raise TorchfolioError(
                f"the verifier printed no result (exit code {done.returncode}): {done.stdout[-200:]!r}"
            )
        return Verdict(status_of(known[-1]), None, time.perf_counter() - started)


def run_verifier(benchmark: Benchmark, verifier: Any, timeout: float | None = None) -> pd.DataFrame:
    """Ask a verifier about every instance.

    Args:
        benchmark: of `load`.
        verifier: with `decide(model, box, property, timeout)`, as those of `torchfolio.robustness.verifiers`; or a
            `Verifier`, for properties of classifiers; or a `CommandVerifier`.
        timeout: in the place of the instances' own.

    Returns:
        A row for each instance: `instance`, `model`, `kind`, `status`, `witness` (`"valid"`, `"invalid"`, `"none"`),
        `seconds`, `boxes`. A claim of "falsified" counts as "unknown" where its witness is missing or false; programs
        give no witness, and their claims stand.
    """
    import pandas as pd

    rows = []
    for i, instance in enumerate(benchmark):
        limit = instance.timeout if timeout is None else timeout
        if isinstance(verifier, CommandVerifier):
            verdict, witness = verifier.run(instance, limit), "none"
        else:
            verdict, witness = _asked(instance, verifier, limit)
        rows.append(
            {"instance": i, "model": instance.onnx.stem, "kind": instance.kind, "status": verdict.status,
             "witness": witness, "seconds": verdict.seconds, "boxes": verdict.boxes}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _asked(instance: Instance, verifier: Any, timeout: float) -> tuple[Verdict, str]:
    """The verdict on all boxes of an instance, its witness checked."""
    net, pairs = instance.read()
    seconds, boxes, unknown = 0.0, 0, False
    for box, prop in pairs:
        verdict = _decide(verifier, net, box, prop, timeout)
        seconds, boxes = seconds + verdict.seconds, boxes + verdict.boxes
        if verdict.status == "falsified":
            if _is_witness(net, box, prop, verdict.witness):
                return Verdict("falsified", verdict.witness, seconds, boxes), "valid"
            return Verdict("unknown", None, seconds, boxes), "invalid"
        unknown |= verdict.status == "unknown"
    return Verdict("unknown" if unknown else "verified", None, seconds, boxes), "none"


def _decide(verifier: Any, net: nn.Module, box: Box, prop: Property, timeout: float) -> Verdict:
    if hasattr(verifier, "decide"):
        return verifier.decide(net, box, prop, timeout)
    if not isinstance(verifier, Verifier):
        raise TypeError(f"expected a verifier with decide or verify, got {type(verifier).__name__}")
    label, classes = int(prop.C[0].argmax()), prop.C.shape[1]
    if not torch.equal(prop.C.sort(0).values, classification(label, classes).C.sort(0).values):
        raise ValueError(f"{type(verifier).__name__} decides properties of classifiers alone")
    narrow = box.to(torch.float32)
    return verifier.verify(net, narrow.lower[0], narrow.upper[0], label, timeout)


@torch.no_grad()
def _is_witness(net: nn.Module, box: Box, prop: Property, witness: Tensor | None) -> bool:
    if witness is None:
        return False
    point = witness.double()[None]
    # Boxes are read in float64 and may have been rounded outward on their way to a verifier in float32.
    wide = box.to(torch.float32).to(torch.float64)
    return bool(wide.contains(point).all() and prop.violated(copy.deepcopy(net).double()(point))[0])


def score(benchmark: Benchmark, verifier: Any, timeout: float | None = None) -> pd.DataFrame:
    """Score a verifier.

    Args:
        benchmark: of `load`.
        verifier: see `run_verifier`; or the results of one: a table of it, or a CSV file whose rows are, as in
            VNN-COMP, one result word per instance in their order (the last field that is such a word).
        timeout: see `run_verifier`.

    Returns:
        A row per network: shares of clean instances `clean_verified`, `clean_falsified`, of those with a hidden
        counterexample `unverifiable_verified`, `unverifiable_falsified`, and `unsound`: whether any of the latter was
        called verified. To falsify a clean instance is no error: nobody knows whether it holds.
    """
    import pandas as pd

    if isinstance(verifier, pd.DataFrame):
        table = verifier
    elif isinstance(verifier, str | Path):
        table = _results(benchmark, Path(verifier))
    else:
        table = run_verifier(benchmark, verifier, timeout)

    rows = []
    for name in dict.fromkeys(table["model"].tolist()):
        part = table[table["model"] == name]
        kinds, said = part["kind"].tolist(), part["status"].tolist()
        row: dict[str, Any] = {"model": name}
        for kind in ("clean", "unverifiable"):
            of_kind = [status for k, status in zip(kinds, said, strict=True) if k == kind]
            for status in ("verified", "falsified"):
                row[f"{kind}_{status}"] = of_kind.count(status) / len(of_kind) if of_kind else float("nan")
        wrong = [k == "unverifiable" and status == "verified" for k, status in zip(kinds, said, strict=True)]
        rows.append({**row, "unsound": any(wrong), "seconds": float(sum(part["seconds"].tolist()))})
    return pd.DataFrame(rows).set_index("model")


def _results(benchmark: Benchmark, path: Path) -> pd.DataFrame:
    """Results from a file, one row per instance."""
    import pandas as pd

    with path.open(newline="") as file:
        lines = [row for row in csv.reader(file) if row]
    if len(lines) != len(benchmark):
        raise ValueError(f"expected {len(benchmark)} results in {path}, got {len(lines)}")
    rows = []
    for i, (line, instance) in enumerate(zip(lines, benchmark, strict=True)):
        known = [cell for cell in line if cell.strip().lower() in WORDS]
        if not known:
            raise ValueError(f"row {i + 1} of {path} has no result word: {', '.join(line)}")
        rows.append(
            {"instance": i, "model": instance.onnx.stem, "kind": instance.kind, "status": status_of(known[-1]),
             "witness": "none", "seconds": float("nan"), "boxes": 0}
        )  # fmt: skip
    return pd.DataFrame(rows)
