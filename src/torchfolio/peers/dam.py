"""Ten steps of learning masks, beside merging that learns without defending: concrete masks, and coefficients."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from torchfolio.adaptation.dam import ConcreteMerging, DefenseAwareMerging
from torchfolio.adaptation.merging import AdaMerging
from torchfolio.data import load
from torchfolio.experiments._multitask_checkpoints import body, make_tasks
from torchfolio.experiments.dam import SCALES
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    settings = SCALES["smoke"]
    data = load("digits", normalize=False, val=0)
    tasks = make_tasks(settings, data, 0)
    torch.manual_seed(0)
    base, nets = body(settings, data.shape), [body(settings, data.shape) for _ in tasks]
    common: dict[str, Any] = {"weight": settings.weight, "steps": 10, "batch_size": settings.batch_size, "seed": 0}
    masks = {**common, "mask_lr": settings.rate, "adapt_steps": 0}
    own = {
        "alpha": settings.alpha,
        "epsilon": settings.epsilon,
        "search": "restarts",
        "delta_steps": settings.delta_steps,
    }
    methods: dict[str, Any] = {
        "ours": DefenseAwareMerging(**masks, **own), "concrete": ConcreteMerging(inner_lr=0.0, **masks),
        "adamerging": AdaMerging(**common),
    }  # fmt: skip
    inputs, heads = [t.unlabelled for t in tasks], [t.head for t in tasks]
    calls = {
        name: lambda method=method: method.fit(base, nets, inputs, heads=heads) for name, method in methods.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # untrained networks say one class
        bench.compare("ten steps on three networks of 8x8 digits", repeats=3, **calls)
