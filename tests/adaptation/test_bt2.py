"""BT²: exact identities of the embedding, its loss, updates that stay comparable, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

from tests.contracts.adaptation import check_adapter
from torchfolio.adaptation import (
    BT2,
    BackwardCompatible,
    BasisTransformation,
    BCTLoss,
    BT2Adapter,
    BT2Loss,
    backfill_curve,
    class_prototypes,
    upgrade_report,
)
from torchfolio.adaptation.bt2 import Embed, Embedder
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.measure import outputs
from torchfolio.models import MLP


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def task(count=96, dim=6):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    return torch.randn(4, dim, generator=g)[y] * 2 + torch.randn(count, dim, generator=g), y


def trained(n, m, d):
    torch.manual_seed(0)
    x, y = task()
    net = BackwardCompatible(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, n + m)), n, m, 4, d, 1.5)
    old, new = unit(96, m), unit(96, n, seed=1)
    fit(
        net,
        (x, y, old, new),
        rule=BT2(BT2Loss(class_prototypes(old, y))),
        optimizer=adam(0.01),
        epochs=4,
        batch_size=32,
    )
    return net, x


@pytest.mark.parametrize(("n", "m", "d"), [(8, 5, 2), (5, 7, 3), (6, 6, 0), (4, 4, 4)])
def test_the_identities_hold_after_training(n, m, d):
    net, x = trained(n, m, d)
    for rotation in (net.transformation.rotate_new, net.transformation.rotate_compatible):
        matrix = rotation.matrix
        assert (matrix.T @ matrix - torch.eye(len(matrix))).abs().max() <= 1e-4
    assert net.transformation.rotate_compatible.skew.abs().max() > 0
    assert (net.transformation.rotate_new.skew.abs().max() > 0) == (d < m), "only what the old part sees of it trains"
    found = net.outputs(x)
    squared = 1.5**2 + (1 if d else 0)
    assert found.embedding.shape == (96, d + n)
    assert torch.allclose(found.embedding.square().sum(1), torch.full((96,), squared), atol=1e-4)
    z = net.backbone(x)
    old = F.normalize(net.transformation.old(z.relu())[:, :d], dim=1)
    inner = old @ old.T + 1.5**2 * found.new @ found.new.T
    assert torch.allclose(found.embedding @ found.embedding.T, inner, atol=1e-4)
    assert torch.equal(found.compatible, found.embedding[:, :m])
    assert torch.allclose(net(x), net.head(found.new))


def test_a_network_is_a_good_module_and_folds():
    net, x = trained(8, 5, 2)
    twins = (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.folded())
    for twin in twins:
        assert torch.allclose(twin.embed(x), net.embed(x), atol=1e-5)
    fresh = BackwardCompatible(copy.deepcopy(net.backbone), 8, 5, 4, 2, 1.5)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.embed(x), net.embed(x))
    assert net.double().embed(x.double()).dtype == torch.float64
    assert net.bfloat16().embed(x.bfloat16()).dtype == torch.bfloat16
    assert "extra_dim=2" in repr(net)


def test_the_loss_is_its_equation():
    torch.manual_seed(0)
    net = BackwardCompatible(nn.Linear(6, 9), 5, 4, 4, 2)
    x, y = task(8)
    old, new, w = unit(8, 4), unit(8, 5, seed=1), torch.randn(4, 4)
    found = net.outputs(x)
    c = F.normalize(found.compatible, dim=1)
    expected = (
        F.cross_entropy(net(x), y) + 10 * F.cross_entropy(c @ w.T, y) + 5 * (1 - (old * c).sum(1).mean())
        + 3 * (1 - (new * found.new).sum(1).mean())
    )  # fmt: skip
    assert BT2Loss(w, lambda_new=3.0)(found, y, old, new).item() == pytest.approx(expected.item(), rel=1e-5)
    embedding = unit(8, 6)
    plain = F.cross_entropy(net(x), y) + 10 * F.cross_entropy(embedding[:, :4] @ w.T, y)
    assert BCTLoss(w)(net(x), embedding, y).item() == pytest.approx(plain.item(), rel=1e-5)


def test_prototypes_are_class_means():
    e, y = unit(12, 3), torch.arange(12) % 3
    assert torch.allclose(class_prototypes(e, y), torch.stack([e[y == k].mean(0) for k in range(3)]))
    with pytest.raises(ValueError, match="none of class 3"):
        class_prototypes(e, y, 4)


def test_models_and_stored_embeddings_train_alike():
    x, y = task(32)
    old, new = nn.Linear(6, 4), nn.Linear(6, 5)
    embed = [lambda x, f=f: F.normalize(f(x), dim=1) for f in (old, new)]
    vectors = [outputs_of(x).detach() for outputs_of in embed]
    nets = []
    for arguments, data in (((embed[0], embed[1]), (x, y)), ((None, None), (x, y, *vectors))):
        torch.manual_seed(0)
        net = BackwardCompatible(nn.Linear(6, 9), 5, 4, 4, 2)
        rule = BT2(BT2Loss(class_prototypes(vectors[0], y)), *arguments)
        fit(net, data, rule=rule, optimizer=adam(0.01), epochs=2, batch_size=10)
        nets.append(net)
    assert torch.allclose(nets[0].embed(x), nets[1].embed(x), atol=1e-5)
    long = lambda x: 3 * embed[0](x)  # noqa: E731
    with pytest.warns(UserWarning, match="not of unit length"):
        fit(nets[0], (x, y), rule=BT2(rule.objective, long, embed[1]), max_steps=1)


def test_report_against_scikit_learn_and_backfill():
    e, y = unit(40, 6), torch.arange(40) % 4
    gallery, stored = unit(60, 6, seed=2), torch.arange(60) % 4
    report = upgrade_report({"a": e}, y, {"b": gallery}, stored)
    scores = (e @ gallery.T).numpy()
    expected = [average_precision_score((stored == label).numpy(), row) for row, label in zip(scores, y, strict=True)]
    assert report.mean_average_precision[0] == pytest.approx(sum(expected) / 40, abs=1e-6)
    assert len(upgrade_report({"a": e, "b": e[:, :4]}, y, truncate=True)) == 4
    with pytest.raises(ValueError, match="truncate=True"):
        upgrade_report({"a": e, "b": e[:, :4]}, y)
    curve = backfill_curve(e, y, gallery[:, :4], gallery, stored, [0.0, 0.5, 1.0])
    assert curve[0] == pytest.approx(upgrade_report({"a": e[:, :4]}, y, {"b": gallery[:, :4]}, stored).iloc[0, 4])
    assert curve[2] == pytest.approx(report.mean_average_precision[0])


def test_the_adapter_updates_a_network(tmp_path):
    x, y = task()
    net = MLP(6, 2, (12, 8))
    recipe = {"build": "torchfolio.models:MLP", "arguments": {"in_features": 6, "out_features": 2, "hidden": [12, 8]}}
    done = check_adapter(
        lambda: BT2Adapter(epochs=25, lr=0.01, extra_dim=3, batch_size=32),
        net,
        (x, y),
        recipe,
        tmp_path,
        x,
        num_classes=4,
    )
    assert isinstance(done.model, BackwardCompatible)
    assert done.model.embed(x).shape == (96, 11)
    assert done.report["agreement_with_old"] > 0.5
    assert (done.model(x).argmax(1) == y).float().mean() > 0.8


def test_a_bare_linear_layer_is_updated_from_its_inputs():
    x, y = task()
    done = BT2Adapter(epochs=12, lr=0.02, extra_dim=3).adapt(nn.Linear(6, 2), (x, y), num_classes=4)
    compatible = done.model.embed(x).detach()[:, :6]
    assert F.cosine_similarity(compatible, x).mean() == pytest.approx(done.report["agreement_with_old"], abs=1e-5)
    assert done.report["agreement_with_old"] > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_of_the_network_is_kept(dtype):
    x, y = task()
    done = BT2Adapter(epochs=1, extra_dim=3).adapt(MLP(6, 2, (12, 8)).to(dtype), (x.to(dtype), y), num_classes=4)
    assert {p.dtype for p in done.model.parameters()} == {dtype}
    assert done.model(x.to(dtype)).isfinite().all()


def test_from_a_convolution_to_a_transformer_of_somebody_else():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)

    class Backbone(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.vit, self.out = transformers.ViTModel(config, add_pooling_layer=False), nn.Linear(16, width)

        def forward(self, x):
            return self.out(self.vit(x).last_hidden_state[:, 0])

    torch.manual_seed(0)
    y = torch.arange(64) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.3 * torch.randn(64, 1, 8, 8)
    old = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stored = F.normalize(outputs(old, x), dim=1)
    net = BackwardCompatible(Backbone(6 + 5), 6, 5, 4, 3)
    rule = BT2(BT2Loss(class_prototypes(stored, y)))
    before = F.cosine_similarity(outputs(Embed(net), x)[:, :5], stored).mean()
    fit(net, (x, y, stored, unit(64, 6)), rule=rule, optimizer=adam(0.01), epochs=6, batch_size=16)
    assert outputs(Embed(net), x).shape == (64, 9)
    assert F.cosine_similarity(outputs(Embed(net), x)[:, :5], stored).mean() > before + 0.2


def test_bad_input():
    for arguments, match in (((3, 8, 2), "at least old_dim"), ((8, 3, 4), "extra_dim"), ((0, 3, 1), "new_dim"),
                             ((4, 3, 1, float("nan")), "scale")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            BasisTransformation(*arguments)
    with pytest.raises(ValueError, match="9 features"):
        BasisTransformation(5, 4, 1)(torch.randn(2, 8))
    x, y = task(8)
    rule = BT2(BT2Loss(torch.randn(4, 4)))
    with pytest.raises(TypeError, match="BackwardCompatible"):
        fit(nn.Linear(6, 4), (x, y, unit(8, 4), unit(8, 5)), rule=rule)
    net = BackwardCompatible(nn.Linear(6, 9), 5, 4, 4, 2)
    with pytest.raises(ValueError, match=r"\(x, t, old, new\)"):
        fit(net, (x, y), rule=rule)
    with pytest.raises(ValueError, match="or neither"):
        BT2(rule.objective, old=net)
    with pytest.raises(ValueError, match="4 coordinates"):
        rule.objective(net.outputs(x), y, unit(8, 3), unit(8, 5))
    with pytest.raises(ValueError, match="linear layer"):
        BT2Adapter().adapt(nn.Sequential(nn.Conv1d(1, 2, 3)), (x[:, None], y), device="cpu")
    assert outputs(Embed(Embedder(nn.Linear(6, 3), 3, 2)), x).shape == (8, 3)
