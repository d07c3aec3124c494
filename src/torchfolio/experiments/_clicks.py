"""Clicks to predict: simulated ones, whose structure is known, and ratings of films."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from torchfolio.applications.click_tables import TableEncoder
from torchfolio.applications.final_mlp import FinalMLP
from torchfolio.data.ratings import movielens

KEPT = 8  # fields of each side


def simulate(rows: int, values: int, rank: int, seed: int, masks: bool = True) -> dict[str, Any]:
    """Users and items of several types: a click depends on the product of what each type looks at.

    Without masks every type looks at all fields.
    """
    rng = np.random.default_rng(seed)
    n, v, r = rows, values, rank
    names = ("type", *range(KEPT))
    fields = {f"{side}_{name}": v for side in ("user", "item") for name in names}
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


def gates_match(net: FinalMLP, data: dict[str, Any], side: str, stream: int) -> float:
    """AUROC of the mean gates per type and field against what the type looks at."""
    names, v = list(data["fields"]), len(data["kept"][side])
    x = torch.zeros(v, len(names), dtype=torch.int64)
    x[:, names.index(f"{side}_type")] = torch.arange(v)
    place = next(net.parameters()).device
    gates = net.field_gates(x.to(place), torch.zeros(v, 0, device=place))[stream].cpu()
    own = gates[:, [names.index(f"{side}_{k}") for k in range(KEPT)]]
    return float(roc_auc_score(data["kept"][side].ravel(), own.numpy().ravel()))


def film_clicks(seed: int) -> tuple[Any, list[tuple[Tensor, ...]]]:
    """MovieLens 100K: a click is a rating above 3; fields, and random parts of 70, 10 and 20 percent."""
    frame = movielens()
    when = frame["timestamp"].to_numpy()
    table = frame[["user", "item", "gender", "occupation", "genres"]].astype(str).copy()
    table["age"] = (frame["age"] // 10).astype(str)
    table["release"] = (frame["year"] // 5).astype(str)
    table["hour"], table["weekday"] = (when // 3600 % 24).astype(str), (when // 86400 % 7).astype(str)
    order = np.random.default_rng(seed).permutation(len(table))
    cut = [int(0.7 * len(order)), int(0.8 * len(order))]
    pieces = [order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]]
    encoder = TableEncoder(multi=("genres",)).fit(table.iloc[pieces[0]])
    y = torch.from_numpy((frame["rating"].to_numpy() > 3).astype(np.float32))
    parts = [(*encoder.encode(table.iloc[p]), y[torch.from_numpy(p)]) for p in pieces]
    return encoder.fields, parts
