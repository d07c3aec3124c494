"""Measures scalable neural network kernels: their error, bundled networks, adapters, and replaced perceptrons."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.engine.recipes import adam, cosine
from torchfolio.experiments._closed_form_classifiers import against_adam
from torchfolio.experiments._sentence_transformer import SentenceTransformer, sentences
from torchfolio.experiments._turned_images import adapt_to_turned
from torchfolio.layers.snnk import URF, ArcCosineFeatures, FourierMeasure, kernel_error, replace_ffl
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import accuracy


@dataclass(frozen=True)
class Settings:
    """Sizes of the four parts."""

    data: str = setting("mnist10k", "images of the adapters")
    epochs: int = setting(5, "epochs of the backbone")
    adapter_epochs: int = setting(6, "epochs of the adapters")
    rates: tuple[float, ...] = setting(
        (3e-3, 1e-2, 3e-2), "learning rates, the best of which is chosen on validation data for every adapter"
    )
    text: bool = setting(True, "whether sentences are film reviews or random")
    dim: int = setting(64, "width of the transformer; its SNNK layers have a quarter as many features")
    text_epochs: int = setting(3, "epochs of the transformer, and of it again after the replacement")
    sizes: tuple[int, ...] = setting((64, 256, 1024, 4096), "numbers of random features at which errors are measured")
    draws: int = setting(8, "draws of the features at every number")
    hidden: int = setting(512, "width of the bundled networks")


SCALES = {
    "smoke": Settings("digits", 1, 1, (1e-2,), False, 16, 1, (16, 64), 1, 32),
    "quick": Settings(),
    "full": Settings(epochs=20, adapter_epochs=20, dim=128, text_epochs=6, draws=50),
}


class LinearFeatures(ArcCosineFeatures):
    """The negative control: the same projection without the ReLU."""

    def _activation(self, z: Tensor) -> Tensor:
        return z


def estimates(run: Run[Settings]) -> dict[str, Any]:
    """Errors of kernel estimates in 32 dimensions: unit norms, and the cosine away from the unit ball."""
    s, generator = run.settings, run.generator()
    x, w = (F.normalize(torch.randn(64, 32, generator=generator), dim=1) for _ in range(2))
    draws = [(m, 1000 * run.seed + k) for m in s.sizes for k in range(s.draws)]
    errors = kernel_error([ArcCosineFeatures(32, m, seed=k) for m, k in draws], x, w)
    slope = np.polyfit(np.log(s.sizes), np.log([errors[m] for m in s.sizes]), 1)[0]
    found: dict[str, Any] = {"arc_cosine": list(errors.values()), "slope": float(slope)}
    dampings: dict[str, Any] = {"plain": 0.0, "damped": "auto"}
    for name, M in dampings.items():
        for norm in (0.5, 1.0, 2.0):
            maps = [URF(32, 256, FourierMeasure.cos(), M, seed=k) for k in range(s.draws)]
            found[f"{name}_{norm:g}"] = kernel_error(maps, norm * x, norm * w)[256]
            pairs = [(one.kernel(norm * x, norm * x).diagonal() - math.cos(norm**2)).square().mean() for one in maps]
            found[f"{name}_aligned_{norm:g}"] = float(torch.stack(pairs).mean().sqrt()) / abs(math.cos(norm**2))
    return found


def replaced(run: Run[Settings]) -> dict[str, float]:
    """A transformer, the same trained on, and with the first matrices of its perceptrons replaced and trained on."""
    s, parts = run.settings, sentences(run.settings.text)
    common = {"scheduler": cosine(), "epochs": s.text_epochs, "batch_size": 64, "progress": False}
    net = SentenceTransformer(4000, 32, s.dim)
    run.fit(net, parts["train"], optimizer=adam(1e-3), **common)
    small: Any = copy.deepcopy(net)
    replace_ffl(small, lambda name, layer: name.endswith("linear1"), s.dim // 4, seed=run.seed)
    found = {"accuracy": accuracy(net, parts["test"])}
    found["untrained"] = accuracy(small, parts["test"])
    for name, model in (("longer", net), ("uptrained", small)):
        run.fit(model, parts["train"], optimizer=adam(3e-4), **common)
        found[name] = accuracy(model, parts["test"])
    sizes = [sum(p.numel() for n, p in m.named_parameters() if ".linear1." in n) for m in (net, small)]
    return {**found, "share": sizes[1] / sizes[0]}


def run(run: Run[Settings]) -> None:
    """Errors, bundled networks, adapters, replacement."""
    s, errors = run.settings, run.arm("estimates", estimates, run)
    run.values("kernel_error", slope=errors["slope"])
    run.values("control_large_norm", inside=errors["plain_aligned_0.5"], ours=errors["plain_aligned_2"],
               random_directions=errors["plain_2"])  # fmt: skip
    digits = run.data("digits")
    one, two = (
        run.arm(f"bundled {depth}", against_adam, digits, (s.hidden,) * depth, seed=run.seed) for depth in (1, 2)
    )
    linear = run.arm("bundled linear", against_adam, digits, (s.hidden,) * 2, LinearFeatures, seed=run.seed)
    gap = min(a["adam"] / a["loss"] for a in (one, two))
    run.values("bundling", one=one["accuracy"], two=two["accuracy"], adam_over_closed_form=gap)
    run.values("control_linear", linear=linear["accuracy"], relu=two["accuracy"])
    arm = run.arm("adapters", adapt_to_turned, run, run.data(s.data))
    run.values("adapter", ours=arm["snnk_8"], baseline=arm["bottleneck_16"], before=arm["before"], head=arm["head_0"],
               share=arm["snnk_8_parameters"] / arm["bottleneck_16_parameters"])  # fmt: skip
    text = run.arm("transformer", replaced, run)
    run.values("replacement", ours=text["uptrained"], baseline=text["longer"], untrained=text["untrained"],
               share=text["share"])  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """Error by the number of features, and accuracy of the adapters."""
    sizes = results.settings.sizes
    scores = {
        n.replace("_", " "): ("adapters", n) for n in ("before", "head_0", "bottleneck_4", "bottleneck_16", "snnk_8")
    }
    return {
        "kernel error": plots.curves(results, {"arc-cosine kernel": ("estimates", "arc_cosine")}, x=sizes,
                                     xlabel="features m", ylabel="relative error", logx=True, logy=True),
        "adapters": plots.bars(results, scores, ylabel="accuracy on turned digits (%)"),
    }  # fmt: skip
