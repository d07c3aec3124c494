"""Similarities against their definitions and invariances."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from torchfolio.measure import StreamingCKA, cka_from_kernels, hsic, linear_cka, linear_cka_pairs, rbf_cka, rsa

F64 = torch.float64


def features(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(features(d, d, seed=9)).Q


def by_definition(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    h = torch.eye(n, dtype=F64) - 1 / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return (k * m).sum() / (k.norm() * m.norm())


@pytest.mark.parametrize(("p", "q"), [(5, 3), (40, 60), (5, 200)])
def test_linear_cka_equals_its_definition(p: int, q: int) -> None:
    # Few features go through cross-covariances, many through kernels.
    x, y = features(30, p), features(30, q, seed=1) + 0.5 * features(30, p)[:, :1]
    torch.testing.assert_close(linear_cka(x, y), by_definition(x, y))
    torch.testing.assert_close(linear_cka(x, y), cka_from_kernels(x @ x.T, y @ y.T))


@pytest.mark.parametrize("d", [4, 50])
@pytest.mark.parametrize("similarity", [linear_cka, rbf_cka])
@pytest.mark.parametrize("unbiased", [False, True])
def test_invariant_to_rotation_scale_and_shift(similarity, d: int, unbiased: bool) -> None:
    x, y = features(20, d), features(20, 7, seed=1)
    moved = -3 * x @ orthogonal(d) + 5
    assert similarity(x, x, unbiased=unbiased).item() == pytest.approx(1, abs=1e-12)
    assert similarity(x, moved, unbiased=unbiased).item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(similarity(x, y, unbiased=unbiased), similarity(moved, y, unbiased=unbiased))
    torch.testing.assert_close(similarity(x, y, unbiased=unbiased), similarity(y, x, unbiased=unbiased))


@pytest.mark.parametrize("similarity", [linear_cka, rbf_cka])
def test_not_invariant_to_general_linear_maps(similarity) -> None:
    x = features(50, 6)
    assert similarity(x, x @ torch.diag(torch.logspace(0, 3, 6, dtype=F64))) < 0.7


def test_float32_is_close_and_half_is_computed_in_float32() -> None:
    x = features(64, 16)
    assert linear_cka(x.float(), (2 * x @ orthogonal(16) + 1).float()).item() == pytest.approx(1, abs=1e-5)
    value = linear_cka(x.bfloat16(), x.half())
    assert value.dtype == torch.float32
    assert value > 0.999
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cka(x.float(), x.float() ** 2), linear_cka(x.float(), x.float() ** 2).float())


@pytest.mark.parametrize("similarity", [linear_cka, rbf_cka, rsa])
@pytest.mark.parametrize("d", [2, 12])
def test_gradients_are_right(similarity, d: int) -> None:
    x, y = features(6, d).requires_grad_(), features(6, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(similarity, (x, y))


def test_gradient_of_the_unbiased_estimate() -> None:
    x, y = features(7, 4).requires_grad_(), features(7, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, unbiased=True), (x, y))


def test_tiny_activations_keep_their_gradient() -> None:
    x, y = features(16, 4).float(), features(16, 4, seed=1).float()
    large, small = x.clone().requires_grad_(), (1e-15 * x).requires_grad_()
    linear_cka(large, y).backward()
    linear_cka(small, y).backward()
    assert large.grad is not None
    assert small.grad is not None
    torch.testing.assert_close(small.grad * 1e-15, large.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", [linear_cka, rbf_cka, rsa])
def test_constant_features_have_similarity_zero_and_no_gradient(similarity) -> None:
    x = (torch.ones(8, 1) * torch.randn(5)).requires_grad_()
    y = torch.randn(8, 3).requires_grad_()
    with pytest.warns(UserWarning, match="do not vary"):
        value = similarity(x, y)
    assert value == 0
    torch.as_tensor(value).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # pyright: ignore[reportArgumentType]
    assert torch.equal(y.grad, torch.zeros_like(y))  # pyright: ignore[reportArgumentType]


def test_unbiased_hsic_is_the_mean_over_quadruples() -> None:
    x, y = features(6, 2), features(6, 2, seed=1)
    k, m = (x @ x.T), (y @ y.T)
    total, count = 0.0, 0
    for i, j, q, r in torch.cartesian_prod(*[torch.arange(6)] * 4).tolist():
        if len({i, j, q, r}) == 4:
            total += (k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])).item()
            count += 1
    assert hsic(k, m, unbiased=True).item() == pytest.approx(total / count, rel=1e-10)


def test_biased_hsic_equals_its_definition() -> None:
    x, y = features(9, 3), features(9, 2, seed=1)
    k, m = x @ x.T, y @ y.T
    h = torch.eye(9, dtype=F64) - 1 / 9
    torch.testing.assert_close(hsic(k, m), (k @ h @ m @ h).trace() / 64)


def test_unbiased_does_not_drift_with_many_features() -> None:
    pairs = [(features(20, 500, seed=2 * s), features(20, 500, seed=2 * s + 1)) for s in range(20)]
    biased = torch.stack([linear_cka(x, y) for x, y in pairs])
    unbiased = torch.stack([linear_cka(x, y, unbiased=True) for x, y in pairs])
    assert biased.mean() > 0.9
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 20**0.5


def test_streaming_is_the_ratio_of_mean_hsic() -> None:
    x, y = features(400, 10), features(400, 10) + features(400, 10, seed=1)
    stream = StreamingCKA()
    for a, b in zip(x.split(40), y.split(40), strict=True):
        stream.update(a, b)
    parts = [
        [
            hsic(a @ a.T, b @ b.T, unbiased=True),
            hsic(a @ a.T, a @ a.T, unbiased=True),
            hsic(b @ b.T, b @ b.T, unbiased=True),
        ]
        for a, b in zip(x.split(40), y.split(40), strict=True)
    ]
    means = torch.tensor(parts).mean(0)
    assert stream.compute() == pytest.approx((means[0] / (means[1] * means[2]).sqrt()).item(), rel=1e-6)
    assert stream.compute() == pytest.approx(linear_cka(x, y, unbiased=True).item(), abs=0.02)
    with pytest.raises(ValueError, match="at least one batch"):
        StreamingCKA().compute()


def test_rbf_equals_its_definition() -> None:
    x, y = features(12, 3), features(12, 5, seed=1)

    def kernel(z: Tensor) -> Tensor:
        distance = torch.cdist(z, z)
        above = distance[torch.triu_indices(12, 12, 1).unbind()]
        return torch.exp(-distance.square() / (2 * (0.4 * above.median()) ** 2))

    torch.testing.assert_close(rbf_cka(x, y, bandwidth=0.4), cka_from_kernels(kernel(x), kernel(y)))
    with pytest.raises(ValueError, match="bandwidth to be positive"):
        rbf_cka(x, y, bandwidth=0)
    with pytest.raises(ValueError, match="median distance"):
        rbf_cka(torch.cat([torch.zeros(9, 3), features(3, 3)]), y)


def test_rsa_equals_pearson_of_the_cosines() -> None:
    x, y = features(10, 4), features(10, 6, seed=1)
    cosines = [torch.cosine_similarity(z[:, None], z[None], dim=-1).flatten() for z in (x, y)]
    torch.testing.assert_close(rsa(x, y), torch.corrcoef(torch.stack(cosines))[0, 1])
    assert rsa(x, 2 * x @ orthogonal(4)).item() == pytest.approx(1)


def test_kernel_cka_of_a_kernel_with_itself() -> None:
    k = features(8, 3) @ features(8, 3).T + 7  # a shift is centred away
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cka_from_kernels(k, 5 * k).item() == pytest.approx(1)


def test_maps_are_flattened() -> None:
    x = features(6, 24).view(6, 2, 3, 4)
    torch.testing.assert_close(linear_cka(x, x.flatten(1) ** 2), linear_cka(x.flatten(1), x.flatten(1) ** 2))


@pytest.mark.parametrize("similarity", [linear_cka, rbf_cka, rsa])
def test_errors_say_what_was_got(similarity) -> None:
    x = features(5, 3)
    with pytest.raises(ValueError, match="same examples, got 5 and 4"):
        similarity(x, x[:4])
    with pytest.raises(ValueError, match="examples, got 1"):
        similarity(x[:1], x[:1])
    with pytest.raises(ValueError, match="not finite"):
        similarity(x, x * torch.nan)
    with pytest.raises(ValueError, match=r"expected features \[N, ...\]"):
        similarity(x[:, 0], x)


def test_unbiased_needs_four_examples() -> None:
    with pytest.raises(ValueError, match="at least 4 examples, got 3"):
        linear_cka(features(3, 2), features(3, 2), unbiased=True)
    with pytest.raises(ValueError, match="two kernels"):
        cka_from_kernels(features(3, 2), features(3, 2))


def test_pairs_of_layers_equal_each_by_itself() -> None:
    xs = {"a": features(12, 5).requires_grad_(), "b": features(12, 40).float(), "c": torch.ones(12, 3)}
    ys = {"d": features(12, 6) ** 2, "e": features(12, 50) ** 2}
    pairs = [("a", "d"), ("a", "e"), ("b", "d"), ("b", "e")]
    values = linear_cka_pairs(xs, ys, pairs)
    for value, (i, j) in zip(values, pairs, strict=True):
        torch.testing.assert_close(value, linear_cka(xs[i], ys[j]))
    torch.stack(values).sum().backward()
    got = xs["a"].grad.clone()
    xs["a"].grad = None
    (linear_cka(xs["a"], ys["d"]) + linear_cka(xs["a"], ys["e"])).backward()
    torch.testing.assert_close(got, xs["a"].grad)
    with pytest.warns(UserWarning, match="do not vary"):
        assert linear_cka_pairs(xs, ys, [("c", "d")])[0] == 0
