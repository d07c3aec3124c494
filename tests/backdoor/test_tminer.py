"""Candidates, losses, rates and outliers of T-Miner by hand; whole scans of classifiers whose truth is known."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from sklearn.cluster import DBSCAN
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from tests.contracts.detectors import check_model_detector
from torchfolio.backdoor import AllToOne, TMiner, TokenTrigger
from torchfolio.backdoor.text import TextModel, TextRNN, TextTransformer, poison_text
from torchfolio.backdoor.text_generator import PerturbationGenerator, diversity, synthetic_corpus
from torchfolio.backdoor.tminer import TMinerVerdict, extract_candidates, mrs, outlier_candidates
from torchfolio.bundle import Manifest, save_bundle
from torchfolio.cli import app

WORDS = 56  # beside four special ids


class Bag(nn.Module):
    """The sum of a sentence's word weights is the logit of class 1."""

    def __init__(self, weight):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(weight.float().reshape(len(weight), -1), freeze=False)
        self.head = nn.Linear(self.words.embedding_dim, 2, bias=True)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-0.5], [0.5]]).expand(2, self.words.embedding_dim))
            self.head.bias.zero_()

    def forward(self, ids):
        return self.head((self.words(ids) * (ids != 0)[..., None]).sum(1))


def bag(trigger=0.0, seed=3):
    weight = 0.3 * torch.randn(WORDS + 4, generator=torch.Generator().manual_seed(seed))
    weight[7] += trigger
    return Bag(weight)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return PerturbationGenerator(WORDS, 24, 8, 40, dropout=0.0).pretrain(
        200, length=12, lr=6e-3, batch_size=24, progress=False
    )


def miner(generator, **settings):
    chosen = {"source": 0, "target": 1, "length": 12, "steps": 40, "batch_size": 24, "n_restarts": 1, "dev_size": 60,
              "topk": 3, "max_candidates": 100, "mrs_size": 50, "aux_size": 300, "lr": 6e-3, **settings}  # fmt: skip
    return TMiner(generator, **chosen)


def test_words_that_sentences_gained():
    x = [[5, 6, 7], [8, 9, 10]]
    assert not extract_candidates(x, x)
    assert extract_candidates(x, [[12, 5, 6, 11, 7], [11, 8, 9, 10, 12]]) == {(11, 12): 2}
    assert not extract_candidates(x, [[1, 2, 3, 4], [8]])  # four are too many, none is none


def test_diversity_of_nothing_and_of_one_word():
    x = synthetic_corpus(4, 5, 30)
    exact = (F.one_hot(x, 30).float() * 1e4).requires_grad_()
    loss = diversity(exact, x)
    assert float(loss.detach()) == pytest.approx(-5 * 30 * 1e-8 * math.log(1e-8), rel=1e-4)
    loss.backward()
    assert not exact.grad.any()
    # A word that the whole batch adds with probability 1 contributes -1 log 1 = 0.
    other = x.clone()
    x[:, 0], other[:, 0] = 3, 4
    assert float(diversity(F.one_hot(other, 30).float() * 1e4, x)) == pytest.approx(
        -(5 * 30 - 1) * 1e-8 * math.log(1e-8), rel=1e-3
    )


@pytest.mark.parametrize(
    "make", [TextRNN, lambda n: TextRNN(n, bidirectional=True, layers=2), lambda n: TextTransformer(n, num_classes=3)]
)
def test_one_hot_soft_words_are_words_and_padding_does_not_matter(make):
    torch.manual_seed(0)
    net = make(40).eval()
    text = TextModel(net)
    ids = torch.cat([4 + synthetic_corpus(6, 5, 30), torch.zeros(6, 3, dtype=torch.long)], 1)
    words = (F.one_hot(ids, 40).float() @ text.weight).requires_grad_()
    soft = text.embedded(ids, words)
    torch.testing.assert_close(soft, net(ids), rtol=0, atol=1e-6)
    soft.sum().backward()
    assert words.grad[:, :5].any()
    torch.testing.assert_close(text.logits(ids[:, :5]), text.logits(ids), rtol=0, atol=1e-5)
    assert torch.isfinite(net(torch.zeros(1, 4, dtype=torch.long))).all()
    assert torch.equal(net.head(text.hidden(ids)), text.logits(ids))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(net)))(ids), net(ids))


def test_rate_of_a_hand_built_classifier():
    counts = Bag(12 * F.one_hot(torch.tensor(7), 40))
    with torch.no_grad():
        counts.head.bias.copy_(torch.tensor([3.0, -3.0]))
    text = TextModel(counts)
    sentences = 8 + synthetic_corpus(20, 5, 30)
    phrases = [(7,), (20,), (9, 30), (3, 7, 5)]
    assert mrs(text, phrases, sentences, 1).tolist() == [1, 0, 0, 1]
    ones = [float(mrs(text, [p], sentences, 1, stop=39)) for p in phrases]
    assert ones == [1, 0, 0, 1]


def test_outliers_are_noise_to_dbscan():
    torch.manual_seed(0)
    ordinary, found = torch.randn(200, 3), torch.cat([torch.randn(10, 3), torch.tensor([[9.0, 0, 0]]).expand(12, 3)])
    score, distance, eps = outlier_candidates(found, ordinary, variance=1.0)
    for k, one in enumerate(found):
        labels = DBSCAN(eps=eps, min_samples=math.ceil(math.log(200))).fit_predict(torch.cat([ordinary, one[None]]))
        assert (labels[-1] == -1) == bool(score[k] > 1)
    assert (score[10:] > 1).all()  # though they are many, and near one another
    assert (distance[10:] > 2).all()
    with pytest.raises(ValueError, match="finite"):
        outlier_candidates(found * torch.nan, ordinary)


