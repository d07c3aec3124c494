import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from torchfolio.theory.dual_activations import (
    DualActivation,
    ErfDual,
    RectifierDual,
    SineDual,
    StepDual,
    dual_activation,
    hermite_polynomials,
)
from torchfolio.theory.infinite_kernels import conv_nngp, conv_ntk, empirical_ntk, nngp, ntk

FLOAT64 = torch.float64
CLOSED = [RectifierDual(), RectifierDual(0.2), RectifierDual(-1.0), ErfDual(), SineDual(1.0), SineDual(6.13539)]


def inputs(n=5, d=3, seed=0, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, *shape, generator=generator, dtype=FLOAT64)


def unit(n=5, d=3, seed=0):
    return nn.functional.normalize(inputs(n, d, seed))


def by_hand(dual, p, q, c, derivative=False):
    """The expectation over a pair of Gaussians by Gauss-Legendre in two dimensions, split at the axes."""
    x, w = np.polynomial.legendre.leggauss(200)
    z, w = torch.from_numpy(4.5 * (x + 1)), torch.from_numpy(4.5 * w)
    total, f = 0.0, dual.function
    if derivative:
        f = torch.func.vmap(torch.func.vmap(torch.func.grad(dual.function)))
    det = p * q - c * c
    for a in (1, -1):
        for b in (1, -1):
            u, v = torch.meshgrid(a * z * math.sqrt(p), b * z * math.sqrt(q), indexing="ij")
            density = torch.exp(-(q * u * u - 2 * c * u * v + p * v * v) / (2 * det)) / (2 * math.pi * math.sqrt(det))
            total += float((f(u) * f(v) * density * torch.outer(w, w)).sum()) * math.sqrt(p * q)
    return total


# Dual activations


def test_hermite_polynomials_are_orthonormal():
    z, w = np.polynomial.hermite_e.hermegauss(80)
    h = hermite_polynomials(torch.from_numpy(z), 40)
    gram = h.T @ (h * torch.from_numpy(w / math.sqrt(2 * math.pi))[:, None])
    assert torch.allclose(gram, torch.eye(41, dtype=FLOAT64), atol=1e-10)


@pytest.mark.parametrize("dual", [*CLOSED, dual_activation("gelu"), DualActivation([0.3, 1, 0, 0.5])], ids=repr)
def test_covariances_equal_integrals_by_hand(dual):
    for p, q, c in ((1.0, 1.0, 0.6), (0.5, 1.7, -0.4), (2.0, 0.3, 0.1)):
        value, slope = dual.both(*(torch.tensor(t, dtype=FLOAT64) for t in (p, q, c)))
        assert float(value) == pytest.approx(by_hand(dual, p, q, c), abs=1e-9)
        assert float(slope) == pytest.approx(by_hand(dual, p, q, c, derivative=True), abs=1e-8)


