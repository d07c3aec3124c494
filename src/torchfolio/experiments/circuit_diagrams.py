"""Circuit diagrams of a gallery: do drawings count right, cost right, keep axes apart, turn back and differentiate?"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchfolio.diagrams import Drawing, Expression, check_svg, draw, ncd, op
from torchfolio.diagrams.algebra import SignatureError
from torchfolio.diagrams.graph import Graph
from torchfolio.errors import TorchfolioError
from torchfolio.measure import count_flops
from torchfolio.models import MLP, BasicBlock, ConvNet, UNet, ViT
from torchfolio.runs import Results, Run

SIZES = {"b": 2, "y": 5, "x": 7, "m": 32, "k": 8, "h": 4, "n": 32, "a": 3, "c": 6, "p": 8, "q": 6}
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


class Attention(nn.Module):
    """Scaled dot-product attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Recurrent(nn.Module):
    """A gated cell, run over three steps: half of what it remembers is kept, half comes from the input."""

    def __init__(self, m: int = 6, n: int = 8) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(m + n, n), nn.Linear(m + n, n)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        for word in x.unbind(1):
            both = torch.cat([word, state], -1)
            gate = self.gate(both).sigmoid()
            state = gate * state + (1 - gate) * self.new(both).tanh()
        return state


@dataclass(frozen=True)
class Piece:
    """A module of the gallery.

    Attributes:
        make: the module.
        inputs: names of the axes of each input.
        sizes: of the axes.
        other: other sizes of those axes that may vary.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    sizes: dict[str, int]
    other: dict[str, int]

    def tensors(self, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        known = {**self.sizes, **sizes}
        return tuple(torch.randn([known[a] for a in axes.split()]) for axes in self.inputs)

    def varied(self) -> list[dict[str, int]]:
        """No other size, each one by itself, and all."""
        return [{}, *({a: n} for a, n in self.other.items()), self.other]


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True).train()


IMAGE = {"b": 3, "h": 12, "w": 16}
MODULES: dict[str, Piece] = {
    "mlp": Piece(lambda: MLP(64, 10, (32, 16)), ("b m",), {"b": 4, "m": 64}, {"b": 7}),
    "attention": Piece(Attention, ("b y k", "b x k", "b x k"), {"b": 2, "y": 5, "x": 7, "k": 8},
                       {"b": 3, "y": 6, "x": 4, "k": 5}),
    "cross attention": Piece(CrossAttention, ("y m", "x m"), {"y": 5, "x": 7, "m": 32}, {"y": 6, "x": 3}),
    "self attention": Piece(SelfAttention, ("b x m",), {"b": 2, "x": 5, "m": 16}, {"b": 3, "x": 9}),
    "encoder layer": Piece(_encoder, ("b x m",), {"b": 2, "x": 5, "m": 16}, {"b": 3, "x": 7}),
    "convolutions": Piece(_convolutions, ("b c h w",), {"b": 2, "c": 4, "h": 12, "w": 12}, {"b": 3, "h": 16, "w": 14}),
    "conv net": Piece(lambda: ConvNet(10, 1, (8, 16)).eval(), ("b c h w",), {"b": 2, "c": 1, "h": 8, "w": 8}, {"b": 3}),
    "residual block": Piece(lambda: BasicBlock(8, 8).train(), ("b c h w",), {"b": 2, "c": 8, "h": 8, "w": 8}, IMAGE),
    "u-net": Piece(lambda: UNet(1, widths=(4, 8)).eval(), ("b c h w",), {"b": 2, "c": 1, "h": 8, "w": 8}, IMAGE),
    "vit": Piece(lambda: ViT(8, 4, 10, 1, dim=16, depth=1, heads=2).eval(), ("b c h w",),
                 {"b": 2, "c": 1, "h": 8, "w": 8}, {"b": 3}),
    "recurrent cell": Piece(Recurrent, ("b t m", "b n"), {"b": 2, "t": 3, "m": 6, "n": 8}, {"b": 5}),
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


def _branches() -> Expression:
    down = op.conv("c p q -> n i j", kernel=3, stride=2, padding=1, bias=True, c=6, n=4)
    back = op.conv("n i j -> e p q", kernel=4, stride=2, padding=1, transposed=True, n=4, e=2)
    same = op.conv("c p q -> d p q", kernel=3, padding=1, groups=2, c=6, d=2)
    both = (op.identity("c p q") @ down @ back) * (op.identity("c p q") @ same)
    return op.identity("c p q") @ op.copy() @ both @ op.concat("e, d -> f") @ op.elementwise("tanh")


def _residual() -> Expression:
    hidden = op.identity("a m") @ op.linear("m -> c", bias=True, m=32, c=6) @ op.elementwise("tanh")
    inner = hidden @ op.linear("c -> m", c=6, m=32) @ ncd("a m -> m a")
    return op.identity("a m") @ op.copy() @ (inner * op.identity("a m")) @ op.add()


EXPRESSIONS: dict[str, Callable[[], Expression]] = {
    "attention": _attention,
    "batched attention": lambda: _attention() >> "b",
    "cross attention": _heads,
    "residual": _residual,
    "branches": lambda: _branches() >> "b",
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
    drawn = [run.arm(name, lambda name=name: module(run, name)) for name in chosen]
    composed = [run.arm(f"{name}, composed", lambda name=name: expression(run, name)) for name in EXPRESSIONS]
    memory = run.arm("memory", working_memory)
    apart = run.arm("axes", axes_apart)
    diagonal = run.arm("diagonal", derivative_of_a_map)
    wrong = run.arm("wrong", wrong_diagrams)
    every = [*drawn, *composed]
    run.values(
        "round_trip",
        {"largest_difference": max(a["round_trip"] for a in every), "other_sizes": max(a["other_sizes"] for a in every),
         "source": max(a["source"] for a in every)},
    )  # fmt: skip
    run.values(
        "counting",
        {"wrong_columns": sum(a["wrong_columns"] for a in every), "overlaps": sum(a["overlaps"] for a in every),
         "least_clear": min(a["clear"] for a in every), "other_bytes": sum(a["other_bytes"] for a in every)},
    )  # fmt: skip
    attention = next((a["flops"] for n, a in zip(chosen, drawn, strict=True) if n == "cross attention"), 53_632)
    run.values(
        "cost",
        {
            "largest_difference": max(abs(a["flops"] - a["counted"]) for a in drawn),
            "cross_attention": attention,
            **memory,
        },
    )
    run.values("axis_identity", apart)
    ruled = {kind for kind in DERIVATIVES if any(a[f"rule: {kind}"] for a in every)}
    run.values(
        "backward",
        {"largest_difference": max(a["backward"] for a in every), "operations": len(ruled), "wanted": len(DERIVATIVES),
         **diagonal},
    )  # fmt: skip
    run.values("negative_control", wrong)


def _drawing_checked(drawing: Drawing, again: Drawing) -> dict[str, Any]:
    document = drawing.svg()
    found = check_svg(document)
    return {
        "wrong_columns": sum(not c.agrees for c in found.columns), "overlaps": len(found.overlaps),
        "clear": 1 - len(found.through) / max(1, found.wires), "other_bytes": int(document != again.svg()),
        "columns": len(drawing.sheet.columns),
    }  # fmt: skip


def module(run: Run[Settings], name: str) -> dict[str, Any]:
    """A module of the gallery: counted, priced against torch's counter, run back, differentiated."""
    piece = MODULES[name]
    net, args = piece.make(), piece.tensors()
    started = time.perf_counter()
    drawing = draw(net, args, level="full", names=piece.inputs)
    drawing.svg()
    seconds = time.perf_counter() - started
    found = _drawing_checked(drawing, draw(net, args, level="full", names=piece.inputs))
    counted = count_flops(net, *args)
    varying = draw(net, args, names=piece.inputs, dynamic=list(piece.other))
    inputs = [[piece.tensors(**sizes) for sizes in piece.varied()] for _ in range(run.settings.repeats)]
    found |= _round_trip(net, varying, inputs)
    exact = net.double()
    doubled = [[tuple(t.double() for t in given) for given in row] for row in inputs]
    found |= _backward(exact, draw(exact, doubled[0][0], names=piece.inputs, dynamic=list(piece.other)), doubled)
    return {**found, "flops": drawing.cost().total(), "counted": counted, "seconds": seconds}


