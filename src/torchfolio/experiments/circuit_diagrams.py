"""Circuit diagrams of a gallery: do drawings count right, cost right, keep axes apart, turn back and differentiate?"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchfolio.errors import TorchfolioError
from torchfolio.insight.circuit_diagrams import Expression, check_svg, draw, ncd, op
from torchfolio.insight.circuit_diagrams.algebra import SignatureError
from torchfolio.measure import count_flops
from torchfolio.models import MLP, BasicBlock, ConvNet, UNet, ViT
from torchfolio.runs import Results, Run

SIZES = {"b": 2, "y": 5, "x": 7, "m": 32, "k": 8, "h": 4, "n": 32, "a": 3, "c": 6}
DERIVATIVES = ("linear", "elementwise", "softmax", "einsum", "conv", "add", "copy", "concat")


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        modules: names in `MODULES`; all by default.
        repeats: random inputs of every round trip.
    """

    modules: tuple[str, ...] = ()
    repeats: int = 3


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, m: int = 32, k: int = 8, h: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(m, m) for _ in range(4))
        self.shape = (k, h)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        q, k, v = (layer(t).unflatten(-1, self.shape) for layer, t in ((self.q, y), (self.k, x), (self.v, x)))
        score = torch.einsum("ykh,xkh->yxh", q, k) / self.shape[0] ** 0.5
        return self.o(torch.einsum("yxh,xkh->ykh", score.softmax(1), v).flatten(-2))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, for a batch."""

    def __init__(self, m: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(m, m) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        score = torch.einsum("byc,bxc->byx", self.q(x), self.k(x)).softmax(-1)
        return torch.einsum("byx,bxc->byc", score, self.v(x))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _convolutions() -> nn.Module:
    depthwise, dilated = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, dilation=2)
    return nn.Sequential(depthwise, dilated, nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2))


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "mlp": lambda: (MLP(64, 10, (32, 16)), (torch.rand(4, 64),)),
    "cross attention": lambda: (CrossAttention(), (torch.rand(5, 32), torch.rand(7, 32))),
    "self attention": lambda: (SelfAttention(), (torch.rand(2, 5, 16),)),
    "encoder layer": lambda: (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).train(), (torch.rand(2, 5, 16),)),
    "convolutions": lambda: (_convolutions(), (torch.rand(2, 4, 12, 12),)),
    "conv net": lambda: (ConvNet(10, 1, (8, 16)).eval(), (torch.rand(2, 1, 8, 8),)),
    "residual block": lambda: (BasicBlock(8, 8).train(), (torch.rand(2, 8, 8, 8),)),
    "u-net": lambda: (UNet(1, widths=(4, 8)).eval(), (torch.rand(2, 1, 8, 8),)),
    "vit": lambda: (ViT(8, 4, 10, 1, dim=16, depth=1, heads=2).eval(), (torch.rand(2, 1, 8, 8),)),
}  # fmt: skip


def _attention() -> Expression:
    scores = ncd("y k h, x k h -> y x h") @ op.scale(8**-0.5) @ op.softmax("x")
    return scores * op.identity("x k h") @ ncd("y x h, x k h -> y k h")


def _heads() -> Expression:
    own = {"m": 32, "k": 8, "h": 4}
    query = op.identity("y m") @ op.linear("m -> k h", name="Q", **own)
    both = op.linear("m -> k h", name="K", **own) * op.linear("m -> k h", name="V", **own)
    context = op.identity("x m") @ op.copy() @ both
    return query * context @ _attention() @ op.linear("k h -> n", bias=True, name="O", k=8, h=4, n=32)


def _residual() -> Expression:
    hidden = op.identity("a m") @ op.linear("m -> c", bias=True, m=32, c=6) @ op.elementwise("tanh")
    inner = hidden @ op.linear("c -> m", c=6, m=32) @ ncd("a m -> m a")
    return op.identity("a m") @ op.copy() @ (inner * op.identity("a m")) @ op.add()


EXPRESSIONS: dict[str, Callable[[], Expression]] = {
    "attention": _attention,
    "batched attention": lambda: _attention() >> "b",
    "cross attention": _heads,
    "residual": _residual,
}

SCALES = {
    "smoke": Settings(modules=("mlp", "cross attention", "residual block"), repeats=1),
    "quick": Settings(),
    "full": Settings(repeats=10),
}


def run(run: Run[Settings]) -> None:
    """Draw the gallery, count, price, run back and differentiate."""
    settings = run.settings
    chosen = settings.modules or tuple(MODULES)
    drawn = [run.arm(name, lambda name=name: module(name)) for name in chosen]
    composed = [run.arm(f"{name}, composed", lambda name=name: expression(run, name)) for name in EXPRESSIONS]
    memory = run.arm("memory", working_memory)
    apart = run.arm("axes", axes_apart)
    wrong = run.arm("wrong", wrong_diagrams)
    run.claim(
        "round_trip",
        {"largest_difference": max(a["round_trip"] for a in composed), "with_a_way_back": len(composed),
         "gallery": len(composed) + len(drawn)},
        "largest_difference <= 1e-5 and with_a_way_back == gallery",
    )  # fmt: skip
    every = [*drawn, *composed]
    run.claim(
        "counting",
        {"wrong_columns": sum(a["wrong_columns"] for a in every), "overlaps": sum(a["overlaps"] for a in every),
         "least_clear": min(a["clear"] for a in every), "other_bytes": sum(a["other_bytes"] for a in every)},
        "wrong_columns == 0 and overlaps == 0 and least_clear >= 0.98 and other_bytes == 0",
    )  # fmt: skip
    attention = next((a["flops"] for n, a in zip(chosen, drawn, strict=True) if n == "cross attention"), 53_632)
    run.claim(
        "cost",
        {
            "largest_difference": max(abs(a["flops"] - a["counted"]) for a in drawn),
            "cross_attention": attention,
            **memory,
        },
        "largest_difference == 0 and cross_attention == 53632 and abs(memory_read / memory_measured - 1) <= 0.1",
    )
    run.claim(
        "axis_identity", apart, "attention_names == 2 and batch_norm_takes_batch == 1 and layer_norm_takes_batch == 0"
    )
    run.claim(
        "backward",
        {"largest_difference": max(a["backward"] for a in composed), "operations": sum(k in KINDS for k in DERIVATIVES),
         "wanted": len(DERIVATIVES)},
        "largest_difference <= 1e-5 and operations == wanted",
    )  # fmt: skip
    run.claim("negative_control", wrong, all(v == 1 for v in wrong.values()))


KINDS = ("linear", "elementwise", "softmax", "einsum", "add", "copy")
"""Operations of expressions that have a derivative of their own."""


def _drawing_checked(drawing: Any, again: Any) -> dict[str, Any]:
    document = drawing.svg()
    found = check_svg(document)
    return {
        "wrong_columns": sum(not c.agrees for c in found.columns), "overlaps": len(found.overlaps),
        "clear": 1 - len(found.through) / max(1, found.wires), "other_bytes": int(document != again.svg()),
        "columns": len(drawing.sheet.columns),
    }  # fmt: skip


def module(name: str) -> dict[str, Any]:
    """A module of the gallery: its drawing counted, and its cost against torch's counter."""
    net, args = MODULES[name]()
    started = time.perf_counter()
    drawing = draw(net, args, level="full")
    drawing.svg()
    seconds = time.perf_counter() - started
    found = _drawing_checked(drawing, draw(net, args, level="full"))
    counted = count_flops(net, *args)
    return {**found, "flops": drawing.cost().total(), "counted": counted, "seconds": seconds}


