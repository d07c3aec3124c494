"""Modules of neural differential equations, and symbolic regression."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import sympy
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics import symbolic_regression
from torchfolio.dynamics.expressions import Expression, fold, subtree
from torchfolio.dynamics.vector_fields import FormulaField, LipSwish, VectorField


def small():
    return de.SymbolicRegressor(populations=4, population_size=8, rounds=3, steps=20, random_state=0)


@parametrize_with_checks([small()])
def test_is_an_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("seed", [0, 1])
def test_formulas_are_found_and_shuffled_targets_have_none(seed):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-0.5, 1, (200, 2))
    y = X[:, 1] / (1 + X[:, 1])
    fit = de.SymbolicRegressor(random_state=seed).fit(X, y)
    x1 = sympy.Symbol("x1")
    assert sympy.simplify(sympy.nsimplify(fit.best_, rational=True) - x1 / (1 + x1)) == 0
    np.testing.assert_allclose(fit.predict(X), y, atol=1e-6)
    losses = [candidate.loss for candidate in fit.pareto_]
    assert losses == sorted(losses, reverse=True)
    best = max(candidate.score for candidate in fit.pareto_)
    shuffled = de.SymbolicRegressor(rounds=2, random_state=seed).fit(X, rng.permutation(y))
    assert max(candidate.score for candidate in shuffled.pareto_) <= 0.2 * best


@pytest.mark.parametrize("c", [0.7, 1.3])
def test_constants_of_quotients_are_fitted_from_afar(c):
    X = np.random.default_rng(0).uniform(-0.6, 1, (100, 2))
    y = X[:, 1] / (X[:, 1] + c)
    search = symbolic_regression._Search(list(X.T), y, (), 20, 10, random.Random(0))
    for start in (3.0, 8.0):  # the plain Newton step goes far past the pole
        fitted = search.polished(search.member(("/", 1, "+", start, 1)))
        assert fitted.nodes[3] == pytest.approx(c, abs=1e-4)
    grown = search.grown(search.member(("/", 1, "+", -0.3, 1)))  # a pole within the data; other starts find the way
    assert grown.loss < search.member(("/", 1, "+", -0.3, 1)).loss
    assert ("/", 1, "+", None, 1) in search.forms


def test_unary_operators_names_and_seeds():
    import pandas as pd

    X = pd.DataFrame({"a": np.linspace(-2, 2, 60), "b": np.linspace(0, 1, 60) ** 2})
    fits = [de.SymbolicRegressor(unary=("sin",), random_state=3).fit(X, np.sin(X["a"])) for _ in range(2)]
    assert fits[0].best_ == fits[1].best_ == sympy.sin(sympy.Symbol("a"))
    assert pickle.loads(pickle.dumps(fits[0])).best_ == fits[0].best_
    with pytest.raises(NotFittedError):
        small().predict(X)
    for options in ({"populations": 0}, {"unary": ("sine",)}, {"population_size": 4}):
        with pytest.raises(ValueError, match="expected"):
            de.SymbolicRegressor(**options).fit(X, X["a"])


def test_expressions():
    e = Expression(("/", 0, "+", 1.5, "square", 1))
    assert e.complexity == 6
    assert str(e) == "x0/(x1**2 + 1.5)"
    columns = [np.array([1.0, 2.0]), np.array([0.5, 1.0])]
    np.testing.assert_allclose(e.evaluate(columns), columns[0] / (columns[1] ** 2 + 1.5))
    torch.testing.assert_close(e.evaluate([torch.tensor(1.0), torch.tensor(0.5)]), torch.tensor(1 / 1.75))
    assert subtree(e.nodes, 2) == 6
    assert fold(("+", 0, "*", 2.0, 3.0)) == ["+", 0, 6.0]
    assert np.isnan(Expression(("/", 1.0, 0.0)).evaluate(()))


def test_formulas_are_tuned_through_the_solve():
    truth = FormulaField([Expression((1,)), Expression(("*", -1.5, 0))])
    field = FormulaField([Expression((1,)), Expression(("*", -1.42, 0))])
    y0, ts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.linspace(0, 3, 6)
    data = de.odeint(truth, y0, ts).ys.detach()
    optimizer = torch.optim.LBFGS(field.parameters(), line_search_fn="strong_wolfe", max_iter=8)

    def closure():
        optimizer.zero_grad()
        loss = (de.odeint(field, y0, ts, rtol=1e-4).ys - data).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    field.snap(0.01)
    assert field.expressions[1].constants == pytest.approx([-1.5])
    with pytest.raises(ValueError, match="one formula a channel"):
        FormulaField([Expression((1,))])


# Modules


def again(module):
    """The module through pickle, deepcopy and its state dict."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(module)))
    copied.load_state_dict(torch.load(buffer))
    return copied


def test_neural_ode():
    model = de.NeuralODE(VectorField(3, 16, time=True), rtol=1e-4, atol=1e-6)
    y0, ts = torch.randn(5, 3), torch.linspace(0, 1, 4)
    ys = model(y0, ts)
    assert ys.shape == (4, 5, 3)
    assert model.stats.nfe_forward > 0
    torch.testing.assert_close(again(model)(y0, ts), ys)
    assert "Tsit5" in repr(model)
    assert model.double()(y0.double(), ts).dtype == torch.float64
    half = de.NeuralODE(VectorField(3, 16), de.Heun(), dt=0.25).bfloat16()(y0.bfloat16(), ts)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="rtol"):
        de.NeuralODE(VectorField(3), rtol=float("nan"))


