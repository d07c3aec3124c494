"""Measures FinalMLP on simulated clicks whose structure is known, and on ratings of films."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.applications.click_estimator import ClickRule, click_auc
from torchfolio.applications.final_mlp import FieldEmbedding, FinalMLP
from torchfolio.data.ratings import movielens
from torchfolio.engine import EarlyStopping, fit
from torchfolio.engine.recipes import adam
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench


@dataclass(frozen=True)
class Settings:
    """Simulated clicks and MovieLens.

    Attributes:
        rows: of the simulation.
        values: of every field.
        rank: of the hidden vectors.
        dim: D in the simulation.
        width: of the streams in the simulation.
        epochs: at most, in the simulation.
        ratings: whether MovieLens is measured.
        rating_epochs: at most, on MovieLens.
    """

    rows: int = 160_000
    values: int = 10
    rank: int = 2
    dim: int = 8
    width: int = 64
    epochs: int = 8
    ratings: bool = True
    rating_epochs: int = 8


SCALES = {
    "smoke": Settings(rows=2000, dim=4, width=8, epochs=1, ratings=False),
    "quick": Settings(),
    "full": Settings(rows=1_000_000, epochs=12),
}
KEPT = 8  # fields of each side


def simulate(settings: Settings, seed: int, masks: bool = True) -> dict[str, Any]:
    """Users and items of ten types: a click depends on the product of what each type looks at."""
    rng = np.random.default_rng(seed)
    n, v, r = settings.rows, settings.values, settings.rank
    fields = {
        "user_type": v,
        **{f"user_{k}": v for k in range(KEPT)},
        "item_type": v,
        **{f"item_{k}": v for k in range(KEPT)},
    }
    x = rng.integers(v, size=(n, len(fields)))
    logit, kept = np.zeros((n, r)) + 1, {}
    for side, start in (("user", 0), ("item", KEPT + 1)):
        vectors = rng.standard_normal((KEPT, v, r))
        mask = np.zeros((v, KEPT), dtype=bool)
        for kind in range(v):
            mask[kind, rng.permutation(KEPT)[: KEPT // 2]] = True
        mask = mask if masks else np.ones_like(mask)
        used = mask[x[:, start]]
        total = sum(vectors[k, x[:, start + 1 + k]] * used[:, k, None] for k in range(KEPT))
        logit = logit * total / np.sqrt(used.sum(1, keepdims=True))
        kept[side] = mask
    score = 2.5 * logit.sum(1) / math.sqrt(r)
    y = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.float32)
    cut = [int(0.7 * n), int(0.8 * n)]
    index = torch.from_numpy(x)
    none, target = torch.zeros(n, 0), torch.from_numpy(y)
    parts = [(index[a:b], none[a:b], target[a:b]) for a, b in ((0, cut[0]), (cut[0], cut[1]), (cut[1], n))]
    return {"fields": fields, "parts": parts, "kept": kept, "bayes": float(roc_auc_score(y[cut[1] :], score[cut[1] :]))}


class Single(nn.Module):
    """One perceptron on the embeddings."""

    def __init__(self, fields: Any, dim: int, hidden: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(fields, dim)
        self.net = nn.Sequential(
            nn.Linear(dim * len(fields), hidden[0]), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden[0], 1)
        )

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        return self.net(self.embedding(x, others).flatten(1))[:, 0]

    def penalty(self) -> Tensor:
        return self.embedding.penalty()


def networks(
    fields: Any, dim: int, width: int, heads: int, contexts: tuple[str, str], dropout: float = 0.0
) -> dict[str, Any]:
    """What makes each network of the comparison."""

    def final(**own: Any) -> FinalMLP:
        own = {"context_1": contexts[:1], "context_2": contexts[1:], "gate_hidden": (64,), "dropout": dropout, **own}
        return FinalMLP(fields, dim, (width,), (width,), heads, **own)

    return {
        "mlp": lambda: Single(fields, dim, (width,), dropout),
        "dual_mlp": lambda: final(gates=False, bilinear=False),
        "bilinear": lambda: final(gates=False),
        "gating": lambda: final(bilinear=False),
        "final_mlp": final,
    }


def train(
    run: Run[Settings], make: Any, parts: Any, *, lr: float, batch: int, epochs: int, decay: float
) -> tuple[Any, dict[str, Any]]:
    """Train one network with early stopping on the validation part: test AUC, parameters, epochs."""
    torch.manual_seed(run.seed)
    net = make()
    stopping = EarlyStopping("val_auc", 2, "max", restore_best=True)
    result = fit(net, parts[0], val=parts[1], rule=ClickRule(decay), optimizer=adam(lr), epochs=epochs, batch_size=batch,
                 seed=run.seed, device=run.device, evaluate=click_auc, early_stopping=stopping)  # fmt: skip
    size = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return net, {"auc": click_auc(net, parts[2])["auc"], "parameters": size, "epochs": result.epochs}


def simulated(run: Run[Settings], name: str, masks: bool = True) -> dict[str, Any]:
    settings = run.settings
    data = simulate(settings, run.seed, masks)
    make = networks(data["fields"], settings.dim, settings.width, 4, ("user_type", "item_type"))[name]
    rows = len(data["parts"][0][0])
    net, found = train(run, make, data["parts"], lr=3e-3, batch=1024, epochs=settings.epochs, decay=1 / rows)
    found["bayes"] = data["bayes"]
    if name == "final_mlp" and masks:
        found |= {f"stream_{k + 1}": found_structure(net, data, side, k) for k, side in enumerate(("user", "item"))}
    return found


def found_structure(net: FinalMLP, data: dict[str, Any], side: str, stream: int) -> float:
    """AUROC of the mean gates per type and field against what the type looks at."""
    names, v = list(data["fields"]), len(data["kept"][side])
    x = torch.zeros(v, len(names), dtype=torch.int64)
    x[:, names.index(f"{side}_type")] = torch.arange(v)
    place = next(net.parameters()).device
    gates = net.field_gates(x.to(place), torch.zeros(v, 0, device=place))[stream].cpu()
    own = gates[:, [names.index(f"{side}_{k}") for k in range(KEPT)]]
    return float(roc_auc_score(data["kept"][side].ravel(), own.numpy().ravel()))


def rated(run: Run[Settings]) -> dict[str, float]:
    """MovieLens 100K: a click is a rating above 3; random 70/10/20."""
    from torchfolio.applications.click_tables import TableEncoder

    frame = movielens()
    when = frame["timestamp"].to_numpy()
    table = frame[["user", "item", "gender", "occupation", "genres"]].astype(str).copy()
    table["age"] = (frame["age"] // 10).astype(str)
    table["release"] = (frame["year"] // 5).astype(str)
    table["hour"], table["weekday"] = (when // 3600 % 24).astype(str), (when // 86400 % 7).astype(str)
    order = np.random.default_rng(run.seed).permutation(len(table))
    cut = [int(0.7 * len(order)), int(0.8 * len(order))]
    pieces = [order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]]
    encoder = TableEncoder(multi=("genres",)).fit(table.iloc[pieces[0]])
    y = torch.from_numpy((frame["rating"].to_numpy() > 3).astype(np.float32))
    parts = [(*encoder.encode(table.iloc[p]), y[torch.from_numpy(p)]) for p in pieces]
    makers = networks(encoder.fields, 10, 200, 10, ("user", "item"), 0.3)
    scores = {}
    for name in ("mlp", "dual_mlp", "final_mlp"):
        scores[name] = train(
            run, makers[name], parts, lr=2e-3, batch=2048, epochs=run.settings.rating_epochs, decay=1e-3
        )[1]["auc"]
    return scores


def run(run: Run[Settings]) -> None:
    """Train all networks on the simulation, two without its structure, three on MovieLens."""
    names = ("mlp", "dual_mlp", "bilinear", "gating", "final_mlp")
    done = {name: run.arm(name, simulated, run, name) for name in names}
    auc = {name: arm["auc"] for name, arm in done.items()}
    run.values("simulation", {n: auc[n] for n in ("mlp", "dual_mlp", "final_mlp")}, bayes=done["final_mlp"]["bayes"])
    plain = {
        name: run.arm(f"plain_{name}", simulated, run, name, masks=False)["auc"] for name in ("dual_mlp", "final_mlp")
    }
    run.values(
        "ablation",
        {n: auc[n] for n in ("gating", "bilinear", "final_mlp")},
        plain_gain=plain["final_mlp"] - plain["dual_mlp"],
    )
    run.values("gates", {n: done["final_mlp"][n] for n in ("stream_1", "stream_2")})
    if run.settings.ratings:
        run.values("movielens", run.arm("movielens", rated, run))


def figures(results: Results) -> dict[str, Figure]:
    """AUC of the networks on the simulation."""
    names = ("mlp", "dual_mlp", "bilinear", "gating", "final_mlp")
    return {"simulated clicks": plots.bars(results, {n.replace("_", " "): (n, "auc") for n in names}, ylabel="AUC")}


def peers(bench: Bench) -> None:
    """Training steps on 20 fields of 1,000 values, against a loop over fields as most libraries have it."""
    fields = {f"f{k}": 1000 for k in range(20)}
    x, y = torch.randint(1000, (4096, 20)), torch.randint(2, (4096,)).float()
    ours = FinalMLP(fields, 16, (400,), (400,), 4, context_1=("f0",), context_2=("f1",))

    class Loop(FinalMLP):
        """The same network, its embeddings in a table for each field."""

        def __init__(self) -> None:
            super().__init__(fields, 16, (400,), (400,), 4, context_1=("f0",), context_2=("f1",))
            self.tables = nn.ModuleList(nn.Embedding(1000, 16) for _ in fields)

        def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
            e = torch.cat([table(x[:, k]) for k, table in enumerate(self.tables)], 1)
            assert self.gates is not None
            first, second = (gate(x, others) * e for gate in self.gates)
            return self.fusion(self.stream_1(first), self.stream_2(second))[:, 0]

    loop = Loop()

    def step(net: nn.Module) -> None:
        F.binary_cross_entropy_with_logits(net(x), y).backward()

    bench.compare(
        "forward and backward, 4,096 rows x 20 fields", ours=lambda: step(ours), table_for_each_field=lambda: step(loop)
    )