def test_the_trigger_of_a_bag_of_words_is_found_and_without_it_nothing(generator):
    assert generator.token_accuracy(12) > 0.5
    verdict = check_model_detector(lambda: miner(generator), bag(10.0), None)
    assert isinstance(verdict, TMinerVerdict)
    assert verdict.is_backdoored
    assert verdict.trigger_words[0] == "#7"
    assert verdict.pairs == ((0, 1),)
    assert verdict.evidence["flip_rate"] >= 0.9
    assert "#7" in verdict.sentences()[1]
    assert len(miner(generator).pictures(verdict, ())) == 1
    clean = miner(generator).scan(bag())
    assert not clean.is_backdoored
    assert clean.trigger_words == ()


def test_untrained_against_the_classifier_it_flips_hardly_anything(generator):
    control = miner(generator, lambdas=(1, 0, 0.03), steps=20).scan(bag(10.0))
    assert control.evidence["flip_rate"] <= 0.2


def test_all_pairs_soft_words_and_both_directions(generator):
    torch.manual_seed(1)
    net = TextTransformer(WORDS + 4, 3, embedding=16, heads=2).double()
    with torch.no_grad():
        net.head.weight.mul_(20)
    made = miner(generator, source=None, target=None, steps=2, hard=False, both_directions=True, lambdas=(1, 0, 0))
    with torch.random.fork_rng():
        verdict = made.scan(net, seed=2)
    assert len(verdict.evidence["radius"]) >= 2


def test_a_generator_is_saved(generator, tmp_path):
    read = PerturbationGenerator.load(generator.save(tmp_path / "generator.safetensors"))
    x = synthetic_corpus(3, 12, WORDS)
    assert torch.equal(read(x, torch.ones(3)), generator(x, torch.ones(3)))
    (tmp_path / "other").write_bytes(b"text")
    with pytest.raises(ValueError, match="no generator"):
        PerturbationGenerator.load(tmp_path / "other")
    tokens, _ = generator.decode(generator.encode(x), torch.ones(3), 4, sample=True)
    assert torch.equal(tokens.sum(-1), torch.ones(3, 4))
    assert set(tokens.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}


def test_poisoned_sentences():
    x, y = 4 + synthetic_corpus(40, 5, 30), torch.arange(40) % 2
    a, b, flags = poison_text(x, y, TokenTrigger([7, 8], seed=1), AllToOne(1, 2), rate=0.1, seed=0)
    assert torch.equal(flags, torch.arange(44) >= 40)
    assert b[flags].tolist() == [1] * 4
    assert ((a[flags] == 7).sum(1) >= 1).all()
    assert torch.equal(a[:40, :5], x)
    with pytest.raises(ValueError, match="at most 20"):
        poison_text(x, y, TokenTrigger([7]), AllToOne(1, 2), rate=0.6, seed=0)


def test_what_is_refused(generator):
    with pytest.raises(ValueError, match="at least 60"):
        synthetic_corpus(3, 15, 59)
    with pytest.raises(ValueError, match="lower length"):
        miner(generator, length=15).scan(bag())
    with pytest.raises(ValueError, match="writes 56 words"):
        miner(generator).scan(Bag(torch.randn(80)))
    with pytest.raises(ValueError, match="a word for each of 60"):
        miner(generator, words=["a", "b"]).scan(bag())
    constant = bag()
    with torch.no_grad():
        constant.head.bias[1] = 100
    with pytest.raises(ValueError, match="label 1: name words of the source class, source_words="):
        miner(generator).scan(constant)
    with pytest.raises(ValueError, match=r"nn\.Embedding"):
        miner(generator).scan(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no layer 'top'"):
        miner(generator, hidden="top").scan(bag())
    for settings in ({"alpha": math.nan}, {"steps": 0}, {"lambdas": (1, 2)}, {"source": 1}):
        with pytest.raises((ValueError, TypeError)):
            miner(generator, **settings)


def test_the_command_needs_no_data(generator, tmp_path):
    torch.manual_seed(0)
    net = TextRNN(WORDS + 4, embedding=8, hidden=8)
    with torch.no_grad():
        net.head.weight.mul_(30)
    words = [f"w{i}" for i in range(WORDS + 4)]
    manifest = Manifest("torchfolio.backdoor.text:TextRNN", {"vocab_size": WORDS + 4, "embedding": 8, "hidden": 8},
                        (12,), ("bad", "good"), training={"vocabulary": words})  # fmt: skip
    save_bundle(net, tmp_path / "net", manifest)
    path = generator.save(tmp_path / "g.safetensors")
    (tmp_path / "few.txt").write_text("a\nb\n")
    sets = [a for s in (f"generator='{path}'", "length=12", "steps=3", "n_restarts=1") for a in ("--set", s)]
    call = ["audit", str(tmp_path / "net"), "--detector", "tminer", "--device", "cpu", *sets, "-o", str(tmp_path / "a")]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code in (0, 1), done.output
    assert json.loads(done.stdout)["examples"] == 0
    few = CliRunner().invoke(app, [*call, "--vocabulary", str(tmp_path / "few.txt")])
    assert few.exit_code == 2
    assert "a word for each of 60" in few.output
