"""Measures decoding by order and by probabilities on a simulated translation with synonyms, and overconfidence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import chi2_contingency

from torchfolio.engine.recipes import adam
from torchfolio.experiments._synonym_translation import EOS, VOCABULARY, Decoder, Translations, trained
from torchfolio.insight.utility_probability import GRID, beam_search, fit_rationality, invariance_report, paradox_report
from torchfolio.models import MLP
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Simulated translation, and a small classifier that grows too sure."""

    steps: int = setting(1200, "batches of 64 sentences that the transformer trains on")
    dim: int = setting(64, "width of the transformer")
    inputs: int = setting(500, "sentences to fit on, and as many to report on")
    noise: float = setting(0.05, "share of target tokens that are random")
    risk_inputs: int = setting(200, "sentences decoded by minimum risk, from 16 samples each")
    epochs: int = setting(300, "number of epochs of the classifier")


SCALES = {
    "smoke": Settings(steps=20, dim=16, inputs=20, risk_inputs=4, epochs=5),
    "quick": Settings(),
    "full": Settings(steps=6000, dim=128, inputs=2000, risk_inputs=1000),
}


def translation(run: Run[Settings]) -> dict[str, Any]:
    """Everything that is measured on the transformer, fitted on other inputs than it is reported on."""
    net = trained(run)
    fitting, reported = Translations(net, run, run.seed + 1000), Translations(net, run, run.seed + 2000)
    on_grid = dict(zip(GRID, fitting.valid(fitting.decode(list(GRID))).double().mean(1).tolist(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_rationality(
            lambda kappa: on_grid.get(kappa) or fitting.validity(kappa), reference=fitting.validity(float("inf"))
        )
        untrained = Translations(Decoder(run.settings.dim).to(run.device), run, run.seed + 1000)
        hopeless = fit_rationality(untrained.validity, reference=fitting.validity(float("inf")))
    likely, kappa = fitting.likely(), found.kappa
    greedy, sampled, rational = (reported.decode(k) for k in (float("inf"), 1.0, kappa))
    share = {
        n: float(reported.valid(o).double().mean())
        for n, o in (("greedy", greedy), ("usual", sampled), ("fitted", rational))
    }
    losses = {k: reported.loss(k) for k in (likely, kappa)}
    return {
        **share, "kappa": kappa, "reached": found.reached, "untrained_reached": hopeless.reached, "likely": likely,
        "likely_validity": reported.validity(likely), "rise": losses[kappa] - losses[likely],
        "second": reported.second(rational), "second_greedy": reported.second(greedy),
        "second_usual": reported.second(sampled), "curve": list(on_grid.values()),
        "risk_fitted": reported.risk(kappa, run.settings.risk_inputs),
        "risk_usual": reported.risk(1.0, run.settings.risk_inputs), **scaling(reported),
    }  # fmt: skip


def scaling(reported: Translations) -> dict[str, float]:
    """What tripled utilities change: outputs of rules by order, and the frequencies of samples."""
    with torch.no_grad():
        logits = reported.step(reported.prefix)
    rules = {"argmax": lambda u: u.argmax(-1), "top 3": lambda u: u.topk(3, dim=-1).indices}
    report = invariance_report(rules, logits, {"3u": lambda u: 3 * u})
    changed = max(report["changed"].tolist())
    beams = [beam_search(lambda t, s=s: s * reported.step(t), reported.prefix[0], EOS, 1, 9).sequences for s in (1, 3)]
    words = [torch.bincount(reported.decode(k).flatten(), minlength=VOCABULARY) for k in (1.0, 3.0)]
    table = torch.stack(words)[:, (words[0] + words[1]) > 0].numpy()
    p_value: Any = chi2_contingency(table)[1]
    return {"changed": changed + float(beams[0] != beams[1]), "p_value": float(p_value)}


def overconfidence(run: Run[Settings]) -> dict[str, Any]:
    """A classifier of digits, trained far past its lowest loss on all images that it was not trained on."""
    data = run.data("digits")
    x, y = (torch.cat(parts) for parts in zip(*(p.tensors for p in (data.train, data.val, data.test)), strict=True))
    torch.manual_seed(run.seed)
    net, train, rest = MLP(64, 10, (128,)), (x[:500], y[:500]), (x[500:], y[500:])
    budget = {"epochs": run.settings.epochs, "batch_size": 64}
    history = run.fit(net, train, val=rest, optimizer=adam(3e-3), **budget).history.to_frame()
    return {**paradox_report(history), "losses": history["val_loss"].tolist()}


def run(run: Run[Settings]) -> None:
    """Translate, then grow too sure."""
    done = run.arm("translation", translation, run)
    run.values("transformation", pick(done, "usual", "fitted", "greedy", "kappa"))
    run.values("diversity", fitted=done["second"], greedy=done["second_greedy"], usual=done["second_usual"])
    run.values(
        "likelihood", kappa=done["likely"], validity=done["likely_validity"], usual=done["usual"], rise=done["rise"]
    )
    run.values("bayes_risk", fitted=done["risk_fitted"], usual=done["risk_usual"])
    run.values("control_scaling", changed=done["changed"], p_value=done["p_value"])
    run.values("control_untrained", reached=done["untrained_reached"])
    sure = run.arm("overconfidence", overconfidence, run)
    run.values("overconfidence", loss_ratio=sure["loss_ratio"], accuracy_change=100 * sure["accuracy_change"])


def figures(results: Results) -> plots.Figures:
    """Validity by rationality, and held-out loss by epoch."""
    valid, losses = {"samples": ("translation", "curve")}, {"digits": ("overconfidence", "losses")}
    across, up = "rationality", "share of valid outputs"
    return {
        "validity of samples": plots.curves(results, valid, x=GRID, xlabel=across, ylabel=up, logx=True),
        "held-out loss": plots.curves(results, losses, xlabel="epoch", ylabel="log loss (nats)"),
    }
