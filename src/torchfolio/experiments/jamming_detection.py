"""Measures jamming detection on simulated synchronisation blocks: the Gamma law, two thresholds, features, controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from torchfolio.applications.jamming_detection import (
    DTDDNN,
    EPNREDetector,
    PartialBand,
    SSBFeatures,
    detection_report,
    epnre,
    simulate,
)
from torchfolio.experiments._captures import Band, drawn, joined, table
from torchfolio.runs import Results, Run, plots, setting, threads


@dataclass(frozen=True)
class Settings:
    """Simulated blocks, one jammer at 15 to 30 dB below the signal."""

    train_size: int = setting(4000, "captures to learn from")
    test_size: int = setting(3000, "captures to judge on")
    control_size: int = setting(1500, "captures of each control, to learn from and to judge on")
    gamma_size: int = setting(3000, "captures for the Gamma law")
    snr: Band = setting((21.5, 22.5), "signal to noise ratio; the noise floor is known to this accuracy")
    sjr: Band = setting((15.0, 30.0), "signal to jammer ratio")
    band_sjr: Band = setting((5.0, 20.0), "that of the partial-band jammers")
    blocks: int = setting(1, "synchronisation blocks of a capture")
    taps: int = setting(1, "paths of the channel")
    cfo: float = setting(0.0, "largest offset of the carrier in spacings")
    epochs: int = setting(40, "number of epochs of the first network")


SCALES = {
    "smoke": Settings(train_size=300, test_size=200, control_size=150, gamma_size=200, epochs=5),
    "quick": Settings(),
    "full": Settings(train_size=50_000, test_size=20_000, control_size=10_000, blocks=4, taps=4, cfo=0.05),
}


def gamma_law(run: Run[Settings]) -> dict[str, float]:
    """Law of the empty elements' energy, and power of the energy detector, at 20 dB of noise."""
    n, noise, found = run.settings.gamma_size, 10**-2.0, {}
    generator = torch.Generator().manual_seed(1000 + run.seed)
    both = simulate(n, 20.0, 25.0, generator=generator)
    jam = 10 ** (-both.sjr.double() / 10)
    found["ks_p"] = float(kstest((130 * epnre(both.iq).double() / (noise + jam)).numpy(), "gamma", (130,)).pvalue)
    for sjr in (25, 30):
        jammed = simulate(n, 20.0, float(sjr), jammed=1.0, generator=generator)
        found[f"pd_{sjr}"] = float(EPNREDetector(0.01).predict(epnre(jammed.iq), noise).mean())
    return found


def detectors(run: Run[Settings]) -> dict[str, Any]:
    """All detectors on barrage jamming."""
    s = run.settings
    train, test = drawn(run, 0, s.train_size), drawn(run, 1, s.test_size)
    X, x, y, truth = table(train), table(test), train.label.numpy(), test.label.numpy()
    model = DTDDNN(epochs=s.epochs, random_state=run.seed).fit(X, y, train.sjr.numpy())
    with torch.no_grad():
        first = model.to_module().probabilities(torch.from_numpy(x).float())[0].numpy()
    raw_train, raw_test = (torch.view_as_real(d.iq).flatten(1).numpy() for d in (train, test))
    raw = DTDDNN((128, 64), thresholds=(0.5, 0.5), epochs=s.epochs, random_state=run.seed).fit(raw_train, y)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X, y)
    scores = {"double": model.predict_proba(x)[:, 1], "single": first, "raw": raw.predict_proba(raw_test)[:, 1],
              "linear": linear.predict_proba(x)[:, 1]}  # fmt: skip
    found: dict[str, Any] = {}
    for name, score in scores.items():
        found[f"{name}_accuracy"] = float(((score >= 0.5) == truth).mean())
        found[f"{name}_auc"] = float(roc_auc_score(truth, score))
        found[f"{name}_pd"] = float((score[truth == 1] > np.quantile(score[truth == 0], 0.9)).mean())
    unclear = model.decision_path(x) == 2
    for name in ("double", "single"):
        found[f"{name}_unclear"] = float(((scores[name] >= 0.5) == truth)[unclear].mean()) if unclear.any() else 0.5
    report = detection_report(model, x, truth, test.sjr, float(np.mean(s.snr)))
    energy = SSBFeatures().get_feature_names_out().tolist().index("epnre_all")
    return found | {
        "energy_auc": float(roc_auc_score(truth, x[:, energy])), "unclear": float(unclear.mean()),
        "thresholds": list(model.thresholds_ or ()), "scores": np.stack(list(scores.values())), "truth": truth,
        "sjr": test.sjr.numpy(), "alarms": report["alarms"].tolist(), "bound": report["energy_bound"].tolist(),
    }  # fmt: skip


