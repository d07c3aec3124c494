"""Streaming moments against numpy on all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchfolio.measure import StreamingMoments


def rows(n: int = 500, d: int = 6, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + offset


def stream(x: torch.Tensor, sizes: list[int], **options: bool) -> StreamingMoments:
    moments = StreamingMoments(**options)
    for part in x.split(sizes):
        moments.update(part)
    return moments


def test_uneven_batches_equal_numpy() -> None:
    x = rows()
    moments = stream(x, [1, 7, 200, 0, 292])
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.numpy().T), rtol=1e-11)
    np.testing.assert_allclose(moments.covariance(0), np.cov(x.numpy().T, ddof=0), rtol=1e-11)
    np.testing.assert_allclose(moments.variance(), x.numpy().var(0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(x.numpy().T), rtol=1e-10)


def test_large_means_in_float32_do_not_cancel() -> None:
    x = rows(2000, 3, offset=1e4).float()
    moments = stream(x, [500] * 4)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.double().numpy().T), rtol=1e-9)


def test_variance_alone() -> None:
    x = rows()
    moments = stream(x, [250, 250], covariance=False)
    np.testing.assert_allclose(moments.variance(), x.numpy().var(0, ddof=1), rtol=1e-12)
    with pytest.raises(ValueError, match="covariance=True"):
        moments.covariance()
    with pytest.raises(ValueError, match="one stream keeps the covariance"):
        moments.merge(StreamingMoments())


def test_merging_equals_one_stream() -> None:
    x = rows()
    left, right, empty = stream(x[:123], [123]), stream(x[123:], [300, 77]), StreamingMoments()
    merged = empty.merge(left).merge(right).merge(StreamingMoments())
    np.testing.assert_allclose(merged.covariance(), np.cov(x.numpy().T), rtol=1e-11)
    np.testing.assert_allclose(left.mean, x[:123].numpy().mean(0), rtol=1e-12)  # merging leaves the parts alone
    with pytest.raises(ValueError, match="expected rows of 6 features, got 2"):
        merged.merge(StreamingMoments().update(torch.randn(3, 2)))


def test_state_is_restored() -> None:
    x = rows()
    half = stream(x[:200], [200])
    other = StreamingMoments()
    other.load_state_dict(half.state_dict())
    other.update(x[200:])
    np.testing.assert_allclose(other.covariance(), np.cov(x.numpy().T), rtol=1e-11)
    assert half.count == 200


def test_rows_of_any_shape_and_type() -> None:
    maps = torch.randint(0, 255, (10, 3, 4, 4), dtype=torch.uint8)
    moments = StreamingMoments().update(maps)
    np.testing.assert_allclose(moments.mean, maps.flatten(1).numpy().mean(0))
    per_channel = StreamingMoments().update(maps.movedim(1, -1).flatten(0, -2))
    assert per_channel.count == 160
    np.testing.assert_allclose(per_channel.mean, maps.numpy().mean((0, 2, 3)))
    np.testing.assert_allclose(StreamingMoments().update(torch.arange(4.0)).variance(0), [1.25])


def test_constant_features_have_no_correlation() -> None:
    x = torch.stack([torch.arange(5.0), torch.ones(5)], 1)
    correlation = StreamingMoments().update(x).correlation()
    assert correlation[0, 0].item() == pytest.approx(1)
    assert correlation[1].isnan().all()


def test_errors_say_what_was_got() -> None:
    moments = StreamingMoments(3)
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        _ = moments.mean
    with pytest.raises(ValueError, match="expected rows of 3 features, got 2"):
        moments.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(torch.tensor([[0.0, torch.nan, 0.0]]))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"more than 1 row\(s\), got 1"):
        moments.covariance()
