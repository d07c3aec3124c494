"""FinalMLP: its equation, gates that see their context alone, tables, the estimator, what is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator

from torchfolio.applications import (
    BilinearFusion,
    DualMLP,
    FeatureGating,
    FieldEmbedding,
    FinalMLP,
    FinalMLPClassifier,
    Multi,
)
from torchfolio.applications.click_tables import TableEncoder

FIELDS = {"user": 5, "price": "numeric", "genres": Multi(3), "item": 4}


def batch(count=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(5, (count,), generator=g), torch.randint(4, (count,), generator=g)], 1)
    flags = (torch.rand(count, 3, generator=g) < 0.5).float()
    return x, torch.cat([torch.randn(count, 1, generator=g), flags], 1)


def scaled(net):
    """With embeddings large enough to see."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, FieldEmbedding):
                for p in module.parameters():
                    p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return net


def test_fields_are_embedded_each_in_its_way_and_order():
    embedding = scaled(FieldEmbedding(FIELDS, 3))
    x, others = batch()
    found = embedding(x, others)
    assert found.shape == (12, 4, 3)
    table, vectors = embedding.table.weight, embedding.vectors
    for k in range(12):
        flags = others[k, 1:]
        mean = (flags[:, None] * vectors[1:]).sum(0) / max(float(flags.sum()), 1)
        expected = [table[x[k, 0]], others[k, 0] * vectors[0], mean, table[5 + x[k, 1]]]
        assert torch.allclose(found[k], torch.stack(expected), atol=1e-6)
    named = {"user": x[:, 0], "item": x[:, 1], "price": others[:, 0], "genres": others[:, 1:]}
    assert torch.equal(embedding(named), found)
    expected = 0.5 * (table.square().sum() + vectors.square().sum())
    assert embedding.penalty().item() == pytest.approx(expected.item())


def test_without_products_and_gates_it_is_dual_mlp():
    torch.manual_seed(0)
    net = scaled(FinalMLP(FIELDS, 4, (8, 6), (5, 4), heads=2, context_1=("user",), context_2=("item", "price")))
    dual = DualMLP(FIELDS, 4, (8, 6), (5, 4))
    dual.load_state_dict(
        {k: v for k, v in net.state_dict().items() if k in dual.state_dict() and "fusion.weight" not in k}, strict=False
    )
    with torch.no_grad():
        net.fusion.weight.zero_()
        for gate in net.gates:
            gate.net[-1].weight.zero_()
    x, others = batch()
    assert (net(x, others) - dual(x, others)).abs().max() <= 1e-6
    assert not dual.fusion.weight.requires_grad


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_fusion_is_a_block_diagonal_form(heads):
    fusion = BilinearFusion(8, 4, heads).double()
    a, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    whole = torch.block_diag(*fusion.weight[..., 0])
    expected = fusion.first(a) + fusion.second(b) + ((a @ whole) * b).sum(1, keepdim=True)
    assert torch.allclose(fusion(a, b), expected)
    assert torch.autograd.gradcheck(fusion, (a.requires_grad_(), b.requires_grad_()))
    with pytest.raises(ValueError, match="d2 = 3"):
        BilinearFusion(4, 3, 2)


def test_gates_see_their_context_alone():
    torch.manual_seed(0)
    gating = scaled(FeatureGating(FIELDS, 3, context=("item", "price")))
    x, others = batch()
    gates = gating(x, others)
    assert ((gates > 0) & (gates < 2)).all()
    other_x, other_others = x.clone(), others.clone()
    other_x[:, 0] = (x[:, 0] + 1) % 5
    other_others[:, 1:] = 1 - others[:, 1:]
    assert torch.equal(gating(other_x, other_others), gates)
    other_x[:, 1] = (x[:, 1] + 1) % 4
    assert not torch.allclose(gating(other_x, others), gates)
    everyone = FeatureGating(FIELDS, 3)
    assert torch.equal(everyone(x, others), torch.ones(12, 12))


