"""Measures FinalMLP on simulated clicks whose structure is known, and on ratings of films."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.applications.click_estimator import ClickRule, click_auc
from torchfolio.applications.final_mlp import FieldEmbedding, FinalMLP
from torchfolio.engine import EarlyStopping
from torchfolio.engine.recipes import adam
from torchfolio.experiments._clicks import film_clicks, gates_match, simulate
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Simulated clicks and MovieLens."""

    rows: int = setting(160_000, "number of rows of the simulation")
    values: int = setting(10, "number of values of every field")
    rank: int = setting(2, "dimension of the hidden vectors")
    dim: int = setting(8, "dimension D in the simulation")
    width: int = setting(64, "width of the streams in the simulation")
    epochs: int = setting(8, "maximum number of epochs in the simulation")
    ratings: bool = setting(True, "whether MovieLens is measured")
    rating_epochs: int = setting(8, "maximum number of epochs on MovieLens")


SCALES = {
    "smoke": Settings(rows=2000, dim=4, width=8, epochs=1, ratings=False),
    "quick": Settings(),
    "full": Settings(rows=1_000_000, epochs=12),
}


NAMES = ("mlp", "dual_mlp", "bilinear", "gating", "final_mlp")


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
    result = run.fit(
        net, parts[0], val=parts[1], rule=ClickRule(decay), optimizer=adam(lr), epochs=epochs, batch_size=batch,
        evaluate=click_auc, early_stopping=stopping,
    )  # fmt: skip
    size = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return net, {"auc": click_auc(net, parts[2])["auc"], "parameters": size, "epochs": result.epochs}


def simulated(run: Run[Settings], name: str, masks: bool = True) -> dict[str, Any]:
    settings = run.settings
    data = simulate(settings.rows, settings.values, settings.rank, run.seed, masks)
    make = networks(data["fields"], settings.dim, settings.width, 4, ("user_type", "item_type"))[name]
    rows = len(data["parts"][0][0])
    net, found = train(run, make, data["parts"], lr=3e-3, batch=1024, epochs=settings.epochs, decay=1 / rows)
    found["bayes"] = data["bayes"]
    if name == "final_mlp" and masks:
        found |= {f"stream_{k + 1}": gates_match(net, data, side, k) for k, side in enumerate(("user", "item"))}
    return found


def rated(run: Run[Settings]) -> dict[str, float]:
    """Test AUC of three networks on MovieLens."""
    fields, parts = film_clicks(run.seed)
    makers = networks(fields, 10, 200, 10, ("user", "item"), 0.3)
    budget = {"lr": 2e-3, "batch": 2048, "epochs": run.settings.rating_epochs, "decay": 1e-3}
    names = ("mlp", "dual_mlp", "final_mlp")
    return {name: train(run, makers[name], parts, **budget)[1]["auc"] for name in names}


def run(run: Run[Settings]) -> None:
    """Train all networks on the simulation, two without its structure, three on MovieLens."""
    done = {name: run.arm(name, simulated, run, name) for name in NAMES}
    auc, gates = {name: arm["auc"] for name, arm in done.items()}, done["final_mlp"]
    run.values("simulation", pick(auc, "mlp", "dual_mlp", "final_mlp"), bayes=gates["bayes"])
    plain, plain_dual = (
        run.arm(f"plain_{name}", simulated, run, name, masks=False)["auc"] for name in ("final_mlp", "dual_mlp")
    )
    run.values("ablation", pick(auc, "gating", "bilinear", "final_mlp"), plain_gain=plain - plain_dual)
    run.values("gates", pick(gates, "stream_1", "stream_2"))
    if run.settings.ratings:
        run.values("movielens", run.arm("movielens", rated, run))


def figures(results: Results) -> plots.Figures:
    """AUC of the networks on the simulation."""
    return {"simulated clicks": plots.bars(results, {n.replace("_", " "): (n, "auc") for n in NAMES}, ylabel="AUC")}