def expression(run: Run[Settings], name: str) -> dict[str, Any]:
    """An expression: written out, differentiated by its own rules, drawn."""
    net = EXPRESSIONS[name]().double()
    inputs = []
    for k in range(run.settings.repeats):
        sizes = [SIZES, {**SIZES, "y": 6 + k, "x": 8 + 2 * k, "b": 3 + k, "p": 10 + 2 * k, "q": 12 + 2 * k}]
        inputs.append(
            [tuple(torch.randn([s[a] for a in axes], dtype=torch.float64) for axes in net.inputs) for s in sizes]
        )
    drawing = net.drawing(**_sizes(net))
    found = _drawing_checked(drawing, net.drawing(**_sizes(net)))
    return found | _round_trip(net, drawing, inputs) | _backward(net, drawing, inputs)


def _sizes(net: Expression) -> dict[str, int]:
    return {a: SIZES[a] for axes in net.inputs for a in axes}


def _round_trip(net: nn.Module, drawing: Drawing, inputs: Sequence[Sequence[tuple[Tensor, ...]]]) -> dict[str, float]:
    """Largest differences of a module and what was made of its drawing: of the first sizes, of others, and of the source."""
    back, space = drawing.to_module(), dict[str, Any]()
    exec(drawing.to_source("f"), space)
    weights = {"weights": net.state_dict()} if "weights[" in back.source else {}
    same = other = source = 0.0
    with torch.no_grad():
        for row in inputs:
            for k, given in enumerate(row):
                wanted = net(*given)
                difference = float((back(*given) - wanted).abs().max())
                same, other = (max(same, difference), other) if k == 0 else (same, max(other, difference))
                source = max(source, float((space["f"](*given, **weights) - wanted).abs().max()))
    return {"round_trip": same, "other_sizes": other, "source": source}