def mixed(run: Run[Settings]) -> dict[str, float]:
    """Half barrage, half partial band: the first network with all features, and without either kind."""
    s, sets = run.settings, []
    for k, n in ((2, s.train_size), (4, s.test_size)):
        sets.append(joined(drawn(run, k, n // 2), drawn(run, k + 1, n // 2, s.band_sjr, PartialBand())))
    (X, y), (x, truth) = ((table(data), data.label.numpy()) for data in sets)
    sync = np.array([name.startswith("pss") for name in SSBFeatures().get_feature_names_out()])
    found = {}
    for name, kept in (("all", sync | True), ("without_pss", ~sync), ("without_epnre", sync)):
        model = DTDDNN(thresholds=(0.5, 0.5), epochs=s.epochs, random_state=run.seed).fit(X[:, kept], y)
        found[name] = float(model.score(x[:, kept], truth))
    return found


def controls(run: Run[Settings]) -> dict[str, float]:
    """A jammer far too weak, shuffled labels, and equal thresholds."""
    s, n = run.settings, run.settings.control_size
    weak, weak_test = (drawn(run, k, n, (60.0, 60.0)) for k in (2, 3))
    model = DTDDNN(epochs=s.epochs, folds=3, random_state=run.seed).fit(table(weak), weak.label.numpy())
    alarm, truth = model.predict(table(weak_test)), weak_test.label.numpy()
    train, test = (drawn(run, k, n) for k in (4, 5))
    X, x, y = table(train), table(test), train.label.numpy()
    shuffled = DTDDNN(thresholds=(0.5, 0.5), epochs=s.epochs, random_state=run.seed)
    shuffled.fit(X, np.random.default_rng(run.seed).permutation(y))
    equal = DTDDNN(thresholds=(0.5, 0.5), epochs=s.epochs, random_state=run.seed).fit(X, y)
    with torch.no_grad():
        first = equal.to_module().probabilities(torch.from_numpy(x).float())[0].numpy()
    return {"accuracy": float((alarm == truth).mean()), "pd": float(alarm[truth == 1].mean()),
            "pfa": float(alarm[truth == 0].mean()), "agreement": float((equal.predict(x) == (first >= 0.5)).mean()),
            "shuffled_auc": float(roc_auc_score(test.label.numpy(), shuffled.predict_proba(x)[:, 1]))}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """The law, the detectors, the features, the controls."""
    with threads(1):
        run.values("gamma_law", run.arm("gamma", gamma_law, run))
        found = run.arm("barrage", detectors, run)
        names = ("accuracy", "auc", "pd", "unclear")
        run.values(
            "detection", {f"{kind}_{name}": found[f"{kind}_{name}"] for kind in ("double", "single") for name in names}
        )
        run.values("ordering", {kind: found[f"{kind}_accuracy"] for kind in ("double", "single", "raw", "linear")})
        run.values("features", run.arm("mixed", mixed, run))
        run.values("negative_control", run.arm("controls", controls, run))


def figures(results: Results) -> plots.Figures:
    """ROC curves, detection against the jammer's weakness, and what the first network says."""
    import matplotlib.pyplot as plt

    scores, truth, sjr = (results.values("barrage", key)[0] for key in ("scores", "truth", "sjr"))
    labels = ("two thresholds", "one threshold", "raw samples", "logistic regression")
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rates = np.linspace(0.002, 0.998, 250)
    jam, noise = 10 ** (-sjr[truth == 1] / 10), 10 ** (-np.mean(results.settings.snr) / 10)
    edges = np.linspace(results.settings.sjr[0], results.settings.sjr[1], 7)
    for score, label in zip(scores, labels, strict=True):
        limits = np.quantile(score[truth == 0], 1 - rates)
        axes[0].plot(rates, [(score[truth == 1] > limit).mean() for limit in limits], label=label)
        tenth = np.quantile(score[truth == 0], 0.9)
        caught = [(score[(sjr >= a) & (sjr < b)] > tenth).mean() for a, b in zip(edges, edges[1:], strict=False)]
        axes[1].plot((edges[1:] + edges[:-1]) / 2, caught, marker="o", label=label)
    axes[0].plot(rates, [EPNREDetector(p).power(noise, jam).mean() for p in rates], "k--", label="energy, noise known")
    axes[0].set(xlabel="false alarm rate", ylabel="detection rate", xscale="log")
    axes[1].set(xlabel="signal to jammer ratio (dB)", ylabel="detection rate at 10 % false alarms")
    axes[0].legend()
    for kind, name in ((0, "clean"), (1, "jammed")):
        axes[2].hist(scores[1][truth == kind], bins=40, alpha=0.6, label=name)
    for threshold in results.values("barrage", "thresholds")[0]:
        axes[2].axvline(threshold, c="black", ls=":")
    axes[2].set(xlabel="first network's probability", ylabel="captures", yscale="log")
    axes[2].legend()
    return {"detection": fig}
