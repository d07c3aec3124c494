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

from torchfolio.applications.jamming_detection import DTDDNN, EPNREDetector, PartialBand, SSBFeatures, epnre, simulate
from torchfolio.experiments._captures import Band, drawn, joined, table
from torchfolio.experiments._detection_curves import detection_curves
from torchfolio.runs import Results, Run, pick, plots, setting, threads


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
    n, noise = run.settings.gamma_size, 10**-2.0
    generator = torch.Generator().manual_seed(1000 + run.seed)
    both = simulate(n, 20.0, 25.0, generator=generator)
    energy = 130 * epnre(both.iq).double() / (noise + 10 ** (-both.sjr.double() / 10))
    result = {"ks_p": float(kstest(energy.numpy(), "gamma", (130,)).pvalue)}
    for sjr in (25, 30):
        jammed = simulate(n, 20.0, float(sjr), jammed=1.0, generator=generator)
        result[f"pd_{sjr}"] = float(EPNREDetector(0.01).predict(epnre(jammed.iq), noise).mean())
    return result


def network(run: Run[Settings], **settings: Any) -> DTDDNN:
    """A detector of the run's seed."""
    return DTDDNN(epochs=run.settings.epochs, random_state=run.seed, **settings)


ALONE = {"thresholds": (0.5, 0.5)}
"""What leaves every decision to the first network."""


def first(model: DTDDNN, x: np.ndarray) -> np.ndarray:
    """The first network's probability of a jammer."""
    with torch.no_grad():
        return model.to_module().probabilities(torch.from_numpy(x).float())[0].numpy()


def detectors(run: Run[Settings]) -> dict[str, Any]:
    """All detectors on barrage jamming."""
    train, test = drawn(run, 0, run.settings.train_size), drawn(run, 1, run.settings.test_size)
    X, x, y, truth = table(train), table(test), train.label.numpy(), test.label.numpy()
    model = network(run).fit(X, y, train.sjr.numpy())
    raw_train, raw_test = (torch.view_as_real(data.iq).flatten(1).numpy() for data in (train, test))
    raw = network(run, hidden=(128, 64), **ALONE).fit(raw_train, y)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X, y)
    scores = {"double": model.predict_proba(x)[:, 1], "single": first(model, x),
              "raw": raw.predict_proba(raw_test)[:, 1], "linear": linear.predict_proba(x)[:, 1]}  # fmt: skip
    unclear = model.decision_path(x) == 2
    result: dict[str, Any] = {}
    for name, score in scores.items():
        right = (score >= 0.5) == truth
        result[f"{name}_accuracy"] = float(right.mean())
        result[f"{name}_auc"] = float(roc_auc_score(truth, score))
        result[f"{name}_pd"] = float((score[truth == 1] > np.quantile(score[truth == 0], 0.9)).mean())
        result[f"{name}_unclear"] = float(right[unclear].mean()) if unclear.any() else 0.5
    energy = SSBFeatures().get_feature_names_out().tolist().index("epnre_all")
    return result | {
        "energy_auc": float(roc_auc_score(truth, x[:, energy])), "unclear": float(unclear.mean()),
        "thresholds": list(model.thresholds_ or ()), "scores": np.stack(list(scores.values())), "truth": truth,
        "sjr": test.sjr.numpy(),
    }  # fmt: skip


def mixed(run: Run[Settings]) -> dict[str, float]:
    """Half barrage, half partial band: the first network with all features, and without either kind."""
    s, sets = run.settings, []
    for k, n in ((2, s.train_size), (4, s.test_size)):
        sets.append(joined(drawn(run, k, n // 2), drawn(run, k + 1, n // 2, s.band_sjr, PartialBand())))
    (X, y), (x, truth) = ((table(data), data.label.numpy()) for data in sets)
    sync = np.array([name.startswith("pss") for name in SSBFeatures().get_feature_names_out()])
    columns = {"all": sync | True, "without_pss": ~sync, "without_epnre": sync}
    return {k: float(network(run, **ALONE).fit(X[:, c], y).score(x[:, c], truth)) for k, c in columns.items()}


def controls(run: Run[Settings]) -> dict[str, float]:
    """A jammer far too weak, shuffled labels, and equal thresholds."""
    n = run.settings.control_size
    weak, weak_test = (drawn(run, k, n, (60.0, 60.0)) for k in (2, 3))
    model = network(run, folds=3).fit(table(weak), weak.label.numpy())
    alarm, truth = model.predict(table(weak_test)), weak_test.label.numpy()
    train, test = (drawn(run, k, n) for k in (4, 5))
    X, x, y = table(train), table(test), train.label.numpy()
    shuffled = network(run, **ALONE).fit(X, np.random.default_rng(run.seed).permutation(y))
    equal = network(run, **ALONE).fit(X, y)
    return {
        "accuracy": float((alarm == truth).mean()), "pd": float(alarm[truth == 1].mean()),
        "pfa": float(alarm[truth == 0].mean()),
        "agreement": float((equal.predict(x) == (first(equal, x) >= 0.5)).mean()),
        "shuffled_auc": float(roc_auc_score(test.label.numpy(), shuffled.predict_proba(x)[:, 1])),
    }  # fmt: skip


def run(run: Run[Settings]) -> None:
    """The law, the detectors, the features, the controls."""
    with threads(1):
        run.values("gamma_law", run.arm("gamma", gamma_law, run))
        found = run.arm("barrage", detectors, run)
        scores = [f"{kind}_{name}" for kind in ("double", "single") for name in ("accuracy", "auc", "pd", "unclear")]
        run.values("detection", pick(found, *scores))
        run.values("ordering", {kind: found[f"{kind}_accuracy"] for kind in ("double", "single", "raw", "linear")})
        run.values("features", run.arm("mixed", mixed, run))
        run.values("negative_control", run.arm("controls", controls, run))


def figures(results: Results) -> plots.Figures:
    """How well the detectors do, beside the energy detector."""
    return {"detection": detection_curves(results)}