def _backward(net: nn.Module, drawing: Drawing, inputs: Sequence[Sequence[tuple[Tensor, ...]]]) -> dict[str, Any]:
    """Largest difference of the gradients of the backward drawing and those of autograd; operations with a rule of their own."""
    backward, largest = drawing.backward(), 0.0
    for given in (given for row in inputs for given in row):
        leaves = [x.clone().requires_grad_() for x in given]
        output = net(*leaves)
        cotangent = torch.randn_like(output)
        weights = dict(net.named_parameters())
        wanted = torch.autograd.grad(output, [*leaves, *weights.values()], cotangent)
        found, own = backward.gradients(given, [cotangent])
        pairs = zip([*found, *(own[k] for k in weights)], wanted, strict=True)
        largest = max(largest, *(float((a - b).abs().max()) for a, b in pairs if a is not None))
    return {"backward": largest, **_ruled(drawing.graph, {s.kind for s in backward.graph.steps})}


def _ruled(graph: Graph, kinds: set[str]) -> dict[str, bool]:
    """Which operations a graph has whose backward pass is not a plain box."""
    steps = graph.alive()
    uses = Counter(id(v.root) for v in [*(v for s in steps for v in s.inputs), *graph.outputs])
    has = {s.kind for s in steps if f"{s.kind}′" not in kinds}
    has |= (
        {"add"}
        if any(s.kind == "binary" and s.params.get("what") == "add" for s in steps) and "binary" in has
        else set()
    )
    has |= {"copy"} if max(uses.values(), default=0) > 1 else set()
    return {f"rule: {kind}": kind in has for kind in DERIVATIVES}


def derivative_of_a_map() -> dict[str, int]:
    """Terms by which the cost of the derivative of a map of numbers differs from that of the map itself."""
    drawing = draw(nn.Tanh(), torch.rand(2, 5, 16))
    there, back = (sum(d.cost().operations, sympy.Integer(0)) for d in (drawing, drawing.backward()))
    difference = sympy.expand(there - back)
    return {"cross_terms": 0 if difference == 0 else len(sympy.Add.make_args(difference))}


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
    unwoven = draw(SelfAttention(), torch.rand(2, 5, 16))
    for step in unwoven.graph.steps:
        step.weave = set()
    refusals["weave_needed"] = (TorchfolioError, unwoven.to_module)
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
