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
from torchfolio.report.sheet import Bars, Code, Glance, Picture, Sheet, Squares, Table, write_sheet
from torchfolio.runs.record import read

__all__ = ["write_demo"]


def write_demo(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Do the five things and write the page.

    Args:
        folder: folder for `demo.html`.
        say: function that is called with a line before each of them.

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
    title = f"five things to do with a network, measured on this machine in {seconds:.0f} s"
    return write_sheet(folder / "demo.html", title, cards)


EPOCHS = 12


def adam() -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.Adam, lr=2e-3)


def deep_network() -> nn.Sequential:
    """A perceptron of ten hidden layers for the 8x8 digits."""
    with engine.seeded(0):
        return models.MLP(64, 10, hidden=(96,) * 10, norm="batch")


def convolutions() -> nn.Sequential:
    """Two convolutions and a head for the 8x8 digits."""
    with engine.seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2),
            nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip


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
    share = f"{100 * rows[1][2] / rows[0][2]:.0f} %"
    held_by_rule = Picture(Bars({row[0]: row[2] for row in rows}, "MB"),
                           "Memory that a batch of 256 holds from the forward to the backward pass.")  # fmt: skip
    return Sheet(
        title, "local/auglocal", sentences=[
            "The same network of ten layers learns the digits twice: by backprop, and by a rule that gives every layer a loss "
            f"of its own. The second holds {share} of the memory for its backward passes and gets {rows[1][1]} % of the test "
            f"digits right; backprop gets {rows[0][1]} %."
        ],
        tables=[Table(("rule", "test accuracy, %", "memory held, MB", "seconds"), tuple(rows))],
        code=Code(
            "from torchfolio import data, models\nfrom torchfolio.engine import evaluate, fit\n"
            "from torchfolio.engine.recipes import adam\nfrom torchfolio.local import AugLocal\n\n"
            'digits = data.load("digits")\ntrain, test = digits.train, digits.test\n'
            'net = models.MLP(64, 10, hidden=(96,) * 10, norm="batch")',
            "rule = AugLocal(aux_depth=2)\nfit(net, train, rule=rule, optimizer=adam(2e-3), epochs=12)\nevaluate(net, test)",
            "torchfolio train --model convnet --data digits --epochs 5 --rule auglocal --rule-set aux_depth=1 -o net/",
        ),
        glance=Glance(share, f"of backprop's memory, {rows[1][1]}\u00a0% right against {rows[0][1]}\u00a0%", held_by_rule),
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
    smaller = f"{rows[0][1] / rows[1][1]:.1f} times"
    sizes = Picture(Bars({row[0]: row[1] for row in rows}, "kB"), "Size of all that the network keeps.")
    return Sheet(
        title, "efficiency/biper", sentences=[
            f"The same network with a single bit for each weight of its hidden layers: {smaller} smaller, and it gets "
            f"{rows[1][2]} % right in place of {rows[0][2]} %. The first layer, the last and the norms stay as they are."
        ],
        tables=[Table(("weights", "kB", "test accuracy, %"), tuple(rows))],
        code=Code(
            "from torchfolio.efficiency import BiPer\n"
            "from torchfolio.efficiency.compression import compress, tensor_bytes\n\n"
            'x = test.tensors[0][:2]\nhidden = [f"layer{k}.0" for k in range(2, 11)]',
            "method = BiPer(layers=hidden)\nsmall = compress(net, method, train, example=x).model\n"
            "tensor_bytes(small), evaluate(small, test)",
            "torchfolio compress net/ --method biper --data digits -o small/",
        ),
        glance=Glance(smaller, f"smaller, {rows[1][2]}\u00a0% right against {rows[0][2]}\u00a0%", sizes),
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
        net = convolutions()
        engine.fit(net, train, optimizer=partial(torch.optim.Adam, lr=3e-3), epochs=6, seed=0)
        nets.append(net)
        verdicts.append(inverter.scan(net, x[:80]))
    stamped, wanted = poisoned_test(raw.test.tensors, trigger, labels).tensors()
    hits = [float((outputs(net, stamped).argmax(1) == wanted).float().mean()) for net in nets]
    inverted = inverter.invert(nets[0], x[:4], 7)
    figure, axes = plt.subplots(1, 3, figsize=(4.6, 1.75), layout="constrained")
    shown = [x[1, 0], trigger(x[1:2])[0, 0], (x[1] + inverted.delta.reshape(-1, *x.shape[1:])[0]).clamp(0, 1)[0]]
    for ax, image, name in zip(axes, shown, ("a digit", "attacker's mark", "found again"), strict=True):
        ax.imshow(image.detach(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(name, fontsize=11)
        ax.axis("off")
    attack = Picture(figure, "A digit, the same with the attacker's mark, and with the trigger drawn from the network.")
    rows = [
        (
            name,
            round(100 * hit, 1),
            "suspicious" if v.is_backdoored else "not suspicious",
            round(v.score, 1),
            v.threshold,
        )
        for name, hit, v in zip(("poisoned", "clean twin"), hits, verdicts, strict=True)
    ]
    return Sheet(
        title, "backdoor/smoothinv", sentences=[
            "One network was taught to say 7 wherever a small mark is in the corner. From 80 unlabelled images and the network "
            "alone, the class is named and a trigger drawn; the clean twin is the control.",
            *verdicts[0].sentences()[:2],
        ],
        tables=[Table(("network", "marked digits called 7, %", "verdict", "score", "threshold"), tuple(rows))],
        pictures=[attack],
        code=Code(
            "from torchfolio import data\nfrom torchfolio.backdoor import SmoothInv\n\n"
            'images = data.load("digits", normalize=False).test.tensors[0][:80]  # clean ones; no label is needed',
            "detector = SmoothInv(0.12, eps=1.25, steps=30, n=6)\nverdict = detector.scan(net, images)\n"
            "print(*verdict.sentences())",
            "torchfolio audit net/ --data digits --detector smoothinv --set steps=30 -o found/",
        ),
        glance=Glance(
            rows[0][2], f"and its clean twin {rows[1][2]}, told from 80 clean images",
            attack,
        ),
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
    columns = {"layer_a": "layer", "units_a": "units", "bipartite": "correlation, matched one to one",
               "semi": "with the best partner", "shared": "units that share a partner"}  # fmt: skip
    first = report["layer1"]
    alike = f"{first.match.above(0.5) * len(first.match):.0f} of {len(first.match)}"
    return Sheet(
        title, "insight/convergent_learning", sentences=[
            "Two networks that differ in their random start alone. Each unit of one is matched with the unit of the other that "
            "fires most like it: near the output they agree, inside only in part."
        ],
        tables=[Table.of(report.to_frame().filter(list(columns)).rename(columns=columns).round(2))],
        pictures=[Picture(report.plot(), "How much the units of the two have in common.")],
        code=Code(
            "from torchfolio.insight import ConvergenceReport",
            "report = ConvergenceReport.from_modules(a, b, test)\nreport.to_frame()\nreport.plot()",
            "torchfolio inspect net/ other/ --data digits -o compared.html",
        ),
        glance=Glance(alike, "units of a layer have a counterpart in the other network",
                      Picture(in_order(first.blocks.between, first.match),
                              "Correlations of the units of two networks, as they come and matched.")),
    )  # fmt: skip


def in_order(between: Tensor, match: Any) -> Any:
    """Correlations of the units of two networks, before and after each unit stands beside its match."""
    import matplotlib.pyplot as plt

    best = match.sorted()
    figure, axes = plt.subplots(1, 2, figsize=(4.6, 1.9), layout="constrained")
    for ax, image, name in zip(
        axes, (between, between[best.row][:, best.col]), ("as they come", "matched"), strict=True
    ):
        ax.imshow(image.numpy(), vmin=0, vmax=1, cmap="Oranges", interpolation="nearest")
        ax.set_title(name, fontsize=11)
        ax.axis("off")
    return figure


def drawing(title: str, digits: data.DataSplits, trained: nn.Module) -> Sheet:
    """A convolutional network and a transformer block as diagrams of their axes."""
    from torchfolio.insight.circuit_diagrams import draw

    drawn = draw(convolutions(), digits.test.tensors[0][:1], names=["b c h w"])
    inside = draw(models.EncoderBlock(dim=16, heads=2), torch.randn(2, 5, 16), names=["b x m"])
    whole, cost = Picture(drawn.svg(), "A small convolutional network for the digits."), inside.cost()
    return Sheet(
        title, "insight/circuit_diagrams", sentences=[
            "Networks, read from the modules themselves: every line is an axis of a tensor, every box an operation, and what an "
            f"operation does not touch passes beside it. A transformer block costs {cost.total():,} floating-point operations "
            f"for two times five tokens and {cost.total(x=50):,} for two times fifty."
        ],
        pictures=[whole, Picture(inside.svg(), "A transformer block: b examples, x tokens, m features.")],
        code=Code(
            "from torchfolio.insight.circuit_diagrams import draw",
            'drawing = draw(net, x, names=["b c h w"])\ndrawing.svg("net.svg")\ndrawing.cost().polynomial()',
            "torchfolio draw net/ -o net.svg",
        ),
        glance=Glance(f"{drawn.cost().total():,}", "floating-point operations for a digit, counted on the drawing", whole),
    )  # fmt: skip


def evidence() -> Sheet:
    """What was recorded of the methods' claims, with those that do not hold."""
    words = {True: "holds", False: "does not hold", None: "not measured"}
    tables, squares = [], []
    for slug, record in _records():
        sentences = {claim.id: claim.sentence for claim in catalog.papers()[slug].claims}
        claims = [(sentences.get(c["id"], c["id"]), c["holds"], f"{c['held_on']} of {len(record['seeds'])}")
                  for c in record["claims"]]  # fmt: skip
        squares += [(f"{slug}: {sentence} ({words[holds]})", holds) for sentence, holds, _ in claims]
        held, failed = (sum(c[1] is word for c in claims) for word in (True, False))
        fold = f"{slug}: {held} of {len(claims)} hold" + (
            f", {failed} {'does' if failed == 1 else 'do'} not" if failed else ""
        )
        rows = tuple((sentence, words[holds], seeds) for sentence, holds, seeds in claims)
        tables.append(Table(("claim", "verdict", "seeds"), rows, fold=fold))
    held, failed = (sum(holds is word for _, holds in squares) for word in (True, False))
    return Sheet(
        "Read the evidence", "recorded evidence", sentences=[
            f"{len(tables)} methods, {len(squares)} claims: {held} hold, {failed} do not. They were measured before, on real data "
            "at the scale `quick`; the command measures them again on your machine."
        ],
        tables=tables,
        code=Code(
            "from torchfolio.runs import run_experiment",
            'outcome = run_experiment("auglocal", seeds=(0, 1, 2))\n{claim["id"]: claim["holds"] for claim in outcome.claims}',
            "torchfolio run auglocal --seeds 3",
        ),
        glance=Glance(f"{held} of {len(squares)}", f"claims of {len(tables)} papers hold as recorded here; a red square is one that does not",
                      Picture(Squares(squares), "A square for each claim.")),
    )  # fmt: skip


def _records() -> Iterator[tuple[str, dict[str, Any]]]:
    """The recorded outcomes of the methods that are in, by slug."""
    inside = Path(__file__).parent / "outcomes"
    place = inside if inside.is_dir() else Path(__file__).parents[3] / "docs" / "outcomes"
    for slug, paper in catalog.papers().items():
        if paper.is_in and (place / f"{slug}.json").is_file():
            yield slug, read(place / f"{slug}.json")
