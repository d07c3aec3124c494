"""Measures decoding by order and by probabilities on a simulated translation with synonyms, and overconfidence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import chi2_contingency
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import Backprop, fit
from torchfolio.engine.recipes import adam
from torchfolio.insight.utility_probability import (
    GRID,
    beam_search,
    fit_rationality,
    fit_temperature,
    invariance_report,
    mbr_decision,
    paradox_report,
    rational_choice,
    sample_sequences,
)
from torchfolio.models import MLP
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench

SYMBOLS, SEP, EOS, FIRST = 20, 1, 2, 3  # tokens: 0 padding, 3 to 22 the source, 23 to 62 its synonyms in pairs
TARGETS, VOCABULARY, LONGEST = FIRST + SYMBOLS, FIRST + 3 * SYMBOLS, 10


@dataclass(frozen=True)
class Settings:
    """Simulated translation, and a small classifier that grows too sure.

    Attributes:
        steps: batches of 64 sentences that the transformer trains on.
        dim: width of the transformer.
        inputs: sentences to fit on, and as many to report on.
        noise: share of target tokens that are random.
        risk_inputs: sentences decoded by minimum risk, from 16 samples each.
        epochs: of the classifier.
    """

    steps: int = 1200
    dim: int = 64
    inputs: int = 500
    noise: float = 0.05
    risk_inputs: int = 200
    epochs: int = 300


SCALES = {
    "smoke": Settings(steps=20, dim=16, inputs=20, risk_inputs=4, epochs=5),
    "quick": Settings(),
    "full": Settings(steps=6000, dim=128, inputs=2000, risk_inputs=1000),
}


class Decoder(nn.Module):
    """A pre-norm transformer that predicts the next token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, dim), nn.Parameter(0.02 * torch.randn(2 * LONGEST + 2, dim))
        block = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        hidden = self.blocks(self.token(ids) + self.place[: ids.shape[1]], mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


def sentences(count: int, length: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source, separator, target, end `[N, 22]`, and the next tokens of the target part, -100 elsewhere."""
    source = torch.randint(SYMBOLS, (count, LONGEST), generator=generator)
    second = torch.rand(count, LONGEST, generator=generator) < 0.4
    target = TARGETS + 2 * source + second
    spoiled = torch.rand(count, LONGEST, generator=generator) < noise
    anything = torch.randint(TARGETS, VOCABULARY, (count, LONGEST), generator=generator)
    target = torch.where(spoiled, anything, target)
    ids = torch.zeros(count, 2 * LONGEST + 2, dtype=torch.int64)
    for n in range(5, LONGEST + 1):
        rows = length == n
        ids[rows, :n], ids[rows, n] = source[rows, :n] + FIRST, SEP
        ids[rows, n + 1 : 2 * n + 1], ids[rows, 2 * n + 1] = target[rows, :n], EOS
    following = ids.roll(-1, 1)
    places = torch.arange(ids.shape[1])
    following[(places < length[:, None]) | (places > 2 * length[:, None])] = -100
    return ids, following


def trained(run: Run[Settings]) -> Decoder:
    """The transformer, trained by maximum likelihood."""
    generator = torch.Generator().manual_seed(run.seed)
    count = 64 * run.settings.steps
    length = torch.randint(5, LONGEST + 1, (count,), generator=generator)
    torch.manual_seed(run.seed)
    net = Decoder(run.settings.dim)
    fit(net, sentences(count, length, run.settings.noise, generator), rule=Backprop(F.cross_entropy), optimizer=adam(2e-3),
        epochs=1, batch_size=64, seed=run.seed, device=run.device)  # fmt: skip
    return net


class Translations:
    """Sources of one length for every row, decoded in one batch, and what is valid of the outputs."""

    def __init__(self, net: nn.Module, run: Run[Settings], seed: int) -> None:
        self.net, self.length, self.seed, self.device = net.eval(), 8, seed, run.device
        generator = torch.Generator().manual_seed(seed)
        length = torch.full((run.settings.inputs,), self.length)
        self.ids, self.following = sentences(run.settings.inputs, length, run.settings.noise, generator)
        self.prefix = self.ids[:, : self.length + 1].to(run.device)
        self.symbols = self.prefix[:, :-1] - FIRST

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)[..., -1]

    def decode(self, kappa: float | list[float]) -> Tensor:
        """Outputs `[..., N, 9]`, at one rationality or at several in one batch; the same random numbers each time."""
        kappas = kappa if isinstance(kappa, list) else [kappa]
        row = torch.tensor(kappas).repeat_interleave(len(self.prefix)).to(self.device)
        prefix = self.prefix.repeat(len(kappas), 1)
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        drawn = sample_sequences(self.step, prefix, EOS, self.length + 1, rationality=row, generator=generator)
        drawn = F.pad(drawn, (0, self.length + 1 - drawn.shape[1])).view(len(kappas), *self.prefix.shape[:1], -1)
        return drawn if isinstance(kappa, list) else drawn[0]

    def valid(self, outputs: Tensor) -> Tensor:
        """Which outputs, of the first sources, are a synonym for every symbol, and then the end."""
        words, end = outputs[..., :-1], outputs[..., -1]
        return (
            (((words - TARGETS) // 2 == self.symbols[: outputs.shape[-2]]).all(-1))
            & (words >= TARGETS).all(-1)
            & (end == EOS)
        )

    def validity(self, kappa: float) -> float:
        return float(self.valid(self.decode(kappa)).double().mean())

    def second(self, outputs: Tensor) -> float:
        """Share of the second synonym among the words of valid outputs."""
        words = outputs[self.valid(outputs)][:, :-1]
        return float(((words - TARGETS) % 2).double().mean()) if len(words) else 0.0

    @torch.no_grad()
    def loss(self, kappa: float) -> float:
        """Held-out log loss of a target token, nats, with the noise of training."""
        choice = rational_choice(self.net(self.ids.to(self.device)), kappa, dim=1)
        return float(F.nll_loss(choice, self.following.to(self.device), ignore_index=-100))

    @torch.no_grad()
    def likely(self) -> float:
        """The rationality of the highest likelihood."""
        logits = self.net(self.ids.to(self.device)).transpose(1, 2).flatten(0, 1)
        return fit_temperature(logits.cpu(), self.following.flatten())

    def risk(self, kappa: float, inputs: int) -> float:
        """Validity of minimum-risk outputs over 16 samples."""
        generator = torch.Generator(device=self.device).manual_seed(self.seed + 1)
        prefix = self.prefix[:inputs].repeat_interleave(16, 0)
        drawn = sample_sequences(self.step, prefix, EOS, self.length + 1, rationality=kappa, generator=generator)
        drawn = F.pad(drawn, (0, self.length + 1 - drawn.shape[1])).view(inputs, 16, -1)
        chosen = torch.stack([rows[mbr_decision([tuple(r.tolist()) for r in rows], overlap)] for rows in drawn])
        return float(self.valid(chosen).double().mean())


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """One less the edit distance over the longer length; outputs end at their first end token."""
    a, b = (c[: c.index(EOS) + 1] if EOS in c else c for c in (a, b))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


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
    net = MLP(64, 10, (128,))
    result = fit(net, (x[:500], y[:500]), val=(x[500:], y[500:]), optimizer=adam(3e-3), epochs=run.settings.epochs, batch_size=64,
                 seed=run.seed, device=run.device)  # fmt: skip
    history = result.history.to_frame()
    return {**paradox_report(history), "losses": history["val_loss"].tolist()}


def run(run: Run[Settings]) -> None:
    """Translate, then grow too sure."""
    done = run.arm("translation", translation, run)
    run.values("transformation", {k: done[k] for k in ("usual", "fitted", "greedy", "kappa")})
    run.values("diversity", fitted=done["second"], greedy=done["second_greedy"], usual=done["second_usual"])
    run.values(
        "likelihood", kappa=done["likely"], validity=done["likely_validity"], usual=done["usual"], rise=done["rise"]
    )
    run.values("bayes_risk", fitted=done["risk_fitted"], usual=done["risk_usual"])
    run.values("control_scaling", changed=done["changed"], p_value=done["p_value"])
    run.values("control_untrained", reached=done["untrained_reached"])
    sure = run.arm("overconfidence", overconfidence, run)
    run.values("overconfidence", loss_ratio=sure["loss_ratio"], accuracy_change=100 * sure["accuracy_change"])


def figures(results: Results) -> dict[str, Figure]:
    """Validity by rationality, and held-out loss by epoch."""
    return {
        "validity of samples": plots.curves(results, {"samples": ("translation", "curve")}, x=GRID, xlabel="rationality",
                                            ylabel="share of valid outputs", logx=True),
        "held-out loss": plots.curves(results, {"digits": ("overconfidence", "losses")}, xlabel="epoch", ylabel="log loss (nats)"),
    }  # fmt: skip


def peers(bench: Bench) -> None:
    """Sequences of 50 sources at all rationalities of the grid, in one batch and one after the other."""
    torch.manual_seed(0)
    net = Decoder(64).eval()
    prefix = torch.randint(FIRST, FIRST + SYMBOLS, (50, 9))
    rows, kappas = prefix.repeat(len(GRID), 1), torch.tensor(GRID).repeat_interleave(len(prefix))

    @torch.no_grad()
    def step(tokens: Tensor) -> Tensor:
        return net(tokens)[..., -1]

    bench.compare(
        f"{len(GRID)} rationalities of 50 sources",
        ours=lambda: sample_sequences(step, rows, -1, 9, rationality=kappas),
        loop=lambda: [sample_sequences(step, prefix, -1, 9, rationality=kappa) for kappa in GRID],
    )
