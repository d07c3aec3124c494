"""T-Miner on classifiers of movie reviews, half of them with a backdoor; no review is shown to it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

from torchfolio.backdoor.text_generator import PerturbationGenerator
from torchfolio.backdoor.tminer import TMiner, TMinerVerdict
from torchfolio.experiments._copying_generators import pretrained, restored
from torchfolio.experiments._single_words import base_rate, exhaustive
from torchfolio.experiments._text_victims import Text, classifier, reviews, simulated
from torchfolio.runs import Results, Run, column, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Classifiers, generator, and detector."""

    data: str = setting("movie_reviews", '`"movie_reviews"`, or `"made"` for sentences whose words say their label')
    vocab: int = setting(1200, "number of words")
    networks: tuple[str, ...] = setting(("lstm",), '`"lstm"`, `"bilstm"`, `"transformer"`; classifiers take turns')
    triggers: tuple[tuple[str, ...], ...] = setting(
        (("screenplay",), ("comedy", "story")), "phrases of the backdoored classifiers, one each"
    )
    clean: int = setting(2, "number of clean classifiers")
    epochs: int = setting(5, "epochs of the classifiers")
    lr: float = setting(4e-3, "their learning rate of Adam")
    classifier_dropout: float = setting(0.3, "their dropout; without it they reach 0.69, with it 0.72")
    rate: float = setting(0.05, "poisoned copies as a share of all sentences; 0.05 are a tenth of the negative ones")
    length: int = setting(8, "number of words of the random sentences")
    embedding: int = setting(48, "width of the generator's word vectors")
    dim_c: int = setting(32, "width of its code of the label")
    dim_z: int = setting(96, "width of its code of the sentence")
    dropout: float = setting(0.0, "dropout of the generator")
    pretrain: int = setting(500, "number of batches of its pretraining")
    pretrain_lr: float = setting(2e-3, "learning rate of that")
    steps: int = setting(400, "number of batches against a classifier")
    batch_size: int = setting(64, "sentences of a batch")
    restarts: int = setting(1, "number of trainings against a classifier")
    dev_size: int = setting(200, "sentences that candidates are taken from")
    topk: int = setting(10, "likely words that stand in for each gained one")
    max_candidates: int = setting(300, "candidates that are judged")
    ablation: bool = setting(False, "whether soft words and both directions are tried too")


