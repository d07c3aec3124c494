"""T-Miner: is a text classifier backdoored, and by which words? Without any text.

A generator that copies random sentences is trained until its copies change the classifier's verdict. Words that it adds
again and again are candidates; a candidate that flips most other sentences too survives, and is a trigger if the
classifier's hidden layer lies far from where ordinary words of the target class lead it.

Longer than most because the detector has as many settings as the method has steps: training, mining, judging, a verdict.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor.model_detector import ModelDetector, ModelVerdict, Scan
from torchfolio.backdoor.phrase_outliers import outlier_candidates
from torchfolio.backdoor.phrases import Phrase, auxiliary_phrases, extract_candidates, mrs
from torchfolio.backdoor.suspects import Pair
from torchfolio.backdoor.text import TextModel
from torchfolio.backdoor.text_generator import PerturbationGenerator, distinct_words, diversity, synthetic_corpus
from torchfolio.backdoor.tminer_verdict import Candidate, TMinerVerdict
from torchfolio.checks import between, positive, whole
from torchfolio.engine import seeded

__all__ = [
    "Candidate",
    "TMiner",
    "TMinerVerdict",
    "auxiliary_phrases",
    "extract_candidates",
    "mrs",
    "outlier_candidates",
]


@dataclass
class _Pair:
    """What is found on the way from one class to another."""

    source: int
    target: int
    pool: Tensor
    candidates: Counter[Phrase] = field(default_factory=Counter)
    flips: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)


class TMiner(ModelDetector):
    """Says whether a text classifier, from ids `[N, L]` to logits, is backdoored. It needs no text, only gradients.

    The generator $G$ is trained, the classifier $F$ frozen, by

    $$L = \\lambda_1\\, \\mathrm{CE}(G(x, y), x) + \\lambda_2\\, \\mathrm{CE}(F(G(x, 1 - y)), t) + \\lambda_3\\, L_\\mathrm{div}$$

    on random sentences $x$ that $F$ gives the source class, where the second term writes freely by Gumbel noise.
    Phrases of one to `max_len` words that its outputs gain are judged by `mrs` and `outlier_candidates`. Auxiliary
    phrases hold none of the survivors' words: in a small vocabulary they would hold the trigger too often.

    Args:
        generator: a pretrained `PerturbationGenerator`, or the file of one; it serves every classifier of a vocabulary.
            By default each scan trains its own.
        words: vocabulary, a word for each id; numbers by default.
        source: class that the attack would change; all by default.
        target: class that it would change to; all by default.
        special: ids that are no words: padding, unknown, begin, end, ….
        pad: id of padding.
        stop: id that ends every sentence, such as that of a full stop, if there is one.
        source_words: ids that sentences of the source class are made of, where random sentences all get one label.
        length: number of words of the random sentences.
        steps: number of training steps against the classifier, for each restart.
        lr: learning rate of Adam.
        batch_size: number of sentences in a batch.
        n_restarts: number of trainings with other seeds, whose candidates are put together. Every second one has the
            sign of the diversity turned in its first half, to see more words.
        lambdas: $\\lambda_1, \\lambda_2, \\lambda_3$.
        hard: whether the generator writes whole words; mixtures of word vectors otherwise, as in the authors' code.
        both_directions: whether sentences of the target class are changed too, as in the authors' code.
        dev_size: number of sentences that candidates are taken from.
        topk: number of likely words that stand in for each gained one; 1 is none.
        max_candidates: maximum number of candidates that are judged, the most frequent.
        max_len: maximum number of words of a candidate.
        mrs_size: number of sentences that candidates are judged on.
        alpha: misclassification rate that survivors exceed.
        aux_size: number of ordinary phrases of every length.
        quantile: quantile of their distances that is the radius of the clustering.
        pretrain_steps: number of pretraining steps of a generator of its own.
        embedding: name of the layer of word vectors; see `TextModel`.
        hidden: name of the layer that reads the hidden layer; see `TextModel`.

    Raises:
        ValueError: from `scan`, if the vocabulary is smaller than `4 * length`, does not fit the words or the generator,
            or the classifier gives all random sentences one label.

    Example:
        >>> generator = PerturbationGenerator(800).pretrain(2000, length=15)  # doctest: +SKIP
        >>> TMiner(generator, words=vocabulary).scan(classifier).trigger_words  # doctest: +SKIP

    Reference:
        Azizi et al., "T-Miner: A Generative Approach to Defend Against Trojan Attacks on DNN-based Text
        Classification", USENIX Security 2021, Section 4.
    """

    needs_clean: ClassVar[bool] = False

    def __init__(
        self,
        generator: PerturbationGenerator | str | Path | None = None,
        words: Sequence[str] | None = None,
        *,
        source: int | None = None,
        target: int | None = None,
        special: Sequence[int] = (0, 1, 2, 3),
        pad: int = 0,
        stop: int | None = None,
        source_words: Sequence[int] | None = None,
        length: int = 15,
        steps: int = 400,
        lr: float = 1e-3,
        batch_size: int = 64,
        n_restarts: int = 3,
        lambdas: Sequence[float] = (1.0, 0.5, 0.03),
        hard: bool = True,
        both_directions: bool = False,
        dev_size: int = 500,
        topk: int = 20,
        max_candidates: int = 2000,
        max_len: int = 3,
        mrs_size: int = 100,
        alpha: float = 0.6,
        aux_size: int = 1000,
        quantile: float = 0.99,
        pretrain_steps: int = 2000,
        embedding: str | None = None,
        hidden: str | None = None,
    ) -> None:
        sizes = {"length": length, "steps": steps, "batch_size": batch_size, "n_restarts": n_restarts, "topk": topk,
                 "dev_size": dev_size, "max_candidates": max_candidates, "max_len": max_len, "mrs_size": mrs_size,
                 "aux_size": aux_size, "pretrain_steps": pretrain_steps}  # fmt: skip
        for name, value in sizes.items():
            whole(name, value, 1)
        whole("pad", pad, 0)
        positive("lr", lr)
        between("alpha", alpha, 0, 1)
        between("quantile", quantile, 0, 1)
        if len(lambdas) != 3 or not all(v >= 0 and math.isfinite(v) for v in lambdas):
            raise ValueError(f"expected three weights of at least 0, got {lambdas!r}")
        if source is not None and source == target:
            raise ValueError(f"expected source and target to differ, got {source} for both")
        if words is not None and (isinstance(words, str) or not all(isinstance(w, str) for w in words)):
            raise ValueError("expected words to be a sequence of texts, one for each id")
        self.generator = PerturbationGenerator.load(generator) if isinstance(generator, str | Path) else generator
        self.words, self.source, self.target, self.special = words, source, target, tuple(special)
        self.pad, self.stop, self.source_words = pad, stop, source_words
        self.length, self.steps, self.lr, self.batch_size, self.n_restarts = length, steps, lr, batch_size, n_restarts
        self.lambdas, self.hard, self.both_directions = tuple(lambdas), hard, both_directions
        self.dev_size, self.topk, self.max_candidates, self.max_len = dev_size, topk, max_candidates, max_len
        self.mrs_size, self.alpha, self.aux_size, self.quantile = mrs_size, alpha, aux_size, quantile
        self.pretrain_steps, self.embedding, self.hidden = pretrain_steps, embedding, hidden

    # The steps of a scan

    def _scan(self, model: nn.Module, clean: Pair | None, scan: Scan) -> TMinerVerdict:
        text = TextModel(model, self.pad, self.embedding, self.hidden)
        tokens = self._tokens(text)
        generator = self._generator(len(tokens), scan).to(text.device)
        draws = scan.generator()
        leaning = text.logits(self._rows(tokens[:, None])).double().softmax(1)
        pairs = self._pairs(text, tokens, leaning, draws)
        for pair, restart in scan.items([(p, k) for p in pairs for k in range(self.n_restarts)], "training"):
            self._restart(pair, restart, generator, text, tokens, pairs, draws)
        judged = [(p, self._judge(p, text, tokens, leaning, draws)) for p in pairs if p.flips]
        return self._verdict(judged)

    def _tokens(self, text: TextModel) -> Tensor:
        """Ids of words `[K]`."""
        size = len(text.weight)
        if self.words is not None and len(self.words) != size:
            raise ValueError(f"expected a word for each of {size} ids, got {len(self.words)}")
        left = {self.pad, self.stop, *self.special}
        tokens = torch.tensor([i for i in range(size) if i not in left])
        if len(tokens) < 4 * self.length:
            raise ValueError(
                f"expected a vocabulary of at least {4 * self.length} words for sentences of {self.length}, got "
                f"{len(tokens)}: lower length"
            )
        return tokens.to(text.device)

    def _generator(self, size: int, scan: Scan) -> PerturbationGenerator:
        if self.generator is None:
            generator = PerturbationGenerator(size)
            return generator.pretrain(self.pretrain_steps, self.length, batch_size=self.batch_size, seed=scan.seed)
        if self.generator.vocab_size != size:
            raise ValueError(
                f"the generator writes {self.generator.vocab_size} words, the classifier has {size} (without the ids "
                f"{self.special})"
            )
        return copy.deepcopy(self.generator)

    def _rows(self, ids: Tensor) -> Tensor:
        """Phrases `[N, L]` as the classifier reads them."""
        return ids if self.stop is None else torch.cat([ids, ids.new_full((len(ids), 1), self.stop)], 1)

    def _pairs(self, text: TextModel, tokens: Tensor, leaning: Tensor, draws: torch.Generator) -> list[_Pair]:
        """All pairs of classes, with random sentences (numbers of words) that the classifier gives the source."""
        classes = range(leaning.shape[1])
        for name, value in {"source": self.source, "target": self.target}.items():
            if value is not None:
                whole(name, value, 0, len(classes) - 1)
        corpus = synthetic_corpus(max(2000, 4 * self.dev_size), self.length, len(tokens), draws).to(text.device)
        predicted = text.logits(self._rows(tokens[corpus])).argmax(1)
        pairs, missing = [], []
        for s in classes if self.source is None else [self.source]:
            for t in classes if self.target is None else [self.target]:
                if s == t:
                    continue
                pool = corpus[predicted == s]
                if len(pool) < self.batch_size or self.source_words is not None:
                    pool = torch.cat([pool, self._leaning_from(s, t, text, tokens, leaning, draws)])
                if len(pool):
                    pairs.append(_Pair(s, t, pool))
                else:
                    missing.append(s)
        if not pairs:
            raise ValueError(
                f"the classifier gives all random sentences the label {int(predicted[0])}: name words of the source class, "
                "source_words="
            )
        if missing:
            warnings.warn(
                f"no random sentence gets the labels {sorted(set(missing))}: they were not scanned", stacklevel=2
            )
        return pairs

    def _leaning_from(
        self, s: int, t: int, text: TextModel, tokens: Tensor, leaning: Tensor, draws: torch.Generator
    ) -> Tensor:
        """Sentences of words that lean to the source, or of those that the user named."""
        if self.source_words is None:
            words = (leaning[:, t] < leaning[:, t].mean()).nonzero()[:, 0]
        else:
            words = torch.isin(tokens, torch.tensor(self.source_words, device=tokens.device)).nonzero()[:, 0]
        if len(words) < self.length:
            return words.new_zeros(0, self.length)
        drawn = words[distinct_words(1000, self.length, len(words), draws).to(words.device)]
        return drawn[text.logits(self._rows(tokens[drawn])).argmax(1) == s]

    def _restart(
        self,
        pair: _Pair,
        restart: int,
        generator: PerturbationGenerator,
        text: TextModel,
        tokens: Tensor,
        pairs: Sequence[_Pair],
        draws: torch.Generator,
    ) -> None:
        """Train a copy of the generator and take its candidates."""
        seed = int(torch.randint(2**31, (1,), generator=draws))
        back = next((p.pool for p in pairs if (p.source, p.target) == (pair.target, pair.source)), None)
        turned = self.steps // 2 if restart % 2 else 0
        net = copy.deepcopy(generator)
        with seeded(seed):
            self._train(net, pair, back if self.both_directions else None, text, tokens, turned)
            self._mine(net, pair, text, tokens)

    def _train(
        self,
        net: PerturbationGenerator,
        pair: _Pair,
        back: Tensor | None,
        text: TextModel,
        tokens: Tensor,
        turned: int,
    ) -> None:
        """The generator against the classifier. In place."""
        optimizer = torch.optim.Adam(net.parameters(), self.lr)
        net.requires_grad_(True).train()
        sentences = pair.pool if back is None else torch.cat([pair.pool, back])
        is_back = torch.arange(len(sentences), device=text.device) >= len(pair.pool)
        goal = torch.where(is_back, pair.source, pair.target)
        for step in range(self.steps):
            rows = torch.randint(len(sentences), (self.batch_size,)).to(text.device)
            x, y = sentences[rows], is_back[rows].float()
            encoded = net.encode(x)
            logits = net.predict(x, encoded, y)
            loss = self.lambdas[0] * net.reconstruction(logits, x)
            if self.lambdas[1]:
                written, _ = net.decode(encoded, 1 - y, self.length + 1, sample=True, hard=self.hard)
                said = text.embedded(*self._rendered(written, text, tokens))
                loss = loss + self.lambdas[1] * F.cross_entropy(said, goal[rows])
            if self.lambdas[2]:
                sign = -1 if step < turned else 1
                loss = loss + sign * self.lambdas[2] * diversity(logits, net.ended(x))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
        net.eval()

    def _rendered(self, written: Tensor, text: TextModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and word vectors of what the generator wrote `[B, T, K + 1]`, as the classifier reads them."""
        stop = self.pad if self.stop is None else self.stop
        ids = torch.cat([tokens, tokens.new_tensor([stop])])
        numbers = written.argmax(-1)
        ended = numbers == len(tokens)
        read = ended.cumsum(1) - ended.long() == 0  # up to the first end, and it
        words = written.to(text.weight) @ text.weight[ids]
        padding = text.weight[self.pad].expand_as(words)
        return torch.where(read, ids[numbers], self.pad), torch.where(read[..., None], words, padding)

    @torch.no_grad()
    def _mine(self, net: PerturbationGenerator, pair: _Pair, text: TextModel, tokens: Tensor) -> None:
        """What the generator adds to sentences of the source, and likely words in place of those."""
        x = pair.pool[: self.dev_size]
        written, logits = net.decode(net.encode(x), x.new_ones(len(x)), self.length + 1, sample=False)
        predicted = text.logits(self._rendered(written, text, tokens)[0]).argmax(1)
        numbers = written.argmax(-1)
        before = x.tolist()
        after = [row[: row.index(net.end)] if net.end in row else row for row in numbers.tolist()]
        pair.flips.append(float((predicted == pair.target).double().mean()))
        pair.kept.append(sum(len(set(a) & set(b)) for a, b in zip(before, after, strict=True)) / x.numel())
        guess = net(x, x.new_zeros(len(x))).argmax(-1)
        pair.copied.append(float((guess == net.ended(x)).double().mean()))
        counts = extract_candidates(before, after, self.max_len)
        likely = logits[..., : len(tokens)].topk(min(self.topk, len(tokens))).indices.tolist()
        others: set[Phrase] = set()
        for a, b, top in zip(before, after, likely, strict=True):
            phrase = tuple(sorted(set(b) - set(a)))
            if phrase in counts:
                for place, word in enumerate(b):
                    if word in phrase:
                        rest = set(phrase) - {word}
                        others |= {tuple(sorted(rest | {w})) for w in top[place] if w not in a and w not in rest}
        pair.candidates.update(counts)
        pair.candidates.update(dict.fromkeys(others, 0))

    def _judge(
        self, pair: _Pair, text: TextModel, tokens: Tensor, leaning: Tensor, draws: torch.Generator
    ) -> tuple[list[Candidate], float]:
        """The candidates that survive, and the radius of the clustering."""
        target = leaning[:, pair.target]
        lean = target > target.mean()
        sentences = self._judges(pair, lean, text, tokens, draws)
        phrases = [p for p, _ in pair.candidates.most_common(self.max_candidates)]
        ids = [tuple(tokens[list(p)].tolist()) for p in phrases]
        rates = mrs(text, ids, tokens[sentences], pair.target, stop=self.stop, generator=draws)
        alive = [k for k in range(len(phrases)) if rates[k] > self.alpha]
        if not alive:
            return [], math.nan
        lengths = sorted({len(phrases[k]) for k in alive})
        words = tokens[self._ordinary(lean, [phrases[k] for k in alive])]
        auxiliary = torch.cat([text.hidden(auxiliary_phrases(words, n, self.aux_size, draws)) for n in lengths])
        states = torch.cat([text.hidden(torch.tensor([ids[k]])) for k in alive])
        score, distance, eps = outlier_candidates(states, auxiliary, self.quantile)
        return [
            Candidate(
                tuple(self._word(i) for i in ids[k]), (pair.source, pair.target), pair.candidates[phrases[k]],
                float(rates[k]), float(score[n]), float(distance[n]), bool(score[n] > 1),
            )
            for n, k in enumerate(alive)
        ], eps  # fmt: skip

    @staticmethod
    def _ordinary(lean: Tensor, survivors: Sequence[Phrase], least: int = 20) -> Tensor:
        """Words that lean to the target and are in no survivor, or, of small vocabularies, in the fewest."""
        held = Counter(word for phrase in survivors for word in phrase)
        leaning = lean.nonzero()[:, 0].tolist()
        free = [w for w in leaning if not held[w]]
        return torch.tensor(free if len(free) >= least else sorted(leaning, key=lambda w: held[w])[:least])

    def _judges(self, pair: _Pair, lean: Tensor, text: TextModel, tokens: Tensor, draws: torch.Generator) -> Tensor:
        """Sentences of the source, of words that do not lean to the target where there are enough of those."""
        words = (~lean).nonzero()[:, 0]
        if self.source_words is None and len(words) >= self.length:
            drawn = words[distinct_words(4 * self.mrs_size, self.length, len(words), draws).to(words.device)]
            drawn = drawn[text.logits(self._rows(tokens[drawn])).argmax(1) == pair.source]
            if len(drawn):
                return drawn[: self.mrs_size]
        return pair.pool[-self.mrs_size :]

    def _word(self, i: int) -> str:
        return f"#{i}" if self.words is None else self.words[i]

    def _verdict(self, judged: Sequence[tuple[_Pair, tuple[list[Candidate], float]]]) -> TMinerVerdict:
        candidates = [c for _, (survivors, _) in judged for c in survivors]
        candidates.sort(key=lambda c: (-c.outlier, -c.count, -c.mrs))
        outliers = [c for c in candidates if c.outlier]
        shared = Counter(word for c in outliers for word in c.phrase)
        pairs = [p for p, _ in judged]
        flips, copied = (
            min(max(v) for v in values) for values in ([p.flips for p in pairs], [p.copied for p in pairs])
        )
        if self.lambdas[1] and flips < 0.5:
            warnings.warn(
                f"the generator flips only {flips:.0%} of the sentences: that nothing is found says little; raise steps",
                stacklevel=3,
            )
        if copied < 0.5:
            warnings.warn(
                f"the generator copies only {copied:.0%} of the words: raise pretrain_steps, or lower lr", stacklevel=3
            )
        evidence: dict[str, Any] = {
            "candidates": sum(len(p.candidates) for p in pairs), "survivors": len(candidates), "outliers": len(outliers),
            "flip_rate": flips, "copied": copied, "content_kept": sum(max(p.kept) for p in pairs) / len(pairs),
            "largest_distance": max((c.distance for c in candidates), default=0.0),
            "radius": {f"{p.source} to {p.target}": eps for p, (_, eps) in judged},
        }  # fmt: skip
        return TMinerVerdict(
            bool(outliers), max((c.score for c in candidates), default=0.0), 1.0,
            tuple(dict.fromkeys(c.pair for c in outliers)), [c.phrase for c in outliers], evidence,
            candidates=tuple(candidates), trigger_words=tuple(word for word, _ in shared.most_common()),
        )  # fmt: skip

    def pictures(self, verdict: ModelVerdict, classes: Sequence[str]) -> list[tuple[Any, str]]:
        if not isinstance(verdict, TMinerVerdict) or not verdict.candidates:
            return []
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for outlier, label in ((False, "ordinary"), (True, "outlier")):
            chosen = [c for c in verdict.candidates if c.outlier == outlier]
            ax.scatter([c.score for c in chosen], [c.mrs for c in chosen], label=label)
        ax.axvline(verdict.threshold, c="k", ls="--")
        ax.set(xlabel="distance from ordinary phrases", ylabel="misclassification rate")
        ax.legend()
        return [(fig, "Phrases that flip the classifier: triggers lie far from ordinary phrases.")]