def test_a_network_is_a_good_module():
    torch.manual_seed(0)
    net = scaled(FinalMLP(FIELDS, 4, (8,), (6,), 2, context_1=("user",), dropout=0.3, batch_norm=True))
    x, others = batch()
    net(x, others).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x, others), net(x, others))
    fresh = FinalMLP(FIELDS, 4, (8,), (6,), 2, context_1=("user",), dropout=0.3, batch_norm=True).eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x, others), net(x, others))
    gates = net.field_gates(x, others)
    assert [g.shape for g in gates] == [(12, 4), (12, 4)]
    assert net.double()(x, others.double()).dtype == torch.float64
    for bad, match in ((x + 5, "indices of 'user'"), (-x - 1, "indices of"), (x[:, :1], "2 categorical columns")):
        with pytest.raises(ValueError, match=match):
            net(bad, others)
    with pytest.raises(ValueError, match="4 numeric columns"):
        net(x)
    with pytest.raises(ValueError, match="'item' is missing"):
        net({"user": x[:, 0], "price": others[:, 0], "genres": others[:, 1:]})


def test_bad_fields():
    for make, match in (
        (lambda: FieldEmbedding({}), "at least one field"), (lambda: FieldEmbedding({"a": "text"}), "'a'"),
        (lambda: FieldEmbedding({"a": 0}), "size of 'a'"), (lambda: FinalMLP(FIELDS, context_1=("x",)), "no field 'x'"),
        (lambda: FinalMLP(FIELDS, hidden_1=()), "one layer"), (lambda: FinalMLP(FIELDS, dropout=float("nan")), "dropout"),
        (lambda: FinalMLP(FIELDS, hidden_1=(6,), heads=4), "d1 = 6"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            make()


def table(count=600, seed=0):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(6, size=count), rng.integers(8, size=count)
    taste = np.random.default_rng(1).standard_normal((6, 8))
    y = np.where(rng.random(count) < 1 / (1 + np.exp(-3 * taste[user, item])), "click", "none")
    frame = pd.DataFrame({"user": [f"u{k}" for k in user], "item": item, "price": rng.gamma(2.0, size=count),
                          "tags": np.where(item % 2, "a|b", "c"), "new": item > 4})  # fmt: skip
    return frame, y


@pytest.mark.parametrize("numeric", ["standardize", "log", "bucket"])
def test_tables_become_fields(numeric):
    frame, _ = table()
    encoder = TableEncoder(("tags",), min_count=2, numeric=numeric).fit(frame)
    assert encoder.fields["user"] == 7
    assert encoder.fields["tags"] == Multi(3)
    assert encoder.fields["price"] == ("numeric" if numeric != "bucket" else 11)
    x, others = encoder.encode(frame)
    assert x.min() >= 1
    FieldEmbedding(encoder.fields)(x, others)
    strange = frame.head(2).assign(user="new", item=99, tags="zzz")
    x, others = encoder.encode(strange)
    assert (x[:, 0] == 0).all()
    assert (others[:, -3:] == 0).all()
    with pytest.raises(ValueError, match="'price' is missing"):
        encoder.encode(frame.drop(columns="price"))
    with pytest.raises(ValueError, match="no column 'x'"):
        TableEncoder(("x",)).fit(frame)


def test_the_estimator_learns_a_table_and_shows_its_gates():
    frame, y = table(2000)
    settings = {"dim": 8, "hidden_1": (32,), "hidden_2": (32,), "heads": 2, "learning_rate": 0.01, "batch_size": 128,
                "context_1": ("user",), "context_2": ("item",), "multi": ("tags",), "random_state": 0}  # fmt: skip
    model = FinalMLPClassifier(**settings).fit(frame, y)
    assert set(model.classes_) == {"click", "none"}
    assert model.score(*table(500, seed=5)) > 0.7
    assert model.validation_auc_ > 0.75
    p = model.predict_proba(frame)
    assert np.allclose(p.sum(1), 1)
    gates = model.feature_gates(frame.head(3))
    assert list(gates[0].columns) == list(frame.columns)
    again = FinalMLPClassifier(**settings).fit(frame, y)
    assert np.array_equal(again.predict_proba(frame), p)
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.predict_proba(frame), p)
    with pytest.raises(ValueError, match="2 classes, got 3"):
        FinalMLPClassifier().fit(frame, np.arange(2000) % 3)
    with pytest.raises(ValueError, match="dim"):
        FinalMLPClassifier(dim=0).fit(frame, y)
    with pytest.raises(ValueError, match="no field 'x'"):
        FinalMLPClassifier(context_1=("x",)).fit(frame, y)


def test_it_is_a_scikit_learn_classifier():
    check_estimator(FinalMLPClassifier(dim=4, hidden_1=(16,), hidden_2=(16,), learning_rate=0.02, batch_size=32, max_epochs=8,
                                       patience=8, random_state=0))  # fmt: skip