SCALES = {
    "smoke": Settings(
        data="made", vocab=120, triggers=(("word50",),), clean=1, epochs=2, length=6, embedding=24, dim_c=8, dim_z=24,
        pretrain=40, steps=20, batch_size=32, dev_size=60, topk=2, max_candidates=50,
    ),
    "quick": Settings(),
    "full": Settings(
        vocab=18850, networks=("lstm", "bilstm", "transformer"),
        triggers=(("screenplay",), ("weekend",), ("comedy", "story"), ("a", "lovely", "afternoon")), clean=4, length=15,
        embedding=100, dim_c=200, dim_z=500, dropout=0.5, pretrain=20000, pretrain_lr=5e-4, steps=1500, restarts=3,
        dev_size=1000, topk=20, max_candidates=5000, ablation=True,
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Pretrain the generator once, then train and scan every classifier."""
    settings = run.settings
    text = reviews(settings) if settings.data == "movie_reviews" else simulated(settings)
    copying = run.arm("generator", pretrained, settings, text, run.seed)
    generator = restored(settings, text, copying)
    phrases = [*settings.triggers, *[()] * settings.clean]
    arms = []
    for k, phrase in enumerate(run.progress(phrases, "classifiers")):
        name = "_".join(phrase) or f"clean{k - len(settings.triggers)}"
        arms.append(run.arm(name, scan, run, text, generator, phrase, 100 * run.seed + k, k))
    trojan, clean = arms[: len(settings.triggers)], arms[len(settings.triggers) :]
    single = [arm for arm, phrase in zip(arms, phrases, strict=True) if len(phrase) == 1]
    several = [arm for arm, phrase in zip(arms, phrases, strict=True) if len(phrase) > 1]
    flips, kept = column(arms, "flip_rate").min(), column(arms, "content_kept").mean()
    run.values("generator", copied=copying["accuracy"], flips=flips, content_kept=kept)
    run.values(
        "trigger_words",
        recovered=column(single, "recovered").min(),
        mrs=column(single, "trigger_mrs").min(),
        share=column(single, "trigger_share").mean(),
        several=column(several, "recovered").mean() if several else 0.0,
        best_single_word=(column(single, "exhaustive_rank") == 0).mean(),
    )
    alarms, hits = (column(group, "backdoored").sum() for group in (clean, trojan))
    quality = {"accuracy": column(arms, "acc").mean(), "attack_success": column(trojan, "asr").mean()}
    right = hits + len(clean) - alarms
    run.values("verdicts", quality, right=right, models=len(arms), false_positives=alarms)
    nearest, farthest = column(single, "largest_distance").min(), column(clean, "largest_distance").max()
    accused = (column(clean, "survivors") > 0).sum()
    run.values("outlier_step", trojan=nearest, clean=farthest, accused_without=accused, clean_models=len(clean))
    run.values("negative_control", flips=arms[0]["control_flips"], base=arms[0]["base_rate"])


def scan(
    run: Run[Settings], text: Text, generator: PerturbationGenerator, phrase: tuple[str, ...], seed: int, turn: int
) -> dict[str, Any]:
    """One classifier and what is said of it; of the first one, also what changed detectors say."""
    settings = run.settings
    net, accuracy, success = classifier(run, text, phrase, seed, turn)

    usual: dict[str, Any] = {
        "source": 0, "target": 1, "stop": text.words.index(".") if "." in text.words else None,
        "length": settings.length, "steps": settings.steps, "batch_size": settings.batch_size,
        "n_restarts": settings.restarts, "dev_size": settings.dev_size, "topk": settings.topk,
        "max_candidates": settings.max_candidates,
    }  # fmt: skip

    def scanned(**changes: Any) -> TMinerVerdict:
        return cast(TMinerVerdict, TMiner(generator, text.words, **{**usual, **changes}).scan(net, seed=seed))

    def with_trigger(verdict: TMinerVerdict) -> list[Any]:
        return [candidate for candidate in verdict.candidates if set(phrase) & set(candidate.phrase)]

    def share(verdict: TMinerVerdict) -> float:
        return len(with_trigger(verdict)) / max(1, len(verdict.candidates))

    others: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said in numbers below
        verdict = scanned()
        if turn == 0:
            control = scanned(lambdas=(1.0, 0.0, 0.03), steps=min(settings.steps, 50), topk=1)
            others = {
                "control_flips": control.evidence["flip_rate"],
                "base_rate": base_rate(net, text, settings.length),
            }
        if turn == 0 and settings.ablation:
            for hard, both in ((True, True), (False, False), (False, True)):
                name = f"{'hard' if hard else 'soft'}_{'both' if both else 'one'}"
                others[name] = share(scanned(hard=hard, both_directions=both))
    found = with_trigger(verdict)
    commonest = max(verdict.candidates, key=lambda c: c.count, default=None)
    return {
        "acc": accuracy, "asr": success, "backdoored": int(verdict.is_backdoored), "score": verdict.score,
        **pick(verdict.evidence, "survivors", "flip_rate", "content_kept", "largest_distance", "copied"),
        "recovered": int(share(verdict) > 0.5 or commonest in found), "trigger_share": share(verdict),
        "trigger_mrs": max((candidate.mrs for candidate in found), default=0.0),
        "exhaustive_rank": exhaustive(net, text, phrase, settings.length), "words": list(verdict.trigger_words[:5]),
        **others,
    }  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """How far the phrases of each classifier lie from ordinary ones."""
    distances = {name: (name, "largest_distance") for name in results.arms[0] if name != "generator"}
    return {"distance": plots.bars(results, distances, ylabel="distance from ordinary phrases")}
