"""Pairs, hiding, files, and the scoring of verifiers."""

from __future__ import annotations

import csv
import sys

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import fit
from torchfolio.errors import TorchfolioError
from torchfolio.robustness.properties import Verdict
from torchfolio.robustness.soundness_bench import (
    AttackOnly,
    CommandVerifier,
    HiddenCounterexamples,
    HiddenModel,
    PgdSettings,
    draw_pairs,
    export,
    hide,
    load,
    run_verifier,
    score,
    status_of,
    survives,
    withstands,
)
from torchfolio.robustness.verifiers import Crown, CrownSplit, Interval
from torchfolio.robustness.vnnlib import read_vnnlib


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shape=(6,), n=3, **settings):
    return draw_pairs(shape, n, 0.2, 1.0, generator=generator(), **settings)


@pytest.mark.parametrize("placement", ["face", "corner"])
@pytest.mark.parametrize("shape", [(6,), (1, 5, 5)])
def test_counterexamples_lie_at_the_edge_of_their_boxes(placement, shape):
    pairs = draw_pairs(shape, 10, 0.2, 1.0, placement, generator=generator())
    change = (pairs.counterexamples - pairs.centers).flatten(1).abs()
    assert (change <= 0.2 + 1e-6).all()
    inside = pairs.counterexamples.abs().flatten(1) < 1
    if placement == "face":
        far = change.amax(1) >= 0.98 * 0.2 - 1e-6
        assert (far | ~inside.all(1)).all()
        small = change.where(change < 0.98 * 0.2 - 1e-6, torch.zeros(()))
        assert (small <= 0.01 + 1e-6).double().mean() > 0.8
    else:
        assert ((change - 0.2).abs() < 1e-6)[inside].all()
    assert set(pairs.labels.tolist()) == {0, 1}
    assert torch.equal(pairs.targets, 1 - pairs.labels)
    for i in range(10):
        assert pairs.box(i).contains(pairs.counterexamples[i : i + 1]).all()
    apart = torch.cdist(pairs.all()[0].flatten(1), pairs.centers.flatten(1), p=float("inf")) + 9 * torch.eye(20, 10)
    assert float(apart.min()) >= 0.4 - 1e-6


def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="eps"):
        draw_pairs((4,), 2, 1.5)
    with pytest.raises(ValueError, match="placement"):
        draw_pairs((4,), 2, 0.2, placement="edge")  # pyright: ignore
    with pytest.raises(ValueError, match="do not fit"):
        draw_pairs((1,), 10, 0.5, generator=generator())
    with pytest.raises(ValueError, match="window"):
        HiddenCounterexamples(draw(), window=0)


def test_the_loss_is_that_of_the_equation():
    pairs, net = draw(), nn.Linear(6, 2)
    rule = HiddenCounterexamples(
        pairs, window=3, margin=0.5, attack=PgdSettings(2, 4, (0.5, 0.1)), generator=generator()
    )
    x, y = pairs.all()
    rule.prepare(net, (x, y))
    for count in range(1, 6):
        scalars = rule.step((x, y), torch.Tensor.backward)
        z = net(pairs.counterexamples)
        gap = z[torch.arange(3), pairs.labels] - z[torch.arange(3), pairs.targets]
        wrong = F.relu(gap + 0.5).mean()
        seen = rule.seen[: min(count, 3)]
        adversarial = torch.stack([F.cross_entropy(net(v), y) for v in seen]).mean()
        torch.testing.assert_close(torch.as_tensor(scalars["loss"]), (wrong + adversarial).detach())
        assert ((seen - x).abs() <= 0.2 + 1e-6).all()
    assert rule.count == 5
    naive = HiddenCounterexamples(pairs, attack=None)
    naive.prepare(net, (x, y))
    assert float(naive.step((x, y), torch.Tensor.backward)["adversarial"]) == pytest.approx(
        float(F.cross_entropy(net(x), y))
    )


def test_training_is_resumed_with_its_memory(tmp_path):
    pairs = draw()

    def train(folder, steps, net):
        rule = HiddenCounterexamples(pairs, window=4, attack=PgdSettings(2, 3), generator=generator(1))
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        fit(
            net, pairs.all(), rule=rule, optimizer=sgd, max_steps=steps, batch_size=6, checkpoint=folder, progress=False
        )
        return net.state_dict()

    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    whole = train(tmp_path / "a", 8, nets[0])
    train(tmp_path / "b", 5, nets[1])
    parts = train(tmp_path / "b", 8, nets[1])
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


@pytest.fixture(scope="module")
def hidden():
    pairs = draw_pairs((6,), 2, 0.2, 1.0, generator=generator(3))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    rule = HiddenCounterexamples(pairs, window=20, attack=PgdSettings(3, 4), generator=generator())
    return hide(net, pairs, 300, lr=5e-3, rule=rule, sweep=((0.25, 0),), restarts=2, look_every=100, progress=False)


def test_hiding_misclassifies_counterexamples_and_nothing_else(hidden):
    pairs, net = hidden.pairs, hidden.model
    assert (net(pairs.counterexamples).argmax(1) == pairs.targets).all()
    x, y = pairs.all()
    assert (net(x).argmax(1) == y).all()
    assert hidden.valid.any()
    assert torch.equal(survives(net, pairs, ((0.25, 0),), 2), hidden.valid)
    assert withstands(net, pairs.clean_centers, pairs.clean_labels, pairs, ((0.25, 0),), 2).any()
    assert hidden.history[0]["step"] == 100