@pytest.mark.parametrize("dual", CLOSED, ids=repr)
def test_closed_forms_equal_the_series(dual):
    xi = torch.linspace(-0.6, 0.6, 25, dtype=FLOAT64)
    squares = torch.tensor(dual.coefficients, dtype=FLOAT64).square()
    powers = xi[:, None] ** torch.arange(len(squares))
    assert torch.allclose(dual(xi), powers @ squares, atol=1e-10)
    assert torch.allclose(dual.derivative(xi), torch.func.vmap(torch.func.grad(dual))(xi), atol=1e-10)
    one = torch.ones((), dtype=FLOAT64)
    assert float(dual(one)) == pytest.approx(1, abs=1e-14)
    assert float(dual.derivative(one)) == pytest.approx(dual.slope_at_one, abs=1e-12)
    assert torch.allclose(dual.gap(1 - xi), 1 - dual(xi), atol=1e-14)
    q = torch.tensor([0.3, 1.0, 4.0], dtype=FLOAT64)
    assert torch.allclose(dual.diagonal(q), dual.covariance(q, q, q), atol=1e-14)
    assert torch.allclose(dual.diagonal_derivative(q), dual.covariance_derivative(q, q, q), atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*beyond Hermite degree")
def test_duals_of_modules_functions_and_names():
    for same in (nn.ReLU(), torch.relu, nn.functional.relu, "relu"):
        assert type(dual_activation(same)) is RectifierDual
    assert dual_activation(nn.LeakyReLU(0.3)).negative_slope == 0.3
    assert dual_activation(torch.sin).a == 1
    module = nn.PReLU(init=0.25)
    assert dual_activation(module).mean == pytest.approx(dual_activation(nn.LeakyReLU(0.25)).mean, abs=1e-9)
    assert module.weight.dtype == torch.float32
    assert module.weight.requires_grad
    centred = dual_activation(lambda z: torch.relu(z) - 1 / math.sqrt(2 * math.pi), degree=512)
    variance = 0.5 - 1 / (2 * math.pi)
    assert centred.mean == 0
    assert centred.slope_at_one == pytest.approx(0.5 / variance, rel=1e-9)
    assert centred.slope == pytest.approx(0.5 / math.sqrt(variance), rel=1e-9)
    assert dual_activation(torch.sign, degree=2000).slope_at_one == math.inf
    cubic = dual_activation(lambda z: z**3)  # z³ = √6 h3 + 3 h1
    assert cubic.coefficients[:4] == pytest.approx([0, 3 / math.sqrt(15), 0, math.sqrt(6 / 15)])
    assert cubic.second_moment == pytest.approx(15)
    for dual in (cubic, ErfDual(), RectifierDual(), StepDual()):
        again = copy.deepcopy(dual) if dual is cubic else pickle.loads(pickle.dumps(dual))
        assert again.coefficients == dual.coefficients


def test_duals_warn_and_refuse():
    with pytest.warns(UserWarning, match="beyond Hermite degree 64"):
        dual_activation(torch.sign)
    for bad, message in [
        ("swish2", "expected an activation of relu"),
        (lambda z: torch.exp(z * z / 3), "square integrable"),
        (lambda z: 0 * z, "is zero"),
        (lambda z: z.log(), "finite"),
        (lambda z: z.sum(), "keeps the shape"),
        (nn.Softmax(0), "every element alone"),
        (lambda z: z * torch.rand(len(z)), "without randomness"),
    ]:
        with pytest.raises(ValueError, match=message):
            dual_activation(bad)
    with pytest.raises(TypeError, match="got int"):
        dual_activation(3)
    for bad in ([], [0.0], [math.nan, 1]):
        with pytest.raises(ValueError, match="Hermite coefficients"):
            DualActivation(bad)
    with pytest.raises(ValueError, match="no tangent kernel"):
        ntk(inputs(), None, "step", 1)


@pytest.mark.parametrize("p", [[0, 1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1], [0, 0.2, 1], [0, 0.2**0.5, 0.3, 0, 0.6]])
def test_koenigs_of_series(p):
    check_koenigs(DualActivation(p))


@pytest.mark.parametrize("activation", ["erf", "sine", SineDual(13.8258), "tanh"])
def test_koenigs_of_functions(activation):
    check_koenigs(dual_activation(activation))


def check_koenigs(dual):
    first = dual.slope**2
    eta = torch.logspace(-30, -1, 100, dtype=FLOAT64)
    after = dual.koenigs(eta=dual.gap(eta))
    assert torch.allclose(after / (first * dual.koenigs(eta=eta)), torch.ones_like(eta), atol=1e-12, rtol=0)
    xi = torch.cat([torch.linspace(-0.9, 0.9, 98, dtype=FLOAT64), torch.tensor([1e-200, -1e-12], dtype=FLOAT64)])
    psi = dual.koenigs(xi)
    assert torch.allclose(dual.koenigs(dual(xi)) / (first * psi), torch.ones_like(xi), atol=1e-12, rtol=0)
    assert torch.allclose(psi, dual.koenigs(eta=1 - xi), atol=1e-12, rtol=1e-11)
    assert float(psi[-2]) == pytest.approx(1e-200, rel=1e-13)
    # The limit by itself, for as many layers as do not underflow.
    depth, iterate = min(250, int(-600 / math.log(first))), xi[70:72]
    for _ in range(depth):
        iterate = dual(iterate)
    left = float(iterate.max())  # what the next layers change, relative to 1
    assert torch.allclose(iterate / first**depth, psi[70:72], rtol=1e-12 + 100 * left, atol=0)
    ends = torch.tensor([0.0, 1.0], dtype=FLOAT64)
    assert dual.koenigs(ends).tolist() == [0, math.inf]
    # An exponent near 1: ψ(1 - η) grows as η^(-α/2) for η / B'.
    alpha = -2 * math.log(first) / math.log(dual.slope_at_one)
    tiny = torch.tensor([1e-20, 1e-20 * dual.slope_at_one], dtype=FLOAT64)
    high, low = dual.koenigs(eta=tiny).tolist()
    assert math.log(high / low) / math.log(dual.slope_at_one) == pytest.approx(alpha / 2, rel=1e-4)


def test_koenigs_keeps_shape_and_refuses():
    dual = DualActivation([0, 1, 1])
    x = torch.rand(3, 4, dtype=torch.float32).T
    assert dual.koenigs(x).shape == (4, 3)
    assert torch.allclose(dual.koenigs(x).double(), dual.koenigs(x.double()), rtol=1e-4)
    assert dual.koenigs(torch.empty(0)).shape == (0,)
    for bad in (DualActivation([0, 0, 1]), RectifierDual(), DualActivation([0, 1])):
        with pytest.raises(ValueError, match="expected an activation with A = 0"):
            bad.koenigs(x)
    with pytest.raises(ValueError, match="from -1 to 1"):
        dual.koenigs(torch.tensor([1.5]))
    with pytest.raises(ValueError, match="from -1 to 1"):
        dual.koenigs(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="one of xi and eta"):
        dual.koenigs()


# Kernels


def test_depth_one_relu_is_the_arc_cosine_kernel():
    x = inputs()
    norm = x.norm(dim=1)
    theta = torch.acos((x @ x.T / torch.outer(norm, norm)).clamp(-1, 1))
    arc_cosine = torch.outer(norm, norm) / math.pi * (theta.sin() + (math.pi - theta) * theta.cos())
    assert torch.allclose(nngp(x, None, "relu", 1), arc_cosine / 2 / 3, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_kernels_equal_wide_layers(activation):
    x = inputs(2, 3)
    generator = torch.Generator().manual_seed(0)
    phi = dual_activation(activation).function
    settings = {"weight_var": 1.5, "bias_var": 0.3}
    for depth in (1, 2):
        inner = x @ x.T / 3 if depth == 1 else nngp(x, None, activation, 1, **settings)
        before = 1.5 * inner + 0.3
        z = torch.randn(1_000_000, 2, generator=generator, dtype=FLOAT64) @ torch.linalg.cholesky(before).T
        monte_carlo = phi(z).T @ phi(z) / len(z)
        assert torch.allclose(nngp(x, None, activation, depth, **settings), monte_carlo, rtol=0.01)


@pytest.mark.parametrize(("width", "networks", "activation"), [(4096, 1, "relu"), (512, 20, "erf")])
def test_tangent_kernel_equals_that_of_finite_networks(width, networks, activation):
    torch.manual_seed(0)
    x = inputs(3, 4).float()
    phi = dual_activation(activation).function

    class Layer(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight * math.sqrt(1.5 / x.shape[-1]), self.bias * math.sqrt(0.2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(4, width), Layer(width, width)])
            self.last = nn.Parameter(torch.randn(width))
            for layer in self.layers:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)

        def forward(self, x):
            for layer in self.layers:
                x = phi(layer(x))
            return x @ self.last / math.sqrt(width)

    finite = torch.stack([empirical_ntk(Net(), x) for _ in range(networks)]).mean(0)
    exact = ntk(x, None, activation, 2, weight_var=1.5, bias_var=0.2)
    scale = torch.outer(exact.diag(), exact.diag()).sqrt()
    assert ((finite - exact) / scale).abs().max() < 0.05


@pytest.mark.parametrize("activation", ["relu", "erf", "sine", "gelu", nn.LeakyReLU(0.1)], ids=str)
@pytest.mark.parametrize("kernel", [nngp, ntk])
def test_kernels_are_symmetric_positive_and_tiles_agree(activation, kernel, monkeypatch):
    x = torch.cat([inputs(30), inputs(1)])  # two equal inputs
    settings = {"weight_var": 1.7, "bias_var": 0.1, "last_var": 0.5}
    k = kernel(x, None, activation, 3, **settings)
    assert torch.equal(k, k.T)
    assert torch.linalg.eigvalsh(k)[0] > -1e-10
    cross = kernel(x, x, activation, 3, **settings)
    assert torch.allclose(k, cross, atol=1e-6 if kernel is ntk else 1e-10)
    monkeypatch.setattr("torchfolio.theory.kernel_recursion.TILE", 50)
    assert torch.allclose(kernel(x, None, activation, 3, **settings), k, atol=1e-13)
    assert torch.allclose(kernel(x, x, activation, 3, **settings), cross, atol=1e-13)
    assert kernel(x, x[:3], activation, 2, dtype=torch.float32).dtype == torch.float32
    x.requires_grad_()  # the code that keeps gradients gives the same values
    assert torch.allclose(kernel(x, None, activation, 3, **settings), k, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf", "sine", "tanh", nn.LeakyReLU(0.1)], ids=str)
@pytest.mark.parametrize("kernel", [nngp, ntk])
def test_gradients_of_inputs_and_variances(activation, kernel):
    x = inputs(3).requires_grad_()
    w, b, s = (torch.tensor(v, dtype=FLOAT64, requires_grad=True) for v in (1.3, 0.2, 0.8))

    def value(x, w, b, s):
        return kernel(x, None, activation, 2, weight_var=w, bias_var=b, last_var=s)

    assert torch.autograd.gradcheck(value, (x, w, b, s), atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: kernel(x, x[:2] + 1, activation, 2, weight_var=w), (x, w), atol=1e-6)


@pytest.mark.parametrize("kernel", [nngp, ntk])
def test_gradients_are_finite_where_inputs_coincide(kernel):
    x = torch.cat([inputs(3), inputs(2), -inputs(1)]).requires_grad_()
    w = torch.tensor(2.0, dtype=FLOAT64, requires_grad=True)
    for other in (None, x):
        total = kernel(x, other, "relu", 3, weight_var=w).sum()
        for gradient in torch.autograd.grad(total, (x, w)):
            assert torch.isfinite(gradient).all()
    # Along a variance equal inputs stay equal, and so does the derivative.
    moved = torch.autograd.functional.jacobian(lambda w: kernel(x, x, "relu", 3, weight_var=w), w)
    assert float(moved[0, 3]) == pytest.approx(float(moved[0, 0]), rel=1e-6)
    # Slope of the arc-cosine kernel in an input at the same input: half of the inner product's.
    (slope,) = torch.autograd.grad(nngp(x, x.detach(), "relu", 1)[0, 3], x)
    assert torch.allclose(slope[0], x[0] / 6, atol=1e-7)
    torch.autograd.gradgradcheck(lambda x: nngp(x, None, "relu", 2), inputs(3).requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("kernel", [nngp, ntk])
def test_normalized_recursion(kernel):
    x = unit(6)
    dual, xi = DualActivation([0, 1, 2, 1]), (x @ x.T).fill_diagonal_(1)
    sigma = theta = xi
    for _ in range(4):
        theta = theta * dual.derivative(sigma)
        sigma = dual(sigma)
        theta = theta + sigma
    expected = sigma if kernel is nngp else theta
    assert torch.allclose(kernel(x, None, dual, 4, normalized=True), expected, rtol=1e-12)
    assert torch.allclose(kernel(x, x, dual, 4, normalized=True), expected, rtol=1e-12)
    # The root mean square of ReLU is a weight variance of 2, and the first layer's √d a longer input.
    plain = kernel(x * math.sqrt(3 / 2), None, "relu", 3, weight_var=2.0, last_var=2.0)
    assert torch.allclose(plain, kernel(x, None, "relu", 3, normalized=True), rtol=1e-12)
    with pytest.raises(ValueError, match="norm 1"):
        kernel(2 * x, None, dual, 2, normalized=True)
    with pytest.raises(ValueError, match="variances 1, 0 and 1"):
        kernel(x, None, dual, 2, normalized=True, weight_var=2.0)


@pytest.mark.parametrize("tangent", [False, True])
def test_convolution_kernel_equals_wide_networks(tangent):
    x = inputs(2, 2, 0, 4, 3)
    c, torch_generator = 256, torch.Generator().manual_seed(0)
    settings = {"weight_var": 1.5, "bias_var": 0.1}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = [(c, 2, 3, 3), (c,), (c, c, 3, 3), (c,), (c * 12,)]
            self.p = nn.ParameterList(
                nn.Parameter(torch.randn(*shape, generator=torch_generator, dtype=FLOAT64)) for shape in shapes
            )

        def forward(self, x):
            w1, b1, w2, b2, v = self.p
            for w, b in ((w1, b1), (w2, b2)):
                fan_in = w[0].numel()
                x = nn.functional.conv2d(x, w * math.sqrt(1.5 / fan_in), b * math.sqrt(0.1), padding=1).relu()
            return x.flatten(1) @ v / math.sqrt(len(v)) if tangent else x.flatten(1)

    if tangent:
        finite = torch.stack([empirical_ntk(Net(), x) for _ in range(4)]).mean(0)
        exact = conv_ntk(x, None, "relu", 2, **settings)
    else:
        features = [Net()(x).detach() for _ in range(8)]
        finite = sum(f @ f.T / f.shape[1] for f in features) / 8
        exact = conv_nngp(x, None, "relu", 2, **settings)
    assert torch.allclose(finite, exact, rtol=0.05)


def test_convolution_kernel_of_one_pixel_is_dense_but_for_padding():
    x = inputs(4, 5, 0, 1, 1)
    # A 1 x 1 window sees the pixel alone; a 3 x 3 one sees it and eight zeros.
    dense = {"weight_var": 1.5, "bias_var": 0.1}
    for conv, full in ((conv_nngp, nngp), (conv_ntk, ntk)):
        expected = full(x.flatten(1), None, "erf", 3, **dense)
        assert torch.allclose(conv(x, None, "erf", 3, kernel_size=1, **dense), expected, atol=1e-13)
        padded = conv(x, None, "erf", 3, weight_var=1.5 * 9, bias_var=0.1)
        assert torch.allclose(padded, expected, atol=1e-13)
        k, cross = (
            conv(inputs(4, 2, 0, 3, 4), None, "relu", 2),
            conv(inputs(4, 2, 0, 3, 4), inputs(4, 2, 0, 3, 4), "relu", 2),
        )
        assert torch.equal(k, k.T)
        assert torch.allclose(k, cross, atol=1e-7)
    w = torch.tensor(1.2, dtype=FLOAT64, requires_grad=True)
    small = inputs(2, 1, 0, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: conv_ntk(x, None, "relu", 2, weight_var=w), (small, w), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth to be a whole number"),
        ({"depth": 1.5}, "depth to be a whole number"),
        ({"weight_var": -1.0}, "weight_var of at least 0"),
        ({"bias_var": math.nan}, "bias_var of at least 0"),
        ({"x1": torch.zeros(0, 3)}, r"shape \[n, d\]"),
        ({"x1": torch.zeros(3)}, r"shape \[n, d\]"),
        ({"x2": torch.zeros(2, 4)}, r"of shape \(3,\) each"),
        ({"x1": torch.full((2, 3), math.nan)}, "x1 to be finite"),
    ],
)
def test_kernels_refuse(change, message):
    arguments = {"x1": inputs(), "x2": None, "activation": "relu", "depth": 2, **change}
    with pytest.raises(ValueError, match=message):
        nngp(**arguments)
    with pytest.raises(ValueError, match="kernel_size"):
        conv_nngp(inputs(2, 1, 0, 3, 3), None, "relu", 1, kernel_size=2)
    with pytest.raises(TypeError, match="x1 to be a tensor"), warnings.catch_warnings():
        nngp([[1.0]], None, "relu", 1)
