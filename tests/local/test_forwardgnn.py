"""ForwardGNN: virtual nodes, local losses and isolation, exactly; then what the estimators take and refuse."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.local.forwardgnn import (
    ForwardGNNClassifier,
    ForwardGNNLinkPredictor,
    augment_with_virtual_nodes,
    link_split,
)
from torchfolio.local.graph_layers import FrozenLayer, GATConv, GCNConv, SAGEConv, SparseMatrix, normalize_rows

ALGORITHMS = ["sf", "ff-la", "ff-vn", "top2input", "top2loss"]


def graph(n=60, classes=3, features=40, seed=0, dtype=torch.float32):
    """Communities with sparse features of their own; a third of the nodes each to train, validate and test."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    same = y[:, None] == y
    upper = (torch.rand(n, n, generator=g) < torch.where(same, 0.25, 0.02)).triu(1)
    edges = (upper | upper.T).nonzero().T
    topics = torch.arange(features) % classes == y[:, None]
    x = (torch.rand(n, features, generator=g) < torch.where(topics, 0.16, 0.01)).to(dtype)
    part = torch.randperm(n, generator=g) % 3
    return SimpleNamespace(x=x, edge_index=edges, y=y, train_mask=part == 0, val_mask=part == 1, test_mask=part == 2)


def model(**settings):
    return ForwardGNNClassifier(**{"hidden": 16, "layers": 2, "lr": 0.03, "epochs": 40, "val_every": 5} | settings)


def dense_gcn(x, edge_index):
    n = len(x)
    a = torch.eye(n, dtype=x.dtype).index_put((edge_index[1], edge_index[0]), x.new_ones(()), accumulate=True)
    d = a.sum(1).rsqrt()
    return d[:, None] * a * d @ x


def test_augmented_graph():
    g = graph()
    v = augment_with_virtual_nodes(g.x, g.edge_index, g.y, g.train_mask, 3)
    n, e, trained = len(g.x), g.edge_index.shape[1], int(g.train_mask.sum())
    assert v.x.shape == (n + 3, g.x.shape[1])
    assert v.edge_index.shape == (2, e + 2 * trained)
    assert v.real_mask.tolist() == [True] * n + [False] * 3
    links = v.edge_index[:, e:]
    touched = {int(a): int(b) for a, b in links[:, :trained].T}
    assert touched == {int(i): n + int(g.y[i]) for i in g.train_mask.nonzero()}
    assert torch.equal(links[:, trained:], links[:, :trained].flip(0))
    assert torch.equal(v.edge_type[e:], torch.cat([1 + g.y[g.train_mask], 4 + g.y[g.train_mask]]))
    one_way = augment_with_virtual_nodes(g.x, g.edge_index, g.y, g.train_mask, 3, "uni")
    assert torch.equal(one_way.edge_index, v.edge_index[:, : e + trained])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_and_never_reads_other_labels(algorithm):
    g = graph()
    conv = "sage" if algorithm == "ff-vn" else "gcn"
    first = model(algorithm=algorithm, conv=conv).fit(g)
    probabilities = first.predict_proba()
    assert (first.predict()[g.test_mask] == g.y[g.test_mask]).float().mean() > 0.6
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(g.x)))
    changed = torch.where(g.test_mask, -7, g.y)
    second = model(algorithm=algorithm, conv=conv).fit(g.x, g.edge_index, changed, g.train_mask, g.val_mask)
    assert torch.equal(second.predict_proba(), probabilities)
    assert first.losses_ == second.losses_
    assert first.peak_saved_bytes_ > 0
    assert math.isfinite(first.layer_scores_[-1])


def test_layers_below_stay_as_they_were():
    g = graph()
    one, two = model(layers=1).fit(g), model(layers=2).fit(g)
    for name, tensor in one.layers_[0].state_dict().items():
        assert torch.equal(two.layers_[0].state_dict()[name], tensor)
    assert one.losses_[0] == two.losses_[0]
    assert one.layer_scores_ == two.layer_scores_[:1]


