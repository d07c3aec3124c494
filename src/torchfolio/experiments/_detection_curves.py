"""How well detectors of a jammer do: by false alarms, by the jammer's weakness, and what a first network says."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from torchfolio.applications.jamming_detection import EPNREDetector
from torchfolio.runs import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = ("two thresholds", "one threshold", "raw samples", "logistic regression")


def detection_curves(results: Results) -> Figure:
    """ROC curves, detection against the jammer's weakness, and what the first network says, on the first seed."""
    import matplotlib.pyplot as plt

    scores, truth, sjr = (results.values("barrage", key)[0] for key in ("scores", "truth", "sjr"))
    settings = results.settings
    fig, (roc, weakness, probability) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rates, edges = np.linspace(0.002, 0.998, 250), np.linspace(settings.sjr[0], settings.sjr[1], 7)
    for score, label in zip(scores, LABELS, strict=True):
        limits = np.quantile(score[truth == 0], 1 - rates)
        roc.plot(rates, [(score[truth == 1] > limit).mean() for limit in limits], label=label)
        tenth = np.quantile(score[truth == 0], 0.9)
        caught = [(score[(sjr >= a) & (sjr < b)] > tenth).mean() for a, b in pairwise(edges)]
        weakness.plot((edges[1:] + edges[:-1]) / 2, caught, marker="o", label=label)
    jam, noise = 10 ** (-sjr[truth == 1] / 10), 10 ** (-np.mean(settings.snr) / 10)
    roc.plot(rates, [EPNREDetector(p).power(noise, jam).mean() for p in rates], "k--", label="energy, noise known")
    roc.set(xlabel="false alarm rate", ylabel="detection rate", xscale="log")
    weakness.set(xlabel="signal to jammer ratio (dB)", ylabel="detection rate at 10 % false alarms")
    for kind, name in ((0, "clean"), (1, "jammed")):
        probability.hist(scores[1][truth == kind], bins=40, alpha=0.6, label=name)
    for threshold in results.values("barrage", "thresholds")[0]:
        probability.axvline(threshold, c="black", ls=":")
    probability.set(xlabel="first network's probability", ylabel="captures", yscale="log")
    for ax in (roc, probability):
        ax.legend()
    return fig