def expression(run: Run[Settings], name: str) -> dict[str, Any]:
    """An expression: run as source, differentiated by its own rules, drawn."""
    net = EXPRESSIONS[name]().double()
    space: dict[str, Any] = {}
    exec(net.to_source("f"), space)
    away, back = 0.0, 0.0
    for k in range(run.settings.repeats):
        sizes = {**SIZES, "y": 5 + k, "x": 7 + 2 * k}
        inputs = [torch.randn([sizes[a] for a in axes], dtype=torch.float64) for axes in net.inputs]
        output = net(*inputs)
        away = max(away, float((space["f"](*inputs, **net.source_weights()) - output).abs().max()))
        back = max(back, _derivative_difference(net, inputs))
    return {**_drawing_checked(net.drawing(**SIZES), net.drawing(**SIZES)), "round_trip": away, "backward": back}


def _derivative_difference(net: Expression, inputs: Sequence[Tensor]) -> float:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = net(*leaves)
    cotangent = torch.randn_like(output)
    weights = net.source_weights()
    wanted = torch.autograd.grad(output, [*leaves, *weights.values()], cotangent)
    found, own = net.backward()(inputs, [cotangent])
    pairs = zip([*found, *(own[k] for k in weights)], wanted, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class _Live(TorchDispatchMode):
    """Bytes of an input and of the results that are alive, and their peak; views and weights do not count."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = x.nbytes
        self.known = {t.untyped_storage()._cdata for t in (x, *weights)}
        weakref.finalize(x, self._gone, x.nbytes, x.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.known:
            storage = made.untyped_storage()
            size, key = storage.nbytes(), storage._cdata
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(made, self._gone, size, key)
        return made

    def _gone(self, size: int, key: int) -> None:
        self.now -= size
        self.known.discard(key)


def working_memory() -> dict[str, float]:
    """Peak of a chain of layers, as read and as it is."""
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 200), nn.Tanh(), nn.Linear(200, 10))
    weights = [p.detach() for p in net.parameters()]
    x = torch.rand(32, 64)
    with torch.no_grad(), _Live(x, weights) as live:
        y = nn.functional.linear(x, weights[0], weights[1])
        del x
        y = torch.relu(y)
        y = nn.functional.linear(y, weights[2], weights[3])
        y = torch.tanh(y)
        y = nn.functional.linear(y, weights[4], weights[5])
    return {
        "memory_read": 4.0 * draw(net, torch.rand(32, 64)).cost().working_peak(),
        "memory_measured": float(live.peak),
    }


def axes_apart() -> dict[str, int]:
    """Names of the axes of the scores of self-attention; whether norms take the batch axis in."""
    drawing = draw(SelfAttention(), torch.rand(2, 5, 16), names=["b x m"])
    steps = [s for column in drawing.sheet.columns for s in column]
    softmax = next(s for s in steps if s.kind == "softmax")
    batch = softmax.in_wires[0].axis
    names = {"".join(p.text for p in w.label) for w in softmax.in_wires if w.axis != batch}

    def takes_batch(norm: nn.Module, x: Tensor) -> int:
        sheet = draw(norm, x).sheet
        step = next(s for column in sheet.columns for s in column if s.kind == "norm")
        return int(sheet.levels[0][0].wires[0].axis in step.core)

    return {
        "attention_names": len(names),
        "batch_norm_takes_batch": takes_batch(nn.Sequential(nn.BatchNorm1d(6)).train(), torch.rand(4, 6)),
        "layer_norm_takes_batch": takes_batch(nn.Sequential(nn.LayerNorm(6)), torch.rand(4, 6)),
    }


def wrong_diagrams() -> dict[str, int]:
    """Swapped letters, control flow that depends on values, operations that do not fit: told, or not."""
    right, swapped = ncd("y k h, x k h -> y x h"), ncd("y k h, x k h -> x y h")
    sizes = {"y": 5, "x": 5, "k": 8, "h": 4}
    found = {
        "swap_unequal": int(not right.equals(swapped)),
        "swap_drawn_otherwise": int(right.drawing(**sizes).svg() != swapped.drawing(**sizes).svg()),
    }
    refusals: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "branching_refused": (TorchfolioError, lambda: draw(Branching(), torch.rand(3))),
        "mismatch_refused": (SignatureError, lambda: ncd("a b -> a b") @ op.softmax("x")),
    }
    for name, (kind, call) in refusals.items():
        try:
            call()
            found[name] = 0
        except kind:
            found[name] = 1
    return found


def figures(results: Results) -> dict[str, Figure]:
    """Time to a drawing, and columns of the gallery."""
    names = results.settings.modules or tuple(MODULES)
    seconds = [results.values(name, "seconds").mean() for name in names]
    columns = [results.values(name, "columns")[0] for name in names]
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    place = np.arange(len(names))
    ax.barh(place, seconds)
    for y, s, c in zip(place.tolist(), seconds, columns, strict=True):
        ax.text(float(s), y, f" {int(c)} columns", va="center", fontsize=8)
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    ax.set(xlabel="seconds to trace, lay out and draw", xlim=(0, 1.25 * max(seconds)))
    return {"gallery": fig}
