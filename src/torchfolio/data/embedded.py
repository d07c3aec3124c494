"""Sets that come with scikit-learn: no download, seconds to use. A function here is a set of that name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.data.splits import Raw


def digits() -> Raw:
    """1,797 handwritten digits as 8x8 grey images."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 16
    return Raw("digits", (x, _labels(bunch.target)), None, None, tuple(map(str, range(10))))


def breast_cancer() -> Raw:
    """569 tumours, 30 features, malignant or benign."""
    from sklearn.datasets import load_breast_cancer

    return _table("breast_cancer", load_breast_cancer())


def wine() -> Raw:
    """178 wines, 13 features, 3 cultivars."""
    from sklearn.datasets import load_wine

    return _table("wine", load_wine())


def iris() -> Raw:
    """150 flowers, 4 features, 3 species."""
    from sklearn.datasets import load_iris

    return _table("iris", load_iris())


def diabetes() -> Raw:
    """442 patients, 10 features, disease progression after a year (regression)."""
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes()
    x = torch.from_numpy(np.asarray(bunch.data, dtype=np.float32))
    return Raw("diabetes", (x, torch.from_numpy(np.asarray(bunch.target, dtype=np.float32))), None, None, ())


def _table(name: str, bunch) -> Raw:
    x = torch.from_numpy(np.asarray(bunch.data, dtype=np.float32))
    return Raw(name, (x, _labels(bunch.target)), None, None, tuple(map(str, bunch.target_names)))


def _labels(target: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(target, dtype=np.int64))