def test_a_block_of_a_language_model_is_a_field():
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertLayer

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
            self.block = BertLayer(transformers.BertConfig(**sizes, attn_implementation="eager"))

        def forward(self, t, y):
            out = self.block(y)
            return (out if isinstance(out, torch.Tensor) else out[0]) - y

    torch.manual_seed(0)
    model, x = de.NeuralODE(Flow().eval(), de.RK4(), dt=0.25), torch.randn(2, 5, 8)
    grads = []
    for model.gradient in (de.Direct(), de.Checkpoint(2), de.Adjoint()):
        loss = model(x, [0.0, 1.0])[-1].square().sum()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0], atol=1e-2, rtol=1e-2)
    model.train()
    with pytest.raises(ValueError, match="Dropout in training mode"):
        model(x, [0.0, 1.0])


@pytest.mark.parametrize(
    "control", [de.HermiteControl, de.LinearControl, de.RectilinearControl, de.NaturalCubicControl]
)
def test_neural_cde(control):
    model = de.NeuralCDE(2, 4, 3, control, width=16, append_mask=True)
    x = torch.randn(9, 5, 2)
    x[3:5, 1] = float("nan")
    out = model(x)
    assert out.shape == (5, 3)
    out.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model(x, ts=[0.0, 2.0, 8.0]).shape == (3, 5, 3)
    torch.testing.assert_close(again(model)(x), out)
    with pytest.raises(ValueError, match=r"series \[N, B, 2\]"):
        model(x[..., :1])
    fixed = de.NeuralCDE(2, 4, 3, control, width=16, solver=de.Midpoint())
    fixed(x)
    assert fixed.stats.n_steps == len(control(x).knots) - 1


def test_time_channel_and_start():
    torch.manual_seed(0)
    t, x = torch.linspace(0, 1, 40), torch.randn(1, 3, 2)
    steady, rising = x + t[:, None, None], x + t[:, None, None] ** 2
    blind = de.NeuralCDE(2, 4, 1, width=16, append_time=False, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(blind(steady, t), blind(rising, t), atol=5e-4, rtol=0)  # the same path
    assert float((blind(steady, t) - blind(steady + 1, t)).detach().abs().max()) > 1e-3  # but another start
    seeing = de.NeuralCDE(2, 4, 1, width=16)
    assert float((seeing(steady, t) - seeing(rising, t)).detach().abs().max()) > 1e-3


def test_neural_sde():
    sde = de.SDE(VectorField(2, 8), VectorField(2, 8, shape=(2, 3)), "general")
    model = de.NeuralSDE(sde, dt=0.05)
    y0 = torch.zeros(4, 2)
    ys = model(y0, [0.0, 0.5, 1.0], seed=1)
    torch.testing.assert_close(again(model)(y0, [0.0, 0.5, 1.0], seed=1), ys)
    assert not torch.equal(model(y0, [0.0, 0.5, 1.0], seed=2), ys)
    state = torch.get_rng_state()
    model(y0, [0.0, 1.0], seed=1).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_latent_sde_learns_and_its_gradient_is_that_through_the_solver():
    torch.manual_seed(0)
    ts = torch.linspace(0, 1, 6)
    x = 1 + 0.1 * torch.randn(6, 16, 1)
    model = de.LatentSDE(1, latent=2, context=4, width=8, dt=0.2)
    grads = []
    for gradient in (de.Direct(), None):
        model.gradient = gradient
        model.zero_grad()
        model.loss(x, ts, seed=0).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    optimizer, first = torch.optim.Adam(model.parameters(), 0.02), float(model.loss(x, ts, seed=0).detach())
    for step in range(25):
        optimizer.zero_grad()
        loss = model.loss(x, ts, kl_weight=min(1, step / 5), seed=step)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first
    assert model.sample(7, ts, seed=0).shape == (6, 7, 1)
    assert torch.equal(model.sample(7, ts, seed=0), model.sample(7, ts, seed=0))
    with pytest.raises(ValueError, match="expected series"):
        model.loss(x[:5], ts)
    with pytest.raises(ValueError, match="kl_weight"):
        model.loss(x, ts, kl_weight=-1)


def test_sde_gan():
    ts = torch.arange(5.0)
    data = torch.randn(5, 32, 1, generator=torch.Generator().manual_seed(0)).cumsum(0)
    model = de.SDEGAN(1, hidden=8, width=8)
    before = copy.deepcopy(model.generator.state_dict())
    assert model.fit(data, ts, steps=4, batch_size=8) is model
    assert any(not torch.equal(v, before[k]) for k, v in model.generator.state_dict().items())
    for layer in model.discriminator.modules():
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().abs().max()) <= 1 / layer.in_features + 1e-6
    assert model.sample(3, ts, seed=0).shape == (5, 3, 1)
    assert torch.equal(model.sample(3, ts, seed=0), again(model).sample(3, ts, seed=0))
    x = torch.linspace(-10, 10, 1001, requires_grad=True)
    assert float(torch.autograd.grad(LipSwish()(x).sum(), x)[0].abs().max()) <= 1.0
    with pytest.raises(ValueError, match="finite series"):
        model.fit(data[:4], ts, steps=1)
