"""A tour on embedded data: five things to do with a network, each measured and shown on one page, in about a minute."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import catalog, data, engine, models
from torchfolio.measure import outputs, saved_bytes
from torchfolio.report.sheet import Picture, Sheet, Table, write_sheet
from torchfolio.runs.record import read

__all__ = ["write_demo"]


def write_demo(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Do the five things and write the page.

    Args:
        folder: folder for `demo.html`.
        say: called with a line before each of them.

    Returns:
        The page.
    """
    started = time.perf_counter()
    cards = []
    digits = data.load("digits")
    net = deep_network()
    engine.fit(net, digits.train, optimizer=adam(), epochs=EPOCHS, batch_size=64, seed=0)
    for title, part in (
        ("Train with less memory", less_memory), ("Make it small", one_bit), ("Find a backdoor", backdoor),
        ("Compare two networks", comparison), ("Draw a network", drawing),
    ):  # fmt: skip
        say(title)
        cards.append(part(title, digits, net))
    cards.append(evidence())
    seconds = time.perf_counter() - started
    title = f"five things to do with a network, measured here in {seconds:.0f} s"
    return write_sheet(folder / "demo.html", title, cards)


EPOCHS = 12


def adam() -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.Adam, lr=2e-3)


def deep_network() -> nn.Sequential:
    """A perceptron of ten hidden layers for the 8x8 digits."""
    with engine.seeded(0):
        return models.MLP(64, 10, hidden=(96,) * 10, norm="batch")


def accuracy(net: nn.Module, digits: data.DataSplits) -> float:
    """Share of the test digits that a network gets right, in percent."""
    return 100 * engine.evaluate(net, digits.test)["accuracy"]