@pytest.mark.parametrize("sparse", [True, False])
def test_gradient_and_logits_of_the_first_layer(sparse):
    g = graph(dtype=torch.float64)
    x = g.x if sparse else g.x + 0.1
    v = augment_with_virtual_nodes(x, g.edge_index, g.y, g.train_mask, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    layer = GCNConv(40, 8).double()
    rows = torch.cat([g.train_mask.nonzero().flatten(), torch.arange(60, 63)])
    z = FrozenLayer(layer, [normalize_rows(v.x)], v.edge_index, dense_rows=3)[rows]()
    logits = z[:-3] @ z[-3:].T
    F.cross_entropy(logits, g.y[g.train_mask]).backward()
    weight = layer.weight.detach().clone().requires_grad_()
    full = torch.relu(dense_gcn(v.x / (v.x.norm(dim=1, keepdim=True) + 1e-8), v.edge_index) @ weight + layer.bias)
    brute = torch.tensor([[float((full[i] * full[60 + c]).sum().detach()) for c in range(3)] for i in rows[:-3]])
    torch.testing.assert_close(logits.detach().float(), brute, rtol=0, atol=1e-6)
    F.cross_entropy((full[:60] @ full[60:].T)[g.train_mask], g.y[g.train_mask]).backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("conv", [GCNConv, SAGEConv])
def test_aggregated_side_by_side_equals_forward(conv):
    g = graph(dtype=torch.float64)
    other, layer = torch.randn(60, 5, dtype=torch.float64), conv(45, 4).double()
    expected = torch.relu(layer(torch.cat([g.x, other], 1), g.edge_index))
    torch.testing.assert_close(FrozenLayer(layer, [g.x, other], g.edge_index)(), expected)


def test_sage_and_gat_by_hand():
    x, edges = torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.tensor([[1, 2, 0], [0, 0, 1]])  # node 3 is alone
    sage = SAGEConv(1, 1)
    with torch.no_grad():
        sage.weight.copy_(torch.tensor([[1.0], [10.0]]))
    assert sage(x, edges).flatten().tolist() == [41.0, 13.0, 5.0, 7.0]
    torch.manual_seed(0)
    gat = GATConv(1, 2, heads=2)
    h = x @ gat.weight
    score = F.leaky_relu(h[:3] * gat.source.T + h[0] * gat.target.T, 0.2)  # of nodes 0, 1 and 2 for node 0
    torch.testing.assert_close(gat(x, edges)[0], (score.softmax(0) * h[:3]).sum(0))
    torch.testing.assert_close(gat(x, edges)[3], h[3])
    assert torch.autograd.gradcheck(gat.double(), (x.double().requires_grad_(), edges))
    with pytest.raises(ValueError, match="heads"):
        GATConv(3, 6, heads=4)


def test_layers_agree_with_pyg():
    pyg = pytest.importorskip("torch_geometric.nn")
    g = graph()
    for ours, theirs in ((GCNConv(40, 8), pyg.GCNConv(40, 8)), (SAGEConv(40, 8), pyg.SAGEConv(40, 8))):
        with torch.no_grad():
            if isinstance(ours, SAGEConv):
                ours.weight.copy_(torch.cat([theirs.lin_r.weight.T, theirs.lin_l.weight.T]))
                ours.bias.copy_(theirs.lin_l.bias)
            else:
                ours.weight.copy_(theirs.lin.weight.T)
        torch.testing.assert_close(ours(g.x, g.edge_index), theirs(g.x, g.edge_index), rtol=1e-4, atol=1e-5)
    fitted = model(conv=lambda i, o: pyg.GraphConv(i, o), layers=1).fit(g)
    assert (fitted.predict()[g.test_mask] == g.y[g.test_mask]).float().mean() > 0.6


def test_equal_negatives_cannot_learn():
    class Equal(ForwardGNNClassifier):
        def _negatives(self, y, generator):
            return [y]

    fitted = Equal(algorithm="ff-la", hidden=16, layers=1, lr=0.03, epochs=30).fit(graph())
    assert min(fitted.losses_[0]) >= 2 * math.log(2) - 1e-6


class OwnConv(nn.Module):
    """Somebody's own layer, with dropout."""

    def __init__(self, i, o):
        super().__init__()
        self.linear, self.dropout = nn.Linear(i, o), nn.Dropout(0.2)

    def forward(self, x, edge_index):
        source, target = edge_index
        return self.linear(self.dropout(x).index_add(0, target, x[source]))


@pytest.mark.parametrize("conv", ["gat", "sage", OwnConv])
@pytest.mark.parametrize("algorithm", ["sf", "ff-la", "top2input"])
def test_any_layer_any_seed_any_copy(conv, algorithm):
    g, before = graph(), torch.get_rng_state()
    fitted = model(conv=conv, algorithm=algorithm, epochs=6, layers=2).fit(g)
    assert torch.equal(torch.get_rng_state(), before)
    expected = fitted.predict_proba()
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert torch.equal(other.predict_proba(g.x, g.edge_index), expected)
    again = model(conv=conv, algorithm=algorithm, epochs=6, layers=2).fit(g)
    assert torch.equal(again.predict_proba(), expected)
    other = model(conv=conv, algorithm=algorithm, epochs=6, layers=2, seed=1).fit(g)
    assert not torch.equal(other.predict_proba(), expected)
    assert "ForwardGNNClassifier(" in repr(fitted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_indices_and_no_validation(dtype):
    g = graph(dtype=dtype)
    fitted = model(epochs=5).fit(g.x, g.edge_index, g.y, g.train_mask.nonzero().flatten())
    assert fitted.predict_proba().dtype == dtype
    assert math.isnan(fitted.layer_scores_[0])
    masked = model(epochs=5).fit(g.x, g.edge_index, g.y, g.train_mask.float())
    assert torch.equal(masked.predict_proba(), fitted.predict_proba())


def test_a_layer_stops_by_itself():
    fitted = model(epochs=500, val_every=2, patience=3, lr=0.1).fit(graph())
    assert all(len(losses) < 500 for losses in fitted.losses_)


def test_links():
    g = graph(90)
    split = link_split(g.edge_index, 90)
    keys = [set(map(tuple, p.T.tolist())) for p in split[1:]]
    assert len(set().union(*keys)) == sum(map(len, keys)) == g.edge_index.shape[1]
    edges = set(map(tuple, g.edge_index.T.tolist()))
    assert all(k <= edges for k in keys[::2])
    assert not any(k & edges for k in keys[1::2])
    assert split.edge_index.shape[1] == 2 * split.train.shape[1]
    for algorithm in ("fl", "ff", "top2input"):
        fitted = ForwardGNNLinkPredictor(algorithm=algorithm, hidden=16, lr=0.03, epochs=40, val_every=5).fit(g, split)
        assert fitted.score(split.test, split.test_negative) > 0.6
    with pytest.raises(ValueError, match="nodes from 0 to 89"):
        fitted.predict_proba(torch.tensor([[0], [90]]))


def test_refusals():
    g = graph()
    fit = lambda **k: model(epochs=2).fit(**{  # noqa: E731
        "x": g.x, "edge_index": g.edge_index, "y": g.y, "train_mask": g.train_mask, "val_mask": g.val_mask
    } | k)  # fmt: skip
    no_two = g.train_mask & (g.y != 2)
    for settings, match in (
        ({"train_mask": no_two}, "none of class 2"),
        ({"val_mask": g.train_mask}, "disjoint"),
        ({"y": g.y - 1}, "labels from 0"),
        ({"edge_index": g.edge_index + 50}, "nodes from 0 to 59"),
        ({"x": g.x * math.nan}, "finite"),
        ({"train_mask": g.train_mask[:-1]}, "mask"),
    ):
        with pytest.raises(ValueError, match=match):
            fit(**settings)
    for settings in ({"lr": math.nan}, {"layers": 0}, {"algorithm": "bp"}, {"conv": "gin"}, {"temperature": 0}):
        with pytest.raises(ValueError, match="expected"):
            model(**settings).fit(g)
    with pytest.raises(TypeError, match="train_mask"):
        fit(train_mask=None)
    fitted = fit()
    assert torch.equal(fitted.predict(g), fitted.predict())
    with pytest.raises(ValueError, match="fitted nodes"):
        fitted.predict(g.x[:-1])
    with pytest.warns(UserWarning, match="one direction"):
        fit(edge_index=g.edge_index[:, g.edge_index[0] < g.edge_index[1]])
    with pytest.raises(ValueError, match="virtual nodes"):
        augment_with_virtual_nodes(g.x, g.edge_index, g.y, g.train_mask, 3, virtual=torch.ones(3, 2))
    assert SparseMatrix(torch.eye(3).numpy(), g.x).shape == (3, 3)


class Truncated(OwnConv):
    def forward(self, x, edge_index):
        return super().forward(x, edge_index)[:3]


class Fixed(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.o = o

    def forward(self, x, edge_index):
        return x[:, :1].expand(-1, self.o)


def test_factories_that_are_refused():
    one = OwnConv(16, 16)
    for factory, match in (
        (Truncated, "expected the layer to give"),
        (Fixed, "without any"),
        (lambda i, o: one if i == o else OwnConv(i, o), "shares parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            model(conv=factory, layers=3, epochs=2).fit(graph())
