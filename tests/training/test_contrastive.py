"""Self-supervised losses against their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from torchfolio.training.contrastive import MoCoQueue, barlow_twins, byol, nt_xent, simsiam


def views(batch=5, dim=4):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, dim, dtype=torch.float64, generator=generator) for _ in range(2))


def test_nt_xent_is_its_equation():
    a, b = views()
    z = [*a, *b]
    expected = []
    for i in range(10):
        similar = [math.exp(F.cosine_similarity(z[i], z[k], dim=0).item() / 0.3) for k in range(10)]
        expected.append(-math.log(similar[(i + 5) % 10] / (sum(similar) - similar[i])))
    assert nt_xent(a, b, 0.3, reduction="none").tolist() == pytest.approx(expected)
    assert nt_xent(a, b, torch.tensor(0.3)).item() == pytest.approx(sum(expected) / 10)


def test_losses_are_symmetric_and_do_not_depend_on_the_order():
    a, b = views()
    order = torch.tensor([3, 1, 4, 0, 2])
    for loss in (nt_xent, barlow_twins):
        assert loss(a, b).item() == pytest.approx(loss(b, a).item())
        assert loss(a, b).item() == pytest.approx(loss(a[order], b[order]).item())


def test_simsiam_and_byol_at_their_optimum_and_without_a_target_gradient():
    a, b = views()
    assert simsiam((a, b), (b, a)).item() == pytest.approx(-1)
    assert byol((a, b), (b, a)).item() == pytest.approx(0, abs=1e-12)
    target = a.clone().requires_grad_()
    predicted = b.clone().requires_grad_()
    simsiam((predicted, predicted), (target, target)).backward()
    assert target.grad is None
    assert predicted.grad.abs().sum() > 0


def test_barlow_twins_is_its_equation():
    a, b = views(50, 3)
    standard = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b)]
    c = standard[0].T @ standard[1] / 50
    off = c.square().sum() - c.diagonal().square().sum()
    assert barlow_twins(a, b, 0.1).item() == pytest.approx(((1 - c.diagonal()) ** 2).sum().item() + 0.1 * off.item())


def test_moco_queue_holds_the_latest_keys():
    queue = MoCoQueue(6, 4).double()
    a, b = views()
    assert queue(a, b).item() == pytest.approx(0, abs=1e-12), "no negatives yet"
    queue.push(a)
    queue.push(b)
    assert int(queue.count) == 6
    kept = {tuple(row) for row in queue.keys.tolist()}
    assert {tuple(row) for row in F.normalize(b, dim=1).tolist()} <= kept
    q, k = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.keys.T], 1) / 0.2
    assert queue(a, b).item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item())
    other = MoCoQueue(6, 4).double()
    other.load_state_dict(queue.state_dict())
    assert other(a, b).item() == queue(a, b).item()


@pytest.mark.parametrize("loss", [nt_xent, barlow_twins])
def test_gradients_and_bad_input(loss):
    a, b = (v.requires_grad_() for v in views())
    assert torch.autograd.gradcheck(loss, (a, b))
    with pytest.raises(ValueError, match="two views"):
        loss(a[:1], b[:1])
    with pytest.raises(ValueError, match="temperature"):
        nt_xent(a, b, float("nan"))