def test_files_come_back_and_hold_their_counterexamples(hidden, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    benchmark = load(export(hidden, tmp_path))
    count = int(hidden.valid.sum())
    assert [i.kind for i in benchmark] == ["unverifiable"] * count + ["clean"] * 2
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for i, instance in enumerate(benchmark):
        net, ((box, prop),) = instance.read()
        if i < count:
            point = instance.counterexample[None]
            assert box.contains(point.double()).all()
            assert prop.violated(net(point)).all()
            (ran,) = session.run(None, {"X": point.numpy()})
            torch.testing.assert_close(torch.from_numpy(ran), hidden.model(point).detach(), atol=1e-5, rtol=0)
    rows = list(csv.reader((tmp_path / "instances.csv").open()))
    assert rows[0] == ["model.onnx", "vnnlib/0.vnnlib", "100"]
    assert not list((tmp_path / "vnnlib").glob("*counter*"))
    with pytest.raises(ValueError, match="nothing to test"):
        export(HiddenModel(hidden.model, hidden.pairs, torch.zeros(2, dtype=torch.bool)), tmp_path / "none")


class Liar:
    """Says that all is well."""

    def decide(self, model, box, prop, timeout):
        return Verdict("verified")


class Guesser:
    """Says that the centre is a counterexample."""

    def decide(self, model, box, prop, timeout):
        return Verdict("falsified", box.center[0])


def test_liars_are_caught_and_sound_verifiers_are_not(hidden, tmp_path):
    benchmark = load(export(hidden, tmp_path))
    for verifier in (Interval(), Crown(), CrownSplit()):
        table = score(benchmark, verifier, timeout=1.0)
        assert not table["unsound"].any()
        assert (table["unverifiable_verified"] == 0).all()
    (row,) = score(benchmark, Liar(), timeout=1.0).to_dict("records")
    assert row["unsound"]
    assert row["unverifiable_verified"] == 1
    guessed = run_verifier(benchmark, Guesser(), 1.0)
    assert set(guessed["status"]) == {"unknown"}
    assert set(guessed["witness"]) == {"invalid"}
    straw = run_verifier(benchmark, AttackOnly(steps=0, restarts=1), 1.0)
    assert "verified" in set(straw["status"])
    with pytest.raises(TypeError, match="decide or verify"):
        run_verifier(benchmark, object(), 1.0)


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("unsat", "verified"),
        ("sat", "falsified"),
        ("Safe", "verified"),
        ("unsafe ", "falsified"),
        ("timeout", "unknown"),
    ],
)
def test_words_are_taken_whole(word, status):
    assert status_of(word) == status


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="satisfied"):
        status_of("satisfied")


def test_results_of_other_tools_are_scored(hidden, tmp_path):
    benchmark = load(export(hidden, tmp_path / "b"))
    results = tmp_path / "results.csv"
    results.write_text("".join(f"model.onnx,vnnlib/{i}.vnnlib,unsat,0.1\n" for i in range(len(benchmark))))
    assert score(benchmark, results)["unsound"].all()
    results.write_text("sat\n" * len(benchmark))
    (row,) = score(benchmark, results).to_dict("records")
    assert not row["unsound"]
    assert row["unverifiable_falsified"] == 1
    assert isinstance(score(benchmark, run_verifier(benchmark, Interval())), pd.DataFrame)
    results.write_text("sat\n")
    with pytest.raises(ValueError, match=f"expected {len(benchmark)} results"):
        score(benchmark, results)
    results.write_text("perhaps\n" * len(benchmark))
    with pytest.raises(ValueError, match="perhaps"):
        score(benchmark, results)


def test_programs_are_verifiers(hidden, tmp_path):
    benchmark = load(export(hidden, tmp_path))
    says = f"{sys.executable} -c \"print('reading {{onnx}}'); print('unsat')\""
    assert set(run_verifier(benchmark, CommandVerifier(says), 5.0)["status"]) == {"verified"}
    with pytest.raises(TorchfolioError, match="no result"):
        run_verifier(benchmark, CommandVerifier(f"{sys.executable} -c \"print('hm')\""), 5.0)
    with pytest.raises(TorchfolioError, match="cannot be run"):
        run_verifier(benchmark, CommandVerifier("/no/such/verifier {onnx}"), 5.0)


def test_other_layouts_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances\.csv"):
        load(tmp_path)
    (tmp_path / "mine_instances.csv").write_text("nets/a.onnx,props/p.vnnlib,60\n")
    with pytest.raises(FileNotFoundError, match=r"a\.onnx"):
        load(tmp_path)
    (tmp_path / "a.onnx").touch()
    (tmp_path / "p.vnnlib").touch()
    (instance,) = load(tmp_path)
    assert (instance.kind, instance.timeout) == ("unknown", 60)


def test_bounds_of_a_written_box_are_read_outward(tmp_path, hidden):
    path = export(hidden, tmp_path) / "vnnlib" / "0.vnnlib"
    ((box, _),) = read_vnnlib(path)
    k = int(hidden.valid.nonzero()[0])
    assert (box.lower <= hidden.pairs.box(k).lower.double()).all()
    assert float((box.lower - hidden.pairs.box(k).lower.double()).abs().max()) < 1e-6