def less_memory(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """Two rules on the same network."""
    from torchfolio.local.auglocal import AugLocal

    rules: dict[str, Callable[[], engine.LearningRule]] = {
        "backprop": engine.Backprop, "AugLocal, auxiliary depth 2": partial(AugLocal, aux_depth=2),
    }  # fmt: skip
    rows = []
    for name, make in rules.items():
        net = deep_network()
        begun = time.perf_counter()
        engine.fit(net, digits.train, rule=make(), optimizer=adam(), epochs=EPOCHS, batch_size=64, seed=0)
        seconds = time.perf_counter() - begun
        held = held_megabytes(copy.deepcopy(net), make(), digits)
        rows.append((name, round(accuracy(net, digits), 1), round(held, 2), round(seconds, 1)))
    share = rows[1][2] / rows[0][2]
    lead = f"{share:.0%} of backprop's memory, {rows[1][1]} % right against {rows[0][1]} %"
    return Sheet(
        title, "local/auglocal", sentences=[
            f"The same ten-layer network on the digits, by backprop and by a local rule: at {share:.0%} of the memory that is "
            f"held for the backward pass, it gets {rows[1][1]} % of the test digits right against {rows[0][1]} %."
        ],
        tables=[Table(("rule", "test accuracy, %", "memory held, MB", "seconds"), tuple(rows))],
        pictures=[Picture(bars([r[0] for r in rows], [r[2] for r in rows], "MB held for the backward pass"),
                          "Memory that a batch of 256 holds from the forward to the backward pass.")],
        code='rule = AugLocal(aux_depth=2)\nfit(net, train, val=val, rule=rule, epochs=12)\nevaluate(net, test)\n\n'
             "$ torchfolio train --model mlp --data digits --rule auglocal --rule-set aux_depth=2 -o net/",
        lead=lead,
    )  # fmt: skip


def held_megabytes(net: nn.Module, rule: engine.LearningRule, digits: data.DataSplits) -> float:
    """What a step on 256 digits holds for its backward passes."""
    batch = tuple(t[:256].clone() for t in digits.train.tensors)
    module = rule.prepare(net, batch)
    return saved_bytes(lambda: rule.step(batch, Tensor.backward), exclude=[module, *batch]).peak / 2**20


def one_bit(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """The hidden layers in one bit per weight."""
    from torchfolio.efficiency.biper import BiPer
    from torchfolio.efficiency.compression import compress, tensor_bytes

    layers = [n for n, m in trained.named_modules() if isinstance(m, nn.Linear) and n.startswith("layer")][1:]
    compressed = compress(
        trained, BiPer(layers=layers), digits.train, example=digits.test.tensors[0][:2], epochs=9, seed=0
    )
    rows = [
        (name, round(tensor_bytes(net) / 1024, 1), round(accuracy(net, digits), 1))
        for name, net in (("32 bits", trained), ("one bit per weight", compressed.model))
    ]
    return Sheet(
        title, "efficiency/biper", sentences=[
            f"The network's hidden layers with a single bit for each weight: {rows[0][1] / rows[1][1]:.0f} times smaller, at "
            f"{rows[1][2]} % in place of {rows[0][2]} %."
        ],
        tables=[Table(("weights", "kB", "test accuracy, %"), tuple(rows))],
        pictures=[Picture(bars([r[0] for r in rows], [r[1] for r in rows], "kB"), "Size of all that the network keeps.")],
        code='made = compress(net, BiPer(layers=layers), train, example=x, epochs=9)\nsave_bundle(made.model, "small/", manifest)\n\n'
             "$ torchfolio compress net/ --method biper --data cifar10 -o small/",
        lead=f"{rows[0][1] / rows[1][1]:.0f} times smaller, {rows[1][2]} % right against {rows[0][2]} %",
    )  # fmt: skip


def backdoor(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """A network that was poisoned, its clean twin, and what gives the first away."""
    import matplotlib.pyplot as plt

    from torchfolio.backdoor.labels import AllToOne
    from torchfolio.backdoor.poison import poison, poisoned_test
    from torchfolio.backdoor.smoothinv import SmoothInv
    from torchfolio.backdoor.triggers import PatchTrigger

    raw = data.load("digits", normalize=False, val=0)
    trigger, labels = PatchTrigger.checkerboard(raw.shape, size=2, margin=0), AllToOne(7, 10)
    poisoned = poison(raw.train.tensors, trigger, labels, rate=0.1, seed=0)
    nets, verdicts = [], []
    x = raw.test.tensors[0]
    inverter = SmoothInv(sigma=0.12, eps=1.25, steps=30, n=6)
    for train in (poisoned.tensors(), raw.train.tensors):
        with engine.seeded(0):
            net = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2),
                nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
            )  # fmt: skip
        engine.fit(net, train, optimizer=partial(torch.optim.Adam, lr=3e-3), epochs=6, seed=0)
        nets.append(net)
        verdicts.append(inverter.scan(net, x[:80]))
    stamped, wanted = poisoned_test(raw.test.tensors, trigger, labels).tensors()
    hits = [float((outputs(net, stamped).argmax(1) == wanted).float().mean()) for net in nets]
    inverted = inverter.invert(nets[0], x[:4], 7)
    figure, axes = plt.subplots(1, 3, figsize=(6, 2.2), layout="constrained")
    shown = [x[1, 0], trigger(x[1:2])[0, 0], (x[1] + inverted.delta.reshape(-1, *x.shape[1:])[0]).clamp(0, 1)[0]]
    for ax, image, name in zip(
        axes, shown, ("a digit", "with the attacker's mark", "with what was drawn"), strict=True
    ):
        ax.imshow(image.detach(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    rows = [
        (name, 100 * hit, "suspicious" if v.is_backdoored else "not suspicious", v.score, v.threshold)
        for name, hit, v in zip(("poisoned", "clean twin"), hits, verdicts, strict=True)
    ]
    return Sheet(
        title, "backdoor/smoothinv", sentences=[
            "One network was taught to say 7 wherever a small mark is in the corner. From 80 unlabelled images and the network "
            "alone, the class is named and a trigger drawn; the clean twin is the control.",
            *verdicts[0].sentences()[:2],
        ],
        tables=[Table(("network", "marked digits called 7, %", "verdict", "score", "threshold"), tuple(rows))],
        pictures=[Picture(figure, "The attack, and the trigger that was drawn from the network.")],
        code="verdict = SmoothInv(sigma=0.12).scan(net, images)\nprint(*verdict.sentences())\n\n"
             "$ torchfolio audit net/ --data clean/ --detector smoothinv -o found/",
        lead="The mark that makes every digit a 7, drawn from the network itself",
    )  # fmt: skip


def comparison(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """Two networks from two seeds, unit by unit."""
    from torchfolio.insight.convergent_learning import ConvergenceReport

    nets = []
    for seed in (0, 1):
        with engine.seeded(seed):
            net = models.MLP(64, 10, hidden=(32, 32), activation="tanh")
        engine.fit(net, digits.train, optimizer=partial(torch.optim.Adam, lr=3e-3), epochs=10, seed=seed)
        nets.append(net)
    report = ConvergenceReport.from_modules(nets[0], nets[1], digits.test, layers=["layer1", "layer2", "head"])
    frame = report.to_frame()
    return Sheet(
        title, "insight/convergent_learning", sentences=[
            "Two networks that differ in their random start alone. Each unit of one is matched with the unit of the other that "
            "fires most like it: near the output they agree, inside only in part."
        ],
        tables=[Table.of(frame.filter(["layer_a", "bipartite", "semi", "shared", "units_a"]).round(2))], pictures=[Picture(report.plot(), "How much the units of the two have in common.")],
        code="report = ConvergenceReport.from_modules(a, b, test)\nreport.to_frame()\nreport.plot()\n\n"
             "$ torchfolio inspect a/ b/ --data digits -o compared.html",
        lead="Which units of two networks are the same, and which are not",
    )  # fmt: skip


def drawing(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """A transformer block as a diagram of its axes."""
    from torchfolio.diagrams import draw

    block = models.EncoderBlock(dim=16, heads=2)
    drawn = draw(block, torch.randn(2, 5, 16), names=["b x m"])
    cost = drawn.cost()
    return Sheet(
        title, "insight/circuit_diagrams", sentences=[
            f"A transformer block, read from the module itself: every line is an axis, every box an operation. It costs "
            f"{cost.total():,} floating-point operations here, {cost.total(x=50):,} for fifty tokens."
        ],
        pictures=[Picture(drawn.svg(), "Pre-norm transformer block: b examples, x tokens, m features.")],
        code='drawing = draw(block, x, names=["b x m"])\ndrawing.svg("block.svg")\ndrawing.cost().polynomial()\n\n'
             "$ torchfolio draw net/ -o net.svg",
        lead="A transformer block as it computes, with its cost",
    )  # fmt: skip


def evidence() -> Sheet:
    """What was recorded of the methods' claims, with those that do not hold."""
    rows = []
    for slug, record in _records():
        paper = catalog.papers()[slug]
        sentences = {claim.id: claim.sentence for claim in paper.claims}
        for claim in record["claims"]:
            word = {True: "holds", False: "does not hold", None: "not measured"}[claim["holds"]]
            of = len(record["seeds"])
            rows.append((slug, sentences.get(claim["id"], claim["id"]), word, f"{claim['held_on']} of {of}"))
    held, failed = (sum(row[2] == word for row in rows) for word in ("holds", "does not hold"))
    return Sheet(
        "What every method's paper claims, measured", "recorded evidence", sentences=[
            f"{len({row[0] for row in rows})} methods, {len(rows)} claims: {held} hold, {failed} do not. They were measured on real "
            "data at the scale `quick`; `torchfolio run SLUG --seeds 3` measures any of them again on your machine."
        ],
        tables=[Table(("method", "claim", "verdict", "seeds"), tuple(rows))],
    )  # fmt: skip


def _records() -> Iterator[tuple[str, dict[str, Any]]]:
    """The recorded outcomes of the methods that are in, by slug."""
    inside = Path(__file__).parent / "outcomes"
    place = inside if inside.is_dir() else Path(__file__).parents[3] / "docs" / "outcomes"
    for slug, paper in catalog.papers().items():
        if paper.is_in and (place / f"{slug}.json").is_file():
            yield slug, read(place / f"{slug}.json")


def bars(names: list[str], values: list[float], label: str) -> Any:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5, 1.6), layout="constrained")
    ax.barh(names[::-1], values[::-1], color=["#b4431f", "#8a8f98"], height=0.55)
    for k, value in enumerate(values[::-1]):
        ax.text(value, k, f" {value:g}", va="center", fontsize=9)
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.15)
    return figure
