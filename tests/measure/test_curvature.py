"""Curvature against matrices whose spectrum is known, and Hessians formed in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchfolio.measure import Hessian, hessian_eigenvalues, hessian_traces, hutchinson_trace, hvp, lanczos
from torchfolio.measure.curvature import Which


def symmetric(spectrum: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with this spectrum, and its eigenvectors as columns."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return q @ torch.diag(spectrum.double()) @ q.T, q


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3


def full_hessian(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in net.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])

    def loss(theta: Tensor) -> Tensor:
        parts = zip(names, theta.split(sizes), strict=True)
        values = {n: t.view_as(net.get_parameter(n)) for n, t in parts}
        return F.cross_entropy(functional_call(net, values, (x,)), y)

    return hessian(loss)(flat)  # pyright: ignore[reportReturnType]


def test_hvp_of_a_quadratic() -> None:
    a, _ = symmetric(torch.tensor([3.0, 1.0, -2.0]))
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, dtype=torch.float64)
    assert torch.allclose(hvp(lambda: theta @ a @ theta / 2, theta, v), a @ v)


def test_hvp_keeps_the_arrangement() -> None:
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return w.pow(3).sum() + w.sum() * b.square().sum()

    u, v = torch.randn_like(w), torch.randn_like(b)
    first = 6 * w * u + 2 * (b @ v)
    second = 2 * (b * u.sum() + w.sum() * v)
    listed = hvp(loss, [w, b], [u, v])
    assert torch.allclose(listed[0], first)
    assert torch.allclose(listed[1], second)
    flat = hvp(loss, [w, b], torch.cat([u.flatten(), v]))
    assert torch.allclose(flat, torch.cat([first.flatten(), second]))
    named = hvp(loss, {"w": w, "b": b}, {"b": v, "w": u})
    assert torch.allclose(named["w"], first)
    assert torch.allclose(named["b"], second)


def test_hvp_of_a_linear_loss_is_zero() -> None:
    theta = torch.randn(3, requires_grad=True)
    assert torch.equal(hvp(lambda: 2 * theta.sum(), theta, torch.ones(3)), torch.zeros(3))


def test_hvp_refuses_what_does_not_fit() -> None:
    theta = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="expected a vector of 3 numbers"):
        hvp(lambda: theta.square().sum(), theta, torch.ones(4))
    with pytest.raises(ValueError, match="to be a scalar"):
        hvp(lambda: theta.square(), theta, torch.ones(3))
    with pytest.raises(ValueError, match="names of the parameters"):
        hvp(lambda: theta.square().sum(), {"a": theta}, {"b": theta})


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("largest", [5.0, 3.0, 2.5]),
        ("smallest", [-3.0, -3.5, -6.0]),
        ("magnitude", [-6.0, 5.0, -3.5]),
        ("both", [5.0, 3.0, -6.0]),
    ],
)
def test_lanczos_finds_the_ends_of_a_known_spectrum(which: Which, expected: list[float]) -> None:
    spectrum = torch.cat([torch.tensor([5.0, 3.0, 2.5, -3.0, -3.5, -6.0]), torch.linspace(-1, 1, 94)])
    a, _ = symmetric(spectrum)
    eigen = lanczos(lambda v: a @ v, 100, 3, which=which, tolerance=1e-8, generator=generator(), dtype=torch.float64)
    assert eigen.converged
    assert eigen.products < 100
    torch.testing.assert_close(eigen.values, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(eigen.vectors.T @ eigen.vectors, torch.eye(3, dtype=torch.float64))
    exact = (a @ eigen.vectors - eigen.vectors * eigen.values).norm(dim=0)
    torch.testing.assert_close(eigen.residuals, exact, atol=1e-12, rtol=1e-3)


def test_vectors_are_the_eigenvectors() -> None:
    spectrum = torch.linspace(1, 10, 40)
    a, q = symmetric(spectrum)
    eigen = lanczos(lambda v: a @ v, 40, 2, tolerance=1e-9, generator=generator(), dtype=torch.float64)
    assert (eigen.vectors.T @ q[:, [39, 38]]).abs().diagonal().min() > 1 - 1e-8


def test_float32_keeps_its_basis_orthogonal() -> None:
    a, _ = symmetric(torch.logspace(3, -3, 200))
    a = a.float()
    eigen = lanczos(lambda v: a @ v, 200, 8, tolerance=1e-6, iterations=150, generator=generator())
    assert eigen.values.dtype == torch.float32
    torch.testing.assert_close(eigen.values, torch.logspace(3, -3, 200)[:8], rtol=1e-4, atol=1e-3)


def test_whole_spectrum_with_repeated_eigenvalues() -> None:
    spectrum = torch.tensor([4.0, 4.0, 4.0, 1.0, 0.0, 0.0])
    a, _ = symmetric(spectrum)
    eigen = lanczos(lambda v: a @ v, 6, 6, tolerance=1e-10, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(eigen.values, spectrum.double(), atol=1e-10, rtol=0)


def test_zero_matrix() -> None:
    eigen = lanczos(torch.zeros_like, 5, 2, generator=generator())
    assert eigen.converged
    assert torch.equal(eigen.values, torch.zeros(2))


def test_warm_start_saves_products() -> None:
    spectrum = torch.cat([torch.tensor([8.0, 7.0]), torch.linspace(0, 6, 498)])
    a, _ = symmetric(spectrum)
    near = a + 1e-3 * symmetric(torch.randn(500, generator=generator()), seed=3)[0]
    cold = lanczos(lambda v: near @ v, 500, generator=generator(), dtype=torch.float64)
    before = lanczos(lambda v: a @ v, 500, tolerance=1e-6, generator=generator(), dtype=torch.float64)
    warm = lanczos(lambda v: near @ v, 500, start=before.vectors, generator=generator(), dtype=torch.float64)
    assert warm.products < cold.products
    assert abs(warm.values[0] - cold.values[0]) < 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bulk", [1.0, 4.5])
def test_warm_start_sees_an_eigenvector_that_has_overtaken(bulk: float, seed: int) -> None:
    spectrum = torch.cat([torch.linspace(0, bulk, 4998), torch.tensor([5.0, 6.0])])
    stale = torch.eye(5000)[4998]  # an exact eigenvector, of the second eigenvalue
    eigen = lanczos(lambda v: spectrum * v, 5000, start=stale, generator=generator(seed))
    assert abs(eigen.values[0] - 6) < 1e-3
    assert eigen.products < 20


def test_too_few_products_are_reported() -> None:
    a, _ = symmetric(torch.linspace(0, 1, 300))
    eigen = lanczos(lambda v: a @ v, 300, iterations=3, tolerance=1e-10, generator=generator(), dtype=torch.float64)
    assert not eigen.converged
    assert eigen.products == 3


def test_lanczos_errors() -> None:
    with pytest.raises(ValueError, match="k between 1 and 3, got 4"):
        lanczos(lambda v: v, 3, 4)
    with pytest.raises(ValueError, match="got 'top'"):
        lanczos(lambda v: v, 3, which="top")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 2 iterations"):
        lanczos(lambda v: v, 3, 2, iterations=1)
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda v: v * torch.nan, 3)
    with pytest.raises(ValueError, match="start of 3 rows"):
        lanczos(lambda v: v, 3, start=torch.ones(4))
    with pytest.raises(ValueError, match="not zero"):
        lanczos(lambda v: v, 3, start=torch.zeros(3))


def test_operator_equals_the_full_hessian(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    full = full_hessian(net, *data)
    operator = Hessian(net, F.cross_entropy, data)
    formed = torch.stack([operator(e) for e in torch.eye(operator.n, dtype=torch.float64)], 1)
    torch.testing.assert_close(formed, full)
    assert {n: t.shape for n, t in operator.split(full[0]).items()} == {n: p.shape for n, p in net.named_parameters()}


@pytest.mark.parametrize("form", ["pair", "batches", "dataset", "loader", "tensor dataset"])
def test_every_form_of_data_gives_the_mean_over_examples(
    net: nn.Sequential, data: tuple[Tensor, Tensor], form: str
) -> None:
    class Rows(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return data[0][i], data[1][i]

    forms = {
        "pair": data,
        "batches": [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])],
        "dataset": Rows(),
        "loader": DataLoader(Rows(), batch_size=5),
        "tensor dataset": TensorDataset(*data),
    }
    v = torch.randn(31, dtype=torch.float64)
    product = Hessian(net, F.cross_entropy, forms[form], batch_size=5)(v)
    torch.testing.assert_close(product, full_hessian(net, *data) @ v)


def test_eigenvalues_of_a_network(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    exact = torch.linalg.eigvalsh(full_hessian(net, *data))
    top = hessian_eigenvalues(net, F.cross_entropy, data, 3, tolerance=1e-8, generator=generator())
    torch.testing.assert_close(top.values, exact.flip(0)[:3])
    bottom = hessian_eigenvalues(
        net, F.cross_entropy, data, 2, which="smallest", batch_size=5, tolerance=1e-8, generator=generator()
    )
    torch.testing.assert_close(bottom.values.flip(0), exact[:2])


def test_some_parameters_alone(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    full = full_hessian(net, *data)
    last = Hessian(net, F.cross_entropy, data, names=["2.weight", "2.bias"])
    v = torch.randn(15, dtype=torch.float64)
    torch.testing.assert_close(last(v), full[-15:, -15:] @ v)
    net[0].requires_grad_(False)
    assert Hessian(net, F.cross_entropy, data).names == ["2.weight", "2.bias"]


def test_a_step_is_noticed(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    operator = Hessian(net, F.cross_entropy, data)
    v = torch.randn(31, dtype=torch.float64)
    before = operator(v)
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(2)
    after = operator(v)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, full_hessian(net, *data) @ v)


def test_batch_statistics_and_gradients_do_not_change(data: tuple[Tensor, Tensor]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    hessian_eigenvalues(net, F.cross_entropy, data, batch_size=6)
    hessian_eigenvalues(net.eval(), F.cross_entropy, data)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_operator_errors(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    noisy = nn.Sequential(net, nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        Hessian(noisy, F.cross_entropy, data)
    Hessian(noisy.eval(), F.cross_entropy, data)
    with pytest.raises(ValueError, match="'head' is no parameter"):
        Hessian(net, F.cross_entropy, data, names=["head"])
    with pytest.raises(ValueError, match="requires a gradient, got none"):
        Hessian(nn.ReLU(), F.cross_entropy, data)
    with pytest.raises(ValueError, match="vector of 31 numbers"):
        Hessian(net, F.cross_entropy, data)(torch.zeros(3))
    with pytest.raises(ValueError, match="data holds no examples"):
        Hessian(net, F.cross_entropy, (data[0][:0], data[1][:0]))(torch.zeros(31))
    with pytest.raises(ValueError, match=r"as many targets as inputs in data, got lengths \[12, 3\]"):
        Hessian(net, F.cross_entropy, (data[0], data[1][:3]))(torch.zeros(31))
    with pytest.raises(TypeError, match="batches \\(x, y\\) of two tensors, got 1"):
        Hessian(net, F.cross_entropy, [data[0]])(torch.zeros(31))


def test_trace_of_a_diagonal_matrix_is_exact() -> None:
    d = torch.tensor([1.0, -2.0, 5.0])
    trace = hutchinson_trace(lambda v: d * v, 3, samples=4)
    assert trace == (4.0, 0.0, 4)


def test_trace_lies_within_its_error() -> None:
    a, _ = symmetric(torch.linspace(-1, 3, 60))
    trace = hutchinson_trace(lambda v: a @ v, 60, samples=400, generator=generator(), dtype=torch.float64)
    assert abs(trace.value - 60) < 3 * trace.standard_error
    off_diagonal = a - torch.diag(a.diagonal())
    expected = (2 * off_diagonal.square().sum() / 400).sqrt().item()
    assert trace.standard_error == pytest.approx(expected, rel=0.15)


def test_tolerance_stops_early() -> None:
    a, _ = symmetric(torch.linspace(1, 1.5, 60))
    trace = hutchinson_trace(
        lambda v: a @ v, 60, samples=1000, tolerance=0.05, generator=generator(), dtype=torch.float64
    )
    assert trace.samples == 8
    assert trace.standard_error < 0.05 * trace.value
    with pytest.raises(ValueError, match="at least 2 samples"):
        hutchinson_trace(lambda v: v, 3, samples=1)


def test_traces_by_parameter(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    diagonal = full_hessian(net, *data).diagonal()
    sizes = [p.numel() for p in net.parameters()]
    exact = dict(zip(dict(net.named_parameters()), [t.sum().item() for t in diagonal.split(sizes)], strict=True))
    traces = hessian_traces(net, F.cross_entropy, data, samples=300, generator=generator())
    assert list(traces) == list(exact)
    for name, trace in traces.items():
        assert abs(trace.value - exact[name]) < 4 * trace.standard_error


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    x, y = torch.randn(6, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    hessian = Hessian(net, nn.functional.cross_entropy, (x, y))
    v = torch.randn(hessian.n, dtype=torch.float64)
    product, h = hessian(v), 1e-5
    parameters = list(net.parameters())

    def gradient(shift):
        with torch.no_grad():
            parts = v.split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part.view_as(p), alpha=shift)
        return torch.cat([g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(net(x), y), parameters)])

    ahead, behind = gradient(h), gradient(-2 * h)
    assert torch.allclose(product, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)
