"""Sets that come with scikit-learn: no download, seconds to use. A function here is a set of that name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.data.splits import Raw


def digits() -> Raw:
    """1,797 handwritten digits as 8x8 grey images."""
    # Importing scikit-learn takes most of the time that a small training does: the set that all begin with is read
    # without it.
    table = np.loadtxt(_folder() / "digits.csv.gz", delimiter=",")
    x = torch.from_numpy(table[:, :-1].astype(np.float32)).reshape(-1, 1, 8, 8) / 16
    return Raw("digits", (x, _labels(table[:, -1])), None, None, tuple(map(str, range(10))))


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


def _folder() -> Path:
    """Where scikit-learn keeps its sets."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "datasets", "data")


def _table(name: str, bunch) -> Raw:
    x = torch.from_numpy(np.asarray(bunch.data, dtype=np.float32))
    return Raw(name, (x, _labels(bunch.target)), None, None, tuple(map(str, bunch.target_names)))


def _labels(target: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(target, dtype=np.int64))


def szt() -> Raw:
    """4,096 binary patterns of 12 bits in two classes that are alike under the symmetries of an icosahedron.

    The bits stand on its vertices. With $c$ ones, $e$ edges and $a$ antipodal pairs between ones, and $f = c(c-1)/2 - e - a$
    other pairs, the class is 1 where $206 c + 4 e - 68 a - 44 f > 859$, for 2,118 patterns. Row $i$ is the number $i$ in
    binary, its first bit the most significant.

    The task of Shwartz-Ziv and Tishby, "Opening the Black Box of Deep Neural Networks via Information", 2017; the rule was
    recovered from their table and agrees with all of its rows.
    """
    bits = (torch.arange(4096)[:, None] >> torch.arange(11, -1, -1)) & 1
    ones, edges, antipodes = bits.sum(1), _pairs(bits, _EDGES), _pairs(bits, _ANTIPODES)
    others = ones * (ones - 1) // 2 - edges - antipodes
    label = 206 * ones + 4 * edges - 68 * antipodes - 44 * others > 859
    return Raw("szt", (bits.float(), label.long()), None, None, ("0", "1"))


_EDGES = (
    (8, 10), (8, 9), (7, 10), (7, 9), (7, 8), (6, 11), (6, 9), (6, 7), (5, 11), (5, 10), (5, 7), (5, 6), (4, 11), (4, 9),
    (4, 6), (3, 10), (3, 8), (2, 9), (2, 8), (2, 4), (2, 3), (1, 11), (1, 4), (1, 3), (1, 2), (0, 11), (0, 10), (0, 5),
    (0, 3), (0, 1),
)  # fmt: skip
_ANTIPODES = ((8, 11), (4, 10), (3, 6), (2, 5), (1, 7), (0, 9))


def _pairs(bits: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """How many of the pairs of places hold ones at both, row by row."""
    i, j = torch.tensor(pairs).T
    return (bits[:, i] * bits[:, j]).sum(1)
